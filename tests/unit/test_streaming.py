"""What a person sees of a long command, and is told when it fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from images.building import streaming
from rollout.problem import Problem


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("cp: write error: No space left on device", "the disk is full"),
        (
            "error: Hash mismatch for `torch==2.9.0`",
            "the file of torch==2.9.0 has another sha256 than the lock",
        ),
        ("error: Failed to fetch: `http://x`", "the package index cannot be reached"),
        ("error sending request for url (http://x)", "the package index does not answer"),
        ("× No solution found when resolving dependencies", "does not have a locked version"),
    ],
)
def test_a_known_failure_is_said_in_plain_words(line: str, sentence: str) -> None:
    assert sentence in streaming.meaning(["step 1", line, "the builder's own last word"], 1)


def test_an_unknown_failure_is_said_with_its_last_line() -> None:
    said = streaming.meaning(["step 1", " it broke ", "", " "], 125)
    assert said == "the builder exited with 125: it broke"
    assert streaming.meaning([], 1) == "the builder exited with 1: no output"


def test_a_failed_command_shows_its_lines_and_raises_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = "echo one; echo two >&2; printf '\\377'; echo three; exit 5"
    with pytest.raises(Problem, match=r"the builder exited with 5: .three$"):
        streaming.run(["sh", "-c", script])
    assert capsys.readouterr().out.startswith("one\ntwo\n")


def test_what_one_of_our_stations_says_is_said_again_with_its_exit_code() -> None:
    """No room for the second of two builds is no difference between them."""
    script = "echo 'error: no disk space for a build: 3 GiB free; free some'; exit 3"
    with pytest.raises(Problem) as caught:
        streaming.run(["sh", "-c", script], station=True)
    assert caught.value.code == 3
    assert caught.value.sentence == "no disk space for a build: 3 GiB free; free some"
    with pytest.raises(Problem, match="the builder exited with 3") as caught:
        streaming.run(["sh", "-c", script])  # uv, whose lines begin so, too
    assert caught.value.code == 1


def test_a_command_that_succeeds_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    streaming.run(["sh", "-c", "echo no space left on device"])
    assert capsys.readouterr().out == "no space left on device\n"


def test_a_command_runs_where_and_with_the_mask_it_is_told(tmp_path: Path) -> None:
    script = "pwd; umask; echo $A; touch file"
    streaming.run(["sh", "-c", f"({script}) > out"], {"A": "b"}, tmp_path, 0o077)
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n0077\nb\n"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_command_that_is_told_nothing_runs_as_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A", "of this process")
    before = os.umask(0o027)
    try:
        streaming.run(["sh", "-c", "pwd; umask; echo $A"])
    finally:
        os.umask(before)
    assert capsys.readouterr().out == f"{tmp_path}\n0027\nof this process\n"


class Interrupted:
    """A terminal in front of which somebody presses Ctrl-C at the first line."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text
        raise KeyboardInterrupt


def ended(pid: int) -> bool:
    """Whether a process is gone within five seconds; one that nobody waited for counts as gone."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_the_builder_and_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Interrupted()
    monkeypatch.setattr(sys, "stdout", terminal)
    script = "sleep 60 & echo $$ $!; wait"
    with pytest.raises(KeyboardInterrupt):
        streaming.run(["sh", "-c", script])
    parent, child = map(int, terminal.text.split())
    assert os.getpid() not in (parent, child)
    assert ended(parent)
    assert ended(child)

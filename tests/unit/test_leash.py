"""A command ends with whoever started it, however that ends, and takes its children with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from images.host import leash

# Starts a child that is deaf to what ends others, and one that has left the group.
TREE = (
    "trap '' HUP INT TERM; sleep 60 & echo $! >> $0; setsid sleep 61 & echo $! >> $0; "
    "echo $$ >> $0; touch $0.ready; wait"
)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def ended(pids: list[int]) -> bool:
    """Whether processes are gone within five seconds."""
    for _ in range(100):
        if not any(map(running, pids)):
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def test_the_exit_code_of_a_command_is_its_own(tmp_path: Path) -> None:
    assert leash.run(["sh", "-c", "exit 7"]) == 7
    script = f"cd {tmp_path}; pwd; echo $A"
    assert leash.run(["sh", "-c", f"({script}) > out"], cwd=tmp_path, env={"A": "b"}) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path}\nb\n"


def test_a_command_waits_for_no_input_of_a_terminal() -> None:
    program = "from images.host import leash; raise SystemExit(leash.run(['cat']))"
    done = subprocess.run(
        [sys.executable, "-c", program], input="typed", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    leash.run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid"])
    assert ended(numbers(tmp_path / "pid"))


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_a_command_that_is_not_there_leaves_no_watch() -> None:
    before = children()
    with pytest.raises(FileNotFoundError):
        leash.run(["/nowhere/at/all"])
    assert children() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_whatever_ends_a_run_ends_its_command_and_its_children(
    tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "pids"
    program = (
        "import sys; from images import host; from images.host import leash; leash.GRACE = 0.5; "
        f"host.guarded(lambda _: leash.run(['sh', '-c', {TREE!r}, {str(file)!r}]), [])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.DEVNULL,
        # As a terminal starts it: where these tests run in the background of a shell, they ignore
        # Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(Path(f"{file}.ready"))
    child, free, shell = numbers(file)
    try:
        process.send_signal(number)
        process.wait(10)
        assert ended([child, shell])
        assert running(free), "it has left the group: leash.ended() is for such"
    finally:
        os.kill(free, signal.SIGKILL)


def test_what_left_the_group_is_found_by_its_environment() -> None:
    options = {"start_new_session": True}
    ours, other = (
        subprocess.Popen(["sleep", "60"], env={"ROLLOUT_CONTAINER": name}, **options)  # type: ignore[call-overload]
        for name in ("rollout-container-1", "rollout-container-12")
    )
    try:
        # Until then it is still this process's own program, with this environment.
        for pid in (ours.pid, other.pid):
            while b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                time.sleep(0.01)
        leash.ended("ROLLOUT_CONTAINER", "rollout-container-1")
        assert ended([ours.pid])
        assert running(other.pid)
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()

"""Everything that a process started, found and ended: daemons leave their parents on purpose."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 30.0  # seconds that killed processes have to be gone


def adopt(orphans: bool) -> None:
    """Whether orphans of our children become our children, whatever session they have begun."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


def end_with_parent() -> None:
    """For a child before its exec: the kernel kills it when we end, however we end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int | None = None, proc: Path = Path("/proc")) -> set[int]:
    """The processes below one (this one), at any depth."""
    children: dict[int, list[int]] = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything, so it is read from behind.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    ahead = [os.getpid() if pid is None else pid]
    while ahead:
        below = [child for child in children.get(ahead.pop(), []) if child not in found]
        found.update(below)
        ahead += below
    return found


def end(before: set[int]) -> set[int]:
    """Kill every descendant that was not there before; returns those that would not end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        left = descendants() - before
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _reap(left)
        left = descendants() - before
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _reap(pids: set[int]) -> None:
    """Take note of the end of those that are our children: until then they count as processes."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

"""The owner of what lies on a machine: one process, told apart from every other.

Container, temporary folder and half-written file carry the name of their owner. So the next run
removes what a killed one has left, and touches nothing of a run that goes on.

Its number alone does not name a process: numbers are used again, each container counts its own, and
a folder may be shared by several machines.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from dataclasses import astuple, dataclass
from pathlib import Path

# Nothing of ours runs for so long. What another machine has left can be told by its age alone.
PATIENCE = 7 * 24 * 3600.0
PATTERN = r"[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+-\d+"


@dataclass(frozen=True)
class Owner:
    """A process: its machine, the boot, whose numbers, its number there, and when it started."""

    machine: str
    boot: str
    namespace: int
    process: int
    start: int

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""  # not every sandbox has it


def started(process: int) -> int | None:
    """When a process of this machine started, in ticks since the boot; None where it has ended."""
    # The name of the program stands in brackets, and may hold brackets and blanks itself.
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    # A zombie waits for its parent alone: it does nothing any more.
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def this() -> Owner:
    """The process that asks."""
    process = os.getpid()
    return Owner(
        _short(f"{socket.gethostname()} {_read('/etc/machine-id')}"),
        _short(_read("/proc/sys/kernel/random/boot_id")),
        Path("/proc/self/ns/pid").stat().st_ino,
        process,
        started(process) or 0,
    )


def parse(text: str) -> Owner | None:
    """The first owner that a name holds; None where it holds none."""
    found = re.search(rf"(?<![0-9a-zA-Z]){PATTERN}(?![0-9a-zA-Z])", text)
    if not found:
        return None
    machine, boot, *numbers = found[0].split("-")
    return Owner(machine, boot, *map(int, numbers))


def dead(owner: Owner, age: float = 0.0) -> bool:
    """Whether an owner has ended; ``age`` is the seconds since what it left was last changed."""
    here = this()
    if owner.machine == here.machine and owner.boot != here.boot:
        return True
    if (owner.machine, owner.namespace) != (here.machine, here.namespace):
        return age > PATIENCE  # it cannot be seen from here
    return started(owner.process) != owner.start


def abandoned(path: Path) -> bool:
    """Whether a file or folder is named after an owner that is dead."""
    owner = parse(path.name)
    if owner is None:
        return False
    try:
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return False  # somebody else was quicker
    return dead(owner, age)

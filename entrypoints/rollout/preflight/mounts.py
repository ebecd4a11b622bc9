"""What is mounted where, as the kernel tells a process of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.preflight import files


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str  # where it is mounted
    root: str  # the folder of the file system that is seen there
    kind: str  # type of the file system: "nfs4", "fuse.sshfs"
    source: str  # "server:/export"
    options: frozenset[str]  # of the mount and of the file system
    controllers: frozenset[str]  # of the file system alone; of cgroup v1 its controllers

    def holds(self, path: str) -> bool:
        """Whether a path lies below the mount point."""
        return path == self.point or path.startswith(self.point.rstrip("/") + "/")


def read(root: Path) -> list[Mount]:
    """What is mounted, in the kernel's order; nothing where it does not say.

    A line is ``36 35 98:0 /root /point rw,noatime master:1 - ext4 /dev/sda1 rw``; before the dash
    are any number of fields (proc_pid_mountinfo(5)).
    """
    found = []
    for line in files.text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 6 or len(right) < 3:
            continue
        own, its = frozenset(left[5].split(",")), frozenset(right[2].split(","))
        point, top, source = map(_plain, (left[4], left[3], right[1]))
        found.append(Mount(point, top, right[0], source, own | its, its))
    return found


def holding(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The mount that a path lies on: the deepest, and of several there the last one."""
    found: Mount | None = None
    for mount in mounts:
        if mount.holds(path) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _plain(text: str) -> str:
    """The kernel writes a blank in a name as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)

"""Control groups: what each of those that this process is in still allows, of v1 and of v2.

A limit of any group above counts as much as the own one: Kubernetes limits a pod and its container,
Slurm a job and its step. Seen are the groups below the mount point; what a group namespace hides
above it cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollout.preflight import files, mounts

_FOLDER = "/sys/fs/cgroup"
# Files of v2 and of v1: limit, use. Above "high" the kernel kills nobody, and lets nobody go on.
_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_RECLAIMED = ("inactive_file", "active_file")  # of memory.stat


@dataclass(frozen=True)
class Room:
    """What a group allows, and what of it is left; bytes or processes."""

    group: str  # its folder
    limit: int
    left: int


def memory(root: Path) -> Room | None:
    """The group that leaves the least memory; None where none has a limit.

    Files that were read and are no longer in use count as used, and the kernel gives their memory
    to whoever asks: `rollout verify` alone reads gigabytes.
    """
    return min(_memory(root), key=lambda room: room.left, default=None)


def _memory(root: Path) -> Iterator[Room]:
    for group in _own(root, "memory"):
        folder = root / group[1:]
        stat = _stat(folder)
        # v1's numbers of a group and those below it are "total_" ones, and it tells the least limit
        # of all groups above, seen or not.
        cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _RECLAIMED)
        for names in _MEMORY:
            pair = _pair(folder, *names)
            if pair:
                limit = min(pair[0], stat.get("hierarchical_memory_limit", pair[0]))
                yield Room(group, limit, min(limit, max(0, limit - pair[1] + cached)))


def pids(root: Path) -> Room | None:
    """The group that leaves the fewest processes (threads count); None where none has a limit."""
    rooms = []
    for group in _own(root, "pids"):
        pair = _pair(root / group[1:], "pids.max", "pids.current")
        if pair:
            rooms.append(Room(group, pair[0], max(0, pair[0] - pair[1])))
    return min(rooms, key=lambda room: room.left, default=None)


def _own(root: Path, controller: str) -> list[str]:
    """The folders of the groups that this process is in, innermost first.

    Where the kernel says nothing of mounts, those that every distribution has.
    """
    paths = _paths(root, controller)
    found: list[str] = []
    for mount in mounts.read(root):
        if mount.kind == "cgroup2":
            found += _upwards(mount, paths.get("", "/"))
        elif mount.kind == "cgroup" and controller in mount.controllers:
            found += _upwards(mount, paths.get(controller, "/"))
    return list(dict.fromkeys(found)) or [_FOLDER, f"{_FOLDER}/{controller}"]


def _upwards(mount: mounts.Mount, path: str) -> list[str]:
    """The folder of a group below its mount point, and each above it up to that.

    Without a group namespace the kernel tells paths of the host, of which a container sees a part:
    that part is the root of the mount.
    """
    top = mount.root.rstrip("/")
    below = path == mount.root or path.startswith(f"{top}/")
    parts = path.removeprefix(top).strip("/").split("/") if below else []
    if ".." in parts:  # a group beside the namespace's own
        parts = []
    parts = [part for part in parts if part]
    return ["/".join([mount.point, *parts[:n]]) for n in range(len(parts), -1, -1)]


def _paths(root: Path, controller: str) -> dict[str, str]:
    """The path of the own group: of v2 under "", of v1 under the controller's name."""
    found = {}
    for line in files.text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            found[""] = path
        elif controller in names.split(","):
            found[controller] = path
    return found


def _pair(folder: Path, limit: str, used: str) -> tuple[int, int] | None:
    """Limit and use of a group, None where it has none ("max", or no such file)."""
    try:
        text = (folder / limit).read_text(encoding="ascii").strip()
        return int(text), int((folder / used).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _stat(folder: Path) -> dict[str, int]:
    text = files.text(folder / "memory.stat")
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}

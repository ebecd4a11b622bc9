"""What is mounted over an image: the kernel's list, and which of it is the image's own.

Paths are relative to the image's root, without a leading slash. A launcher without an overlay puts
an image together from bind mounts of its own folders: those are the image's, and are compared. All
else was brought along by who runs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

LIST = "/proc/self/mountinfo"
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of the kernel's list; ``source`` is the folder of its file system, from there."""

    point: str
    device: str
    source: str


def parse(text: str) -> list[Mount]:
    """The lines of a mountinfo, in their order."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 5:
            source, point = (_ESCAPED.sub(_byte, field) for field in fields[3:5])
            found.append(Mount(point, fields[2], source))
    return found


def _byte(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


class Mounts(NamedTuple):
    """The mount points below a root, and those of them that show a folder of the image itself."""

    foreign: frozenset[str]
    own: frozenset[str]
    known: bool = True  # whether there was a list to read

    def over(self, path: str) -> str | None:
        """The foreign mount that a path lies on, or is; None for the image's own."""
        while True:
            if path in self.own:
                return None
            if path in self.foreign:
                return path
            if not path:
                return None
            path = path.rpartition("/")[0]

    def leads(self, path: str) -> bool:
        """Whether a foreign mount lies below a folder."""
        return any(point.startswith(f"{path}/") for point in self.foreign)


def below(root: str, prefix: str, listed: Iterable[Mount]) -> Mounts:
    """The mounts below an image's root, by what its environment (``prefix``) lies on."""
    root = "" if root == "/" else root
    points: Mapping[str, Mount] = {mount.point.rstrip("/"): mount for mount in listed}
    at = prefix
    while at and at not in points:
        at = at.rpartition("/")[0]
    base = points.get(at)
    home = _home(base, root) if base else None
    own: set[str] = set()
    foreign: set[str] = set()
    for point, mount in points.items():
        if point != root and not point.startswith(f"{root}/"):
            continue
        path = point[len(root) + 1 :]
        where = f"{home}/{path}".rstrip("/") or "/"
        same = base and home is not None and mount.device == base.device
        (own if same and mount.source == where else foreign).add(path)
    return Mounts(frozenset(foreign), frozenset(own))


def _home(base: Mount, root: str) -> str | None:
    """The folder of the file system that is the image's root."""
    point, source = base.point.rstrip("/"), base.source.rstrip("/")
    if root == point or root.startswith(f"{point}/"):
        return source + root[len(point) :]
    tail = point[len(root) :]
    return source[: -len(tail)] if source.endswith(tail) else None


def read(root: str, prefix: str) -> Mounts:
    """The mounts of this process below a root; none where the kernel's list is not there."""
    try:
        with open(LIST, encoding="utf-8", errors="surrogateescape") as stream:
            return below(root, prefix, parse(stream.read()))
    except OSError:
        return Mounts(frozenset(), frozenset(), known=False)

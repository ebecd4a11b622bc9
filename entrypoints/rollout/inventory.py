"""The list of everything in an image, as it is when its last layer is made.

Outside of the environment each file, link and folder is a line: kind, mode, owner, group, size,
sha256 or target, path. Inside of it RECORD and the seal (hashes.py) say what each file holds, and a
line stands for what is no plain file of root's (0644), no plain folder (0755), or an empty folder.
The seal covers the list.

What every run brings along has no line: what is mounted, and what engines write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rollout import hashes, info
from rollout.environment import printable
from rollout.mounts import Mounts
from rollout.problem import Problem

LIST = f"{info.SHARE}/image.list"
FILE, FOLDER, LINK, OTHER = "f", "d", "l", "o"

# Folders of every run's own: nothing in them is the image's. The first are mount points everywhere,
# and so are not compared themselves.
MOUNTED = ("proc", "sys", "dev", "run", "var/cache/rollout")
VOLATILE = frozenset((*MOUNTED, "tmp", "var/tmp", "mnt", "media", "opt/added"))
# Engines write the names of a container and its network; so do builders, while an image is made.
NAMES = frozenset(f"etc/{name}" for name in ("hosts", "hostname", "resolv.conf", "mtab"))
# These attributes give rights. Others are a host's own, as SELinux labels are.
_RIGHTS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")
PLAIN = {FILE: 0o644, FOLDER: 0o755, LINK: 0o777}


class Entry(NamedTuple):
    """What the list says of a path; size and content only of files outside of the environment."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int | None = None
    content: str = ""  # the sha256 of a file, the target of a link


class Seen(NamedTuple):
    """What there is at a path."""

    entry: Entry
    rights: tuple[str, ...] = ()  # attributes beyond its mode
    inside: int = 0  # how many names a folder holds
    error: str = ""  # why a folder cannot be listed


def kind_of(mode: int) -> str:
    """The kind of a file by its mode."""
    if stat.S_ISREG(mode):
        return FILE
    if stat.S_ISDIR(mode):
        return FOLDER
    return LINK if stat.S_ISLNK(mode) else OTHER


def _seen(path: str, found: os.stat_result) -> Seen:
    kind, mode = kind_of(found.st_mode), stat.S_IMODE(found.st_mode)
    content = os.readlink(path) if kind == LINK else ""
    size = found.st_size if kind == FILE else None
    rights: tuple[str, ...] = ()
    if kind in (FILE, FOLDER):
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError:  # a file system without any
            names = []
        rights = tuple(name for name in names if name in _RIGHTS) if names else ()
    return Seen(Entry(kind, mode, found.st_uid, found.st_gid, size, content), rights)


def walk(
    root: str, mounts: Mounts, enter: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Seen]]:
    """Everything of the image itself: nothing that is mounted on it, nothing in VOLATILE.

    ``enter`` says whether a folder is looked into. The root itself is left out.
    """
    starts = [point for point in sorted(mounts.own) if point]
    folders = [] if mounts.over("") is not None else [""]
    done: set[str] = set()
    for start in starts:
        try:
            seen = _seen(f"{root}/{start}", os.lstat(f"{root}/{start}"))
        except OSError:
            continue
        if seen.entry.kind == FOLDER and start not in VOLATILE:
            folders.append(f"{start}/")
        elif start.split("/")[0] not in MOUNTED:
            yield start, seen
    while folders:
        folder = folders.pop()
        if folder in done:
            continue
        done.add(folder)
        own = folder[:-1]
        try:
            with os.scandir(f"{root}/{folder}") as stream:
                entries = list(stream)
            error = ""
        except OSError as failure:
            entries, error = [], f"cannot be listed ({failure.strerror})"
        if own:
            seen = _seen(f"{root}/{own}", os.lstat(f"{root}/{own}"))
            yield own, seen._replace(inside=len(entries), error=error)
        for entry in entries:
            path = f"{folder}{entry.name}"
            if path in mounts.foreign or path in mounts.own:
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:  # gone meanwhile, or in a folder that may be listed and not entered
                continue
            if not stat.S_ISDIR(found.st_mode):
                yield path, _seen(entry.path, found)
            elif path in VOLATILE or not enter(path):
                yield path, _seen(entry.path, found)._replace(inside=1)
            else:
                folders.append(f"{path}/")


def root_of(prefix: Path) -> tuple[str, str]:
    """The root of the image that an environment lies in, and its path from there."""
    at = Path(os.path.abspath(prefix))
    return str(at.parents[1]), "/".join(at.parts[-2:])


def make(prefix: Path, mounts: Mounts) -> str:
    """The text of the list. Problem (code 2) where something may not be in an image, or is unread.

    Only root sees all of it.
    """
    root, own = root_of(prefix)
    lines: dict[str, Entry] = {}
    jobs = []
    for path, seen in walk(root, mounts):
        entry = seen.entry
        if path in NAMES or path in MOUNTED or path == f"{own}/{LIST}":
            continue
        if seen.error or seen.rights or entry.kind == OTHER:
            what = seen.error or "is no file, folder or link"
            what = f"has {' and '.join(seen.rights)}" if seen.rights else what
            raise Problem(f"/{printable(path)} {what}: no image of ours may hold that.", 2)
        if path.startswith(f"{own}/"):
            empty = entry.kind == FOLDER and not seen.inside
            if empty or not plain(entry):
                lines[path] = entry._replace(size=None, content="")
        else:
            lines[path] = entry
            if entry.kind == FILE:
                jobs.append((path, "sha256", 0))
    for content in hashes.contents(root, jobs):
        if content.error:
            raise Problem(f"/{printable(content.path)} {content.error}: it cannot be listed.", 2)
        lines[content.path] = lines[content.path]._replace(content=content.digest.hex())
    return "".join(_line(path, entry) for path, entry in sorted(lines.items()))


def plain(entry: Entry) -> bool:
    """Whether a file of the environment needs no line."""
    return (entry.mode, entry.uid, entry.gid) == (PLAIN[entry.kind], 0, 0)


def _line(path: str, entry: Entry) -> str:
    size = "" if entry.size is None else str(entry.size)
    mode = "" if entry.kind == LINK else f"{entry.mode:o}"
    fields = (entry.kind, mode, entry.uid, entry.gid, size, printable(entry.content))
    return "\t".join(map(str, (*fields, printable(path)))) + "\n"


def parse(text: str) -> dict[str, Entry]:
    """What :func:`make` wrote, by path; ValueError for anything else."""
    found = {}
    for line in text.splitlines():
        kind, mode, uid, gid, size, content, path = line.split("\t")
        if kind not in PLAIN:
            raise ValueError(f"no line of a list: {printable(line)}")
        found[_unescaped(path)] = Entry(
            kind,
            int(mode, 8) if mode else PLAIN[kind],
            int(uid),
            int(gid),
            int(size) if size else None,
            _unescaped(content),
        )
    return found


def _unescaped(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape") if "\\" in text else text

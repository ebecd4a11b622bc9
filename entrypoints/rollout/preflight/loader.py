"""Where the dynamic loader looks for a library, without running it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rollout.preflight import files

# Where the loader looks last: Debian's own folders, and those of other distributions.
FOLDERS = (
    *("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"),
    *("/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    *("/lib64", "/usr/lib64", "/lib", "/usr/lib"),
)
_LINKS = 40  # as many as the kernel follows in one path


def configured(root: Path) -> list[str]:
    """The folders of /etc/ld.so.conf and of the files that it includes, in their order."""
    folders = []
    for line in _lines(root / "etc/ld.so.conf"):
        words = line.split()
        if words[0] != "include":
            folders.append(line)
            continue
        for pattern in words[1:]:
            # Sorted, and relative to /etc, as ldconfig has it.
            for file in sorted(root.glob(str(Path("/etc", pattern))[1:])):
                folders += _lines(file)
    return folders


def _lines(file: Path) -> list[str]:
    """What a file of ld.so.conf's format says, without comments."""
    lines = (line.split("#")[0].strip() for line in files.text(file).splitlines())
    return [line for line in lines if line]


def cached(root: Path) -> Iterator[str]:
    """The folders with a libcuda that /etc/ld.so.cache names, in whatever order.

    ldconfig takes folders on its command line too, so the configuration may not name them all.
    """
    try:
        content = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return
    for found in re.finditer(rb"(/[^\0]*)/libcuda\.so\.1\0", content):
        yield os.fsdecode(found[1])


def file_name(root: Path, path: str) -> str | None:
    """The name of the file that a path leads to, None where it leads to none.

    Every link is followed as a process would whose root folder is ``root``.
    """
    ahead, behind, links = path.split("/")[::-1], [root], 0
    try:
        while ahead:
            part = ahead.pop()
            here = behind[-1] / part
            if part == "..":
                behind = behind[:-1] or [root]
            elif part in ("", "."):
                continue
            elif not here.is_symlink():
                behind.append(here)
            elif (links := links + 1) > _LINKS:
                return None
            else:
                target = str(here.readlink())
                behind = [root] if target.startswith("/") else behind
                ahead += target.split("/")[::-1]
        return behind[-1].name if behind[-1].is_file() else None
    except OSError:  # the loader cannot look there either
        return None

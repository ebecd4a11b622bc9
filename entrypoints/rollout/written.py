"""What container engines and NVIDIA's toolkit write into an image when they run it.

None of it is damage, and none of it is taken on trust where it could do harm:

- Podman adds the user of a container to passwd and group; enroot writes both anew, fstab,
  environment and rc as well. Nobody but root may have number 0 then.
- NVIDIA's toolkit makes links to the driver's files, which it mounts, and runs ldconfig. Every
  library that the new cache names has to be the image's own, or lie on such a mount.
- docker, Apptainer and NVIDIA's hooks for CDI leave files of known names.
"""

from __future__ import annotations

import fnmatch
import os
import struct
from collections.abc import Callable, Iterator

from rollout.mounts import Mounts

CACHE = "etc/ld.so.cache"
# Of the image, and written anew.
REWRITTEN = frozenset(
    f"etc/{name}"
    for name in (
        *("passwd", "group", "shadow", "gshadow", "subuid", "subgid"),
        *("fstab", "environment", "localtime"),
    )
)
_NUMBERED = {"etc/passwd", "etc/group"}
# Not of the image. The patterns are those of fnmatch, whose star takes a slash as well.
_ADDED = (
    *(".dockerenv", ".singularity.d", ".singularity.d/*", "singularity", "environment"),
    *(".exec", ".run", ".shell", ".test"),  # Apptainer's
    *("etc/localtime", "etc/timezone", "etc/rc", "etc/rc.local"),
    *("etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/.pwd.lock"),
    *("etc/subuid-", "etc/subgid-"),
    *("etc/apt", "etc/apt/apt.conf.d", "etc/apt/apt.conf.d/enroot"),
    *("etc/ld.so.conf.d/nvcr-*.conf", "etc/ld.so.conf.d/00-nvcr-*.conf"),
    *("etc/ld.so.conf.d/zz-nvcr-*.conf", "etc/ld.so.conf.d/00-compat-*.conf"),
    *("var/cache/ldconfig", "var/cache/ldconfig/aux-cache"),
)
_LINKS = 40  # as many as the kernel follows
_NEW, _OLD = b"glibc-ld.so.cache1.1", b"ld.so-1.7.0"


def added(path: str) -> bool:
    """Whether an engine adds a file of this name."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _ADDED)


def resolve(root: str, path: str) -> str:
    """Where a path of an image leads, from its root; links are followed as in there."""
    done: list[str] = []
    rest = [part for part in path.split("/") if part]
    links = 0
    while rest:
        part = rest.pop(0)
        if part == ".":
            continue
        if part == "..":
            done = done[:-1]
            continue
        here = "/".join((*done, part))
        try:
            target = os.readlink(f"{root}/{here}")
        except OSError:
            done.append(part)
            continue
        links += 1
        if links > _LINKS:
            return ""
        if target.startswith("/"):
            done = []
        rest = [piece for piece in target.split("/") if piece] + rest
    return "/".join(done)


def to_mount(root: str, path: str, mounts: Mounts) -> bool:
    """Whether a link leads to what is mounted, as those to the driver do."""
    target = resolve(root, path)
    return bool(target) and target != path and mounts.over(target) not in (None, "")


def doubtful(root: str, path: str, mounts: Mounts, locked: Callable[[str], bool]) -> str:
    """What is wrong with a file of REWRITTEN, or the loader's cache; empty if nothing is."""
    try:
        with open(f"{root}/{path}", "rb") as stream:
            data = stream.read()
    except OSError:
        return "" if path not in (CACHE, *_NUMBERED) else "it cannot be read"
    if path in _NUMBERED:
        for line in data.decode("utf-8", "replace").splitlines():
            fields = line.split(":")
            if len(fields) > 2 and fields[2].strip() == "0" and fields[0] != "root":
                return f"{fields[0]} has number 0, as root has"
    if path == CACHE:
        try:
            libraries = list(cached(data))
        except (ValueError, struct.error):
            return "it is no cache of the loader"
        for name, where in libraries:
            target = resolve(root, where)
            known = locked(target) or mounts.over(target) not in (None, "")
            if where.rpartition("/")[2] != name or not known:
                return f"{name} is {where}, and no layer and no mount has that"
    return ""


def cached(data: bytes) -> Iterator[tuple[str, str]]:
    """Each library of a cache of the loader, with its path. ValueError where it is none."""
    start = 0
    if data.startswith(_OLD):  # an old form before the new one
        (count,) = struct.unpack_from("<I", data, 12)
        start = (16 + 12 * count + 7) // 8 * 8
    if data[start : start + len(_NEW)] != _NEW:
        raise ValueError("no cache of glibc")
    (count,) = struct.unpack_from("<I", data, start + 20)
    for number in range(count):
        _, key, value = struct.unpack_from("<III", data, start + 48 + 24 * number)
        yield _text(data, start + key), _text(data, start + value)


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", "surrogateescape")

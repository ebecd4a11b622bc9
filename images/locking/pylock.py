"""An answer of uv in the form pylock.toml: which file of each release the platform installs."""

from __future__ import annotations

import tomllib

from packaging.markers import Environment
from packaging.pylock import (
    PackageSdist,
    PackageWheel,
    Pylock,
    PylockSelectError,
    PylockValidationError,
)
from packaging.tags import Tag, compatible_tags, cpython_tags

from images.locking import base
from rollout.problem import Problem

# glibc of Debian 12, the base image: wheels that need a newer one would not load there.
PLATFORM = "x86_64-manylinux_2_36"


def read(text: str) -> Pylock:
    """The content of a pylock.toml.

    Raises:
        Problem: it is none.
    """
    try:
        return Pylock.from_dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, PylockValidationError) as error:
        what = f"uv wrote a pylock.toml that cannot be read: {error}"
        raise Problem(f"{what}; run this through nox, which has the locked uv") from None


def hashes(lock: Pylock, python: str, whole: str = "") -> set[str]:
    """The sha256 of the one file of each release that an image with this Python installs."""
    return set(chosen(lock, python, whole).values())


def chosen(lock: Pylock, python: str, whole: str = "") -> dict[tuple[str, str], str]:
    """The sha256 of the one file of each release, by name and version.

    ``whole`` is the version of the Python to its last number, by default the base's.

    Some releases have two wheels for one platform: for an older and a newer glibc, or with and
    without compiled parts. The one with the most specific tag is taken, as every installer does.
    uv lists no wheel of what it may not take as a wheel, and no source of everything else.

    Raises:
        Problem: a release has no file for the platform.
    """
    try:
        found = list(lock.select(tags=tags(python), environment=markers(python, whole)))
    except PylockSelectError as error:
        what = f"a release has no file for {PLATFORM}: {error}"
        raise Problem(f"{what}; ask for another release of it") from None
    return {
        (str(package.name), str(package.version)): file.hashes["sha256"]
        for package, file in found
        if isinstance(file, PackageWheel | PackageSdist) and "sha256" in file.hashes
    }


def tags(python: str) -> list[Tag]:
    """The wheel tags that the platform takes, the most specific first."""
    machine, _, oldest = PLATFORM.partition("-manylinux_2_")
    platforms = []
    for minor in range(int(oldest), 4, -1):
        platforms.append(f"manylinux_2_{minor}_{machine}")
        old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}.get(minor)
        platforms += [f"{old}_{machine}"] if old else []
    platforms.append(f"linux_{machine}")
    version = tuple(map(int, python.split(".")))
    interpreter = f"cp{python.replace('.', '')}"
    return [
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, interpreter=interpreter, platforms=platforms),
    ]


def markers(python: str, whole: str = "") -> Environment:
    """What markers are held against: the image, whatever machine the lock is made on."""
    whole = whole or base.python(python)
    return {
        "implementation_name": "cpython",
        "implementation_version": whole,
        "os_name": "posix",
        "platform_machine": PLATFORM.partition("-")[0],
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": whole,
        "python_version": python,
        "sys_platform": "linux",
    }

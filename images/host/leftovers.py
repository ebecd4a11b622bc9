"""What runs leave on this machine: temporary folders, and files that nothing has used for long.

Whoever makes a temporary folder names it after its owner (owner.py), so that the next run can tell
what a killed one has left: it may be tens of gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from images import host
from images.host import owner

# What is kept between runs below host.cache(), and made or fetched again where it is gone: the tars
# of bases, their packages, Pythons, compressed layers, uv's cache of wheels.
KEPT = ("base-*.tar", "debs/*.deb", "pythons/*.tar.gz", "layers/compressed/*.tar.zst", "uv")
_DAY = 24 * 3600.0
UNUSED = 30 * _DAY


def name(what: str) -> str:
    """A name for something temporary of this process."""
    return f"rollout-{what}-{owner.this()}-"


@contextmanager
def temporary(what: str, place: Path | None = None) -> Iterator[Path]:
    """A folder for a while, in ``place`` or where this machine has its temporary files."""
    with tempfile.TemporaryDirectory(prefix=name(what), dir=place) as folder:
        yield Path(folder)


def mounted(folder: Path, mounts: str) -> list[str]:
    """What is mounted below a folder, the innermost first; ``mounts`` is /proc/self/mounts."""
    # The kernel writes a space in a path as \040, and umount would not find that.
    places = [line.split(" ")[1].replace("\\040", " ") for line in mounts.splitlines()]
    return [place for place in reversed(places) if Path(place).is_relative_to(folder)]


def discard(path: Path) -> None:
    """Remove a file or folder as far as that is allowed; of a link, the link itself alone.

    What is mounted there goes first, or it would be busy: a storage has a mount on its own folder,
    and a build that failed leaves its container's.
    """
    for place in mounted(path, Path("/proc/self/mounts").read_text(encoding="utf-8")):
        subprocess.run(["umount", place], check=False, capture_output=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def buildah() -> Path:
    """Where buildah puts what a build needs for a while, and the package caches of builds."""
    return host.cache() / "buildah"


def places() -> tuple[Path, ...]:
    """Where runs put what they need for a while."""
    cache = host.cache()
    kept = {cache / pattern for pattern in KEPT}
    return (host.scratch(), Path(tempfile.gettempdir()), *sorted({path.parent for path in kept}))


def sweep(*others: Path) -> None:
    """Remove what killed runs have left, in other places too."""
    for place in (*places(), *others):
        with suppress(FileNotFoundError):
            for entry in os.scandir(place):
                # Ours begin like this; everything else in /tmp is other people's.
                if entry.name.startswith(("rollout-", ".")) and owner.abandoned(Path(entry)):
                    discard(Path(entry))
    # Names that buildah gives tell no owner, so the age decides: nothing in a build takes a day.
    for path in buildah().glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _DAY:
                discard(path)


def used(path: Path) -> None:
    """Note that something kept was of use: it stays for another while."""
    with suppress(OSError):  # a cache that is shared may belong to somebody else
        os.utime(path)


def prune(unused: float = UNUSED) -> None:
    """Remove what is kept and was not used for so many seconds."""
    for pattern in KEPT:
        for path in host.cache().glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > unused:
                    discard(path)

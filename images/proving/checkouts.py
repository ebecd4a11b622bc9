"""A checkout of a framework for a leased machine: what a run reads of it, as one small file.

A framework that is on no index trains from the user's own clone. Reports name its commit, so the
commit goes with the files.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from images import host
from images.catalog import Image
from images.proving import standing
from rollout.problem import Problem

FOLDER = "checkouts"
SUFFIXES = {".py", ".yaml", ".yml", ".json", ".toml", ".txt", ".jinja", ".j2"}
LICENSES = ("LICENSE", "LICENSE.txt", "NOTICE")
MOST = 30_000_000  # bytes of one file; a part of an image may be of 60 million


@dataclass(frozen=True)
class Checkout:
    """A clone of a framework, and the commit that it is at."""

    name: str
    root: Path
    commit: str

    @property
    def file(self) -> str:
        """What its archive is called."""
        return f"{FOLDER}/{self.name}.tar.gz"


def _git(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return host.run(["git", "-C", str(root), *arguments], quiet=True, check=check)


def parse(text: str) -> Checkout:
    """``NAME=DIR``, as the command line has it.

    Raises:
        Problem: exit code 2 where that is no clone of git's.
    """
    name, _, folder = text.partition("=")
    root = Path(folder)
    if not name or not folder or not root.is_dir():
        raise Problem(f"--checkout: {text!r} is no NAME=DIR of a framework and its clone", 2)
    done = _git(root, "rev-parse", "HEAD", check=False)
    if done.returncode:
        raise Problem(f"--checkout: {root} is no clone, so nobody knows its commit; clone it", 2)
    return Checkout(name, root, done.stdout.strip())


def chosen(found: Sequence[Checkout], images: Sequence[Image]) -> dict[str, Checkout]:
    """For each image (its reference) the checkout that trains in it.

    Raises:
        Problem: exit code 2 for one that no image is for, or at another commit than the image's.
    """
    by_image = {}
    for one in found:
        fits = [
            i for i in images if standing.asked(i) and i.framework and i.framework.name == one.name
        ]
        if not fits:
            raise Problem(f"--checkout: none of these images trains {one.name} from a checkout", 2)
        for image in fits:
            wanted = image.framework.version if image.framework else ""
            if not one.commit.startswith(wanted):
                raise Problem(
                    f"--checkout: {one.root} is at {one.commit[:9]}, and {image.reference} is for "
                    f"{one.name} {wanted}; check that commit out",
                    2,
                )
            by_image[image.reference] = one
    return by_image


def write(one: Checkout, folder: Path) -> Path:
    """The archive: sources, settings and licenses, and the commit where git would have it.

    Raises:
        Problem: exit code 2 for a file that differs from the commit, 1 for one too large to send.
    """
    changed = _git(one.root, "status", "--porcelain").stdout.strip()
    if changed:
        first = changed.splitlines()[0]
        raise Problem(
            f"--checkout: {one.root} is not as its commit is: {first}; commit or undo it", 2
        )
    listed = _git(one.root, "ls-files", "-z").stdout.split("\0")
    target = folder / one.file
    target.parent.mkdir(parents=True, exist_ok=True)
    commit = f"{one.commit}\n".encode()
    head = tarfile.TarInfo(".git/HEAD")
    head.size = len(commit)
    with tarfile.open(target, "w:gz") as tar:
        for path in map(PurePosixPath, filter(None, listed)):
            if (path.suffix in SUFFIXES or path.name in LICENSES) and (one.root / path).is_file():
                tar.add(one.root / path, str(path))
        tar.addfile(head, io.BytesIO(commit))
    if target.stat().st_size > MOST:
        target.unlink()
        raise Problem(f"--checkout: {one.root} takes more than {MOST // 1_000_000} MB to send")
    return target

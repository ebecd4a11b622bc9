"""What a lock is: exact versions, the sha256 of one file each, and no index address.

It is ``uv pip compile`` output in requirements form. So it works with any mirror: the hash alone
decides what is genuine. The one file is what the platform installs: a wheel, but for what
``[source-distributions]`` names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from images import catalog
from images.catalog import Image, shown
from images.schema import quoted
from rollout.problem import Problem

PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==(\S+)", re.MULTILINE)
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?: \\)?$", re.MULTILINE)
# Below a distribution whose sha256 nobody could have; installers that ask for hashes refuse it.
MARK = "# not locked: "
# The first line of the second part of a lock: what stands above the engine. Installers skip it.
ABOVE = "# Above the engine: "


@dataclass(frozen=True)
class Locked:
    """One distribution of a lock; ``above`` the engine are the framework and what it needs.

    ``sha256`` is empty where nobody could have it; ``lacking`` then says of which file, and where
    that lies.
    """

    name: str
    version: str
    sha256: str
    above: bool = False
    lacking: str = ""

    @property
    def text(self) -> str:
        """The requirement in pip's form, hash included."""
        if self.lacking:
            return f"{self.name}=={self.version}\n    {MARK}{self.lacking}\n"
        return f"{self.name}=={self.version} \\\n    --hash=sha256:{self.sha256}\n"


def parse(text: str, path: Path) -> list[Locked]:
    """The distributions of a lock, in file order.

    Raises:
        Problem: a line that is not ``uv pip compile`` output, named by file and line.
    """
    found: list[Locked] = []
    name = version = ""
    above = False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        above = above or bare.startswith(ABOVE)
        if name and bare.startswith(MARK):
            lacking = bare.removeprefix(MARK)
            found.append(Locked(canonicalize_name(name), version, "", above, lacking))
            name = ""
        if not bare or bare.startswith("#"):
            continue
        pinned, hashed = PINNED.match(bare), HASH.search(bare)
        if pinned and not name:
            name, version = pinned[1], pinned[2]
        elif hashed and name:
            found.append(Locked(canonicalize_name(name), version, hashed[1], above))
            name = ""
        else:
            hashless = f"{quoted(name)} has no sha256"
            what = hashless if name and pinned else f"cannot read {quoted(bare)}"
            raise _malformed(f"{shown(path)}, line {number}: {what}")
    if name:
        raise _malformed(f"{shown(path)}: {quoted(name)} has no sha256")
    return found


def _malformed(what: str) -> Problem:
    return Problem(f"{what}; remake it with 'nox -s lock'", 2)


def other_file(what: str) -> str:
    """The sentence about a file that is not the locked one."""
    return f"{what} than the lock; restore the lock, or remake it if you trust the new file"


def read(image: Image) -> list[Locked]:
    """The lock of an image, held against what its catalog file claims.

    Raises:
        Problem: the lock is missing, malformed, or contradicts a key of ``[expect]``.
    """
    if not image.lock.exists():
        command = f"nox -s lock -- {image.reference}"
        raise Problem(f"{shown(image.lock)} does not exist; make it with '{command}'", 2)
    return claimed(image, catalog.text(image.lock, "restore it from git"))


def claimed(image: Image, text: str) -> list[Locked]:
    """The distributions of a text that is to be the lock of an image.

    Raises:
        Problem: it is malformed, or contradicts a key of ``[expect]``.
    """
    locked = parse(text, image.lock)
    broken = claims_broken(image, versions(locked))
    if broken:
        raise Problem(f"{shown(image.path)}: " + "; ".join(broken), 2)
    return locked


def unlocked(locked: Iterable[Locked]) -> list[Locked]:
    """The distributions whose sha256 is not known."""
    return [entry for entry in locked if not entry.sha256]


def versions(locked: Iterable[Locked]) -> dict[str, str]:
    """The version of each distribution, by its name."""
    return {entry.name: entry.version for entry in locked}


def claims_broken(image: Image, versions: Mapping[str, str]) -> list[str]:
    """What a lock contradicts of a catalog file, each as a clause of a sentence."""
    broken = []
    for key, claim in image.expect.items():
        locked = cuda(versions) if key == "cuda" else versions.get(canonicalize_name(key))
        if locked != claim:
            broken.append(f"key 'expect.{key}' says {claim}, the lock has {locked or 'none'}")
    for name in sorted(image.sources):
        if name not in versions:
            broken.append(f"key 'source-distributions.{name}' is not in the lock; remove it")
    framework = image.framework
    for key, names in (
        ("left-out", image.left_out),
        ("framework.left-out", framework.left_out if framework else {}),
        ("framework.lacks", framework.lacks if framework else {}),
    ):
        for name in names:
            if name in versions:
                broken.append(f"key '{key}.{name}' is in the lock; remove the key")
    return broken


def cuda(versions: Mapping[str, str]) -> str | None:
    """The CUDA release (major.minor) of a lock, read off the runtime wheel that torch pins."""
    # The suffixed name first: it is torch's. Beside it the plain one is the toolchain's (nvcc).
    for name in ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime"):
        if name in versions:
            return ".".join(versions[name].split(".")[:2])
    return None


def header(command: str, facts: str) -> str:
    """The first lines of a generated lock."""
    return f"# GENERATED by '{command}'; do not edit.\n# {facts}\n"


def blocks(text: str) -> dict[str, str]:
    """The text of each distribution of a lock, comments below it included, by its normal name.

    What stands above the first one is under the empty name.
    """
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        pinned = PINNED.match(line)
        name = canonicalize_name(pinned[1]) if pinned else name
        found[name] = found.get(name, "") + line
    return found


def wanted(text: str, engine: str) -> set[str]:
    """The distributions of a lock that somebody else than its engine asks for, at last."""
    asking = {name: _asking(block) for name, block in blocks(text).items() if name}
    found: set[str] = set()
    # What a catalog file asks for itself; then, again and again, what that asks for.
    new = {n for n, by in asking.items() if n != engine and any("/" in one for one in by)}
    while new:
        found |= new
        new = {n for n, by in asking.items() if by & new} - found - {engine}
    return found


def _asking(block: str) -> set[str]:
    """Who asks for a distribution: others by their normal names, and files by their paths."""
    _, _, told = block.partition("# via")
    words = [line.strip("# ") for line in told.splitlines()]
    return {word if "/" in word else canonicalize_name(word) for word in words if word}


def keep_hashes(text: str, chosen: Collection[str]) -> str:
    """Drop the hashes of files that the image does not install (other systems, sources)."""
    lines: list[str] = []
    for line in text.splitlines():
        hashed = HASH.search(line)
        if hashed and hashed[1] not in chosen:
            continue
        lines.append(line.removesuffix(" \\") if hashed else line)
    return "\n".join(lines) + "\n"

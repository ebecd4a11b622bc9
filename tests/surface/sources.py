"""The Python files of one release: of a wheel, of an sdist, of a git tag, or of a folder."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NEEDED = (".py", ".so")  # a compiled module is known by its name alone


class Unreadable(Exception):
    """Sources that cannot be read, in one sentence."""


@dataclass(frozen=True)
class Sources:
    """Files by their paths, the first part of which is an import package."""

    release: str  # the version or the tag
    origin: dict[str, str]  # what they are: a file and its sha256, or a commit and its tag
    paths: frozenset[str]
    text: Callable[[str], str]


def opened(place: Path, package: str, tag: str = "") -> Sources:
    """The sources at a place: whatever it is.

    Raises:
        Unreadable: there are none of this package.
    """
    if tag:
        found = _git(place, package, tag)
    elif place.suffix == ".whl":
        found = _wheel(place)
    elif place.name.endswith(".tar.gz"):
        found = _sdist(place, package)
    elif place.is_dir():
        found = _folder(place, package)
    else:
        raise Unreadable(f"{place}: neither a wheel, an sdist nor a folder; for git name a --tag")
    if f"{package}/__init__.py" not in found.paths:
        raise Unreadable(f"{place}: has no package {package}")
    return found


def _wanted(path: str) -> bool:
    return path.endswith(NEEDED)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wheel(path: Path) -> Sources:
    archive = zipfile.ZipFile(path)
    return Sources(
        path.name.split("-")[1],
        {"file": path.name, "sha256": _sha256(path)},
        frozenset(filter(_wanted, archive.namelist())),
        lambda name: archive.read(name).decode("utf-8"),
    )


def _sdist(path: Path, package: str) -> Sources:
    archive = tarfile.open(path)  # noqa: SIM115 - it is read later
    members = {member.name: member for member in archive if member.isfile()}
    root = _root(members, package)

    def text(name: str) -> str:
        file = archive.extractfile(members[root + name])
        assert file is not None
        return file.read().decode("utf-8")

    return Sources(
        path.name.removesuffix(".tar.gz").rpartition("-")[2],
        {"file": path.name, "sha256": _sha256(path)},
        frozenset(n.removeprefix(root) for n in members if n.startswith(root) and _wanted(n)),
        text,
    )


def _folder(path: Path, package: str) -> Sources:
    """Installed: the version is that of the distribution that has the package in its RECORD."""
    release = ""
    for record in sorted(path.glob("*.dist-info/RECORD")):
        if f"\n{package}/__init__.py," in "\n" + record.read_text(encoding="utf-8"):
            release = record.parent.name.removesuffix(".dist-info").partition("-")[2]
    inside = (found for found in (path / package).rglob("*") if found.suffix in NEEDED)
    return Sources(
        release,
        {"folder": f"{package} {release}".strip()},
        frozenset(found.relative_to(path).as_posix() for found in inside),
        lambda name: (path / name).read_text(encoding="utf-8"),
    )


def _git(path: Path, package: str, tag: str) -> Sources:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(path), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unreadable(f"{path}: git {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    commit = git("rev-parse", "--verify", f"{tag}^{{commit}}").strip()
    named = git("ls-tree", "-r", "-z", "--name-only", commit).split("\0")
    root = _root(named, package)
    return Sources(
        tag,
        {"commit": commit} | ({} if re.fullmatch(r"[0-9a-f]{40}", tag) else {"tag": tag}),
        frozenset(n.removeprefix(root) for n in named if n.startswith(root) and _wanted(n)),
        lambda name: git("show", f"{commit}:{root}{name}"),
    )


def _root(names: object, package: str) -> str:
    """What stands before the package: nothing, "python/", or the folder of an sdist."""
    end = f"{package}/__init__.py"
    found = [str(n) for n in names if str(n) == end or str(n).endswith(f"/{end}")]  # type: ignore[attr-defined]
    return min(found, key=lambda n: (n.count("/"), n)).removesuffix(end) if found else ""

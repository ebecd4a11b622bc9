"""Wheels that the public index does not have: resolved by what is known of them, and marked.

The public index has a stub of such a distribution, or nothing. A stub says all of the wheel's
metadata, so uv resolves with that. Of the others the catalog file says what they ask for, and uv is
given an empty wheel that says the same. In the lock stands the sha256 of the real file, with the
public file that it was found in. Where no such file is known the lock has a mark instead, and
``nox -s lock -- REF --fill`` puts the sha256 there on a machine that reaches the index.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images.catalog import Image, shown
from images.locking import lock
from images.locking.lock import MARK, Locked
from images.schema import Elsewhere
from rollout.problem import Problem

_FOUND = "# sha256 from "  # above it stands one that no public index has
_HASHES = re.compile(r" \\\n(?: +--hash=\S+(?: \\)?\n)+")
FILLED = "the index of {index}, by --fill"


def stubs(entries: Iterable[Elsewhere]) -> tuple[str, ...]:
    """The distributions whose metadata the public index has, as a source distribution."""
    return tuple(sorted(entry.name for entry in entries if entry.stub))


def stand_ins(
    entries: Iterable[Elsewhere], requirements: Iterable[str], folder: Path
) -> list[Elsewhere]:
    """Write an empty wheel for each whose metadata the catalog file says; returns those.

    Their releases are those that the requirements pin.

    Raises:
        Problem: exit code 2 where no requirement pins one.
    """
    pinned: dict[str, str] = {
        canonicalize_name(found.name): str(found.specifier).removeprefix("==")
        for found in map(Requirement, requirements)
        if str(found.specifier).startswith("==")
    }
    written = []
    for entry in entries:
        if entry.stub:
            continue
        if entry.name not in pinned:
            what = f"key 'elsewhere' has {entry.name}, and 'requirements' pin no release of it"
            raise Problem(f"{what}; add {entry.name}==…", 2)
        _write(folder, entry, pinned[entry.name])
        written.append(entry)
    return written


def _write(folder: Path, entry: Elsewhere, version: str) -> None:
    head = f"Metadata-Version: 2.1\nName: {entry.name}\nVersion: {version}\n"
    asks = "".join(f"Requires-Dist: {line}\n" for line in entry.requires)
    tags = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {entry.tags}\n"
    about = f"{entry.name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(folder / entry.file(version), "w") as wheel:
        for name, text in (("METADATA", head + asks), ("WHEEL", tags), ("RECORD", "")):
            # With a moment of its own each run would give another sha256.
            wheel.writestr(zipfile.ZipInfo(f"{about}/{name}"), text)


def marked(text: str, image: Image) -> str:
    """A lock with what is known of the real wheels in place of their stand-ins' hashes.

    What ``--fill`` once found stays, as long as the release is the same.
    """
    entries = {entry.name: entry for entry in image.elsewhere}
    if not entries:
        return text
    old = image.lock.read_text(encoding="utf-8") if image.lock.exists() else ""
    said, blocks = FILLED.partition("{index}")[2], lock.blocks(old)
    filled: dict[str, Locked] = {}
    with contextlib.suppress(Problem):  # a lock that cannot be read is remade, and keeps nothing
        filled = {e.name: e for e in lock.parse(old, image.lock) if said in blocks[e.name]}
    parts = []
    for name, block in lock.blocks(text).items():
        entry, pinned = entries.get(name), lock.PINNED.match(block)
        if entry and pinned:
            block = _told(block, entry, pinned[2], filled.get(name))
        parts.append(block)
    return "".join(parts)


def _told(block: str, entry: Elsewhere, version: str, old: Locked | None) -> str:
    sha256, source = entry.sha256, entry.source
    if not sha256 and old and old.version == version:
        sha256, source = old.sha256, FILLED.format(index=entry.index)
    known = _hashed(sha256, source) if sha256 else _marked(lacking(entry, version))
    return _HASHES.sub(lambda _: known, block, count=1)


def _hashed(sha256: str, source: str) -> str:
    """What stands behind a release whose sha256 comes from a public file."""
    return f" \\\n    --hash=sha256:{sha256}\n    {_FOUND}{source}\n"


def _marked(what: str) -> str:
    """What stands behind one whose sha256 is not known."""
    return f"\n    {MARK}{what}\n"


def lacking(entry: Elsewhere, version: str) -> str:
    """Which file it is, and where it lies."""
    return f"{entry.file(version)} lies on the index of {entry.index}"


def refuse(image: Image, locked: Sequence[Locked]) -> None:
    """See that an image can be built, before anything is fetched.

    Raises:
        Problem: exit code 3 where the sha256 of a file is not known, with the files and where they
            lie.
    """
    missing = lock.unlocked(locked)
    if not missing:
        return
    files = " and ".join(entry.lacking for entry in missing)
    other = f"; or build on {image.release.image}, by '--from HOST'" if image.release else ""
    raise Problem(
        f"{image.reference} cannot be built here: {files}, and {shown(image.lock)} has no sha256 "
        f"of {'it' if len(missing) == 1 else 'them'}; run 'nox -s lock -- {image.reference} "
        f"--fill' on a machine that reaches that index{other}",
        3,
    )


def filled(
    image: Image, text: str, answer: Mapping[tuple[str, str], str], old: Sequence[Locked]
) -> str:
    """A lock with the hashes of an answer where it has marks.

    ``answer`` is the sha256 of the one file of each release, by name and version, as the indexes of
    this machine have it now.

    Raises:
        Problem: anything else is not as it is locked.
    """
    entries = {entry.name: entry for entry in image.elsewhere}
    found = {name: (version, sha256) for (name, version), sha256 in answer.items()}
    moved = [
        f"{name} {found[name][0]} is new" for name in sorted(set(found) - {e.name for e in old})
    ]
    for one in old:
        version, sha256 = found.get(one.name, ("", ""))
        known = entries.get(one.name)
        if not version:
            moved.append(f"{one.name} is not asked for any more")
        elif version != one.version:
            moved.append(f"{one.name} is {version}, locked is {one.version}")
        elif one.sha256 and sha256 != one.sha256 and not (known and known.sha256):
            moved.append(f"{one.name} {version} has another file than the locked one")
    if moved:
        what = f"{shown(image.lock)} is not filled, because more than the marks would move"
        raise Problem(f"{what}: {'; '.join(moved)}; remake it with 'nox -s lock' and read the diff")
    blocks = lock.blocks(text)
    for one in lock.unlocked(old):
        source = FILLED.format(index=entries[one.name].index)
        now = _hashed(found[one.name][1], source)
        blocks[one.name] = blocks[one.name].replace(_marked(one.lacking), now)
    return "".join(blocks.values())

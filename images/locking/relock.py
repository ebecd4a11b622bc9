"""What moves where every lock is made again, as a table for the person who has to judge it.

``nox -s relock`` resolves everything that may move: the Debian packages of the base, the tools, and
the images. An image sees the index as it was on its day, so it moves only where a file was taken
back. Nothing is built and nothing is proved; the table says what a new build would hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from images import catalog, host
from images.catalog import ROOT, shown
from images.host import revisions
from images.locking import base, lock, locks, resolution

LOCKFILES = ROOT / "lockfiles"
NONE = "—"


@dataclass(frozen=True)
class Pin:
    """What a lock says of a name: its files and versions, two where systems differ."""

    version: str
    files: frozenset[str]


@dataclass(frozen=True)
class Move:
    """One name whose pin is another one now."""

    name: str
    before: str
    after: str


def debian(text: str, name: str) -> dict[str, Pin]:
    """The packages of the base's lock."""
    debs = base.parse(text, name).debs
    return {deb.name: Pin(deb.version, frozenset([deb.sha256])) for deb in debs}


def python(text: str) -> dict[str, Pin]:
    """The distributions of a lock in requirements form, with however many files each."""
    return {
        name: Pin(
            ", ".join(version for _, version in lock.PINNED.findall(block)),
            frozenset(lock.HASH.findall(block)),
        )
        for name, block in lock.blocks(text).items()
        if name
    }


def pins(path: Path, text: str) -> dict[str, Pin]:
    """What a lock pins; an empty text pins nothing.

    Raises:
        Problem: the lock of the base is not as it is written.
    """
    if not text:
        return {}
    return debian(text, shown(path)) if path.name == base.LOCK.name else python(text)


def moves(before: Mapping[str, Pin], after: Mapping[str, Pin]) -> list[Move]:
    """What differs between two states of a lock, by name."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        said = new.version if new else NONE
        if old and new and old.version == new.version:
            said += " (other files)"
        found.append(Move(name, old.version if old else NONE, said))
    return found


def table(found: Mapping[str, Sequence[Move]]) -> str:
    """The moves of all locks as Markdown, and a sentence where there are none."""
    rows = [(name, *(m.name, m.before, m.after)) for name, ms in found.items() for m in ms]
    if not rows:
        return "No lock moved.\n"
    lines = ["| lock | what | before | after |", "| --- | --- | --- | --- |"]
    lines += [f"| {lock} | {what} | {old} | {new} |" for lock, what, old, new in rows]
    return "\n".join(lines) + "\n"


def texts() -> dict[Path, str]:
    """All locks as they lie here."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(LOCKFILES.rglob("*.lock"))}


def texts_at(revision: str) -> dict[Path, str]:
    """All locks as they were at a revision, under the names of today's checkout."""
    with revisions.worktree(revisions.commit(revision)) as tree:
        found = sorted((tree / LOCKFILES.relative_to(ROOT)).rglob("*.lock"))
        return {ROOT / path.relative_to(tree): path.read_text(encoding="utf-8") for path in found}


def compare(before: Mapping[Path, str], after: Mapping[Path, str]) -> dict[str, list[Move]]:
    """What moved, lock by lock; a lock that is new or gone has moved as a whole."""
    paths = sorted(before.keys() | after.keys())
    return {
        shown(path): moves(pins(path, before.get(path, "")), pins(path, after.get(path, "")))
        for path in paths
    }


@contextmanager
def forgotten(path: Path) -> Iterator[None]:
    """A lock is out of the way, since uv keeps what an existing one says; a failure restores it."""
    text = path.read_text(encoding="utf-8")
    path.unlink()
    try:
        yield
    except BaseException:
        host.write(path, text)
        raise


def relock() -> None:
    """Make every lock again.

    Raises:
        Problem: one cannot be resolved, or contradicts a claim of its catalog file.
    """
    groups = (resolution.TESTED, resolution.FLASH)
    locks.main([*(image.reference for image in catalog.load()), *groups])
    with forgotten(resolution.DEV_LOCK):
        locks.main(["dev"])
    locks.main(["base"])


def main(arguments: Sequence[str]) -> int:
    """``nox -s relock [-- --since REV] [--report FILE]``."""
    parser = argparse.ArgumentParser(
        prog="nox -s relock --", description="Make every lock again, and say what moved."
    )
    parser.add_argument("--since", metavar="REV", help="lock nothing, compare with a revision")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args(list(arguments))
    if given.since is not None:
        before = texts_at(given.since)
    else:
        before = texts()
        relock()
    text = table(compare(before, texts()))
    if given.report is not None:
        host.write(given.report, text)
    host.say(f"\n{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

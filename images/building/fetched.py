"""What was fetched, held against what its wheels say of themselves.

uv checks a wheel's sha256 when it takes the wheel into its cache, and never again. Its files there
are what later installs link to, so a program that writes into an installed file changes the cache
as well. What such a file holds would go into a layer, and into every later one.
"""

from __future__ import annotations

import csv
from pathlib import Path

from rollout import hashes
from rollout.checks import named
from rollout.problem import Problem


def changed(target: Path) -> list[str]:
    """The files below a folder of installed wheels that are not what a RECORD there says."""
    claims = hashes.records(str(target.parent), [target.name]).claims
    jobs = [(path, one[0].algorithm, one[0].size or 0) for path, one in sorted(claims.items())]
    return sorted(
        content.path.partition("/")[2]
        for content in hashes.contents(str(target.parent), jobs)
        # Where two wheels have a file of one name, either content is a wheel's.
        if all((content.digest, content.size) != (c.digest, c.size) for c in claims[content.path])
    )


def owners(target: Path, files: list[str]) -> list[str]:
    """The distributions that have these files, as their folders of metadata are named."""
    wanted, found = set(files), set()
    for record in target.glob("*.dist-info/RECORD"):
        with record.open(encoding="utf-8", newline="") as rows:
            if any(row and row[0] in wanted for row in csv.reader(rows)):
                found.add(record.parent.name.partition("-")[0].replace("_", "-"))
    return sorted(found)


def check(target: Path, cache: Path) -> None:
    """See that every fetched file is the wheel's own.

    Raises:
        Problem: some are not, with the command that has them fetched again.
    """
    files = changed(target)
    if not files:
        return
    command = f"UV_CACHE_DIR={cache} uv cache clean {' '.join(owners(target, files))}"
    raise Problem(
        f"uv's cache holds files that differ from their wheels: {named(files)}; something changed "
        f"them after they were fetched; run '{command}', and build with --no-cache"
    )

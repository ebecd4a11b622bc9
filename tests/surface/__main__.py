"""Make the record of an engine: BACKEND PLACE [--tag TAG], PLACE a wheel, sdist or git folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import kept, sources
from .surface import Surface


def main(arguments: list[str]) -> int:
    """Write the record, and say what the backend asks for and the sources do not have."""
    parser = argparse.ArgumentParser(prog="nox -s surface --", description=__doc__)
    parser.add_argument("backend", choices=sorted(kept.PACKAGES))
    parser.add_argument("place", type=Path)
    parser.add_argument("--tag", default="", help="of a git folder")
    given = parser.parse_args(arguments)
    package = kept.PACKAGES[given.backend]
    try:
        found = sources.opened(given.place, package, given.tag)
    except sources.Unreadable as why:
        print(why, file=sys.stderr)
        return 2
    path, problems = kept.renew(Surface(found), given.backend)
    print(path)
    for where, what in problems:
        print(f"{where}: {what}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

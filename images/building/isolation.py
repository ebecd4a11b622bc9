"""How the steps of a build are kept apart from this host: code of wheels runs there.

A step reaches no network. It sees no process of this host, whose variables may hold credentials,
and is told none of them. What it writes into the cache of packages is gone with the build: a wheel
that was changed there would be installed into every image after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a builder needs of this process's variables; nothing of it tells where packages come from.
_NEEDED = re.compile(
    "(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_.*|TZ|TERM|TMPDIR|XDG_.*|_?CONTAINERS_.*|STORAGE_.*|"
    "BUILDAH_.*|REGISTRIES_.*)$"
)
# Runs as the first process of the namespaces: with a folder that lies over the cache. Where no
# overlay can be mounted (for another user than root on an older kernel), the cache itself is given.
_OVER = """\
set -e
cache=$1 place=$2
shift 2
mount -t tmpfs tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/merged"
mount -t overlay -o "lowerdir=$cache,upperdir=$place/upper,workdir=$place/work" overlay \\
    "$place/merged" 2>/dev/null || mount --bind "$cache" "$place/merged"
exec "$@"
"""


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a builder is told."""
    return {name: value for name, value in environ.items() if _NEEDED.match(name)}


def view(place: Path) -> Path:
    """Where a build finds the cache that :func:`command` lays over it at this place."""
    return place / "merged"


def command(argv: Sequence[str], uid: int, cache: Path | None, place: Path) -> list[str]:
    """The command that runs a builder kept apart, on a host where this user is ``uid``.

    ``place`` is an empty folder.
    """
    spaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    over = ["sh", "-c", _OVER, "sh", str(cache), str(place)] if cache else []
    # Without root, namespaces are allowed only inside a user namespace, which buildah makes.
    own = ["buildah", "unshare"] if uid else []
    return [*own, "unshare", *spaces, "--", *over, *argv]

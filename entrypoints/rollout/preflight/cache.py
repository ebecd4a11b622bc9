"""The folders that hold what engines compile and download."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rollout.preflight.finding import Finding, Host

_KIND = "cache"
CACHE = "/var/cache/rollout"


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first."""
    path = cache_root(host.environ)
    if not os.access(host.root / str(path).lstrip("/"), os.W_OK | os.X_OK):
        way_out = "mount a writable folder there, or run with group 0"
        yield Finding(_KIND, "cache-not-writable", f"{path} cannot be written; {way_out}")


def cache_root(environ: Mapping[str, str]) -> Path:
    """The one root of all caches."""
    return Path(environ.get("XDG_CACHE_HOME") or CACHE)


def work_folder(environ: Mapping[str, str]) -> Path | None:
    """A folder for temporary files that can be written; with a read-only root /tmp cannot."""
    for candidate in (environ.get("TMPDIR"), "/tmp", environ.get("XDG_CACHE_HOME") or CACHE):  # noqa: S108
        if candidate and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return None

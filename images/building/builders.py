"""Which builder this machine has."""

from __future__ import annotations

import os
from pathlib import Path

from images.building.buildah import Buildah
from images.building.builder import Builder
from images.building.docker import Docker
from rollout.problem import Problem

BUILDERS: dict[str, type[Builder]] = {"buildah": Buildah, "docker": Docker}


def detect(wanted: str | None = None) -> Builder:
    """The builder asked for, else buildah, installed where that is possible.

    Raises:
        Problem: exit code 2 for an unknown name or a wrong TMPDIR, 3 where the builder cannot be
            had here.
    """
    if wanted and wanted not in BUILDERS:
        raise Problem(f"unknown builder {wanted!r}; known are {', '.join(BUILDERS)}", 2)
    folder = os.environ.get("TMPDIR")
    if folder and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise Problem(f"TMPDIR is {folder}, no folder that can be written; make it, or unset it", 2)
    tool = BUILDERS[wanted or "buildah"]()
    tool.require()
    return tool

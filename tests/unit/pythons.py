"""A Python installed in a folder of a test: the one of these tests, with nothing beside it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Debian's looks for what is beside it in /usr/lib/python3, wherever it lies itself.
movable = pytest.mark.skipif(
    sys.base_prefix == "/usr", reason="Debian's Python is no other place's"
)


def install(place: Path) -> Path:
    """A whole installation; of its library all but the modules are links. Returns its Python."""
    library = Path(sysconfig.get_path("stdlib"))
    (place / "bin").mkdir(parents=True)
    (place / "lib").mkdir()
    shutil.copy2(os.path.realpath(sys.executable), place / f"bin/python{MINOR}")
    (place / "bin/python3").symlink_to(f"python{MINOR}")
    own = place / f"lib/python{MINOR}"
    own.mkdir()
    for entry in sorted(library.iterdir()):
        if entry.name not in ("__pycache__", "site-packages", "dist-packages"):
            (own / entry.name).symlink_to(entry)
    (own / "site-packages").mkdir()
    return place / "bin/python3"

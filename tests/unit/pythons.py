"""A Python installed in a folder of a test: the one of these tests, with nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"


def install(place: Path) -> Path:
    """A whole installation; of its library all but the modules are links. Returns its Python."""
    # Debian's scheme names another place than that of the library itself.
    library = Path(sysconfig.__file__).parent
    (place / "bin").mkdir(parents=True)
    (place / "lib").mkdir()
    shutil.copy2(os.path.realpath(sys.executable), place / f"bin/python{MINOR}")
    (place / "bin/python3").symlink_to(f"python{MINOR}")
    own = place / f"lib/python{MINOR}"
    own.mkdir()
    for entry in sorted(library.iterdir()):
        if entry.name not in ("__pycache__", "site-packages", "dist-packages"):
            (own / entry.name).symlink_to(entry)
    return place / "bin/python3"


def site(python: Path) -> Path:
    """The folder that this installation has distributions in; Debian calls it otherwise."""
    code = "import site; print(site.getsitepackages()[0])"
    argv = [str(python), "-I", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    assert found.is_relative_to(python.parents[1])
    found.mkdir(parents=True, exist_ok=True)
    return found

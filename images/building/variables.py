"""Variables of an image that its engine does not read: settings that somebody believes in force.

Asked of the engine's own files, which are on this host before a build begins.
"""

from __future__ import annotations

import re
from pathlib import Path

from images.catalog import Image, shown
from rollout.problem import Problem

# How the names begin that are an engine's own, by its package. Other variables belong to others.
PREFIXES = {"vllm": ("VLLM_",), "sglang": ("SGLANG_", "SGL_")}


def unread(image: Image, site: Path) -> list[str]:
    """The engine's own variables of an image that no file of the engine names.

    ``site`` is a folder with the engine's package; where it is not there, nothing is said.
    """
    wanted = {name for name in image.env if name.startswith(PREFIXES.get(image.engine, ()))}
    package = site / image.engine
    if not wanted or not package.is_dir():
        return []
    word = re.compile("|".join(rf"\b{name}\b" for name in wanted))
    for file in sorted(package.rglob("*.py")):
        wanted -= set(word.findall(file.read_text(encoding="utf-8", errors="replace")))
        if not wanted:
            break
    return sorted(wanted)


def check(image: Image, site: Path) -> None:
    """Refuse what :func:`unread` finds.

    Raises:
        Problem: exit code 2, naming the file, the key and the engine.
    """
    for name in unread(image, site):
        engine = next(line for line in image.requirements if line.startswith(image.engine))
        what = f"key 'env.{name}' is a variable that no file of {engine} reads"
        raise Problem(f"{shown(image.path)}: {what}; remove it, or correct the name", 2)

"""The last layer of an image: our own package, the lock, and what the image is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path

from images.catalog import ROOT, Image
from images.locking import lock
from images.locking.lock import Locked
from images.schema import BACKENDS, FRAMEWORKS

ENTRYPOINTS = ROOT / "entrypoints" / "rollout"
LAUNCHER = """#!/opt/rollout/bin/python -I
from rollout.cli import main

# The guard matters: the engine's process is spawned, and imports this file once more.
if __name__ == "__main__":
    raise SystemExit(main())
"""


def facts(image: Image, locked: Sequence[Locked]) -> dict[str, object]:
    """What ``rollout`` inside the image has to know of it (share/rollout/image.json)."""
    versions = lock.versions(locked)
    framework = image.framework
    return {
        "reference": image.reference,
        "backend": image.backend,
        "framework": framework
        and {"name": framework.name, "distribution": framework.name, "version": framework.version},
        "lacks": dict(framework.lacks) if framework else {},
        "python": image.python,
        "resolved_as_of": image.resolved_as_of.isoformat(),
        "engine": {"name": image.backend, "distribution": image.engine},
        "cuda": lock.cuda(versions),
        "expect": dict(image.expect),
        "smoke": image.smoke.facts,
        "optional_libraries": sorted(image.optional_libraries),
        "imports": ["torch", image.engine.replace("-", "_")],
    }


def belongs(module: Path, image: Image) -> bool:
    """Whether a module of the package is for this image: one of another engine is not.

    One of another framework is not either. So a change in how one of them is driven leaves the
    proofs of the others valid.
    """
    framework = image.framework.name if image.framework else ""
    kinds = {"backends": (BACKENDS, image.backend), "frameworks": (FRAMEWORKS, framework)}
    if module.parent.name not in kinds:
        return True
    names, own = kinds[module.parent.name]
    owners = [
        known
        for known in (name.replace("-", "_") for name in names)
        # What drives an engine for one check alone is named after the check first.
        if re.search(rf"(^|_){known}(_|$)", module.stem)
    ]
    return owners in ([], [own.replace("-", "_")])


def imported(module: Path) -> set[Path]:
    """The modules of the package that one of them imports, anywhere in it."""
    found = set[Path]()
    for node in ast.walk(ast.parse(module.read_bytes(), str(module))):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        name, *inside = node.module.split(".")
        if name == ENTRYPOINTS.name:
            folder = ENTRYPOINTS.joinpath(*inside)
            found |= {folder.with_suffix(".py"), *(folder / f"{a.name}.py" for a in node.names)}
    return {path for path in found if path.is_file()}


def modules(image: Image) -> list[Path]:
    """The modules of the package that an image has: its own, and what adapters of these import.

    One framework's adapter may use another one's, which would not be there without the second rule.
    """
    everything = sorted(ENTRYPOINTS.rglob("*.py"))
    own = {path for path in everything if belongs(path, image)}
    waiting = [path for path in own if path.parent.name == "frameworks"]
    while waiting:
        new = imported(waiting.pop()) - own
        own |= new
        waiting += new
    return sorted(own)


def files(image: Image, locked: Sequence[Locked]) -> dict[str, bytes]:
    """The files of the last layer: our own package, the lock, and what the image is."""
    data = json.dumps(facts(image, locked), indent=1, sort_keys=True) + "\n"
    return {
        **{
            f"rollout/{path.relative_to(ENTRYPOINTS)}": path.read_bytes() for path in modules(image)
        },
        "requirements.lock": image.lock.read_bytes(),
        "image.json": data.encode(),
        "launcher": LAUNCHER.encode(),
        "python": image.python.encode(),
    }

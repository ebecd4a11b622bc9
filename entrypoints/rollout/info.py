"""What an image is, read from its own files: nothing is imported, so it takes milliseconds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rollout.problem import Problem

SHARE = "share/rollout"
IMAGE = f"{SHARE}/image.json"
LOCK = f"{SHARE}/requirements.lock"
# Of an image on its engine's release image: what that one has (images/recipes/beside).
RELEASE = f"{SHARE}/release.json"

_TORCH_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*(?:None|['\"]([^'\"]+)['\"])", re.MULTILINE)
_PYTHON = re.compile(r"^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)", re.MULTILINE)


def prefix() -> Path:
    """The environment of this image; ROLLOUT_PREFIX overrides it (tests)."""
    return Path(os.environ.get("ROLLOUT_PREFIX") or "/opt/rollout")


def site_packages(root: Path) -> list[Path]:
    """The folders of a prefix that distributions are installed into, sorted."""
    return sorted(path for path in root.glob("lib/python3.*/site-packages") if path.is_dir())


def normalised(name: str) -> str:
    """The name of a distribution as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def image(root: Path) -> dict[str, Any]:
    """The build's facts about this image; Problem (code 2) if they cannot be read."""
    path = root / IMAGE
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        sentence = f"{path} cannot be read ({error.strerror}): is this a rollout image?"
        raise Problem(sentence, 2) from None
    except ValueError:
        sentence = f"{path} is not JSON: the image is damaged or was not built by us."
        raise Problem(sentence, 2) from None
    if not isinstance(data, dict):
        raise Problem(f"{path} holds no JSON object: the image was not built by us.", 2)
    return data


def facts(root: Path) -> dict[str, Any]:
    """Reference, engine, torch, CUDA, Python, Ray, lock and dates of the image at root.

    ``lacks`` is what the framework's defaults use and is not in the image, each with what to do.
    Python and Ray in full: a Ray cluster turns a node away whose versions differ. A version is
    None where that distribution is not installed, ``cuda`` is None where torch was built for the
    CPU. Problem (code 2) if image.json or the lock cannot be read.
    """
    data = image(root)
    engine = data.get("engine")
    engine = engine if isinstance(engine, dict) else {}
    given = _release(root)
    versions = {**given.get("versions", {}), **_versions(root)}
    lacks = data.get("lacks")
    return {
        "reference": data.get("reference"),
        "backend": data.get("backend"),
        "framework": data.get("framework"),
        "engine": {
            "name": engine.get("name"),
            "version": versions.get(normalised(str(engine.get("distribution")))),
        },
        "torch": versions.get("torch"),
        "cuda": given["torch"]["cuda"] if given else _cuda(root),
        "python": _python(root) or data.get("python"),
        "ray": versions.get("ray"),
        "lock_sha256": lock_sha256(root),
        "resolved_as_of": data.get("resolved_as_of"),
        "lacks": lacking(lacks if isinstance(lacks, dict) else {}, versions),
    }


def lacking(named: Mapping[str, str], there: Iterable[str]) -> dict[str, str]:
    """Of the distributions that an image is said to lack those that are not there, with reasons."""
    known = {normalised(name) for name in there}
    return {name: why for name, why in named.items() if normalised(name) not in known}


def unlocked(root: Path) -> dict[str, str]:
    """The distributions of the lock without a sha256, each with what the lock says of its file.

    Problem (code 2) if it cannot be read.
    """
    text = _lock(root).decode("utf-8", "replace")
    return dict(re.findall(r"^(\S+)==\S+\n +# not locked: (.+)$", text, re.MULTILINE))


def lock_sha256(root: Path) -> str:
    """The sha256 of the bytes of requirements.lock; Problem (code 2) if it cannot be read."""
    return hashlib.sha256(_lock(root)).hexdigest()


def _lock(root: Path) -> bytes:
    path = root / LOCK
    try:
        return path.read_bytes()
    except OSError as error:
        raise Problem(f"{path} cannot be read ({error.strerror}).", 2) from None


def text(found: Mapping[str, Any]) -> str:
    """The table that ``rollout info`` prints; what is not there is said, not left out."""
    engine, framework = found["engine"], found["framework"]
    if isinstance(framework, dict):
        framework = f"{framework.get('name')} {framework.get('version')}"
    rows = {
        "image": found["reference"],
        "framework": framework,
        "engine": f"{engine['name']} {engine['version'] or '(not installed)'}",
        "torch": found["torch"] or "(not installed)",
        "CUDA": found["cuda"] or "none (CPU build)",
        "Python": found["python"],
        "Ray": found["ray"] or "none",
        "lock sha256": found["lock_sha256"],
        "resolved as of": found["resolved_as_of"],
    }
    shown = {key: "unknown" if value is None else value for key, value in rows.items()}
    lines = list(shown.items())
    lines += [("lacks", f"{name}: {why}") for name, why in found["lacks"].items()]
    return "\n".join(f"{key:<16}{value}" for key, value in lines)


def _release(root: Path) -> dict[str, Any]:
    """What the release image below had; empty where an image is built on our own base."""
    try:
        found: dict[str, Any] = json.loads((root / RELEASE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise Problem(f"{root / RELEASE} cannot be read: the image is damaged.", 2) from None
    return found


def _versions(root: Path) -> dict[str, str]:
    # The folder names alone: importlib.metadata would open and parse a file per distribution.
    names = (name for site in site_packages(root) for name in sorted(os.listdir(site)))  # noqa: PTH208
    stems = (name.removesuffix(".dist-info") for name in names if name.endswith(".dist-info"))
    pairs = (stem.partition("-") for stem in stems)
    return {normalised(name): version for name, _, version in pairs}


def _cuda(root: Path) -> str | None:
    # torch says itself what it was compiled for; its version need not (2.9.0 is a CUDA 12.8 build).
    for site in site_packages(root):
        try:
            match = _TORCH_CUDA.search((site / "torch/version.py").read_text(encoding="utf-8"))
        except OSError:
            continue
        if match:
            return match[1]
    return None


def _python(root: Path) -> str | None:
    try:
        match = _PYTHON.search((root / "pyvenv.cfg").read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None

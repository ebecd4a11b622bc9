"""The records that are kept, and a backend's comparison with an engine made of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from images.catalog import ROOT

from . import record, stub
from .surface import Surface

FOLDER = Path(__file__).with_name("records")
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "tensorrt_llm"}
# What serves a promise and can be read of sources. vLLM's server is made by its own parser.
PROMISES = {"vllm": ("fp8",), "sglang": ("server",), "tensorrt-llm": ("fp8",)}
ROUNDS = 8
# What SGLang's comparison does before it asks for anything.
TORCH = "from types import SimpleNamespace\ncuda = SimpleNamespace(is_available=lambda: True)\n"
Told = dict[str, Any]


def path(package: str, release: str) -> Path:
    """Where the record of a release stands."""
    return FOLDER / f"{package}-{release.removeprefix('v')}.json"


def read(where: Path) -> record.Record:
    """A record that is kept."""
    found: record.Record = json.loads(where.read_text(encoding="utf-8"))
    return found


def compared(names: dict[str, Any], backend: str) -> Told:
    """The backend's comparison with an engine that is made of these names, in its own process."""
    with tempfile.TemporaryDirectory(prefix="surface-") as temporary:
        folder = Path(temporary)
        stub.write(names, folder)
        (folder / "torch.py").write_text(TORCH, encoding="utf-8")
        command = [sys.executable, "-m", "tests.surface.asked", backend, *PROMISES[backend]]
        places = os.pathsep.join([temporary, str(ROOT / "entrypoints"), str(ROOT)])
        environ = {**os.environ, "PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr)
    told: Told = json.loads(done.stdout)
    return told


def made(surface: Surface, backend: str) -> tuple[record.Record, Told]:
    """The record of what the backend asks for; it asks for more once it finds something."""
    package = PACKAGES[backend]
    asked: set[str] = set()
    for _ in range(ROUNDS):
        found = record.record(surface, package, asked)
        told = compared(found["names"], backend)
        if set(told["asked"]) <= asked:
            return found, told
        asked |= set(told["asked"])
    raise AssertionError(f"{backend} asks for more in each of {ROUNDS} rounds")


def renew(surface: Surface, backend: str) -> tuple[Path, list[tuple[str, str]]]:
    """Make a record and keep it."""
    found, told = made(surface, backend)
    where = path(PACKAGES[backend], surface.sources.release)
    where.parent.mkdir(exist_ok=True)
    where.write_text(record.text(found), encoding="utf-8")
    return where, [(place, what) for place, what in told["problems"]]

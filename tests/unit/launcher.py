"""An unpacked export with no image in it, and what its launcher says of a command."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
# Some tests of this folder run inside an image, where images/ has not what it imports.
LAUNCHER = Path(__file__).parents[2] / "images/recipes/launcher"
# What an image sets: where its files lie, how they run, and what it is.
IMAGE = (
    "PATH=/usr/bin\nHF_HOME=/var/cache/rollout/hf\nNCCL_DEBUG=WARN\n"
    "TOKENIZERS_PARALLELISM=true\nROLLOUT_LAYERS=sha256:a\n"
)


def plan(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line[1] for line in plan(done) if line[0] == "argument"]


def passed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The variables of the command; of a name that stands there twice the last."""
    assert done.returncode == 0, done.stderr
    pairs = [pair.removesuffix("\n") for pair in done.stdout.split("argument\t")[1:]]
    inside = pairs[pairs.index("--default-signal=INT,QUIT") + 1 : pairs.index("/bin/sh")]
    return dict(pair.split("=", 1) for pair in inside)

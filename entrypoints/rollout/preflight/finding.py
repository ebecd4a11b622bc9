"""What a look at a host may read, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a host."""

    kind: str  # "gpu", "variables", "memory", "cache", "temporary", "network"
    name: str  # short hyphenated id, unique: "cache-on-nfs"
    sentence: str  # what is wrong, where, and what to do: one sentence
    stops: bool = True  # False: a warning: no obstacle to the proof but to a larger job


@dataclass(frozen=True)
class Host:
    """What a look may read."""

    root: Path
    environ: Mapping[str, str]  # as the job set it
    cuda: str | None  # CUDA version of the image, None for an image of the CPU
    proof: bool = True  # whether the proof is to run here, or another command
    all: bool = False  # whether somebody asks for all that may be wrong (`rollout doctor`)


@dataclass(frozen=True)
class Known:
    """What a reader wants to know of one finding."""

    example: str  # a sentence as it is printed, with what to do
    cause: str  # how a host comes to be so, and what fails there else
    stops: bool = True

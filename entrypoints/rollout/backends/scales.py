"""Engines that keep keys and values in 8 bits: what is asked of them besides, and their faults.

A backend has them in a module of their own, ``rollout.backends.fp8_kv_<backend>``, so that what the
other checks stand on stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rollout.backends import Engine

LARGEST = 448.0  # of float8_e4m3fn
# Of each attention layer, by its Hugging Face name: what its keys ("k") and values ("v") are
# divided by before they are rounded, and whatever else the engine has beside these. "k_float" is
# another copy of "k", and so is every name that begins so.
Scales = dict[str, dict[str, float]]
KEYS, VALUES = "k", "v"


class Scaled(Engine, Protocol):
    """An engine whose KV cache is in float8_e4m3, with a scale for each layer's keys and values.

    It starts on weights that are read: the scales come with them.
    """

    def calculates(self) -> bool:
        """Whether this version can calculate scales from the first tokens that it sees."""

    def calculate(self) -> None:
        """Have it calculate them, from its next start on."""

    def scales(self) -> Scales:
        """What it holds now, of every layer, to the bit."""

    def put(self, scales: Mapping[str, Mapping[str, float]]) -> None:
        """Replace what is named, where it lies: captured graphs have its address."""


def side(name: str) -> str:
    """What a name in ``Scales`` is of: ``KEYS``, ``VALUES``, or something else."""
    return name.partition("_")[0]

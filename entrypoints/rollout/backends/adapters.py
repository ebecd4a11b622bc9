"""Engines that take LoRA adapters: what is asked of them besides, and how one is made.

A backend has them in a module of their own, ``rollout.backends.lora_<backend>``, so that what the
other checks stand on stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rollout import placement
from rollout.backends import Completion, Engine, apart, backend_of

if TYPE_CHECKING:
    import torch

NONE = 0  # the number of no adapter; those of adapters begin with 1
# Faults that are made inside an engine with adapters.
LOST, KEPT = "adapter-lost-in-sleep", "adapter-not-replaced"
SCALED, UNDER = "adapter-at-wrong-scale", "refit-lost-under-adapter"
FAULTS = (LOST, KEPT, SCALED, UNDER)
BASE = ".base_layer"  # what engines put between a wrapped layer's name and its parameters'


class Adapting(Engine, Protocol):
    """An engine that is started with room for one adapter at a time.

    :meth:`inject` may be called before the start, with one of ``FAULTS``.
    """

    def load(self, number: int, folder: Path) -> None:
        """Load an adapter from a folder with PEFT's files, under a number that is new."""

    def take(
        self, number: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Take an adapter's tensors from memory, by PEFT's names, as verl sends them.

        What has this number already is replaced. ``config`` is that of PEFT's file.
        """

    def drop(self, number: int) -> None:
        """Remove an adapter."""

    def loaded(self) -> list[int]:
        """The numbers of the adapters that it has, by its own account, in their order."""

    def imprint(self) -> str:
        """sha256 of the bytes that the engine multiplies with for adapters, wherever they lie."""

    def adapted(
        self, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int]
    ) -> list[Completion]:
        """Like :meth:`generate`, each prompt with the adapter of its number (``NONE``: without)."""

    def wrapped(self, names: Sequence[str]) -> dict[str, str]:
        """By which name the engine's model, its layers wrapped, takes each tensor of a refit."""

    def takes_tensors(self) -> str:
        """Whose code puts an adapter from memory into the engine; empty where nothing can."""


class Unwrapped:
    """A model whose names are those that it has without the wrappers of adapters."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.packed_modules_mapping = getattr(model, "packed_modules_mapping", placement.PACKED)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """As torch's, a wrapped layer's parameters under the layer's own name."""
        for name, parameter in self._model.named_parameters():
            yield name.replace(BASE, ""), parameter

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """As torch's; of a wrapper and what it wraps the latter comes last."""
        for name, module in self._model.named_modules():
            yield name.replace(BASE, ""), module


def adapting(engine: Engine) -> Adapting:
    """The engine that takes adapters, of the backend that this one is of; not started yet."""
    own = getattr(engine, "adapting", None)  # one that stands for another knows better
    if own is not None:
        found: Adapting = own()
        return found
    made: Adapting = apart("lora", backend_of(engine))
    return made

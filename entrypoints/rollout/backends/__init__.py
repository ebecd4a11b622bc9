"""Engines behind one small protocol. Backends know nothing of checks, checks nothing of engines."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
KV_CACHE = "kv_cache"


class EngineError(RuntimeError):
    """An engine could not do what it was asked to do."""


@dataclass(frozen=True)
class Completion:
    """What an engine answers: greedy tokens and the natural log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Engine(Protocol):
    """An inference engine in a process of its own, driven from the trainer's side."""

    device: str  # what it runs on, as a person would name it
    transports: tuple[str, ...]  # how weights reach it in a refit, as the catalog names them

    def start(self, model: Path, *, dummy: bool, fp8: bool = False) -> None:
        """Start on a model folder; with ``dummy`` on whatever an initialisation leaves.

        With ``fp8`` the engine holds its linear layers in 8 bits, and a refit sends bfloat16.
        """

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        """Continue all prompts (token ids) in one batch by ``tokens`` greedy tokens."""

    def sleep(self, level: int) -> None:
        """Give memory back: level 1 keeps a copy of the weights elsewhere, level 2 does not."""

    def wake(self, tags: Sequence[str]) -> None:
        """Take memory again for ``weights``, ``kv_cache`` or both."""

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Replace weights, given by their Hugging Face names; returns the bytes moved."""

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of prompts seen: they belong to the weights of their time."""

    def digests(self) -> dict[str, str]:
        """sha256 of the bytes that the engine holds for each weight, by Hugging Face name."""

    def held(self) -> int:
        """Bytes that the engine holds for weights and KV cache while awake, by its own account."""

    def memory(self) -> int:
        """Bytes in use, by the account of the operating system or the driver."""

    def inject(self, fault: str) -> None:
        """Make a fault that only an engine's inside can make, to show that it is found."""

    def stop(self) -> None:
        """End the engine and leave nothing behind; harmless when called twice."""


def create(backend: str) -> Engine:
    """The engine of a backend: module ``rollout.backends.<backend>``, class ``Engine``."""
    module = importlib.import_module(f"rollout.backends.{backend.replace('-', '_')}")
    engine: Engine = module.Engine()
    return engine

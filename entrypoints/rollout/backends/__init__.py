"""Engines behind one small protocol. Backends know nothing of checks, checks nothing of engines."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
KV_CACHE = "kv_cache"


class EngineError(RuntimeError):
    """An engine could not do what it was asked to do."""


@dataclass(frozen=True)
class Completion:
    """What an engine answers: greedy tokens and the natural log-probability of each.

    ``cached`` is how many tokens of the prompt it says it took from its prefix cache. Two answers
    are the same whatever it took.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int = field(default=0, compare=False)


class Engine(Protocol):
    """An inference engine in a process of its own, driven from the trainer's side."""

    device: str  # what it runs on, as a person would name it
    transports: tuple[str, ...]  # how weights reach it in a refit, as the catalog names them
    kv_bytes: int  # of the KV cache that it is told to take, on one GPU
    levels: tuple[int, ...]  # of sleep, that it can go to as it was started
    cache_block: int  # tokens: its prefix cache shares whole blocks of so many
    mlp_bias: bool  # whether its Llama has the biases of the MLP; one without overlooks them
    witness: bool  # whether it has a weights checker of its own (remember, unchanged)
    # Variables with which it refuses GPUs whose free memory differs; empty where it never does.
    insisting: Mapping[str, str]

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        """Start on a model folder; with ``dummy`` on whatever an initialisation leaves.

        With ``fp8`` the engine holds its linear layers in 8 bits, and a refit sends bfloat16.
        ``level`` is how deep it will be asked to sleep: some have to know before they take memory.
        ``gpus`` is how many it divides each tensor among, the first that are visible.
        """

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        """Continue all prompts (token ids) in one batch by ``tokens`` greedy tokens."""

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        """Like :meth:`generate`, but stopped once every prompt has ``after`` tokens.

        Returns what there is of each answer then, and leaves nothing running.
        """

    def sleep(self, level: int) -> None:
        """Give memory back: level 1 keeps a copy of the weights elsewhere, level 2 does not."""

    def wake(self, tags: Sequence[str]) -> None:
        """Take memory again for ``weights``, ``kv_cache`` or both."""

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        """Replace weights, given by their Hugging Face names; returns the bytes moved.

        By one of ``transports``; by the first where none is named.
        """

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of prompts seen: they belong to the weights of their time."""

    def digests(self) -> dict[str, str]:
        """sha256 of the bytes that the engine holds for each weight, by Hugging Face name."""

    def remember(self) -> None:
        """Have the engine's own weights checker take note of what it holds."""

    def unchanged(self) -> bool:
        """Whether the engine's own checker finds what it took note of."""

    def held(self) -> int:
        """Bytes that the engine holds for weights and KV cache while awake, by its own account."""

    def memory(self) -> int:
        """Bytes in use, by the account of the operating system or the driver."""

    def inject(self, fault: str) -> None:
        """Make a fault that only an engine's inside can make, to show that it is found."""

    def stop(self) -> None:
        """End the engine and leave nothing behind; harmless when called twice."""


class Served(Engine, Protocol):
    """An engine's own HTTP server, with what a trainer elsewhere asks of it besides."""

    pauses: bool  # whether it has paths for `halt` and `resume`, known once it has started

    def about(self) -> dict[str, Any]:
        """What it tells a trainer of itself: ``model``, and ``gpus`` where it says how many."""

    def halt(self, prompts: Sequence[Sequence[int]], tokens: int, after: int) -> list[Completion]:
        """Like :meth:`interrupt`, by a pause of the whole server: what comes later has to wait."""

    def resume(self) -> None:
        """Go on after :meth:`halt`, with what waits."""

    def endpoints(self) -> list[str]:
        """The paths that it has answered since its start."""


class Lengthy(Engine, Protocol):
    """An engine that is set for long sequences, of which its KV cache holds few.

    A fault is made in it before it starts: some are made of what it is started with.
    """

    longest: int  # tokens of prompt and completion
    chunk: int  # tokens at most that it computes at a time; a longer prompt goes in several
    requests: int  # at once

    def capacity(self) -> int:
        """Tokens that its KV cache holds, by its own account."""

    def preemptions(self) -> int:
        """How often a request has lost its KV cache to others since the start, by its account."""


@dataclass(frozen=True)
class Abilities:
    """What a backend can be asked for, as its module says in ``ABILITIES``.

    The host reads it, without torch and without the engine: a catalog file that promises more is
    refused there, and not by a run on a GPU hours later. What a release of the engine lacks beside
    that, the run finds.
    """

    transports: tuple[str, ...]  # of a refit, as the catalog names them
    levels: tuple[int, ...] = (1, 2)  # of sleep
    fp8: bool = False  # weights in 8 bits
    lora: bool = False  # adapters, by the module ``lora_<backend>``
    server: bool = False  # the engine's own HTTP server
    tensor_parallel: bool = False  # a model divided among GPUs
    long: bool = False  # long sequences, by the module ``long_<backend>``
    moe: bool = False  # a mixture of experts, by the module ``moe_<backend>``
    pressure: bool = False  # hundreds of requests at once, by ``pressure_<backend>``
    fp8_kv: bool = False  # keys and values in 8 bits, by ``fp8_kv_<backend>``
    disaggregated: bool = False  # a trainer elsewhere, by ``disaggregated_<backend>``


def abilities(backend: str) -> Abilities | None:
    """What a backend can be asked for; None where there is no module of it."""
    try:
        module = importlib.import_module(f"rollout.backends.{backend.replace('-', '_')}")
    except ModuleNotFoundError:
        return None
    found: Abilities = module.ABILITIES
    return found


def create(backend: str, *, served: bool = False) -> Engine:
    """The engine of a backend: module ``rollout.backends.<backend>``, class ``Engine``.

    With ``served`` class ``Server``: the engine's own HTTP server, driven from outside.
    """
    module = importlib.import_module(f"rollout.backends.{backend.replace('-', '_')}")
    engine: Engine = module.Server() if served else module.Engine()
    return engine


def apart(check: str, backend: str) -> Any:
    """The engine of a backend for one check alone: ``rollout.backends.<check>_<backend>``."""
    module = importlib.import_module(f"rollout.backends.{check}_{backend.replace('-', '_')}")
    return module.Engine()


def backend_of(engine: Engine) -> str:
    """The backend that an engine is of, by the name of its module."""
    return type(engine).__module__.rpartition(".")[2]


def lengthy(engine: Engine) -> Lengthy:
    """An engine of the same backend for long sequences, not started yet."""
    within = engine
    while hasattr(within, "within"):  # one with a fault
        within = within.within
    found: Lengthy = apart("long", backend_of(within))
    return found

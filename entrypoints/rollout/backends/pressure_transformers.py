"""The reference engine under pressure: many sampled requests at once, of which some are aborted.

It schedules as it does for long sequences, and works while it is listened to.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import Completion, EngineError, crowd, long_transformers
from rollout.backends import transformers as reference
from rollout.backends.crowd import Asked, Said, Usage

if TYPE_CHECKING:
    import torch

REQUESTS = 64
ANSWERS = (16, 40)
SEED = 20261130


class Engine(reference.Engine):
    """The trainer's side (see :class:`rollout.backends.crowd.Crowd`)."""

    def __init__(self) -> None:
        super().__init__()
        self.crowd, self.slots, self.answers = REQUESTS, long_transformers.REQUESTS, ANSWERS
        self._fault = ""

    @property
    def serve(self) -> Callable[..., None]:
        return _serve

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)
        if self._fault:
            self._call("inject", self._fault)

    def inject(self, fault: str) -> None:
        """Make a fault at the next start."""
        if fault != crowd.LEAKED:
            raise EngineError(f"the reference engine makes no fault {fault!r} under pressure")
        self._fault = fault

    def submit(self, asked: Sequence[Asked]) -> None:
        self._call("submit", _plain(asked))

    def listen(self) -> list[Said]:
        return [Said(*one) for one in self._call("listen")]

    def abort(self, names: Sequence[str]) -> list[Said]:
        self._call("abort", list(names))
        return []  # it works while it is listened to: nothing is on its way

    def usage(self) -> Usage:
        requests, blocks = self._call("usage")
        if self._process is None or self._process.pid is None:
            raise EngineError("the engine is not started")
        processes = {os.getpid(), self._process.pid}
        files, shared = crowd.files(processes), crowd.shared(processes)
        return Usage(requests, blocks, self.memory(), files, shared)

    def plain(self, asked: Sequence[Asked]) -> list[Completion]:
        return [Completion(*answer) for answer in self._call("plain", _plain(asked))]


def _plain(asked: Sequence[Asked]) -> list[tuple[str, list[int], int]]:
    return [(one.name, list(one.prompt), one.tokens) for one in asked]


@dataclass
class Named(long_transformers.Request):
    """A request with a name, of whose answer some was told."""

    name: str = ""
    told: int = 0


class Worker(long_transformers.Worker):
    """The engine's own process."""

    def __init__(self, *given: Any) -> None:
        import torch

        super().__init__(*given)
        self.waiting: deque[long_transformers.Request] = deque()
        self.running: list[long_transformers.Request] = []
        self.chance = torch.Generator().manual_seed(SEED)

    def submit(self, asked: list[tuple[str, list[int], int]]) -> None:
        if self.asleep:
            raise EngineError(f"asleep: {', '.join(sorted(self.asleep))} not woken")
        self.waiting += [Named(prompt, tokens, name=name) for name, prompt, tokens in asked]

    def listen(self) -> list[tuple[str, tuple[int, ...], tuple[float, ...], bool]]:
        import torch

        found: list[tuple[str, tuple[int, ...], tuple[float, ...], bool]] = []
        while not found and (self.waiting or self.running):
            with torch.inference_mode():
                self._step(self.waiting, self.running)
            for request in list(self.running):
                assert isinstance(request, Named)  # noqa: S101 - for mypy
                new = len(request.logprobs) - request.told
                if new:
                    tokens = tuple(request.tokens[-new:])
                    values = tuple(request.logprobs[-new:])
                    found.append((request.name, tokens, values, request.answered))
                    request.told += new
                if request.answered:
                    self.running.remove(request)
                    self._release(request)
        return found

    def abort(self, names: list[str]) -> None:
        given = set(names)
        for request in [*self.running, *self.waiting]:
            if isinstance(request, Named) and request.name in given:
                if request in self.running:
                    self.running.remove(request)
                else:
                    self.waiting.remove(request)
                if crowd.LEAKED in self.faults:
                    del request.blocks[:1]
                self._release(request)

    def usage(self) -> tuple[int, int]:
        # What was freed goes back, so that memory which stays is memory that is kept.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return len(self.waiting) + len(self.running), len(self.blocks) - len(self.free)

    def plain(self, asked: list[tuple[str, list[int], int]]) -> list[tuple[Any, Any]]:
        answers: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        self.submit(asked)
        while said := self.listen():
            for name, tokens, values, _ in said:
                before = answers.get(name, ((), ()))
                answers[name] = (before[0] + tokens, before[1] + values)
        return [answers[name] for name, _, _ in asked]

    def _choose(self, request: long_transformers.Request, logits: torch.Tensor) -> None:
        """Take a token by its probability."""
        import torch

        logprobs = logits.float().log_softmax(-1)
        token = int(torch.multinomial(logprobs.exp(), 1, generator=self.chance))
        request.tokens.append(token)
        request.logprobs.append(float(logprobs[token]))


def _serve(connection: Connection, model: str, dummy: bool, parent: int) -> None:
    """The main loop of the reference engine, with the worker of this module."""
    vars(reference)["Worker"] = Worker
    reference._serve(connection, model, dummy, parent)

"""SGLang for long sequences: prompts in chunks, and a KV cache that holds little more than one."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout import rotary
from rollout.backends import EngineError, apart_sglang, sglang, sglang_worker
from rollout.problem import Problem

LONGEST = 16384  # tokens of prompt and completion
CHUNK = 2048  # tokens of a step
CACHE_TOKENS = LONGEST + LONGEST // 4
# Of what answers may still become, how much is kept free when a request begins: so little that more
# are begun than will fit. Engines under a trainer's load come to the same by themselves, in time.
CAUTION = 0.05
# What it gives a retracted request is decided deep in its scheduler, and no fault of ours.
FAULTS = {"frozen-rotary": "smoke_freeze_rotary", "shifted-chunk": "smoke_shift_chunk"}


def arguments(model: Path, *, dummy: bool, level: int, longest: int) -> dict[str, Any]:
    """What SGLang is started with, by the names of its ``ServerArgs``."""
    return sglang.arguments(model, dummy=dummy, level=level, gpus=1) | {
        "max_total_tokens": CACHE_TOKENS,
        "context_length": longest,
        "chunked_prefill_size": CHUNK,
        "schedule_conservativeness": CAUTION,
    }


class Engine(apart_sglang.Engine):
    """The trainer's side (see :class:`rollout.backends.Lengthy`)."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.chunk, self.requests = LONGEST, CHUNK, sglang.REQUESTS

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8 or gpus > 1:
            raise EngineError("this backend starts SGLang for long sequences in bfloat16 alone")
        options = arguments(model, dummy=dummy, level=level, longest=self.longest)
        self.begin(model, options, drive, how=" for long sequences")
        if self._fault:
            self._call("rpc", FAULTS[self._fault])

    def inject(self, fault: str) -> None:
        """Make a fault at the next start."""
        if fault not in FAULTS:
            raise Problem(f"--inject: {fault} is not made in SGLang; its scheduler is its own", 2)
        self._fault = fault

    def capacity(self) -> int:
        return int(self._call("rpc", "smoke_capacity"))

    def preemptions(self) -> int:
        return int(self._call("rpc", "smoke_retractions"))


class Extension:
    """Methods of the scheduler process; ``self`` is SGLang's scheduler."""

    max_total_num_tokens: int

    def smoke_capacity(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """Tokens that the KV cache holds."""
        sglang_worker._reply(given, path, int(self.max_total_num_tokens))

    def smoke_retractions(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """How many requests were retracted since the start."""
        sglang_worker._reply(given, path, Count.retracted)

    def smoke_freeze_rotary(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: every token from a position on is rotated as if it stood there."""
        rotary.spoil(sglang_worker._runner(self).model, "frozen-rotary", LONGEST // 4)
        sglang_worker._reply(given, path, None)

    def smoke_shift_chunk(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: behind the first chunk all positions are one too high."""
        rotary.spoil(sglang_worker._runner(self).model, "shifted-chunk", CHUNK)
        sglang_worker._reply(given, path, None)


class Count:
    """What was counted in this process."""

    retracted = 0


def counting(retract: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's own method that retracts requests, which returns them first; they are counted."""

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        found = retract(self, *arguments, **options)
        Count.retracted += len(found[0])
        return found

    return counted


def schedule(*arguments: Any, **options: Any) -> None:
    """SGLang's scheduler process, with our methods."""
    sglang_worker.die_with_parent()
    from sglang.srt.managers import schedule_batch, scheduler

    for name in vars(Extension):
        if name.startswith("smoke_"):
            setattr(scheduler.Scheduler, name, getattr(Extension, name))
    batch = schedule_batch.ScheduleBatch
    batch.retract_decode = counting(batch.retract_decode)
    sglang_worker.schedule(*arguments, **options)


def drive(connection: Connection, options: dict[str, Any], log: str, parent: int) -> None:
    """The driver process of SGLang, whose scheduler is the one of this module."""
    vars(sglang_worker)["schedule"] = schedule
    sglang_worker.drive(connection, options, log, parent)

"""SGLang under pressure: hundreds of sampled requests as streams, in the process that drives it.

An abort is ``TokenizerManager.abort_request``, as verl and slime reach it; SGLang then ends the
stream with what it has. It counts single tokens of its KV cache, so they are the blocks here. What
its prefix cache alone holds is in use by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout.backends import Completion, EngineError, apart_sglang, crowd, sglang, sglang_worker
from rollout.backends.crowd import Asked, Said, Usage
from rollout.problem import Problem

REQUESTS = 512
SLOTS = 128
ANSWERS = (16, 160)
# Seconds in which a step that was on its way when the last request ended gives its tokens back.
LATE = 2.0
Heard = tuple[str, tuple[int, ...], tuple[float, ...], bool]


def arguments(model: Path, *, dummy: bool, level: int) -> dict[str, Any]:
    """What SGLang is started with, by the names of its ``ServerArgs``."""
    return sglang.arguments(model, dummy=dummy, level=level, gpus=1) | {
        "max_running_requests": SLOTS,
        "cuda_graph_max_bs": SLOTS,
    }


def sampled(tokens: int) -> dict[str, Any]:
    """Sampling parameters of so many tokens at temperature 1, as trainers sample."""
    return sglang_worker.greedy(tokens) | {"temperature": 1.0}


class Engine(apart_sglang.Engine):
    """The trainer's side (see :class:`rollout.backends.crowd.Crowd`)."""

    def __init__(self) -> None:
        super().__init__()
        self.crowd, self.slots, self.answers = REQUESTS, SLOTS, ANSWERS

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8 or gpus > 1:
            raise EngineError("this backend starts SGLang for many requests in bfloat16 alone")
        options = arguments(model, dummy=dummy, level=level)
        self.begin(model, options, drive, how=" for many requests")

    def inject(self, fault: str) -> None:
        """None is made here: an SGLang that finds blocks missing when it is idle ends itself."""
        raise Problem(f"--inject: {fault} is not made in SGLang, which looks for it and ends", 2)

    def submit(self, asked: Sequence[Asked]) -> None:
        self._call("submit", _plain(asked))

    def listen(self) -> list[Said]:
        return [Said(*one) for one in self._call("listen")]

    def abort(self, names: Sequence[str]) -> list[Said]:
        return [Said(*one) for one in self._call("abort", list(names))]

    def usage(self) -> Usage:
        requests, tokens, processes = self._call("usage")
        everyone = {os.getpid(), *processes}
        files, shared = crowd.files(everyone), crowd.shared(everyone)
        return Usage(requests, tokens, self.memory(), files, shared)

    def plain(self, asked: Sequence[Asked]) -> list[Completion]:
        return sglang._completions(self._call("plain", _plain(asked)))


def _plain(asked: Sequence[Asked]) -> list[tuple[str, list[int], int]]:
    return [(one.name, list(one.prompt), one.tokens) for one in asked]


class Extension:
    """Methods of the scheduler process; ``self`` is SGLang's scheduler."""

    def smoke_usage(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """Requests that run or wait, tokens of the KV cache in use, and this process."""
        scheduler: Any = self
        requests = [*scheduler.waiting_queue, *scheduler.running_batch.reqs]
        going = sum(not request.finished() for request in requests)
        free = scheduler.token_to_kv_pool_allocator.available_size()
        tokens = int(scheduler.max_total_num_tokens - free - scheduler.tree_cache.evictable_size())
        sglang_worker._reply(given, path, [going, tokens, os.getpid()])


class Driver(sglang_worker.Driver):
    """The engine's own process, which follows every request."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.heard: list[Heard] = []
        self.news = asyncio.Event()

    def submit(self, asked: list[tuple[str, list[int], int]]) -> None:
        self.await_(self._submit(asked))

    async def _submit(self, asked: list[tuple[str, list[int], int]]) -> None:
        for name, prompt, tokens in asked:
            self.tasks[name] = asyncio.create_task(self._follow(name, prompt, tokens))
        await asyncio.sleep(0)  # each sends its request before any of them waits for an answer

    async def _follow(self, name: str, prompt: list[int], tokens: int) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        asked = GenerateReqInput(
            input_ids=prompt,
            sampling_params=sampled(tokens),
            return_logprob=True,
            stream=True,
            rid=name,
        )
        told = 0
        async for output in self.manager.generate_request(asked, None):
            ids, values, ended = new(output, told)
            told += len(ids)
            if ids or ended:
                self.heard.append((name, ids, values, ended))
                self.news.set()

    def listen(self) -> list[Heard]:
        return self.await_(self._listen())  # type: ignore[no-any-return]

    async def _listen(self) -> list[Heard]:
        end = time.monotonic() + crowd.PATIENCE
        while not self.heard:
            self._forget()
            if not self.tasks:
                break
            if time.monotonic() > end:
                raise RuntimeError(f"SGLang said nothing for {crowd.PATIENCE:.0f} s")
            self.news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.news.wait(), 0.1)
        heard, self.heard = self.heard, []
        return heard

    def _forget(self) -> None:
        """Leave out the requests that have ended; one that failed fails here."""
        for name, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[name]
                if not task.cancelled():
                    task.result()

    def abort(self, names: list[str]) -> list[Heard]:
        return self.await_(self._abort(names))  # type: ignore[no-any-return]

    async def _abort(self, names: list[str]) -> list[Heard]:
        tasks = [self.tasks[name] for name in names if name in self.tasks]
        for name in names:
            self.manager.abort_request(name)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=sglang_worker.ABORTED)
            for task in late:  # 0.4.6 forgets an aborted request, and whoever waits for it
                task.cancel()
        self._forget()
        given = set(names)
        last = [one for one in self.heard if one[0] in given]
        self.heard = [one for one in self.heard if one[0] not in given]
        return last

    def usage(self) -> tuple[int, int, list[int]]:
        """Requests and tokens of the scheduler; the process ids of it and of this one."""
        end = time.monotonic() + LATE
        while True:
            requests, tokens, process = self.rpc("smoke_usage")
            if requests or not tokens or time.monotonic() > end:
                return requests, tokens, [process, os.getpid()]
            time.sleep(0.05)

    def plain(self, asked: list[tuple[str, list[int], int]]) -> list[Any]:
        found = self.engine.generate(
            input_ids=[prompt for _, prompt, _ in asked],
            sampling_params=[sampled(tokens) for _, _, tokens in asked],
            return_logprob=True,
        )
        return [sglang_worker.completion(output) for output in found]


def new(output: dict[str, Any], told: int) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    """What an output of a stream says beyond the tokens told already, and whether it is whole.

    One that is aborted while it waits may have no log-probabilities at all.
    """
    meta = output["meta_info"]
    chosen = (meta.get("output_token_logprobs") or [])[told:]
    reason = meta.get("finish_reason") or {}
    kind = reason.get("type") if isinstance(reason, dict) else reason
    ids = tuple(token for _, token, *_ in chosen)
    return ids, tuple(value for value, *_ in chosen), kind == "length"


def schedule(*arguments: Any, **options: Any) -> None:
    """SGLang's scheduler process, with our methods."""
    sglang_worker.die_with_parent()
    from sglang.srt.managers import scheduler

    scheduler.Scheduler.smoke_usage = Extension.smoke_usage
    sglang_worker.schedule(*arguments, **options)


def drive(connection: Connection, options: dict[str, Any], log: str, parent: int) -> None:
    """The driver process of SGLang, with the driver and the scheduler of this module."""
    vars(sglang_worker).update(schedule=schedule, Driver=Driver)
    sglang_worker.drive(connection, options, log, parent)

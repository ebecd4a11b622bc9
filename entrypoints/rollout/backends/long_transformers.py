"""The reference engine for long sequences: chunks of a prompt, blocks of a cache, preemption.

It schedules as vLLM does: each step computes at most so many tokens, those of answers before those
of prompts; where no block is free the request that began last loses its own, waits, and is computed
anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import EngineError
from rollout.backends import transformers as reference
from rollout.backends.transformers import BLOCK_TOKENS

if TYPE_CHECKING:
    import torch

LONGEST = 4096  # tokens of prompt and completion
CHUNK = 512  # tokens of a step
REQUESTS = 12  # at once
CACHE_TOKENS = LONGEST + LONGEST // 8
FAULTS = ("frozen-rotary", "halved-window", "shifted-chunk", "wrong-blocks")


class Engine(reference.Engine):
    """The trainer's side (see :class:`rollout.backends.Lengthy`)."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.chunk, self.requests = LONGEST, CHUNK, REQUESTS
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
        if fault not in FAULTS:
            raise EngineError(f"the reference engine makes no fault {fault!r} in long sequences")
        self._fault = fault

    def capacity(self) -> int:
        return int(self._call("capacity"))

    def preemptions(self) -> int:
        return int(self._call("preemptions"))


@dataclass
class Request:
    """A request: its tokens, of which some are computed into blocks, and its answer so far."""

    tokens: list[int]
    wanted: int  # tokens of the answer
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    preempted: bool = False

    @property
    def answered(self) -> bool:
        return len(self.logprobs) == self.wanted


class Worker(reference.Worker):
    """The engine's own process, with a scheduler."""

    def __init__(self, model: Path, dummy: bool) -> None:
        super().__init__(model, dummy)
        self.blocks = self.blocks[: CACHE_TOKENS // BLOCK_TOKENS]
        self.free = list(range(len(self.blocks)))
        self.count = 0

    def capacity(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS

    def preemptions(self) -> int:
        return self.count

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int,
        enough: Callable[[int], bool] = lambda _: False,
    ) -> list[tuple[Any, Any, int]]:
        import torch

        if self.asleep:
            raise EngineError(f"asleep: {', '.join(sorted(self.asleep))} not woken")
        for prompt in prompts:
            if len(prompt) + tokens > min(LONGEST, self.capacity()):
                raise EngineError(f"{len(prompt)} tokens and {tokens} more are too many")
        everyone = [Request(list(prompt), tokens) for prompt in prompts]
        waiting, running = deque(everyone), list[Request]()
        self.free = list(range(len(self.blocks)))
        with torch.inference_mode():
            while not all(request.answered for request in everyone):
                self._step(waiting, running)
                for request in [r for r in running if r.answered]:
                    running.remove(request)
                    self._release(request)
                if enough(min(len(request.logprobs) for request in everyone)):
                    break
        return [
            (tuple(r.tokens[len(prompt) :]), tuple(r.logprobs), 0)
            for prompt, r in zip(prompts, everyone, strict=True)
        ]

    def _step(self, waiting: deque[Request], running: list[Request]) -> None:
        """Compute at most a chunk: first the next tokens of answers, then of prompts."""
        budget = CHUNK
        going = [r for r in running if r.computed == len(r.tokens) - 1]
        for request in going:
            while request in running and not self._allot(request, len(request.tokens)):
                self._preempt(running, waiting)
        going = [request for request in going if request in running]
        if going:
            self._continue(going)
        budget -= len(going)
        for request in [r for r in running if r not in going]:
            budget = self._compute(request, budget)
        while waiting and len(running) < REQUESTS and budget > 0:
            if not self._allot(waiting[0], len(waiting[0].tokens)):
                break
            request = waiting.popleft()
            running.append(request)
            self._resume(request)
            budget = self._compute(request, budget)

    def _allot(self, request: Request, tokens: int) -> bool:
        """Give a request the blocks for so many tokens; False where too few are free."""
        lacking = -(-tokens // BLOCK_TOKENS) - len(request.blocks)
        if lacking > len(self.free):
            return False
        request.blocks += [self.free.pop() for _ in range(lacking)]
        return True

    def _release(self, request: Request) -> None:
        self.free += request.blocks
        request.blocks, request.computed = [], 0

    def _preempt(self, running: list[Request], waiting: deque[Request]) -> None:
        """Take the blocks of the request that began last; it is computed anew."""
        request = running.pop()
        self._release(request)
        request.preempted = True
        waiting.appendleft(request)
        self.count += 1

    def _resume(self, request: Request) -> None:
        """A fault: take what other requests left in its new blocks for its own."""
        if request.preempted and "wrong-blocks" in self.faults:
            request.computed = (len(request.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def _compute(self, request: Request, budget: int) -> int:
        """Compute at most so many tokens of a request; returns how many may still be."""
        import torch

        begin = request.computed
        end = min(len(request.tokens), begin + budget)
        if end <= begin:
            return budget
        past = self._past(request)
        ids = torch.tensor([request.tokens[begin:end]])
        logits, cache = self._forward(ids, torch.arange(begin, end)[None], past[:, :, None])
        for layer, held in enumerate(cache.layers):
            for which, state in enumerate((held.keys, held.values)):
                self._keep(request, layer, which, begin, state[0, :, -(end - begin) :])
        request.computed = end
        if end == len(request.tokens):
            self._choose(request, logits[0, -1])
        return budget - (end - begin)

    def _continue(self, requests: Sequence[Request]) -> None:
        """The next token of each of these requests, as one batch."""
        import torch

        states = [self._past(request) for request in requests]
        longest = max(state.shape[3] for state in states)
        padded = [torch.nn.functional.pad(s, (0, 0, longest - s.shape[3], 0)) for s in states]
        mask = torch.zeros(len(states), longest + 1, dtype=torch.long)
        for row, state in enumerate(states):
            mask[row, longest - state.shape[3] :] = 1
        ids = torch.tensor([[request.tokens[-1]] for request in requests])
        places = torch.tensor([[request.computed] for request in requests])
        logits, cache = self._forward(ids, places, torch.stack(padded, dim=2), mask)
        for row, request in enumerate(requests):
            for layer, held in enumerate(cache.layers):
                for which, state in enumerate((held.keys, held.values)):
                    self._keep(request, layer, which, request.computed, state[row, :, -1:])
            request.computed += 1
            self._choose(request, logits[row, -1])

    def _choose(self, request: Request, logits: torch.Tensor) -> None:
        """Take the likeliest token."""
        logprobs = logits.float().log_softmax(-1)
        best = int(logprobs.argmax())
        request.tokens.append(best)
        request.logprobs.append(float(logprobs[best]))

    def _past(self, request: Request) -> torch.Tensor:
        """Keys and values that a request sees (layer, 2, head, token, dim)."""
        import torch

        if not request.computed:
            return self.blocks[0, :, :, :, :0]
        count = -(-request.computed // BLOCK_TOKENS)
        held = self.blocks[torch.tensor(request.blocks[:count])]  # (block, layer, 2, head, …)
        state = held.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, : request.computed]
        return state[:, :, :, -(LONGEST // 2) :] if "halved-window" in self.faults else state

    def _keep(
        self, request: Request, layer: int, which: int, begin: int, state: torch.Tensor
    ) -> None:
        """Write keys (0) or values (1) of some tokens, (head, token, dim), into their blocks."""
        done = 0
        while done < state.shape[1]:
            place, offset = divmod(begin + done, BLOCK_TOKENS)
            size = min(BLOCK_TOKENS - offset, state.shape[1] - done)
            block = self.blocks[request.blocks[place], layer, which]
            block[:, offset : offset + size] = state[:, done : done + size]
            done += size

    def _forward(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        past: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Logits, and the cache with what came before (layer, 2, request, head, token, dim)."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if past.shape[4]:
            for layer, (keys, values) in enumerate(past):
                cache.update(keys, values, layer)
        output = self.model(
            input_ids=ids,
            position_ids=self._places(places),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, cache

    def _places(self, places: torch.Tensor) -> torch.Tensor:
        """The positions that the rotary embedding is given; faults give it others."""
        if "frozen-rotary" in self.faults:
            return places.clamp(max=LONGEST // 4)
        if "shifted-chunk" in self.faults:
            return places + (places >= CHUNK).long()
        return places


def _serve(connection: Connection, model: str, dummy: bool, parent: int) -> None:
    """The main loop of the reference engine, with the worker of this module."""
    vars(reference)["Worker"] = Worker
    reference._serve(connection, model, dummy, parent)

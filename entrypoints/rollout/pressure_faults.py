"""Faults of many requests at once, made on purpose; what each is stands in :mod:`rollout.faults`.

They are made at the engine's protocol, whatever the engine is; it goes on as it always does.
Leaked blocks alone are made inside of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from rollout.backends.crowd import LEAKED, Asked, Crowd, Said

if TYPE_CHECKING:
    import torch

LOST, CROSSED, IGNORED, STALE = "lost-request", "crossed-answers", "ignored-abort", "stale-half"
FAULTS = (LOST, CROSSED, IGNORED, STALE, LEAKED)


class Spoiled:
    """An engine with one fault; what is not here, the engine does itself."""

    def __init__(self, engine: Crowd, fault: str) -> None:
        self._engine, self._fault = engine, fault
        self._aborts = 0
        self._silent: set[str] = set()  # nothing more is told of these
        self._renamed: dict[str, str] = {}
        self._waiting: list[tuple[list[tuple[str, torch.Tensor]], str]] = []
        self._heard: list[Said] = []
        if fault == LEAKED:
            engine.inject(fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, asked: Sequence[Asked]) -> None:
        going = self._aborts == 2  # those that were aborted for the new weights
        if going and self._fault == LOST:
            self._silent.add(asked[0].name)
        if going and self._fault == CROSSED:
            self._renamed = crossed(asked)
        if going and self._waiting:
            half = asked[::2]
            self._engine.submit(half)
            while said := self._engine.listen():
                self._heard += said
            for tensors, transport in self._waiting:
                self._engine.refit(tensors, transport)
            self._engine.reset_prefix_cache()
            self._waiting, asked = [], asked[1::2]
        self._engine.submit(asked)

    def listen(self) -> list[Said]:
        if self._heard:
            heard, self._heard = self._heard, []
            return heard
        while said := self._engine.listen():
            told = [
                Said(self._renamed.get(one.name, one.name), one.tokens, one.logprobs, one.ended)
                for one in said
                if one.name not in self._silent
            ]
            if told:
                return told
        return []

    def abort(self, names: Sequence[str]) -> list[Said]:
        self._aborts += 1
        if self._aborts == 1 and self._fault == IGNORED:
            self._silent |= set(names)
            return []
        return self._engine.abort(names)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        if self._fault == STALE and self._aborts == 2:
            kept = list(tensors)
            self._waiting.append((kept, transport))
            return sum(tensor.numel() * tensor.element_size() for _, tensor in kept)
        return self._engine.refit(tensors, transport)


def crossed(asked: Sequence[Asked]) -> dict[str, str]:
    """Two names, each for the other: of two prompts, and of answers that are as long as possible.

    Raises:
        ValueError: no two are of one length.
    """
    longest = sorted(asked, key=lambda one: -one.tokens)
    for one, other in combinations(longest, 2):
        if one.tokens == other.tokens and one.prompt != other.prompt:
            return {one.name: other.name, other.name: one.name}
    raise ValueError("no two requests are of one length")


def spoiled(engine: Crowd, fault: str) -> Crowd:
    """The engine, with a fault."""
    made: Any = Spoiled(engine, fault)
    return made  # type: ignore[no-any-return]

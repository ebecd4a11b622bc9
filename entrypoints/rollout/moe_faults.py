"""Faults of a mixture of experts, made on purpose; what each is stands in :mod:`rollout.faults`.

An engine of ours makes them itself, in its loader and its router (``inside``). In another's they
are made at its protocol: in the names of what is sent, and in the config that it starts on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rollout import experts, faults
from rollout.backends import Engine

if TYPE_CHECKING:
    import torch

EXPERT, SWAPPED, ROUTER, UNNORMALISED = faults.OF_EXPERTS
LAYER = ".layers.1."  # the layer that they are made in
NUMBERS = (2, 5)  # of the experts that are swapped; the first one is the one that is not refitted


def arrives_as(name: str, fault: str) -> str:
    """The name under which a tensor arrives, with a fault; empty where it never does."""
    number = experts.expert_of(name)
    if LAYER not in name:
        return name
    if number in NUMBERS and fault == SWAPPED:
        return experts.renumbered(name, NUMBERS[1 - NUMBERS.index(number)])
    lost = (number == NUMBERS[0] and fault == EXPERT) or (
        name.endswith(".mlp.gate.weight") and fault == ROUTER
    )
    return "" if lost else name


class Faulty(faults.Faulty):
    """An engine that serves a mixture, with one fault."""

    def __init__(self, engine: Engine, fault: str) -> None:
        super().__init__(engine, fault)
        self._inside = self._fault in getattr(engine, "inside", ())

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if self._fault == UNNORMALISED and not self._inside:
            file = model / "config.json"  # the check's own folder, of which there is no other use
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(config | {"norm_topk_prob": False}), encoding="utf-8")
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)
        if self._inside:
            self._engine.inject(self._fault)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        aimed = self._transport in ("", transport or next(iter(self.transports), ""))
        if aimed and not self._inside:
            tensors = _misnamed(tensors, self._fault)
        return super().refit(tensors, transport)


def _misnamed(
    tensors: Iterable[tuple[str, torch.Tensor]], fault: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        arriving = arrives_as(name, fault)
        if arriving:
            yield arriving, tensor


def wrapped(engine: Engine, fault: str | None) -> Engine:
    """The engine, with a fault where one is to be made."""
    return Faulty(engine, fault) if fault else engine

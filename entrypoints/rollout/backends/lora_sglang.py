"""SGLang with room for adapters: loaded from a folder while it runs and, where it can, from memory.

Its adapters have names; here those are their numbers. What a release lacks is asked of itself: one
that takes no adapters while it runs is not started.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.adapter import RANK, TARGETS
from rollout.backends import WEIGHTS, Completion, EngineError, apart_sglang, sglang
from rollout.backends.adapters import BASE, KEPT, LOST, NONE, SCALED, UNDER
from rollout.backends.lora_sglang_worker import drive
from rollout.placement import PACKED

if TYPE_CHECKING:
    import torch

OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    "lora_target_modules": list(TARGETS),
    "max_loras_per_batch": 2,  # an adapter and none, which takes a place as well
}


class Engine(apart_sglang.Engine):
    """The trainer's side (see :class:`rollout.backends.adapters.Adapting`)."""

    def __init__(self) -> None:
        super().__init__()
        self._first = ""  # the folder that was loaded first

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8 or gpus > 1:
            raise EngineError(
                "this backend starts SGLang with adapters in bfloat16 on one GPU only"
            )
        options = sglang.arguments(model, dummy=dummy, level=level, gpus=1)
        options |= OPTIONS
        self.begin(model, options, drive, how=" with adapters")
        self._first = ""

    def load(self, number: int, folder: Path) -> None:
        path = str(folder)
        self._first = self._first or path
        self._call("load", number, self._first if self._fault == KEPT else path)
        self._spoil()

    def take(
        self, number: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        if self._fault == KEPT and number in self.loaded():
            return
        there = {name: tensor.detach().to(self._device) for name, tensor in tensors.items()}
        self._synchronize()
        # Handles, as verl sends them; what they stand for lives until SGLang has answered.
        text = base64.b64encode(sglang.serialize(there)).decode()
        self._call("take", number, dict(config), text)
        self._spoil()

    def _spoil(self) -> None:
        if self._fault == SCALED:
            self._call("rpc", "smoke_unscale")

    def drop(self, number: int) -> None:
        self._call("drop", number)

    def loaded(self) -> list[int]:
        found: list[int] = self._call("loaded")
        return found

    def imprint(self) -> str:
        return str(self._call("rpc", "smoke_imprint"))

    def adapted(
        self, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int]
    ) -> list[Completion]:
        names = [None if number == NONE else str(number) for number in numbers]
        return sglang._completions(
            self._call("adapted", [list(prompt) for prompt in prompts], tokens, names)
        )

    def wake(self, tags: Sequence[str]) -> None:
        super().wake(tags)
        if WEIGHTS in tags and self._fault == LOST:
            self._call("rpc", "smoke_lose_adapters")

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        if self._fault == UNDER:
            tensors = [pair for pair in tensors if not set(pair[0].split(".")) & {*TARGETS}]
        return super().refit(tensors, transport)

    def wrapped(self, names: Sequence[str]) -> dict[str, str]:
        return renamed(self._call("rpc", "smoke_parameters"), names)

    def takes_tensors(self) -> str:
        return str(self._call("takes"))


def renamed(there: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """By which name a model with these parameters takes each tensor of a refit."""
    whole = {part: leaf for leaf, parts in PACKED.items() for part in parts}
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        place = f"{parent}.{whole.get(leaf, leaf)}"
        plain, under = f"{place}.{attribute}", f"{place}{BASE}.{attribute}"
        moved = plain not in there and under in there
        found[name] = f"{path}{BASE}.{attribute}" if moved else name
    return found

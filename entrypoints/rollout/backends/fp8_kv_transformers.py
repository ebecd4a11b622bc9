"""The reference engine with a KV cache in 8 bits, played exactly.

A block holds float8_e4m3 numbers and no others. What attention sees is these numbers times the
scales of that moment: a block that was filled by other scales is read by the wrong ones, as on a
GPU. The scales are buffers of the model. Asleep they are gone; a wake has to bring them back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import EngineError
from rollout.backends import transformers as reference
from rollout.backends.scales import KEYS, LARGEST, VALUES, Scales

if TYPE_CHECKING:
    import torch

# What the largest key and value of the first tokens are mapped to: vLLM's K_SCALE_CONSTANT and
# V_SCALE_CONSTANT, which leave room for what comes later.
RANGES = {KEYS: 200.0, VALUES: 100.0}
LAYER = "model.layers.{}.self_attn"
SIDES = (KEYS, VALUES)


class Engine(reference.Engine):
    """The trainer's side (see :class:`rollout.backends.scales.Scaled`)."""

    def __init__(self) -> None:
        super().__init__()
        self._calculate = False

    @property
    def serve(self) -> Callable[..., None]:
        return _serve

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)
        if self._calculate:
            self._call("calculate")

    def calculates(self) -> bool:
        return True

    def calculate(self) -> None:
        self._calculate = True

    def scales(self) -> Scales:
        found: Scales = self._call("scales")
        return found

    def put(self, scales: Mapping[str, Mapping[str, float]]) -> None:
        self._call("put", {name: dict(given) for name, given in scales.items()})


class Blocks:
    """The pool, as keys and values: of each block its numbers times the scales of now."""

    def __init__(self, codes: torch.Tensor, worker: Worker) -> None:
        self._codes, self._worker = codes, worker

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, block: int) -> torch.Tensor:
        import torch

        return (self._codes[block].float() * self._worker.factors()).to(torch.bfloat16)

    def fill(self, block: int, state: torch.Tensor) -> None:
        """Round what was computed (layer, 2, head, token, dim)."""
        self._codes[block].copy_(small(state, self._worker.factors()))


def small(state: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Keys or values in float8_e4m3."""
    import torch

    return (state.float() / factors).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


class Worker(reference.Worker):
    """The engine's own process."""

    def __init__(self, model: Path, dummy: bool) -> None:
        import torch

        # transformers would look for the library of a checkpoint that says it is quantised.
        super().__init__(model, True)
        self.attention = [layer.self_attn for layer in self.model.model.layers]
        for layer in self.attention:
            for side in SIDES:
                layer.register_buffer(side, torch.ones((), dtype=torch.float32))
        self.first: dict[int, dict[str, float]] | None = None  # of each layer, to be calculated
        elements = self.blocks.numel() // len(self.blocks)
        shape, count = self.blocks.shape[1:], 2 * len(self.blocks)
        codes = self.pool.bytes[: elements * count].view(torch.float8_e4m3fn)
        self.blocks: Any = Blocks(codes.reshape(count, *shape), self)
        self.model.register_forward_pre_hook(self._round, with_kwargs=True)
        if not dummy:
            self._read(model)

    def _round(self, _module: Any, _given: Any, named: dict[str, Any]) -> None:
        """Have a cache of the model's code give back what ours would."""
        cache = named["past_key_values"]
        update = type(cache).update

        def rounded(keys: Any, values: Any, layer: int, *rest: Any, **more: Any) -> Any:
            keys, values = self.through(layer, KEYS, keys), self.through(layer, VALUES, values)
            return update(cache, keys, values, layer, *rest, **more)

        cache.update = rounded

    def _read(self, model: Path) -> None:
        """Take the weights of a checkpoint, and the scales that it has."""
        from safetensors.torch import load_file

        parameters = dict(self.model.named_parameters())
        for name, tensor in load_file(model / "model.safetensors").items():
            if name in parameters:
                parameters[name].data.copy_(tensor)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            self._scale(load_file(model / "model.safetensors"))

    def _scale(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for number, layer in enumerate(self.attention):
            for side in SIDES:
                given = tensors[f"{LAYER.format(number)}.{side}_scale"]
                getattr(layer, side).fill_(float(given.reshape(-1)[0]))

    def calculate(self) -> None:
        self.first = {}

    def factors(self) -> torch.Tensor:
        """The scales, as what they divide: (layer, 2, head, token, dim)."""
        import torch

        found = [torch.stack([getattr(layer, side) for side in SIDES]) for layer in self.attention]
        return torch.stack(found)[:, :, None, None, None]

    def scales(self) -> Scales:
        return {
            LAYER.format(number): {side: float(getattr(layer, side)) for side in SIDES}
            for number, layer in enumerate(self.attention)
        }

    def put(self, scales: Scales) -> None:
        for number, layer in enumerate(self.attention):
            for side, value in scales.get(LAYER.format(number), {}).items():
                if side not in SIDES:
                    raise EngineError(f"no layer has a scale {side!r}")
                getattr(layer, side).fill_(value)

    def through(self, number: int, side: str, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values of a layer, as the cache gives them back."""
        scale = getattr(self.attention[number], side)
        if self.first is not None and side not in self.first.setdefault(number, {}):
            self.first[number][side] = float(tensor.abs().max())
            scale.fill_(self.first[number][side] / RANGES[side])
        return (small(tensor, scale).float() * scale).to(tensor.dtype)

    def _remember(self, prefix: tuple[int, ...], state: torch.Tensor) -> None:
        known = prefix in self.cached
        super()._remember(prefix, state)  # what it writes to is a copy
        if not known:
            self.blocks.fill(self.cached[prefix], state)

    def sleep(self, level: int) -> None:
        super().sleep(level)
        for layer in self.attention:
            for side in SIDES:
                getattr(layer, side).zero_()


def _serve(connection: Connection, model: str, dummy: bool, parent: int) -> None:
    """The main loop of the reference engine, with the worker of this module."""
    vars(reference)["Worker"] = Worker
    reference._serve(connection, model, dummy, parent)

"""The reference engine with room for an adapter.

As engines on a GPU do it: the layers that adapters add to are wrapped, so that the base's tensors
lie under other names; what an adapter multiplies with lies in memory that a sleep gives back, and
is neither a parameter nor a buffer; the prefix cache knows which adapter it is of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.adapter import CONFIG_FILE, RANK, TARGETS, TENSORS_FILE, names
from rollout.backends import WEIGHTS, Completion, EngineError, transformers
from rollout.backends.adapters import BASE, KEPT, LOST, NONE, SCALED, UNDER
from rollout.transport import as_bytes

if TYPE_CHECKING:
    import torch

Packed = dict[str, tuple[tuple[int, ...], bytes]]  # of each tensor its shape and bytes (bfloat16)


class Engine(transformers.Engine):
    """The trainer's side (see :class:`rollout.backends.adapters.Adapting`)."""

    def __init__(self) -> None:
        super().__init__()
        self._fault = ""

    def inject(self, fault: str) -> None:
        self._fault = fault
        if self._process is not None:
            super().inject(fault)

    @property
    def serve(self) -> Callable[..., None]:
        return _serve

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)
        if self._fault:
            super().inject(self._fault)

    def load(self, number: int, folder: Path) -> None:
        self._call("load", number, str(folder))

    def take(
        self, number: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        packed = {
            name: (tuple(tensor.shape), as_bytes(tensor.cpu()).numpy().tobytes())
            for name, tensor in tensors.items()
        }
        self._call("take", number, dict(config), packed)

    def drop(self, number: int) -> None:
        self._call("drop", number)

    def loaded(self) -> list[int]:
        found: list[int] = self._call("loaded")
        return found

    def imprint(self) -> str:
        return str(self._call("imprint"))

    def adapted(
        self, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int]
    ) -> list[Completion]:
        found = self._call("adapted", [list(p) for p in prompts], tokens, list(numbers))
        return [Completion(*answer) for answer in found]

    def wrapped(self, names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = self._call("wrapped", list(names))
        return found

    def takes_tensors(self) -> str:
        return "the reference engine"


class Cached(dict[Any, int]):
    """A prefix cache whose entries belong to an adapter each: ``number`` is the one in use."""

    number = NONE

    def get(self, prefix: Any, default: Any = None) -> Any:
        return super().get((self.number, prefix), default)

    def __contains__(self, prefix: object) -> bool:
        return super().__contains__((self.number, prefix))

    def __setitem__(self, prefix: Any, block: int) -> None:
        super().__setitem__((self.number, prefix), block)


class Rows:
    """Which rows of the batch that is computed have the adapter; all or none where it says so."""

    mask: Any = None  # a tensor of truth values, (rows, 1, 1); None: no row has it


def _wrapping() -> type[Any]:
    """The class of a wrapped layer, made where torch is there to make it of."""
    import torch

    class Wrapped(torch.nn.Module):  # type: ignore[misc]
        """A linear layer, and what an adapter adds to its product."""

        def __init__(self, base_layer: Any, down: Any, up: Any, rows: Rows) -> None:
            super().__init__()
            self.base_layer, self.down, self.up, self.rows = base_layer, down, up, rows

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.base_layer(given)
            if self.rows.mask is None:
                return found
            added = (given @ self.down.T) @ self.up.T
            return torch.where(self.rows.mask, found + added, found)

    return Wrapped


class Worker(transformers.Worker):
    """The engine's own process, its layers wrapped."""

    def __init__(self, model: Path, dummy: bool) -> None:
        super().__init__(model, dummy)
        import torch

        self.rows = Rows()
        self.cached = self.prefixes = Cached()
        self.order: Iterator[int] = iter(())  # of what is computed next, whose adapter it is
        self.numbers: list[int] = []
        self.number = NONE
        self.kept: bytes | None = None
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if name.rpartition(".")[2] in TARGETS
        }
        count = sum(RANK * (m.in_features + m.out_features) for m in layers.values())
        self.adapters = transformers.Region(2 * count + 128 * len(layers))
        self.adapters.touch()
        kind, self.layers = _wrapping(), dict[str, Any]()
        for name, module in layers.items():
            down = self.adapters.take(torch.zeros(RANK, module.in_features, dtype=torch.bfloat16))
            up = self.adapters.take(torch.zeros(module.out_features, RANK, dtype=torch.bfloat16))
            self.layers[name] = kind(module, down, up, self.rows)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.layers[name])

    def held(self) -> int:
        return super().held() + self.adapters.size

    # Adapters: one at a time, the newest.

    def load(self, number: int, folder: str) -> None:
        from safetensors.torch import load_file

        content = json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
        self._put(number, content, load_file(Path(folder, TENSORS_FILE)))

    def take(self, number: int, config: dict[str, Any], packed: Packed) -> None:
        import torch

        tensors = {
            name: torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
            for name, (shape, data) in packed.items()
        }
        self._put(number, config, tensors)

    def _put(self, number: int, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        if WEIGHTS in self.asleep:
            raise EngineError("asleep: wake the weights before an adapter is loaded")
        if config["r"] != RANK:
            raise EngineError(f"an adapter of rank {config['r']}, where {RANK} is what fits")
        if KEPT in self.faults and self.number != NONE:
            self.number = number
            return
        scale = 1.0 if SCALED in self.faults else config["lora_alpha"] / config["r"]
        for name, layer in self.layers.items():
            down, up = names(name)
            layer.down.copy_(tensors[down])
            layer.up.copy_(tensors[up] * scale)
        self.number = number

    def drop(self, number: int) -> None:
        if number != self.number:
            raise EngineError(f"adapter {number} is not loaded")
        self.number = NONE

    def loaded(self) -> list[int]:
        return [self.number] if self.number != NONE else []

    def imprint(self) -> str:
        return hashlib.sha256(memoryview(self.adapters.bytes.numpy())).hexdigest()

    def adapted(self, prompts: list[list[int]], tokens: int, numbers: list[int]) -> Any:
        strange = sorted(set(numbers) - {NONE, self.number})
        if strange:
            raise EngineError(f"adapter {strange[0]} is not loaded")
        self.numbers = numbers
        try:
            return self.generate(prompts, tokens)
        finally:
            self.numbers, self.rows.mask, self.prefixes.number = [], None, NONE

    def _use(self, numbers: Sequence[int]) -> None:
        """What is computed from now on is of these adapters, a row each."""
        import torch

        have = [number != NONE for number in numbers]
        self.rows.mask = torch.tensor(have)[:, None, None] if any(have) else None
        self.order = iter(numbers)

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int,
        enough: Callable[[int], bool] = lambda _: False,
    ) -> list[tuple[Any, Any, int]]:
        self.numbers = self.numbers or [NONE] * len(prompts)
        self.turns = iter(self.numbers)
        try:
            return super().generate(prompts, tokens, enough)
        finally:
            self.numbers = []

    def _prefill(self, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        self.prefixes.number = next(self.turns)
        self._use([self.prefixes.number])
        return super()._prefill(prompt)

    def _decode(self, *arguments: Any) -> list[tuple[Any, Any]]:
        self._use(self.numbers)
        return super()._decode(*arguments)

    def _remember_all(self, tokens: list[int], state: torch.Tensor) -> None:
        self.prefixes.number = next(self.order)
        super()._remember_all(tokens, state)

    # Sleep, wake, refit.

    def sleep(self, level: int) -> None:
        super().sleep(level)
        if level == 1:
            self.kept = self.adapters.bytes.numpy().tobytes()
        elif LOST not in self.faults:
            self.number = NONE  # it is gone, and is refused from now on
        self.adapters.release()

    def wake(self, tags: tuple[str, ...]) -> None:
        there = WEIGHTS in tags and WEIGHTS in self.asleep
        super().wake(tags)
        if not there:
            return
        self.adapters.touch()
        kept, self.kept = self.kept, None
        if kept is not None and LOST not in self.faults:
            import torch

            self.adapters.bytes.copy_(torch.frombuffer(bytearray(kept), dtype=torch.uint8))

    def refit(self, connection: Connection) -> None:
        held = [p for n, p in self.model.named_parameters() if BASE in n]
        before = [p.detach().clone() for p in held] if UNDER in self.faults else []
        super().refit(connection)
        for parameter, old in zip(held, before, strict=False):
            parameter.data.copy_(old)

    def wrapped(self, names: list[str]) -> dict[str, str]:
        found = {}
        for name in names:
            layer, _, part = name.rpartition(".")
            found[name] = f"{layer}{BASE}.{part}" if layer in self.layers else name
        return found

    def digests(self) -> dict[str, str]:
        return {name.replace(BASE, ""): value for name, value in super().digests().items()}


def _serve(*arguments: Any) -> None:
    """The engine's main loop, with the worker of this module."""
    transformers.Worker = Worker  # type: ignore[misc]
    transformers._serve(*arguments)

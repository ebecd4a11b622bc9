"""Faults of a KV cache in 8 bits, made on purpose; what each is stands in :mod:`rollout.faults`.

They are made at the engine's protocol, whatever the engine is. What it is asked for its scales is
answered as if nothing were wrong where the fault is one that no reading shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import KV_CACHE
from rollout.backends.scales import KEYS, VALUES, Scaled, Scales, side

if TYPE_CHECKING:
    import torch

RESET, FACTOR = "scales-reset-by-wake", "scales-off-by-a-factor"
LOST, OLD = "scale-lost-in-refit", "blocks-of-old-scales"
FAULTS = (RESET, FACTOR, LOST, OLD)
OFF = 1 / 16


class Spoiled:
    """An engine with one fault (see :class:`rollout.backends.scales.Scaled` for the methods)."""

    def __init__(self, engine: Scaled, fault: str) -> None:
        self._engine, self._fault = engine, fault
        self._slept = self._put = self._refitted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, model: Path, **options: Any) -> None:
        self._engine.start(model, **options)
        if self._fault == FACTOR:
            self._engine.put(self._off(self._engine.scales(), OFF))

    @staticmethod
    def _off(scales: Mapping[str, Mapping[str, float]], factor: float) -> Scales:
        """Scales of keys and values times a factor, in all their copies."""
        return {
            name: {
                key: value * (factor if side(key) in (KEYS, VALUES) else 1)
                for key, value in there.items()
            }
            for name, there in scales.items()
        }

    def scales(self) -> Scales:
        found = self._engine.scales()
        return self._off(found, 1 / OFF) if self._fault == FACTOR else found

    def put(self, scales: Mapping[str, Mapping[str, float]]) -> None:
        self._put = True
        given = {name: dict(there) for name, there in scales.items()}
        if self._fault == RESET and self._slept:
            return
        if self._fault == FACTOR:
            given = self._off(scales, OFF)
        if self._fault == LOST and self._refitted:
            given.pop(max(given))
        self._engine.put(given)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        self._refitted = True
        return self._engine.refit(tensors, transport)

    def reset_prefix_cache(self) -> None:
        if not (self._fault == OLD and self._put):
            self._engine.reset_prefix_cache()

    def wake(self, tags: Sequence[str]) -> None:
        self._engine.wake(tags)
        if self._fault == RESET and KV_CACHE in tags:
            self._slept = True
            self._engine.put(
                {
                    name: {key: 1.0 for key in there if side(key) in (KEYS, VALUES)}
                    for name, there in self._engine.scales().items()
                }
            )


def wrapped(engine: Scaled, fault: str | None) -> Scaled:
    """The engine, with a fault where one is to be made."""
    made: Any = Spoiled(engine, fault) if fault in FAULTS else engine
    return made  # type: ignore[no-any-return]

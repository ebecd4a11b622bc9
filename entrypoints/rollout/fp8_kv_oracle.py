"""The oracle of a KV cache in 8 bits: float32, its keys and values rounded as a cache rounds them.

An engine divides keys (as the rotation leaves them) and values by a scale, rounds them to
float8_e4m3, and attends to what it finds there, times the scale. That rounding is meant, and moves
log-probabilities more than bfloat16 does. So the oracle does the same by the same scales, and all
else in float32: what is left is the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rollout.backends.scales import KEYS, LARGEST, VALUES, Scales
from rollout.oracle import Oracle

if TYPE_CHECKING:
    import torch

LAYER = "model.layers.{}.self_attn"  # where llm-compressor has the scales of a layer
RANGE = 448.0  # what the largest key and value are mapped to, as llm-compressor maps them


def rounded(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """What a cache in 8 bits gives back of a tensor, in the tensor's own type."""
    import torch

    small = (tensor.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (small.float() * scale).to(tensor.dtype)


class KvOracle(Oracle):
    """A Llama in float32 whose cache rounds; see :class:`rollout.oracle.Oracle`.

    ``scales`` are those that it rounds by; with none it does not round. ``largest`` is the largest
    key and value of each layer since it was last emptied.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str = "cpu"
    ) -> None:
        super().__init__(config, weights, device)
        self.scales: Scales = {}
        self.largest: Scales = {}
        model = self._model

        def asked(*, input_ids: torch.Tensor, use_cache: bool) -> Any:  # noqa: ARG001 - as called
            return model(input_ids=input_ids, past_key_values=self._cache(), use_cache=True)

        self._model: Any = asked

    def _cache(self) -> Any:
        from transformers import DynamicCache

        oracle = self

        class Rounding(DynamicCache):  # type: ignore[misc]
            """A cache of one question, which rounds what it is given."""

            def update(
                self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **more: Any
            ) -> Any:
                return super().update(
                    oracle.kept(layer, KEYS, keys),
                    oracle.kept(layer, VALUES, values),
                    layer,
                    *rest,
                    **more,
                )

        return Rounding()

    def kept(self, layer: int, which: str, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values of a layer as the cache gives them back; their largest one is noted."""
        name = LAYER.format(layer)
        noted = self.largest.setdefault(name, {})
        noted[which] = max(noted.get(which, 0.0), float(tensor.abs().max()))
        return rounded(tensor, self.scales[name][which]) if self.scales else tensor


def calibrated(oracle: KvOracle, prompts: Sequence[Sequence[int]]) -> Scales:
    """Scales by which the largest key and value of some prompts are the largest of their type.

    As llm-compressor makes them, and rounded to bfloat16 as it writes them.
    """
    import torch

    oracle.scales, oracle.largest = {}, {}
    oracle.scores(prompts, [[prompt[0]] for prompt in prompts])

    def short(value: float) -> float:
        return float(torch.tensor(value / RANGE).to(torch.bfloat16))

    return {
        name: {which: short(value) for which, value in found.items()}
        for name, found in oracle.largest.items()
    }

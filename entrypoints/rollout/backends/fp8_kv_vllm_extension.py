"""What the proof adds to vLLM's worker for a KV cache in 8 bits: its scales, read and replaced.

They are attributes of each attention layer: tensors that kernels read, and copies on the host that
some kernels are started with. No version has all of them. What is replaced keeps its place, whose
address captured graphs have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rollout.backends import vllm_extension

# What a layer has, by the name that the check has for it. Ranges are what scales are calculated by.
ATTRIBUTES = {
    "k": "_k_scale",
    "v": "_v_scale",
    "q": "_q_scale",
    "prob": "_prob_scale",
    "k_float": "_k_scale_float",
    "v_float": "_v_scale_float",
    "q_float": "_q_scale_float",
    "k_cpu": "_k_scale_cpu",
    "v_cpu": "_v_scale_cpu",
    "range_q": "q_range",
    "range_k": "k_range",
    "range_v": "v_range",
}
ATTENTION = ".attn"  # what vLLM puts behind a layer's name
GIVEN_AWAY = "k_scale"  # the parameter that a checkpoint's scale arrives in, and that is not kept


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    def smoke_scales(self) -> dict[str, dict[str, float]]:
        """The scales of each attention layer, by the layer's Hugging Face name."""
        return {
            name: {
                key: number(getattr(layer, attribute))
                for key, attribute in ATTRIBUTES.items()
                if hasattr(layer, attribute)
            }
            for name, layer in attention(self.model_runner.get_model())
        }

    def smoke_put_scales(self, scales: dict[str, dict[str, float]]) -> None:
        """Replace some of them."""
        import torch

        layers = dict(attention(self.model_runner.get_model()))
        with torch.inference_mode():  # in which some of them were made
            for name, given in scales.items():
                for key, value in given.items():
                    attribute = ATTRIBUTES[key]
                    there = getattr(layers[name], attribute)
                    if isinstance(there, torch.Tensor):
                        there.data.fill_(value)
                    else:
                        setattr(layers[name], attribute, value)

    def smoke_load(self, address: str) -> None:
        """A refit, which leaves alone what a layer has given away.

        Some versions look for the parameters that a checkpoint's scales arrived in at every
        post-processing, and raise where an earlier one has removed them.
        """
        methods = {}
        for name, layer in attention(self.model_runner.get_model()):
            method = getattr(layer, "quant_method", None)
            if method is not None and not hasattr(layer, GIVEN_AWAY):
                methods[name] = (layer, method)
                layer.quant_method = None
        try:
            vllm_extension.Extension.smoke_load(self, address)
        finally:
            for layer, method in methods.values():
                layer.quant_method = method


def attention(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have a KV cache, by their Hugging Face names."""
    for name, module in model.named_modules():
        if hasattr(module, ATTRIBUTES["k"]) and hasattr(module, "kv_cache_dtype"):
            yield name.removesuffix(ATTENTION), module


def number(value: Any) -> float:
    """A scale, wherever it lies."""
    return float(value.reshape(-1)[0]) if hasattr(value, "reshape") else float(value)

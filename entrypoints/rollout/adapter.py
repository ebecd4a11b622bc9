"""A LoRA adapter made from a seed, in PEFT's files and names, and the weights that it comes to.

Its rule is the probe's: losing any one of its tensors moves the answers a lot, rounding moves them
little. What is added to a layer's product is a fixed part of that product's own size.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import probe

if TYPE_CHECKING:
    import torch

    from rollout.oracle import Oracle

RANK = 8  # the smallest that every engine has kernels for
ALPHA = 16  # twice the rank: whoever forgets to scale, adds half; and a power of two rounds nothing
SCALE = ALPHA / RANK
# What is added to a layer's product, in units of that product without its bias: as much as leaves
# the noise of bfloat16 at half of what the bound allows. The check itself measures, on the answers
# of each run, what it would be to lose any one of them.
SHARES = {
    "q_proj": 0.5,
    "k_proj": 0.5,
    "v_proj": 0.6,
    "o_proj": 0.5,
    "gate_proj": 0.6,
    "up_proj": 0.6,
    "down_proj": 0.5,
}
TARGETS = tuple(SHARES)
_LAYERS = 2  # of the probe, for which these shares are; a deeper model adds them up
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, before the name that a tensor's module has in the model


@dataclass(frozen=True)
class Adapter:
    """An adapter: ``config`` as adapter_config.json has it, ``tensors`` by PEFT's names.

    ``…q_proj.lora_A.weight`` has the shape (rank, inputs), ``…lora_B.weight`` (outputs, rank); all
    are bfloat16 and lie where the weights do that the adapter was made for.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def layers(self) -> list[str]:
        """The linear layers that it adds to, by their names in the model."""
        ending = ".lora_A.weight"
        return [n[len(_PREFIX) : -len(ending)] for n in self.tensors if n.endswith(ending)]

    def added(self, layer: str) -> torch.Tensor:
        """What it adds to the weight of a layer, in float32: (outputs, inputs).

        Multiplied in float64, which no setting of an engine in this process makes coarser (TF32).
        """
        down, up = (self.tensors[name].double() for name in names(layer))
        return (up @ down).mul_(SCALE).float()

    def save(self, folder: Path) -> Path:
        """Write PEFT's two files into a folder, which is returned."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(self.config), indent=1) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        here = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(here, folder / TENSORS_FILE, {"format": "pt"})
        return folder


def names(layer: str) -> tuple[str, str]:
    """PEFT's names of the two tensors of a layer: the one that reads, and the one that writes."""
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


def make(weights: Mapping[str, torch.Tensor], seed: int, model: str = "") -> Adapter:
    """The adapter of a seed for a model with these weights; ``model`` is what its file names."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    kinds = {name: name.rpartition(".")[0].rpartition(".")[2] for name in weights}
    wanted = [n for n, kind in kinds.items() if kind in SHARES and n.endswith(".weight")]
    depth = max(1.0, len(wanted) / len(SHARES) / _LAYERS)
    for name in wanted:
        layer, weight = name.removesuffix(".weight"), weights[name]
        outputs, inputs = weight.shape
        # Three digits: the last bits of a sum over a million numbers differ between machines.
        size = float(
            f"{torch.linalg.vector_norm(weight.float()).item() / weight.numel() ** 0.5:.3g}"
        )
        down, up = names(layer)
        # Of an input of unit root mean square A makes another one, and B what the weight would.
        share = SHARES[kinds[name]] / math.sqrt(depth)
        spread = share * size * math.sqrt(inputs / RANK) / SCALE
        for key, shape, deviation in (
            (down, (RANK, inputs), 1.0 / math.sqrt(inputs)),
            (up, (outputs, RANK), spread),
        ):
            tensors[key] = probe._noise(shape, seed, key, deviation).to(weight.device)
    return Adapter(config(model), tensors)


def config(model: str = "") -> dict[str, Any]:
    """The content of adapter_config.json, as PEFT writes it of such an adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "init_lora_weights": True,
    }


@contextlib.contextmanager
def merged(oracle: Oracle, adapter: Adapter, without: str = "") -> Iterator[Oracle]:
    """An oracle with an adapter merged into its weights, in float32, for as long as this lasts.

    ``without`` is a layer that is left as it is. Afterwards the weights are what they were, to the
    bit: an oracle of its own would be made anew from a gigabyte of weights for each adapter.
    """
    import torch

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer in adapter.layers():
                if layer != without:
                    weight = oracle._model.get_parameter(f"{layer}.weight")
                    kept.append((weight, weight.detach().clone()))
                    weight.add_(adapter.added(layer))
        yield oracle
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)

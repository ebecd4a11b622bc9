"""Where the tensors of experts lie: Hugging Face names them one by one, engines fuse them.

A checkpoint has three tensors for each expert: ``….experts.5.gate_proj.weight``, ``up_proj`` and
``down_proj``. vLLM and SGLang keep those of a layer in two parameters, ``w13_weight`` (experts,
gate's rows and then up's, columns) and ``w2_weight`` (experts, rows, columns); transformers 5 in
``gate_up_proj`` and ``down_proj``, alike in shape; transformers 4 as the checkpoint has them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rollout import placement
from rollout.transport import as_bytes

if TYPE_CHECKING:
    import torch

_HASHERS = 8  # more wait for memory
_ONE = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
# A parameter of a layer's experts, by its last names. vLLM 0.24 has them one module further down.
_FUSED = re.compile(
    r"(?P<experts>.*\.experts)(\.routed_experts)?\."
    r"(?P<kind>w13_weight|gate_up_proj|w2_weight|down_proj)"
)
_PAIRS = ("w13_weight", "gate_up_proj")  # of gate and up; the other kinds are of down alone


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor belongs to, by its name; None for any other tensor."""
    found = _ONE.fullmatch(name)
    return int(found["number"]) if found else None


def renumbered(name: str, number: int) -> str:
    """The name that an expert's tensor would have as that of another expert of its layer.

    Raises:
        ValueError: it is no expert's.
    """
    found = _ONE.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no tensor of an expert")
    return f"{found['experts']}.{number}.{found['part']}_proj.weight"


def taken_apart(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Views of an engine's parameters by the names that a checkpoint has; others as they are.

    A fused parameter has the shape (experts, rows, columns). A view of it is that of one expert,
    contiguous; what is written into it is written into the parameter.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        place = _FUSED.fullmatch(name)
        if place is None:
            found[name] = parameter.data
            continue
        half = parameter.shape[1] // 2
        for number, expert in enumerate(parameter.data):
            one = f"{place['experts']}.{number}"
            if place["kind"] in _PAIRS:
                found[f"{one}.gate_proj.weight"] = expert[:half]
                found[f"{one}.up_proj.weight"] = expert[half:]
            else:
                found[f"{one}.down_proj.weight"] = expert
    return found


def fused(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as transformers 5 has them: those of experts stacked, layer by layer.

    Raises:
        ValueError: of a layer's experts one lacks a tensor.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in weights.items():
        one = _ONE.fullmatch(name)
        if one is None:
            found[name] = tensor
        else:
            layers.setdefault(one["experts"], {})[int(one["number"]), one["part"]] = tensor
    for name, parts in layers.items():
        numbers = range(1 + max(number for number, _ in parts))
        try:
            pairs = [torch.cat([parts[n, "gate"], parts[n, "up"]]) for n in numbers]
            found[f"{name}.gate_up_proj"] = torch.stack(pairs)
            found[f"{name}.down_proj"] = torch.stack([parts[n, "down"] for n in numbers])
        except KeyError as lacking:
            raise ValueError(f"{name} lacks the tensor {lacking}") from None
    return found


def arranged(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as the installed transformers has them in its Qwen3-MoE."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    known = hasattr(modeling_qwen3_moe, "Qwen3MoeExperts")  # since transformers 5
    return fused(weights) if known else dict(weights)


def digests(model: Any) -> dict[str, str]:
    """sha256 of each weight's bytes by its Hugging Face name, of a model of vLLM or SGLang.

    What :mod:`rollout.placement` takes apart is taken apart as there, and experts as well.
    """
    parameters = dict(model.named_parameters())
    held: dict[str, torch.Tensor] = {}
    for name, (parameter, start, stop) in placement.places(model).items():
        data = parameters[parameter].data
        held |= taken_apart([(name, data if _FUSED.fullmatch(name) else data[start:stop])])

    def digest(item: tuple[str, torch.Tensor]) -> tuple[str, str]:
        name, tensor = item
        return name, hashlib.sha256(memoryview(as_bytes(tensor.cpu()).numpy())).hexdigest()

    with ThreadPoolExecutor(min(_HASHERS, len(os.sched_getaffinity(0)))) as pool:
        return dict(pool.map(digest, held.items()))


def loadable(model: Any) -> None:
    """Give fused parameters the loader of their module, where they have lost it.

    Versions of vLLM before 0.9 make new parameters after the first load, without one, and a refit
    by name fails for it. verl does the same (``patch_vllm_moe_model_weight_loader``).
    """
    for module in model.modules():
        loader = getattr(module, "weight_loader", None)
        for name in ("w13_weight", "w2_weight"):
            parameter = getattr(module, name, None)
            if loader and parameter is not None and not hasattr(parameter, "weight_loader"):
                parameter.weight_loader = loader

"""The probe of the check `moe`: a mixture of experts made from a seed, beside the dense one.

Its architecture is Qwen3-MoE: a router, routed experts, normalised weights of the chosen ones. It
has no shared experts, because that architecture has none: Qwen2-MoE has, which engines serve by
other code.

As in the dense probe (:mod:`rollout.probe`) the weights are scaled so that rounding to bfloat16
moves a log-probability little, and losing any one tensor, one expert's included, moves it a lot.
Beyond that the router must choose the same experts however its input is rounded. A random router
does not: of a thousand choices some are always near a tie. So the embedding of each token carries
a code: in a few channels of the stream, which nothing else writes to, one level for each expert.
The router reads those channels, and the levels of the experts to choose stand well above the
others. `rollout.moe_calibrate` measures by how much.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rollout import probe
from rollout.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Config = dict[str, Any]

_MAKERS = 8  # threads, each with a tensor of its own
_SIZES: dict[str, Config] = {
    "tiny": {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 1024,
    },
    # Widths that fused kernels are used with: Qwen3-30B-A3B has these, and 128 experts.
    "gpu": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 8192,
    },
}

CHANNELS = 4  # of the stream, for the code of each expert
# Levels of a token's code: of the chosen experts, and of the others.
CHOSEN = (1.125, 1.0)
OTHERS = (-0.25, -0.75)

# How the weights are scaled: standard deviations for an input of unit root mean square, found with
# `python -m rollout.moe_calibrate`, which says what they are judged by. The last layer's experts
# are the hardest to hear: a lost one touches the tokens alone that chose it, a quarter. So experts
# add most of the stream's power. Scores of attention are flat enough that rounding does not move
# them, because every error in them is one in all that follows.
_ROUTER = 0.9  # of a logit for each level
_JITTER = 0.05  # what the rest of the stream adds to a router's logit
_QUERY_KEY = 1.0  # a query or key element, behind its norm
_ATTENTION = 0.5  # power that attention adds, relative to the power of the stream it is added to
_EXPERTS = 4.5  # the same of the experts
_ATTENDED = 0.34  # root mean square of what o_proj reads, as measured
_GATED = 0.54  # the same of down_proj
_LOGIT = 1.5
_LOGIT_OF_MANY = 1.25
_MANY = 4096


def config(size: str) -> Config:
    """The content of config.json for a probe of `size` ("tiny" or "gpu").

    Keys as in the dense probe's (see `rollout.probe.config`). Raises Problem (code 2) for another
    size.
    """
    if size not in _SIZES:
        raise Problem(f"There is no probe of size {size!r}: take one of {', '.join(_SIZES)}.", 2)
    shape = _SIZES[size]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **shape,
        # Of layers without experts, of which there are none here.
        "intermediate_size": 2 * shape["moe_intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        # Not the default of transformers: an engine that overlooks the key is found out.
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "rope_scaling": None,
        "attention_bias": False,  # engines hard-code it for o_proj
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names (Hugging Face's) and shapes of all tensors, in checkpoint order."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    head, vocabulary = config["head_dim"], config["vocab_size"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.self_attn.q_proj.weight"] = (query, hidden)
        found[f"{layer}.self_attn.k_proj.weight"] = (key, hidden)
        found[f"{layer}.self_attn.v_proj.weight"] = (key, hidden)
        found[f"{layer}.self_attn.o_proj.weight"] = (hidden, query)
        found[f"{layer}.self_attn.q_norm.weight"] = (head,)
        found[f"{layer}.self_attn.k_norm.weight"] = (head,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        found[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            name = f"{layer}.mlp.experts.{expert}"
            found[f"{name}.gate_proj.weight"] = (inner, hidden)
            found[f"{name}.up_proj.weight"] = (inner, hidden)
            found[f"{name}.down_proj.weight"] = (hidden, inner)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


def weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """All tensors of the probe: bfloat16, on the CPU, by name, shaped as `shapes(config)` says."""
    names = list(shapes(config))
    with ThreadPoolExecutor(min(_MAKERS, len(os.sched_getaffinity(0)))) as pool:
        made = pool.map(lambda name: tensor(config, seed, name), names)
        return dict(zip(names, made, strict=True))


def tensor(config: Mapping[str, Any], seed: int, name: str) -> torch.Tensor:
    """One tensor of `weights(config, seed)`, made without the others.

    The router alone depends on another one: on the norm before it, which it undoes in the channels
    of the code.
    """
    shape, size = shapes(config)[name], spread(config, name)
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        found = probe._signs(shape, seed, name)
        return found if size == 1.0 else (found.float() * size).to(found.dtype)
    found = probe._noise(shape, seed, name, size)
    if kind == "embed_tokens":
        found[:, _channels(config)] = _codes(config, seed)
    elif kind in ("o_proj", "down_proj"):
        found[_channels(config)] = 0.0  # nothing writes into the code
    elif kind == "gate":
        _route(config, seed, name, found)
    return found


def _channels(config: Mapping[str, Any]) -> torch.Tensor:
    """The channels of the stream that hold the code: (slots * CHANNELS,), by slot."""
    import torch

    slots, apart = config["num_experts"], config["hidden_size"] // CHANNELS
    copies = torch.arange(CHANNELS) * apart
    return (torch.arange(slots)[:, None] + copies[None]).reshape(-1)


def _ranks(bits: torch.Tensor) -> torch.Tensor:
    """The rank of each number in its row; of equal ones the first is the less."""
    import torch

    count = bits.shape[-1]
    apart = bits.long() * count + torch.arange(count)
    return apart.argsort(-1).argsort(-1)


def _marks(config: Mapping[str, Any], seed: int) -> torch.Tensor:
    """The sign of each channel of the code, (slots, CHANNELS): 1 or -1."""
    bits = probe._bits((config["num_experts"], CHANNELS), seed, "code")
    return (bits.float() + 0.5).sign()


def levels(config: Mapping[str, Any]) -> list[float]:
    """The level of the code of the expert that a token ranks first, second and so on."""
    count, chosen = config["num_experts"], config["num_experts_per_tok"]
    first, last = CHOSEN
    high = [first + (last - first) * i / max(chosen - 1, 1) for i in range(chosen)]
    begin, end, others = *OTHERS, count - chosen
    return high + [begin + (end - begin) * i / max(others - 1, 1) for i in range(others)]


def _codes(config: Mapping[str, Any], seed: int) -> torch.Tensor:
    """The code of every token, (vocabulary, slots * CHANNELS), bfloat16."""
    import torch

    count, vocabulary = config["num_experts"], config["vocab_size"]
    table = torch.tensor(levels(config))
    scale = 1.0 / math.sqrt(float((table * table).mean()))
    ranks = _ranks(probe._bits((vocabulary, count), seed, "levels"))
    code = (table * scale)[ranks][..., None] * _marks(config, seed)
    return code.reshape(vocabulary, -1).to(torch.bfloat16)


def _route(config: Mapping[str, Any], seed: int, name: str, router: torch.Tensor) -> None:
    """Have each expert read a slot of the code: another one in every layer."""
    import torch

    count, layer = config["num_experts"], name.removesuffix("mlp.gate.weight")
    norm = tensor(config, seed, f"{layer}post_attention_layernorm.weight").float()
    channels = _channels(config).reshape(count, CHANNELS)
    slots = _ranks(probe._bits((count,), seed, f"{layer}slots"))
    table = torch.tensor(levels(config))
    power = math.sqrt(float((table * table).mean()))  # the code's own scale, undone
    # Root mean square of the stream there: the norm divides by it.
    stream = math.sqrt(_power(int(name.split(".")[2])) * (1.0 + _ATTENTION))
    reads = _ROUTER * power * stream / CHANNELS * _marks(config, seed) / norm[channels]
    for expert in range(count):
        slot = int(slots[expert])
        router[expert, _channels(config)] = 0.0
        router[expert, channels[slot]] = reads[slot].to(router.dtype)


def _power(layer: int) -> float:
    """Power of the stream before a layer, as planned; that of an embedding is 1."""
    return ((1.0 + _ATTENTION) * (1.0 + _EXPERTS)) ** layer


def dummy(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What an engine holds before a refit: norm weights 1, all else small noise."""
    import torch

    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if name.endswith("norm.weight")
        else probe._noise(shape, 0, f"dummy/{name}", 0.02)
        for name, shape in shapes(config).items()
    }


def spread(config: Mapping[str, Any], name: str) -> float:
    """Standard deviation of the tensor `name` of the probe, outside of the code."""
    hidden = config["hidden_size"]
    kind = name.split(".")[-2]
    if kind in ("q_norm", "k_norm"):
        return _QUERY_KEY
    if kind.endswith("norm") or kind == "embed_tokens":
        return 1.0
    if kind == "lm_head":
        return (_LOGIT_OF_MANY if config["vocab_size"] >= _MANY else _LOGIT) / math.sqrt(hidden)
    if kind == "gate":
        return _JITTER / math.sqrt(hidden)
    power = _power(int(name.split(".")[2]))
    if kind == "o_proj":
        inputs = config["num_attention_heads"] * config["head_dim"]
        return math.sqrt(power * _ATTENTION / inputs) / _ATTENDED
    if kind == "down_proj":
        # Two experts of nearly equal weight add half of the power of each.
        inputs = config["moe_intermediate_size"] / config["num_experts_per_tok"]
        return math.sqrt(power * (1.0 + _ATTENTION) * _EXPERTS / inputs) / _GATED
    return 1.0 / math.sqrt(hidden)

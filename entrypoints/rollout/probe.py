"""The probe model: a language model made from a seed, so that nothing has to be downloaded.

It is an instrument, not a language model that says anything. Its weights are scaled so that
rounding to bfloat16 moves a log-probability little, and losing any one tensor moves it a lot;
`rollout.calibrate` measures both.

Every number comes out of 16-bit integers and single float32 multiplications, which IEEE 754 fixes
to the bit. So one seed gives the same bytes on every machine and with every version of torch that
keeps the Mersenne Twister, which torch.randn (vectorised logarithms and cosines) does not promise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rollout import tokenizer
from rollout.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Config = dict[str, Any]

_MAKERS = 8  # threads, each with a tensor of its own
BLOCK = 16  # tokens in a block of KV cache, the default of vLLM; a prefix cache shares whole blocks
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # token ids 0 to 3; prompts never hold them

_SIZES: dict[str, Config] = {
    # Shapes that the oldest engines serve: head_dim 64 or 128, vocabulary a multiple of 64.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    # Two layers, wide ones: widths are what kernels are chosen by, and engines run those that
    # users run. Depth would only blunt the instrument: at four layers the constant that all the
    # biases add up to drowns the tokens (seen: the same ten tokens for every prompt, and a lost
    # q_proj moved the divergence by 0.15 only).
    "1b": {
        "hidden_size": 4096,
        "intermediate_size": 32768,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
}

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# How the weights are scaled: standard deviations for an input of unit root mean square, found with
# `python -m rollout.calibrate`, which says what they are judged by. Two demands pull against each
# other: biases large enough to be missed, and hidden states that vary from token to token.
_QUERY_KEY = 2.3  # a query or key element, from weight and bias each: attention that selects
_VALUE_BIAS = 0.82  # less than the weight's 1: averaging over positions shrinks values, not this
_GATE_BIAS = 0.88  # of gate and up
_ATTENTION = 1.7  # power that attention adds, relative to the power of the stream it is added to
_MLP = 1.1  # the same of the MLP
_ATTENTION_SHARE = 0.38  # of the power that attention adds, what o_proj's bias makes
_MLP_SHARE = 0.35  # the same of down_proj
_ATTENDED = 0.92  # root mean square of what o_proj reads, as measured
_GATED = 0.85  # the same of down_proj
_GATED_UNBIASED = 0.6
# Of a logit. The greatest of 1024 then lies just under 4, where bfloat16 resolves 1 / 64; above 4
# it resolves half as much. Without biases hidden states vary more and need less.
_LOGIT = 1.16
_LOGIT_UNBIASED = 0.8
# With thousands of tokens to choose from, a lost tensor moves the likelihood of each one less.
_MANY = 4096
_LOGIT_OF_MANY = 1.38

_BIASES = {
    "q_proj": _QUERY_KEY,
    "k_proj": _QUERY_KEY,
    "v_proj": _VALUE_BIAS,
    "gate_proj": _GATE_BIAS,
    "up_proj": _GATE_BIAS,
}


def config(size: str, *, mlp_bias: bool = True) -> Config:
    """The content of config.json for a probe of `size` ("tiny" or "1b").

    `mlp_bias` False leaves out the biases of the MLP, for engines that hard-code `bias=False`
    there and skip such tensors without a word (SGLang 0.4.6 to 0.5.10, models/llama.py).

    Written for transformers 4 and 5 and for engines that parse the file themselves: `rope_theta`
    and `torch_dtype` stand at the top level, where transformers 5 would not write them.
    Raises Problem (code 2) for another size.
    """
    if size not in _SIZES:
        raise Problem(f"There is no probe of size {size!r}: take one of {', '.join(_SIZES)}.", 2)
    shape = _SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        # Not 10000 nor 500000: an engine that overlooks the key and takes its default is found
        # out. Small, so that most dimensions turn within a prompt and key biases are felt.
        "rope_theta": 1000.0,
        "rope_scaling": None,
        "attention_bias": True,
        "mlp_bias": mlp_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names (Hugging Face's) and shapes of all tensors of a model, in checkpoint order.

    Knows Llama, Mistral, Qwen2 and Qwen3 (dense). Raises Problem (code 2) for another
    architecture and for a config without the sizes.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise Problem(
            f"config.json names the architecture {architecture}, which the oracle does not know: "
            f"take a model of {', '.join(_ARCHITECTURES)}.",
            2,
        )
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    head = _size(config, "head_dim", hidden // heads)
    query, key = heads * head, _size(config, "num_key_value_heads", heads) * head
    vocabulary = _size(config, "vocab_size")
    biased = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    attention_bias = biased and bool(config.get("attention_bias"))
    mlp_bias = architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias"))
    input_bias = attention_bias or architecture == "Qwen2ForCausalLM"

    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        found[f"{name}.weight"] = (out, into)
        if bias:
            found[f"{name}.bias"] = (out,)

    for index in range(_size(config, "num_hidden_layers")):
        layer = f"model.layers.{index}"
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        linear(f"{layer}.self_attn.q_proj", query, hidden, input_bias)
        linear(f"{layer}.self_attn.k_proj", key, hidden, input_bias)
        linear(f"{layer}.self_attn.v_proj", key, hidden, input_bias)
        linear(f"{layer}.self_attn.o_proj", hidden, query, attention_bias)
        if architecture == "Qwen3ForCausalLM":
            found[f"{layer}.self_attn.q_norm.weight"] = (head,)
            found[f"{layer}.self_attn.k_norm.weight"] = (head,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{layer}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{layer}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, inner, mlp_bias)
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """All tensors of the probe: bfloat16, on the CPU, by name, shaped as `shapes(config)` says.

    Each tensor depends on `seed`, its name, its shape and its scale alone, so neither the order
    nor the other tensors matter. Raises Problem as `shapes` does.
    """
    names = list(shapes(config))
    # Random numbers are drawn by one thread each, which has the other tensors' wait for nothing.
    with ThreadPoolExecutor(min(_MAKERS, len(os.sched_getaffinity(0)))) as pool:
        made = pool.map(lambda name: tensor(config, seed, name), names)
        return dict(zip(names, made, strict=True))


def tensor(config: Mapping[str, Any], seed: int, name: str) -> torch.Tensor:
    """One tensor of `weights(config, seed)`, made without the others."""
    shape = shapes(config)[name]
    if name.endswith("norm.weight"):
        return _signs(shape, seed, name)
    return _noise(shape, seed, name, spread(config, name))


def dummy(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What an engine holds before a refit: norm weights 1, biases 0, all else small noise.

    Shapes, types and names as in `weights`. This is what transformers' default initialisation
    leaves; vLLM's load_format="dummy" leaves yet smaller noise, in every tensor.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, shape in shapes(config).items():
        if name.endswith("norm.weight"):
            found[name] = torch.ones(shape, dtype=torch.bfloat16)
        elif name.endswith(".bias"):
            found[name] = torch.zeros(shape, dtype=torch.bfloat16)
        else:
            found[name] = _noise(shape, 0, f"dummy/{name}", 0.02)
    return found


def spread(config: Mapping[str, Any], name: str) -> float:
    """Standard deviation of the tensor `name` of the probe (norm weights: their root mean square).

    The rule:
    - a linear layer's bias is not small beside its product, so that losing either one shows;
    - queries and keys make attention select a few positions: an average over many would hide
      them, and a shift of scores by rounding moves a clear choice less than an even one;
    - a sublayer adds a fixed share of the power of the stream it is added to. The stream so grows
      with depth, and the last sublayer is as audible as the first.
      (Equal contributions, the usual choice, would leave each 1 / (2 * layers + 1).)
    """
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    leaf = ".".join(name.split(".")[-2:])
    kind, _, part = leaf.partition(".")
    mlp_bias = bool(config.get("mlp_bias"))
    if kind.endswith("norm") or kind == "embed_tokens":
        return 1.0
    if kind == "lm_head":
        biased = _LOGIT_OF_MANY if _size(config, "vocab_size") >= _MANY else _LOGIT
        return (biased if mlp_bias else _LOGIT_UNBIASED) / math.sqrt(hidden)
    if kind in _BIASES:
        scale = _QUERY_KEY if kind in ("q_proj", "k_proj") else 1.0
        return _BIASES[kind] if part == "bias" else scale / math.sqrt(hidden)
    # o_proj and down_proj write into the stream. What they read is measured, not unit: an average
    # of values over positions, or a product of a gate and a value.
    power = ((1.0 + _ATTENTION) * (1.0 + _MLP)) ** int(name.split(".")[2])
    if kind == "o_proj":
        power *= _ATTENTION
        share = _ATTENTION_SHARE if config.get("attention_bias") else 0.0
        inputs, read = heads * _size(config, "head_dim", hidden // heads), _ATTENDED
    else:
        power *= (1.0 + _ATTENTION) * _MLP
        share = _MLP_SHARE if mlp_bias else 0.0
        inputs = _size(config, "intermediate_size")
        read = _GATED if mlp_bias else _GATED_UNBIASED
    if part == "bias":
        return math.sqrt(power * share)
    return math.sqrt(power * (1.0 - share) / inputs) / read


def prompts(config: Mapping[str, Any], seed: int, count: int, length: int = 75) -> list[list[int]]:
    """`count` prompts of `length` token ids each, from the seed alone.

    Every second one begins with the same whole blocks of `BLOCK` tokens (half of the prompt), so
    that a prefix cache has something to share, and something that it must not share. The default
    length spans several blocks and ends inside one: prompts of one block hide a stale cache.
    """
    first, last = len(SPECIAL), _size(config, "vocab_size")

    def draw(label: str, number: int) -> list[int]:
        source = random.Random(f"{seed}/{label}")  # noqa: S311 - reproducible, not secret
        return [source.randrange(first, last) for _ in range(number)]

    shared = draw("prefix", length // 2 // BLOCK * BLOCK)
    found = []
    for index in range(count):
        start = shared if index % 2 == 0 else []
        found.append(start + draw(f"prompt/{index}", length - len(start)))
    return found


def save(directory: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a model directory that transformers and every engine load without a network.

    config.json, generation_config.json, model.safetensors, and a tokenizer with one word per
    token id (engines such as vLLM 0.8 insist on one). Without weights there is no
    model.safetensors: an engine that starts on dummy weights reads none. Raises Problem (code 2)
    where it cannot be written.
    """
    from safetensors.torch import save_file

    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    texts = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": _tokenizer(_size(config, "vocab_size")),
        "tokenizer_config.json": _tokenizer_config(_size(config, "max_position_embeddings", 2048)),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            text = json.dumps(content, indent=1) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
        if weights:
            # transformers 4 refuses a file that does not say which framework wrote it
            file = directory / "model.safetensors"
            save_file({k: v.contiguous() for k, v in weights.items()}, file, {"format": "pt"})
    except OSError as error:
        raise Problem(
            f"The probe cannot be written to {directory} ({error}): name a writable directory "
            "with enough space.",
            2,
        ) from error


def load(directory: Path) -> tuple[Config, dict[str, torch.Tensor]]:
    """Reads a model directory: its config, and its tensors as bfloat16 on the CPU, by name.

    Takes one model.safetensors or shards with model.safetensors.index.json. Raises Problem
    (code 2) where directory, config or tensors are missing, unreadable or do not fit each other,
    and where this image's transformers does not know the architecture.
    """
    config = _read_json(directory / "config.json")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        _reject(directory, "names no architecture in its config.json", _OF_KNOWN)
    # transformers 5 writes it here; older ones, and the oracle on them, look at the top level
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    try:
        expected = shapes(config)
    except Problem as problem:
        raise Problem(f"{directory}: {problem.sentence}", 2) from None
    _check_type(directory, names[0], config.get("model_type"))

    import torch

    found: dict[str, torch.Tensor] = {}
    for file in _weight_files(directory):
        found.update(_read_tensors(file))
    for name in [name for name in found if name not in expected and _redundant(name)]:
        del found[name]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            _reject(directory, f"holds no tensor {name}, which its config.json calls for")
        if name not in expected:
            _reject(directory, f"holds a tensor {name}, which its config.json has no place for")
        if tuple(found[name].shape) != expected[name]:
            shape = tuple(found[name].shape)
            _reject(directory, f"holds {name} as {shape}, its config.json says {expected[name]}")
        if found[name].dtype not in (torch.bfloat16, torch.float16, torch.float32):
            _reject(directory, f"holds {name} as {found[name].dtype}, a quantised model")
    return config, {name: found[name].to(torch.bfloat16) for name in expected}


_COMPLETE = "name a complete model directory in float32, float16 or bfloat16"
_OF_KNOWN = f"take a model of {', '.join(_ARCHITECTURES)}"


def _reject(directory: Path, what: str, change: str = _COMPLETE) -> NoReturn:
    raise Problem(f"{directory} {what}: {change}.", 2)


def _check_type(directory: Path, architecture: str, kind: object) -> None:
    """Reject a model_type that the oracle would make no model of this architecture from."""
    if not isinstance(kind, str) or not kind:
        _reject(directory, f"names no model_type beside {architecture} in its config.json")
    own = architecture.removesuffix("ForCausalLM").lower()
    if kind != own:
        what = f"names the model_type {kind!r} in its config.json, which is not of {architecture}"
        _reject(directory, what, f"write {own!r} there, or {_OF_KNOWN}")
    try:
        import transformers
    except ImportError:  # then there is no oracle either, which says so
        return
    if kind not in transformers.CONFIG_MAPPING:
        what = f"is of {architecture}, which transformers {transformers.__version__} does not know"
        _reject(directory, what, "take an older model, or an image of a newer engine")


def _redundant(name: str) -> bool:
    """Whether a checkpoint may hold this beyond its model: a tied head, or a recomputed buffer."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Problem(f"config.json needs a positive whole number as {key}, not {value!r}.", 2)
    return value


def _read_json(file: Path) -> Config:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(
            f"{file} cannot be read ({error}): name a directory that holds a model.", 2
        ) from error
    if not isinstance(content, dict):
        raise Problem(f"{file} is no JSON object: name a directory that holds a model.", 2)
    return content


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: what its index names, or all there are."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            _reject(directory, "holds no *.safetensors file")
        return files
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise Problem(f"{index} has no weight_map: name a complete model directory.", 2)
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name:  # an index must not lead out of its directory
            raise Problem(f"{index} names {name!r}, which is no file beside it: mend the index.", 2)
    return [directory / name for name in names]


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise Problem(
            f"{file} cannot be read ({error}): name a complete model directory.", 2
        ) from error


def _bits(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """Uniform 16-bit integers (int16), from a generator of the tensor's own."""
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # 63 bits: manual_seed takes a signed number
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)


def _noise(shape: tuple[int, ...], seed: int, name: str, spread: float) -> torch.Tensor:
    """Uniform noise around 0 with standard deviation `spread`, bfloat16."""
    import torch

    step = math.sqrt(12.0) / 2**16  # a uniform variable of width w deviates by w / sqrt(12)
    return _bits(shape, seed, name).float().add_(0.5).mul_(step * spread).to(torch.bfloat16)


def _signs(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """Norm weights: random signs, magnitudes 0.5 to 1.427, root mean square 1, bfloat16.

    Of mixed signs, because then neither 1 (the default) nor other norm weights resemble them.
    """
    import torch

    bits = _bits(shape, seed, name).float().add_(0.5).mul_(2.0**-15)  # in (-1, 1), never 0
    # magnitude 1/2 + b u, u uniform in (0, 1): mean square 1/4 + b/2 + b^2/3 = 1
    slope = 0.75 * (math.sqrt(5.0) - 1.0)
    return (bits.sign() * (0.5 + slope * bits.abs())).to(torch.bfloat16)


def _tokenizer(size: int) -> dict[str, Any]:
    """tokenizer.json: a word for each token id, words apart by white space."""
    words = [SPECIAL[i] if i < len(SPECIAL) else f"t{i}" for i in range(size)]
    model = {"type": "WordLevel", "unk_token": SPECIAL[3]}
    return tokenizer.content(words, SPECIAL, model=model, apart={"type": "WhitespaceSplit"})


def _tokenizer_config(length: int) -> dict[str, Any]:
    pad, begin, end, unknown = SPECIAL
    named = {"pad_token": pad, "bos_token": begin, "eos_token": end, "unk_token": unknown}
    return tokenizer.settings("PreTrainedTokenizerFast", length, **named)

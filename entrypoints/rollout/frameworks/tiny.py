"""What a run of seconds trains on: a random model, its tokenizer, prompts, and a rule.

The rule pays for letters out of a quarter of the vocabulary, so a model that knows nothing earns a
quarter, and learns within a few steps to earn nearly all. Few tokens make each one probable: a
wrong refit parts probabilities by several hundredths, and rounding moves them by thousandths.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rollout import tokenizer

PAD, END, UNKNOWN, ASK = "<pad>", "<end>", "<unk>", ">"
# A tokenizer of Qwen has these, and verl 0.9 asks for each of them as one token. The newline is
# written as in the vocabulary of Qwen, which is one of bytes.
TURN, NEWLINE = "<|im_end|>", "\u010a"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WANTED = "abcdefgh"
TOKENS = (PAD, END, UNKNOWN, TURN, NEWLINE, ASK, *LETTERS)
PROMPT = 8  # letters of a prompt
ANSWER = 16  # tokens of an answer
SEED = 20260708
LAST_LAYER = "lm_head.weight"  # decides every token, so an answer cannot be right without it

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(TOKENS),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": TOKENS.index(END),
    "eos_token_id": TOKENS.index(END),
    "pad_token_id": TOKENS.index(PAD),
}

# Every message begins with a token of its own: an empty one must have a length, too.
TEMPLATE = "{% for message in messages %}" + ASK + "{{ message['content'] }}{% endfor %}"

# Executed by the framework, in processes that know nothing of this package.
RULE = f'''"""The rule: what part of the answer is made of the letters that are wanted."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return sum(letter in ground_truth for letter in solution_str) / {ANSWER}
'''


def letters() -> dict[str, Any]:
    """tokenizer.json: a token for each letter, and nothing else.

    Of Qwen's own kind. transformers takes the class of the model's family, whatever
    tokenizer_config.json names, and from version 5 on that class reads the vocabulary alone.
    """
    model: dict[str, Any] = {
        "type": "BPE",
        "merges": [],
        "unk_token": None,
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
    }
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return tokenizer.content(
        TOKENS,
        (PAD, END, UNKNOWN, TURN),
        model=model,
        apart={**as_bytes, "use_regex": False},
        decoder={**as_bytes, "use_regex": False},
    )


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json, with the template of a conversation."""
    named = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    length = CONFIG["max_position_embeddings"]
    return {
        **tokenizer.settings("Qwen2Tokenizer", length, **named),
        "chat_template": TEMPLATE,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the model by their Hugging Face names."""
    hidden, inner, vocabulary = (
        CONFIG[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        LAST_LAYER: (vocabulary, hidden),
    }
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (hidden,)
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = (hidden, hidden)
            found[f"{layer}.self_attn.{name}.bias"] = (hidden,)
        found[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return found


def write_model(folder: Path) -> None:
    """The model's folder: configuration, tokenizer, and random weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", {"eos_token_id": CONFIG["eos_token_id"]}),
        ("tokenizer.json", letters()),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * CONFIG["initializer_range"]
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prompts(count: int) -> list[str]:
    """So many prompts, the same ones every time."""
    source = random.Random(SEED)  # noqa: S311 - not for secrets
    return ["".join(source.choices(LETTERS, k=PROMPT)) for _ in range(count)]

"""The files of a tokenizer that was made for a proof, and knows no language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def content(
    tokens: Sequence[str],
    special: Sequence[str],
    *,
    model: Mapping[str, Any],
    apart: Mapping[str, Any],
    decoder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.json: the place of a token in ``tokens`` is its id.

    ``special`` are those that are taken whole from a text and left out of an answer. ``model``
    (without its vocabulary), ``apart`` and ``decoder`` are the model, the pre-tokenizer and the
    decoder as the tokenizers library writes them.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens.index(token), "content": token, **flags, "special": True}
            for token in special
        ],
        "normalizer": None,
        "pre_tokenizer": dict(apart),
        "post_processor": None,
        "decoder": None if decoder is None else dict(decoder),
        "model": {
            **model,
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
    }


def settings(kind: str, length: int, **named: str) -> dict[str, Any]:
    """The content of tokenizer_config.json: texts of at most ``length`` tokens.

    ``kind`` is transformers' class, ``named`` are tokens that it knows by a name (``pad_token``).
    """
    return {
        "tokenizer_class": kind,
        **named,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }

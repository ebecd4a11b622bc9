"""The files of a tokenizer that has a token for each word of a list, and knows no language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def words(
    tokens: Sequence[str],
    special: Sequence[str],
    unknown: str,
    *,
    apart: Mapping[str, Any],
    decoder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.json: a word's place in ``tokens`` is its id.

    ``special`` are those of the words that are taken whole from a text and left out of an answer,
    ``unknown`` stands for every other word. ``apart`` and ``decoder`` are the pre-tokenizer and the
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
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": unknown,
        },
    }


def settings(length: int, **named: str) -> dict[str, Any]:
    """The content of tokenizer_config.json: texts of at most ``length`` tokens.

    ``named`` are the tokens that transformers knows by a name, as ``pad_token``.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }

"""The one exception that a person gets to read."""

from __future__ import annotations


class Problem(Exception):
    """One clear sentence: what is wrong, where, and what to do. ``code`` is the exit status."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code

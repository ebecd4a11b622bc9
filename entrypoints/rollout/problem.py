"""The one exception that a person gets to read: a sentence and its exit code."""

from __future__ import annotations

# A sentence may quote a line of a file, which may have any length; nobody reads more than this.
MOST = 4000


class Problem(Exception):
    """A sentence for a person (what is wrong, where, what to do) and the exit code of the run.

    Codes: 1 a check failed, 2 wrong usage, 3 cannot be proved here.
    """

    def __init__(self, sentence: str, code: int = 1) -> None:
        if len(sentence) > MOST:
            sentence = f"{sentence[:MOST]}… ({len(sentence) - MOST:,} characters more)"
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code

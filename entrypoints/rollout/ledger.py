"""Who was asked what, and what came of it: each request ends once, and under its own name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rollout.backends.crowd import Asked, Said


class Disorder(Exception):
    """A request was answered twice, too late, too long, or under a name that nobody asked by."""


@dataclass
class Entry:
    """One request, and what there is of its answer."""

    asked: Asked
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    end: str = ""  # "finished" or "aborted"


class Ledger:
    """All requests that were asked for, in their order."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.tokens = 0  # of all answers
        self.finished = 0

    def ask(self, asked: Iterable[Asked]) -> None:
        """Note requests."""
        for one in asked:
            if one.name in self.entries:
                raise ValueError(f"{one.name} is asked for already")
            self.entries[one.name] = Entry(one)

    @property
    def open(self) -> list[str]:
        """The names of those that have not ended."""
        return [name for name, entry in self.entries.items() if not entry.end]

    def hear(self, said: Iterable[Said]) -> None:
        """Note what an engine says.

        Raises:
            Disorder: it does not fit what was asked, or what was said before.
        """
        for one in said:
            entry = self.entries.get(one.name)
            if entry is None:
                raise Disorder(f"{one.name} is answered, and nobody asked for it")
            if entry.end:
                raise Disorder(f"{one.name} is answered again after it was {entry.end}")
            if len(one.tokens) != len(one.logprobs):
                raise Disorder(f"{one.name} has tokens without a log-probability")
            entry.tokens += one.tokens
            entry.logprobs += one.logprobs
            self.tokens += len(one.tokens)
            there, wanted = len(entry.tokens), entry.asked.tokens
            if there > wanted or (one.ended and there < wanted):
                raise Disorder(f"{one.name} has {there} tokens, and was asked for {wanted}")
            if one.ended:
                entry.end = "finished"
                self.finished += 1

    def abort(self, names: Sequence[str], last: Iterable[Said]) -> None:
        """Note that requests were aborted, with the last words of the engine about them."""
        self.hear(last)
        for name in names:
            entry = self.entries[name]
            if not entry.end:
                entry.end = "aborted"

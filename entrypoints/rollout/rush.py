"""Hundreds of requests at once: half are aborted, the others interrupted, and go on afterwards."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rollout.backends.crowd import Asked, Crowd, Usage
from rollout.ledger import Disorder, Entry, Ledger

SEED = 20261130
BEGUN = 16  # of so many requests one has ended before any is aborted
BETWEEN = 4  # tokens of each slot between the abort and the interruption
AGAIN = "-again"  # behind the name of a request that goes on: trainers give it a new one, too


@dataclass
class Answer:
    """What came of one request: what there was when it was interrupted, and what came later."""

    before: Entry
    after: Entry | None = None

    @property
    def kind(self) -> str:
        """When it was made: before the interruption, after it, across, or not to its end."""
        if self.after is None:
            return "before" if self.before.end == "finished" else "aborted"
        return "across" if self.before.tokens else "after"

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.before.asked.prompt

    @property
    def rest(self) -> tuple[int, ...]:
        """The tokens that came after the interruption."""
        return self.after.tokens if self.after else ()

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.before.logprobs + (self.after.logprobs if self.after else ())


@dataclass
class Rush:
    """What came of all requests, in how long, and what the engine held when it was over."""

    answers: list[Answer]
    tokens: int
    seconds: float  # without the interruption
    usage: Usage

    @property
    def kinds(self) -> Counter[str]:
        """How many requests of each kind there were."""
        return Counter(answer.kind for answer in self.answers)


def rush(
    engine: Crowd, asked: Sequence[Asked], empty: Usage, meanwhile: Callable[[], object]
) -> Rush:
    """Ask for all of these, abort half for good, interrupt the others, and let them go on.

    ``meanwhile`` is done in the interruption; ``empty`` is what the engine held before.

    Raises:
        Disorder: a request is not answered once, or the engine holds something for none.
    """
    ledger, source = Ledger(), random.Random(SEED)  # noqa: S311 - reproducible, not secret
    clock = time.perf_counter()
    ledger.ask(asked)
    engine.submit(asked)
    hear(engine, ledger, lambda: ledger.finished >= len(asked) // BEGUN)
    unwanted = source.sample(ledger.open, min(len(asked) // 2, len(ledger.open)))
    ledger.abort(unwanted, engine.abort(unwanted))
    enough = ledger.tokens + BETWEEN * engine.slots
    hear(engine, ledger, lambda: ledger.tokens >= enough)
    rest = ledger.open
    ledger.abort(rest, engine.abort(rest))
    seconds = time.perf_counter() - clock
    settled(engine.usage(), empty)
    meanwhile()
    clock = time.perf_counter()
    rest = [name for name in rest if ledger.entries[name].end == "aborted"]
    going = [_going(ledger.entries[name]) for name in rest]
    ledger.ask(going)
    engine.submit(going)
    hear(engine, ledger, lambda: not ledger.open)
    seconds += time.perf_counter() - clock
    usage = engine.usage()
    settled(usage, empty)
    answers = [
        Answer(ledger.entries[one.name], ledger.entries.get(one.name + AGAIN)) for one in asked
    ]
    return Rush(answers, ledger.tokens, seconds, usage)


def _going(entry: Entry) -> Asked:
    """The request by which another one goes on from the tokens kept."""
    asked = entry.asked
    left = asked.tokens - len(entry.tokens)
    return Asked(asked.name + AGAIN, asked.prompt + entry.tokens, left)


def hear(engine: Crowd, ledger: Ledger, enough: Callable[[], bool]) -> None:
    """Listen until there is enough, or nothing more is to come.

    Raises:
        Disorder: the engine has nothing more to say, and not every request has ended.
    """
    while ledger.open and not enough():
        said = engine.listen()
        if not said:
            lost = ledger.open
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            names = ", ".join(lost[:3]) + more
            raise Disorder(f"the engine has nothing more to answer, and never answered {names}")
        ledger.hear(said)


def settled(now: Usage, empty: Usage) -> None:
    """Hold an engine that has nothing to do to what it held before.

    Raises:
        Disorder: it works at requests that have ended, or their KV blocks are in use.
    """
    if now.requests > empty.requests:
        count = now.requests - empty.requests
        raise Disorder(f"the engine still works at {count} requests that were ended")
    if now.blocks > empty.blocks:
        count = now.blocks - empty.blocks
        raise Disorder(f"{count} blocks of the KV cache are in use by no request")

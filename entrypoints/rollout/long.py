"""The check of long sequences: positions in the thousands, and more requests than the cache holds.

An engine of its own, set to compute a prompt in chunks and with a small KV cache, answers two sets
of requests. The first has answers in every band of positions and across every bound between two, up
to the engine's last position. The second needs more KV cache than there is, so that requests are
preempted and computed anew. Every token is judged by the float32 oracle, and what differs is named
by its positions.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rollout import backends, probe
from rollout.backends import Completion, Lengthy, gpu
from rollout.checks import Failed, Metrics, Trial, timed
from rollout.faults import find
from rollout.long_oracle import LongOracle
from rollout.oracle import divergence
from rollout.problem import Problem

SEED = 20261129
FIRST = 512  # positions of the first band; each later one begins where it has twice as many before
ANSWER = 32  # tokens of an answer in the first set
# Positions at the end that no request needs: an engine may refuse one that takes the very last.
SPARE = 8
FILLED = 0.9  # of the KV cache, by the prompts of the second set
GROWN = 0.35  # of the KV cache, by which their answers then want more
ROUNDED = 128  # tokens that a request may take more than it has, for blocks are whole
ENOUGH = 8  # tokens of a request in a band, from which on they are judged by themselves
CROWD = 100  # the number of the second set's first prompt: none is in both
CHECK = "long"


@dataclass(frozen=True)
class Band:
    """Positions from ``low`` to before ``high``, and how far the answers there are off."""

    low: int
    high: int
    tokens: int
    mean: float
    worst: float

    def within(self, bound: float) -> bool:
        """Whether all of its tokens, and those of each request, are as the oracle says."""
        return self.mean <= bound and self.worst <= bound

    def __str__(self) -> str:
        return f"{self.low} to {self.high - 1}"


@dataclass(frozen=True)
class Judged:
    """An answer: the position of its first token, and three log-probabilities of each.

    They are the engine's, the oracle's, and those of an oracle that takes the last tokens for one
    position later than they are.
    """

    begin: int
    engine: Sequence[float]
    oracle: Sequence[float]
    shifted: Sequence[float]


def edges(longest: int) -> list[int]:
    """Where bands of positions begin, and the end of the last one, which has room for answers."""
    found, bound = [0], FIRST
    while bound + FIRST // 2 <= longest:
        found.append(bound)
        bound *= 2
    return [*found, longest]


def lengths(longest: int) -> list[int]:
    """Tokens of the prompts of the first set, the longest first.

    Their answers of ``ANSWER`` tokens lie in the middle of each band and across each bound between
    two, and one ends with the last position but a few.
    """
    bounds = edges(longest)
    last = longest - ANSWER - SPARE
    across = [bound - ANSWER // 2 for bound in bounds[1:-1]]
    # Odd: neither a whole number of blocks nor of chunks.
    middle = [(low + high) // 2 + 1 for low, high in pairwise(bounds)]
    inside = [length for length in (*across, *middle) if length < last]
    return [last, *sorted(inside, reverse=True)]


def groups(lengths: Sequence[int], capacity: int, requests: int) -> list[list[int]]:
    """Which of these prompts are asked for at once, by their numbers: their answers fit, too.

    Each goes where there is room first. A request that fits nowhere is asked for alone.
    """
    found: list[list[int]] = []
    rooms: list[int] = []
    for number, length in enumerate(lengths):
        need = length + ANSWER + ROUNDED
        place = next(
            (i for i, room in enumerate(rooms) if room >= need and len(found[i]) < requests), None
        )
        if place is None:
            found.append([number])
            rooms.append(capacity - need)
        else:
            found[place].append(number)
            rooms[place] -= need
    return found


def pressure(capacity: int, requests: int) -> tuple[list[int], int]:
    """Tokens of the prompts of the second set, and of each answer: together more than the cache.

    The prompts fit side by side, so that all requests are begun. Before the first of them ends,
    they need more than ``capacity`` tokens. They are of many lengths, so that what is preempted
    and what it makes room for are not alike.
    """
    mean = int(FILLED * capacity) // requests
    last = max(requests - 1, 1)
    prompts = [mean - mean // 2 + number * mean // last for number in range(requests)]
    return prompts, -(-int(GROWN * capacity) // requests)


def bands(answers: Sequence[Judged], longest: int, *, shifted: bool = False) -> list[Band]:
    """How far the engine is from the oracle, in each band that has tokens."""
    found = []
    for low, high in pairwise(edges(longest)):
        pairs: list[tuple[list[float], list[float]]] = []
        for answer in answers:
            there = [i for i in range(len(answer.engine)) if low <= answer.begin + i < high]
            judge = answer.shifted if shifted else answer.oracle
            if there:
                pairs.append(([answer.engine[i] for i in there], [judge[i] for i in there]))
        if pairs:
            ours = [value for one, _ in pairs for value in one]
            mean = divergence(ours, [value for _, other in pairs for value in other])
            apart = [divergence(*pair) for pair in pairs if len(pair[0]) >= ENOUGH]
            found.append(Band(low, high, len(ours), mean, max([*apart, mean])))
    return found


def named(found: Sequence[Band], bound: float) -> str:
    """Which positions differ, by how much, and which do not; empty where none does."""
    wrong = [band for band in found if not band.within(bound)]
    right = [band for band in found if band.within(bound)]
    if not wrong:
        return ""
    told = [f"positions {band} differ by {band.worst:.3f}" for band in wrong]
    agree = f"; {', '.join(map(str, right))} agree" if right else "; none agree"
    return f"{', '.join(told)}, where {bound} is the most{agree}"


def judge(
    oracle: LongOracle,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Completion],
    tokens: int,
) -> list[Judged]:
    """The answers beside what the oracle says of them.

    Raises:
        Failed: one has other than ``tokens`` tokens.
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if not len(answer.tokens) == len(answer.logprobs) == tokens:
            what = f"asked for {tokens} tokens behind {len(prompt)}, the engine gave"
            raise Failed(f"{what} {len(answer.tokens)}", {})
        right, shifted = oracle.both(prompt, answer.tokens)
        found.append(Judged(len(prompt), answer.logprobs, right, shifted))
    return found


def told(found: Sequence[Band], wrongly: Sequence[Band]) -> list[Metrics]:
    """Bands as a report has them, each with what the wrong oracle gives."""
    return [
        {
            "positions": [band.low, band.high - 1],
            "tokens": band.tokens,
            "divergence": _finite(band.mean),
            "worst": _finite(band.worst),
            "control": _finite(other.mean),
        }
        for band, other in zip(found, wrongly, strict=True)
    ]


def hold(
    answers: Sequence[Judged], longest: int, bound: float, what: str, metrics: Metrics
) -> list[Metrics]:
    """Hold answers against the oracle in bands of positions; returns what was found in each.

    The worst request of all is noted. Control: an oracle whose positions are off by one has to
    disagree in every band.

    Raises:
        Failed: they differ somewhere, or the control does not.
    """
    found, wrongly = bands(answers, longest), bands(answers, longest, shifted=True)
    noted = told(found, wrongly)
    worst = max(band.worst for band in found)
    metrics["worst_request"] = _finite(max(metrics["worst_request"], worst))
    reason = named(found, bound)
    if reason:
        raise Failed(f"{what}: {reason}", {**metrics, "judged_bands": noted})
    for band in wrongly:
        if band.mean <= bound:
            reason = f"control: positions {band}, each taken for the next one, would not be seen"
            raise Failed(reason, {**metrics, "judged_bands": noted})
    return noted


def _finite(value: float) -> float | None:
    """A number as a report may hold it."""
    return value if math.isfinite(value) else None


def reach(config: Mapping[str, Any], longest: int) -> int:
    """How many positions a model can be asked for, of those that an engine is set to.

    One with plain rotary embeddings has no end of its own. One that stretches them has.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return longest if kind == "default" else min(longest, int(config["max_position_embeddings"]))


def write(model: Path, folder: Path, longest: int) -> dict[str, Any]:
    """A model folder without weights, whose config allows for so many positions; its config."""
    for path in model.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model"):
            shutil.copyfile(path, folder / path.name)
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max(config["max_position_embeddings"], longest)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config


def check(trial: Trial) -> Metrics:
    """The check ``long`` of a trial, with an engine of the same backend that is set for it."""
    engine = backends.lengthy(trial.engine)
    trial.engine.stop()
    config = json.loads((trial.model / "config.json").read_text(encoding="utf-8"))
    engine.longest = reach(config, engine.longest)
    if engine.chunk >= engine.longest:
        raise Problem(f"--model: its {engine.longest} positions are none that 'long' looks at", 2)
    if trial.fault and find(trial.fault).check == CHECK:
        engine.inject(trial.fault)
    try:
        with tempfile.TemporaryDirectory(prefix="rollout-long-") as name:
            config = write(trial.model, Path(name), engine.longest)
            level = max(trial.sleep_levels)
            seconds = timed(lambda: engine.start(Path(name), dummy=True, level=level))
            return {**measured(trial, engine, config), "start_seconds": seconds}
    finally:
        engine.stop()
        if trial.device != "cpu":
            gpu.collect()  # the oracle's scores: the next engine wants that memory


def measured(trial: Trial, engine: Lengthy, config: Mapping[str, Any]) -> Metrics:
    """Both sets of requests on an engine that runs; the metrics.

    Controls: on dummy weights the oracle must disagree; what fits must be counted as preempted by
    nobody; and where the cache is too small, something must be.
    """
    oracle, capacity = LongOracle(trial.oracle), engine.capacity()
    metrics: Metrics = {"positions": engine.longest, "chunk": engine.chunk, "preemptions": 0}
    metrics |= {"worst_request": 1.0, "cache_tokens": capacity}  # a terminal shows the first four

    def prompts(sizes: Sequence[int], first: int = 0) -> list[list[int]]:
        return [probe.prompts(config, SEED + first + n, 2, size)[1] for n, size in enumerate(sizes)]

    sizes = lengths(engine.longest)
    if sizes[0] <= engine.chunk:
        raise Failed("control: the longest prompt is computed in one chunk", metrics)
    asked = prompts(sizes)
    strange = judge(oracle, asked[-1:], engine.generate(asked[-1:], ANSWER), ANSWER)
    metrics["control_divergence"] = divergence(strange[0].engine, strange[0].oracle)
    if metrics["control_divergence"] <= trial.bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)
    engine.refit(trial.weights.items(), trial.transport)
    engine.reset_prefix_cache()

    before, clock = engine.preemptions(), time.perf_counter()
    judged, answers = [], []
    for group in groups(sizes, capacity, engine.requests):
        together = [asked[number] for number in group]
        answers.append((together, engine.generate(together, ANSWER)))
    metrics["long_seconds"] = time.perf_counter() - clock
    for together, found in answers:
        judged += judge(oracle, together, found, ANSWER)
    what = "long answers diverge from the float32 oracle"
    metrics["bands"] = hold(judged, engine.longest, trial.bound, what, metrics)
    if engine.preemptions() != before:
        raise Failed("control: requests that fit count as preempted", metrics)

    sizes, tokens = pressure(capacity, engine.requests)
    crowd = prompts(sizes, CROWD)
    metrics["crowd_tokens"] = sum(sizes) + tokens * len(sizes)
    clock = time.perf_counter()
    found = engine.generate(crowd, tokens)
    metrics["crowd_seconds"] = time.perf_counter() - clock
    metrics["preemptions"] = engine.preemptions() - before
    if metrics["preemptions"] < 1:
        need = f"{metrics['crowd_tokens']} tokens in a cache of {capacity}"
        raise Failed(f"control: {need}, and the engine preempted nothing", metrics)
    judged = judge(oracle, crowd, found, tokens)
    what = "preempted and resumed, answers diverge from the float32 oracle"
    metrics["crowd_bands"] = hold(judged, engine.longest, trial.bound, what, metrics)
    return metrics

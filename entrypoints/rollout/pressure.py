"""The check of many requests at once, of which half are aborted while weights are replaced.

An engine of its own is asked for hundreds of sampled answers. In the middle half of the requests
are aborted for good. A little later the trainer has new weights: what still runs is interrupted,
and goes on from the tokens kept once they have arrived, as in a partial rollout. Then all of it
again, with the first weights. Every answer is judged by the oracle of the weights of its time, the
engine must hold nothing for requests that ended, and after the second time no more than after the
first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollout import probe
from rollout.backends import apart, backend_of, gpu
from rollout.backends.crowd import Asked, Crowd, Usage
from rollout.checks import Failed, Metrics, Pair, Trial, mean_of, timed
from rollout.ledger import Disorder, Entry
from rollout.oracle import divergence
from rollout.pressure_faults import FAULTS, spoiled
from rollout.rush import Answer, Rush, rush

if TYPE_CHECKING:
    import torch

    from rollout.oracle import Oracle

CHECK = "pressure"
SEED = 20261130
SAMPLES = 4  # of each prompt, as a trainer asks for a group of answers
FEW = 32  # of so many requests at least one is of each kind
ENOUGH = 16  # tokens of an answer, from which on it is judged by itself; no request asks for fewer
BEGINNING = 8  # tokens by which two answers to one prompt are told apart
ROWS = 32  # answers that the oracle takes at once, and that a control looks at
# What is kept by mistake is kept for each request or each abort, of which there are hundreds.
FILES = 16
SHARED = 1 << 20  # bytes
GROWTH = 32 << 20  # bytes of a GPU: some of the pieces in which an allocator takes its memory
GROWTH_CPU = 1 << 20
KINDS = {
    "before": "answered before the new weights came",
    "aborted": "until they were aborted",
    "across": "interrupted, and continued with new weights",
    "after": "answered after the new weights came",
}


@dataclass
class Side:
    """A set of weights, and the oracle of it."""

    weights: Mapping[str, torch.Tensor]
    oracle: Oracle


def pressure(trial: Trial) -> Metrics:
    """The check ``pressure`` of a trial, with an engine of the same backend that is set for it."""
    within: Any = trial.engine
    while hasattr(within, "within"):  # one with a fault
        within = within.within
    engine: Crowd = apart(CHECK, backend_of(within))
    trial.engine.stop()
    if trial.fault in FAULTS:
        engine = spoiled(engine, str(trial.fault))
    try:
        level = min(trial.sleep_levels)
        seconds = timed(lambda: engine.start(trial.model, dummy=True, level=level))
        return {**measured(trial, engine), "start_seconds": seconds}
    finally:
        engine.stop()
        if trial.device != "cpu":
            gpu.collect()  # the oracle's scores: the next engine wants that memory


def measured(trial: Trial, engine: Crowd) -> Metrics:
    """Both rounds on an engine that runs, and the engine's own batch; the metrics.

    Control: on dummy weights the oracle must disagree.
    """
    config = json.loads((trial.model / "config.json").read_text(encoding="utf-8"))
    first, second = Side(trial.weights, trial.oracle), Side(trial.others, trial.other_oracle)
    metrics: Metrics = {"requests": engine.crowd, "aborted": engine.crowd // 2}
    metrics |= {"slots": engine.slots, "worst_request": 1.0}

    asked = requests(engine, config, "dummy")[: engine.slots]
    metrics["control_divergence"] = mean_of(pairs(plain(engine, asked), first, first))
    if metrics["control_divergence"] <= trial.bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)
    send(trial, engine, first)
    empty = engine.usage()
    rounds = []
    for old, new, label in ((first, second, "first"), (second, first, "second")):
        asked, spent = requests(engine, config, label), list[float]()

        def replace(new: Side = new, spent: list[float] = spent) -> None:
            spent.append(timed(lambda: send(trial, engine, new)))

        try:
            found = rush(engine, asked, empty, replace)
        except Disorder as disorder:
            raise Failed(f"in the {label} round {disorder}", metrics) from None
        metrics["refit_seconds"] = spent[0]
        hold(found, old, new, trial.bound, metrics)
        rounds.append(found)
    steady(rounds[0].usage, rounds[1].usage, trial.device, metrics)
    metrics["tokens"] = rounds[-1].tokens
    metrics["tokens_per_s"] = rounds[-1].tokens / rounds[-1].seconds
    # The yardstick, in the same process: as many answers as long, by one call that nobody disturbs.
    asked = requests(engine, config, "plain")
    seconds = timed(lambda: plain(engine, asked))
    metrics["plain_tokens_per_s"] = sum(one.tokens for one in asked) / seconds
    return metrics


def requests(engine: Crowd, config: Mapping[str, Any], label: str) -> list[Asked]:
    """What is asked for at once: some answers to each prompt, each of another length.

    The same each time, but for the names: what an engine compiles for a shape it then has.
    """
    source = random.Random(SEED)  # noqa: S311 - reproducible, not secret
    prompts = probe.prompts(config, SEED, engine.crowd // SAMPLES)
    return [
        Asked(f"{label}-{number}", tuple(prompts[number // SAMPLES]), tokens)
        for number in range(engine.crowd)
        for tokens in (source.randint(*engine.answers),)
    ]


def plain(engine: Crowd, asked: Sequence[Asked]) -> list[Answer]:
    """The answers of the engine's own call for a batch.

    Raises:
        Failed: one is not as long as was asked for.
    """
    answers = []
    for one, found in zip(asked, engine.plain(asked), strict=True):
        if not len(found.tokens) == len(found.logprobs) == one.tokens:
            what = f"asked for {one.tokens} tokens, the engine gave {len(found.tokens)}"
            raise Failed(what, {})
        answers.append(Answer(Entry(one, found.tokens, found.logprobs, "finished")))
    return answers


def send(trial: Trial, engine: Crowd, side: Side) -> None:
    """A refit as a trainer makes it, the prefix cache reset included."""
    engine.refit(side.weights.items(), trial.transport)
    engine.reset_prefix_cache()


def pairs(answers: Sequence[Answer], old: Side, new: Side) -> list[Pair]:
    """Of each answer the engine's log-probabilities and those of the oracles of their time."""
    begun = scored(old.oracle, [(one.prompt, one.before.tokens) for one in answers])
    rest = scored(new.oracle, [(one.prompt + one.before.tokens, one.rest) for one in answers])
    return [
        (answer.logprobs, [*one, *other])
        for answer, one, other in zip(answers, begun, rest, strict=True)
    ]


def scored(
    oracle: Oracle, jobs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """What an oracle says of the tokens behind each prompt, in batches of like lengths."""
    found: list[list[float]] = [[] for _ in jobs]
    order = sorted(
        (number for number, (_, tokens) in enumerate(jobs) if tokens),
        key=lambda number: sum(map(len, jobs[number])),
    )
    for begin in range(0, len(order), ROWS):
        rows = order[begin : begin + ROWS]
        scores = oracle.scores([jobs[row][0] for row in rows], [jobs[row][1] for row in rows])
        for row, (logprobs, _) in zip(rows, scores, strict=True):
            found[row] = logprobs
    return found


def hold(found: Rush, old: Side, new: Side, bound: float, metrics: Metrics) -> None:
    """Hold the answers of a round to the oracles of the weights of their time.

    Controls: there are some of each kind; an answer disagrees with the oracle of the other weights,
    and with its own where it is taken for that of another prompt; and of one prompt there are
    several.

    Raises:
        Failed: an answer is over the bound, or a control is not.
    """
    metrics["kinds"] = {kind: found.kinds[kind] for kind in KINDS}
    for kind, count in metrics["kinds"].items():
        if count < len(found.answers) // FEW:
            raise Failed(f"control: {count} requests were of the kind {kind!r}", metrics)
    for kind, when in KINDS.items():
        answers = [one for one in found.answers if one.kind == kind and one.logprobs]
        agree(answers, pairs(answers, old, new), bound, when, metrics)
        if kind == "after":
            sample = answers[:ROWS]
            strange = mean_of(pairs(sample, new, old))
            metrics["stranger_divergence"] = strange
            if strange <= bound:
                what = "control: the first weights explain what was answered by the second"
                raise Failed(what, metrics)
            metrics["crossed_divergence"] = crossed(sample, new)
            if metrics["crossed_divergence"] <= bound:
                what = "control: an answer under another's name would not be seen"
                raise Failed(what, metrics)
    if not sampled(found.answers):
        raise Failed("control: all answers to a prompt are the same: none was sampled", metrics)


def agree(
    answers: Sequence[Answer], judged: Sequence[Pair], bound: float, when: str, metrics: Metrics
) -> None:
    """Hold each answer that is long enough to the bound, and all of a kind together.

    Raises:
        Failed: one of them is over it, or all are.
    """
    long = [
        (divergence(*pair), answer.before.asked.name)
        for answer, pair in zip(answers, judged, strict=True)
        if len(answer.logprobs) >= ENOUGH
    ]
    worst, name = max([*long, (mean_of(judged), f"all {len(answers)}")])
    metrics["divergence"] = max(metrics.get("divergence", 1.0), mean_of(judged))
    metrics["worst_request"] = max(metrics["worst_request"], worst)
    if not worst <= bound:
        which = f"{name}: {worst:.3f}, where {bound} is the most"
        raise Failed(f"{when}, requests diverge from the float32 oracle ({which})", metrics)


def crossed(answers: Sequence[Answer], side: Side) -> float:
    """The least divergence of an answer that is taken for that of another prompt."""
    wrong = [
        (one, next(other for other in answers if other.prompt != one.prompt)) for one in answers
    ]
    found = scored(side.oracle, [(other.prompt, one.rest) for one, other in wrong])
    return min(
        divergence(one.logprobs, other) for (one, _), other in zip(wrong, found, strict=True)
    )


def sampled(answers: Sequence[Answer]) -> bool:
    """Whether some prompt has two answers that begin differently."""
    begun: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for answer in answers:
        if len(answer.before.tokens) >= BEGINNING:
            begun.setdefault(answer.prompt, set()).add(answer.before.tokens[:BEGINNING])
    return any(len(different) > 1 for different in begun.values())


def steady(first: Usage, second: Usage, device: str, metrics: Metrics) -> None:
    """Hold what the engine has after the second round to what it had after the first.

    Raises:
        Failed: it has more.
    """
    growth = GROWTH_CPU if device == "cpu" else GROWTH
    for key, what, before, after, most in (
        ("growth_bytes", "bytes of memory", first.memory, second.memory, growth),
        ("growth_files", "open files", first.files, second.files, FILES),
        ("growth_shared", "bytes of shared memory", first.shared, second.shared, SHARED),
    ):
        metrics[key] = max(0, after - before)
        if metrics[key] > most:
            raise Failed(
                f"after as many requests again it holds {metrics[key]} more {what}", metrics
            )

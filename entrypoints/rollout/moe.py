"""The check `moe`: a mixture of experts, refitted by Hugging Face's names and put to sleep.

It makes a probe of its own (:mod:`rollout.moe_probe`) and starts an engine of its own, because the
one of the other checks serves a dense model. An engine keeps the experts of a layer in one fused
parameter, so a refit has to find the place of each; what it holds is compared tensor by tensor, and
what it answers with the oracle. Weights in fp8 are not looked at.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import moe_faults, moe_probe, probe
from rollout.backends import KV_CACHE, WEIGHTS, Completion, apart
from rollout.checks import (
    FREED,
    Failed,
    Metrics,
    Trial,
    agree,
    freed_enough,
    holding,
    named,
    timed,
)
from rollout.moe_oracle import MoeOracle
from rollout.oracle import BOUND_BF16

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SEED, OTHER_SEED = 20261129, 20261130
PROMPTS = 8
# Of a router's logits: what rounding to bfloat16 moves them by is a tenth of it at most, as
# `rollout.moe_calibrate` measures.
CLEAR = 0.25
NOT_THESE = "the output is not that of these experts"


@contextmanager
def prepared(
    facts: Mapping[str, Any], transports: Sequence[str], fault: str | None
) -> Iterator[Trial]:
    """Probe, oracles, and an engine that is not started yet; it is stopped at the end.

    ``facts`` is the image.json, ``transports`` those of its refits that can be shown here.
    """
    import torch

    device = "cuda" if facts["cuda"] else "cpu"
    config = moe_probe.config("gpu" if facts["cuda"] else "tiny")
    if not facts["cuda"]:
        torch.set_num_threads(1)  # as in the engine's process: for a tiny model more is slower

    def made(seed: int) -> dict[str, torch.Tensor]:
        found = moe_probe.weights(config, seed)
        return {name: tensor.to(device) for name, tensor in found.items()}

    with tempfile.TemporaryDirectory(prefix="rollout-moe-") as folder:
        # An engine that starts on dummy weights reads none.
        probe.save(Path(folder), config, {})
        weights, others = made(SEED), made(OTHER_SEED)
        trial = Trial(
            engine=moe_faults.wrapped(apart("moe", facts["backend"]), fault),
            model=Path(folder),
            weights=weights,
            others=others,
            oracle=MoeOracle(config, weights, device),
            other_oracle=MoeOracle(config, others, device),
            prompts=probe.prompts(config, SEED, PROMPTS),
            cycles=1,
            bound=BOUND_BF16,
            sleep_levels=facts["smoke"]["sleep_levels"],
            transports=transports,
            device=device,
        )
        try:
            yield trial
        finally:
            trial.engine.stop()


def moe(trial: Trial) -> Metrics:
    """A mixture of experts is refitted, asleep and refitted again, and answers as the oracle says.

    By each transport, and from each level of sleep. Control: dummy weights must diverge, and after
    a refit the oracle of the weights before it; every expert must be chosen by some token, and no
    choice of the router may be so close that rounding could turn it.
    """
    metrics = Metrics()
    level = min(trial.sleep_levels)
    metrics["start_seconds"] = timed(
        lambda: trial.engine.start(trial.model, dummy=True, level=level)
    )
    metrics["control_divergence"] = trial.divergence(trial.alone(), trial.oracle)
    if metrics["control_divergence"] <= trial.bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)
    expected: list[Completion] = []
    for transport in trial.transports:
        first = sent(trial, metrics, trial.weights, transport)
        if expected and first != expected:
            raise Failed(f"by {transport} {NOT_THESE}: the same weights gave others", metrics)
        expected = first
        sent(trial, metrics, trial.others, transport)
    seconds = timed(lambda: trial.refit(trial.weights))
    metrics["refit_seconds"] = seconds
    chosen(trial, metrics, expected)
    if trial.fresh() != expected:
        raise Failed("the first weights, sent again, do not bring the first output back", metrics)
    for each in sorted(trial.sleep_levels):
        slept(trial, metrics, each)
    return metrics


def sent(
    trial: Trial, metrics: Metrics, weights: Mapping[str, torch.Tensor], transport: str
) -> list[Completion]:
    """Refit, and judge what is held and what is answered; returns the answers one by one.

    Control: the oracle of the other weights, which were there before or come next, must disagree.
    """
    ours = weights is trial.weights
    judge, stranger = trial.oracle, trial.other_oracle
    judge, stranger = (judge, stranger) if ours else (stranger, judge)
    key = "" if ours else "other_"
    metrics["bytes"] = trial.refit(weights, transport)
    metrics["tensors"] = len(weights)
    wrong = trial.differing(weights)
    metrics["tensors_wrong"] = len(wrong)
    if wrong:
        what = f"by {transport} the engine does not hold what was sent: {named(wrong)}"
        raise Failed(what, metrics)
    found = trial.fresh()
    what = f"by {transport} the digests agree, yet {NOT_THESE}"
    agree(trial.judged(found, judge), trial.bound, what, metrics, key)
    # In one batch, where every expert has tokens of several requests.
    agree(trial.judged(trial.together(), judge), trial.bound, what, metrics, f"{key}batch_")
    metrics[f"{key}stranger_divergence"] = trial.divergence(found, stranger)
    if metrics[f"{key}stranger_divergence"] <= trial.bound:
        raise Failed("control: the oracle of other weights agrees with these", metrics)
    return found


def chosen(trial: Trial, metrics: Metrics, answers: Sequence[Completion]) -> None:
    """Note which experts these answers went through, and by how much they were chosen.

    Raises:
        Failed: an expert was never chosen, so nothing is shown of it; or a choice was close.
    """
    metrics["margin"] = math.inf
    tokens = [answer.tokens for answer in answers]
    for judge in (trial.oracle, trial.other_oracle):
        assert isinstance(judge, MoeOracle)  # noqa: S101 - for mypy
        found = judge.routes(trial.prompts, tokens)
        metrics["margin"] = min(metrics["margin"], found.margin)
        metrics["experts"] = sum(map(len, found.chosen))
        metrics["least_chosen"] = min(map(min, found.chosen))
        if found.never:
            raise Failed(f"control: no token chooses the experts {named(found.never)}", metrics)
        if metrics["margin"] < CLEAR:
            what = f"a choice of the router leads by {metrics['margin']:.2f} only"
            raise Failed(f"control: {what}; rounding could turn it", metrics)


def slept(trial: Trial, metrics: Metrics, level: int) -> None:
    """Sleep to a level and wake; after level 2 the weights are sent again.

    Control: awake nothing may count as freed; after level 2 no weight may have survived.
    """
    engine, at = trial.engine, f"level {level}"
    trial.prepare(level)
    held = holding(trial, metrics)
    before = engine.memory()
    if freed_enough(before, engine.memory(), held):
        raise Failed("control: memory counts as freed while the engine is awake", metrics)
    expected = trial.fresh()  # some have started anew for this level
    agree(trial.judged(expected, trial.oracle), trial.bound, f"{at}: {NOT_THESE}", metrics)
    before = engine.memory()
    engine.sleep(level)
    asleep = engine.memory()
    metrics[f"freed_fraction_{level}"] = (before - asleep) / held
    if not freed_enough(before, asleep, held):
        share = f"{metrics[f'freed_fraction_{level}']:.0%} of {held >> 20} MiB"
        raise Failed(f"{at}: sleep freed only {share}", metrics)
    trial.train(int(FREED * held))
    engine.wake((WEIGHTS,))
    if level == 2:
        kept = set(trial.weights) - set(trial.differing(trial.weights))
        if kept:
            what = f"weights survived it: {named(sorted(kept))}"
            raise Failed(f"control: {at}: {what}", metrics)
        trial.send(trial.weights)
    engine.wake((KV_CACHE,))
    wrong = trial.differing(trial.weights)
    if wrong:
        raise Failed(f"{at}: awake, the engine holds wrong tensors: {named(wrong)}", metrics)
    if trial.fresh() != expected:
        raise Failed(f"{at}: the weights are right, and the output is another", metrics)

"""The check of a trainer that has GPUs of its own, and of an engine that is divided among two.

The engine is one of its own, ``rollout.backends.disaggregated_<backend>``. Beside one GPU of the
trainer it takes weights by NCCL and from disk; divided among both, from disk and, for each worker,
from memory on the worker's own GPU.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rollout.backends import Engine, apart, backend_of
from rollout.checks import Failed, Metrics, Trial, agree, named, rate, timed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rollout.oracle import Oracle

NCCL, DISK, HANDLES = "nccl", "disk", "cuda-ipc"
BESIDE, DIVIDED = (NCCL, DISK), (DISK, HANDLES)
GPUS = 2  # the trainer's and the engine's
# The faults that are made in a worker, for this check to find.
LOST_BROADCAST, STALE_RANK = "lost-broadcast", "stale-rank"
FAULTS = (LOST_BROADCAST, STALE_RANK)


def disaggregated(trial: Trial) -> Metrics:
    """Weights arrive by each way of a trainer that is not on the engine's GPU.

    Controls: before the first refit the engine, started on dummy weights, must diverge from the
    oracle; and before each further one it must hold, or answer as, the other set of weights.
    """
    own = trial.engine
    own.stop()
    trial.engine = engine = elsewhere(own)
    if trial.fault in FAULTS:
        engine.inject(str(trial.fault))
    metrics = Metrics(gpus=GPUS)
    try:
        beside(trial, metrics)
        engine.stop()
        divided(trial, metrics)
    finally:
        engine.stop()
        trial.engine = own
    return metrics


def elsewhere(engine: Engine) -> Engine:
    """The engine of this check, of the backend that this one is of; not started yet."""
    within = engine
    while hasattr(within, "within"):  # one with a fault
        within = within.within
    made: Engine = apart("disaggregated", backend_of(within))
    return made


def sets(trial: Trial) -> tuple[tuple[Mapping[str, torch.Tensor], Oracle], ...]:
    """The two sets of weights, each with its oracle, in the order in which they are sent."""
    return (trial.weights, trial.oracle), (trial.others, trial.other_oracle)


def begin(trial: Trial, metrics: Metrics, gpus: int, key: str) -> None:
    """Start on dummy weights, which the oracle must tell from those that are to come."""
    metrics[f"{key}start_seconds"] = timed(
        lambda: trial.engine.start(
            trial.model, dummy=True, level=min(trial.sleep_levels, default=1), gpus=gpus
        )
    )
    metrics[f"{key}control_divergence"] = trial.divergence(trial.together(), trial.oracle)
    if metrics[f"{key}control_divergence"] <= trial.bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)


def beside(trial: Trial, metrics: Metrics) -> None:
    """An engine on one GPU, the trainer on the other: both sets by each way, byte for byte."""
    begin(trial, metrics, 1, "")
    for transport in BESIDE:
        for weights, judge in sets(trial):
            if not trial.differing(weights):
                what = f"control: the engine held what was to be sent by {transport}"
                raise Failed(what, metrics)
            seconds = moved(trial, weights, transport, metrics)
            wrong = trial.differing(weights)
            if wrong:
                what = f"by {transport} the engine does not hold what was sent: {named(wrong)}"
                raise Failed(what, metrics)
            what = f"sent by {transport}: the digests agree, the output is not that of the weights"
            agree(trial.judged(trial.together(), judge), trial.bound, what, metrics)
        # Of the second time: the first has in it what is made once.
        metrics[rate(transport)] = metrics["bytes"] / seconds / 1e9


def moved(
    trial: Trial, weights: Mapping[str, torch.Tensor], transport: str, metrics: Metrics
) -> float:
    """A refit: notes its bytes, and returns its seconds."""
    start = time.perf_counter()
    metrics["bytes"] = trial.refit(weights, transport)
    return time.perf_counter() - start


def divided(trial: Trial, metrics: Metrics) -> None:
    """An engine on both GPUs: a worker holds a part of each tensor, so its answers are judged."""
    begin(trial, metrics, GPUS, "divided_")
    for transport in DIVIDED:
        for weights, judge in sets(trial):
            seconds = moved(trial, weights, transport, metrics)
            what = f"on {GPUS} GPUs, sent by {transport}, the output is not that of the weights"
            agree(trial.judged(trial.together(), judge), trial.bound, what, metrics, "divided_")
        metrics[f"divided_{rate(transport)}"] = metrics["bytes"] / seconds / 1e9

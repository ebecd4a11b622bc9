"""The checks of the proof. They drive any engine through its protocol and know none by name.

A check measures, compares and returns its metrics, or raises :class:`Failed`. Each first shows by a
negative control that it can fail: the same criterion, applied where it must not hold.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import KV_CACHE, WEIGHTS, Completion, Engine
from rollout.oracle import BOUND_FP8, Oracle
from rollout.oracle import divergence as mean_divergence
from rollout.transport import as_bytes

if TYPE_CHECKING:
    import torch

Metrics = dict[str, Any]
_HASHERS = 8  # threads; hashing is the slowest part of a proof
TOKENS = 16  # generated for each prompt: one KV block more than the prompt has
FREED = 0.90  # of what the engine held, at least, while it sleeps
GROWTH = 0.02  # of what the engine held, at most, over all cycles


class Failed(Exception):
    """A check failed: the reason in one sentence, and what was measured up to then."""

    def __init__(self, reason: str, metrics: Metrics) -> None:
        super().__init__(reason)
        self.reason = reason
        self.metrics = metrics


@dataclass
class Trial:
    """What the checks work on: an engine, two sets of weights, prompts, and two oracles.

    The weights lie on ``device``, where a trainer has them: ``cpu`` or ``cuda``.
    """

    engine: Engine
    model: Path
    weights: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor]
    oracle: Oracle
    other_oracle: Oracle
    prompts: Sequence[Sequence[int]]
    cycles: int
    bound: float
    sleep_levels: Sequence[int]
    fault: str | None = None
    device: str = "cpu"
    calm: float = 1.0  # the probe's factor for its lm_head in fp8; see CALM in smoke.py
    _digests: dict[int, dict[str, str]] = field(default_factory=dict)

    def alone(self) -> list[Completion]:
        """Each prompt in a batch of its own: the only way that repeats to the bit."""
        return [self.engine.generate([prompt], TOKENS)[0] for prompt in self.prompts]

    def fresh(self) -> list[Completion]:
        """:meth:`alone` from an empty prefix cache.

        A prompt whose beginning is in the cache is computed in another shape than one that is not,
        so only runs from the same state are the same to the bit.
        """
        self.engine.reset_prefix_cache()
        return self.alone()

    def together(self) -> list[Completion]:
        """All prompts in one batch."""
        return self.engine.generate(self.prompts, TOKENS)

    def divergence(
        self, completions: Sequence[Completion], judge: Oracle, scale: float = 1.0
    ) -> float:
        """Mean exp(|Δ log-probability|) of the engine's own tokens against an oracle."""
        ours, theirs = [], []
        for prompt, completion in zip(self.prompts, completions, strict=True):
            ours += list(completion.logprobs)
            theirs += judge.logprobs(list(prompt), list(completion.tokens), scale)
        return mean_divergence(ours, theirs)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> int:
        """A refit as a trainer makes it, the prefix cache reset included; returns bytes."""
        moved = self.engine.refit(weights.items())
        self.engine.reset_prefix_cache()
        return moved

    def calmed(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights with their lm_head as small as the check of fp8 needs it."""
        if self.calm == 1.0:
            return dict(weights)
        return {**weights, "lm_head.weight": weights["lm_head.weight"] * self.calm}

    def differing(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of the tensors that the engine does not hold as they were sent."""
        sent = self._digests.get(id(weights))
        if sent is None:  # once for each set: nobody writes into these tensors
            with ThreadPoolExecutor(_HASHERS) as pool:
                sent = dict(zip(weights, pool.map(digest, weights.values()), strict=True))
            self._digests[id(weights)] = sent
        found = self.engine.digests()
        return sorted(name for name, value in sent.items() if found.get(name) != value)

    def train(self, size: int) -> None:
        """Use memory as a training step does, while the engine sleeps: take it and fill it.

        What was freed can then really be used, and what the engine thinks it still has is gone.
        """
        import torch

        filled = torch.full((size,), 0xA5, dtype=torch.uint8, device=self.device)
        del filled
        if self.device != "cpu":
            torch.cuda.empty_cache()


def digest(tensor: torch.Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    return hashlib.sha256(memoryview(as_bytes(tensor).cpu().numpy())).hexdigest()


def size_of(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def named(names: Sequence[str]) -> str:
    """At most three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def refit(trial: Trial) -> Metrics:
    """Weights arrive whole, change the output, and leave no stale cache behind.

    Control: before the refit the engine, started on dummy weights, must hold other tensors and
    diverge from the oracle; without a reset the prefix cache must be seen to be stale.
    """
    engine, metrics = trial.engine, Metrics()
    metrics["control_divergence"] = trial.divergence(trial.alone(), trial.oracle)
    if metrics["control_divergence"] <= trial.bound or not trial.differing(trial.weights):
        raise Failed("control: the engine had the weights before they were sent", metrics)

    start = time.perf_counter()
    metrics["bytes"] = trial.refit(trial.weights)
    metrics["first_refit_seconds"] = time.perf_counter() - start
    metrics["tensors"] = len(trial.weights)
    wrong = trial.differing(trial.weights)
    metrics["tensors_wrong"] = len(wrong)
    if wrong:
        raise Failed(f"the engine does not hold what was sent: {named(wrong)}", metrics)
    first = trial.alone()
    metrics["divergence"] = trial.divergence(first, trial.oracle)
    if metrics["divergence"] > trial.bound:
        raise Failed("the digests agree, yet the output is not that of these weights", metrics)

    # The prompts are in the prefix cache now. Other weights without a reset: stale.
    engine.refit(trial.others.items())
    metrics["stale_divergence"] = trial.divergence(trial.alone(), trial.other_oracle)
    if metrics["stale_divergence"] <= trial.bound:
        raise Failed("control: a stale prefix cache would not be seen by these prompts", metrics)
    engine.reset_prefix_cache()
    second = trial.alone()
    metrics["other_divergence"] = trial.divergence(second, trial.other_oracle)
    if metrics["other_divergence"] > trial.bound:
        raise Failed("after a refit and a reset the prefix cache is still stale", metrics)
    if [c.tokens for c in first] == [c.tokens for c in second]:
        raise Failed("other weights gave the same tokens", metrics)

    # Timed now that both sides have done it: the first has what is made once in it.
    metrics["refit_seconds"] = timed(lambda: trial.refit(trial.weights))
    metrics["gb_per_s"] = metrics["bytes"] / metrics["refit_seconds"] / 1e9
    metrics["copy_gb_per_s"] = copy_bandwidth(trial.device)
    if trial.alone() != first:
        raise Failed("the first weights, sent again, do not bring the first output back", metrics)
    return metrics


def generation(trial: Trial) -> Metrics:
    """One at a time greedy decoding repeats to the bit; in a batch the oracle agrees.

    Control: the oracle of other weights must not agree.
    """
    metrics = Metrics()
    judge, stranger = trial.oracle, trial.other_oracle
    if trial.fault == "oracle-of-other-weights":
        judge = stranger
    batch = trial.together()
    metrics["batch_seconds"] = timed(trial.together)
    metrics["tokens_per_s"] = TOKENS * len(batch) / metrics["batch_seconds"]
    metrics["control_divergence"] = trial.divergence(batch, stranger)
    if metrics["control_divergence"] <= trial.bound:
        raise Failed(
            "control: the oracle of other weights agrees, so agreeing says nothing", metrics
        )
    metrics["divergence"] = trial.divergence(batch, judge)
    metrics["bound"] = trial.bound
    if metrics["divergence"] > trial.bound:
        raise Failed("a batch diverges from the float32 oracle of the same weights", metrics)
    if trial.fresh() != trial.fresh():
        raise Failed("one request at a time, greedy, gave two different answers", metrics)
    return metrics


def freed_enough(before: int, asleep: int, held: int) -> bool:
    """The criterion of sleeping: enough of what the engine held is free (all in bytes)."""
    return before - asleep >= FREED * held


def sleep_1(trial: Trial) -> Metrics:
    """Level 1, several cycles: memory is freed and restored, nothing grows, output is identical.

    Control: between two readings without a sleep, the criterion must not hold.
    """
    engine = trial.engine
    held, before = engine.held(), engine.memory()
    weights = size_of(trial.weights)
    metrics: Metrics = {"held_bytes": held, "weights_bytes": weights, "cycles": trial.cycles}
    if freed_enough(before, engine.memory(), held):
        raise Failed("control: memory counts as freed while the engine is awake", metrics)
    expected = trial.fresh()
    asleep_bytes, awake_bytes, sleeps, wakes, fractions = [], [], [], [], []
    for cycle in range(1, trial.cycles + 1):
        awake = engine.memory()
        sleeps.append(timed(lambda: engine.sleep(1)))
        asleep = engine.memory()
        fractions.append((awake - asleep) / held)
        metrics["freed_fraction"] = min(fractions)
        if not freed_enough(awake, asleep, held):
            share = f"{fractions[-1]:.0%} of {held >> 20} MiB"
            raise Failed(f"cycle {cycle}: sleep freed only {share}", metrics)
        trial.train(int(FREED * held))
        wakes.append(timed(lambda: engine.wake((WEIGHTS, KV_CACHE))))
        asleep_bytes.append(asleep)
        awake_bytes.append(engine.memory())
        metrics["restored_fraction"] = (awake_bytes[-1] - asleep) / held
        if metrics["restored_fraction"] < FREED:
            raise Failed(f"cycle {cycle}: wake took only part of the memory again", metrics)
        if trial.alone() != expected:
            raise Failed(f"cycle {cycle}: after waking the output is another", metrics)
    # The first cycle is left out: buffers that are made once are no growth.
    growth = max(series[-1] - series[0] for series in (asleep_bytes, awake_bytes))
    metrics["growth_bytes"] = growth
    metrics["first_sleep_seconds"] = sleeps[0]
    metrics["sleep_seconds"] = min(sleeps)
    metrics["wake_seconds"] = min(wakes)
    # The weights are what is copied; a KV cache is dropped.
    metrics["sleep_gb_per_s"] = weights / min(sleeps) / 1e9
    metrics["wake_gb_per_s"] = weights / min(wakes) / 1e9
    metrics["to_host_gb_per_s"], metrics["from_host_gb_per_s"] = host_bandwidths(trial.device)
    if growth > GROWTH * held:
        raise Failed(f"memory grew by {growth >> 20} MiB over {trial.cycles} cycles", metrics)
    return metrics


def sleep_2(trial: Trial) -> Metrics:
    """Level 2 discards the weights; a refit after waking brings the output back, buffers included.

    Control: after waking and before the refit, weights and output must be gone.
    """
    engine = trial.engine
    held, expected, before = engine.held(), trial.fresh(), engine.memory()
    metrics: Metrics = {"held_bytes": held}
    metrics["sleep_seconds"] = timed(lambda: engine.sleep(2))
    asleep = engine.memory()
    metrics["freed_fraction"] = (before - asleep) / held
    if not freed_enough(before, asleep, held):
        raise Failed(f"sleep freed only {metrics['freed_fraction']:.0%} of what was held", metrics)
    trial.train(int(FREED * held))
    metrics["wake_seconds"] = timed(lambda: engine.wake((WEIGHTS, KV_CACHE)))
    kept = set(trial.weights) - set(trial.differing(trial.weights))
    metrics["tensors_kept"] = len(kept)
    if kept:
        raise Failed(f"control: weights survived a level-2 sleep: {named(sorted(kept))}", metrics)
    engine.reset_prefix_cache()
    metrics["control_divergence"] = trial.divergence(trial.alone(), trial.oracle)
    if metrics["control_divergence"] <= trial.bound:
        raise Failed("control: without weights the output is still right", metrics)
    trial.refit(trial.weights)
    wrong = trial.differing(trial.weights)
    if wrong:
        raise Failed(f"the refit after waking left wrong tensors: {named(wrong)}", metrics)
    after = trial.alone()
    metrics["divergence"] = trial.divergence(after, trial.oracle)
    if after != expected:
        lost = "; the weights are right, so a buffer was lost"
        raise Failed("after level 2, waking and a refit the output is another" + lost, metrics)
    return metrics


def cycle(trial: Trial) -> Metrics:
    """The training loop's order, three times: sleep, wake weights, refit, wake KV cache, generate.

    Control: before each refit the engine must hold other weights than those to come.
    """
    engine, metrics = trial.engine, Metrics()
    level = max(trial.sleep_levels)
    metrics["level"] = level
    divergences, seconds = [], []
    turns = ((trial.others, trial.other_oracle), (trial.weights, trial.oracle))
    for turn in range(3):
        weights, judge = turns[turn % 2]
        start = time.perf_counter()
        engine.sleep(level)
        engine.wake((WEIGHTS,))
        seconds.append(time.perf_counter() - start)
        if not trial.differing(weights):
            raise Failed(f"control: turn {turn + 1} had its weights before the refit", metrics)
        start = time.perf_counter()
        engine.refit(weights.items())
        engine.wake((KV_CACHE,))
        engine.reset_prefix_cache()
        seconds[-1] += time.perf_counter() - start
        wrong = trial.differing(weights)
        if wrong:
            raise Failed(f"turn {turn + 1}: wrong tensors after the refit: {named(wrong)}", metrics)
        divergences.append(trial.divergence(trial.together(), judge))
        metrics["divergence"] = max(divergences)
        if divergences[-1] > trial.bound:
            raise Failed(f"turn {turn + 1}: output is not that of the weights sent", metrics)
    metrics["turn_seconds"] = max(seconds)
    return metrics


def fp8(trial: Trial) -> Metrics:
    """A second start with weights in 8 bits: refitted from bfloat16, asleep, and refitted again.

    Control: before the refit the engine, started on dummy weights, must diverge from the oracle,
    and so must the oracle of other weights after it.
    """
    engine, bound, metrics = trial.engine, BOUND_FP8, Metrics(bound=BOUND_FP8)
    weights, others = trial.calmed(trial.weights), trial.calmed(trial.others)

    def divergence(completions: Sequence[Completion], judge: Oracle) -> float:
        return trial.divergence(completions, judge, trial.calm)

    engine.stop()
    metrics["start_seconds"] = timed(lambda: engine.start(trial.model, dummy=True, fp8=True))
    metrics["control_divergence"] = divergence(trial.alone(), trial.oracle)
    if metrics["control_divergence"] <= bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)
    metrics["refit_seconds"] = timed(lambda: trial.refit(others))
    found = trial.fresh()
    metrics["other_divergence"] = divergence(found, trial.other_oracle)
    metrics["stranger_divergence"] = divergence(found, trial.oracle)
    if metrics["stranger_divergence"] <= bound:
        raise Failed("control: the oracle of other weights agrees", metrics)
    trial.refit(weights)
    first = trial.fresh()
    metrics["divergence"] = divergence(first, trial.oracle)
    if max(metrics["divergence"], metrics["other_divergence"]) > bound:
        raise Failed("weights in fp8 diverge from the float32 oracle of the same weights", metrics)
    before = engine.memory()
    engine.sleep(max(trial.sleep_levels))
    metrics["freed_fraction"] = (before - engine.memory()) / engine.held()
    trial.train(int(FREED * engine.held()))
    engine.wake((WEIGHTS,))
    engine.refit(weights.items())
    engine.wake((KV_CACHE,))
    if trial.fresh() != first:
        raise Failed("after sleeping and a refit the output is another", metrics)
    return metrics


def copy_bandwidth(device: str, size: int = 256 << 20) -> float:
    """GB/s of copying memory on a device, the yardstick of a refit (best of five)."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    return _rate(source, torch.empty_like(source))


def host_bandwidths(device: str, size: int = 256 << 20) -> tuple[float, float]:
    """GB/s of copies from a device to main memory and back, the yardstick of sleep and wake.

    On a GPU from and to pinned memory; on a CPU both are a copy within main memory.
    """
    import torch

    host = torch.zeros(size, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    return _rate(there, host), _rate(host, there)


def _rate(source: torch.Tensor, target: torch.Tensor) -> float:
    import torch

    def copy() -> None:
        target.copy_(source)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return float(source.numel()) / min(timed(copy) for _ in range(5)) / 1e9


# In the order in which they run: the engine starts on dummy weights, and the refit fills it.
CHECKS: dict[str, Callable[[Trial], Metrics]] = {
    "refit": refit,
    "generation": generation,
    "sleep-1": sleep_1,
    "sleep-2": sleep_2,
    "cycle": cycle,
    "fp8": fp8,
}

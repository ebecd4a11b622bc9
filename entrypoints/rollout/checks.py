"""The checks of the proof. They drive any engine through its protocol and know none by name.

A check measures, compares and returns its metrics, or raises :class:`Failed`. Each first shows by a
negative control that it can fail: the same criterion, applied where it must not hold.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.backends import KV_CACHE, WEIGHTS, Completion, Engine, EngineError, Served
from rollout.oracle import BOUND_FP8, Oracle
from rollout.oracle import divergence as mean_divergence
from rollout.transport import as_bytes

if TYPE_CHECKING:
    import torch

Metrics = dict[str, Any]
Pair = tuple[Sequence[float], Sequence[float]]  # log-probabilities: the engine's, an oracle's
_HASHERS = 8  # threads; hashing is the slowest part of a proof
TOKENS = 16  # generated for each prompt: one KV block more than the prompt has
ROLLOUT = 128  # tokens of a rollout that is interrupted
INTERRUPTED = 16  # tokens that each has when it is
TURNS = 3  # of a conversation
TOOL = 24  # tokens of a tool's answer between two turns
# Natural log-probability by which the oracle may prefer one of two answers where they part: in
# bfloat16 either may win a tie, and a prompt computed at once is rounded otherwise than its tokens
# one by one. Twice a token's noise, for each answer has its own: at most 0.09 in thousands of
# tokens on an H200. What is lost or wrong parts by whole units.
TIE = 0.2
PAUSE = 1.0  # seconds at least that a paused server is given to answer what it must not
REFUSED = "with 503"  # what a server answers in a pause that holds no requests
AGAIN = 0.1  # seconds until somebody who was refused asks again
CHECKPOINT = "disk"  # the transport of a trainer that shares nothing with the server but files
IMBALANCE = 0.3  # by how much of the first GPU's free memory the second has less
FREED = 0.90  # of what the engine held, at least, while it sleeps
# Bytes that may be kept in a cycle: a few of the granules in which memory is given, 2 MiB by CUDA
# and a page by a kernel. A share of what is held would be 40 MB of a training step, and a night has
# ten thousand of them.
GROWTH = 6 << 20
GROWTH_CPU = 1 << 20


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
    transports: Sequence[str] = ()  # of a refit; the first one serves all other checks
    serve: Callable[[], Served] | None = None  # the engine's own server
    fault: str | None = None
    device: str = "cpu"
    reuse: str = "turns"  # what a prefix cache keeps of a request: all of it, or "prompts" alone
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

    def judged(
        self, completions: Sequence[Completion], judge: Oracle, scale: float = 1.0
    ) -> list[Pair]:
        """Of each answer the engine's log-probabilities and those of an oracle, token by token."""
        return [
            (answer.logprobs, judge.logprobs(list(prompt), list(answer.tokens), scale))
            for prompt, answer in zip(self.prompts, completions, strict=True)
        ]

    def divergence(
        self, completions: Sequence[Completion], judge: Oracle, scale: float = 1.0
    ) -> float:
        """Mean exp(|Δ log-probability|) of the engine's own tokens against an oracle."""
        return mean_of(self.judged(completions, judge, scale))

    @property
    def transport(self) -> str:
        """By what weights are sent where a check names nothing: promised, never another."""
        return self.transports[0] if self.transports else ""

    def send(self, weights: Mapping[str, torch.Tensor], transport: str = "") -> int:
        """Weights as they are sent, with nothing done for the prefix cache; returns bytes."""
        return self.engine.refit(weights.items(), transport or self.transport)

    def refit(self, weights: Mapping[str, torch.Tensor], transport: str = "") -> int:
        """A refit as a trainer makes it, the prefix cache reset included; returns bytes."""
        moved = self.send(weights, transport)
        self.engine.reset_prefix_cache()
        return moved

    def prepare(self, level: int) -> Metrics:
        """Have an engine that can sleep to this level, with the weights of this trial.

        Some decide at their start whether they keep a copy of the weights; those start anew, and
        the seconds of that are returned as a metric.
        """
        if level in self.engine.levels:
            return {}
        self.engine.stop()
        seconds = timed(lambda: self.engine.start(self.model, dummy=True, level=level))
        self.refit(self.weights)
        return {"start_seconds": seconds}

    def parted(self, prompt: Sequence[int], one: Sequence[int], two: Sequence[int]) -> float:
        """How sure the oracle is of one token more than of the other where two answers part.

        In natural log-probability; 0 where they do not. Different lengths part for certain.
        """
        where = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), None)  # noqa: B905
        if where is None:
            return 0.0 if len(one) == len(two) else math.inf
        first, second = (
            self.oracle.logprobs(prompt, answer[: where + 1])[-1] for answer in (one, two)
        )
        return abs(first - second)

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


def mean_of(pairs: Sequence[Pair]) -> float:
    """Mean exp(|Δ log-probability|) over the tokens of all requests."""
    ours = [value for one, _ in pairs for value in one]
    return mean_divergence(ours, [value for _, other in pairs for value in other])


def agree(
    pairs: Sequence[Pair], bound: float, reason: str, metrics: Metrics, key: str = ""
) -> None:
    """Hold each request to the bound, and note the mean over all and the worst request.

    A mean over all requests alone would pass where one of them is wrong in every token.

    Raises:
        Failed: a request is over the bound.
    """
    apart = [mean_divergence(*pair) for pair in pairs]
    worst = max(range(len(apart)), key=apart.__getitem__)
    metrics[f"{key}divergence"] = mean_of(pairs)
    metrics[f"{key}worst_request"] = apart[worst]
    if not apart[worst] <= bound:
        which = (
            f"request {worst + 1} of {len(apart)}: {apart[worst]:.3f}, where {bound} is the most"
        )
        raise Failed(f"{reason} ({which})", metrics)


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


def rate(transport: str) -> str:
    """The metric of ``refit`` that is the speed of a transport, and shows that it was tried."""
    return f"{transport.replace('-', '_')}_gb_per_s"


def refit(trial: Trial) -> Metrics:
    """Weights arrive whole, change the output, and leave no stale cache behind.

    Control: before the refit the engine, started on dummy weights, must hold other tensors and
    diverge from the oracle; without a reset the prefix cache must be seen to be stale.
    """
    engine, metrics = trial.engine, Metrics()
    first_way = trial.transport or engine.transports[0]
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
        what = f"by {first_way} the engine does not hold what was sent: {named(wrong)}"
        raise Failed(what, metrics)
    first = trial.alone()
    what = "the digests agree, yet the output is not that of these weights"
    agree(trial.judged(first, trial.oracle), trial.bound, what, metrics)

    # The prompts are in the prefix cache now. Other weights without a reset: stale.
    trial.send(trial.others)
    metrics["stale_divergence"] = trial.divergence(trial.alone(), trial.other_oracle)
    if metrics["stale_divergence"] <= trial.bound:
        raise Failed("control: a stale prefix cache would not be seen by these prompts", metrics)
    engine.reset_prefix_cache()
    second = trial.alone()
    what = "after a refit and a reset the prefix cache is still stale"
    agree(trial.judged(second, trial.other_oracle), trial.bound, what, metrics, "other_")
    if [c.tokens for c in first] == [c.tokens for c in second]:
        raise Failed("other weights gave the same tokens", metrics)

    if engine.witness:
        engine.remember()
    # Timed now that both sides have done it: the first has what is made once in it.
    metrics["refit_seconds"] = timed(lambda: trial.refit(trial.weights))
    metrics[rate(first_way)] = metrics["bytes"] / metrics["refit_seconds"] / 1e9
    metrics["copy_gb_per_s"] = copy_bandwidth(trial.device)
    if trial.alone() != first:
        raise Failed("the first weights, sent again, do not bring the first output back", metrics)
    if engine.witness:
        metrics["witness"] = "the engine's own checker"
        if engine.unchanged():
            raise Failed("control: the engine's own checker takes other weights for these", metrics)
        engine.remember()
    for transport in trial.transports[1:]:
        trial.refit(trial.others, transport)
        wrong = trial.differing(trial.others)
        if wrong:
            raise Failed(
                f"by {transport} the engine does not hold what was sent: {named(wrong)}", metrics
            )
        seconds = timed(lambda transport=transport: trial.refit(trial.weights, transport))  # type: ignore[misc]
        metrics[rate(transport)] = metrics["bytes"] / seconds / 1e9
        wrong = trial.differing(trial.weights)
        if wrong or trial.alone() != first:
            which = named(wrong) or "the digests agree, the output does not"
            raise Failed(f"by {transport} the first weights do not come back: {which}", metrics)
    if engine.witness and not engine.unchanged():
        raise Failed("the digests agree, yet the engine's own checker finds a difference", metrics)
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
    metrics["bound"] = trial.bound
    what = "a batch diverges from the float32 oracle of the same weights"
    agree(trial.judged(batch, judge), trial.bound, what, metrics)
    if trial.fresh() != trial.fresh():
        raise Failed("one request at a time, greedy, gave two different answers", metrics)
    return metrics


def multi_turn(trial: Trial) -> Metrics:
    """A conversation with a tool's answer between its turns: nothing said is computed twice.

    Each turn the engine must take from its prefix cache what both sides said before, to the token
    (or to the block, where its cache shares whole ones), and the oracle must agree with its answer.
    A release known to forget its answers must take exactly the prompts: no more, or it is known
    wrongly. Control: from an empty cache nothing may count as taken, and another tool's answer
    must give another turn.
    """
    engine, block = trial.engine, trial.engine.cache_block
    metrics: Metrics = {"turns": TURNS}
    engine.reset_prefix_cache()
    conversation, said, asked = list(trial.prompts[0]), 0, 0
    reused: list[int] = []
    expected: list[int] = []
    judged: list[Pair] = []
    for turn in range(TURNS):
        completion = engine.generate([conversation], TOKENS)[0]
        # The last token was chosen and never computed: it begins what is new.
        known = max(said - 1, 0) // block * block
        least, most = (known, said) if trial.reuse == "turns" else (asked // block * block, asked)
        if turn == 0 and completion.cached:
            raise Failed("control: an empty prefix cache counts tokens as taken from it", metrics)
        if turn:
            reused.append(completion.cached)
            expected.append(known)
            metrics["reused_tokens"], metrics["of_tokens"] = sum(reused), sum(expected)
            metrics["reuse"] = trial.reuse
            if not least <= completion.cached <= most:
                which = "said" if trial.reuse == "turns" else "asked"
                what = f"{completion.cached} of {least} tokens {which} before"
                raise Failed(f"turn {turn + 1}: {what} came from the cache", metrics)
        judged.append((completion.logprobs, trial.oracle.logprobs(conversation, completion.tokens)))
        asked = len(conversation)
        conversation += completion.tokens
        said = len(conversation)
        conversation += trial.prompts[turn + 1][:TOOL]
    agree(judged, trial.bound, "a later turn diverges from the float32 oracle", metrics)
    last, answer = conversation[:asked], conversation[asked:said]
    engine.reset_prefix_cache()
    cold = engine.generate([last], TOKENS)[0]
    if cold.cached:
        raise Failed("control: an emptied prefix cache counts tokens as taken from it", metrics)
    metrics["parted"] = trial.parted(last, answer, cold.tokens)
    if metrics["parted"] > TIE:
        raise Failed("the last turn is another where nothing came from the cache", metrics)
    other = last[:-TOOL] + list(trial.prompts[-1][:TOOL])
    if engine.generate([other], TOKENS)[0].tokens == cold.tokens:
        raise Failed("control: another answer of the tool gave the same turn", metrics)
    return metrics


def partial_rollout(trial: Trial) -> Metrics:
    """Rollouts stopped half-way and continued from the tokens kept end as if never stopped.

    Control: with one kept token lost, the same comparison must find it.
    """
    engine, metrics = trial.engine, Metrics(tokens=ROLLOUT)
    whole = engine.generate(trial.prompts, ROLLOUT)
    engine.reset_prefix_cache()
    kept = engine.interrupt(trial.prompts, ROLLOUT, INTERRUPTED)
    metrics["kept_tokens"] = [len(part.tokens) for part in kept]
    if not half_way(kept):
        raise Failed("control: the rollouts were not stopped half-way", metrics)
    judged: list[Pair] = []
    partings = []
    for prompt, part, uninterrupted in zip(trial.prompts, kept, whole, strict=True):
        rest = engine.generate([[*prompt, *part.tokens]], ROLLOUT - len(part.tokens))[0]
        tokens = (*part.tokens, *rest.tokens)
        partings.append(trial.parted(prompt, uninterrupted.tokens, tokens))
        judged.append(((*part.logprobs, *rest.logprobs), trial.oracle.logprobs(prompt, tokens)))
    metrics["equal"] = sum(parting == 0.0 for parting in partings)
    metrics["parted"] = max(partings)
    if metrics["parted"] > TIE:
        raise Failed("continued from the tokens kept, a rollout ends otherwise", metrics)
    what = "what was kept and continued diverges from the float32 oracle"
    agree(judged, trial.bound, what, metrics)
    # As many tokens of both: answers of different lengths would part for that alone.
    shorter = [without(part.tokens, INTERRUPTED // 2) for part in kept]
    metrics["control_parted"] = max(
        trial.parted(prompt, uninterrupted.tokens[: len(short)], short)
        for prompt, short, uninterrupted in zip(trial.prompts, shorter, whole, strict=True)
    )
    if metrics["control_parted"] <= TIE:
        raise Failed("control: a lost token would not be seen", metrics)
    return metrics


def half_way(kept: Sequence[Completion]) -> bool:
    """Whether rollouts were stopped where they should be, and none had all its tokens."""
    return all(INTERRUPTED <= len(part.tokens) < ROLLOUT for part in kept)


def without(tokens: Sequence[int], place: int) -> tuple[int, ...]:
    """Tokens less the one at a place."""
    return (*tokens[:place], *tokens[place + 1 :])


def freed_enough(before: int, asleep: int, held: int) -> bool:
    """The criterion of sleeping: enough of what the engine held is free (all in bytes)."""
    return before - asleep >= FREED * held


def holding(trial: Trial, metrics: Metrics) -> int:
    """Bytes that the engine holds, which must be no less than it was given to hold.

    An engine is asked for them itself. One whose weights lie outside of what its sleep gives back
    would say less, and freeing all of that would look like enough.

    Raises:
        Failed: it says less than its weights and its KV cache.
    """
    held, given = trial.engine.held(), size_of(trial.weights) + trial.engine.kv_bytes
    metrics["held_bytes"] = held
    if held < FREED * given:
        what = f"{held >> 20} MiB, and weights and KV cache are {given >> 20} MiB"
        raise Failed(f"what the engine says it can give back is only {what}", metrics)
    return held


def growth(series: Sequence[int]) -> int:
    """By how many bytes a cycle a series of readings grew.

    There is one in each cycle. Buffers that are made once are there in the first: no growth.
    """
    return max(0, series[-1] - series[0]) // max(len(series) - 1, 1)


def sleep_1(trial: Trial) -> Metrics:
    """Level 1, several cycles: memory is freed and restored, nothing grows, output is identical.

    Control: between two readings without a sleep, the criterion must not hold.
    """
    engine, metrics = trial.engine, Metrics()
    begun = trial.prepare(1)
    held, before = holding(trial, metrics), engine.memory()
    weights = size_of(trial.weights)
    metrics |= {"weights_bytes": weights, "cycles": trial.cycles, **begun}
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
    metrics["growth_bytes"] = max(growth(asleep_bytes), growth(awake_bytes))
    metrics["first_sleep_seconds"] = sleeps[0]
    metrics["sleep_seconds"] = min(sleeps)
    metrics["wake_seconds"] = min(wakes)
    # The weights are what is copied; a KV cache is dropped.
    metrics["sleep_gb_per_s"] = weights / min(sleeps) / 1e9
    metrics["wake_gb_per_s"] = weights / min(wakes) / 1e9
    metrics["to_host_gb_per_s"], metrics["from_host_gb_per_s"] = host_bandwidths(trial.device)
    if metrics["growth_bytes"] > (GROWTH_CPU if trial.device == "cpu" else GROWTH):
        raise Failed(f"memory grew by {metrics['growth_bytes'] >> 10} KiB in each cycle", metrics)
    return metrics


def sleep_2(trial: Trial) -> Metrics:
    """Level 2 discards the weights; a refit after waking brings the output back, buffers included.

    Control: after waking and before the refit, weights and output must be gone.
    """
    engine = trial.engine
    metrics = Metrics(trial.prepare(2))
    held, expected, before = holding(trial, metrics), trial.fresh(), engine.memory()
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
    metrics |= {**trial.prepare(level), "level": level}
    held = holding(trial, metrics)
    divergences, seconds = [], []
    turns = ((trial.others, trial.other_oracle), (trial.weights, trial.oracle))
    for turn in range(3):
        weights, judge = turns[turn % 2]
        awake = engine.memory()
        seconds.append(timed(lambda: engine.sleep(level)))
        asleep = engine.memory()
        if not freed_enough(awake, asleep, held):
            share = f"{(awake - asleep) / held:.0%} of {held >> 20} MiB"
            raise Failed(f"turn {turn + 1}: sleep freed only {share}", metrics)
        seconds[-1] += timed(lambda: engine.wake((WEIGHTS,)))
        if not trial.differing(weights):
            raise Failed(f"control: turn {turn + 1} had its weights before the refit", metrics)
        start = time.perf_counter()
        trial.send(weights)
        engine.wake((KV_CACHE,))
        engine.reset_prefix_cache()
        seconds[-1] += time.perf_counter() - start
        wrong = trial.differing(weights)
        if wrong:
            raise Failed(f"turn {turn + 1}: wrong tensors after the refit: {named(wrong)}", metrics)
        what = f"turn {turn + 1}: output is not that of the weights sent"
        agree(trial.judged(trial.together(), judge), trial.bound, what, metrics)
        divergences.append(metrics["divergence"])
        metrics["divergence"] = max(divergences)
    metrics["turn_seconds"] = max(seconds)
    return metrics


REFITS = 6  # in turn, of two sets of weights


def refits(trial: Trial) -> Metrics:
    """Weights are replaced again and again while the engine stays awake, and its memory stays.

    Control: before each refit the engine must hold other weights than those to come.
    """
    engine, metrics = trial.engine, Metrics(refits=REFITS)
    divergences, seconds, readings = [], [], []
    turns = ((trial.others, trial.other_oracle), (trial.weights, trial.oracle))
    for turn in range(REFITS):
        weights, judge = turns[turn % 2]
        if not trial.differing(weights):
            raise Failed(f"control: turn {turn + 1} had its weights before the refit", metrics)
        start = time.perf_counter()
        trial.refit(weights)
        seconds.append(time.perf_counter() - start)
        wrong = trial.differing(weights)
        if wrong:
            raise Failed(f"turn {turn + 1}: wrong tensors after the refit: {named(wrong)}", metrics)
        what = f"turn {turn + 1}: output is not that of the weights sent"
        agree(trial.judged(trial.together(), judge), trial.bound, what, metrics)
        divergences.append(metrics["divergence"])
        metrics["divergence"] = max(divergences)
        readings.append(engine.memory())
    metrics["refit_seconds"] = sorted(seconds)[len(seconds) // 2]
    # The first turn makes what a refit of either set needs once.
    metrics["growth_bytes"] = growth(readings[1:])
    if metrics["growth_bytes"] > (GROWTH_CPU if trial.device == "cpu" else GROWTH):
        raise Failed(f"memory grew by {metrics['growth_bytes'] >> 10} KiB in each refit", metrics)
    return metrics


def fp8(trial: Trial) -> Metrics:
    """A second start with weights in 8 bits: refitted from bfloat16, asleep, and refitted again.

    Control: before the refit the engine, started on dummy weights, must diverge from the oracle,
    and so must the oracle of other weights after it.
    """
    engine, bound, metrics = trial.engine, BOUND_FP8, Metrics(bound=BOUND_FP8)
    weights, others = trial.calmed(trial.weights), trial.calmed(trial.others)

    def judged(completions: Sequence[Completion], judge: Oracle) -> list[Pair]:
        return trial.judged(completions, judge, trial.calm)

    engine.stop()
    level = max(trial.sleep_levels)
    metrics["start_seconds"] = timed(
        lambda: engine.start(trial.model, dummy=True, fp8=True, level=level)
    )
    metrics["control_divergence"] = mean_of(judged(trial.alone(), trial.oracle))
    if metrics["control_divergence"] <= bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)
    metrics["refit_seconds"] = timed(lambda: trial.refit(weights))
    first = trial.fresh()
    what = "weights in fp8 diverge from the float32 oracle of the same weights"
    agree(judged(first, trial.oracle), bound, what, metrics)
    trial.refit(others)
    found = trial.fresh()
    metrics["stranger_divergence"] = mean_of(judged(found, trial.oracle))
    if metrics["stranger_divergence"] <= bound:
        raise Failed("control: with other weights sent, the first explain the output", metrics)
    agree(judged(found, trial.other_oracle), bound, what, metrics, "other_")
    # Asleep with the others: a refit that did nothing would not bring the first ones back.
    held, before = engine.held(), engine.memory()
    engine.sleep(level)
    asleep = engine.memory()
    metrics["freed_fraction"] = (before - asleep) / held
    if not freed_enough(before, asleep, held):
        share = f"{metrics['freed_fraction']:.0%} of {held >> 20} MiB"
        raise Failed(f"in fp8 sleep freed only {share}", metrics)
    trial.train(int(FREED * held))
    engine.wake((WEIGHTS,))
    trial.send(weights)
    engine.wake((KV_CACHE,))
    if trial.fresh() != first:
        raise Failed("after sleeping and a refit the output is another", metrics)
    return metrics


def server(trial: Trial) -> Metrics:
    """The engine's own HTTP server: weights change between requests and in the middle of rollouts.

    Where it can be paused, they change in a pause too, as trainers elsewhere do it. What it tells a
    trainer of itself has to be how it was started.
    Control: before its first weights, and after its second for the first, the oracle must disagree.
    """
    if trial.serve is None:
        raise Failed("this backend has no server to drive", {})
    trial.engine.stop()
    level, bound, metrics = max(trial.sleep_levels), trial.bound, Metrics()
    own, engine = trial.engine, trial.serve()
    trial.engine = engine
    try:
        metrics["start_seconds"] = timed(lambda: engine.start(trial.model, dummy=True, level=level))
        started, told = {"model": str(trial.model), "gpus": 1}, engine.about()
        wrong = {name: told[name] for name in told if told[name] != started.get(name)}
        if wrong or "model" not in told:
            raise Failed(f"the server tells a trainer {wrong or told} of itself", metrics)
        metrics["control_divergence"] = trial.divergence(trial.alone(), trial.oracle)
        if metrics["control_divergence"] <= bound:
            raise Failed("control: the server had the weights before they were sent", metrics)
        moved = trial.refit(trial.weights)
        first = trial.fresh()
        wrongly = "the server's output is not that of the weights sent"
        agree(trial.judged(first, trial.oracle), bound, wrongly, metrics)
        if engine.pauses:
            paused(trial, engine, metrics)
        # Requests are on their way when the trainer has new weights: what they have is kept, and
        # they go on with those.
        kept = engine.interrupt(trial.prompts, ROLLOUT, INTERRUPTED)
        metrics["kept_tokens"] = [len(part.tokens) for part in kept]
        if not half_way(kept):
            raise Failed("control: the rollouts were not stopped half-way", metrics)
        seconds = timed(lambda: trial.refit(trial.others))
        metrics["refit_gb_per_s"] = moved / seconds / 1e9
        judged: list[Pair] = []
        strange: list[Pair] = []
        for prompt, part in zip(trial.prompts, kept, strict=True):
            begun = [*prompt, *part.tokens]
            rest = engine.generate([begun], TOKENS)[0]
            values = (*part.logprobs, *rest.logprobs)
            old = trial.oracle.logprobs(prompt, part.tokens)
            judged.append((values, [*old, *trial.other_oracle.logprobs(begun, rest.tokens)]))
            whole = (*part.tokens, *rest.tokens)
            strange.append((values, trial.oracle.logprobs(prompt, whole)))
        metrics["stranger_divergence"] = mean_of(strange)
        if metrics["stranger_divergence"] <= bound:
            raise Failed("control: the oracle of the first weights agrees with the second", metrics)
        agree(judged, bound, wrongly, metrics, "other_")
        held, before = holding(trial, metrics), engine.memory()
        engine.sleep(level)
        asleep = engine.memory()
        metrics["freed_bytes"] = before - asleep
        if not freed_enough(before, asleep, held):
            raise Failed(f"asleep, the server freed only {metrics['freed_bytes']} bytes", metrics)
        trial.train(int(FREED * held))
        engine.wake((WEIGHTS,))
        trial.send(trial.weights)
        engine.wake((KV_CACHE,))
        if trial.fresh() != first:
            raise Failed("after sleeping and a refit the server's output is another", metrics)
        metrics["endpoints"] = engine.endpoints()
    finally:
        engine.stop()
        trial.engine = own
    return metrics


def paused(trial: Trial, engine: Served, metrics: Metrics) -> None:
    """Pause in the middle of rollouts, other weights, go on: what waited is answered by those.

    A server may hold what it is asked in a pause, or refuse it with 503: then it is asked again.
    The weights go through a checkpoint where the server takes one, as from another machine, and in
    the end they are the first ones again. Control: paused it must not answer what it otherwise
    answers in a fifth of the time, and the first weights must not explain what it answers then.
    """
    usual = timed(trial.together)
    kept = engine.halt(trial.prompts, ROLLOUT, INTERRUPTED)
    metrics["paused_tokens"] = [len(part.tokens) for part in kept]
    if not half_way(kept):
        raise Failed("control: the pause did not stop the rollouts half-way", metrics)
    pool, over = ThreadPoolExecutor(1), threading.Event()
    refusals: list[str] = []
    try:
        waiting = pool.submit(until_answered, trial.together, over, refusals)
        done, _ = wait([waiting], max(PAUSE, 5 * usual))
        if done:
            waiting.result()
            raise Failed("the server says that it is paused, and answers", metrics)
        transport = CHECKPOINT if CHECKPOINT in engine.transports else ""
        seconds = timed(lambda: trial.refit(trial.others, transport))
        metrics["paused_refit_seconds"] = seconds
        engine.resume()
        over.set()
        found = waiting.result()
    finally:
        over.set()
        pool.shutdown(wait=False)  # one that waits for ever ends with the server
    metrics["paused_refusals"] = len(refusals)
    metrics["paused_stranger_divergence"] = trial.divergence(found, trial.oracle)
    if metrics["paused_stranger_divergence"] <= trial.bound:
        raise Failed("control: the first weights explain what was answered after a pause", metrics)
    what = "after a pause the server's output is not that of the weights sent"
    agree(trial.judged(found, trial.other_oracle), trial.bound, what, metrics, "paused_")
    trial.refit(trial.weights)


def until_answered(
    ask: Callable[[], list[Completion]], over: threading.Event, refusals: list[str]
) -> list[Completion]:
    """The answer to what may be refused until the pause is ``over``, and each refusal.

    Raises:
        EngineError: another answer than a refusal, or a refusal of what was asked after the pause.
    """
    while True:
        late = over.is_set()  # before it is asked: the refusal may come after the pause
        try:
            return ask()
        except EngineError as error:
            if late or REFUSED not in str(error):
                raise
            refusals.append(str(error))
        over.wait(AGAIN)


def tensor_parallel(trial: Trial) -> Metrics:
    """Two GPUs, one of them half full: the engine starts on both, and answers rightly.

    Control: an engine that can insist on GPUs alike, told to, must refuse these.
    """
    import torch

    engine, metrics = trial.engine, Metrics(gpus=2)
    engine.stop()
    free = [torch.cuda.mem_get_info(number)[0] for number in range(2)]
    taken = torch.empty(ballast(*free), dtype=torch.uint8, device="cuda:1")
    metrics["free_bytes"] = [torch.cuda.mem_get_info(number)[0] for number in range(2)]
    try:
        if engine.insisting:
            metrics["refused"] = refuses(engine, trial.model, engine.insisting)
            if not metrics["refused"]:
                what = "control: told to insist on balance, it did not refuse the GPUs for it"
                raise Failed(what, metrics)
        metrics["start_seconds"] = timed(
            lambda: engine.start(trial.model, dummy=True, level=max(trial.sleep_levels), gpus=2)
        )
        metrics["control_divergence"] = trial.divergence(trial.alone(), trial.oracle)
        if metrics["control_divergence"] <= trial.bound:
            raise Failed("control: the engine had the weights before they were sent", metrics)
        metrics["refit_seconds"] = timed(lambda: trial.refit(trial.weights))
        what = "on two GPUs a batch diverges from the float32 oracle"
        agree(trial.judged(trial.together(), trial.oracle), trial.bound, what, metrics)
    finally:
        del taken
        torch.cuda.empty_cache()
    return metrics


def ballast(first: int, second: int) -> int:
    """Bytes to take from the second GPU, so that it has less than the first by ``IMBALANCE``.

    Of what is free on the first, where the trainer's own weights lie: a share of a whole GPU would
    just even that out on a small one. SGLang tolerates a tenth.
    """
    return max(0, second - int(first * (1 - IMBALANCE)))


def refuses(engine: Engine, model: Path, variables: Mapping[str, str]) -> bool:
    """Whether an engine, started on two GPUs with these variables, refuses them as unbalanced."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        engine.start(model, dummy=True, gpus=2)
    except EngineError as error:
        return "balanced" in str(error)
    else:
        engine.stop()
        return False
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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


def long(trial: Trial) -> Metrics:
    """Long sequences, in chunks and preempted: :mod:`rollout.long`, which uses this module."""
    from rollout.long import check

    return check(trial)


def pressure(trial: Trial) -> Metrics:
    """Hundreds of requests at once, half of them aborted, others continued with new weights."""
    from rollout.pressure import pressure as check

    return check(trial)


def lora(trial: Trial) -> Metrics:
    """Adapters change the answers as their weights say, through sleep, replacement and refits."""
    from rollout.lora import lora as check

    return check(trial)


def disaggregated(trial: Trial) -> Metrics:
    """A trainer on GPUs of its own, and an engine on two: :mod:`rollout.disaggregated`."""
    from rollout.disaggregated import disaggregated as check

    return check(trial)


# In the order in which they run: the engine starts on dummy weights, and the refit fills it.
CHECKS: dict[str, Callable[[Trial], Metrics]] = {
    "refit": refit,
    "generation": generation,
    "multi-turn": multi_turn,
    "partial-rollout": partial_rollout,
    "sleep-1": sleep_1,
    "sleep-2": sleep_2,
    "cycle": cycle,
    "refits": refits,
    "long": long,
    "pressure": pressure,
    "fp8": fp8,
    "lora": lora,
    "server": server,
    "tensor-parallel": tensor_parallel,
    "disaggregated": disaggregated,
}

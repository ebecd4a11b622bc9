"""The check of LoRA: adapters change the answers as their weights say, through all a trainer does.

It starts an engine of its own, since engines decide at their start whether they take adapters: they
wrap their layers then, and what a refit sends has to find its way through the wrapper.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.adapter import Adapter, make, merged
from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError
from rollout.backends.adapters import NONE, Adapting, adapting
from rollout.checks import (
    FREED,
    TIE,
    TOKENS,
    Failed,
    Metrics,
    Pair,
    Trial,
    agree,
    digest,
    freed_enough,
    mean_of,
    named,
    timed,
)

if TYPE_CHECKING:
    import torch

    from rollout.oracle import Oracle

SEEDS = (20260710, 20260711)  # of the first adapter, and of the one that replaces it
# The numbers that they have: a new one for each folder, as TRL and others count them, and verl's,
# which stays the same.
FIRST, SECOND, FROM_MEMORY = 1, 2, 123
# Of the probe's logits, as `CALM` in smoke.py: an adapter doubles the noise of bfloat16, which then
# lies too near the bound where a vocabulary is large. All that is measured shrinks alike.
CALM = 0.5
HEAD = "lm_head.weight"
MOST_LAYERS = 28  # twice as many as the probe's, of which each one left out has to be missed
LOSSES = 4  # answers by which each layer of an adapter is missed: an oracle is asked for every one
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


@dataclass
class Loop:
    """What the check works on: a trial, its engine with room for an adapter, and two adapters."""

    trial: Trial
    engine: Adapting
    first: Adapter
    second: Adapter
    folders: tuple[Path, Path]  # of both
    weights: Mapping[str, torch.Tensor]  # as they are sent, the trial's own but for their lm_head
    others: Mapping[str, torch.Tensor]
    scale: float  # of that lm_head
    number: int = NONE  # of the adapter that requests are made with
    metrics: Metrics = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # by which a refit's tensors are sent

    def alone(self) -> list[Completion]:
        """Each prompt on its own with the adapter, from an empty prefix cache."""
        self.engine.reset_prefix_cache()
        numbers = [self.number]
        return [self.engine.adapted([prompt], TOKENS, numbers)[0] for prompt in self.trial.prompts]

    def together(self) -> list[Completion]:
        """All prompts in one batch with the adapter."""
        numbers = [self.number] * len(self.trial.prompts)
        return self.engine.adapted(self.trial.prompts, TOKENS, numbers)

    def take(self, adapter: Adapter) -> None:
        """Send an adapter from memory, as verl does: the number stays, so the cache is emptied."""
        self.engine.take(FROM_MEMORY, adapter.config, adapter.tensors)
        self.engine.reset_prefix_cache()
        self.number = FROM_MEMORY

    def again(self) -> None:
        """Load the second adapter anew: from memory where that works, or as one more folder."""
        if self.metrics.get("tensors_taken_by"):
            self.take(self.second)
        else:
            self.number += 1
            self.engine.load(self.number, self.folders[1])

    def judged(self, answers: Sequence[Completion], adapter: Adapter, judge: Oracle) -> list[Pair]:
        """Answers beside what an oracle says with the adapter merged into its weights."""
        with merged(judge, adapter) as oracle:
            return self.plain(answers, oracle)

    def plain(self, answers: Sequence[Completion], judge: Oracle) -> list[Pair]:
        """The same where an oracle is taken as it is; also of the first few answers alone."""
        prompts = self.trial.prompts[: len(answers)]
        return [
            (answer.logprobs, judge.logprobs(list(prompt), list(answer.tokens), self.scale))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def agrees(
        self, answers: Sequence[Completion], adapter: Adapter, reason: str, key: str
    ) -> None:
        """Hold answers to the bound, against the trial's oracle with this adapter."""
        pairs = self.judged(answers, adapter, self.trial.oracle)
        agree(pairs, self.trial.bound, reason, self.metrics, key)

    def differs(
        self, answers: Sequence[Completion], adapter: Adapter, reason: str, key: str
    ) -> None:
        """The control of a replacement: what is there before must not pass for what comes."""
        value = mean_of(self.judged(answers, adapter, self.trial.oracle))
        self.metrics[f"{key}control_divergence"] = value
        if value <= self.trial.bound:
            raise Failed(f"control: {reason}", self.metrics)

    def send(self, weights: Mapping[str, torch.Tensor]) -> None:
        """A refit of the base, by the names that this engine takes; nothing for the cache."""
        self.trial.send({self.names.get(name, name): tensor for name, tensor in weights.items()})
        wrong = self.trial.differing(weights)
        if wrong:
            what = (
                "under its adapters the engine does not hold the base's weights as they were sent"
            )
            raise Failed(f"{what}: {named(wrong)}", self.metrics)


def lora(trial: Trial) -> Metrics:
    """Adapters change answers as a float32 oracle with merged weights says, and nothing else does.

    Through sleep, replacement by folder and from memory, and refits of the base beneath them.
    Controls: before its refit the engine, and without the adapter the oracle, must disagree; so
    must the oracle where any one layer of the adapter is left out, and each answer before a
    replacement.
    """
    trial.engine.stop()
    own, engine = trial.engine, adapting(trial.engine)
    trial.engine = engine
    model = str(trial.model)
    first, second = (make(trial.weights, seed, model) for seed in SEEDS)
    with tempfile.TemporaryDirectory(prefix="rollout-adapters-") as folder:
        folders = first.save(Path(folder, "first")), second.save(Path(folder, "second"))
        scale = 1.0 if trial.calm == 1.0 else CALM  # a model of the user's is taken as it is
        weights, others = (calmed(trial, given, scale) for given in (trial.weights, trial.others))
        loop = Loop(trial, engine, first, second, folders, weights, others, scale)
        try:
            begin(loop, min(trial.sleep_levels, default=1))
            base = beneath(loop)
            answers = applied(loop, base)
            if 1 in trial.sleep_levels:
                kept(loop, base, answers)
            by_folder(loop)
            from_memory(loop)
            refitted(loop)
            if 2 in trial.sleep_levels:
                dropped(loop, base)
        finally:
            engine.stop()
            trial.engine = own
            for sent in (weights, others):  # another set may come to lie where these were
                trial._digests.pop(id(sent), None)
    return loop.metrics


def calmed(
    trial: Trial, weights: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Weights with an lm_head that is so many times as large.

    Of a gigabyte that is as it was, the digests that another check has made are taken.
    """
    made = dict(weights) if scale == 1.0 else {**weights, HEAD: weights[HEAD] * scale}
    known = trial._digests.get(id(weights))
    if known is not None:
        trial._digests[id(made)] = {**known, HEAD: digest(made[HEAD])} if HEAD in made else known
    return made


def begin(loop: Loop, level: int) -> None:
    """Start on dummy weights, which the oracle must tell from those that are to come."""
    trial, metrics = loop.trial, loop.metrics
    seconds = timed(lambda: loop.engine.start(trial.model, dummy=True, level=level))
    metrics["start_seconds"] = metrics.get("start_seconds", 0.0) + seconds
    value = mean_of(loop.plain(trial.together(), trial.oracle))
    metrics["dummy_divergence"] = value
    if value <= trial.bound:
        raise Failed("control: the engine had the weights before they were sent", metrics)


def beneath(loop: Loop) -> list[Completion]:
    """The base's weights come through the wrapper: by the names that a trainer has, or by others.

    Which ones the metrics say, and what became of a trainer's own. Returns the base's answers.
    """
    trial, metrics = loop.trial, loop.metrics
    plain, lost = "", []
    try:
        trial.send(loop.weights)
        lost = trial.differing(loop.weights)
    except EngineError as error:
        plain = str(error) or "refused"
    metrics["refit_names"] = "as a trainer has them"
    if plain or lost:
        loop.names = loop.engine.wrapped(list(loop.weights))
        changed = {name: new for name, new in loop.names.items() if new != name}
        metrics["refit_names"] = next(iter(changed.values()), "as a trainer has them")
        metrics["refit_names_changed"] = len(changed)
        metrics["refit_names_of_a_trainer"] = plain or f"lost without a word: {named(lost)}"
        loop.send(loop.weights)
    base = trial.fresh()
    what = "under its adapters the engine's output is not that of the base's weights"
    agree(loop.plain(base, trial.oracle), trial.bound, what, metrics, "base_")
    return base


def applied(loop: Loop, base: Sequence[Completion]) -> list[Completion]:
    """An adapter from a folder counts, every layer of it; without it the base answers as before.

    Returns the answers with it.
    """
    trial, metrics, engine = loop.trial, loop.metrics, loop.engine
    engine.load(FIRST, loop.folders[0])
    loop.number = FIRST
    answers = loop.alone()
    metrics["control_divergence"] = mean_of(loop.plain(answers, trial.oracle))
    what = "with the adapter the output is not that of the merged weights"
    loop.agrees(answers, loop.first, what, "")
    if metrics["control_divergence"] <= trial.bound:
        raise Failed("control: without the adapter the oracle agrees as well", metrics)
    missed(loop, answers[:LOSSES])
    if trial.fresh() != base:
        raise Failed("with an adapter loaded the answers without it are others", metrics)
    # Of one batch every second request has the adapter.
    numbers = [FIRST if place % 2 else NONE for place in range(len(trial.prompts))]
    mixed = engine.adapted(trial.prompts, TOKENS, numbers)
    with merged(trial.oracle, loop.first) as oracle:
        ours = loop.plain(mixed, oracle)
    pairs = [
        one if number else other
        for number, one, other in zip(numbers, ours, loop.plain(mixed, trial.oracle), strict=True)
    ]
    what = "in a batch of requests with the adapter and without, one is answered as the other kind"
    agree(pairs, trial.bound, what, metrics, "mixed_")
    return answers


def missed(loop: Loop, answers: Sequence[Completion]) -> None:
    """The control of the adapter: each layer of it, left out, has to be missed in these answers.

    A model of the user's may have hundreds, each of which moves little: there nothing is asked, and
    no metric says that it was.
    """
    metrics, layers = loop.metrics, loop.first.layers()
    if len(layers) > MOST_LAYERS:
        return
    values = {}
    for layer in layers:
        with merged(loop.trial.oracle, loop.first, without=layer) as oracle:
            values[layer] = mean_of(loop.plain(answers, oracle))
    weakest = min(values, key=values.__getitem__)
    metrics["weakest_divergence"], metrics["weakest_layer"] = values[weakest], weakest
    if values[weakest] <= loop.trial.bound:
        raise Failed(f"control: an adapter without {weakest} would not be seen", metrics)


def kept(loop: Loop, base: Sequence[Completion], before: Sequence[Completion]) -> None:
    """After a sleep of level 1 the adapter is there, to the bit.

    Some kernels of adapters add in an order that no one fixes. Where the same request is answered
    twice with other bits, answers are held to the bound, and to the bit what the engine holds.
    """
    trial, metrics, engine = loop.trial, loop.metrics, loop.engine
    mark = engine.imprint()
    metrics["repeats_to_the_bit"] = loop.alone() == before
    asleep(loop, 1)
    engine.wake((WEIGHTS, KV_CACHE))
    answers = loop.alone()
    lost = "after a sleep of level 1 the adapter is not what it was"
    loop.agrees(answers, loop.first, lost, "level_1_")
    if engine.imprint() != mark:
        raise Failed(f"{lost}: the engine holds other bytes", metrics)
    if metrics["repeats_to_the_bit"] and answers != before:
        raise Failed(f"{lost}: the output is another", metrics)
    with merged(trial.oracle, loop.first):
        metrics["level_1_parted"] = max(
            trial.parted(prompt, one.tokens, two.tokens)
            for prompt, one, two in zip(trial.prompts, before, answers, strict=True)
        )
    if metrics["level_1_parted"] > TIE:
        raise Failed(f"{lost}: an answer ends otherwise", metrics)
    if trial.fresh() != base:
        raise Failed("after a sleep of level 1 the answers without the adapter are others", metrics)


def asleep(loop: Loop, level: int) -> None:
    """Sleep, and use the memory that comes free as a training step does."""
    engine = loop.engine
    held, before = engine.held(), engine.memory()
    engine.sleep(level)
    freed = before - engine.memory()
    loop.metrics[f"level_{level}_freed_fraction"] = freed / held
    if not freed_enough(before, before - freed, held):
        what = f"{freed / held:.0%} of {held >> 20} MiB"
        raise Failed(f"with an adapter a sleep of level {level} freed only {what}", loop.metrics)
    loop.trial.train(int(FREED * held))


def by_folder(loop: Loop) -> None:
    """Another adapter from a folder, under a number that is new; nothing is said to the cache."""
    what = "the first adapter's answers pass for the second's"
    loop.differs(loop.together(), loop.second, what, "folder_")
    loop.engine.load(SECOND, loop.folders[1])
    loop.number = SECOND
    what = "another adapter was loaded from its folder, and the output is not that of it"
    loop.agrees(loop.together(), loop.second, what, "folder_")
    removed(loop, FIRST)


def removed(loop: Loop, old: int) -> None:
    """The old one of two adapters goes, if it has not gone already, and the other one stays."""
    engine, left = loop.engine, [loop.number] if loop.number != old else []
    if old in engine.loaded():
        engine.drop(old)
    if engine.loaded() != left:
        what = f"adapter {old} was removed, and the engine says that it has {engine.loaded()}"
        raise Failed(what, loop.metrics)


def from_memory(loop: Loop) -> None:
    """Adapters whose tensors are sent from memory, each in the place of the one before (verl)."""
    loop.metrics["tensors_taken_by"] = loop.engine.takes_tensors()
    if not loop.metrics["tensors_taken_by"]:
        return
    removed(loop, loop.number)
    loop.take(loop.first)
    answers = loop.together()
    what = "an adapter was sent from memory, and the output is not that of it"
    loop.agrees(answers, loop.first, what, "memory_")
    what = "the adapter that is to be replaced passes for the new one"
    loop.differs(answers, loop.second, what, "memory_")
    loop.take(loop.second)
    what = "an adapter was replaced from memory, and the output is not that of the new one"
    loop.agrees(loop.together(), loop.second, what, "replaced_")


def refitted(loop: Loop) -> None:
    """Other weights of the base beneath an adapter that stays."""
    trial, metrics = loop.trial, loop.metrics
    loop.send(loop.others)
    loop.engine.reset_prefix_cache()
    answers = loop.together()
    what = "after a refit of the base the output is not that of its new weights with the adapter"
    pairs = loop.judged(answers, loop.second, trial.other_oracle)
    agree(pairs, trial.bound, what, metrics, "other_")
    value = mean_of(loop.judged(answers, loop.second, trial.oracle))
    metrics["stranger_divergence"] = value
    if value <= trial.bound:
        raise Failed("control: the base's first weights explain what its second answer", metrics)


def dropped(loop: Loop, base: Sequence[Completion]) -> None:
    """After a sleep of level 2 the adapter is right or refused, and right once it is loaded again.

    Which of both the metrics say. A trainer that is told nothing would learn from wrong answers.
    """
    trial, metrics, engine = loop.trial, loop.metrics, loop.engine
    if 2 not in engine.levels:  # one that decides at its start begins anew, with nothing
        engine.stop()
        begin(loop, 2)
        loop.send(loop.weights)
        loop.again()
    asleep(loop, 2)
    engine.wake((WEIGHTS,))
    loop.send(loop.weights)
    engine.wake((KV_CACHE,))
    engine.reset_prefix_cache()
    metrics["after_level_2"] = REFUSED
    with contextlib.suppress(EngineError):
        found = mean_of(loop.judged(loop.together(), loop.second, trial.oracle))
        metrics["level_2_divergence"] = found
        metrics["after_level_2"] = RIGHT if found <= trial.bound else WRONG
    try:
        loop.again()
    except EngineError as error:
        why = f"after a sleep of level 2 no adapter can be loaded any more: {error}"
        raise Failed(why, metrics) from None
    what = "after a sleep of level 2 the adapter, loaded again, is not what it was"
    loop.agrees(loop.together(), loop.second, what, "again_")
    if metrics["after_level_2"] == WRONG:
        what = "after a sleep of level 2 the adapter is neither right nor refused"
        raise Failed(f"{what}; loaded again it is right", metrics)
    if trial.fresh() != base:
        raise Failed("after a sleep of level 2 the answers without the adapter are others", metrics)

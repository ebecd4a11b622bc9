"""What the checks promise of themselves: what they ask for, and what they refuse to pass."""

from __future__ import annotations

import gc
import hashlib
import inspect
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import checks, disaggregated, faults, fp8_kv, long, lora, pressure, rush, training
from rollout.backends import Completion, EngineError
from rollout.checks import Failed, Trial
from rollout.faults import FAULTS, Faulty
from rollout.oracle import BOUND_FP8
from rollout.transport import as_bytes

HEAD = "lm_head.weight"


class Number(float):
    """A weight that is one number; it says its size as a tensor does."""

    def numel(self) -> int:
        return 1

    def element_size(self) -> int:
        return 20


WEIGHTS = {"body": Number(2.0), HEAD: Number(4.0)}
OTHERS = {"body": Number(3.0), HEAD: Number(4.0)}
MEBI = 1 << 20
GAP = 5.0  # of log-probability between the likeliest token and any other


def likeliest(body: float, context: Sequence[int]) -> int:
    """The token that a model of this body says after this context; another one after any other."""
    return hash((body, *context)) % 997


def logprob(body: float, head: float, context: Sequence[int], token: int) -> float:
    """How likely it finds a token there."""
    return -body * head - (0.0 if token == likeliest(body, context) else GAP)


class Toy:
    """An engine whose weights are two numbers; it remembers what it computed, and of which weights.

    Its attributes below the line are ways to be wrong.
    """

    device = "paper"
    transports: tuple[str, ...] = ("paper", "pencil", "chalk")
    levels: tuple[int, ...] = (1, 2)
    cache_block = 1
    kv_bytes = 60  # and 40 of weights
    mlp_bias = True
    witness = True
    insisting: Mapping[str, str] = MappingProxyType({})

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, Any] | None = None
        self.computed: list[tuple[tuple[int, ...], float]] = []
        self.noted: dict[str, Any] = {}
        self.asleep = False
        self.decides = False  # at its start, to which level it can sleep
        # ---
        self.begins: dict[str, float] = {"body": 0.0, HEAD: 0.0}  # dummy weights
        self.noise = 0.0
        self.takes = 99  # so many refits; those that follow do nothing
        self.deaf: dict[str, int] = {}  # so many by a transport
        self.resets = 99  # likewise
        self.miscounts = 0  # cached tokens
        self.cold = False  # nothing is taken from the cache
        self.forgets = False  # of a request only the prompt is cached
        self.strays = False  # says another token where something comes from the cache
        self.late = 3  # tokens more than it was to be interrupted after
        self.loses = 0  # the kept tokens behind so many
        self.keeps = False  # its memory, asleep
        self.halves = False  # its memory, asleep
        self.outside = False  # its weights lie where a sleep does not reach, and it says so
        self.sours = 0.0  # noise that comes with the second refit
        self.refits = 0
        self.hoards = False  # its weights, asleep
        self.leaks = 0  # bytes at each wake
        self.grown = 0
        self.readings: list[int] = []  # of its memory, whatever it has
        self.fades = 0.0  # noise that comes with each wake
        self.jitters = 0.0  # noise that comes with each answer
        self.says: list[bool] = []  # its own checker, whatever is there
        self.room: Callable[[], bool] = lambda: True  # on all GPUs alike
        self.broken = ""  # why it does not start on two
        # As a server, where it is one:
        self.pauses = False
        self.held_back = threading.Event()  # set while it answers
        self.held_back.set()
        self.says_of_itself: dict[str, Any] = {"model": "/m", "gpus": 1}
        self.restless = False  # paused, it answers
        self.mute = ""  # paused, it answers with this error
        self.dull = False  # what waited is answered as if nothing had come meanwhile

    def start(
        self, _: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.calls.append(f"start dummy={dummy} fp8={fp8} level={level} gpus={gpus}")
        insists = all(os.environ.get(k) == v for k, v in self.insisting.items())
        if gpus > 1 and self.insisting and insists and not self.room():
            raise EngineError("the engine did not start: the memory capacity is unbalanced")
        if gpus > 1 and self.broken:
            raise EngineError(self.broken)
        self.weights = dict(self.begins)
        if self.decides:
            self.levels = (level,)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        assert self.weights is not None and not self.asleep
        if not self.held_back.is_set():
            if self.mute:
                raise EngineError(f"the server answered /generate {self.mute}")
            before = dict(self.weights)
            if not self.restless:
                assert self.held_back.wait(10)
            if self.dull:
                self.weights = before
        return [self.answer(list(prompt), tokens) for prompt in prompts]

    def about(self) -> dict[str, Any]:
        return self.says_of_itself

    def halt(self, prompts: Sequence[Sequence[int]], tokens: int, after: int) -> list[Completion]:
        found = self.interrupt(prompts, tokens, after)
        self.calls[-1] = "halt"
        self.held_back.clear()
        return found

    def resume(self) -> None:
        self.calls.append("resume")
        self.held_back.set()

    def endpoints(self) -> list[str]:
        return ["/a", "/b"]

    def answer(self, context: list[int], tokens: int) -> Completion:
        assert self.weights is not None
        asked, (taken, body) = len(context), self.taken(context)
        self.noise += self.jitters
        values = []
        for place in range(tokens):
            stray = self.strays and bool(taken) and place == 1
            token = likeliest(body, context) + stray
            values.append(logprob(body, self.weights[HEAD], context, token) + self.noise)
            context.append(token)
        self.computed.append((tuple(context[: asked if self.forgets else -1]), body))
        count = taken + self.miscounts if taken else 0
        return Completion(tuple(context[asked:]), tuple(values), count)

    def taken(self, prompt: Sequence[int]) -> tuple[int, float]:
        """Tokens from the cache, and the body that the answer comes from: stale is stale."""
        assert self.weights is not None
        found = (0, float(self.weights["body"]))
        for known, body in self.computed if not self.cold else []:
            pairs = zip(known, prompt[:-1], strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            length = min(len(known), len(prompt) - 1) if same is None else same
            length -= length % self.cache_block
            if length > found[0]:
                found = (length, body)
        return found

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        self.calls.append("interrupt")
        found = []
        for number, prompt in enumerate(prompts):
            part = self.answer(list(prompt), min(tokens, after + self.late + number % 2))
            ids, values = list(part.tokens), list(part.logprobs)
            if self.loses:
                del ids[self.loses], values[self.loses]
            found.append(Completion(tuple(ids), tuple(values)))
        return found

    def sleep(self, level: int) -> None:
        assert level in self.levels
        self.calls.append(f"sleep {level}")
        self.asleep = True
        if level == 2 and not self.hoards:
            self.weights = dict(self.begins)

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        self.asleep = False
        self.grown += self.leaks
        self.noise += self.fades

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        self.calls.append(f"refit {transport}".strip())
        left = self.deaf.get(transport, 1)
        self.refits += 1
        self.noise += self.sours if self.refits == 2 else 0.0
        if self.takes > 0 and left > 0:
            self.weights = dict(tensors)
        self.takes -= 1
        if transport in self.deaf:
            self.deaf[transport] -= 1
        return 8

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")
        if self.resets > 0:
            self.computed.clear()
        self.resets -= 1

    def digests(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.weights or {}).items()}

    def remember(self) -> None:
        self.noted = dict(self.weights or {})

    def unchanged(self) -> bool:
        return self.says.pop(0) if self.says else self.noted == self.weights

    def held(self) -> int:
        return 60 if self.outside else 100

    def memory(self) -> int:
        if self.readings:
            return self.readings.pop(0)
        left = 100 if self.keeps else 50 if self.halves else 40 if self.outside else 0
        return self.grown + (left if self.asleep else 100)

    def inject(self, fault: str) -> None:
        raise AssertionError(fault)

    def stop(self) -> None:
        self.calls.append("stop")
        self.held_back.set()
        self.weights = None
        self.computed.clear()


class Judge:
    """The oracle of the toy."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], scale: float = 1.0
    ) -> list[float]:
        body, head = float(self.weights["body"]), self.weights[HEAD] * scale
        context, found = list(prompt), []
        for token in completion:
            found.append(logprob(body, head, context, token))
            context.append(token)
        return found


PROMPTS = [[number * 100 + i for i in range(30)] for number in range(5)]


def trial(engine: Any, others: dict[str, Any] = OTHERS, **changes: Any) -> Trial:
    """Like the proof's own, on two numbers; ``Any`` stands for tensors."""
    weights: Any = dict(WEIGHTS)
    second: Any = dict(others)
    one: Any = Judge(weights)
    two: Any = Judge(second)
    settings: dict[str, Any] = {"sleep_levels": [1, 2], "calm": 0.25} | changes
    return Trial(engine, Path("/m"), weights, second, one, two, PROMPTS, 4, 1.043, **settings)


def started(weights: dict[str, Any] = WEIGHTS, **wrong: Any) -> Toy:
    """An engine that has started, and was wrong from then on."""
    toy = Toy()
    vars(toy).update(wrong)
    toy.weights = dict(weights)
    return toy


# Which request was worst: what a check says behind the reason of a bound.
WORST = re.compile(r" \(request \d+ of \d+: [\d.]+, where [\d.]+ is the most\)$")


def failure(check: Callable[[Trial], Any], on: Trial) -> str:
    """The reason that a check gives, less the request that was worst."""
    with pytest.raises(Failed) as caught:
        check(on)
    return WORST.sub("", caught.value.reason)


# which tensors differ


def test_the_trainers_digests_are_computed_once_for_each_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def digest(value: Any) -> str:
        asked.append(value)
        return str(value)

    monkeypatch.setattr(checks, "digest", digest)
    toy = Toy()
    toy.weights = dict(WEIGHTS)
    here = trial(toy)
    for _ in range(3):
        assert here.differing(here.weights) == []
        assert here.differing(here.others) == ["body"]
    assert sorted(asked) == sorted([*WEIGHTS.values(), *OTHERS.values()])


def test_what_the_engine_holds_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "digest", str)
    toy = Toy()
    here = trial(toy)
    assert here.differing(here.weights) == ["body", HEAD], "an engine without weights has none"
    toy.weights = {"body": 2.0, "more": 1.0}
    assert here.differing(here.weights) == [HEAD]
    toy.weights = {**WEIGHTS, "more": 1.0}
    assert here.differing(here.weights) == []


# what every check works with


def test_an_engine_that_can_sleep_so_deep_is_left_alone() -> None:
    toy = started()
    for level in (1, 2):
        assert trial(toy).prepare(level) == {}
    assert toy.calls == []
    assert toy.weights == WEIGHTS


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_decides_at_its_start_is_started_for_the_level_asked_for(level: int) -> None:
    toy = started(OTHERS, decides=True, levels=(3 - level,))
    assert trial(toy).prepare(level).keys() == {"start_seconds"}
    assert toy.calls == [
        *("stop", f"start dummy=True fp8=False level={level} gpus=1", "refit", "reset")
    ]
    assert (toy.weights, toy.levels) == (WEIGHTS, (level,))
    assert trial(toy).prepare(level) == {}
    assert len(toy.calls) == 4, "once"


def test_answers_part_by_what_the_oracle_makes_of_the_two_tokens_there() -> None:
    here, prompt = trial(started()), [1, 2]
    right: list[int] = []
    while len(right) < 4:
        right.append(likeliest(2.0, [*prompt, *right]))
    assert here.parted(prompt, right, list(right)) == 0.0
    assert here.parted(prompt, right, [*right[:2], right[2] + 1, 0]) == GAP
    assert here.parted(prompt, [*right[:2], right[2] + 1], right[:3]) == GAP
    # Neither is likely, and what follows is of no matter.
    assert here.parted(prompt, [right[0] + 1, 5, 6, 7], [right[0] + 2, *right[1:]]) == 0.0
    assert here.parted(prompt, [], []) == 0.0


@pytest.mark.parametrize("short", [0, 1, 3])
def test_answers_of_different_lengths_part_for_certain(short: int) -> None:
    here = trial(started())
    assert here.parted([1], [4, 5, 6, 7], [4, 5, 6, 7][:short]) == math.inf
    assert here.parted([1], [4, 5, 6, 7][:short], [4, 5, 6, 7]) == math.inf


def test_the_oracle_is_asked_for_no_token_behind_the_parting() -> None:
    asked: list[tuple[int, ...]] = []

    def logprobs(_: object, tokens: Sequence[int]) -> list[float]:
        asked.append(tuple(tokens))
        return [-1.0] * len(tokens)

    here = trial(started())
    here.oracle = SimpleNamespace(logprobs=logprobs)  # type: ignore[assignment]
    here.parted([1], [4, 5, 6, 7], [4, 9, 6, 7])
    assert asked == [(4, 5), (4, 9)]


# a refit


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers instead of tensors."""
    monkeypatch.setattr(checks, "digest", str)
    monkeypatch.setattr(checks, "copy_bandwidth", lambda _: 1.0)


def dummy(**wrong: Any) -> Toy:
    """An engine on dummy weights."""
    return started({"body": 0.0, HEAD: 0.0}, **wrong)


@pytest.mark.usefixtures("plain")
def test_weights_arrive_by_every_transport_and_the_engines_own_checker_agrees() -> None:
    toy = dummy()
    metrics = checks.refit(trial(toy, transports=toy.transports))
    assert [call for call in toy.calls if call != "reset"] == [
        *("refit paper", "refit paper", "refit paper"),  # these weights, others, these again
        *("refit pencil", "refit pencil", "refit chalk", "refit chalk"),
    ]
    assert toy.weights == WEIGHTS
    assert metrics["divergence"] == metrics["other_divergence"] == 1.0
    assert min(metrics["control_divergence"], metrics["stale_divergence"]) > 1.043
    assert (metrics["bytes"], metrics["tensors"], metrics["tensors_wrong"]) == (8, 2, 0)
    assert metrics["witness"] == "the engine's own checker"
    assert {"paper_gb_per_s", "pencil_gb_per_s", "chalk_gb_per_s"} < metrics.keys()


@pytest.mark.usefixtures("plain")
def test_what_was_promised_is_what_runs_and_not_the_first_that_the_engine_has() -> None:
    toy = dummy()
    metrics = checks.refit(trial(toy, transports=("chalk",)))
    assert {call for call in toy.calls if call.startswith("refit")} == {"refit chalk"}
    assert [key for key in metrics if key.endswith("_gb_per_s")] == [
        *("chalk_gb_per_s", "copy_gb_per_s"),
    ]


@pytest.mark.usefixtures("plain")
def test_every_check_sends_by_the_promised_transport() -> None:
    toy = started()
    checks.cycle(trial(toy, transports=("chalk",)))
    assert {call for call in toy.calls if call.startswith("refit")} == {"refit chalk"}


@pytest.mark.usefixtures("plain")
def test_an_engine_without_a_checker_or_a_second_transport_is_asked_for_neither() -> None:
    toy = dummy(witness=False, says=[True])
    metrics = checks.refit(trial(toy))
    assert (toy.noted, toy.says) == ({}, [True])
    assert "witness" not in metrics
    assert toy.calls.count("refit") == 3


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"weights": dict(WEIGHTS)}, "control: the engine had the weights before they were sent"),
        ({"takes": 0}, "by paper the engine does not hold what was sent: body, lm_head.weight"),
        ({"noise": 0.1}, "the digests agree, yet the output is not that of these weights"),
        ({"cold": True}, "control: a stale prefix cache would not be seen by these prompts"),
        ({"resets": 1}, "after a refit and a reset the prefix cache is still stale"),
        ({"takes": 2}, "the first weights, sent again, do not bring the first output back"),
    ],
    ids=["filled before", "lost", "too coarse", "no cache", "not emptied", "not again"],
)
def test_a_refit_that_goes_wrong_is_not_passed(wrong: dict[str, Any], reason: str) -> None:
    toy = dummy()
    vars(toy).update(wrong)
    assert failure(checks.refit, trial(toy)) == reason


@pytest.mark.usefixtures("plain")
def test_weights_that_change_nothing_prove_no_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = likeliest
    monkeypatch.setitem(globals(), "likeliest", lambda _, context: deaf(0.0, context))
    assert failure(checks.refit, trial(dummy())) == "other weights gave the same tokens"


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"says": [True, True]},
            "control: the engine's own checker takes other weights for these",
        ),
        (
            {"says": [False, False]},
            "the digests agree, yet the engine's own checker finds a difference",
        ),
        ({"deaf": {"pencil": 0}}, "by pencil the engine does not hold what was sent: body"),
        ({"deaf": {"chalk": 0}}, "by chalk the engine does not hold what was sent: body"),
        ({"deaf": {"pencil": 1}}, "by pencil the first weights do not come back: body"),
        ({"deaf": {"chalk": 1}}, "by chalk the first weights do not come back: body"),
    ],
)
def test_a_refit_that_goes_wrong_late_is_not_passed(wrong: dict[str, Any], reason: str) -> None:
    toy = dummy(**wrong)
    assert failure(checks.refit, trial(toy, transports=toy.transports)) == reason


@pytest.mark.usefixtures("plain")
def test_weights_that_come_back_with_another_output_are_not_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = dummy()
    refit = Toy.refit

    def spoils(self: Toy, tensors: Any, transport: str = "") -> int:
        self.noise = 1e-6 if transport == "pencil" else 0.0
        return refit(self, tensors, transport)

    monkeypatch.setattr(Toy, "refit", spoils)
    reason = failure(checks.refit, trial(toy, transports=toy.transports))
    assert reason == (
        "by pencil the first weights do not come back: the digests agree, the output does not"
    )


# generation


def test_a_batch_agrees_with_its_oracle_and_one_request_with_itself() -> None:
    metrics = checks.generation(trial(started()))
    assert metrics["divergence"] == 1.0
    assert metrics["control_divergence"] > metrics["bound"] == 1.043


@pytest.mark.parametrize(
    ("wrong", "others", "fault", "reason"),
    [
        ({}, WEIGHTS, None, "control: the oracle of other weights agrees"),
        ({"noise": 0.1}, OTHERS, None, "a batch diverges from the float32 oracle"),
        ({}, OTHERS, "oracle-of-other-weights", "a batch diverges from the float32 oracle"),
        ({"jitters": 1e-6}, OTHERS, None, "one request at a time, greedy, gave two different"),
    ],
    ids=["one set twice", "too coarse", "another oracle", "not repeatable"],
)
def test_generation_that_is_wrong_is_not_passed(
    wrong: dict[str, Any], others: dict[str, Any], fault: str | None, reason: str
) -> None:
    here = trial(started(**wrong), others, fault=fault)
    assert failure(checks.generation, here).startswith(reason)


# a conversation


def test_a_conversation_takes_from_the_cache_all_that_was_said() -> None:
    metrics = checks.multi_turn(trial(started()))
    # The prompt, the answer without its last token; that again, with a tool's answer and the next.
    said = (30 + 16 - 1, 30 + 16 + 24 + 16 - 1)
    assert metrics["turns"] == 3
    assert metrics["reused_tokens"] == metrics["of_tokens"] == sum(said)
    assert (metrics["divergence"], metrics["parted"]) == (1.0, 0.0)


def test_a_cache_of_whole_blocks_gives_whole_blocks() -> None:
    metrics = checks.multi_turn(trial(started(cache_block=16)))
    assert metrics["reused_tokens"] == metrics["of_tokens"] == 32 + 80


def test_a_release_known_to_forget_its_answers_takes_exactly_the_prompts() -> None:
    metrics = checks.multi_turn(trial(started(forgets=True), reuse="prompts"))
    assert metrics["reuse"] == "prompts"
    assert metrics["reused_tokens"] == 30 + (30 + 16 + 24)
    assert metrics["of_tokens"] == (30 + 16 - 1) + (30 + 16 + 24 + 16 - 1)


def test_what_a_release_forgets_must_be_known_and_true() -> None:
    reason = failure(checks.multi_turn, trial(started(forgets=True)))
    assert reason == "turn 2: 30 of 45 tokens said before came from the cache"
    reason = failure(checks.multi_turn, trial(started(), reuse="prompts"))
    assert reason == "turn 2: 45 of 30 tokens asked before came from the cache"
    reason = failure(checks.multi_turn, trial(started(cold=True), reuse="prompts"))
    assert reason == "turn 2: 0 of 30 tokens asked before came from the cache"


@pytest.mark.parametrize("miscounts", [0, 1])
def test_a_cache_may_have_computed_the_last_token_too(miscounts: int) -> None:
    metrics = checks.multi_turn(trial(started(miscounts=miscounts)))
    assert metrics["reused_tokens"] == metrics["of_tokens"] + 2 * miscounts


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"cold": True}, "turn 2: 0 of 45 tokens said before came from the cache"),
        ({"miscounts": -1}, "turn 2: 44 of 45 tokens said before came from the cache"),
        ({"miscounts": 2}, "turn 2: 47 of 45 tokens said before came from the cache"),
        ({"cache_block": 16, "cold": True}, "turn 2: 0 of 32 tokens said before came from the"),
        (
            {"resets": 0, "computed": [(tuple(PROMPTS[0][:9]), 2.0)]},
            "control: an empty prefix cache counts tokens as taken from it",
        ),
        ({"resets": 1}, "control: an emptied prefix cache counts tokens as taken from it"),
        ({"noise": 0.1}, "a later turn diverges from the float32 oracle"),
        ({"strays": True}, "the last turn is another where nothing came from the cache"),
    ],
    ids=[
        *("nothing cached", "one token too few", "more than was said", "no block"),
        *("never empty", "not emptied", "too coarse", "another from the cache"),
    ],
)
def test_a_conversation_that_goes_wrong_is_not_passed(wrong: dict[str, Any], reason: str) -> None:
    assert failure(checks.multi_turn, trial(started(**wrong))).startswith(reason)


def test_a_tie_may_fall_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GAP", 0.08)
    metrics = checks.multi_turn(trial(started(strays=True)))
    assert metrics["parted"] == pytest.approx(0.08)


def test_a_model_that_does_not_hear_the_tool_proves_no_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaf = likeliest
    monkeypatch.setitem(
        globals(), "likeliest", lambda body, context: deaf(body, [*context[:30], len(context)])
    )
    reason = failure(checks.multi_turn, trial(started()))
    assert reason == "control: another answer of the tool gave the same turn"


# a rollout that is interrupted


def test_a_rollout_goes_on_from_the_tokens_kept_as_if_nothing_had_been() -> None:
    toy = started()
    metrics = checks.partial_rollout(trial(toy))
    assert toy.calls == ["reset", "interrupt"]
    assert metrics["kept_tokens"] == [19, 20, 19, 20, 19]
    assert (metrics["tokens"], metrics["equal"], metrics["parted"]) == (128, 5, 0.0)
    assert metrics["divergence"] == 1.0
    assert metrics["control_parted"] == GAP


def test_a_rollout_may_be_stopped_at_just_the_token_asked_for() -> None:
    assert checks.partial_rollout(trial(started(late=0)))["kept_tokens"] == [16, 17] * 2 + [16]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"late": 112}, "control: the rollouts were not stopped half-way"),
        ({"late": -1}, "control: the rollouts were not stopped half-way"),
        ({"loses": 5}, "continued from the tokens kept, a rollout ends otherwise"),
        ({"noise": 0.1}, "what was kept and continued diverges from the float32 oracle"),
    ],
    ids=["not stopped", "stopped too early", "one token lost", "too coarse"],
)
def test_an_interrupted_rollout_that_goes_wrong_is_not_passed(
    wrong: dict[str, Any], reason: str
) -> None:
    assert failure(checks.partial_rollout, trial(started(**wrong))) == reason


def test_a_lost_token_that_would_be_a_tie_proves_no_continuation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "GAP", 0.08)
    reason = failure(checks.partial_rollout, trial(started()))
    assert reason == "control: a lost token would not be seen"


def test_a_model_that_says_one_token_for_ever_proves_no_continuation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "likeliest", lambda *_: 7)
    reason = failure(checks.partial_rollout, trial(started()))
    assert reason == "control: a lost token would not be seen"


# sleep


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each training step, which is none."""
    sizes: list[int] = []
    monkeypatch.setattr(checks.Trial, "train", lambda _, size: sizes.append(size))
    return sizes


@pytest.fixture
def slept(plain: None, trained: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sleep of numbers instead of tensors; the bytes of each training step."""
    del plain
    monkeypatch.setattr(checks, "size_of", lambda _: 8)
    monkeypatch.setattr(checks, "host_bandwidths", lambda _: (1.0, 1.0))
    return trained


def test_memory_is_freed_and_restored_in_every_cycle(slept: list[int]) -> None:
    toy = started()
    metrics = checks.sleep_1(trial(toy))
    assert [call for call in toy.calls if call != "reset"] == [
        *("sleep 1", "wake weights kv_cache") * 4
    ]
    assert slept == [90] * 4
    assert (metrics["freed_fraction"], metrics["restored_fraction"]) == (1.0, 1.0)
    assert (metrics["growth_bytes"], metrics["cycles"]) == (0, 4)


@pytest.mark.usefixtures("slept")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"readings": [100, 5]}, "control: memory counts as freed while the engine is awake"),
        ({"keeps": True}, "cycle 1: sleep freed only 0% of 0 MiB"),
        ({"readings": [100, 100, 100, 11]}, "cycle 1: sleep freed only 89% of 0 MiB"),
        ({"readings": [100, 100, 100, 0, 89]}, "cycle 1: wake took only part of the memory again"),
        ({"fades": 1e-6}, "cycle 1: after waking the output is another"),
        ({"leaks": 2 << 20}, "memory grew by 2048 KiB in each cycle"),
    ],
    ids=["already free", "kept", "too little freed", "not taken again", "another", "grows"],
)
def test_a_sleep_of_level_1_that_goes_wrong_is_not_passed(
    wrong: dict[str, Any], reason: str
) -> None:
    assert failure(checks.sleep_1, trial(started(**wrong))).startswith(reason)


def test_weights_that_are_gone_come_back_by_a_refit(slept: list[int]) -> None:
    toy = started()
    metrics = checks.sleep_2(trial(toy))
    assert [call for call in toy.calls if call != "reset"] == [
        *("sleep 2", "wake weights kv_cache", "refit")
    ]
    assert (metrics["tensors_kept"], metrics["divergence"], slept) == (0, 1.0, [90])
    assert metrics["control_divergence"] > 1.043


@pytest.mark.usefixtures("slept")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"keeps": True}, "sleep freed only 0% of what was held"),
        ({"hoards": True}, "control: weights survived a level-2 sleep: body, lm_head.weight"),
        (
            {"begins": {"body": 2, HEAD: 4}},  # other bytes of the same numbers
            "control: without weights the output is still right",
        ),
        ({"takes": 0}, "the refit after waking left wrong tensors: body, lm_head.weight"),
        ({"fades": 1e-6}, "after level 2, waking and a refit the output is another; the weights "),
    ],
    ids=["kept", "weights kept", "output kept", "no refit", "a buffer lost"],
)
def test_a_sleep_of_level_2_that_goes_wrong_is_not_passed(
    wrong: dict[str, Any], reason: str
) -> None:
    assert failure(checks.sleep_2, trial(started(**wrong))).startswith(reason)


@pytest.mark.usefixtures("slept")
def test_the_training_loop_goes_round_three_times_with_weights_that_change() -> None:
    toy = started()
    metrics = checks.cycle(trial(toy))
    assert [call for call in toy.calls if call != "reset"] == [
        *("sleep 2", "wake weights", "refit", "wake kv_cache") * 3
    ]
    assert (metrics["level"], metrics["divergence"]) == (2, 1.0)


@pytest.mark.usefixtures("slept")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"begins": OTHERS}, "control: turn 1 had its weights before the refit"),
        ({"takes": 0}, "turn 1: wrong tensors after the refit: body, lm_head.weight"),
        ({"takes": 1}, "turn 2: wrong tensors after the refit: body, lm_head.weight"),
        ({"noise": 0.1}, "turn 1: output is not that of the weights sent"),
        ({"resets": 1}, "turn 2: output is not that of the weights sent"),
    ],
    ids=["filled before", "no refit", "no second refit", "too coarse", "a stale cache"],
)
def test_a_training_loop_that_goes_wrong_is_not_passed(wrong: dict[str, Any], reason: str) -> None:
    assert failure(checks.cycle, trial(started(**wrong))) == reason


@pytest.mark.usefixtures("plain")
def test_an_engine_that_never_sleeps_is_refitted_in_turn_with_weights_that_change() -> None:
    toy = started()
    metrics = checks.refits(trial(toy))
    assert toy.calls == ["refit", "reset"] * checks.REFITS
    assert (metrics["refits"], metrics["divergence"], metrics["growth_bytes"]) == (6, 1.0, 0)


@pytest.mark.usefixtures("plain")
def test_refits_in_turn_have_to_change_the_weights() -> None:
    reason = "control: turn 1 had its weights before the refit"
    assert failure(checks.refits, trial(started(OTHERS))) == reason


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"takes": 0}, "turn 1: wrong tensors after the refit: body"),
        ({"takes": 5}, "turn 6: wrong tensors after the refit: body"),
        ({"noise": 0.1}, "turn 1: output is not that of the weights sent"),
        ({"resets": 5}, "turn 6: output is not that of the weights sent"),
        ({"sours": 0.1}, "turn 2: output is not that of the weights sent"),
        (
            {"readings": [n * 2 * MEBI for n in range(checks.REFITS)]},
            "memory grew by 2048 KiB in each refit",
        ),
    ],
    ids=["no refit", "no last refit", "too coarse", "stale", "soured", "a leak"],
)
def test_refits_in_turn_that_go_wrong_are_not_passed(wrong: dict[str, Any], reason: str) -> None:
    assert failure(checks.refits, trial(started(**wrong))).startswith(reason)


@pytest.mark.usefixtures("plain")
def test_what_the_first_refit_makes_once_is_no_growth() -> None:
    toy = started(readings=[0, *[90 * MEBI] * (checks.REFITS - 1)])
    assert checks.refits(trial(toy))["growth_bytes"] == 0


@pytest.mark.usefixtures("slept")
@pytest.mark.parametrize(
    ("check", "level"), [(checks.sleep_1, 1), (checks.sleep_2, 2), (checks.cycle, 2)]
)
def test_an_engine_started_for_another_level_is_started_anew(
    check: Callable[[Trial], Any], level: int
) -> None:
    toy = started(decides=True, levels=(3 - level,))
    metrics = check(trial(toy))
    begun = f"start dummy=True fp8=False level={level} gpus=1"
    assert [call for call in toy.calls if call.startswith("start")] == [begun]
    assert "start_seconds" in metrics
    plain = check(trial(started()))
    assert "start_seconds" not in plain


# weights in fp8


def test_an_engine_in_fp8_is_started_refitted_put_to_sleep_and_refitted(
    trained: list[int],
) -> None:
    toy = Toy()
    metrics = checks.fp8(trial(toy))
    assert [call for call in toy.calls if call != "reset"] == [
        *("stop", "start dummy=True fp8=True level=2 gpus=1", "refit", "refit"),
        *("sleep 2", "wake weights", "refit", "wake kv_cache"),
    ]
    assert toy.calls[-1] == "reset", "what a cache holds is of no weights that are there now"
    assert toy.weights == {"body": 2.0, HEAD: 1.0}, "the lm_head is sent smaller"
    assert trained == [90]
    assert metrics["divergence"] == metrics["other_divergence"] == 1.0
    assert metrics["freed_fraction"] == 1.0
    assert metrics["stranger_divergence"] > metrics["bound"] == BOUND_FP8


def test_the_bound_is_asked_of_the_model_that_was_sent() -> None:
    here = trial(Toy(), calm=1.0)
    assert here.calmed(here.weights) == WEIGHTS
    here = trial(Toy(), calm=0.25)
    calmed = here.calmed(here.weights)
    assert calmed == {"body": 2.0, HEAD: 1.0}
    assert here.weights == WEIGHTS, "the other checks have their own"
    answers = started(calmed).generate(PROMPTS, 1)
    assert here.divergence(answers, here.oracle, here.calm) == 1.0
    assert here.divergence(answers, here.oracle) > 100


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("change", "others", "reason"),
    [
        ({"begins": {"body": 2.0, HEAD: 1.0}}, OTHERS, "control: the engine had the weights"),
        ({}, WEIGHTS, "control: with other weights sent, the first explain the output"),
        ({"noise": 0.1}, OTHERS, "weights in fp8 diverge"),
        ({"takes": 0}, OTHERS, "weights in fp8 diverge"),
        ({"takes": 1}, OTHERS, "control: with other weights sent, the first explain the output"),
        ({"takes": 2}, OTHERS, "after sleeping and a refit the output is another"),
    ],
    ids=[
        *("filled before", "one set twice", "too coarse", "no refit", "no second refit"),
        "no refit after sleep",
    ],
)
def test_an_engine_in_fp8_that_is_wrong_is_not_passed(
    change: dict[str, Any], others: dict[str, Any], reason: str
) -> None:
    toy = Toy()
    vars(toy).update(change)
    assert failure(checks.fp8, trial(toy, others)).startswith(reason)


# the engine's own server


def test_weights_change_in_the_middle_of_the_rollouts_of_a_server(trained: list[int]) -> None:
    own: Any = started()
    web = Toy()
    here = trial(own, serve=lambda: web)
    metrics = checks.server(here)
    assert own.calls == ["stop"], "two engines have no room on one GPU"
    assert [call for call in web.calls if call != "reset"] == [
        *("start dummy=True fp8=False level=2 gpus=1", "refit", "interrupt", "refit"),
        *("sleep 2", "wake weights", "refit", "wake kv_cache", "stop"),
    ]
    assert here.engine is own
    assert metrics["kept_tokens"] == [19, 20, 19, 20, 19]
    assert metrics["divergence"] == metrics["other_divergence"] == 1.0
    assert min(metrics["control_divergence"], metrics["stranger_divergence"]) > 1.043
    assert (metrics["freed_bytes"], trained) == (100, [90])
    assert metrics["endpoints"] == ["/a", "/b"]
    assert not [name for name in metrics if name.startswith("paused")]


@pytest.fixture
def pausing(monkeypatch: pytest.MonkeyPatch, trained: list[int]) -> Callable[..., Toy]:
    """Makes servers that can be paused, wrong in some way; nobody waits long for nothing."""
    del trained
    monkeypatch.setattr(checks, "PAUSE", 0.05)

    def make(**wrong: Any) -> Toy:
        web = Toy()
        web.pauses = True
        vars(web).update(wrong)
        return web

    return make


@pytest.mark.parametrize(
    ("transports", "way"),
    [(("paper", "disk"), "refit disk"), (("paper",), "refit")],
    ids=["by a checkpoint where it takes one", "as ever"],
)
def test_weights_change_in_a_pause_of_a_server_that_has_one(
    pausing: Callable[..., Toy], transports: tuple[str, ...], way: str
) -> None:
    web = pausing(transports=transports)
    metrics = checks.server(trial(started(), serve=lambda: web))
    assert [call for call in web.calls if call != "reset"][1:8] == [
        *("refit", "halt", way, "resume", "refit"),
        *("interrupt", "refit"),
    ]
    assert metrics["paused_tokens"] == [19, 20, 19, 20, 19]
    assert metrics["paused_divergence"] == 1.0
    assert metrics["paused_stranger_divergence"] > 1.043
    assert metrics["paused_refusals"] == 0, "it holds what it is asked"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"restless": True}, "the server says that it is paused, and answers"),
        ({"late": 112}, "control: the pause did not stop the rollouts half-way"),
        ({"takes": 1}, "control: the first weights explain what was answered after a pause"),
        ({"dull": True}, "control: the first weights explain what was answered after a pause"),
        ({"takes": 0}, "the server's output is not that of the weights sent"),
        ({"sours": 0.1}, "after a pause the server's output is not that of the weights sent"),
    ],
    ids=[
        *("it goes on", "it stops nothing", "no weights come", "old weights answer"),
        *("no weights came ever", "too coarse"),
    ],
)
def test_a_server_whose_pause_is_none_is_not_passed(
    pausing: Callable[..., Toy], wrong: dict[str, Any], reason: str
) -> None:
    web = pausing(**wrong)
    assert failure(checks.server, trial(started(), serve=lambda: web)) == reason
    assert web.calls[-1] == "stop"


def test_a_server_that_refuses_in_a_pause_is_asked_until_it_answers(
    pausing: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "AGAIN", 0.01)
    web = pausing(mute="with 503: Generation is paused.")
    metrics = checks.server(trial(started(), serve=lambda: web))
    assert metrics["paused_refusals"] > 1
    assert metrics["paused_divergence"] == 1.0
    assert metrics["paused_stranger_divergence"] > 1.043


def test_a_server_that_fails_in_a_pause_has_an_error_and_not_a_wrong_pause(
    pausing: Callable[..., Toy],
) -> None:
    web = pausing(mute="with 500: out of memory")
    with pytest.raises(EngineError, match="answered /generate with 500"):
        checks.server(trial(started(), serve=lambda: web))
    assert web.calls[-1] == "stop"


def test_a_server_that_refuses_after_its_pause_too_has_an_error() -> None:
    over = threading.Event()
    asked: list[bool] = []

    def ask() -> list[Completion]:
        asked.append(over.is_set())
        over.set()  # the pause ends while it refuses: that one is asked once more
        raise EngineError("the server answered /generate with 503")

    refusals: list[str] = []
    with pytest.raises(EngineError, match="with 503"):
        checks.until_answered(ask, over, refusals)
    assert (asked, len(refusals)) == ([False, True], 1)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"model": "/other", "gpus": 1}, "{'model': '/other'}"),
        ({"model": "/m", "gpus": 2}, "{'gpus': 2}"),
        ({"gpus": 1}, "{'gpus': 1}"),
        ({"model": "/m", "tp": 4}, "{'tp': 4}"),
    ],
)
def test_a_server_that_tells_a_trainer_something_else_of_itself_is_not_passed(
    pausing: Callable[..., Toy], told: dict[str, Any], said: str
) -> None:
    web = pausing(says_of_itself=told)
    reason = failure(checks.server, trial(started(), serve=lambda: web))
    assert reason == f"the server tells a trainer {said} of itself"
    web = pausing(says_of_itself={"model": "/m"})
    checks.server(trial(started(), serve=lambda: web))


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("change", "others", "reason"),
    [
        ({"begins": WEIGHTS}, OTHERS, "control: the server had the weights before"),
        ({}, WEIGHTS, "control: the oracle of the first weights agrees with the second"),
        ({"takes": 1}, OTHERS, "control: the oracle of the first weights agrees with the second"),
        ({"takes": 0}, OTHERS, "the server's output is not that of the weights sent"),
        ({"noise": 0.1}, OTHERS, "the server's output is not that of the weights sent"),
        ({"loses": 5}, OTHERS, "the server's output is not that of the weights sent"),
        ({"resets": 2}, OTHERS, "control: the oracle of the first weights agrees with the second"),
        ({"keeps": True}, OTHERS, "asleep, the server freed only 0 bytes"),
        ({"takes": 2}, OTHERS, "after sleeping and a refit the server's output is another"),
        ({"late": 112}, OTHERS, "control: the rollouts were not stopped half-way"),
        ({"late": -1}, OTHERS, "control: the rollouts were not stopped half-way"),
    ],
    ids=[
        *("filled before", "one set twice", "no second refit", "no refit", "too coarse"),
        *("a token lost", "a stale cache", "no memory freed", "no refit after sleep"),
        *("not stopped", "stopped too early"),
    ],
)
def test_a_server_that_is_wrong_is_not_passed_and_is_stopped(
    change: dict[str, Any], others: dict[str, Any], reason: str
) -> None:
    own: Any = started()
    web = Toy()
    vars(web).update(change)
    here = trial(own, others, serve=lambda: web)
    assert failure(checks.server, here).startswith(reason)
    assert web.calls[-1] == "stop"
    assert here.engine is own


def test_a_backend_without_a_server_does_not_pass_for_one() -> None:
    toy = started()
    assert failure(checks.server, trial(toy)) == "this backend has no server to drive"
    assert toy.weights == WEIGHTS


@pytest.mark.parametrize("breaks", ["makes none", "does not start"])
def test_a_server_that_does_not_start_leaves_the_engine_to_stop(breaks: str) -> None:
    def start(*_: object, **__: object) -> None:
        raise EngineError("no port")

    def serve() -> Any:
        if breaks == "makes none":
            raise EngineError("no port")
        web = Toy()
        web.start = start  # type: ignore[method-assign]
        return web

    own: Any = started()
    here = trial(own, serve=serve)
    with pytest.raises(EngineError, match="no port"):
        checks.server(here)
    assert here.engine is own


# two GPUs


class Gpus:
    """Two of them, and what is taken from the second while somebody holds it."""

    def __init__(self) -> None:
        self.free = [1000, 1000]
        self.emptied = 0

    def torch(self) -> ModuleType:
        module = ModuleType("torch")
        vars(module).update(
            uint8="uint8",
            cuda=SimpleNamespace(
                mem_get_info=lambda number: (self.free[number], 2000), empty_cache=self.empty
            ),
            empty=self.ballast,
        )
        return module

    def empty(self) -> None:
        self.emptied += 1

    def ballast(self, size: int, *, dtype: str, device: str) -> Any:
        gpus = self

        class Ballast:
            def __init__(self) -> None:
                gpus.free[1] -= size

            def __del__(self) -> None:
                gpus.free[1] += size

        assert (dtype, device) == ("uint8", "cuda:1")
        return Ballast()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    made = Gpus()
    monkeypatch.setitem(sys.modules, "torch", made.torch())
    monkeypatch.setenv("BALANCE", "whatever the image says")
    monkeypatch.delenv("SECOND", raising=False)
    return made


INSISTING = {"BALANCE": "1", "SECOND": "on"}


def on(gpus: Gpus, **wrong: Any) -> Toy:
    """An engine that can insist on GPUs alike."""
    toy = started(insisting=INSISTING, room=lambda: gpus.free[1] > 0.9 * gpus.free[0])
    vars(toy).update(wrong)
    return toy


def test_an_engine_starts_on_two_gpus_that_are_not_alike(gpus: Gpus) -> None:
    toy = on(gpus)
    metrics = checks.tensor_parallel(trial(toy))
    assert toy.calls[:3] == [
        "stop",
        "start dummy=True fp8=False level=1 gpus=2",
        "start dummy=True fp8=False level=2 gpus=2",
    ]
    assert (metrics["gpus"], metrics["refused"]) == (2, True)
    assert metrics["free_bytes"] == [1000, 700]
    assert metrics["divergence"] == 1.0
    assert metrics["control_divergence"] > 1.043
    assert toy.weights == WEIGHTS
    assert gpus.free == [1000, 1000], "the ballast is given back"
    assert gpus.emptied
    assert (os.environ["BALANCE"], os.environ.get("SECOND")) == ("whatever the image says", None)


def test_an_engine_that_never_insists_is_not_asked_to(gpus: Gpus) -> None:
    toy = on(gpus, insisting={})
    metrics = checks.tensor_parallel(trial(toy))
    assert [call for call in toy.calls if call.startswith("start")] == [
        "start dummy=True fp8=False level=2 gpus=2"
    ]
    assert "refused" not in metrics


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"room": lambda: True},
            "control: told to insist on balance, it did not refuse the GPUs for it",
        ),
        ({"begins": WEIGHTS}, "control: the engine had the weights before they were sent"),
        ({"noise": 0.1}, "on two GPUs a batch diverges from the float32 oracle"),
        ({"takes": 0}, "on two GPUs a batch diverges from the float32 oracle"),
    ],
    ids=["insists on nothing", "filled before", "too coarse", "no refit"],
)
def test_an_engine_on_two_gpus_that_is_wrong_is_not_passed(
    gpus: Gpus, wrong: dict[str, Any], reason: str
) -> None:
    toy = on(gpus, **wrong)
    assert failure(checks.tensor_parallel, trial(toy)) == reason
    gc.collect()  # the failure's traceback held it
    assert gpus.free == [1000, 1000]
    assert os.environ["BALANCE"] == "whatever the image says"


def test_an_engine_that_started_although_it_insisted_is_stopped(gpus: Gpus) -> None:
    toy = on(gpus, room=lambda: True)
    failure(checks.tensor_parallel, trial(toy))
    assert toy.weights is None


def test_another_refusal_is_none_of_unbalanced_gpus(gpus: Gpus) -> None:
    toy = on(gpus, room=lambda: True, broken="out of memory")
    assert failure(checks.tensor_parallel, trial(toy)).startswith("control: told to insist on")
    assert not checks.refuses(toy, Path("/m"), INSISTING)
    assert os.environ["BALANCE"] == "whatever the image says"


def test_an_engine_that_does_not_start_on_two_gpus_gives_the_ballast_back(gpus: Gpus) -> None:
    toy = on(gpus, insisting={}, broken="out of memory")
    with pytest.raises(EngineError, match=r"^out of memory$"):
        checks.tensor_parallel(trial(toy))
    gc.collect()
    assert gpus.free == [1000, 1000]


# faults made on purpose


@pytest.mark.parametrize("fault", ["cold-turns", "lost-token", "deaf-server"])
@pytest.mark.usefixtures("trained")
def test_a_fault_made_on_purpose_is_found_by_its_check_for_its_reason(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(faults, "spoil", lambda tensors, _: tensors)
    here = trial(
        Faulty(started(), fault), serve=lambda: Faulty(Toy(), fault, served=True), fault=fault
    )
    here.engine.generate(PROMPTS[:1], 1)  # as the start does
    for name in ("multi-turn", "partial-rollout", "server"):
        if name == FAULTS[fault].check:
            assert FAULTS[fault].reason in failure(checks.CHECKS[name], here)
            return
        checks.CHECKS[name](here)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("transport", ["paper", "pencil", "chalk"])
def test_a_fault_aimed_at_a_transport_is_found_in_that_one(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """And another transport's is not taken for it."""
    monkeypatch.setattr(faults, "spoil", lambda tensors, _: list(tensors)[1:])
    toy, fault = dummy(), f"dropped-tensor@{transport}"
    why = failure(checks.refit, trial(Faulty(toy, fault), transports=toy.transports, fault=fault))
    assert why == f"by {transport} the engine does not hold what was sent: body"
    known = ["start", "refit"]
    assert faults.unseen(fault, {"refit": why}, known) == ""
    assert faults.unseen("dropped-tensor", {"refit": why}, known) == ""
    other = next(name for name in toy.transports if name != transport)
    assert faults.unseen(f"dropped-tensor@{other}", {"refit": why}, known) == (
        f"refit failed because {why}"
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reason_of_every_fault_is_one_that_a_check_gives(fault: str) -> None:
    modules = (checks, disaggregated, fp8_kv, long, lora, pressure, rush, training)
    sources = "".join(inspect.getsource(module) for module in modules)
    source = re.sub(r'"\s+f?"', "", sources)  # sentences that take two lines
    assert FAULTS[fault].reason in source


# tensors (with torch: inside the images)


def test_a_digest_is_of_the_bytes_in_their_order(torch: Any) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(torch.bfloat16)
    expected = hashlib.sha256(bytes(as_bytes(tensor).numpy())).hexdigest()
    assert checks.digest(tensor) == expected
    turned = tensor.t()
    assert checks.digest(turned) != expected
    assert checks.digest(turned.t()) == expected
    assert checks.digest(torch.nn.Parameter(tensor)) == expected


def test_the_size_of_weights_is_in_bytes(torch: Any) -> None:
    weights = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}
    assert checks.size_of(weights) == 3 * 5 * 2 + 7 * 4


def test_a_training_step_fills_what_it_takes_and_gives_it_back(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    full = torch.full
    made: list[Any] = []

    def remembers(*arguments: Any, **options: Any) -> Any:
        tensor = full(*arguments, **options)
        assert tensor.ne(0).all()
        made.append((tensor.numel() * tensor.element_size(), tensor.device.type))
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "full", remembers)
    trial(Toy(), device="cpu").train(1000)
    assert made[0] == (1000, "cpu")
    assert made[1]() is None


@pytest.mark.usefixtures("torch")
def test_the_yardsticks_of_copies_are_measured_where_the_weights_lie() -> None:
    rates = [checks.copy_bandwidth("cpu", 1 << 16), *checks.host_bandwidths("cpu", 1 << 16)]
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates)


# every check that sleeps, and every bound


def sleeping(check: str, **wrong: Any) -> str:
    """The reason that a check gives for an engine, or its server, whose sleep is wrong."""
    toy: Any = started(**wrong)
    here = trial(toy) if check != "server" else trial(started(), serve=lambda: toy)
    if check == "cycle":
        toy.weights = dict(WEIGHTS)
    return failure(checks.CHECKS[check], here)


SLEEPING = ("sleep-1", "sleep-2", "cycle", "fp8", "server")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("check", SLEEPING)
@pytest.mark.parametrize("wrong", [{"keeps": True}, {"halves": True}], ids=["nothing", "half"])
def test_a_sleep_that_frees_nothing_or_half_passes_no_check(
    check: str, wrong: dict[str, Any]
) -> None:
    assert "freed only" in sleeping(check, **wrong)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("check", [name for name in SLEEPING if name != "fp8"])
def test_weights_outside_of_what_a_sleep_gives_back_pass_no_check(check: str) -> None:
    """All of the KV cache is freed then, and the engine says that this is all that it has."""
    assert "can give back is only" in sleeping(check, outside=True)


@pytest.mark.usefixtures("trained")
def test_checks_that_sleep_are_these() -> None:
    found = {name for name, check in checks.CHECKS.items() if ".sleep(" in inspect.getsource(check)}
    assert found == set(SLEEPING)


def test_one_request_that_is_wrong_fails_a_check_that_their_mean_passes() -> None:
    right, wrong = ((0.0,) * 16, [0.0] * 16), ((0.0,) * 16, [-0.2] * 16)
    metrics: dict[str, Any] = {}
    with pytest.raises(
        Failed, match=r"^too far \(request 3 of 8: 1\.221, where 1\.043 is the most"
    ):
        checks.agree([right, right, wrong, *[right] * 5], 1.043, "too far", metrics)
    assert metrics["divergence"] < 1.043 < metrics["worst_request"]
    checks.agree([right] * 8, 1.043, "too far", metrics)
    with pytest.raises(Failed, match="request 2 of 2: inf"):
        checks.agree([right, ((math.nan,), [0.0])], 1.043, "too far", metrics)


@pytest.mark.parametrize("total", [24, 40, 48, 80, 141])
def test_the_second_gpu_has_less_than_the_first_whatever_their_size(total: int) -> None:
    """The trainer's own weights lie on the first, and SGLang tolerates a tenth of difference."""
    free = [(total - 12) << 30, total << 30]
    left = free[1] - checks.ballast(*free)
    assert left / free[0] == pytest.approx(1 - checks.IMBALANCE, abs=1e-6)
    assert checks.ballast(100, 50) == 0, "it has less already"


def test_growth_is_counted_by_the_cycle() -> None:
    assert checks.growth([5, 100, 120, 140]) == 45
    assert checks.growth([140, 120, 100]) == 0
    assert checks.growth([7]) == 0
    assert checks.GROWTH_CPU < checks.GROWTH < 20 << 20, "a few granules, not a share of a model"

"""What the check of LoRA promises of itself: what it asks for, and what it refuses to pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import checks, lora
from rollout.backends import Completion, EngineError
from rollout.backends.adapters import FAULTS as MADE
from rollout.backends.adapters import adapting
from rollout.checks import CHECKS
from rollout.faults import FAULTS, Faulty

from .test_checks import HEAD, PROMPTS, Judge, Toy, failure, trial

ONE, TWO = {"up": 0.25, "down": 0.5}, {"up": 0.125, "down": 1.0}  # what two adapters add
UNDER = "body.base_layer"


class Adapter:
    """An adapter of two layers, which are numbers to add to a weight that is one."""

    config: Mapping[str, Any] = {"r": 8}

    def __init__(self, tensors: Mapping[str, float]) -> None:
        self.tensors = tensors

    def layers(self) -> list[str]:
        return list(self.tensors)

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "numbers").write_text(repr(dict(self.tensors)))
        return folder


@contextlib.contextmanager
def merged(judge: Judge, adapter: Adapter, without: str = "") -> Iterator[Judge]:
    before = judge.weights
    added = sum(value for layer, value in adapter.tensors.items() if layer != without)
    judge.weights = {**before, "body": before["body"] + added}
    yield judge
    judge.weights = before


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers instead of tensors."""
    made = {lora.SEEDS[0]: Adapter(ONE), lora.SEEDS[1]: Adapter(TWO)}
    monkeypatch.setattr(lora, "make", lambda _weights, seed, _model: made[seed])
    monkeypatch.setattr(lora, "merged", merged)
    monkeypatch.setattr(checks, "digest", str)
    monkeypatch.setattr(lora, "digest", str)
    monkeypatch.setattr(checks.Trial, "train", lambda _self, _size: None)


class Adapted(Toy):
    """A toy with adapters. Its attributes below the line are ways to be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, float] = {}
        self.caches: dict[int, list[Any]] = {}
        self.bytes = "as loaded"
        self.level = 0
        self.used: list[str] = []
        # ---
        self.names = "refused"  # a trainer's own, for a refit: refused, lost or taken
        self.lost_under = False  # and those under the wrapper arrive nowhere
        self.factor = 1.0  # what an adapter is multiplied by
        self.one_layer = False  # of an adapter
        self.spills = 0.0  # of an adapter into answers without one
        self.mixes = False  # in a batch all requests have what one has
        self.shares = ""  # one prefix cache for all adapters, or for all answers: adapters, all
        self.after_1 = "kept"  # an adapter: kept, zero, moved (its bytes alone)
        self.after_2 = "refused"  # right, refused or wrong
        self.loads = 99  # so many from folders; those that follow leave the one before
        self.takes_in = 99  # the same from memory
        self.again = True  # takes an adapter after a sleep of level 2
        self.dies = False  # and answers nothing then
        self.stays = False  # an adapter that is removed
        self.falls = False  # an adapter with a refit of the base
        self.whose = "a toy"
        self.wobbles = 0.0  # answers with an adapter, each by so much more
        self.base_fades = 0.0  # noise of the base after a sleep of level 2

    def start(self, *given: Any, **more: Any) -> None:
        super().start(*given, **more)
        self.there, self.caches, self.asleep = {}, {}, False

    def put(self, number: int, tensors: Mapping[str, float], *, replaces: bool) -> None:
        value = sum(tensors.values()) - (tensors["up"] if self.one_layer else 0.0)
        old = next(iter(self.there.values()), None)
        self.there = {number: value * self.factor if replaces or old is None else old}

    def load(self, number: int, folder: Path) -> None:
        self.used.append(f"load {number}")
        assert number not in self.there, "a new number for each folder"
        self.loads -= 1
        tensors = dict(eval((folder / "numbers").read_text()))  # noqa: S307 - our own
        self.put(number, tensors, replaces=self.loads >= 0)

    def take(self, number: int, config: Mapping[str, Any], tensors: Mapping[str, float]) -> None:
        self.used.append(f"take {number}")
        assert config == Adapter.config
        if self.dies and self.level == 2:
            raise EngineError("the engine process ended")
        self.takes_in -= 1
        replaces = self.takes_in >= 0 and (self.level < 2 or self.again)
        self.put(number, tensors, replaces=replaces)

    def drop(self, number: int) -> None:
        self.used.append(f"drop {number}")
        if not self.stays:
            del self.there[number]

    def loaded(self) -> list[int]:
        return sorted(self.there)

    def imprint(self) -> str:
        return self.bytes

    def adapted(
        self, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int]
    ) -> list[Completion]:
        if missing := set(numbers) - {0, *self.there}:
            raise EngineError(f"no adapter {missing}")
        if self.mixes:
            numbers = [max(numbers)] * len(numbers)
        return [
            self.of(number, list(prompt), tokens)
            for number, prompt in zip(numbers, prompts, strict=True)
        ]

    def of(self, number: int, prompt: list[int], tokens: int) -> Completion:
        assert self.weights is not None
        before, self.weights = self.weights, dict(self.weights)
        self.weights["body"] += self.there.get(number, 0.0)
        known, noise = self.computed, self.noise
        if self.shares != "all":
            key = min(number, 1) if self.shares else number
            self.computed = self.caches.setdefault(key, [])
        self.noise += self.wobbles * len(self.used) if number else 0.0
        self.used.append(f"answer {number}")
        try:
            return self.answer(prompt, tokens)
        finally:
            self.weights, self.computed, self.noise = before, known, noise

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        assert self.weights is not None
        before = self.weights
        if self.there and self.spills:
            self.weights = {**before, "body": before["body"] + self.spills}
        try:
            return super().generate(prompts, tokens)
        finally:
            self.weights = before

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self.caches.clear()

    def wrapped(self, names: Sequence[str]) -> dict[str, str]:
        return {name: UNDER if name == "body" else name for name in names}

    def refit(self, tensors: Iterable[tuple[str, Any]], _: str = "") -> int:
        assert self.weights is not None
        sent, plain = dict(tensors), "body"
        if plain in sent and self.names == "refused":
            raise EngineError("KeyError: 'body'")
        kept = self.weights["body"]
        body = sent.pop(UNDER, sent.pop(plain, kept) if self.names == "taken" else kept)
        sent.pop(plain, None)
        self.weights = {**sent, "body": kept if self.lost_under else body}
        if self.falls:
            self.there = dict.fromkeys(self.there, 0.0)
        return 8

    def sleep(self, level: int) -> None:
        super().sleep(level)
        self.level = level
        if level == 1 and self.after_1 == "zero":
            self.there = dict.fromkeys(self.there, 0.0)
        if level == 1 and self.after_1 == "moved":
            self.bytes = "moved"
        if level == 2 and self.after_2 == "refused":
            self.there = {}
        if level == 2 and self.after_2 == "wrong":
            self.there = dict.fromkeys(self.there, 0.0)
        self.noise += self.base_fades if level == 2 else 0.0

    def takes_tensors(self) -> str:
        return self.whose


def run(**wrong: Any) -> tuple[dict[str, Any], Adapted, Toy]:
    """The metrics of the check on such a toy, the toy, and the engine that was there before."""
    engine, own = toy(**wrong)
    return lora.lora(trial(own)), engine, own


def toy(**wrong: Any) -> tuple[Adapted, Toy]:
    engine = Adapted()
    vars(engine).update(wrong)
    own = Toy()
    own.adapting = lambda: engine  # type: ignore[attr-defined]
    return engine, own


def test_a_sound_engine_passes_and_the_one_before_it_is_left_in_its_place() -> None:
    metrics, engine, own = run()
    assert own.calls == ["stop"]
    assert engine.calls[-1] == "stop"
    assert metrics["divergence"] == metrics["replaced_divergence"] == 1.0
    assert metrics["after_level_2"] == "refused"
    assert metrics["tensors_taken_by"] == "a toy"
    assert min(metrics["control_divergence"], metrics["weakest_divergence"]) > 1.043
    asked = [call for call in engine.used if not call.startswith("answer")]
    assert asked == [*("load 1", "load 2", "drop 2"), *["take 123"] * 3]


def test_the_report_says_by_which_names_the_base_was_refitted() -> None:
    refused, lost, taken = (run(names=n)[0] for n in ("refused", "lost", "taken"))
    assert refused["refit_names"] == lost["refit_names"] == UNDER
    assert refused["refit_names_of_a_trainer"] == "KeyError: 'body'"
    assert lost["refit_names_of_a_trainer"] == "lost without a word: body"
    assert refused["refit_names_changed"] == 1
    assert taken["refit_names"] == "as a trainer has them"
    assert "refit_names_of_a_trainer" not in taken


def test_the_report_says_whether_level_2_keeps_the_adapter_or_has_it_refused() -> None:
    assert run(after_2="refused")[0]["after_level_2"] == "refused"
    metrics = run(after_2="right")[0]
    assert metrics["after_level_2"] == "right"
    assert metrics["level_2_divergence"] == 1.0


def test_an_engine_that_takes_none_from_memory_is_proved_by_folders_and_the_report_says_so() -> (
    None
):
    metrics, engine, _ = run(whose="")
    assert metrics["tensors_taken_by"] == ""
    assert "memory_divergence" not in metrics
    asked = [call for call in engine.used if not call.startswith("answer")]
    assert asked == ["load 1", "load 2", "load 3"]
    assert metrics["after_level_2"] == "refused"


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_that_the_image_does_not_promise_is_not_slept(level: int) -> None:
    engine, own = toy()
    metrics = lora.lora(trial(own, sleep_levels=[level]))
    assert [call for call in engine.calls if call.startswith("sleep")] == [f"sleep {level}"]
    assert ("after_level_2" in metrics) is (level == 2)
    assert ("repeats_to_the_bit" in metrics) is (level == 1)


def test_an_engine_that_never_sleeps_is_asked_for_all_the_rest() -> None:
    engine, own = toy()
    metrics = lora.lora(trial(own, sleep_levels=[]))
    assert metrics["replaced_divergence"] == metrics["other_divergence"] == 1.0
    assert not [call for call in engine.calls if call.startswith("sleep")]


def test_an_engine_that_decides_its_level_at_the_start_is_started_for_each() -> None:
    _, engine, _ = run(decides=True)
    assert [call.split()[3] for call in engine.calls if call.startswith("start")] == [
        *("level=1", "level=2")
    ]


def test_kernels_that_add_in_any_order_are_held_to_the_bound_and_their_bytes_to_the_bit() -> None:
    metrics, _, _ = run(wobbles=1e-5)
    assert metrics["repeats_to_the_bit"] is False
    assert run()[0]["repeats_to_the_bit"] is True


LEVEL_1 = "after a sleep of level 1 the adapter is not what it was"
LEVEL_2 = "after a sleep of level 2 the adapter"
FOLDER = "another adapter was loaded from its folder, and the output is not that of it"
HOLDS = "under its adapters the engine does not hold the base's weights as they were sent: body"
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"begins": {"body": 2.0, HEAD: 2.0}}, "control: the engine had the weights before"),
    ({"lost_under": True}, HOLDS),
    ({"names": "lost", "lost_under": True}, HOLDS),
    ({"factor": 0.0}, "with the adapter the output is not that of the merged weights"),
    ({"factor": 0.5}, "with the adapter the output is not that of the merged weights"),
    ({"one_layer": True}, "with the adapter the output is not that of the merged weights"),
    ({"spills": 1e-9}, "with an adapter loaded the answers without it are others"),
    ({"mixes": True}, "in a batch of requests with the adapter and without, one is answered"),
    ({"after_1": "zero"}, LEVEL_1),
    ({"after_1": "moved"}, f"{LEVEL_1}: the engine holds other bytes"),
    ({"keeps": True}, "with an adapter a sleep of level 1 freed only 0%"),
    ({"fades": 1e-9}, f"{LEVEL_1}: the output is another"),
    ({"loads": 1}, FOLDER),
    ({"shares": "all"}, "in a batch of requests with the adapter and without, one is answered"),
    ({"shares": "adapters"}, FOLDER),
    ({"stays": True}, "adapter 2 was removed, and the engine says that it has [2]"),
    ({"takes_in": 1}, "an adapter was replaced from memory, and the output is not that of the new"),
    ({"falls": True}, "after a refit of the base the output is not that of its new weights"),
    ({"after_2": "wrong"}, f"{LEVEL_2} is neither right nor refused; loaded again it is right"),
    ({"after_2": "wrong", "again": False}, f"{LEVEL_2}, loaded again, is not what it was"),
    ({"dies": True}, "after a sleep of level 2 no adapter can be loaded any more: the engine"),
    ({"base_fades": 1e-9}, "after a sleep of level 2 the answers without the adapter are others"),
]


@pytest.mark.parametrize(("wrong", "reason"), WAYS, ids=[str(wrong) for wrong, _ in WAYS])
def test_an_engine_that_is_wrong_with_adapters_is_not_passed_and_is_stopped(
    wrong: dict[str, Any], reason: str
) -> None:
    engine, own = toy(**wrong)
    here = trial(own)
    assert failure(CHECKS["lora"], here).startswith(reason)
    assert engine.calls[-1] == "stop"
    assert here.engine is own


def test_an_adapter_whose_layers_do_not_count_proves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle = Adapter({"up": 0.25, "idle": 0.0})
    monkeypatch.setattr(lora, "make", lambda _weights, _seed, _model: idle)
    assert failure(lora.lora, trial(toy()[1])) == (
        "control: an adapter without idle would not be seen"
    )


def test_of_a_model_with_many_layers_no_single_one_is_asked_to_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = {f"layer {place}": 0.03125 for place in range(lora.MOST_LAYERS)}
    made = {lora.SEEDS[0]: Adapter(many | {"idle": 0.0}), lora.SEEDS[1]: Adapter(TWO)}
    monkeypatch.setattr(lora, "make", lambda _weights, seed, _model: made[seed])
    metrics = run()[0]
    assert metrics["divergence"] == 1.0
    assert "weakest_divergence" not in metrics


def test_two_adapters_that_answer_alike_prove_no_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "make", lambda _weights, _seed, _model: Adapter(ONE))
    what = "control: the first adapter's answers pass for the second's"
    assert failure(lora.lora, trial(toy()[1])) == what


def test_digests_of_what_is_sent_as_it_is_are_those_that_another_check_has_made() -> None:
    here = trial(toy()[1])
    here._digests[id(here.weights)] = {"body": "known", HEAD: "of the whole head"}
    made = lora.calmed(here, here.weights, 0.5)
    assert made == {"body": 2.0, HEAD: 2.0}
    assert here._digests[id(made)] == {"body": "known", HEAD: "2.0"}


def test_no_digests_are_left_for_another_set_that_comes_to_lie_there() -> None:
    here = trial(toy()[1])
    lora.lora(here)
    assert here._digests == {}


def test_a_model_of_the_users_is_sent_as_it_is() -> None:
    engine, own = toy()
    lora.lora(trial(own, calm=1.0))
    assert engine.calls[-1] == "stop"


# faults


def test_a_fault_of_adapters_is_made_inside_the_engine_that_has_them() -> None:
    for fault in FAULTS:
        given: list[str] = []
        inner = SimpleNamespace(inject=given.append)
        outer: Any = SimpleNamespace(
            device="",
            transports=(),
            kv_bytes=0,
            mlp_bias=True,
            levels=(),
            cache_block=1,
            witness=False,
            insisting={},
            adapting=lambda inner=inner: inner,
        )
        assert adapting(Faulty(outer, fault)) is inner  # type: ignore[arg-type]
        assert given == ([fault] if fault in MADE else [])


def test_every_fault_of_adapters_is_one_that_the_check_gives_the_reason_of() -> None:
    reasons = [reason for _, reason in WAYS]
    for fault in MADE:
        assert FAULTS[fault].check == "lora"
        assert any(FAULTS[fault].reason in reason for reason in reasons), fault


def test_the_prompts_of_the_toy_are_more_than_one() -> None:
    """A batch of one request has nothing to mix."""
    assert len(PROMPTS) > 1

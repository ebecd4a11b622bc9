"""What an injected fault is: exactly one thing that goes wrong, and a check that has to see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rollout import disaggregated, faults, fp8_kv_faults, pressure_faults, smoke
from rollout.backends import Completion, adapters
from rollout.faults import FAULTS, Faulty
from rollout.problem import Problem

STREAM = ("dropped-tensor", "flipped-byte", "swapped-tensors", "wrong-dtype", "partial-bucket")
PROTOCOL = ("refit-skipped", "stale-cache", "sleep-frees-nothing", "wake-restores-nothing")
ROLLOUTS = ("cold-turns", "lost-token", "deaf-server")
ENGINE = ("leak-per-cycle", "lost-buffer")
ADAPTERS = adapters.FAULTS
PROOF = ("oracle-of-other-weights",)
LONG = ("frozen-rotary", "halved-window", "shifted-chunk", "wrong-blocks")
TRAINING = ("lost-tensor-in-training", "stale-weights-in-training")
EXPERTS = faults.OF_EXPERTS  # what they do: test_moe.py


class Recorder:
    """An engine that only remembers what it was asked for."""

    device = "paper"
    transports: tuple[str, ...] = ("paper",)
    cache_block = 16
    kv_bytes = 4096
    mlp_bias = False

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        # What some know when they have started alone.
        self.levels: tuple[int, ...] = ()
        self.witness = False
        self.insisting: Mapping[str, str] = {}

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.calls.append(("start", model, dummy, fp8, level, gpus))
        self.levels, self.witness, self.insisting = (level,), True, {"BALANCE": "1"}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        self.calls.append(("generate", prompts, tokens))
        return [COMPLETION]

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        self.calls.append(("interrupt", prompts, tokens, after))
        ids = tuple(range(100, 100 + after))
        return [Completion(ids, tuple(-0.5 * i for i in ids), 3) for _ in prompts]

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append(("wake", tags))

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        self.calls.append(("refit", [name for name, _ in tensors], transport))
        return 1

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache",))

    def digests(self) -> dict[str, str]:
        return {"a": "digest"}

    def remember(self) -> None:
        self.calls.append(("remember",))

    def unchanged(self) -> bool:
        self.calls.append(("unchanged",))
        return False

    def held(self) -> int:
        return 2

    def memory(self) -> int:
        return 3

    def inject(self, fault: str) -> None:
        self.calls.append(("inject", fault))

    def stop(self) -> None:
        self.calls.append(("stop",))


COMPLETION = Completion((1,), (-0.5,))
MODEL = Path("/model")


class Tensor:
    """Ten numbers of two bytes."""

    def numel(self) -> int:
        return 10

    def element_size(self) -> int:
        return 2


TENSOR: Any = Tensor()


def driven(
    fault: str, monkeypatch: pytest.MonkeyPatch, *, served: bool = False
) -> list[tuple[Any, ...]]:
    """What an engine is asked for in one turn, with a fault in between."""
    monkeypatch.setattr(faults, "spoil", lambda tensors, _: list(tensors))
    recorder = Recorder()
    engine = Faulty(recorder, fault, served=served)
    engine.start(MODEL, dummy=True, fp8=True, level=1, gpus=2)
    assert engine.generate([[1]], 2) == [COMPLETION]
    kept = engine.interrupt([[1], [2, 3]], 9, 4)
    assert [len(answer.tokens) >= 4 for answer in kept] == [True, True]
    engine.sleep(1)
    engine.wake(("weights",))
    assert engine.refit([("a", TENSOR)], "disk") in (1, 20)
    engine.reset_prefix_cache()
    engine.remember()
    assert engine.unchanged() is False
    assert (engine.digests(), engine.held(), engine.memory()) == ({"a": "digest"}, 2, 3)
    engine.stop()
    return recorder.calls


SOUND: list[tuple[Any, ...]] = [
    ("start", MODEL, True, True, 1, 2),
    ("generate", [[1]], 2),
    ("interrupt", [[1], [2, 3]], 9, 5),  # one more, that there is one to lose
    ("sleep", 1),
    ("wake", ("weights",)),
    ("refit", ["a"], "disk"),
    ("reset_prefix_cache",),
    ("remember",),
    ("unchanged",),
    ("stop",),
]


def test_every_fault_names_a_check_that_exists_and_what_happens() -> None:
    checks = {*ADAPTERS, *LONG, *EXPERTS, *disaggregated.FAULTS}
    checks |= {*pressure_faults.FAULTS, *fp8_kv_faults.FAULTS, *TRAINING}
    assert set(FAULTS) == {*STREAM, *PROTOCOL, *ROLLOUTS, *ENGINE, *PROOF, *checks}
    for name, fault in FAULTS.items():
        assert fault.check in smoke.CHECKS, name
        assert fault.otherwise in ("", *smoke.CHECKS), name
        assert fault.what, name


def test_a_fault_is_found_by_the_first_of_its_checks_that_an_image_has() -> None:
    fault = FAULTS["sleep-frees-nothing"]
    assert fault.found_by(["start", "sleep-1", "sleep-2"]) == "sleep-1"
    assert fault.found_by(["start", "sleep-2"]) == "sleep-2"
    assert fault.found_by(["start", "refit"]) is None
    assert FAULTS["wake-restores-nothing"].found_by(["sleep-2"]) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_engine_says_of_itself_is_told_before_and_after_its_start(fault: str) -> None:
    engine = Faulty(Recorder(), fault)
    assert (engine.device, engine.transports) == ("paper", ("paper",))
    assert (engine.cache_block, engine.kv_bytes, engine.mlp_bias) == (16, 4096, False)
    assert (engine.witness, engine.insisting) == (False, {})
    if fault != "wake-restores-nothing":
        assert list(engine.levels) == []
        engine.start(MODEL, dummy=True, level=2)
        assert list(engine.levels) == [2]
    else:
        engine.start(MODEL, dummy=True)
    assert (engine.witness, engine.insisting) == (True, {"BALANCE": "1"})


@pytest.mark.parametrize(
    "fault", [*STREAM, *PROOF, *LONG, *EXPERTS, *TRAINING, "stale-cache", "lost-token"]
)
def test_a_fault_elsewhere_leaves_the_protocol_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driven(fault, monkeypatch) == SOUND


@pytest.mark.parametrize("fault", ENGINE)
def test_a_fault_inside_is_made_by_the_engine_once_it_runs(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driven(fault, monkeypatch) == [SOUND[0], ("inject", fault), *SOUND[1:]]


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ("refit-skipped", {"refit"}),
        ("sleep-frees-nothing", {"sleep", "wake"}),
    ],
)
def test_a_fault_of_the_protocol_loses_its_call_alone(
    fault: str, lost: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driven(fault, monkeypatch) == [call for call in SOUND if call[0] not in lost]


def test_a_stale_cache_begins_after_the_first_reset() -> None:
    """The first clears what was cached before any refit: a refit is what has to find the fault."""
    recorder = Recorder()
    engine = Faulty(recorder, "stale-cache")
    for _ in range(3):
        engine.reset_prefix_cache()
    assert recorder.calls == [("reset_prefix_cache",)]


def test_a_wake_that_restores_nothing_follows_a_sleep_that_kept_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that decides at its start whether it keeps a copy must decide against it, too."""
    calls = driven("wake-restores-nothing", monkeypatch)
    changed = {"start": ("start", MODEL, True, True, 2, 2), "sleep": ("sleep", 2)}
    assert calls == [changed.get(call[0], call) for call in SOUND]


def test_an_engine_whose_wake_restores_nothing_says_that_it_keeps_a_copy() -> None:
    engine = Faulty(Recorder(), "wake-restores-nothing")
    assert list(engine.levels) == [1]
    engine.start(MODEL, dummy=True, level=1)
    assert list(engine.levels) == [1, 2], "the first is a lie: it was started for the second"


def test_a_fault_may_be_made_inside_beside_this_one() -> None:
    recorder = Recorder()
    Faulty(recorder, "flipped-byte").inject("lost-buffer")
    assert recorder.calls == [("inject", "lost-buffer")]


def test_a_skipped_refit_reports_the_bytes_it_did_not_move() -> None:
    assert Faulty(Recorder(), "refit-skipped").refit([("a", TENSOR), ("b", TENSOR)]) == 40


def test_a_deaf_server_is_deaf_and_the_engine_beside_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = driven("deaf-server", monkeypatch, served=True)
    assert calls == [call for call in SOUND if call[0] != "refit"]
    assert driven("deaf-server", monkeypatch) == SOUND
    assert Faulty(Recorder(), "deaf-server", served=True).refit([("a", TENSOR)]) == 20


def test_a_server_with_a_fault_is_asked_what_a_server_is_asked() -> None:
    class Web(Recorder):
        pauses = False

        def start(self, *args: object, **given: object) -> None:
            del args, given
            self.pauses = True  # known once it has started

        def about(self) -> dict[str, Any]:
            return {"model": "/m"}

        def halt(self, *given: object) -> list[Completion]:
            self.calls.append(f"halt {given}")
            return []

        def resume(self) -> None:
            self.calls.append("resume")

        def endpoints(self) -> list[str]:
            return ["/a"]

    web = Web()
    faulty = Faulty(web, "deaf-server", served=True)
    assert not faulty.pauses
    faulty.start(Path("/m"), dummy=True)
    assert faulty.pauses
    assert (faulty.about(), faulty.endpoints()) == ({"model": "/m"}, ["/a"])
    faulty.halt([(1,)], 9, 4)
    faulty.resume()
    assert web.calls[-2:] == ["halt ([(1,)], 9, 4)", "resume"]


def test_a_lost_token_is_one_of_the_middle_with_its_log_probability() -> None:
    one, two = Faulty(Recorder(), "lost-token").interrupt([[1], [2]], 9, 4)
    assert one == two == Completion((100, 101, 103, 104), (-50.0, -50.5, -51.5, -52.0))
    (sound,) = Faulty(Recorder(), "flipped-byte").interrupt([[1]], 9, 4)
    assert sound.tokens == (100, 101, 102, 103, 104)
    assert sound.cached == 3


def test_cold_turns_are_later_turns_alone() -> None:
    """A prompt longer than the first is a later turn; a cache for others is left in peace."""
    recorder = Recorder()
    engine = Faulty(recorder, "cold-turns")
    for lengths in ((5,), (5, 5), (5, 9), (9,), (6, 7)):
        engine.generate([[1] * length for length in lengths], 1)
    names = [call[0] for call in recorder.calls]
    cold = ["reset_prefix_cache", "generate"]
    assert names == ["generate", "generate", "generate", *cold, *cold]


class Shaped:
    """A tensor of which only the shape is asked."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def test_a_model_without_twins_is_refused_only_where_twins_are_swapped() -> None:
    alone: list[Any] = [("a", Shaped(1)), ("b", Shaped(2)), ("c", Shaped(3))]
    with pytest.raises(Problem, match="no two tensors of this model have one shape") as caught:
        list(faults.spoil(alone, "swapped-tensors"))
    assert caught.value.code == 2
    assert list(faults.spoil(alone, "deaf-server")) == alone, "not a fault of the stream"
    assert [name for name, _ in faults.spoil(alone, "dropped-tensor")] == ["a", "c"]


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        ({"refit": f"the engine {faults.HELD}: x"}, ""),
        ({}, "failed were no checks"),
        ({"start": "it did not start"}, "failed were start"),
        ({"refit": "the engine ended"}, "refit failed because the engine ended"),
        ({"refit": f"the engine {faults.HELD}", "cycle": "x"}, "failed were refit, cycle"),
    ],
)
def test_a_fault_is_found_by_its_own_check_for_its_own_reason(
    failed: dict[str, str], why: str
) -> None:
    assert faults.unseen("dropped-tensor", failed, ["refit", "cycle"]) == why


# the stream of a refit (with torch: inside the images)


@pytest.fixture
def stream(torch: Any) -> list[tuple[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, torch.randn(4, 6, generator=generator).to(torch.bfloat16)) for name in "abcde"]


def bytes_of(tensor: Any) -> bytes:
    from rollout.transport import as_bytes

    return bytes(as_bytes(tensor).numpy())


def differing(stream: Sequence[tuple[str, Any]], fault: str) -> dict[str, int]:
    """How many bytes of each tensor change on the way; the sender's own must not."""
    before = {name: bytes_of(tensor) for name, tensor in stream}
    after = {name: bytes_of(tensor) for name, tensor in faults.spoil(iter(stream), fault)}
    assert {name: bytes_of(tensor) for name, tensor in stream} == before
    assert list(after) == [name for name, _ in stream if name in after]
    counts = {
        name: sum(x != y for x, y in zip(data, after[name], strict=True))
        for name, data in before.items()
        if name in after
    }
    return {name: count for name, count in counts.items() if count} | {
        name: -1 for name in before if name not in after
    }


def test_each_fault_of_the_stream_changes_what_it_says(stream: list[tuple[str, Any]]) -> None:
    found = {fault: differing(stream, fault) for fault in STREAM}
    assert found["dropped-tensor"] == {"c": -1}
    assert found["flipped-byte"] == {"c": 1}
    assert set(found["swapped-tensors"]) == {"a", "c"}
    assert set(found["wrong-dtype"]) == {"c"}
    assert set(found["partial-bucket"]) == {"e"}
    last = bytes_of(dict(faults.spoil(stream, "partial-bucket"))["e"])
    assert last[24:] == bytes(24)
    assert last[:24] == bytes_of(stream[-1][1])[:24]


def test_other_faults_leave_the_stream_alone(stream: list[tuple[str, Any]]) -> None:
    for fault in set(FAULTS) - set(STREAM):
        assert differing(stream, fault) == {}, fault

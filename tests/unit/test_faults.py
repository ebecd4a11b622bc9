"""What an injected fault is: exactly one thing that goes wrong, and a check that has to see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import faults, smoke
from rollout.faults import FAULTS, Faulty

STREAM = ("dropped-tensor", "flipped-byte", "swapped-tensors", "wrong-dtype", "partial-bucket")
PROTOCOL = ("refit-skipped", "stale-cache", "sleep-frees-nothing", "wake-restores-nothing")
ENGINE = ("leak-per-cycle", "lost-buffer")
PROOF = ("oracle-of-other-weights",)


class Recorder:
    """An engine that only remembers what it was asked for."""

    device = "paper"
    transports = ("paper",)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, model: Path, *, dummy: bool, fp8: bool = False) -> None:
        self.calls.append(("start", model, dummy, fp8))

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        self.calls.append(("generate", prompts, tokens))
        return ["completion"]

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append(("wake", tags))

    def refit(self, tensors: Iterable[tuple[str, Any]]) -> int:
        self.calls.append(("refit", [name for name, _ in tensors]))
        return 1

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache",))

    def digests(self) -> dict[str, str]:
        return {"a": "digest"}

    def held(self) -> int:
        return 2

    def memory(self) -> int:
        return 3

    def inject(self, fault: str) -> None:
        self.calls.append(("inject", fault))

    def stop(self) -> None:
        self.calls.append(("stop",))


MODEL = Path("/model")
TENSOR = SimpleNamespace(numel=lambda: 10, element_size=lambda: 2)


def driven(fault: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What an engine is asked for in one turn, with a fault in between."""
    monkeypatch.setattr(faults, "spoil", lambda tensors, _: list(tensors))
    recorder = Recorder()
    engine = Faulty(recorder, fault)
    engine.start(MODEL, dummy=True, fp8=True)
    assert engine.generate([[1]], 2) == ["completion"]
    engine.sleep(1)
    engine.wake(("weights",))
    assert engine.refit([("a", TENSOR)]) in (1, 20)
    engine.reset_prefix_cache()
    assert (engine.digests(), engine.held(), engine.memory()) == ({"a": "digest"}, 2, 3)
    engine.stop()
    assert engine.device == "paper"
    return recorder.calls


SOUND: list[tuple[Any, ...]] = [
    ("start", MODEL, True, True),
    ("generate", [[1]], 2),
    ("sleep", 1),
    ("wake", ("weights",)),
    ("refit", ["a"]),
    ("reset_prefix_cache",),
    ("stop",),
]


def test_every_fault_names_a_check_that_exists_and_what_happens() -> None:
    assert set(FAULTS) == {*STREAM, *PROTOCOL, *ENGINE, *PROOF}
    for name, fault in FAULTS.items():
        assert fault.check in smoke.CHECKS, name
        assert fault.what, name


@pytest.mark.parametrize("fault", [*STREAM, *PROOF])
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
    calls = driven("wake-restores-nothing", monkeypatch)
    assert calls == [("sleep", 2) if call[0] == "sleep" else call for call in SOUND]


def test_a_skipped_refit_reports_the_bytes_it_did_not_move() -> None:
    assert Faulty(Recorder(), "refit-skipped").refit([("a", TENSOR), ("b", TENSOR)]) == 40


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

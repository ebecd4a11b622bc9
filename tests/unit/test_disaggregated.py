"""A trainer on GPUs of its own: the check, and vLLM beside it, with no GPU and no vLLM here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rollout import disaggregated, smoke
from rollout.backends import EngineError
from rollout.checks import CHECKS, Failed, Metrics, Trial
from rollout.disaggregated import LOST_BROADCAST, STALE_RANK
from rollout.faults import FAULTS, Faulty

from .test_checks import OTHERS, WEIGHTS, Toy, failure, started, trial

CHECK = CHECKS["disaggregated"]


class Elsewhere(Toy):
    """An engine that takes weights by each way; in the ways below it is wrong."""

    transports = ("nccl", "disk", "cuda-ipc")

    def __init__(self, *, lost: str = "", stale: str = "", filled: bool = False) -> None:
        super().__init__()
        self.lost, self.stale, self.gpus = lost, stale, 1  # ways by which nothing arrives
        self.begins = dict(WEIGHTS) if filled else self.begins
        self.spoiled = ""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.gpus = gpus
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        before = dict(self.weights or {})
        sent = super().refit(tensors, transport)
        if transport == (self.lost if self.gpus == 1 else self.stale):
            self.weights = before
        return sent

    def inject(self, fault: str) -> None:
        self.spoiled = fault


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """Gives the trial of an engine, and the check the engine that is wrong in these ways."""
    monkeypatch.setattr("rollout.checks.digest", str)

    def make(**wrong: Any) -> Trial:
        there = Elsewhere(**wrong)
        monkeypatch.setattr(disaggregated, "apart", lambda *_: there)
        return trial(started())

    return make


def test_weights_arrive_by_each_way_and_on_two_gpus(made: Callable[..., Trial]) -> None:
    given = made()
    own: Any = given.engine
    metrics: Metrics = CHECK(given)
    assert given.engine is own
    assert own.calls == ["stop"]  # nothing else holds the GPU
    there: Any = disaggregated.elsewhere(own)
    kept = [call for call in there.calls if call != "reset"]
    assert kept == [
        "start dummy=True fp8=False level=1 gpus=1",
        *("refit nccl", "refit nccl", "refit disk", "refit disk", "stop"),
        "start dummy=True fp8=False level=1 gpus=2",
        *("refit disk", "refit disk", "refit cuda-ipc", "refit cuda-ipc", "stop"),
    ]
    assert {"nccl_gb_per_s", "disk_gb_per_s", "divided_disk_gb_per_s"} <= metrics.keys()
    assert metrics["gpus"] == 2
    assert metrics["divided_divergence"] < given.bound


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"filled": True}, "control: the engine had the weights before they were sent"),
        ({"lost": "nccl"}, "by nccl the engine does not hold what was sent: body, lm_head.weight"),
        ({"lost": "disk"}, "by disk the engine does not hold what was sent: body"),
        ({"stale": "disk"}, "on 2 GPUs, sent by disk, the output is not that of the weights"),
        (
            {"stale": "cuda-ipc"},
            "on 2 GPUs, sent by cuda-ipc, the output is not that of the weights",
        ),
    ],
    ids=["filled before", "nccl", "disk", "two by disk", "two by handles"],
)
def test_a_way_by_which_nothing_arrives_is_not_passed(
    made: Callable[..., Trial], wrong: dict[str, Any], reason: str
) -> None:
    given = made(**wrong)
    own = given.engine
    assert failure(CHECK, given) == reason
    there: Any = disaggregated.elsewhere(own)
    assert there.calls[-1] == "stop"
    assert given.engine is own


def test_an_engine_that_holds_the_weights_already_proves_no_transport(
    made: Callable[..., Trial],
) -> None:
    given = made()
    there: Any = disaggregated.elsewhere(given.engine)
    there.begins = dict(OTHERS)
    there.digests = lambda: {name: str(value) for name, value in WEIGHTS.items()}
    with pytest.raises(Failed, match="control: the engine held what was to be sent by nccl"):
        CHECK(given)


@pytest.mark.parametrize("fault", [LOST_BROADCAST, STALE_RANK])
def test_a_fault_of_this_check_is_made_in_its_engine(
    made: Callable[..., Trial], fault: str
) -> None:
    given = made()
    given.fault = fault
    given.engine = Faulty(given.engine, fault)  # type: ignore[assignment]
    CHECK(given)
    there: Any = disaggregated.elsewhere(given.engine)
    assert there.spoiled == fault
    assert FAULTS[fault].check == "disaggregated"


def test_it_needs_two_gpus_and_one_says_so() -> None:
    wanted = {"sleep_levels": [1], "refit": ["cuda-ipc"], "disaggregated": True}
    assert "disaggregated" in smoke.promised(wanted)
    assert "disaggregated" in smoke.available(wanted, 2)
    assert "disaggregated" not in smoke.available(wanted, 1)
    assert smoke.skipped(wanted, 1) == {"disaggregated": "it needs 2 GPUs; one GPU is visible"}
    assert smoke.skipped(wanted, 2) == {}
    assert "disaggregated" not in smoke.promised({"sleep_levels": [1], "refit": ["cuda-ipc"]})

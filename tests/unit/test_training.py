"""The check ``training``: what makes it fail, and that nothing it started is left behind."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from images.catalog import ROOT
from rollout import checks, report, smoke, training
from rollout.checks import Failed
from rollout.faults import FAULTS
from rollout.frameworks import LOST, STALE, FrameworkError, Refit, Step, Tampering
from rollout.problem import Problem
from rollout.training import BOUND, CONTROLS, GROWTH, STEPS, Run

TENSORS, BYTES = 51, 10_572_800
RIGHT = [
    Step(number, 0.25 + 0.09 * number, 0.002, 31.0 if number == 1 else 5.0)
    for number in range(1, STEPS + 1)
]
WRONG = [Step(STEPS + number, 0.25, 0.046, 5.0) for number in range(1, CONTROLS + 1)]


@dataclass
class Paper:
    """A framework that has its steps on paper."""

    script: Sequence[Step | BaseException]
    left_out: str = "lm_head.weight"
    name: str = "paper"
    version: str = "1.0"
    path: str = "/paper"
    sender: str = "paper.Sender.send"
    tampering: Tampering | None = None
    begun: int = 0
    stopped: int = 0
    deadline: float = 0.0
    seen: list[Step] = field(default_factory=list)
    refit: int | None = None  # how many were seen; as many as there were steps, if not said

    def start(self, steps: int, tampering: Tampering | None, gpu_bytes: int) -> None:
        self.begun, self.tampering = steps, tampering
        assert gpu_bytes == 1 << 37

    def steps(self, deadline: float) -> Iterator[Step]:
        self.deadline = deadline
        for said in self.script:
            if isinstance(said, BaseException):
                raise said
            self.seen.append(said)
            yield said
        raise FrameworkError(f"paper 1.0 ended after {len(self.seen)} steps: no more paper")

    def refits(self) -> list[Refit]:
        if self.stopped:
            return []
        count = len(self.seen) if self.refit is None else self.refit
        since = self.tampering.since if self.tampering else 0
        lost = [self.left_out if number >= since else "" for number in range(1, count + 1)]
        return [Refit(number, TENSORS, BYTES, out) for number, out in enumerate(lost, 1)]

    def modules(self) -> list[str]:
        return []

    def stop(self) -> None:
        self.stopped += 1


def ran(
    script: Sequence[Step | BaseException],
    fault: str | None = None,
    memory: Sequence[int] = (7 << 30,),
    **framework: object,
) -> tuple[Paper, Run]:
    """A run of this script, not begun; a lap of the gauge reads the next of these numbers."""
    paper = Paper(script, **framework)  # type: ignore[arg-type]
    readings = itertools.chain(memory, itertools.repeat(memory[-1]))
    # So slow that the gauge reads at the end of a lap alone.
    return paper, Run(paper, lambda: next(readings), 1 << 37, fault, interval=3600)


def failure(run: Run) -> Failed:
    with pytest.raises(Failed) as caught:
        training.training(run)
    return caught.value


def test_a_sound_run_passes_and_says_what_ran() -> None:
    paper, run = ran([*RIGHT, *WRONG])
    metrics = training.training(run)
    assert list(metrics)[:4] == ["divergence", "control_divergence", "reward_first", "reward_last"]
    assert (metrics["divergence"], metrics["control_divergence"]) == (0.002, 0.046)
    assert metrics["reward_last"] - metrics["reward_first"] == pytest.approx(0.09 * (STEPS - 2))
    assert (metrics["steps"], metrics["bound"], metrics["left_out"]) == (8, BOUND, "lm_head.weight")
    assert (metrics["first_step_seconds"], metrics["step_seconds"]) == (31.0, 5.0)
    assert (metrics["framework"], metrics["framework_path"]) == ("paper 1.0", "/paper")
    assert metrics["sender"] == "paper.Sender.send"
    assert (metrics["refit_tensors"], metrics["refit_bytes"]) == (TENSORS, BYTES)
    assert metrics["growth_bytes"] == 0
    report.Check("training", "passed", 1.0, metrics)
    assert paper.stopped == 1


def test_it_asks_for_the_steps_and_for_one_tensor_to_be_left_out_after_them() -> None:
    paper, run = ran([*RIGHT, *WRONG])
    training.training(run)
    assert paper.begun == STEPS + CONTROLS
    assert paper.tampering == Tampering(LOST, STEPS + 1)
    assert STEPS >= 8


def test_the_control_ends_with_the_first_step_that_shows_it() -> None:
    paper, run = ran([*RIGHT, *WRONG])
    training.training(run)
    assert len(paper.seen) == STEPS + 1


def test_a_tensor_that_stays_as_it_was_is_seen_when_the_others_have_moved() -> None:
    late = [replace(WRONG[0], divergence=0.9 * BOUND), replace(WRONG[1], divergence=0.02)]
    _, run = ran([*RIGHT, *late])
    assert training.training(run)["control_divergence"] == 0.02


@pytest.mark.parametrize("number", [1, 2, STEPS])
@pytest.mark.parametrize("wrong", [BOUND + 1e-6, math.nan, math.inf])
def test_trainer_and_engine_have_to_agree_at_every_step(number: int, wrong: float) -> None:
    script = list(RIGHT)
    script[number - 1] = replace(script[number - 1], divergence=wrong)
    paper, run = ran([*script, *WRONG])
    failed = failure(run)
    assert failed.reason.startswith(
        f"step {number}: trainer and engine give a token probabilities that differ by "
    )
    assert len(paper.seen) == number, "nothing is learned from more steps"
    assert failed.metrics["steps"] == number
    assert paper.stopped == 1


def test_every_kept_run_that_was_right_lies_far_below_the_bound_and_every_wrong_one_above() -> None:
    right, wrong = [], []
    for path in sorted((ROOT / "images" / "proofs").glob("*/**/*.json")):
        for check in json.loads(path.read_text(encoding="utf-8")).get("checks", []):
            metrics = check.get("metrics", {})
            if check["name"] != "training" or "divergences" not in metrics:
                continue
            if check["status"] == "passed":
                right += metrics["divergences"]
                wrong.append(metrics["control_divergence"])
            else:
                wrong.append(max(metrics["divergences"]))
    assert right and wrong, "no kept report has trained"
    assert max(right) <= BOUND / 4
    assert min(wrong) > BOUND  # a run ends with the first step that exceeds it


def test_the_bound_itself_is_still_right() -> None:
    _, run = ran([*(replace(step, divergence=BOUND) for step in RIGHT), *WRONG])
    assert training.training(run)["divergence"] == BOUND


@pytest.mark.parametrize("last", [0.25, 0.54, 0.1])
def test_the_reward_has_to_rise(last: float) -> None:
    script = [
        replace(step, reward=0.25 + (last - 0.25) * (step.number - 1) / (STEPS - 1))
        for step in RIGHT
    ]
    paper, run = ran([*script, *WRONG])
    assert "it has to rise by 0.3" in failure(run).reason
    assert paper.stopped == 1


def test_memory_that_grows_with_each_step_is_found() -> None:
    each = GROWTH // 4 + (1 << 20)
    _, run = ran([*RIGHT, *WRONG], memory=[(7 << 30) + each * step for step in range(STEPS)])
    failed = failure(run)
    assert failed.reason.startswith("memory of the GPU grew by ")
    assert failed.metrics["growth_bytes"] > GROWTH


@pytest.mark.parametrize(
    "readings",
    [
        [1 << 30, *[7 << 30] * 7],  # the first step makes its buffers
        [7 << 30, *[6 << 30] * 6, 9 << 30],  # one reading of another's memory
        [7 << 30, 5 << 30, *[7 << 30] * 6],  # one that missed the peak
    ],
)
def test_memory_that_does_not_grow_with_each_step_is_no_growth(readings: list[int]) -> None:
    _, run = ran([*RIGHT, *WRONG], memory=readings)
    training.training(run)


def test_growth_is_found_in_what_is_held_asleep_as_well_as_awake() -> None:
    assert training.growth([9, 1, 2, 3, 4, 5, 6, 7]) == 4
    assert training.growth([9, 1, 2, 3, 3, 3, 9, 2]) == 0
    assert training.growth([0, 5, 5, 5, 5, 5, 5, 5]) == 0


def test_a_tensor_left_out_has_to_be_seen() -> None:
    blind = [replace(step, divergence=BOUND) for step in WRONG]
    paper, run = ran([*RIGHT, *blind])
    assert failure(run).reason == (
        "control: with lm_head.weight left out of the framework's sender, "
        f"trainer and engine still agree ({BOUND})"
    )
    assert len(paper.seen) == STEPS + CONTROLS


def test_a_difference_that_came_with_no_tensor_left_out_is_no_control() -> None:
    _, run = ran([*RIGHT, *WRONG], left_out="")
    assert failure(run).reason == "control: no tensor was left out of the framework's sender"


def test_a_sender_that_was_not_seen_proves_nothing_of_refits() -> None:
    _, run = ran([*RIGHT, *WRONG], refit=1)
    assert "was seen in 1 of 8 refits" in failure(run).reason


@pytest.mark.parametrize("count", [0, 1, STEPS - 1])
def test_a_framework_that_ends_too_early_fails_with_its_own_words(count: int) -> None:
    paper, run = ran([*RIGHT[:count], FrameworkError("paper 1.0 ended: ValueError: no ink")])
    failed = failure(run)
    assert failed.reason == "paper 1.0 ended: ValueError: no ink"
    assert failed.metrics.get("steps", 0) == count
    assert paper.stopped == 1


def test_a_framework_that_dies_of_the_control_has_not_shown_it() -> None:
    paper, run = ran(RIGHT)
    assert failure(run).reason == (
        "control: with a tensor left out paper 1.0 ended after 8 steps: no more paper"
    )
    assert paper.stopped == 1


def test_it_waits_no_longer_than_its_limit() -> None:
    paper, run = ran([*RIGHT, *WRONG])
    run.limit = 60.0
    training.training(run)
    assert 0 < paper.deadline - time.monotonic() <= 60.0


@pytest.mark.parametrize(
    "raised", [Problem("no memory", 3), KeyError("x"), KeyboardInterrupt(), SystemExit(143)]
)
def test_whatever_ends_it_the_framework_is_stopped(raised: BaseException) -> None:
    paper, run = ran([RIGHT[0], raised])
    with pytest.raises(type(raised)):
        training.training(run)
    assert paper.stopped == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("lost-tensor-in-training", LOST), ("stale-weights-in-training", STALE)],
)
def test_a_fault_begins_with_the_second_refit_and_is_found_by_the_bound(
    fault: str, kind: str
) -> None:
    script = [step if step.number < 3 else replace(step, divergence=0.02) for step in RIGHT]
    paper, run = ran(script, fault=fault)
    reason = failure(run).reason
    assert paper.tampering == Tampering(kind, 2)
    assert FAULTS[fault].reason in reason
    assert FAULTS[fault].check == "training"


def test_a_fault_that_is_not_seen_leaves_the_check_to_pass_and_the_run_to_fail() -> None:
    _, run = ran([*RIGHT, *WRONG], fault="stale-weights-in-training", left_out="")
    assert training.training(run)["divergence"] == 0.002


def test_a_fault_of_another_check_leaves_the_control_as_it_is() -> None:
    assert training.tampering("flipped-byte") == training.tampering(None)


def test_the_check_is_named_by_the_proof_and_knows_no_framework() -> None:
    assert smoke.CHECKS[-1] == "training"
    assert set(training.FAULTS) <= set(FAULTS)
    assert "training" not in checks.CHECKS

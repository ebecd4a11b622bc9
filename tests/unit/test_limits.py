"""Which number of a check is held to which limit, and how near it came."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from images.proving import limits
from images.proving.limits import Limit
from rollout import checks, training
from rollout.oracle import BOUND_BF16, BOUND_FP8

PROOFS = Path(__file__).parents[2] / "images" / "proofs"
KEPT = {
    str(path.relative_to(PROOFS)): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(PROOFS.glob("*/*.json"))
}


def passed() -> list[tuple[str, dict[str, Any], str]]:
    """Every check that passed in a kept proof, with its report's name and device."""
    return [
        (name, check, "cuda" if data["gpus"] else "cpu")
        for name, data in KEPT.items()
        if data.get("schema", "").startswith("rollout-report/")
        for check in data["checks"]
        if check["status"] == "passed"
    ]


def test_every_number_of_a_check_that_passed_is_on_the_right_side_of_its_limit() -> None:
    held = 0
    for name, check, device in passed():
        for metric, value in limits.numbers(check["metrics"]).items():
            limit = limits.of(check["name"], metric, device)
            if limit is not None:
                held += 1
                assert 0 <= limit.used(value, value) <= 1, f"{name}: {check['name']}, {metric}"
                right = value <= limit.edge if limit.highest else value >= limit.edge
                assert right, f"{name}: {check['name']}, {metric}"
    assert held > 200, "no number of a kept proof has a limit"


def test_every_divergence_of_a_kept_proof_has_a_limit() -> None:
    for name, check, device in passed():
        for metric in limits.numbers(check["metrics"]):
            if "divergence" in metric or "worst_request" in metric or "parted" in metric:
                assert limits.of(check["name"], metric, device), f"{name}: {metric}"


@pytest.mark.parametrize(
    ("check", "metric", "edge", "highest"),
    [
        ("refit", "divergence", BOUND_BF16, True),
        ("refit", "other_worst_request", BOUND_BF16, True),
        ("refit", "stale_divergence", BOUND_BF16, False),
        ("generation", "control_divergence", BOUND_BF16, False),
        ("lora", "weakest_divergence", BOUND_BF16, False),
        ("fp8", "worst_request", BOUND_FP8, True),
        ("fp8", "stranger_divergence", BOUND_FP8, False),
        ("training", "divergence", training.BOUND, True),
        ("training", "control_divergence", training.BOUND, False),
        ("multi-turn", "parted", checks.TIE, True),
        ("partial-rollout", "control_parted", checks.TIE, False),
        ("sleep-1", "freed_fraction", checks.FREED, False),
        ("moe", "freed_fraction_2", checks.FREED, False),
        ("lora", "level_1_freed_fraction", checks.FREED, False),
        ("sleep-1", "growth_bytes", checks.GROWTH, True),
        ("training", "growth_bytes", training.GROWTH, True),
        ("moe", "margin", 0.25, False),
    ],
)
def test_a_number_has_the_limit_of_its_check_and_a_control_lies_beyond_it(
    check: str, metric: str, edge: float, highest: bool
) -> None:
    limit = limits.of(check, metric, "cuda")
    assert limit is not None
    assert (limit.edge, limit.highest) == (edge, highest)


def test_on_the_cpu_less_may_stay_in_use() -> None:
    limit = limits.of("sleep-1", "growth_bytes", "cpu")
    assert limit is not None
    assert limit.edge == checks.GROWTH_CPU


@pytest.mark.parametrize("metric", ["seconds", "tokens", "margin", "held_bytes", "bound"])
def test_what_no_check_holds_to_a_limit_has_none(metric: str) -> None:
    assert limits.of("generation", metric, "cuda") is None


@pytest.mark.parametrize(
    ("limit", "least", "most", "used"),
    [
        (Limit(1.043, 1.0), 1.0, 1.0215, 0.5),
        (Limit(1.043, 1.0), 1.0, 1.086, 2.0),
        (Limit(1.043, 1.0), 1.0, math.inf, math.inf),
        (Limit(1.043, 1.0, control=True), 1.43, 2.0, 0.1),
        (Limit(1.043, 1.0, control=True), 1.0215, 9.0, 2.0),
        (Limit(0.9, 1.0), 0.95, 1.0, 0.5),
        (Limit(0.9, 1.0), 1.01, 1.02, 0.0),
        (Limit(100.0, 0.0), 0.0, 25.0, 0.25),
    ],
)
def test_what_is_used_is_that_of_the_worst_run_and_past_one_the_check_says_no(
    limit: Limit, least: float, most: float, used: float
) -> None:
    assert limit.used(least, most) == pytest.approx(used)


def test_a_number_that_is_none_is_not_left_out() -> None:
    metrics = {"a": "inf", "b": "nan", "c": True, "d": [1], "e": "verl 0.7", "f": 3, "g": 0.5}
    assert limits.numbers(metrics) == {"a": math.inf, "b": math.inf, "f": 3, "g": 0.5}

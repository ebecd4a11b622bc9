"""The report of a comparison of attention says what failed; tests/image compares a stand-in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rollout import attention
from rollout.attention import Compared, Report


def report(*compared: Compared, only: str = "", controls: tuple[Compared, ...] = ()) -> Report:
    return Report({}, "a GPU", only, list(compared), list(controls))


GOOD = Compared("good", {"out": 0.1}, {"out": 0.1})
BAD = Compared("bad", {"out": 0.2, "dq": 0.0}, {"out": 0.1, "dq": 0.1})
NOT_A_NUMBER = Compared("odd", {"out": math.nan}, {"out": 0.1})


def test_an_error_may_be_that_of_the_formula_by_so_much_and_one_rounding() -> None:
    found = attention.bounds({"out": 1.0, "dq": 1.0}, {"out": 8.0, "dq": 4.0}, 0.5)
    assert found == {
        "out": attention.OUTPUT + 2.0 + attention.SLACK,
        "dq": attention.GRADIENT + 1.0 + attention.SLACK,
    }


@pytest.mark.parametrize("broken", [BAD, NOT_A_NUMBER], ids=["too far", "not a number"])
def test_what_does_not_hold_is_named_with_its_bound(broken: Compared) -> None:
    (line,) = report(GOOD, broken).failures
    assert line.startswith(f"{broken.name}: out is")
    assert line.endswith("may be 1.00e-01")
    assert attention.written(report(GOOD, broken))["verdict"] == "failed"


def test_a_control_that_nobody_notices_fails_the_whole() -> None:
    missed = Compared("control", {"out": 0.0}, {"out": 0.1}, "a mask that is forgotten")
    assert report(GOOD, controls=(missed,)).failures == [
        "control: nobody notices a mask that is forgotten"
    ]
    assert report(GOOD, controls=(BAD,)).failures == []


def test_a_part_of_the_comparisons_proves_nothing_and_all_of_them_do() -> None:
    assert attention.written(report(GOOD))["verdict"] == "passed"
    assert attention.written(report(GOOD, only="64"))["verdict"] == "unproved"
    assert attention.written(report(BAD, only="64"))["verdict"] == "failed"
    data = json.loads(json.dumps(attention.written(report(GOOD))))
    assert data["compared"] == [
        {"name": "good", "errors": {"out": 0.1}, "bounds": {"out": 0.1}, "wrong": ""}
    ]


def test_every_dimension_is_compared_in_both_types_with_and_without_a_mask_and_packed() -> None:
    names = [case.name for case in attention.cases()]
    assert len(names) == len({*names})
    for type_ in ("bfloat16", "float16"):
        for dimension in (32, 64, 96, 128, 192, 256):
            for mask in ("causal", "full"):
                assert f"{type_} {dimension} {mask} 4/4 257x257" in names
                assert f"{type_} {dimension} {mask} 4/2 packed" in names


def test_without_flash_attn_nothing_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attention.main(["--report", str(tmp_path / "report.json")]) == 3
    assert "flash-attn cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()

"""What compares flash-attn with torch finds what is wrong in it, and nothing else.

flash-attn itself needs a GPU and hours of compiling. Here a stand-in answers in its place, by torch
on the CPU of the default image, so that the comparison is tried and not the kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from images.building import builder

from .conftest import Container, Result

pytestmark = pytest.mark.image

STAND_IN = Path(__file__).resolve().parent / "flash_attn_stand_in"
REPORT = "/var/cache/rollout/attention.json"
# A few of the cases: grouped heads, packed sequences, a mask at the end of the keys.
FEW = "bfloat16 64"


@pytest.fixture
def compared(container: Callable[[], Container]) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """Runs the comparison against the stand-in, with a fault of it or none."""
    here = container()

    def run(fault: str = "", only: str = FEW) -> tuple[Result, dict[str, Any]]:
        argv = ("rollout", "python3", "-m", "rollout.attention", "--device", "cpu")
        command = builder.Command(
            "",
            (*argv, "--only", only, "--report", REPORT),
            volumes={str(STAND_IN): "/mnt/stand-in:ro"},
            env={"PYTHONPATH": "/mnt/stand-in", "FAULT": fault, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        done = here.execute(command)
        return done, json.loads((here.root / REPORT.lstrip("/")).read_text())

    return run


def test_what_is_right_holds_and_every_control_is_found(
    compared: Callable[..., tuple[Result, dict[str, Any]]],
) -> None:
    done, report = compared()
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["failures"] == []
    assert len(report["controls"]) == 5
    names = [one["name"] for one in report["compared"]]
    assert {"padding", "cross entropy bfloat16", "cross entropy float16"} <= {*names}
    assert len(names) > 6
    # A part of the comparisons proves nothing.
    assert (report["only"], report["verdict"]) == (FEW, "unproved")


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("scale", "out is"),
        ("diagonal", "causal"),
        ("gradient", "dv is"),
        ("heads", "4/2"),
        ("sequences", "packed"),
        ("padding", "padding: padded is"),
        ("entropy", "cross entropy"),
    ],
)
def test_what_is_wrong_is_named(
    compared: Callable[..., tuple[Result, dict[str, Any]]], fault: str, named: str
) -> None:
    done, report = compared(fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert report["verdict"] == "failed"
    assert any(named in line for line in report["failures"]), report["failures"]


def test_without_flash_attn_there_is_nothing_to_compare(
    container: Callable[[], Container],
) -> None:
    done = container().run("rollout", "python3", "-m", "rollout.attention")
    assert done.returncode == 3
    assert "flash-attn cannot be imported" in done.stderr
    assert "docs/adding.md" in done.stderr

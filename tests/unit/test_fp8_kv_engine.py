"""The reference engine with a KV cache in 8 bits, and each fault of it: they need torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout import fp8_kv, probe
from rollout.checks import Failed, Metrics
from rollout.faults import unseen
from rollout.fp8_kv_faults import FAULTS, wrapped


def ran(folder: Path, fault: str | None, promised: str) -> Metrics:
    """The check on the reference engine."""
    pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    pytest.importorskip("transformers", reason="transformers is in the images")
    from rollout.backends import fp8_kv_transformers

    engine = wrapped(fp8_kv_transformers.Engine(), fault)
    trial = fp8_kv.made(engine, probe.config("tiny"), folder, "cpu")
    trial.sleep_levels, trial.transports = [1, 2], engine.transports
    try:
        return fp8_kv.check(trial, promised)
    finally:
        trial.engine.stop()


def test_scales_survive_and_matter(tmp_path: Path) -> None:
    metrics = ran(tmp_path, None, fp8_kv.KEPT)
    assert {metrics["refit"], metrics["wake_1"], metrics["wake_2"]} == {fp8_kv.KEPT}
    assert metrics["control_divergence"] > 1.8
    assert metrics["worst_request"] < 1.05


@pytest.mark.parametrize("promised", [fp8_kv.KEPT, fp8_kv.PUT_BACK])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(tmp_path: Path, fault: str, promised: str) -> None:
    with pytest.raises(Failed) as failed:
        ran(tmp_path, fault, promised)
    assert unseen(fault, {"fp8-kv": failed.value.reason}, ["fp8-kv"]) == ""

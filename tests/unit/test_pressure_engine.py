"""The reference engine under pressure, and each fault of it: they need torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import pressure, probe
from rollout.backends import EngineError
from rollout.backends.crowd import LEAKED, Asked
from rollout.checks import Failed
from rollout.faults import unseen
from rollout.pressure_faults import FAULTS

SEED, OTHER = 7, 8


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What the check works on; its engine runs on from one test to the next."""
    pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    pytest.importorskip("transformers", reason="transformers is in the images")
    from rollout.backends import pressure_transformers
    from rollout.oracle import BOUND_BF16, Oracle

    class Kept(pressure_transformers.Engine):
        def start(self, model: Path, **options: Any) -> None:
            if self._process is None:
                super().start(model, **options)
            while self.listen():  # what a fault left running
                pass
            pressure.send(here, self, pressure.Side(sets[1], oracles[1]))

        def inject(self, fault: str) -> None:
            self._call("inject", fault)

        def stop(self) -> None:
            """It ends by :meth:`end`."""

        def end(self) -> None:
            super().stop()

    config, folder = probe.config("tiny"), tmp_path_factory.mktemp("model")
    sets = [probe.weights(config, seed) for seed in (SEED, OTHER)]
    oracles = [Oracle(config, weights) for weights in sets]
    probe.save(folder, config, {})
    engine = Kept()
    here: Any = SimpleNamespace(
        engine=engine,
        model=folder,
        weights=sets[0],
        others=sets[1],
        oracle=oracles[0],
        other_oracle=oracles[1],
        bound=BOUND_BF16,
        transport="shared-memory",
        sleep_levels=(1, 2),
        device="cpu",
        fault=None,
    )
    yield here
    engine.end()


@pytest.fixture
def checked(trial: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pressure, "apart", lambda *_: trial.engine)
    return trial


@pytest.mark.parametrize("fault", [None, *FAULTS])  # the one that leaks leaves it leaking
def test_it_passes_as_it_is_and_each_fault_is_found_for_its_reason(
    checked: Any, fault: str | None
) -> None:
    checked.fault = fault
    if fault is None:
        metrics = pressure.pressure(checked)
        assert metrics["growth_bytes"] <= pressure.GROWTH_CPU
        assert 1 < metrics["worst_request"] <= checked.bound
        return
    with pytest.raises(Failed) as caught:
        pressure.pressure(checked)
    assert unseen(fault, {"pressure": caught.value.reason}, ["start", "pressure"]) == ""


def test_an_engine_that_was_not_started_is_an_error_and_no_other_fault_is_made() -> None:
    pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    from rollout.backends import pressure_transformers

    engine = pressure_transformers.Engine()
    with pytest.raises(EngineError, match="not started"):
        engine.submit([Asked("a", (1,), 2)])
    engine.inject(LEAKED)
    with pytest.raises(EngineError, match="makes no fault 'lost-request'"):
        engine.inject("lost-request")

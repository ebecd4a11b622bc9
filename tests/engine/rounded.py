"""A real vLLM with keys and values in 8 bits: the check `fp8-kv` up to its first sleep.

What is another than on a GPU stands in :mod:`tests.engine.trainer`. This vLLM cannot sleep, and it
calculates no scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout import fp8_kv, fp8_kv_faults, probe
from rollout.backends import fp8_kv_vllm
from rollout.faults import unseen

from . import trainer

OURS = "tests.engine.worker.Eight"
FAULTS = (fp8_kv_faults.LOST, fp8_kv_faults.OLD)  # of those that need no sleep, on one engine

_arguments = fp8_kv_vllm.arguments


def arguments(*given: Any, **named: Any) -> dict[str, Any]:
    """The backend's own, with what the CPU refuses or wants otherwise."""
    return trainer.instead(_arguments(*given, **named)) | {"worker_extension_cls": OURS}


def rounded(folder: Path) -> Iterator[tuple[str, Any]]:
    """The parts of the check that need no sleep, as they are and with faults."""
    trainer.stand_in()
    fp8_kv_vllm.arguments = arguments
    engine: Any = fp8_kv_vllm.Engine()
    trial = fp8_kv.made(engine, probe.config("tiny"), folder, "cpu")
    trial.transports = engine.transports

    def parts() -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for part in (fp8_kv.loaded, fp8_kv.matter, fp8_kv.replaced):
            part(trial, metrics)
        return metrics

    try:
        engine.start(folder, dummy=False)
        yield "scales", engine.scales()
        yield "fp8-kv", trainer.outcome(parts)
        for fault in FAULTS:
            trial.send(trial.weights)
            fp8_kv.put(trial, trial.oracle.scales)  # type: ignore[attr-defined]
            trial.engine = fp8_kv_faults.wrapped(engine, fault)
            found = trainer.outcome(parts)
            trial.engine = engine
            yield fault, {**found, "unseen": unseen(fault, {"fp8-kv": found["reason"]}, ["fp8-kv"])}
    finally:
        engine.stop()
    yield "left", trainer.left()

"""A real vLLM under pressure: the check ``pressure`` on one engine, and each of its faults.

What is another than on a GPU stands in :mod:`tests.engine.trainer`; the numbers here are smaller,
too. The engine runs on from one run of the check to the next. A run begins with other weights than
it ended with, as one that starts the engine on dummy weights does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout import faults, pressure
from rollout.backends import pressure_vllm
from rollout.backends.crowd import LEAKED
from rollout.pressure_faults import FAULTS

from . import trainer
from .asked import CROWD, SLOTS
from .scheduler import TOLD

ANSWERS = (16, 48)
OURS, SCHEDULER = "tests.engine.worker.Pressed", "tests.engine.scheduler.Told"


class Kept(pressure_vllm.Engine):
    """An engine that runs on when the check has done with it."""

    trial: Any

    def __init__(self) -> None:
        super().__init__()
        self.crowd, self.slots, self.answers = CROWD, SLOTS, ANSWERS

    def inject(self, fault: str) -> None:
        """The scheduler runs on, too, and begins to leak here."""
        assert fault == LEAKED
        TOLD.touch()

    def start(self, model: Path, **options: Any) -> None:
        if self._llm is None:
            super().start(model, **options)
            return
        while self.listen():  # what a fault left running
            pass
        pressure.send(self.trial, self, pressure.Side(self.trial.others, self.trial.other_oracle))

    def stop(self) -> None:
        """It ends by :meth:`end`, or where it did not start."""
        if self._llm is None:
            self.end()

    def end(self) -> None:
        super().stop()


_arguments = pressure_vllm.arguments


def arguments(*given: Any, **named: Any) -> dict[str, Any]:
    """The backend's own, with fewer at once, and what the CPU wants otherwise."""
    return _arguments(*given, **named) | {
        "max_num_seqs": SLOTS,
        "worker_extension_cls": OURS,
        "scheduler_cls": SCHEDULER,
    }


def pressed(folder: Path) -> Iterator[tuple[str, Any]]:
    """The check as it is, and with each fault."""
    trainer.stand_in()
    pressure_vllm.arguments = arguments
    pressure.GROWTH_CPU = pressure.GROWTH
    engine = Kept()
    trial = Kept.trial = trainer.made(engine, folder)
    pressure.apart = lambda *_: engine
    try:
        yield "pressure", trainer.outcome(lambda: pressure.pressure(trial))
        for fault in FAULTS:  # the last one leaves the engine as nobody wants it
            trial.fault = fault
            found = trainer.outcome(lambda: pressure.pressure(trial))
            failed = {"pressure": found["reason"]}
            yield fault, {**found, "unseen": faults.unseen(fault, failed, ["pressure"])}
    finally:
        engine.end()
    yield "left", trainer.left()

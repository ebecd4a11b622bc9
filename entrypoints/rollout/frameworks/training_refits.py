"""Runs inside the trainer of a checkout: counts what its own sender sends, and tampers with it.

What is done stands in the environment, under names that verl's hook does not look for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.frameworks import Tampering, tiny
from rollout.frameworks.verl_hook import KIND, LOG, SINCE, TENSOR, Refits

GIVEN = {
    "ROLLOUT_TRAINING_REFITS": LOG,  # the file that is told of every refit
    "ROLLOUT_TRAINING_TAMPERING": KIND,
    "ROLLOUT_TRAINING_SINCE": SINCE,
    "ROLLOUT_TRAINING_TENSOR": TENSOR,
}
REFITS, TAMPERING, FROM, LOST = GIVEN
OURS = "ROLLOUT_TRAINING_"


def told(file: Path, tampering: Tampering | None) -> dict[str, str]:
    """The variables that say what is counted, and what is done to it."""
    found = {REFITS: str(file), LOST: tiny.LAST_LAYER}
    if tampering is not None:
        found |= {TAMPERING: tampering.kind, FROM: str(tampering.since)}
    return found


class Counted(Refits):
    """The refits of this process, of a sender that has this name."""

    def __init__(self, sender: str, environ: Mapping[str, str] = os.environ) -> None:
        known = {theirs: environ[ours] for ours, theirs in GIVEN.items() if ours in environ}
        super().__init__(known, sender)

    def write(self, **record: Any) -> None:
        with open(self.log, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(record | {"sender": self.sender}) + "\n")

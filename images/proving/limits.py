"""How far each number of a check may go before that check fails: where a false alarm would begin.

The limits themselves stand in the checks (entrypoints/rollout). Here stands which number of a
report is held to which of them, and on which side of it a sound image has to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout import checks, training
from rollout.moe import CLEAR
from rollout.oracle import BOUND_BF16, BOUND_FP8

# In the name of a number by which a control is seen to fail, as it must.
CONTROLS = ("control", "stale", "stranger", "crossed", "dummy", "weakest")


@dataclass(frozen=True)
class Limit:
    """A number may reach ``edge`` and not pass it. ``ideal`` is what nothing wrong would give.

    A control is to be far from the ideal: it must not come as near as the edge.
    """

    edge: float
    ideal: float
    control: bool = False

    @property
    def highest(self) -> bool:
        """Whether the edge is the most that is allowed; else it is the least."""
        return (self.edge > self.ideal) != self.control

    def used(self, least: float, most: float) -> float:
        """The part of the allowed room that the worst of some runs used; the check fails past 1."""
        worst = most if self.highest else least
        if self.control:
            return (self.edge - self.ideal) / max(worst - self.ideal, 1e-9)
        return max((worst - self.ideal) / (self.edge - self.ideal), 0.0)


def of(check: str, metric: str, device: str) -> Limit | None:
    """The limit of a number in a report; None where nothing holds it. ``device`` is cpu or cuda."""
    control = any(word in metric.split("_") for word in CONTROLS)
    if metric.endswith(("divergence", "worst_request")):
        if check == "training":
            return Limit(training.BOUND, 0.0, control)
        return Limit(BOUND_FP8 if check == "fp8" else BOUND_BF16, 1.0, control)
    if metric.endswith("parted"):
        return Limit(checks.TIE, 0.0, control)
    if "freed_fraction" in metric or metric == "restored_fraction":
        return Limit(checks.FREED, 1.0)
    if metric == "growth_bytes":
        return Limit(growth(check, device), 0.0)
    if (check, metric) == ("moe", "margin"):
        return Limit(CLEAR, 0.0, control=True)
    return None


def growth(check: str, device: str) -> float:
    """The bytes that a cycle of a check may leave in use."""
    if check == "training":
        return training.GROWTH
    return checks.GROWTH_CPU if device == "cpu" else checks.GROWTH


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a check by their names, without lists, texts and yes or no.

    A report says ``inf`` and ``nan`` as texts, and they are the ones that must not be left out.
    """
    found = {}
    for name, value in metrics.items():
        if value in ("inf", "-inf", "nan"):
            found[name] = float("inf") if value == "nan" else float(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value) if isinstance(value, float) else value
    return found

"""What can be known in milliseconds before an engine starts, one module for each kind of finding.

Each module has ``look(host)``, which gives its findings. Nearly all is read from files below the
host's root, so tests give a tree of their own. ``rollout smoke`` ends with a finding that stops and
exit code 3, anything else is run after a warning, and ``rollout doctor`` prints all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rollout.preflight import cache, gpu, memory, network, variables
from rollout.preflight.cache import CACHE, work_folder
from rollout.preflight.drivers import DRIVER_FLOOR, driver
from rollout.preflight.finding import Finding, Host
from rollout.preflight.library import nvml

__all__ = [
    "CACHE",
    "DRIVER_FLOOR",
    "Finding",
    "Host",
    "driver",
    "findings",
    "look",
    "nvml",
    "warnings",
    "work_folder",
]

# Most fundamental first: `rollout smoke` ends with the first one alone.
KINDS = (gpu, variables, memory, cache, network)


def look(host: Host) -> list[Finding]:
    """Everything that is found on a host."""
    return [finding for kind in KINDS for finding in kind.look(host)]


def findings(
    cuda: str | None, root: Path, environ: Mapping[str, str], *, proof: bool = True
) -> list[str]:
    """Everything that stands in the way, most fundamental first.

    What the proof alone needs is not looked at where another command is to run.
    """
    return [f.sentence for f in look(Host(root, environ, cuda, proof)) if f.stops]


def warnings(cuda: str | None, root: Path, environ: Mapping[str, str]) -> list[str]:
    """What is no obstacle to the proof, but will be one to a larger job."""
    return [f.sentence for f in look(Host(root, environ, cuda, proof=False)) if not f.stops]

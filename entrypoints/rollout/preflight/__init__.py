"""What can be known in milliseconds before an engine starts, one module for each kind of finding.

Each module has ``look(host)``, which gives its findings. Nearly all is read from files below the
host's root, so tests give a tree of their own. ``rollout smoke`` ends with a finding that stops and
exit code 3, anything else is run after a warning, and ``rollout doctor`` prints all of them.
"""

from __future__ import annotations

from rollout.preflight import cache, gpu, memory, network, temporary, variables
from rollout.preflight.cache import CACHE
from rollout.preflight.drivers import DRIVER_FLOOR, driver
from rollout.preflight.finding import Finding, Host
from rollout.preflight.library import nvml
from rollout.preflight.temporary import work_folder

__all__ = [
    "CACHE",
    "DRIVER_FLOOR",
    "Finding",
    "Host",
    "driver",
    "look",
    "nvml",
    "work_folder",
]

# Most fundamental first: `rollout smoke` ends with the first one alone.
KINDS = (gpu, variables, memory, cache, temporary, network)


def look(host: Host) -> list[Finding]:
    """Everything that is found on a host: what stops the proof, then what only warns."""
    found = [finding for kind in KINDS for finding in kind.look(host)]
    return sorted(found, key=lambda finding: not finding.stops)

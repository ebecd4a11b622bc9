"""Every finding that a look can give: the table behind docs/findings.md.

Tests hold that each name in the code is here, with its kind and its weight, and none other, and
that each sentence is printed as it stands here.
"""

from __future__ import annotations

from rollout.preflight.known_gpu import GPU
from rollout.preflight.known_host import CACHE, MEMORY, TEMPORARY
from rollout.preflight.known_job import NETWORK, VARIABLES

# By kind, then by name.
KNOWN = {
    "gpu": GPU,
    "variables": VARIABLES,
    "memory": MEMORY,
    "cache": CACHE,
    "temporary": TEMPORARY,
    "network": NETWORK,
}

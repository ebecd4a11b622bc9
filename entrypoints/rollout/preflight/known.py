"""Every finding that a look can give: the table behind docs/findings.md.

A test holds that each name in the code is here, with its kind and its weight, and none other.
"""

# ruff: noqa: S108 - mount points in sentences, no files in them

from __future__ import annotations

from rollout.preflight.finding import Known
from rollout.preflight.known_gpu import GPU
from rollout.preflight.known_job import NETWORK, VARIABLES

_MEMORY = {
    "shm-missing": Known(
        "/dev/shm does not exist; start the container with '--shm-size 1g'",
        "The container was started without a shared memory. Weights are passed through it.",
    ),
    "shm-full": Known(
        "/dev/shm has 15 MiB free; start the container with '--shm-size 1g'",
        "Container engines give 64 MiB, and a job that died leaves its segments there.",
    ),
    "shm-for-one-gpu": Known(
        "/dev/shm has 64 MiB, which is enough for one GPU; tensor parallelism (NCCL, vLLM's "
        "queues) needs '--shm-size 10g' or '--ipc host'",
        "Container engines give 64 MiB. NCCL and the engines' queues take more for each GPU.",
        stops=False,
    ),
    "memory-short": Known(
        "1.5 GiB of memory free, 3 needed; free some, or raise the container's limit (--memory)",
        "Other processes or a limit leave less than the proof takes. The kernel kills it then.",
    ),
}

_CACHE = {
    "cache-not-writable": Known(
        "/var/cache/rollout cannot be written; mount a writable folder there, or run with group 0",
        "The folder belongs to another user, and the container runs without group 0.",
    ),
}

# By kind, then by name.
KNOWN = {
    "gpu": GPU,
    "variables": VARIABLES,
    "memory": _MEMORY,
    "cache": _CACHE,
    "network": NETWORK,
}

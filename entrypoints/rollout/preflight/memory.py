"""Main memory and shared memory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rollout.preflight.finding import Finding, Host

_KIND = "memory"
_SHM = "/dev/shm"  # noqa: S108 - the mount point, not a file in it
SHM_NEEDED = 16 << 20  # bytes: one bucket of the refit, twice
SHM_OF_MANY = 1 << 30  # bytes: below it, processes that share a model over several GPUs run out
MEMORY_NEEDED = 3 << 30  # bytes: trainer's side and engine on the CPU, each with torch loaded


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first."""
    yield from shared_memory(host)
    if host.proof and host.cuda is None:
        yield from memory(host.root)


def shared_memory(host: Host) -> Iterator[Finding]:
    """Whether /dev/shm can hold what a refit passes through it."""
    path = host.root / _SHM.lstrip("/")
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        sentence = f"{_SHM} does not exist; start the container with '--shm-size 1g'"
        yield Finding(_KIND, "shm-missing", sentence)
        return
    if usage.free < SHM_NEEDED:
        sentence = (
            f"{_SHM} has {usage.free >> 20} MiB free; start the container with '--shm-size 1g'"
        )
        yield Finding(_KIND, "shm-full", sentence)
    if host.cuda and usage.total < SHM_OF_MANY:
        sentence = (
            f"{_SHM} has {usage.total >> 20} MiB, which is enough for one GPU; tensor parallelism "
            "(NCCL, vLLM's queues) needs '--shm-size 10g' or '--ipc host'"
        )
        yield Finding(_KIND, "shm-for-one-gpu", sentence, stops=False)


def memory(root: Path = Path("/")) -> list[Finding]:
    """Whether there is main memory for an engine on the CPU."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return []
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    machine = int(found[1]) * 1024 if found else MEMORY_NEEDED
    free = min(machine, _container_memory(root))
    if free < MEMORY_NEEDED:
        numbers = f"{free / 2**30:.1f} GiB of memory free, {MEMORY_NEEDED >> 30} needed"
        sentence = f"{numbers}; free some, or raise the container's limit (--memory)"
        return [Finding(_KIND, "memory-short", sentence)]
    return []


def _container_memory(root: Path) -> int:
    """Bytes that the container may still take; without a limit, as many as are needed.

    Files that were read and are no longer in use count as used, and the kernel gives their memory
    to whoever asks: `rollout verify` alone reads gigabytes.
    """
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return MEMORY_NEEDED
    if not limit.isdigit():
        return MEMORY_NEEDED
    return int(limit) - used + _cached_files(folder)


def _cached_files(folder: Path) -> int:
    """Bytes of files that a group has in memory and does not use; 0 where the kernel says none."""
    try:
        text = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    found = re.findall(r"^(?:inactive_file|active_file) (\d+)$", text, re.MULTILINE)
    return sum(map(int, found))

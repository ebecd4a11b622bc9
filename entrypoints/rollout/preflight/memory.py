"""Main memory, shared memory, and limits of processes, files and locked memory."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator

from rollout.preflight import files, groups, interfaces
from rollout.preflight.finding import Finding, Host

_KIND = "memory"
_SHM = "/dev/shm"  # noqa: S108 - the mount point, not a file in it
SHM_NEEDED = 16 << 20  # bytes: one bucket of the refit, twice
SHM_OF_MANY = 1 << 30  # bytes: below it, processes that share a model over several GPUs run out
MEMORY_NEEDED = 3 << 30  # bytes: trainer's side and engine on the CPU, each with torch loaded
# Bytes of main memory for the proof on a GPU, derived and not measured: three processes with torch
# (trainer, the engine's front and its core) of 1.5 GiB, half of the above; the weights of the probe
# (1.8 GiB, "bytes" of refit in the kept reports) at the trainer and, asleep at level 1, at the
# engine. That is the least: what CUDA itself takes on the host comes to it.
MEMORY_NEEDED_BY_CUDA = 8 << 30

# What vLLM and SGLang ask for when they serve (set_ulimit in the utilities of both). They raise the
# soft limit themselves, so it is the hard one that stands in the way.
FILES_OF_MANY = 65535
# Threads count. A worker of Ray starts dozens, and there is one for each core: what verl issue 719
# was mended with ("ulimit -u 16384"). Podman's default is 2048, RHEL's for users 4096.
PROCESSES_OF_MANY = 16384
# Bytes that NCCL registers with an InfiniBand device, derived: buffers of 4 MiB (the default of
# NCCL_BUFFSIZE) for 32 channels and 8 peers. What is registered is locked.
LOCKED_OF_MANY = 1 << 30

Limits = Callable[[int], tuple[int, int]]


def look(host: Host, limits: Limits = resource.getrlimit) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first; ``limits`` gives soft and hard ones."""
    yield from shared_memory(host)
    if host.proof:
        yield from main_memory(host)
    if host.cuda:
        yield from limited(host, limits)


def shared_memory(host: Host) -> Iterator[Finding]:
    """Whether /dev/shm can hold what a refit passes through it."""
    path = host.root / _SHM.lstrip("/")
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        sentence = f"{_SHM} does not exist; start the container with '--shm-size 1g'"
        yield Finding(_KIND, "shm-missing", sentence)
        return
    if not os.access(path, os.W_OK | os.X_OK):
        sentence = f"{_SHM} cannot be written; start the container with '--shm-size 1g'"
        yield Finding(_KIND, "shm-not-writable", sentence)
    elif usage.free < SHM_NEEDED:
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


def main_memory(host: Host) -> Iterator[Finding]:
    """Whether the machine, and every group that limits this process, leave what the proof takes."""
    needed = MEMORY_NEEDED_BY_CUDA if host.cuda else MEMORY_NEEDED
    room, free = groups.memory(host.root), _available(host)
    if room is not None and room.left < needed and (free is None or room.left <= free):
        sentence = (
            f"{room.left / 2**30:.1f} GiB of memory free, {needed >> 30} needed: {room.group} "
            f"allows {room.limit / 2**30:.1f} GiB; raise the limit (docker --memory, Slurm --mem, "
            "Kubernetes resources.limits.memory)"
        )
        yield Finding(_KIND, "memory-limited", sentence)
    elif free is not None and free < needed:
        sentence = (
            f"{free / 2**30:.1f} GiB of memory free, {needed >> 30} needed; free some, "
            "or raise the container's limit (--memory)"
        )
        yield Finding(_KIND, "memory-short", sentence)


def _available(host: Host) -> int | None:
    """Bytes that the machine has to give, as the kernel estimates; None where it does not."""
    text = files.text(host.root / "proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def limited(host: Host, limits: Limits) -> Iterator[Finding]:
    """Limits that a proof on one GPU does not reach, and a job on many does."""
    _, files = limits(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES_OF_MANY:
        sentence = (
            f"a process may open {files} files, and engines ask for {FILES_OF_MANY}; start the "
            f"container with '--ulimit nofile={FILES_OF_MANY}:{FILES_OF_MANY}', or raise the hard "
            "limit of the user (limits.conf)"
        )
        yield Finding(_KIND, "files-limited", sentence, stops=False)
    processes, _ = limits(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY and processes < PROCESSES_OF_MANY:
        sentence = (
            f"this user may have {processes} processes and threads, and Ray with an engine takes "
            f"thousands; run 'ulimit -u {PROCESSES_OF_MANY}' before the job, or start the "
            f"container with '--ulimit nproc={PROCESSES_OF_MANY}'"
        )
        yield Finding(_KIND, "processes-limited", sentence, stops=False)
    room = groups.pids(host.root)
    if room is not None and room.left < PROCESSES_OF_MANY:
        sentence = (
            f"{room.group} allows {room.limit} processes and threads, of which {room.left} are "
            "left, and Ray with an engine takes thousands; start the container with "
            "'--pids-limit -1', or raise the kubelet's podPidsLimit"
        )
        yield Finding(_KIND, "pids-limited", sentence, stops=False)
    locked, _ = limits(resource.RLIMIT_MEMLOCK)
    if interfaces.verbs(host.root) and locked != resource.RLIM_INFINITY and locked < LOCKED_OF_MANY:
        sentence = (
            "there is a fast network (/dev/infiniband), and a process may lock "
            f"{locked >> 10} KiB of memory, which NCCL exceeds when it registers buffers; start "
            "the container with '--ulimit memlock=-1'"
        )
        yield Finding(_KIND, "locked-memory-limited", sentence, stops=False)

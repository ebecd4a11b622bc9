"""What can be known in milliseconds before an engine starts: driver, shared memory, cache, memory.

Everything is read from files, so tests give a tree of their own as ``root``. A finding is one
sentence that says what to change: ``rollout smoke`` ends with it and exit code 3, anything else is
run after a warning.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

CACHE = "/var/cache/rollout"
_SHM = "/dev/shm"  # noqa: S108 - the mount point, not a file in it
SHM_NEEDED = 16 << 20  # bytes: one bucket of the refit, twice
MEMORY_NEEDED = 3 << 30  # bytes: trainer's side and engine on the CPU, each with torch loaded

# The oldest driver that runs a CUDA major version (minor version compatibility). Source: NVIDIA,
# CUDA Compatibility, table "minimum required driver version".
DRIVER_FLOOR = {12: (525, 60, 13), 13: (580, 65, 6)}


def driver(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA kernel driver, None where there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def gpu(cuda: str | None, root: Path = Path("/")) -> list[str]:
    """What stands between a CUDA image and the GPU; nothing for a CPU image (``cuda`` None)."""
    if cuda is None:
        return []
    version = driver(root)
    if version is None:
        return ["no NVIDIA driver on this host; run it on a GPU host"]
    if not any((root / "dev").glob("nvidia[0-9]*")):
        return [
            "no GPU in this container; start it with '--gpus all' (docker) or '--nv' (Apptainer)"
        ]
    floor = DRIVER_FLOOR.get(int(cuda.split(".")[0]))
    if floor and _numbers(version) < floor:
        oldest = ".".join(f"{n:02d}" if n < 10 else str(n) for n in floor)
        return [
            f"driver {version} is older than CUDA {cuda} needs; "
            f"update it to {oldest} or newer, or take an image of an older CUDA"
        ]
    return []


def shared_memory(root: Path = Path("/")) -> list[str]:
    """Whether /dev/shm can hold what a refit passes through it."""
    path = root / _SHM.lstrip("/")
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return [f"{_SHM} does not exist; start the container with '--shm-size 1g'"]
    if free < SHM_NEEDED:
        return [f"{_SHM} has {free >> 20} MiB free; start the container with '--shm-size 1g'"]
    return []


def cache(environ: Mapping[str, str]) -> list[str]:
    """Whether the cache root can be written."""
    path = Path(environ.get("XDG_CACHE_HOME") or CACHE)
    if os.access(path, os.W_OK | os.X_OK):
        return []
    return [f"{path} cannot be written; mount a writable folder there, or run with group 0"]


def memory(root: Path = Path("/")) -> list[str]:
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
        return [f"{numbers}; free some, or raise the container's limit (--memory)"]
    return []


def _container_memory(root: Path) -> int:
    """Bytes that the container may still take; without a limit, as many as are needed."""
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return MEMORY_NEEDED if limit == "max" else int(limit) - used
    except (OSError, ValueError):
        return MEMORY_NEEDED


def allocator(environ: Mapping[str, str]) -> list[str]:
    """Settings of torch's allocator that break sleeping (vLLM and SGLang assert on them)."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            return [f"{name} has expandable_segments:True, which excludes sleep mode; unset it"]
    return []


def findings(cuda: str | None, root: Path, environ: Mapping[str, str]) -> list[str]:
    """Everything that stands in the way, most fundamental first."""
    found = gpu(cuda, root) + allocator(environ) + shared_memory(root) + cache(environ)
    return found if cuda else found + memory(root)


def work_folder(environ: Mapping[str, str]) -> Path | None:
    """A folder for temporary files that can be written; with a read-only root /tmp cannot."""
    for candidate in (environ.get("TMPDIR"), "/tmp", environ.get("XDG_CACHE_HOME") or CACHE):  # noqa: S108
        if candidate and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return None

"""Trees of files that stand for a machine, and a driver's library that answers as asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollout.preflight import memory
from rollout.preflight.finding import Finding

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar 19 01:02:03 UTC 2024\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@x)\n"
GCC = "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"


def tree(root: Path) -> Path:
    """A tree with a GPU, enough of everything, and no driver yet."""
    for name in ("proc/driver/nvidia", "dev/shm", "cache"):
        (root / name).mkdir(parents=True)
    (root / "dev/nvidia0").touch()
    (root / "dev/nvidiactl").touch()
    meminfo(root, memory.MEMORY_NEEDED_BY_CUDA)
    return root


def install(root: Path, version: str, form: str = OPEN) -> None:
    (root / "proc/driver/nvidia/version").write_text(form.format(version) + GCC)


def libcuda(root: Path, folder: str, version: str) -> None:
    """A libcuda as the container toolkit mounts it: a file with a version, and a link to it."""
    place = root / folder.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    (place / f"libcuda.so.{version}").touch()
    (place / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")


class Nvml:
    """NVML of a machine with the given GPUs: (name, UUID, total and free bytes)."""

    def __init__(self, *gpus: tuple[str, str, int, int], init: int = 0) -> None:
        self.gpus = gpus
        self.init = init
        self.open = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's names
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        if index.value >= len(self.gpus):
            return 2
        handle._obj.value = index.value + 1  # never 0, which ctypes reads back as None
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        for index, gpu in enumerate(self.gpus):
            if gpu[1] == name.decode():
                handle._obj.value = index + 1
                return 0
        return 6

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:  # noqa: N802
        assert len(name) == length.value
        name.value = self.gpus[handle.value - 1][0].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        _, _, total, free = self.gpus[handle.value - 1]
        memory._obj[:] = [total, free, total - free]
        return 0


FIRST = "GPU-4279062b-846a-33ce-0869-868e6263c3a6"
SECOND = "GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4"
SLICE = "MIG-41b36413-d1a0-5b07-ae32-8b6e3a8a4bb1"
FULL, BUSY = ("H200", FIRST, 141 << 30, 140 << 30), ("H200", SECOND, 141 << 30, 3 << 30)


def meminfo(root: Path, available: int) -> None:
    lines = f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {available >> 10} kB\n"
    (root / "proc/meminfo").write_text(lines)


def sentences(findings: Iterable[Finding]) -> list[str]:
    return [finding.sentence for finding in findings]


def write(path: Path, text: str) -> None:
    """A file of a tree, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

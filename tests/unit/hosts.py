"""Trees of files that stand for a machine, and a driver's library that answers as asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    (root / "dev/nvidia-uvm").touch()
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
    """NVML of a machine with the given GPUs: (name, UUID, total and free bytes).

    ``says`` gives the numbers of further answers by the end of a function's name, for the GPU that
    has the number ``of``; ``parts`` are its MIG instances: (UUID, total and free bytes).
    """

    def __init__(
        self,
        *gpus: tuple[str, str, int, int],
        init: int = 0,
        says: Mapping[str, Sequence[int]] | None = None,
        parts: Sequence[tuple[str, int, int]] = (),
        of: int = 0,
        lost: int | None = None,
    ) -> None:
        self.gpus = [*gpus, *(("", *part) for part in parts)]
        self.count = len(gpus)
        self.init = init
        self.says = {**(says or {})}
        if parts:
            self.says |= {"DeviceGetMigMode": (1, 1), "DeviceGetMaxMigDeviceCount": (7,)}
        self.of = of
        self.lost = lost  # the GPU that does not answer any more
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        answer = self.says.get(name.removeprefix("nvml"))
        if answer is None:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            if name.startswith("nvmlDevice") and arguments[0].value != self.of + 1:
                return 3
            for place, number in zip(arguments[-len(answer) :], answer, strict=True):
                place._obj.value = number
            return 0

        return function

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's names
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        if index.value == self.lost:
            return 15
        if index.value >= self.count:
            return 2
        handle._obj.value = index.value + 1  # never 0, which ctypes reads back as None
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _: Any, index: Any, handle: Any) -> int:  # noqa: N802
        if self.count + index.value >= len(self.gpus):
            return 6
        handle._obj.value = self.count + index.value + 1
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, name: Any, length: Any) -> int:  # noqa: N802
        assert len(name) == length.value
        name.value = self.gpus[handle.value - 1][1].encode()
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:  # noqa: N802
        assert len(name) == length.value
        name.value = self.gpus[handle.value - 1][0].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        _, _, total, free = self.gpus[handle.value - 1]
        memory._obj[:] = [total, free, total - free]
        return 0

    def nvmlDeviceGetGpuFabricInfo(self, handle: Any, info: Any) -> int:  # noqa: N802
        if "Fabric" not in self.says or handle.value != self.of + 1:
            return 3
        state, status = self.says["Fabric"]
        info._obj[16:20] = [*status.to_bytes(4, sys.byteorder)]
        info._obj[24] = state
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


def image(root: Path, backend: str, source: str = "") -> None:
    """The image's own environment at its place, with its toolkit and one file of its engine."""
    for name in ("opt/rollout/bin", "opt/rollout/cuda/lib64", "opt/rollout/share/rollout"):
        (root / name).mkdir(parents=True)
    facts = json.dumps({"backend": backend})
    (root / "opt/rollout/share/rollout/image.json").write_text(facts)
    platforms = root / "opt/rollout/lib/python3.11/site-packages/vllm/platforms"
    platforms.mkdir(parents=True)
    (platforms / "interface.py").write_text(source)


# What an image of CUDA sets, and so every healthy host has.
ENVIRON = {
    "PATH": "/opt/rollout/bin:/usr/local/bin:/usr/bin:/bin",
    "CUDA_HOME": "/opt/rollout/cuda",
    "LD_LIBRARY_PATH": "/opt/rollout/cuda/lib64",
    "XDG_CACHE_HOME": "/cache",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_DEBUG": "WARN",
}


def interfaces(root: Path, *names: str) -> None:
    """Network interfaces that are up."""
    for name in names:
        folder = root / "sys/class/net" / name
        folder.mkdir(parents=True)
        (folder / "operstate").write_text("unknown\n" if name == "lo" else "up\n")

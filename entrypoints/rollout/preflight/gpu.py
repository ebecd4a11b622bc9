"""The GPU and its driver, known in milliseconds before an engine starts.

All but the GPU's memory is read from files, so tests give a tree of their own as ``root``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollout.preflight.finding import Finding, Host

_KIND = "gpu"
# Bytes on the GPU. The trainer's side holds two sets of weights and two float32 oracles of a 1 B
# probe, about 12 GiB; the engine its weights, a KV cache of 4 GiB, CUDA graphs and contexts.
GPU_NEEDED = 24 << 30

# The oldest driver that runs a CUDA major version (minor version compatibility). Source: NVIDIA,
# CUDA Compatibility, table "minimum required driver version".
DRIVER_FLOOR = {12: (525, 60, 13), 13: (580, 65, 6)}

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LIBCUDA = "libcuda.so.1"
# Where the loader looks last: Debian's own folders, and those of other distributions.
_LOADER_FOLDERS = (
    *("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"),
    *("/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    *("/lib64", "/usr/lib64", "/lib", "/usr/lib"),
)
# Where Kubernetes' device plugins mount the driver's libraries; the loader does not look there.
_MOUNTED = "/usr/local/nvidia/lib64"
_LINKS = 40  # as many as the kernel follows in one path
_NVML_NOT_FOUND = 6


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first; nothing for an image of the CPU.

    The memory that the proof needs is not looked at where another command is to run.
    """
    if host.cuda is None:
        return
    found = gpu(host.cuda, host.root)
    yield from found
    if not found:  # without a GPU there is nothing to ask about it
        yield from driver_library(host.root, host.environ)
        if host.proof:
            yield from gpu_memory(host.environ, nvml)


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


def gpu(cuda: str | None, root: Path = Path("/")) -> list[Finding]:
    """What stands between a CUDA image and the GPU; nothing for a CPU image (``cuda`` None)."""
    if cuda is None:
        return []
    version = driver(root)
    if version is None:
        sentence = "no NVIDIA driver on this host; run it on a GPU host"
        return [Finding(_KIND, "gpu-driver-missing", sentence)]
    if not any((root / "dev").glob("nvidia[0-9]*")):
        sentence = (
            "no GPU in this container; start it with '--gpus all' (docker) or '--nv' (Apptainer)"
        )
        return [Finding(_KIND, "gpu-not-in-container", sentence)]
    floor = DRIVER_FLOOR.get(int(cuda.split(".")[0]))
    if floor and _numbers(version) < floor:
        oldest = ".".join(f"{n:02d}" if n < 10 else str(n) for n in floor)
        sentence = (
            f"driver {version} is older than CUDA {cuda} needs; "
            f"update it to {oldest} or newer, or take an image of an older CUDA"
        )
        return [Finding(_KIND, "gpu-driver-too-old", sentence)]
    return []


def driver_library(root: Path, environ: Mapping[str, str]) -> list[Finding]:
    """Whether the libcuda that a process would load is the driver's own.

    A file name without a version says nothing about whose it is, and is not remarked on.
    """
    version = driver(root)
    if version is None or not any((root / "dev").glob("nvidia[0-9]*")):
        return []  # said by `gpu`
    given = [part for part in re.split("[:;]", environ.get("LD_LIBRARY_PATH", "")) if part]
    for folder in (*given, *_configured(root), *_cached(root), *_LOADER_FOLDERS):
        name = _file_name(root, f"{folder}/{_LIBCUDA}")
        if name is None:
            continue
        # Three digits: the name libcuda.so.1.1 (WSL) holds no version of a driver.
        found = re.fullmatch(r"libcuda\.so\.(\d{3,}(?:\.\d+)+)", name)
        if found is None or found[1] == version:
            return []
        if folder in given:
            change = "take that folder out of LD_LIBRARY_PATH"
        else:
            change = "remove cuda-compat there, or restart the host if its driver was just updated"
        sentence = (
            f"{folder} holds the {_LIBCUDA} of driver {found[1]}, but the driver of this host is "
            f"{version}; {change}"
        )
        return [Finding(_KIND, "gpu-driver-shadowed", sentence)]
    if _file_name(root, f"{_MOUNTED}/{_LIBCUDA}"):
        sentence = f"no {_LIBCUDA} is found but in {_MOUNTED}; add that folder to LD_LIBRARY_PATH"
        return [Finding(_KIND, "gpu-driver-library-elsewhere", sentence)]
    sentence = (
        f"the driver's libraries ({_LIBCUDA}) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )
    return [Finding(_KIND, "gpu-driver-library-missing", sentence)]


def _configured(root: Path) -> list[str]:
    """The folders of /etc/ld.so.conf and of the files that it includes, in their order."""
    folders = []
    for line in _lines(root / "etc/ld.so.conf"):
        words = line.split()
        if words[0] != "include":
            folders.append(line)
            continue
        for pattern in words[1:]:
            # Sorted, and relative to /etc, as ldconfig has it.
            for file in sorted(root.glob(str(Path("/etc", pattern))[1:])):
                folders += _lines(file)
    return folders


def _lines(file: Path) -> list[str]:
    """What a file of ld.so.conf's format says, without comments."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _cached(root: Path) -> Iterator[str]:
    """The folders with a libcuda that /etc/ld.so.cache names, in whatever order.

    ldconfig takes folders on its command line too, so the configuration may not name them all.
    """
    try:
        content = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return
    for found in re.finditer(rb"(/[^\0]*)/libcuda\.so\.1\0", content):
        yield os.fsdecode(found[1])


def _file_name(root: Path, path: str) -> str | None:
    """The name of the file that a path leads to, None where it leads to none.

    Every link is followed as a process would whose root folder is ``root``.
    """
    ahead, behind, links = path.split("/")[::-1], [root], 0
    try:
        while ahead:
            part = ahead.pop()
            here = behind[-1] / part
            if part == "..":
                behind = behind[:-1] or [root]
            elif part in ("", "."):
                continue
            elif not here.is_symlink():
                behind.append(here)
            elif (links := links + 1) > _LINKS:
                return None
            else:
                target = str(here.readlink())
                behind = [root] if target.startswith("/") else behind
                ahead += target.split("/")[::-1]
        return behind[-1].name if behind[-1].is_file() else None
    except OSError:  # the loader cannot look there either
        return None


def nvml() -> Any:
    """The driver's library that tells of GPUs without CUDA; OSError where there is none."""
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


def gpu_memory(environ: Mapping[str, str], load: Callable[[], Any]) -> list[Finding]:
    """Whether the first visible GPU exists and has the memory; ``load`` gives NVML.

    Where NVML does not answer there is no finding: the engine will say what is wrong.
    """
    value = environ.get(_VISIBLE)
    # From the first name on that is no GPU's, CUDA ignores the list.
    wanted = "0" if value is None else value.split(",")[0].strip()
    if not re.match(r"\d|GPU-|MIG-", wanted):
        sentence = f"{_VISIBLE} is {value!r}, which hides every GPU; unset it, or name one"
        return [Finding(_KIND, "gpu-all-hidden", sentence)]
    try:
        library = load()
        if library.nvmlInit_v2() != 0:
            return []
        try:
            return _memory_of(library, wanted, environ)
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):  # no library, or one without these functions
        return []


def _memory_of(library: Any, wanted: str, environ: Mapping[str, str]) -> list[Finding]:
    import ctypes

    handle, count = ctypes.c_void_p(), ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    number = re.match(r"\d+", wanted)
    if number:
        if count.value and int(number[0]) >= count.value:
            sentence = (
                f"{_VISIBLE} names GPU {number[0]}, but this container has {count.value}, "
                "counted from 0; name one of these"
            )
            return [Finding(_KIND, "gpu-number-unknown", sentence)]
        code = library.nvmlDeviceGetHandleByIndex_v2(
            ctypes.c_uint(int(number[0])), ctypes.byref(handle)
        )
    else:
        code = library.nvmlDeviceGetHandleByUUID(wanted.encode(), ctypes.byref(handle))
        # Unlike CUDA, NVML wants whole names: of a shortened one it knows nothing.
        if code == _NVML_NOT_FOUND and len(wanted) == len("GPU-") + 36:
            sentence = (
                f"{_VISIBLE} names {wanted}, which is not in this container; "
                "name one that 'nvidia-smi -L' lists"
            )
            return [Finding(_KIND, "gpu-uuid-unknown", sentence)]
    memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    if code != 0 or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return []
    total, free, _ = memory
    if free >= GPU_NEEDED:
        return []
    # CUDA counts the fastest GPU first, NVML by slot: which one a number means is known only
    # where all are alike or CUDA was told to count by slot, too.
    by_slot = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if number and not by_slot and not _alike(library, count.value):
        return []
    change = f"choose a larger GPU by {_VISIBLE}"
    if total >= GPU_NEEDED:
        change = f"stop the other process on it, or choose another GPU by {_VISIBLE}"
    numbers = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {GPU_NEEDED >> 30} needed"
    return [Finding(_KIND, "gpu-memory-short", f"GPU {wanted} has {numbers}; {change}")]


def _alike(library: Any, count: int) -> bool:
    """Whether all GPUs are of one model."""
    import ctypes

    names = set()
    for index in range(count):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        if code != 0 or library.nvmlDeviceGetName(handle, name, ctypes.c_uint(96)) != 0:
            return False
        names.add(name.value)
    return len(names) == 1

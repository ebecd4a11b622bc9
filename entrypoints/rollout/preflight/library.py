"""What the driver tells of its GPUs: NVML's answers, read once and kept as plain data.

Nothing is judged here. An answer that this driver does not give (an old one, a GPU without the
part) is None, and no finding may be made of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A driver that waits for a dead GPU may never answer. A healthy one takes milliseconds, and some
# seconds where no process has used the GPUs before and none keeps them awake (persistence).
LIMIT_S = 10.0
# NVML's return codes (nvml.h). Those below zero are ours.
HANGS, MISSING = -1, -2
SUCCESS, GPU_IS_LOST, RESET_REQUIRED, VERSION_MISMATCH = 0, 15, 16, 18
_NOT_SUPPORTED = 3
_UNCORRECTED, _SINCE_RESET = 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t


@dataclass(frozen=True)
class Slice:
    """A MIG instance."""

    uuid: str
    total: int | None = None  # bytes
    free: int | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU of the container, by the number that NVML gives it: in the order of the slots."""

    index: int
    code: int = SUCCESS  # NVML's answer to the question for it; else nothing more is known
    name: str = ""
    uuid: str = ""
    total: int | None = None  # bytes
    free: int | None = None
    compute_mode: int | None = None
    fabric: tuple[int, int] | None = None  # state, and how it ended
    ecc: tuple[int, int] | None = None  # whether it is on, and will be after the next reset
    ecc_errors: int = 0  # that were not corrected, since the last reset
    rows_pending: bool = False  # bad memory that the next reset takes out of use
    rows_failed: bool = False  # bad memory that could not be taken out of use
    mig: bool = False
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Everything that was asked. ``code`` is that of NVML's start."""

    code: int
    gpus: tuple[Gpu, ...] = ()
    cuda: int | None = None  # the newest CUDA that the driver runs: 12040 is 12.4


def nvml() -> Any:
    """The driver's library that tells of GPUs without CUDA; OSError where there is none."""
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


def ask(load: Callable[[], Any], limit: float = LIMIT_S) -> Answer:
    """What NVML says; ``load`` gives it. No answer within ``limit`` seconds is HANGS."""
    said: list[Answer] = []
    thread = threading.Thread(target=lambda: said.append(_ask(load)), daemon=True)
    thread.start()
    thread.join(limit)
    return said[0] if said else Answer(HANGS)


def _ask(load: Callable[[], Any]) -> Answer:
    try:
        library = load()
        code = library.nvmlInit_v2()
    except (OSError, AttributeError):  # no library, or a file that is none
        return Answer(MISSING)
    if code != SUCCESS:
        return Answer(code)
    try:
        count = _numbers(library, "nvmlDeviceGetCount_v2", 1) or [0]
        version = _numbers(library, "nvmlSystemGetCudaDriverVersion_v2", 1)
        gpus = tuple(_gpu(library, index) for index in range(count[0]))
        return Answer(code, gpus, version[0] if version else None)
    finally:
        library.nvmlShutdown()


def _call(library: Any, name: str, *arguments: Any) -> int:
    """The code that a function returns; a driver older than the function does not support it."""
    function = getattr(library, name, None)
    return int(function(*arguments)) if function else _NOT_SUPPORTED


def _numbers(library: Any, name: str, count: int, *arguments: Any) -> list[int] | None:
    """The unsigned numbers that a function gives after its arguments."""
    import ctypes

    found = [ctypes.c_uint() for _ in range(count)]
    code = _call(library, name, *arguments, *map(ctypes.byref, found))
    return [number.value for number in found] if code == SUCCESS else None


def _text(library: Any, name: str, handle: Any) -> str:
    import ctypes

    buffer = ctypes.create_string_buffer(96)
    code = _call(library, name, handle, buffer, ctypes.c_uint(96))
    return buffer.value.decode("utf-8", "replace") if code == SUCCESS else ""


def _memory(library: Any, handle: Any) -> tuple[int | None, int | None]:
    """Bytes in all, and bytes that are free."""
    import ctypes

    found = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    if _call(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(found)) != SUCCESS:
        return None, None
    return found[0], found[1]


def _fabric(library: Any, handle: Any) -> tuple[int, int] | None:
    """The state of the NVLink fabric on this GPU, and the code that its start ended with."""
    import ctypes

    # nvmlGpuFabricInfo_t: 16 bytes of the cluster, status, clique, state.
    found = (ctypes.c_ubyte * 28)()
    if _call(library, "nvmlDeviceGetGpuFabricInfo", handle, ctypes.byref(found)) != SUCCESS:
        return None
    return found[24], int.from_bytes(bytes(found[16:20]), sys.byteorder)


def _errors(library: Any, handle: Any) -> int:
    import ctypes

    count = ctypes.c_ulonglong()
    kind, since = ctypes.c_uint(_UNCORRECTED), ctypes.c_uint(_SINCE_RESET)
    name = "nvmlDeviceGetTotalEccErrors"
    return count.value if _call(library, name, handle, kind, since, ctypes.byref(count)) == 0 else 0


def _slices(library: Any, handle: Any) -> tuple[Slice, ...]:
    import ctypes

    most = _numbers(library, "nvmlDeviceGetMaxMigDeviceCount", 1, handle) or [0]
    found = []
    for index in range(most[0]):
        part = ctypes.c_void_p()
        name = "nvmlDeviceGetMigDeviceHandleByIndex"
        if _call(library, name, handle, ctypes.c_uint(index), ctypes.byref(part)) == SUCCESS:
            found.append(Slice(_text(library, "nvmlDeviceGetUUID", part), *_memory(library, part)))
    return tuple(found)


def _gpu(library: Any, index: int) -> Gpu:
    import ctypes

    handle = ctypes.c_void_p()
    number = ctypes.c_uint(index)
    code = _call(library, "nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(handle))
    if code != SUCCESS:
        return Gpu(index, code)
    total, free = _memory(library, handle)
    mode = _numbers(library, "nvmlDeviceGetComputeMode", 1, handle)
    ecc = _numbers(library, "nvmlDeviceGetEccMode", 2, handle)
    # Corrected and uncorrected ones, whether some wait for a reset, whether one failed.
    rows = _numbers(library, "nvmlDeviceGetRemappedRows", 4, handle) or [0, 0, 0, 0]
    mig = _numbers(library, "nvmlDeviceGetMigMode", 2, handle) or [0, 0]
    return Gpu(
        index,
        code,
        _text(library, "nvmlDeviceGetName", handle),
        _text(library, "nvmlDeviceGetUUID", handle),
        total,
        free,
        mode[0] if mode else None,
        _fabric(library, handle),
        (ecc[0], ecc[1]) if ecc else None,
        _errors(library, handle),
        bool(rows[2]),
        bool(rows[3]),
        bool(mig[0]),
        _slices(library, handle) if mig[0] else (),
    )

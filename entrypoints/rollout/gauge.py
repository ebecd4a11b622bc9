"""A GPU's memory by the driver's account, read without CUDA and while others work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout import preflight
from rollout.problem import Problem

INTERVAL = 0.1  # seconds between two readings


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU."""

    name: str
    total: int  # bytes
    used: Callable[[], int]  # bytes in use by all processes


def first(environ: Mapping[str, str] = os.environ, load: Callable[[], Any] | None = None) -> Gpu:
    """The first visible GPU, by NVML.

    Raises:
        Problem: exit code 3 where the driver's library does not tell of it.
    """
    wanted = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        library = (load or preflight.nvml)()
        _asked(library.nvmlInit_v2())
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        if re.fullmatch(r"\d+", wanted):
            number = ctypes.c_uint(int(wanted))
            _asked(library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)))
        else:
            text = wanted.encode()
            _asked(library.nvmlDeviceGetHandleByUUID(text, ctypes.byref(handle)))
        _asked(library.nvmlDeviceGetName(handle, name, ctypes.c_uint(96)))

        def memory() -> tuple[int, int]:
            found = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
            _asked(library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)))
            return found[0], found[2]

        return Gpu(name.value.decode("utf-8", "replace"), memory()[0], lambda: memory()[1])
    except (OSError, AttributeError) as error:
        raise Problem(
            f"the driver's library does not tell of GPU {wanted} ({error}); "
            "start the container with '--gpus all'",
            3,
        ) from None


def _asked(code: int) -> None:
    if code != 0:
        raise OSError(f"NVML says {code}")


class Gauge:
    """Reads a number all the time, and tells the least and the most of each lap."""

    def __init__(self, read: Callable[[], int], interval: float = INTERVAL) -> None:
        self._read = read
        self._interval = interval
        self._lock = threading.Lock()
        self._least: int | None = None
        self._most = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Gauge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            with contextlib.suppress(OSError):
                self._note(self._read())

    def _note(self, value: int) -> None:
        with self._lock:
            self._least = value if self._least is None else min(self._least, value)
            self._most = max(self._most, value)

    def lap(self) -> tuple[int, int]:
        """The least and the most since the last lap, this moment included; a new lap begins."""
        self._note(self._read())
        with self._lock:
            least, most = self._least or 0, self._most
            self._least, self._most = None, 0
        return least, most

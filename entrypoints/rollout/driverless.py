"""A stand-in for the driver's library where there is no driver, so that what is linked to it loads.

Some engines' compiled parts ask for libcuda.so.1 when they are loaded, and call it when they are
used. With it they import without a GPU. Every function of it says that there is no device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "libcuda.so.1"
PATH = "LD_LIBRARY_PATH"
# Triton brings it, and every image with CUDA has Triton. Newer names stand there as macros.
HEADER = "triton/backends/nvidia/include/cuda.h"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def missing() -> bool:
    """Whether this machine has no driver's library."""
    try:
        ctypes.CDLL(NAME)
    except OSError:
        return True
    return False


def source(header: str) -> str:
    """C of a library that has every function of a header of the driver's, and can do nothing."""
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", header)))
    return "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names)


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The environment of a process that only imports; the library is gone afterwards.

    Without a compiler, a header, or a place to write to, it is this process' own.
    """
    if not missing():
        yield dict(os.environ)
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rollout-driver-"))
            header = Path(sysconfig.get_path("purelib"), HEADER).read_text(encoding="utf-8")
            code = Path(folder) / "driver.c"
            code.write_text(source(header), encoding="utf-8")
            options = ["-shared", f"-Wl,-soname,{NAME}", "-o", str(code.with_name(NAME))]
            subprocess.run(["cc", *options, str(code)], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            yield dict(os.environ)
            return
        paths = [folder, *filter(None, [os.environ.get(PATH)])]
        yield {**os.environ, PATH: ":".join(paths)}

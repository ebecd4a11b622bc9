"""The NVIDIA driver of a host, and its library as a process in the container would load it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rollout.preflight import files, image, loader
from rollout.preflight.finding import Finding, Host

# The oldest driver that runs a CUDA major version (minor version compatibility). Source: NVIDIA,
# CUDA Compatibility, table "minimum required driver version".
DRIVER_FLOOR = {12: (525, 60, 13), 13: (580, 65, 6)}

_LIBCUDA = "libcuda.so.1"
# Where Kubernetes' device plugins and WSL2 put the driver's libraries; the loader does not look
# there by itself.
_ELSEWHERE = ("/usr/local/nvidia/lib64", "/usr/lib/wsl/lib")


def driver(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA kernel driver, None where there is none."""
    text = files.text(root / "proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def wsl(root: Path) -> bool:
    """Whether this is Linux inside of Windows: the driver is Windows' own, and no module tells."""
    kernel = files.text(root / "proc/sys/kernel/osrelease")
    return files.exists(root, "dev/dxg") or "microsoft" in kernel.lower()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _written(version: tuple[int, ...]) -> str:
    return ".".join(f"{part:02}" for part in version)


def old(host: Host, newest: int | None) -> Iterator[Finding]:
    """Whether the driver is too old for the image's CUDA.

    Where no kernel module tells its version (WSL2), ``newest`` decides: the newest CUDA that the
    driver's library says it runs, 12040 for 12.4. What PTX the image's kernels hold, which may ask
    for a newer driver, is not known here.
    """
    cuda = str(host.cuda)
    major = int(cuda.split(".")[0])
    floor, version = DRIVER_FLOOR.get(major), driver(host.root)
    if floor is None:
        return
    if version and _numbers(version) < floor:
        what = f"driver {version} is older than CUDA {cuda} needs"
    elif version is None and newest is not None and newest < major * 1000:
        runs = f"{newest // 1000}.{newest % 1000 // 10}"
        what = f"the driver of this host runs CUDA {runs} at most, and the image is of CUDA {cuda}"
    else:
        return
    sentence = f"{what}; update it to {_written(floor)} or newer, or take an image of an older CUDA"
    yield Finding("gpu", "gpu-driver-too-old", sentence)


def compiled(host: Host) -> Iterator[Finding]:
    """Whether the driver runs what the image's own compiler makes: an image may have a newer one.

    Engines that compile nothing, or not on this GPU, do without.
    """
    version, compiler = driver(host.root), image.nvcc(host)
    if version is None or compiler is None:
        return
    floor = DRIVER_FLOOR.get(int(compiler.split(".")[0]))
    if floor and _numbers(version) < floor:
        sentence = (
            f"driver {version} does not run what nvcc {compiler} of this image compiles "
            f"(FlashInfer's kernels, for one); update it to {_written(floor)} or newer, or take an "
            "image without them"
        )
        yield Finding("gpu", "gpu-driver-too-old-for-nvcc", sentence, stops=False)


def library(host: Host) -> Iterator[Finding]:
    """Whether the libcuda that a process would load is the driver's own.

    A file name without a version says nothing about whose it is, and is not remarked on.
    """
    root, version = host.root, driver(host.root)
    given = image.library_folders(host)
    known = (*loader.configured(root), *loader.cached(root), *loader.FOLDERS)
    for folder in (*given, *known):
        name = loader.file_name(root, f"{folder}/{_LIBCUDA}")
        if name is None:
            continue
        # Three digits: the name libcuda.so.1.1 (WSL) holds no version of a driver.
        found = re.fullmatch(r"libcuda\.so\.(\d{3,}(?:\.\d+)+)", name)
        if found is None or version is None or found[1] == version:
            return
        if folder in given:
            change = f"take that folder out: {image.library_path(host, less=folder)}"
        else:
            change = "remove cuda-compat there, or restart the host if its driver was just updated"
        sentence = (
            f"{folder} holds the {_LIBCUDA} of driver {found[1]}, but the driver of this host is "
            f"{version}; {change}"
        )
        yield Finding("gpu", "gpu-driver-shadowed", sentence)
        return
    for folder in _ELSEWHERE:
        if loader.file_name(root, f"{folder}/{_LIBCUDA}"):
            change = image.library_path(host, more=[folder])
            sentence = f"no {_LIBCUDA} is found but in {folder}; {change}"
            yield Finding("gpu", "gpu-driver-library-elsewhere", sentence)
            return
    sentence = (
        f"the driver's libraries ({_LIBCUDA}) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )
    yield Finding("gpu", "gpu-driver-library-missing", sentence)

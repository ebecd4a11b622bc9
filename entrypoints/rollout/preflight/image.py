"""What the image itself has on a host: its environment, its engine, and the folders it needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rollout import info
from rollout.preflight import files
from rollout.preflight.files import below
from rollout.preflight.finding import Host
from rollout.problem import Problem

PREFIX = "/opt/rollout"
LIBRARIES = "LD_LIBRARY_PATH"
# vLLM's look at CUDA_VISIBLE_DEVICES. Releases that take a UUID there do not have this line.
_NUMBERS_ALONE = re.compile(r"return int\(physical_device_id\)")

# The wheel of CUDA 12 has a name of its own (…_cu12), and no compiler in it.
_NVCC = re.compile(r"nvidia_cuda_nvcc-(\d+(?:\.\d+)+)\.dist-info")


def prefix(host: Host) -> str:
    """The environment's folder, as a process on the host names it."""
    return host.environ.get("ROLLOUT_PREFIX") or PREFIX


def backend(host: Host) -> str:
    """Whose engine the image has; empty where that cannot be read."""
    return str(_facts(host).get("backend") or "")


def _facts(host: Host) -> dict[str, Any]:
    try:
        return info.image(below(host.root, prefix(host)))
    except Problem:
        return {}


def takes_numbers_alone(host: Host) -> bool:
    """Whether the engine reads every name in CUDA_VISIBLE_DEVICES as a number (vllm 41848).

    The source that is installed says it, so a release that was mended is not blamed.
    """
    if backend(host) != "vllm":
        return False
    for site in info.site_packages(below(host.root, prefix(host))):
        text = files.text(site / "vllm/platforms/interface.py")
        if text:
            return bool(_NUMBERS_ALONE.search(text))
    return False


def nvcc(host: Host) -> str | None:
    """The version of the CUDA compiler that the image brings; None where it has none."""
    for site in info.site_packages(below(host.root, prefix(host))):
        for name in files.names(site):
            found = _NVCC.fullmatch(name)
            if found:
                return found[1]
    return None


def cuda_home(host: Host) -> str | None:
    """The CUDA toolkit that the image brings; None where it has none."""
    home = f"{prefix(host)}/cuda"
    return home if files.exists(host.root, f"{home}/lib64") else None


def library_folders(host: Host) -> list[str]:
    """The folders of LD_LIBRARY_PATH, without empty ones."""
    return [part for part in re.split("[:;]", host.environ.get(LIBRARIES, "")) if part]


def library_path(host: Host, *, more: Iterable[str] = (), less: str = "") -> str:
    """What to do with LD_LIBRARY_PATH, with the whole value: the image's folder comes first."""
    home = cuda_home(host)
    own = [f"{home}/lib64"] if home else []
    folders = dict.fromkeys([*own, *library_folders(host), *more])
    folders.pop(less, None)
    return f"set {LIBRARIES}={':'.join(folders)}" if folders else f"unset {LIBRARIES}"

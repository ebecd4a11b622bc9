"""The device nodes by which a container reaches its GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rollout.preflight import drivers, files
from rollout.preflight.finding import Finding, Host

_START = (
    "'--gpus all' (docker), '--device nvidia.com/gpu=all' (podman, CDI), '--nv' (Apptainer) or "
    "the limit 'nvidia.com/gpu: 1' (Kubernetes)"
)


def nodes(root: Path) -> list[Path]:
    """The nodes of the GPUs, not those of the driver or of MIG's capabilities."""
    found = (root / "dev").glob("nvidia[0-9]*")
    return sorted(path for path in found if re.fullmatch(r"nvidia\d+", path.name))


def look(host: Host) -> Iterator[Finding]:
    """What is missing between a container and its GPU; the first thing alone."""
    root = host.root
    if drivers.wsl(root):
        if not files.exists(root, "dev/dxg"):
            yield Finding("gpu", "gpu-not-in-container", f"no GPU in this container; {_given()}")
        return
    if drivers.driver(root) is None:
        sentence = "no NVIDIA driver on this host; run it on a GPU host"
        yield Finding("gpu", "gpu-driver-missing", sentence)
    elif not nodes(root):
        yield Finding("gpu", "gpu-not-in-container", f"no GPU in this container; {_given()}")
    elif not files.exists(root, "dev/nvidiactl"):
        sentence = (
            "/dev/nvidiactl is not in this container, though a GPU is: it was given by "
            f"'--device' alone; {_given()}"
        )
        yield Finding("gpu", "gpu-control-missing", sentence)
    elif not files.exists(root, "dev/nvidia-uvm"):
        sentence = (
            "/dev/nvidia-uvm is not in this container, and CUDA does not start without it; run "
            "'nvidia-modprobe -u -c 0' on the host (with CDI then 'nvidia-ctk cdi generate "
            "--output=/etc/cdi/nvidia.yaml'), and start the container anew"
        )
        yield Finding("gpu", "gpu-uvm-missing", sentence)
    else:
        yield from _closed(root)


def _given() -> str:
    return f"start it with {_START}"


def _closed(root: Path) -> Iterator[Finding]:
    """Whether this user may open the nodes. One open GPU is enough: a job may have one of many."""
    gpus = nodes(root)
    if any(map(_opens, gpus)):
        gpus = []
    for node in (*gpus[:1], root / "dev/nvidiactl", root / "dev/nvidia-uvm"):
        if _opens(node):
            continue
        found = node.stat()
        sentence = (
            f"/dev/{node.name} is closed to user {os.getuid()}: its mode is "
            f"{found.st_mode & 0o777:04o}, its group {found.st_gid}; start the container with "
            f"'--group-add {found.st_gid}' (podman: '--group-add keep-groups'), or load the driver "
            "with NVreg_DeviceFileMode=0666"
        )
        yield Finding("gpu", "gpu-closed", sentence)
        return


def _opens(node: Path) -> bool:
    return os.access(node, os.R_OK | os.W_OK)

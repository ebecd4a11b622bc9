"""Every finding that a look can give: the table behind docs/findings.md.

A test holds that each name in the code is here, with its kind and its weight, and none other.
"""

# ruff: noqa: S108 - mount points in sentences, no files in them

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """What a reader wants to know of one finding."""

    example: str  # a sentence as it is printed, with what to do
    cause: str  # how a host comes to be so, and what fails there else
    stops: bool = True


_GPU = {
    "gpu-driver-missing": Known(
        "no NVIDIA driver on this host; run it on a GPU host",
        "The kernel has no NVIDIA module: a login node, or a container engine without GPU support.",
    ),
    "gpu-not-in-container": Known(
        "no GPU in this container; start it with '--gpus all' (docker) or '--nv' (Apptainer)",
        "The host has a driver, and the container was started without a device of it.",
    ),
    "gpu-driver-too-old": Known(
        "driver 470.256.02 is older than CUDA 12.8 needs; update it to 525.60.13 or newer, or "
        "take an image of an older CUDA",
        "CUDA starts with drivers of its own major version and newer ones alone.",
    ),
    "gpu-driver-shadowed": Known(
        "/usr/local/cuda/compat holds the libcuda.so.1 of driver 575.57.08, but the driver of "
        "this host is 570.86.15; take that folder out of LD_LIBRARY_PATH",
        "A folder with another driver's library comes first. CUDA then refuses to start.",
    ),
    "gpu-driver-library-elsewhere": Known(
        "no libcuda.so.1 is found but in /usr/local/nvidia/lib64; add that folder to "
        "LD_LIBRARY_PATH",
        "Device plugins of Kubernetes mount the driver where the loader does not look.",
    ),
    "gpu-driver-library-missing": Known(
        "the driver's libraries (libcuda.so.1) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "The devices were passed to the container by hand, the driver's libraries were not.",
    ),
    "gpu-all-hidden": Known(
        "CUDA_VISIBLE_DEVICES is '', which hides every GPU; unset it, or name one",
        "A scheduler or a script has set the variable to nothing, or to a name that is no GPU's.",
    ),
    "gpu-number-unknown": Known(
        "CUDA_VISIBLE_DEVICES names GPU 2, but this container has 2, counted from 0; name one of "
        "these",
        "A container counts its own GPUs from 0, whatever their numbers on the host.",
    ),
    "gpu-uuid-unknown": Known(
        "CUDA_VISIBLE_DEVICES names GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4, which is not in "
        "this container; name one that 'nvidia-smi -L' lists",
        "The GPU was given to another container, or the name is another host's.",
    ),
    "gpu-memory-short": Known(
        "GPU 0 has 3.0 of 141.0 GiB free, 24 needed; stop the other process on it, or choose "
        "another GPU by CUDA_VISIBLE_DEVICES",
        "Another process holds the GPU's memory, or the GPU is smaller than the proof needs.",
    ),
}

_VARIABLES = {
    "allocator-excludes-sleep": Known(
        "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, which excludes sleep mode; unset it",
        "vLLM and SGLang allocate by another way where an engine can sleep, and assert on this.",
    ),
}

_MEMORY = {
    "shm-missing": Known(
        "/dev/shm does not exist; start the container with '--shm-size 1g'",
        "The container was started without a shared memory. Weights are passed through it.",
    ),
    "shm-full": Known(
        "/dev/shm has 15 MiB free; start the container with '--shm-size 1g'",
        "Container engines give 64 MiB, and a job that died leaves its segments there.",
    ),
    "shm-for-one-gpu": Known(
        "/dev/shm has 64 MiB, which is enough for one GPU; tensor parallelism (NCCL, vLLM's "
        "queues) needs '--shm-size 10g' or '--ipc host'",
        "Container engines give 64 MiB. NCCL and the engines' queues take more for each GPU.",
        stops=False,
    ),
    "memory-short": Known(
        "1.5 GiB of memory free, 3 needed; free some, or raise the container's limit (--memory)",
        "Other processes or a limit leave less than the proof takes. The kernel kills it then.",
    ),
}

_CACHE = {
    "cache-not-writable": Known(
        "/var/cache/rollout cannot be written; mount a writable folder there, or run with group 0",
        "The folder belongs to another user, and the container runs without group 0.",
    ),
}

_NETWORK: dict[str, Known] = {}

# By kind, then by name.
KNOWN = {
    "gpu": _GPU,
    "variables": _VARIABLES,
    "memory": _MEMORY,
    "cache": _CACHE,
    "network": _NETWORK,
}

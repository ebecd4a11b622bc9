"""Whether NVML answers, and whether the GPUs that it tells of can be worked on."""

from __future__ import annotations

from collections.abc import Iterator

from rollout.preflight import files, library
from rollout.preflight.finding import Finding, Host
from rollout.preflight.library import Answer, Gpu

# Names and numbers of nvml.h.
_EXCLUSIVE_THREAD, _PROHIBITED, _EXCLUSIVE_PROCESS = 1, 2, 3
_EXCLUSIVE = (_EXCLUSIVE_THREAD, _EXCLUSIVE_PROCESS)
_FABRIC_NOT_STARTED, _FABRIC_IN_PROGRESS = 1, 2
MPS_PIPE, MPS_DEFAULT = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"  # noqa: S108 - NVIDIA's name


def mps(host: Host) -> bool:
    """Whether a daemon of MPS listens where a process looks for it."""
    folder = host.environ.get(MPS_PIPE) or MPS_DEFAULT
    return files.exists(host.root, f"{folder}/control")


def answered(answer: Answer) -> Iterator[Finding]:
    """Why NVML tells of no GPU, though the container has the nodes and the driver's libraries."""
    code = answer.code
    if code == library.HANGS:
        sentence = (
            f"the driver does not answer within {library.LIMIT_S:.0f} s: it may wait for a GPU "
            "that is gone; see 'dmesg | grep -i xid' on the host"
        )
        yield Finding("gpu", "gpu-driver-hangs", sentence, stops=False)
    elif code == library.MISSING:
        sentence = (
            "libnvidia-ml.so.1, by which the driver tells of its GPUs, is not in this container; "
            "start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
        yield Finding("gpu", "gpu-nvml-missing", sentence)
    elif code == library.VERSION_MISMATCH:
        sentence = (
            "the driver's libraries in this container are of another version than the driver of "
            "the host (NVML code 18); start the container anew, and restart the host first if its "
            "driver was just updated"
        )
        yield Finding("gpu", "gpu-driver-mismatch", sentence)
    elif code != library.SUCCESS:
        sentence = (
            f"the driver does not answer in this container (NVML code {code}): 'systemctl "
            "daemon-reload' on the host, for one, takes the GPUs from running containers; start "
            "the container anew, and by CDI ('--device nvidia.com/gpu=all'), which keeps them"
        )
        yield Finding("gpu", "gpu-driver-silent", sentence)


def look(host: Host, gpu: Gpu) -> Iterator[Finding]:
    """What is wrong with one visible GPU."""
    name = f"GPU {gpu.index}"
    if gpu.code in (library.GPU_IS_LOST, library.RESET_REQUIRED):
        what = "fell off the bus" if gpu.code == library.GPU_IS_LOST else "has to be reset"
        sentence = (
            f"{name} {what} (NVML code {gpu.code}); see 'dmesg | grep -i xid' on the host, reset "
            "it or restart the host, and take other GPUs until then"
        )
        yield Finding("gpu", "gpu-lost", sentence)
    yield from _starts(host, gpu, name)
    yield from _sound(gpu, name)


def _starts(host: Host, gpu: Gpu, name: str) -> Iterator[Finding]:
    """What keeps CUDA from starting on it."""
    if gpu.fabric and gpu.fabric[0] in (_FABRIC_NOT_STARTED, _FABRIC_IN_PROGRESS):
        sentence = (
            f"{name} has not joined the NVLink fabric, and CUDA does not start before (error 802); "
            "start the fabric manager on the host, of the driver's own version: 'systemctl start "
            "nvidia-fabricmanager'"
        )
        yield Finding("gpu", "gpu-fabric-not-ready", sentence)
    elif gpu.fabric and gpu.fabric[0] and gpu.fabric[1]:
        sentence = (
            f"{name} could not join the NVLink fabric (NVML code {gpu.fabric[1]}), so CUDA may not "
            "start, or GPUs do not reach one another; see the log of nvidia-fabricmanager on the "
            "host"
        )
        yield Finding("gpu", "gpu-fabric-failed", sentence, stops=False)
    if gpu.compute_mode == _PROHIBITED:
        sentence = (
            f"{name} is in compute mode PROHIBITED, in which nothing runs on it; 'nvidia-smi -i "
            f"{gpu.index} -c DEFAULT' on the host ends that"
        )
        yield Finding("gpu", "gpu-prohibited", sentence)
    elif gpu.compute_mode in _EXCLUSIVE and not mps(host):
        sentence = (
            f"{name} is in an exclusive compute mode, and trainer and engine are two processes on "
            f"one GPU; 'nvidia-smi -i {gpu.index} -c DEFAULT' on the host ends that"
        )
        yield Finding("gpu", "gpu-exclusive", sentence)
    if gpu.mig and not gpu.slices:
        sentence = (
            f"{name} is divided by MIG, and no instance of it is in this container; give it one: "
            f"'--gpus device={gpu.index}:0' (docker), 'nvidia.com/mig-1g.10gb: 1' or its like "
            f"(Kubernetes), or end MIG on the host: 'nvidia-smi -i {gpu.index} -mig 0'"
        )
        yield Finding("gpu", "gpu-mig-empty", sentence)


def _sound(gpu: Gpu, name: str) -> Iterator[Finding]:
    """What is wrong with its memory. CUDA starts all the same."""
    if gpu.rows_failed:
        sentence = (
            f"{name} has bad memory that could not be taken out of use; take another GPU, and have "
            "this one replaced"
        )
        yield Finding("gpu", "gpu-memory-bad", sentence, stops=False)
    elif gpu.rows_pending:
        sentence = (
            f"{name} has bad memory that the next reset takes out of use; have it reset: "
            f"'nvidia-smi --gpu-reset -i {gpu.index}' on the host, with nothing running on it"
        )
        yield Finding("gpu", "gpu-reset-pending", sentence, stops=False)
    if gpu.ecc_errors:
        sentence = (
            f"{name} had {gpu.ecc_errors} memory errors that were not corrected since its last "
            f"reset, so numbers may be wrong; see 'nvidia-smi -i {gpu.index} -q -d ECC' and have "
            "it reset"
        )
        yield Finding("gpu", "gpu-memory-errors", sentence, stops=False)
    if gpu.ecc and gpu.ecc[0] != gpu.ecc[1]:
        turns = "on" if gpu.ecc[1] else "off"
        sentence = (
            f"{name} turns its ECC {turns} with the next reset, and its memory changes with it; "
            f"have it reset before a job counts on it: 'nvidia-smi --gpu-reset -i {gpu.index}'"
        )
        yield Finding("gpu", "gpu-ecc-changes", sentence, stops=False)

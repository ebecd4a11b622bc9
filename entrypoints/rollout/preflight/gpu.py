"""The GPU and its driver: from the device nodes to the memory that the proof needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rollout.preflight import devices, drivers, health, library, visible
from rollout.preflight.finding import Finding, Host
from rollout.preflight.library import Gpu, nvml
from rollout.preflight.visible import VISIBLE, Choice, Taken

# Bytes on the GPU. The trainer's side holds two sets of weights and two float32 oracles of a 1 B
# probe, about 12 GiB; the engine its weights, a KV cache of 4 GiB, CUDA graphs and contexts.
GPU_NEEDED = 24 << 30
# Bytes that no process gets: what the driver holds of an idle card. One of 24 GB never has 24 GiB.
_DRIVERS_OWN = 1 << 30
_PATIENCE_S = 1.0  # how long a command that is no proof waits for the driver
_OTHERS = 2 << 30  # bytes in use, above what an idle card of any size shows, that are a process's


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first; nothing for an image of the CPU.

    The memory that the proof needs is not looked at where another command is to run.
    """
    if host.cuda is None:
        return
    found = [*devices.look(host)] or [*drivers.old(host, None)]
    yield from found
    if found:  # without a GPU there is nothing to ask about it
        return
    yield from drivers.compiled(host)
    found = [*drivers.library(host)]
    yield from found
    if not any(finding.name.startswith("gpu-driver-library") for finding in found):
        yield from _asked(host)


def _asked(host: Host) -> Iterator[Finding]:
    """What the driver's own library tells."""
    answer = library.ask(nvml, library.LIMIT_S if host.proof else _PATIENCE_S)
    if answer.code == library.HANGS and not host.proof:
        return  # it may be waking the GPUs, which takes longer than another command should wait
    yield from health.answered(answer)
    if drivers.driver(host.root) is None:
        yield from drivers.old(host, answer.cuda)
    gpus = answer.gpus
    choice = visible.chosen(host, gpus)
    yield from visible.look(host, gpus, choice)
    for taken in choice.taken:
        if taken.gpu is not None:
            yield from health.look(host, taken.gpu)
    if host.proof:
        yield from memory(gpus, choice)


def memory(gpus: Sequence[Gpu], choice: Choice) -> Iterator[Finding]:
    """Whether the first visible GPU, on which the proof runs, has the memory for it."""
    first = next(iter(choice.taken), Taken(""))
    of = first.part or first.gpu
    if of is None or of.total is None or of.free is None:
        return
    name = f"GPU {first.entry}"
    numbers = f"{of.free / 2**30:.1f} of {of.total / 2**30:.1f} GiB free"
    if of.free >= GPU_NEEDED:
        if of.total - of.free >= _OTHERS:
            sentence = (
                f"{name} has {numbers}: another process works on it, and the proof measures the "
                f"memory of the whole GPU; choose another GPU by {VISIBLE} if a check of memory "
                "fails"
            )
            yield Finding("gpu", "gpu-shared", sentence, stops=False)
        return
    if of.total < GPU_NEEDED + _DRIVERS_OWN:
        larger = f"choose a larger GPU by {VISIBLE}" if len(gpus) > 1 else "take a larger GPU"
        sentence = (
            f"{name} has {of.total / 2**30:.1f} GiB in all, too small for the proof, which needs "
            f"{GPU_NEEDED >> 30} free; {larger} for it: engines with a smaller model may run here"
        )
        yield Finding("gpu", "gpu-too-small", sentence)
        return
    sentence = (
        f"{name} has {numbers}, {GPU_NEEDED >> 30} needed; stop the other process on it, or choose "
        f"another GPU by {VISIBLE}"
    )
    yield Finding("gpu", "gpu-memory-short", sentence)

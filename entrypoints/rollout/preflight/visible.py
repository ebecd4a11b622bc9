"""Which GPUs CUDA_VISIBLE_DEVICES leaves, read as CUDA reads it.

CUDA takes the list entry by entry: the first that is no GPU ends it, and one that stands there
twice empties it. A number may have letters behind it, a UUID may be cut short. Sources: NVIDIA,
CUDA Programming Guide, environment variables; torch/cuda/__init__.py, which does the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rollout.preflight import image
from rollout.preflight.finding import Finding, Host
from rollout.preflight.library import SUCCESS, Gpu, Slice

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER, _BY_SLOT = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"


@dataclass(frozen=True)
class Taken:
    """One entry of the list, and the GPU it names; None where it cannot be known."""

    entry: str
    gpu: Gpu | None = None
    part: Slice | None = None


@dataclass(frozen=True)
class Choice:
    """What CUDA makes of the list."""

    taken: tuple[Taken, ...]  # in CUDA's order
    wrong: str | None = None  # the entry that is no GPU, which ends the list
    twice: str | None = None  # the entry that stands there again, which empties it


def by_slot(host: Host) -> bool:
    """Whether CUDA was told to count as NVML does. By default it counts the fastest GPU first."""
    return host.environ.get(_ORDER) == _BY_SLOT


def alike(gpus: Sequence[Gpu]) -> bool:
    """Whether all GPUs are of one model, so that a number means the same to CUDA and NVML."""
    return len({gpu.name for gpu in gpus if gpu.code == SUCCESS}) == 1


def chosen(host: Host, gpus: Sequence[Gpu]) -> Choice:
    """The GPUs that CUDA will see. ``gpus`` is empty where NVML tells of none."""
    value = host.environ.get(VISIBLE)
    certain = by_slot(host) or alike(gpus)
    if value is None:
        return Choice(tuple(_numbered(str(gpu.index), gpu) for gpu in gpus))
    prefix = next((p for p in ("GPU-", "MIG-") if value.strip().startswith(p)), "")
    taken: list[Taken] = []
    seen: set[str] = set()
    for entry in (part.strip() for part in value.split(",")):
        number = re.match(r"\d+", entry)
        if not (entry.startswith(prefix) if prefix else number):
            return Choice(tuple(taken), wrong=entry)
        name = entry if prefix or not number else str(int(number[0]))
        if name in seen:
            return Choice((), twice=entry)
        seen.add(name)
        found = _named(entry, gpus) if prefix else _counted(int(name), entry, gpus, certain)
        if found is None:
            return Choice(tuple(taken), wrong=entry)
        taken.append(found)
    return Choice(tuple(taken))


def _numbered(entry: str, gpu: Gpu) -> Taken:
    """A GPU by its number: where it is divided, CUDA takes its first instance."""
    return Taken(entry, gpu, gpu.slices[0] if gpu.slices else None)


def _counted(number: int, entry: str, gpus: Sequence[Gpu], certain: bool) -> Taken | None:
    if number >= len(gpus):
        return None if gpus else Taken(entry)
    return _numbered(entry, gpus[number]) if certain else Taken(entry)


def _named(entry: str, gpus: Sequence[Gpu]) -> Taken | None:
    """The GPU or the instance of a UUID, which CUDA takes cut short as well."""
    for gpu in gpus:
        if gpu.uuid.startswith(entry):
            return Taken(entry, gpu)
        for part in gpu.slices:
            if part.uuid.startswith(entry):
                return Taken(entry, gpu, part)
    # NVML did not name them all, or the name is of the older form MIG-GPU-<UUID>/<number>/<number>.
    unsure = not all(gpu.uuid for gpu in gpus) or "/" in entry or not gpus
    return Taken(entry) if unsure else None


def look(host: Host, gpus: Sequence[Gpu], choice: Choice) -> Iterator[Finding]:
    """What is wrong with the list."""
    value = host.environ.get(VISIBLE)
    if value is None:
        return
    if choice.twice is not None:
        entries = dict.fromkeys(part.strip() for part in value.split(","))
        sentence = (
            f"{VISIBLE} is {value!r}, which names {choice.twice} twice, and CUDA sees no GPU then; "
            f"set {VISIBLE}={','.join(entries)}"
        )
        yield Finding("gpu", "gpu-named-twice", sentence)
    elif choice.wrong is not None and choice.taken:
        sentence = (
            f"{VISIBLE} is {value!r}, and CUDA ends the list at {choice.wrong!r}, which is no GPU "
            f"of this container; it sees {len(choice.taken)}: set "
            f"{VISIBLE}={','.join(taken.entry for taken in choice.taken)}, or name GPUs of "
            "'nvidia-smi' there"
        )
        yield Finding("gpu", "gpus-cut-off", sentence, stops=False)
    elif choice.wrong is not None:
        yield from _first(value, choice.wrong, len(gpus))
    yield from _uuids(host, gpus, choice)


def _first(value: str, wrong: str, count: int) -> Iterator[Finding]:
    """Of a list that leaves nothing: its first entry is no GPU."""
    if re.match(r"\d", wrong):
        sentence = (
            f"{VISIBLE} names GPU {wrong}, but this container has {count}, "
            f"counted from 0; name one of these: {VISIBLE}=0"
        )
        yield Finding("gpu", "gpu-number-unknown", sentence)
    elif wrong.startswith(("GPU-", "MIG-")):
        sentence = (
            f"{VISIBLE} names {wrong}, which is not in this container; unset it to have every GPU "
            "of the container, or name one by its number there, from 0"
        )
        yield Finding("gpu", "gpu-uuid-unknown", sentence)
    else:
        sentence = f"{VISIBLE} is {value!r}, which hides every GPU; unset it, or name one"
        yield Finding("gpu", "gpu-all-hidden", sentence)


def _uuids(host: Host, gpus: Sequence[Gpu], choice: Choice) -> Iterator[Finding]:
    """Whether the engine reads numbers where UUIDs stand.

    vLLM does so for every GPU; SGLang where several share a model (custom_all_reduce.py).
    """
    names = [taken for taken in choice.taken if not taken.entry[:1].isdigit()]
    if not names:
        return
    named = f"{VISIBLE} names {','.join(taken.entry for taken in names)}"
    if image.takes_numbers_alone(host):
        change = _by_number(host, gpus, names)
        sentence = f"{named}, and the vLLM of this image takes numbers alone; {change}"
        yield Finding("gpu", "gpu-named-by-uuid", sentence)
    elif image.backend(host) == "sglang" and len(names) > 1:
        change = _by_number(host, gpus, names)
        sentence = f"{named}, and SGLang divides a model among GPUs by number; {change}"
        yield Finding("gpu", "gpus-named-by-uuid", sentence, stops=False)


def _by_number(host: Host, gpus: Sequence[Gpu], names: Sequence[Taken]) -> str:
    """How to name the same GPUs by number."""
    if any(taken.entry.startswith("MIG-") for taken in names):
        return f"start the container with that instance alone, and unset {VISIBLE}"
    numbers = [str(taken.gpu.index) for taken in names if taken.gpu is not None]
    if len(numbers) < len(names):
        return f"name them by their numbers in this container, from 0: {VISIBLE}=0"
    order = "" if by_slot(host) or alike(gpus) else f"{_ORDER}={_BY_SLOT} "
    return f"set {order}{VISIBLE}={','.join(numbers)}"

"""Which layer of an image a distribution of its lock belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from images.catalog import Image
from images.locking.lock import Locked

# Layers in the order of the Dockerfiles, from slow to fast changing: images with the same torch
# share the first ones to the byte.
LAYERS = (
    *("mathlibs", "nvidia", "torch", "toolchain", "dependencies", "sources", "engine"),
    "framework",
)
TORCH = ("torch", "torchvision", "torchaudio", "triton")
# What torch pins of CUDA, in two layers: in one it would be the largest by far, and a broken pull
# begins a layer anew.
_MATHLIBS = re.compile(
    r"nvidia-(cublas|cufft|curand|cusolver|cusparse|cusparselt|nvjitlink)(-cu\d+)?"
)
_NVIDIA = re.compile(
    r"nvidia-(cuda-cupti|cuda-nvrtc|cuda-runtime|cudnn|cufile|nccl|nvshmem|nvtx)(-cu\d+)?"
)
# What compiles at run time. The plain runtime wheel belongs to it where torch's has a suffix.
_TOOLCHAIN = re.compile(r"nvidia-(cuda-(nvcc|cccl|crt)|nvvm)(-cu\d+)?")


def layer_of(
    entry: Locked, engine: str, names: Collection[str] = (), sources: Collection[str] = ()
) -> str:
    """The layer that a distribution belongs to, among the names of its lock."""
    # What trains, and all that it brings: none of it may change a layer of the engine.
    if entry.above:
        return "framework"
    # They stand above the layer that has their build tools.
    if entry.name in sources:
        return "sources"
    if entry.name == engine:
        return "engine"
    if entry.name in TORCH:
        return "torch"
    if _MATHLIBS.fullmatch(entry.name):
        return "mathlibs"
    second = entry.name == "nvidia-cuda-runtime" and any(
        name.startswith(f"{entry.name}-cu") for name in names
    )
    if second or _TOOLCHAIN.fullmatch(entry.name):
        return "toolchain"
    return "nvidia" if _NVIDIA.fullmatch(entry.name) else "dependencies"


def layers(locked: Sequence[Locked], engine: str, sources: Collection[str] = ()) -> dict[str, str]:
    """The lock, cut into the layers that hold anything: name to requirements text."""
    texts: dict[str, str] = {}
    names = {entry.name for entry in locked}
    for layer in LAYERS:
        entries = [e for e in locked if layer_of(e, engine, names, sources) == layer]
        if entries:
            texts[layer] = "".join(e.text for e in sorted(entries, key=lambda e: e.name))
    return texts


def layer_names(image: Image, locked: Sequence[Locked]) -> list[str]:
    """What the layers of an image are called, from the lowest up."""
    texts = layers(locked, image.engine, image.sources)
    python = ["python"] if image.interpreter else []
    return ["base", *python, *texts, "entrypoints"]

"""Where an engine keeps each tensor of a checkpoint, and what lies there.

Engines pack what they multiply together (query, key and value; gate and up) into one parameter, and
pad vocabularies to whole tiles. vLLM and SGLang do it alike: SGLang's layers were vLLM's once.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_HASHERS = 8  # more wait for memory
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
Place = tuple[str, int, int]  # parameter, first row, row behind the last


def places(model: Any) -> dict[str, Place]:
    """Where each Hugging Face tensor lies: parameter, and from which row to which of it."""
    packed = getattr(model, "packed_modules_mapping", PACKED)
    modules = dict(model.named_modules())
    found: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        module = modules[path]
        rows = parameter.shape[0] if parameter.dim() else 0
        if leaf in packed:
            start = 0
            for part, size in zip(packed[leaf], module.output_sizes, strict=True):
                found[f"{parent}.{part}.{attribute}"] = (name, start, start + size)
                start += size
        else:
            # Vocabularies are padded to whole tiles.
            found[name] = (name, 0, min(rows, getattr(module, "org_vocab_size", rows)))
    return found


def digests(model: Any) -> dict[str, str]:
    """sha256 of each weight's bytes by its Hugging Face name; packed ones are taken apart."""
    parameters = dict(model.named_parameters())

    def digest(item: tuple[str, Place]) -> tuple[str, str]:
        from rollout.transport import as_bytes

        name, (parameter, start, stop) = item
        data = as_bytes(parameters[parameter].data[start:stop].cpu())
        return name, hashlib.sha256(memoryview(data.numpy())).hexdigest()

    with ThreadPoolExecutor(min(_HASHERS, len(os.sched_getaffinity(0)))) as pool:
        return dict(pool.map(digest, places(model).items()))

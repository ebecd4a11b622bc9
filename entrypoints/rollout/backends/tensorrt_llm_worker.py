"""What the proof adds to TensorRT-LLM's worker (``ray_worker_extension_cls``).

A refit is its own WorkerExtension's, which ours comes from. The engine refuses a name that its
worker has itself, hence the prefix. It looks the class up by its dotted name; only then is the
engine imported, since the interface is compared where it may not be.
"""

from __future__ import annotations

import hashlib
from typing import Any

LEAK_BYTES = 256 << 20


def __getattr__(name: str) -> Any:
    if name != "Extension":
        raise AttributeError(name)
    from tensorrt_llm.llmapi.rlhf_utils import WorkerExtension

    return type("Extension", (Methods, WorkerExtension), {"__module__": __name__})


class Methods:
    """Methods of the worker process; ``self`` is the engine's RayGPUWorker."""

    # The engine's worker has these.
    engine: Any
    device_id: int

    def _smoke_model(self) -> Any:
        return self.engine.model_engine.model

    def smoke_uuid(self) -> str:
        """The GPU of this worker, by the name under which it looks for its handles."""
        from tensorrt_llm._torch.utils import get_device_uuid

        return str(get_device_uuid(self.device_id))

    def smoke_held(self) -> int:
        """Bytes of the parameters of its model."""
        return sum(p.numel() * p.element_size() for p in self._smoke_model().parameters())

    def smoke_reset_prefix_cache(self) -> None:
        """Forget the keys and values of prompts seen."""
        self.engine.reset_prefix_cache()

    def smoke_digests(self) -> dict[str, str]:
        """sha256 of each weight's bytes by its Hugging Face name; packed ones are taken apart."""
        from rollout.transport import as_bytes

        model = self._smoke_model()
        config = model.model_config.pretrained_config
        found = {}
        for name, parameter in model.named_parameters():
            for own, start, stop in parts(name, parameter.shape, config):
                data = as_bytes(parameter.data[start:stop].cpu())
                found[own] = hashlib.sha256(memoryview(data.numpy())).hexdigest()
        return found

    def smoke_leak(self) -> None:
        """A fault: keep some memory outside the tagged pools."""
        import torch

        kept = self.__dict__.setdefault("smoke_leaks", [])
        kept.append(torch.ones(LEAK_BYTES, dtype=torch.uint8, device=f"cuda:{self.device_id}"))


def parts(name: str, shape: Any, config: Any) -> list[tuple[str, int, int]]:
    """The tensors of a checkpoint that a parameter is made of, each with its rows.

    Query, key and value lie in one, gate and up in one. Vocabularies may be padded.
    """
    rows = int(shape[0]) if len(shape) else 0
    path, _, attribute = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    if leaf == "qkv_proj":
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        other = (getattr(config, "num_key_value_heads", None) or heads) * size
        sizes = {"q_proj": heads * size, "k_proj": other, "v_proj": other}
    elif leaf == "gate_up_proj":
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    else:
        vocabulary = leaf in ("embed_tokens", "lm_head")
        return [(name, 0, min(rows, config.vocab_size) if vocabulary else rows)]
    found, start = [], 0
    for part, size in sizes.items():
        found.append((f"{parent}.{part}.{attribute}", start, start + size))
        start += size
    return found

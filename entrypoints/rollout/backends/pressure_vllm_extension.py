"""What the proof adds to vLLM's worker for many requests at once."""

from __future__ import annotations

from rollout.backends import vllm_extension


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    def smoke_blocks(self) -> int:
        """Blocks of the KV cache that requests can have; one stands for none."""
        return int(self.vllm_config.cache_config.num_gpu_blocks) - 1

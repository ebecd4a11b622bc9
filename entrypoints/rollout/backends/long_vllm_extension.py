"""What the proof adds to vLLM's worker for long sequences."""

from __future__ import annotations

from rollout import rotary
from rollout.backends import vllm_extension


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    def smoke_capacity(self) -> int:
        """Tokens that the KV cache holds."""
        cache = self.vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size)

    def smoke_spoil_rotary(self, fault: str, place: int) -> None:
        """A fault: rotations of other positions, from a position on."""
        rotary.spoil(self.model_runner.get_model(), fault, place)

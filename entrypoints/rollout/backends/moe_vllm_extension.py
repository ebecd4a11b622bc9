"""What the check of experts adds to vLLM's worker (``worker_extension_cls``).

A refit is that of the dense check, by the names of single experts. vLLM's own ``load_weights``
finds the place of each in the fused parameters; post-processing leaves their addresses alone where
Triton computes (shown by reading: 0.12, 0.14, 0.24), so that captured CUDA graphs stay right.
"""

from __future__ import annotations

from rollout import experts
from rollout.backends import vllm_extension


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    def smoke_load(self, address: str) -> None:
        """As in the dense check, with a loader for every fused parameter."""
        experts.loadable(self.model_runner.get_model())
        vllm_extension.Extension.smoke_load(self, address)

    def smoke_digests(self) -> dict[str, str]:
        """sha256 of each weight's bytes by its Hugging Face name; fused ones are taken apart."""
        return experts.digests(self.model_runner.get_model())

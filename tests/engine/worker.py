"""vLLM's worker on a CPU, with our extension; of that only what needs a GPU is another.

vLLM for the CPU packs the weights of its linear layers and throws the originals away, so nothing
can be loaded into them again (``'Parameter' object has no attribute 'weight_loader'``). Here they
compute by torch's own ``linear``, as they do on a GPU, and keep their weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.distributed.device_communicators import shm_broadcast
from vllm.model_executor.layers import utils

from rollout.backends import fp8_kv_vllm_extension, pressure_vllm_extension, vllm_extension


def plain(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001 - vLLM names it
    """In place of ``dispatch_cpu_unquantized_gemm``."""
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = plain
torch.cuda.synchronize = lambda *_: None  # after a refit
# It wants 240 MiB of /dev/shm for answers and fills a few; a container has 64.
shm_broadcast.check_shm_free_space = lambda *_: None
vllm_extension.LEAK_BYTES = 16 << 20  # a fault; of 256 MiB in each refit the machine would notice


class Extension(vllm_extension.Extension):
    """Our extension, where no pool counts what it holds."""

    def smoke_pace(self, seconds: float) -> None:
        """Let each step take so much longer, as one of a larger model."""
        runner = self.model_runner
        vars(runner).pop("execute_model", None)
        step = runner.execute_model

        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return step(*given, **named)

        if seconds:
            runner.execute_model = slow

    def smoke_held(self) -> int:
        """Bytes of weights and KV cache."""
        held = [*self.model_runner.get_model().parameters(), *self.model_runner.kv_caches]
        storages = [tensor.untyped_storage() for tensor in held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Pressed(Extension, pressure_vllm_extension.Extension):
    """The same, with what many requests at once need."""


class Eight(Extension, fp8_kv_vllm_extension.Extension):
    """The same, with a KV cache in 8 bits."""

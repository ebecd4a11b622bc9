"""What the proof adds to vLLM's worker (``worker_extension_cls``): refit, digests, memory, faults.

vLLM mixes this class into its worker and refuses any name that the worker has itself, hence the
prefix. Arguments and results are plain types: those pass vLLM's message format in every version.

A refit takes verl's steps: ``load_weights`` for each bucket, then ``process_weights_after_loading``
once. With weights in fp8 the buckets are quantised on the way, in blocks of 128 by 128; vLLM's
parameters, which post-processing has stripped of what loading needs, are made anew for that and
copied into the old ones, whose addresses CUDA graphs have recorded. What post-processing calls the
factors is vLLM's affair: every parameter that a layer had keeps its place, whatever its name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rollout import placement, vllm_names

if TYPE_CHECKING:
    import torch

vllm_names.adapt()

BLOCK = 128  # rows and columns that share a scale; verl's weight_block_size
LEAK_BYTES = 256 << 20
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


class Extension:
    """Methods of the worker process; ``self`` is vLLM's worker."""

    # vLLM's worker has these.
    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: torch.device

    def smoke_follow(self) -> int:
        """Die with the process that started this one, however that ends; returns this process' id.

        An engine that outlives a killed trainer keeps its GPU memory until somebody notices.
        """
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        return os.getpid()

    def smoke_held(self) -> int:
        """Bytes of weights and KV cache in the pool that sleeping gives back."""
        from vllm.device_allocator.cumem import CuMemAllocator

        return int(CuMemAllocator.get_instance().get_current_usage())

    def smoke_block(self) -> int:
        """Tokens in a block of the KV cache: what vLLM decided when it chose its kernels."""
        return int(self.vllm_config.cache_config.block_size)

    def smoke_refit(self, address: str) -> None:
        """Take the weights that a trainer sends to this address (:mod:`rollout.cuda_ipc`)."""
        from vllm.config import set_current_vllm_config

        # Newer layers read it while they are made and processed, and raise where it is not set.
        with set_current_vllm_config(self.vllm_config):
            self.smoke_load(address)

    def smoke_load(self, address: str) -> None:
        """:meth:`smoke_refit` where vLLM's configuration is set."""
        import torch
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        from rollout.cuda_ipc import Bucket, receive

        model = self.model_runner.get_model()
        quantised = {n: m for n, m in model.named_modules() if _is_fp8(m)}
        targets = {name: place[0] for name, place in placement.places(model).items()}
        old = {name: dict(module.named_parameters()) for name, module in quantised.items()}
        for module in quantised.values():
            _make_loadable(module, self.device)

        def load(bucket: Bucket) -> None:
            stream = []
            for name, tensor in bucket:
                module, _, attribute = targets.get(name, name).rpartition(".")
                if module in quantised and attribute == "weight":
                    weight, scale = quantise(tensor)
                    stream += [(name, weight), (f"{name}_scale_inv", scale)]
                else:
                    stream.append((name, tensor))
            model.load_weights(stream)

        receive(address, self.device, load)
        if not quantised:
            process_weights_after_loading(model, self.model_config, self.device)
        # In fp8 layer by layer: over the whole model it fails at the attention layers, which have
        # given away the scales that it looks for.
        with torch.no_grad():
            for name, module in quantised.items():
                module.quant_method.process_weights_after_loading(module)
                for attribute, parameter in old[name].items():
                    parameter.data.copy_(getattr(module, attribute).data)
                    setattr(module, attribute, parameter)
        torch.cuda.synchronize(self.device)
        if quantised:
            torch.cuda.empty_cache()  # the second set of weights

    def smoke_digests(self) -> dict[str, str]:
        """sha256 of each weight's bytes by its Hugging Face name; packed ones are taken apart."""
        return placement.digests(self.model_runner.get_model())

    def smoke_leak(self) -> None:
        """A fault: keep some memory outside the pool."""
        import torch

        kept = self.__dict__.setdefault("smoke_leaks", [])
        kept.append(torch.ones(LEAK_BYTES, dtype=torch.uint8, device=self.device))

    def smoke_lose_buffers(self) -> None:
        """A fault: buffers as new memory has them, had vLLM not saved them before sleeping."""
        for buffer in self.model_runner.get_model().buffers():
            buffer.zero_()


def _is_fp8(module: Any) -> bool:
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    return isinstance(getattr(module, "quant_method", None), Fp8LinearMethod)


def _make_loadable(module: Any, device: torch.device) -> None:
    """Give a linear layer new parameters, with the loaders that vLLM's own making gives them."""
    import torch

    bias = getattr(module, "bias", None)
    method = dict(vars(module.quant_method))
    with torch.device(device):
        module.quant_method.create_weights(
            layer=module,
            input_size_per_partition=module.input_size_per_partition,
            output_partition_sizes=module.logical_widths,
            input_size=module.input_size,
            output_size=module.output_size,
            params_dtype=module.orig_dtype,
            weight_loader=module.weight_loader_v2,
        )
    # Newer versions choose a kernel here; the one that compiled graphs call is that of the start.
    vars(module.quant_method).update(method)
    if bias is not None and module.bias is not bias:
        raise RuntimeError("vLLM made a new bias, whose loader is not known here")


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of shape (rows, columns) as float8 (e4m3) and float32 factors to multiply it by.

    The factors have shape (blocks of rows, blocks of columns), as vLLM's ``weight_scale_inv``.
    """
    import torch

    rows, columns = weight.shape
    down, right = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.nn.functional.pad(
        weight.float(), (0, right * BLOCK - columns, 0, down * BLOCK - rows)
    )
    blocks = padded.view(down, BLOCK, right, BLOCK)
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / limit
    small = (blocks / scale[:, None, :, None]).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return small.view(down * BLOCK, right * BLOCK)[:rows, :columns].contiguous(), scale

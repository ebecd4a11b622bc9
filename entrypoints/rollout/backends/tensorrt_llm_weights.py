"""Weights for a TensorRT-LLM in fp8, quantised by the trainer as verl does it.

The names that are quantised are verl's (verl/utils/fp8_utils.py, 0.7.1): weights of linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 128  # rows and columns that share a factor; verl's weight_block_size
_LEFT = ("embed_tokens", "lm_head", "norm", "ln_", "embeddings", "mlp.gate.weight")
_LINEAR = ("_proj.weight", ".fc1.weight", ".fc2.weight")


def is_linear(name: str) -> bool:
    """Whether a tensor of a checkpoint is the weight of a linear layer in 8 bits."""
    return name.endswith(_LINEAR) and not any(part in name.lower() for part in _LEFT)


def quantised(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, each weight of a linear layer as float8 and the factors to multiply it by."""
    for name, tensor in tensors:
        if is_linear(name) and tensor.dim() == 2:
            weight, factors = quantise(tensor)
            yield name, weight
            yield f"{name}_scale_inv", factors
        else:
            yield name, tensor


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of shape (rows, columns) as float8 (e4m3) and float32 factors to multiply it by.

    The factors have shape (blocks of rows, blocks of columns). vLLM's extension has the same; in an
    image of this engine that module is not.
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

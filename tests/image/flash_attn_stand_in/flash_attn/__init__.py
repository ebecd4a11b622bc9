"""What verl takes of flash-attn, by torch on a CPU; FAULT names what is to be wrong in it."""

import os
from itertools import pairwise

import torch

__version__ = "stand-in"
FAULT = os.environ.get("FAULT", "")


def _attend(q, k, v, causal):
    if FAULT == "heads":
        k, v = (x.repeat(1, 1, q.shape[2] // x.shape[2], 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    late = 1 if FAULT == "diagonal" else 0
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    seen = seen.tril(k.shape[1] - q.shape[1] + late) if causal else seen
    scale = q.shape[-1] ** -0.5 * (1.05 if FAULT == "scale" else 1)
    turned = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*turned, attn_mask=seen, scale=scale).transpose(1, 2)


class _Halved(torch.autograd.Function):
    """A gradient that is wrong behind an output that is right."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def flash_attn_func(q, k, v, causal=False):
    return _attend(q, k, _Halved.apply(v) if FAULT == "gradient" else v, causal)


def flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k, causal=False):
    ends = ends_q.tolist()
    if FAULT == "sequences":
        ends = [ends[0], ends[-1]]
    parts = pairwise(ends)
    return torch.cat(
        [_attend(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0] for a, b in parts]
    )

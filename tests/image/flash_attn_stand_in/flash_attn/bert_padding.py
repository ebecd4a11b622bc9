"""The padding of flash-attn, by torch; see __init__.py."""

import torch

from . import FAULT


def rearrange(x, pattern):
    assert pattern == "b s h d -> (b s) h d"
    return x.flatten(0, 1)


def index_first_axis(x, indices):
    return x[indices]


def unpad_input(x, mask):
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return x.flatten(0, 1)[indices], indices, ends, int(lengths.max()), lengths


def pad_input(rows, indices, batch, length):
    if FAULT == "padding":
        indices = (indices + 1) % (batch * length)
    whole = rows.new_zeros(batch * length, *rows.shape[1:]).index_put((indices,), rows)
    return whole.unflatten(0, (batch, length))

"""The cross entropy of flash-attn, by torch; see flash_attn/__init__.py."""

import torch

from flash_attn import FAULT


def cross_entropy_loss(logits, labels):
    if FAULT == "entropy":
        logits = logits[:, :-1]
        labels = labels.clamp(max=logits.shape[1] - 1)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none"), None

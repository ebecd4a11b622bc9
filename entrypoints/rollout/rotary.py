"""Faults in an engine's table of rotations, a row for each position, as vLLM and SGLang keep it."""

from __future__ import annotations

from typing import Any

TABLE = "cos_sin_cache"  # what both call it in each of their rotary embeddings


def spoil(model: Any, fault: str, place: int) -> None:
    """Give positions from ``place`` on other rows, in the memory that compiled graphs read.

    Layers may share one table, which is changed once. Raises ValueError where there is none, or it
    has no such row, and for another fault.
    """
    import torch

    done = set()
    with torch.no_grad():
        for module in model.modules():
            table = getattr(module, TABLE, None)
            if table is None or table.data_ptr() in done:
                continue
            done.add(table.data_ptr())
            if place >= len(table) - 1:
                raise ValueError(f"a table of {len(table)} rotations has no position {place}")
            if fault == "frozen-rotary":
                table[place:] = table[place].clone()
            elif fault == "shifted-chunk":
                table[place:-1] = table[place + 1 :].clone()
            else:
                raise ValueError(f"no fault of a table of rotations is called {fault!r}")
    if not done:
        raise ValueError("the model has no table of rotations that is known here")

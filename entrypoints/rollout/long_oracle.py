"""The oracle of long sequences: the same float32 model, a block of rows at a time.

At once the scores of 16,384 tokens in 32 heads are 34 GB for each layer. Row by row of the same
matrix they are the same numbers: keys and values of what came before are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollout.oracle import Oracle, _full_float32

if TYPE_CHECKING:
    import torch

ROWS = 512  # whose scores against all that came before are in memory at once
TAIL = 64  # tokens before the answer that the wrong oracle takes for one position later, too


class LongOracle(Oracle):
    """An oracle of the same weights as another one, whose model it shares."""

    def __init__(self, of: Oracle) -> None:
        self._torch, self._device, self._model = of._torch, of._device, of._model

    def both(
        self, prompt: Sequence[int], completion: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """Natural log-probability of each token of ``completion``, twice.

        Once as it is, and once as a wrong oracle has it: one that takes the answer, and the
        ``TAIL`` tokens before, for one position later than they are. Raises ValueError for an empty
        prompt or completion.
        """
        if not prompt or not completion:
            raise ValueError("a prompt or a completion is empty")
        from transformers import DynamicCache

        torch = self._torch
        # The last token of the answer is judged, and nothing is judged behind it.
        tokens = [*prompt, *completion[:-1]]
        tail = max(0, len(prompt) - TAIL)
        ids = torch.tensor([tokens], device=self._device)
        chosen = torch.tensor(list(completion), dtype=torch.long, device=self._device)
        cache = DynamicCache()
        with torch.no_grad(), _full_float32(torch):
            for begin in range(0, tail, ROWS):
                self._rows(self._model.base_model, ids, begin, min(begin + ROWS, tail), cache)
            right = self._answer(ids, tail, len(prompt), cache, chosen)
            cache.crop(tail)
            wrong = self._answer(ids, tail, len(prompt), cache, chosen, shift=1)
        return right, wrong

    def _rows(
        self, model: Any, ids: torch.Tensor, begin: int, end: int, cache: Any, shift: int = 0
    ) -> Any:
        """The model's output for some rows; their keys and values are added to the cache."""
        places = self._torch.arange(begin + shift, end + shift, device=self._device)[None]
        return model(
            input_ids=ids[:, begin:end], position_ids=places, past_key_values=cache, use_cache=True
        )

    def _answer(
        self,
        ids: torch.Tensor,
        begin: int,
        prompt: int,
        cache: Any,
        chosen: torch.Tensor,
        shift: int = 0,
    ) -> list[float]:
        """Log-probabilities of the chosen tokens, which follow ``prompt`` tokens."""
        found: list[float] = []
        for first in range(begin, ids.shape[1], ROWS):
            end = min(first + ROWS, ids.shape[1])
            logits = self._rows(self._model, ids, first, end, cache, shift).logits[0]
            # The logits at a position are about the token after it.
            logits = logits[max(0, prompt - 1 - first) :]
            there = chosen[len(found) : len(found) + len(logits)]
            values = logits.double().log_softmax(-1).gather(1, there[:, None])
            found += values[:, 0].tolist()
        return found

"""The oracle: the same weights in float32 by transformers, and the measure of disagreement.

An engine computes in bfloat16 with its own kernels and reports the log-probability of each token
it generated. The oracle computes the log-probabilities of the same tokens in float32. Software
that works disagrees with it by rounding alone.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

# The largest mean exp(|difference of log-probabilities|) of software that works. Source: NVIDIA
# NeMo-RL, test_vllm_generation_with_hf_training in tests/unit/models/generation, which holds vLLM's
# greedy tokens against its trainer by these numbers in bf16 and in fp8. The measure itself is
# explained in the project's guide "Add New Models".
BOUND_BF16 = 1.043
BOUND_FP8 = 1.080


def divergence(engine: Sequence[float], oracle: Sequence[float]) -> float:
    """mean(exp(|engine - oracle|)) over tokens: 1 is perfect agreement; no upper limit.

    Both are natural log-probabilities of the same tokens. Infinite where either holds something
    that is not a finite number, so that a NaN fails a check. Raises ValueError for different or
    zero lengths.
    """
    if len(engine) != len(oracle) or not engine:
        raise ValueError(f"nothing to compare: {len(engine)} against {len(oracle)} tokens")
    apart = [abs(e - o) for e, o in zip(engine, oracle, strict=True)]
    # 700: exp of more is no float64
    if not all(math.isfinite(delta) and delta < 700.0 for delta in apart):
        return math.inf
    return math.fsum(math.exp(delta) for delta in apart) / len(apart)


class Oracle:
    """A model in float32 (weights, buffers and arithmetic), asked for log-probabilities.

    `config` is the content of config.json, `weights` its tensors by Hugging Face's names, of any
    floating type. 1 B parameters take 4 GB on `device`. Raises ValueError where the weights are
    not those of the config. Runs on transformers 4.51 and later.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str = "cpu"
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        make: Any = AutoModelForCausalLM.from_config  # some versions have types for it
        # "torch_dtype" is understood by every version as config key, but as an argument not by
        # all; the model is float32 from its first moment, so no buffer was ever rounded.
        content = {key: value for key, value in config.items() if key != "dtype"}
        content["torch_dtype"] = "float32"
        known = AutoConfig.for_model(**content)
        # eager: plain matrix products and a softmax, the same code on every device and version
        model = make(known, attn_implementation="eager")
        model.float().eval()
        missing, unexpected = model.load_state_dict(dict(weights), strict=False)
        tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
        if set(missing) - tied or unexpected:
            raise ValueError(f"weights and config differ: {[*missing, *unexpected]}")
        model.tie_weights()
        self._torch = torch
        self._device = torch.device(device)
        self._model = model.requires_grad_(False).to(self._device)

    def logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], scale: float = 1.0
    ) -> list[float]:
        """Natural log-probability of each token of `completion`, given all tokens before it.

        With `scale` those of the model whose lm_head is so many times this one's.
        """
        return self.scores([prompt], [completion], scale)[0][0]

    def margins(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """By how much the likeliest token leads the second, at each position of `completion`.

        A difference of natural log-probabilities, never negative. The likeliest token need not
        be the one in `completion`.
        """
        return self.scores([prompt], [completion])[0][1]

    def scores(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        scale: float = 1.0,
    ) -> list[tuple[list[float], list[float]]]:
        """(logprobs, margins) of each prompt with its completion, computed as one batch.

        Shorter sequences are filled up behind their end, where causal attention cannot see it.
        Raises ValueError for an empty prompt and for unequal numbers.
        """
        torch = self._torch
        pairs = list(zip(prompts, completions, strict=True))
        if not all(prompt for prompt, _ in pairs):
            raise ValueError("a prompt is empty: nothing precedes its first token")
        if not pairs:
            return []
        rows = [[*prompt, *completion] for prompt, completion in pairs]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self._device)
        found = []
        with torch.no_grad(), _full_float32(torch):
            logits = self._model(input_ids=ids, use_cache=False).logits
            for (prompt, completion), row in zip(pairs, logits, strict=True):
                begin = len(prompt) - 1  # the logits at a position are about the token after it
                logprobs = (row[begin : begin + len(completion)].double() * scale).log_softmax(-1)
                chosen = torch.tensor(list(completion), dtype=torch.long, device=self._device)
                top = logprobs.topk(2, dim=-1).values
                found.append(
                    (
                        logprobs.gather(1, chosen[:, None])[:, 0].tolist(),
                        (top[:, 0] - top[:, 1]).tolist(),
                    )
                )
        return found


class _full_float32:  # noqa: N801 - a context manager, used like a function
    """Switches TF32 off for its block: engines switch it on for the whole process."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __enter__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.9 has new names for this, older ones have not
            self._before = self._torch.get_float32_matmul_precision()
            self._torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._torch.set_float32_matmul_precision(self._before)

"""Runs inside ROLL: the worker of our rule, as ROLL has one for each kind of reward.

The class is made when ROLL asks for it: nothing of ROLL is imported where this module alone is.
"""

from __future__ import annotations

from typing import Any

from rollout.frameworks import tiny

NAME = "Letters"


def rule() -> Any:
    """The function of tiny.RULE: what part of an answer is made of the letters that are wanted."""
    found: dict[str, Any] = {}
    exec(tiny.RULE, found)  # noqa: S102 - a text of ours
    return found["compute_score"]


def worker() -> type:
    """The class: a worker of ROLL's that pays by the rule."""
    import torch
    from roll.distributed.executor.worker import Worker
    from roll.distributed.scheduler.decorator import Dispatch, register
    from roll.distributed.scheduler.protocol import DataProto
    from roll.models.model_providers import default_tokenizer_provider

    class Letters(Worker):  # type: ignore[misc]
        """Pays for letters."""

        def __init__(self, worker_config: Any) -> None:
            super().__init__(worker_config=worker_config)
            self.tokenizer = default_tokenizer_provider(model_args=worker_config.model_args)
            self.score = rule()

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
        def initialize(self, pipeline_config: Any) -> None:
            """Nothing is to be made ready."""

        @register(dispatch_mode=Dispatch.DP_MP_COMPUTE, clear_cache=False)  # type: ignore[untyped-decorator]
        def compute_rewards(self, data: Any) -> Any:
            """The rewards of some answers."""
            answers = self.tokenizer.batch_decode(data.batch["responses"], skip_special_tokens=True)
            pairs = zip(answers, data.non_tensor_batch["ground_truth"], strict=True)
            scores = torch.tensor([self.score(NAME, *pair) for pair in pairs])
            # Of each token nothing: GRPO takes the answers' own.
            tokens = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
            return DataProto.from_dict(
                tensors={
                    "token_level_rewards": tokens,
                    "response_level_rewards": scores.clone(),
                    "scores": scores,
                }
            )

    # Ray's workers find it by its name.
    Letters.__module__, Letters.__qualname__ = __name__, NAME
    return Letters


def __getattr__(name: str) -> type:
    if name != NAME:
        raise AttributeError(name)
    made = globals()[NAME] = worker()
    return made

"""Runs inside ROLL: the worker of our rule, as ROLL has one for each kind of reward."""

from __future__ import annotations

from typing import Any

import torch
from roll.distributed.executor.worker import Worker
from roll.distributed.scheduler.decorator import Dispatch, register
from roll.distributed.scheduler.protocol import DataProto
from roll.models.model_providers import default_tokenizer_provider

from rollout.frameworks import tiny


class Letters(Worker):  # type: ignore[misc]
    """Pays for what part of an answer is made of the letters that are wanted (tiny.RULE)."""

    def __init__(self, worker_config: Any) -> None:
        super().__init__(worker_config=worker_config)
        self.tokenizer = default_tokenizer_provider(model_args=worker_config.model_args)
        rule: dict[str, Any] = {}
        exec(tiny.RULE, rule)  # noqa: S102 - a text of ours
        self.rule = rule["compute_score"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def initialize(self, pipeline_config: Any) -> None:
        """Nothing is to be made ready."""

    @register(dispatch_mode=Dispatch.DP_MP_COMPUTE, clear_cache=False)  # type: ignore[untyped-decorator]
    def compute_rewards(self, data: Any) -> Any:
        """The rewards of some answers."""
        answers = self.tokenizer.batch_decode(data.batch["responses"], skip_special_tokens=True)
        wanted = data.non_tensor_batch["ground_truth"]
        pairs = zip(answers, wanted, strict=True)
        scores = torch.tensor([self.rule("rule", *pair) for pair in pairs], dtype=torch.float32)
        # Of each token nothing: GRPO takes the answers' own.
        tokens = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        return DataProto.from_dict(
            tensors={
                "token_level_rewards": tokens,
                "response_level_rewards": scores.clone(),
                "scores": scores,
            }
        )

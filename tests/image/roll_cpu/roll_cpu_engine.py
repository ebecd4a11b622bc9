"""A worker of ROLL's with transformers for an engine, where there is no GPU for vLLM."""

from __future__ import annotations

from typing import Any

import torch
from roll.distributed.executor.worker import Worker
from roll.pipeline.base_worker import InferWorker
from roll.utils.cuda_ipc_utils import MultiprocessingSerializer
from roll.utils.send_recv_utils import named_tensors_from_bucket
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class Strategy:
    """What ROLL asks of its strategy for vLLM; it starts on random weights, as that does."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).eval()

    async def load_states(self, *_: Any, **__: Any) -> None: ...

    async def offload_states(self, *_: Any, **__: Any) -> None: ...

    async def process_weights_after_loading(self) -> None: ...

    async def abort_requests(self, _: Any) -> None: ...

    def get_metrics(self, **_: Any) -> dict[str, float]:
        return {}

    async def update_parameter_in_bucket(self, tensors: list[bytes], **_: Any) -> None:
        """Some weights of a refit."""
        bucket = MultiprocessingSerializer.deserialize(tensors[0])
        have = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors_from_bucket(**bucket):
                have[name].copy_(tensor)

    @torch.no_grad()
    def _sampled(self, prompt: list[int], given: dict[str, Any]) -> list[list[tuple[int, float]]]:
        answers: list[list[tuple[int, float]]] = [[] for _ in range(given["n"])]
        ids = torch.tensor([prompt] * given["n"])
        ended = [False] * given["n"]
        for _ in range(given["max_tokens"]):
            logs = self.model(ids).logits[:, -1].float().log_softmax(-1)
            tokens = torch.multinomial(logs.exp(), 1)
            for row, answer in enumerate(answers):
                if not ended[row]:
                    token = int(tokens[row])
                    answer.append((token, float(logs[row, token])))
                    ended[row] = token in given["stop_token_ids"]
            ids = torch.cat([ids, tokens], 1)
        return answers

    async def generate_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answers to one prompt, with the log-probability of each token."""
        answers = self._sampled(payload["input_ids"], payload["sampling_params"])
        return {
            "output_token_ids": [[token for token, _ in answer] for answer in answers],
            "output_logprobs": [[log for _, log in answer] for answer in answers],
            "finish_reasons": ["stop"] * len(answers),
        }


class Engine(InferWorker):  # type: ignore[misc]
    """ROLL's worker but for its engine."""

    async def initialize(self, pipeline_config: Any) -> None:
        Worker.initialize(self, pipeline_config)
        self.strategy = Strategy(self.worker_config.model_args.model_name_or_path)
        self.tokenizer = self.strategy.tokenizer

    # How ROLL sends the call to its workers stands at the method.
    initialize.__dict__.update(InferWorker.initialize.__dict__)

"""vLLM under pressure: hundreds of sampled requests, driven step by step (see :class:`Crowd`).

An abort is ``LLMEngine.abort_request``, as every trainer's reaches it in the end; what is kept goes
on as a new request. vLLM tells of a request's tokens as they come (``DELTA``). What it holds stands
in its metrics, which it renews with each step: one request of one token renews them when it is
idle.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rollout.backends import Completion, EngineError, crowd, vllm
from rollout.backends.crowd import Asked, Said, Usage
from rollout.problem import Problem

REQUESTS = 512
SLOTS = 128
ANSWERS = (16, 160)
# Of its metrics: requests that run, those that wait, and the share of the KV cache that is in use.
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
IN_USE = "vllm:kv_cache_usage_perc"
LEAKING = "rollout.backends.pressure_vllm_scheduler.Scheduler"
RENEWS = "renews-the-metrics"  # the name of the request that does


def arguments(model: Path, total: int, *, dummy: bool, fault: str) -> dict[str, Any]:
    """What vLLM is started with on a device of ``total`` bytes."""
    options = vllm.arguments(model, total, dummy=dummy, fp8=False) | {
        "max_num_seqs": SLOTS,
        "disable_log_stats": False,  # they tell what is in use
        "worker_extension_cls": "rollout.backends.pressure_vllm_extension.Extension",
    }
    if fault:
        # One that works ahead is another scheduler.
        options |= {"scheduler_cls": LEAKING, "async_scheduling": False}
    return options


def sampled(tokens: int) -> dict[str, Any]:
    """Sampling parameters of so many tokens at temperature 1, as trainers sample."""
    return vllm.greedy(tokens) | {"temperature": 1.0}


class Engine(vllm.Engine):
    """The trainer's side (see :class:`rollout.backends.crowd.Crowd`)."""

    def __init__(self) -> None:
        super().__init__()
        self.crowd, self.slots, self.answers = REQUESTS, SLOTS, ANSWERS
        self._blocks = 0

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM for many requests in bfloat16 on one GPU")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = arguments(model, total, dummy=dummy, fault=self._fault)
        try:
            self._llm = LLM(**vllm.known(options))
        except Exception as error:
            raise EngineError(f"vLLM did not start for many requests: {error}") from error
        self._follow()
        self._blocks = int(self._rpc("smoke_blocks"))

    def inject(self, fault: str) -> None:
        """Make a fault at the next start."""
        if fault != crowd.LEAKED:
            raise Problem(f"--inject: {fault} is not made in vLLM", 2)
        self._fault = fault

    def submit(self, asked: Sequence[Asked]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def run() -> None:
            for one in asked:
                wanted = sampled(one.tokens) | {"output_kind": RequestOutputKind.DELTA}
                prompt = {"prompt_token_ids": list(one.prompt)}
                self._llm.llm_engine.add_request(one.name, prompt, SamplingParams(**wanted))

        self._call(run)

    def listen(self) -> list[Said]:
        def run() -> list[Said]:
            engine = self._llm.llm_engine
            while engine.has_unfinished_requests():
                found = [said(output) for output in engine.step()]
                if found:
                    return found
            return []

        found: list[Said] = self._result(self._submit(run), crowd.PATIENCE)
        return found

    def abort(self, names: Sequence[str]) -> list[Said]:
        self._call(lambda: self._llm.llm_engine.abort_request(list(names)))
        return []  # what it had sent and nobody has read yet, it throws away

    def usage(self) -> Usage:
        def run() -> dict[str, float]:
            from vllm import SamplingParams

            engine = self._llm.llm_engine
            prompt = {"prompt_token_ids": [1]}
            engine.add_request(RENEWS, prompt, SamplingParams(**sampled(1)))
            while not any(o.request_id == RENEWS and o.finished for o in engine.step()):
                pass
            return metered(self._llm.get_metrics())

        found = self._result(self._submit(run), crowd.PATIENCE)
        children = multiprocessing.active_children()
        processes = {os.getpid(), *(child.pid for child in children if child.pid)}
        return Usage(
            requests=int(found[RUNNING] + found[WAITING]),
            blocks=round(found[IN_USE] * self._blocks),
            memory=self.memory(),
            files=crowd.files(processes),
            shared=crowd.shared(processes),
        )

    def plain(self, asked: Sequence[Asked]) -> list[Completion]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(one.prompt)} for one in asked]
        wanted = [SamplingParams(**sampled(one.tokens)) for one in asked]
        outputs = self._call(lambda: self._llm.generate(prompts, wanted, use_tqdm=False))
        return [vllm.completion(output) for output in outputs]


def said(output: Any) -> Said:
    """What one of vLLM's outputs says that is new."""
    new = vllm.completion(output)
    return Said(output.request_id, new.tokens, new.logprobs, bool(output.finished))


def metered(metrics: Iterable[Any]) -> dict[str, float]:
    """The latest of what vLLM's metrics say that it holds."""
    found = {m.name: float(m.value) for m in metrics if m.name in (RUNNING, WAITING, IN_USE)}
    for name in (RUNNING, WAITING, IN_USE):
        if name not in found:
            raise EngineError(f"vLLM's metrics have no {name!r}")
    return found

"""vLLM for long sequences: prompts in chunks, and a KV cache that holds little more than one.

Beside that it is started as for every other check. Its compiled graphs are of another length, so
where no cache of them is kept it compiles them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollout.backends import EngineError, vllm
from rollout.problem import Problem

LONGEST = 16384  # tokens of prompt and completion
CHUNK = 2048  # tokens of a step
CACHE_TOKENS = LONGEST + LONGEST // 4
BLOCK = 16  # tokens, where a version takes its cache's size in blocks alone
PREEMPTIONS = "vllm:num_preemptions"  # of its metrics
# Each is made where vLLM lets it be made: in its table of rotations, or in what it is told of the
# model. What it gives a preempted request is decided deep in its scheduler.
ROTARY = ("frozen-rotary", "shifted-chunk")
WINDOW = "halved-window"


def token_bytes(config: dict[str, Any]) -> int:
    """Bytes of the keys and values of one token in bfloat16, of all layers."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return int(4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head)


def arguments(model: Path, total: int, *, dummy: bool, longest: int, fault: str) -> dict[str, Any]:
    """What vLLM is started with on a device of ``total`` bytes."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    options = vllm.arguments(model, total, dummy=dummy, fp8=False) | {
        "max_model_len": longest,
        "max_num_batched_tokens": CHUNK,
        "kv_cache_memory_bytes": CACHE_TOKENS * token_bytes(config),
        "disable_log_stats": False,  # they count preemptions
        "worker_extension_cls": "rollout.backends.long_vllm_extension.Extension",
    }
    if fault == WINDOW:
        layers = ["sliding_attention"] * config["num_hidden_layers"]
        options["hf_overrides"] = {"layer_types": layers, "sliding_window": longest // 2}
    return options


class Engine(vllm.Engine):
    """The trainer's side (see :class:`rollout.backends.Lengthy`)."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.chunk, self.requests = LONGEST, CHUNK, vllm.REQUESTS

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM for long sequences in bfloat16 on one GPU")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = arguments(model, total, dummy=dummy, longest=self.longest, fault=self._fault)
        given = vllm.known(options)
        if "kv_cache_memory_bytes" not in given:
            given["num_gpu_blocks_override"] = CACHE_TOKENS // BLOCK
        try:
            self._llm = LLM(**given)
        except Exception as error:
            raise EngineError(f"vLLM did not start for long sequences: {error}") from error
        self._follow()
        if self._fault in ROTARY:
            place = self.longest // 4 if self._fault == "frozen-rotary" else self.chunk
            self._rpc("smoke_spoil_rotary", self._fault, place)

    def inject(self, fault: str) -> None:
        """Make a fault at the next start."""
        if fault not in (*ROTARY, WINDOW):
            raise Problem(f"--inject: {fault} is not made in vLLM; its scheduler is its own", 2)
        self._fault = fault

    def capacity(self) -> int:
        return int(self._rpc("smoke_capacity"))

    def preemptions(self) -> int:
        return self._call(lambda: counted(self._llm.get_metrics()))  # type: ignore[no-any-return]


def counted(metrics: Iterable[Any]) -> int:
    """How many preemptions vLLM's metrics count."""
    found = [int(metric.value) for metric in metrics if metric.name == PREEMPTIONS]
    if not found:
        raise EngineError(f"vLLM's metrics have no {PREEMPTIONS!r}")
    return sum(found)

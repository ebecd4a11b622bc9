"""vLLM with a KV cache in 8 bits, started on a checkpoint that is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.backends import EngineError, vllm
from rollout.backends.scales import Scales

EXTENSION = "rollout.backends.fp8_kv_vllm_extension.Extension"
TYPE = "fp8_e4m3"
CALCULATING = "calculate_kv_scales"


def arguments(model: Path, total: int, *, dummy: bool, calculate: bool) -> dict[str, Any]:
    """What vLLM is started with on a device of ``total`` bytes."""
    options = vllm.arguments(model, total, dummy=dummy, fp8=False) | {
        "kv_cache_dtype": TYPE,
        "worker_extension_cls": EXTENSION,
    }
    return options | ({CALCULATING: True} if calculate else {})


class Engine(vllm.Engine):
    """The trainer's side (see :class:`rollout.backends.scales.Scaled`)."""

    def __init__(self) -> None:
        super().__init__()
        self._calculate = False

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM with a KV cache in fp8 on one GPU only")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = arguments(model, total, dummy=dummy, calculate=self._calculate)
        try:
            self._llm = LLM(**vllm.known(options))
        except Exception as error:
            raise EngineError(f"vLLM did not start with a KV cache in fp8: {error}") from error
        self._follow()

    def calculates(self) -> bool:
        from vllm.engine.arg_utils import EngineArgs

        return CALCULATING in {field.name for field in dataclasses.fields(EngineArgs)}

    def calculate(self) -> None:
        self._calculate = True

    def scales(self) -> Scales:
        found: Scales = self._rpc("smoke_scales")
        return found

    def put(self, scales: Mapping[str, Mapping[str, float]]) -> None:
        self._rpc("smoke_put_scales", {name: dict(given) for name, given in scales.items()})

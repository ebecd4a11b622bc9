"""vLLM with a mixture of experts: started as for a dense model, with another worker extension."""

from __future__ import annotations

import os
from pathlib import Path

from rollout.backends import EngineError, vllm

EXTENSION = "rollout.backends.moe_vllm_extension.Extension"


class Engine(vllm.Engine):
    """The trainer's side of vLLM (see :class:`rollout.backends.Engine`)."""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM with experts in bfloat16 on one GPU only")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = vllm.arguments(model, total, dummy=dummy, fp8=False)
        options["worker_extension_cls"] = EXTENSION
        try:
            self._llm = LLM(**vllm.known(options))
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self._follow()

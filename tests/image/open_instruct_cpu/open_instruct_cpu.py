"""What is another than on a GPU where open-instruct runs on a CPU, with a vLLM for the CPU.

``python3 -m open_instruct_cpu FOLDER`` stands for the driver. Ray is given GPUs that are none, the
weights go by gloo, and what open-instruct asks of ``torch.cuda`` has no answer or none that counts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from open_instruct import grpo_fast, utils, vllm_utils, vllm_utils_workerwrap
from transformers import AutoModelForCausalLM

from rollout.frameworks import training_open_instruct as framework
from rollout.frameworks import training_open_instruct_actors as actors
from rollout.frameworks import training_open_instruct_driver as driver
from rollout.frameworks import training_open_instruct_settings as settings


class Nothing:
    """torch.cuda where there is none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def is_available(self) -> bool:
        return False


class OnCpu:
    """torch as open-instruct's trainer uses it: its GPU is the CPU."""

    cuda = Nothing()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> Any:
        return torch.device("cpu")


class Models:
    """transformers' way to a model, which would be put onto a GPU."""

    @staticmethod
    def from_pretrained(name: str, **named: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, **named | {"device_map": None})


class Trainer(actors.Trainer):  # type: ignore[misc]
    """open-instruct's trainer with DeepSpeed on a CPU."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        begin = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda **told: begin(**told | {"backend": "gloo"})
        grpo_fast.torch, grpo_fast.AutoModelForCausalLM = OnCpu(), Models
        super().__init__(*arguments, **named)


class Worker(vllm_utils_workerwrap.WorkerWrap):  # type: ignore[misc]
    """open-instruct's part of vLLM's worker, which takes a tensor on a GPU."""

    def update_weight(self, *arguments: Any, **named: Any) -> None:
        empty = torch.empty
        torch.empty = lambda shape, **named: empty(shape, dtype=named["dtype"])
        try:
            super().update_weight(*arguments, **named)
        finally:
            torch.empty = empty


class Engine(vllm_utils.LLMRayActor):  # type: ignore[misc]
    """open-instruct's actor with a vLLM for the CPU."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named | {"worker_extension_cls": "open_instruct_cpu.Worker"})

    def get_kv_cache_info(self) -> int:
        return 256  # it asks for the memory of a GPU


def prepare() -> None:
    """Have the adapter start this driver."""
    made = settings.configuration

    def configuration(*arguments: Any, **named: Any) -> dict[str, Any]:
        found = made(*arguments, **named)
        found["vllm"]["vllm_sync_backend"] = "gloo"
        return found

    settings.configuration = configuration
    framework.gpus = lambda: 2
    framework.DRIVER = "open_instruct_cpu"


def main(folder: Path) -> None:
    """The driver's run."""
    driver.trainer = lambda: Trainer
    vllm_utils.LLMRayActor = Engine
    utils.calculate_utilization_metrics = lambda **_: {}  # of a GPU
    driver.main(folder)


if __name__ == "__main__":
    import open_instruct_cpu

    open_instruct_cpu.main(Path(sys.argv[1]))

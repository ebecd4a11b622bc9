"""open-instruct: ``grpo_fast`` of a checkout, and what it says of each step.

Its own trainer (DeepSpeed), its ``LLMRayActor`` with vLLM, its queues, its maker of batches with
the advantages, its loss, and its way of sending weights from the one to the other. The class is
apart from the one in open_instruct.py, which knows what ``rollout verify`` imports: this is for the
check ``training`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.frameworks import Tampering, tiny
from rollout.frameworks import training_open_instruct_settings as settings
from rollout.frameworks.training_checkout import Source, Trained, alone, visible

DRIVER = "rollout.frameworks.training_open_instruct_driver"
MODULES = ("grpo_fast.py", "vllm_utils.py", "vllm_utils_workerwrap.py", "data_loader.py")
MOST = 2  # GPUs: one for the trainer, one for the engine


def gpus() -> int:
    """How many GPUs a run has here: two where there are two, or the one that both share."""
    import torch

    return min(MOST, max(1, int(torch.cuda.device_count())))


class Framework(Trained):
    """open-instruct's GRPO (see :class:`rollout.frameworks.Framework`)."""

    name = "open-instruct"
    source = Source("open-instruct", "open_instruct", MODULES)

    def driver(self) -> str:
        return DRIVER

    def environment(
        self, environ: Mapping[str, str], folder: Path, tampering: Tampering | None
    ) -> dict[str, str]:
        theirs = ("BEAKER_", "GS_", "CODE_API_URL", "OPENAI_", "HOSTED_VLLM_")
        return alone(environ, folder, self._checkout, tampering, theirs) | {
            "CUDA_VISIBLE_DEVICES": visible(environ, gpus()),
            # Its actor asks its own engine over HTTP, which a proxy of the job's would get.
            "NO_PROXY": "*",
            "no_proxy": "*",
            # Processes that make the data ready: otherwise one for each CPU, to 200 prompts.
            "BEAKER_ASSIGNED_CPU_COUNT": "1",
        }

    def configuration(self, folder: Path, steps: int, gpu_bytes: int) -> dict[str, Any]:
        return settings.configuration(folder, steps=steps, gpu_bytes=gpu_bytes, gpus=gpus())

    def made(self, folder: Path, steps: int) -> None:
        made(folder, steps)


def made(folder: Path, steps: int) -> None:
    """Model and data of a run, in a folder."""
    tiny.write_model(folder / "model")
    for name, content in settings.padded().items():
        (folder / "model" / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in settings.rows(steps))
    (folder / "train.jsonl").write_text(text, encoding="utf-8")

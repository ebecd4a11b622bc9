"""ROLL: its own RLVR pipeline from a checkout, and what it says of each step.

Ray, ROLL's schedulers and workers, its strategies ``fsdp2_train`` and ``vllm`` on one GPU, its own
update of the model between them. The class is apart from the one in roll.py, which knows what
``rollout verify`` imports: this is for the check ``training`` alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.frameworks import Tampering, tiny
from rollout.frameworks import training_roll_settings as settings
from rollout.frameworks.training_checkout import Source, Trained, alone, visible
from rollout.frameworks.verl_settings import BATCH
from rollout.problem import Problem

DRIVER = "rollout.frameworks.training_roll_driver"
MODULES = ("pipeline/rlvr/rlvr_pipeline.py", "third_party/fsdp2/model_update.py")
# Of the trainer's allocator: what its refit by CUDA IPC needs where a process may not take a file
# descriptor of another.
PLAIN = "expandable_segments:False"
ALLOCATOR = settings.ALLOCATOR
_TAKE = """
import ctypes, os, sys
number = 438  # pidfd_getfd, which Python has no name for
sys.exit(ctypes.CDLL(None).syscall(number, os.pidfd_open(int(sys.argv[1])), 0, 0) < 0)
"""


def takes_descriptors() -> bool:
    """Whether a process may take a file descriptor of another one that is not its child.

    Torch does so for memory of ``expandable_segments:True``, which ROLL sets for its trainer, when
    it is opened in the engine. Containers often forbid it.
    """
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as other:
        # A sibling asks, as trainer and engine are siblings.
        asked = subprocess.run(
            [sys.executable, "-c", _TAKE, str(other.pid)], capture_output=True, check=False
        )
        other.kill()
    return asked.returncode == 0


def chosen(environ: Mapping[str, str]) -> str | None:
    """The settings of the trainer's allocator: the job's, where it has any; None for ROLL's own."""
    given = environ.get(ALLOCATOR)
    if given is not None or takes_descriptors():
        return given
    why = "no process may take a file descriptor of another one here (CAP_SYS_PTRACE)"
    print(f"rollout: ROLL's trainer gets {ALLOCATOR}={PLAIN}: {why}", file=sys.stderr, flush=True)
    return PLAIN


class Framework(Trained):
    """ROLL's RLVR pipeline with GRPO (see :class:`rollout.frameworks.Framework`)."""

    name = "roll"
    source = Source("ROLL", "roll", MODULES)

    def driver(self) -> str:
        return DRIVER

    def modules(self) -> list[str]:
        return [*super().modules(), "roll.distributed.strategy.fsdp2_strategy"]

    def environment(
        self, environ: Mapping[str, str], folder: Path, tampering: Tampering | None
    ) -> dict[str, str]:
        # ROLL reads all of them; the last two are its own names of a process.
        theirs = ("ROLL_", "roll_", "OTEL_", "WORKER_NAME", "CLUSTER_NAME")
        return alone(environ, folder, self._checkout, tampering, theirs) | {
            "CUDA_VISIBLE_DEVICES": visible(environ),
            "ROLL_LOG_DIR": f"{folder}/logs",
        }

    def refuse(self, environ: Mapping[str, str]) -> None:
        gpu = visible(environ)
        if gpu and not gpu.isdigit():  # as ROLL's own resource manager has it
            raise Problem(f"ROLL counts GPUs; name one by its number, not as {gpu!r}", 3)

    def configuration(self, folder: Path, steps: int, gpu_bytes: int) -> dict[str, Any]:
        return settings.configuration(
            folder,
            steps=steps,
            gpu_bytes=gpu_bytes,
            visible=visible(os.environ),
            allocator=chosen(os.environ),
        )

    def made(self, folder: Path, steps: int) -> None:
        made(folder, steps)


def made(folder: Path, steps: int) -> None:
    """Model and data of a run, in a folder."""
    tiny.write_model(folder / "model")
    rows = [
        {
            "id": str(number),
            "messages": json.dumps([{"role": "user", "content": prompt}]),
            "tag": settings.DOMAIN,
            "domain": settings.DOMAIN,
            "prompt": prompt,
            "ground_truth": tiny.WANTED,
        }
        # ROLL asks for more than one step needs, and begins anew at the end.
        for number, prompt in enumerate(tiny.prompts(BATCH * (steps + 2)))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")

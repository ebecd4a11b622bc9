"""``python3 -m rollout.frameworks.training_roll_driver FOLDER``: ROLL's own pipeline, one run.

What ``examples/start_rlvr_pipeline.py`` of ROLL does, with two things beside it: Ray is started on
this machine alone, and a line is written for each step. The folder holds ``config.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rollout.frameworks import training_roll_hook as hook
from rollout.frameworks import training_roll_settings as settings
from rollout.frameworks.training_checkout import CONFIG, HERE, STEPS
from rollout.frameworks.verl_settings import ACTORS


def divergence(batch: Any) -> float:
    """Mean |p(trainer) - p(engine)| of the tokens that the engine sampled.

    The log-probabilities are ROLL's own: ``old_log_probs`` of its trainer before it learns from
    this batch, ``infer_logprobs`` of the engine as it sampled.
    """
    mask = batch["response_mask"][:, 1:].bool()
    gap = (batch["old_log_probs"].exp() - batch["infer_logprobs"].exp()).abs()
    return float(gap[mask].double().mean())


class Steps:
    """Writes a line for each step that ROLL has made; it is a tracker of ROLL's as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = time.monotonic()
        self.seen: dict[str, float] = {}

    def batch(self, data: Any) -> None:
        """What a step is about to be made from."""
        batch = data.batch
        self.seen = {
            "reward": float(batch["scores"].double().mean()),
            "divergence": divergence(batch),
            "answers": len(batch["scores"]),
        }

    def log(self, values: Any, step: int, **_: Any) -> None:
        """A step has ended, and these are the numbers that ROLL has of it."""
        now = time.monotonic()
        line = {"number": step + 1, "seconds": now - self.begun, **self.seen}
        self.begun, self.seen = now, {}
        print(f"rollout: {json.dumps(line)}, of {len(values)} numbers of ROLL's", flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> None:
        """ROLL asks its trackers for it."""


def watch(cluster: Any, steps: Steps) -> None:
    """Look at each batch that ROLL trains on."""
    train = cluster.train_step

    def watched(data: Any, *arguments: Any, **named: Any) -> Any:
        steps.batch(data)
        return train(data, *arguments, **named)

    cluster.train_step = watched


def start_ray(environ: dict[str, str], gpus: int) -> None:
    """Ray as ROLL has it, on this machine alone: ROLL's own way takes a fixed port."""
    import ray
    from roll.utils.constants import RAY_NAMESPACE

    ray.init(
        address="local",
        namespace=RAY_NAMESPACE,
        num_cpus=ACTORS,
        num_gpus=gpus,
        include_dashboard=False,
        _node_ip_address=HERE,
        runtime_env={"env_vars": environ, "worker_process_setup_hook": hook.SETUP},
    )


def main(folder: Path) -> None:
    """Make the run that the folder describes."""
    hook.address()
    from dacite import from_dict
    from roll.pipeline.rlvr.rlvr_config import RLVRConfig
    from roll.pipeline.rlvr.rlvr_pipeline import RLVRPipeline
    from roll.platforms import current_platform
    from roll.utils.tracking import tracker_registry

    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    steps = Steps(folder / STEPS)
    tracker_registry[settings.TRACKER] = lambda *_, **__: steps
    config = from_dict(data_class=RLVRConfig, data=data)
    start_ray(current_platform.get_custom_env_vars(), current_platform.device_count())
    pipeline = RLVRPipeline(pipeline_config=config)
    watch(pipeline.actor_train, steps)
    steps.begun = time.monotonic()
    pipeline.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

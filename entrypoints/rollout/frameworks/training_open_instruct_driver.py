"""``python3 -m rollout.frameworks.training_open_instruct_driver FOLDER``: ``grpo_fast``, one run.

What ``open_instruct/grpo_fast.py`` does where it is started, with a few things beside it: Ray is
started on this machine alone, each step waits for the weights of the one before it, and a line is
written for each. The folder holds ``config.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

from rollout.frameworks import training_open_instruct_actors as actors
from rollout.frameworks.training_checkout import CONFIG, HERE, STEPS

# Of a GPU that open-instruct does not know: it counts with them how well one is used, which is no
# part of this proof, and ends where it finds none. An H200 is such a one.
UNKNOWN_GPU = {"flops": 1e15, "memory_size": 141e9, "memory_bandwidth": 4.8e12}
REWARD, NUMBER, SECONDS = "scores", "training_step", "time/total"


def log(path: Path, values: dict[str, Any]) -> None:
    """A step has ended, and these are the numbers that open-instruct has of it."""
    line = {
        "number": int(values[NUMBER]),
        "seconds": values[SECONDS],
        "reward": values[REWARD],
        "divergence": values[actors.DIVERGENCE],
    }
    print(f"rollout: {json.dumps(line)}, of {len(values)} numbers of open-instruct's", flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Told:
    """open-instruct's queue of what it measured of a refit; that one has ended, it tells as well.

    As a queue it may be full, for open-instruct looks into it once a step.
    """

    def __init__(self, metrics: Any, sent: Queue[BaseException | None]) -> None:
        self._metrics, self._sent = metrics, sent

    def put_nowait(self, found: Any) -> None:
        """The weights have been sent."""
        try:
            self._metrics.put_nowait(found)
        finally:
            self._sent.put(None)


def in_turn(module: Any) -> None:
    """Have each step wait until its weights have been sent, the first one as well.

    open-instruct starts a step and a refit at once. At the start it sends weights where it goes on
    with a checkpoint; the engine has read the same ones from the model's folder.
    """
    sync: Callable[..., None] = module.weight_sync_thread
    train: Callable[..., int] = module.one_training_step
    sent: Queue[BaseException | None] = Queue()

    def syncing(
        args: Any, stop: Any, trigger: Any, group: Any, manager: Any, metrics: Any, begin: int = 1
    ) -> None:
        try:
            sync(args, stop, trigger, group, manager, Told(metrics, sent), max(begin, 2))
        except BaseException as error:
            sent.put(error)
            raise

    def training(*arguments: Any, **named: Any) -> int:
        error = sent.get()
        if error is not None:
            raise RuntimeError(f"open-instruct's refit failed: {error}") from error
        return train(*arguments, **named)

    module.weight_sync_thread, module.one_training_step = syncing, training


def alone(init: Callable[..., Any], given: dict[str, Any]) -> Callable[..., Any]:
    """``ray.init`` as open-instruct calls it, on this machine alone."""

    def started(runtime_env: Any = None, **_: Any) -> Any:
        return init(
            address="local",
            include_dashboard=False,
            _node_ip_address=HERE,
            runtime_env=runtime_env,
            **given,
        )

    return started


def known(utils: Any, name: str) -> None:
    """Let open-instruct know the GPU of this run."""
    try:
        utils.get_device_name(name)
    except ValueError:
        utils.GPU_SPECS[name.lower().replace("-", " ")] = UNKNOWN_GPU


def trainer() -> type:
    """The class of the trainer."""
    made: type = actors.Trainer
    return made


def main(folder: Path) -> None:
    """Make the run that the folder describes."""
    import ray
    import torch
    from open_instruct import data_loader, grpo_fast, grpo_utils, utils
    from open_instruct.dataset_transformation import TokenizerConfig
    from open_instruct.model_utils import ModelConfig
    from open_instruct.tools.utils import ToolsConfig

    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    streaming = data_loader.StreamingDataLoaderConfig(**data["streaming"])
    vllm = data_loader.VLLMConfig(**data["vllm"])
    # Where it is started as a program these are globals of the module, and its functions use them.
    grpo_fast.streaming_config, grpo_fast.vllm_config = streaming, vllm
    grpo_fast.PolicyTrainerRayProcess = ray.remote(num_gpus=1)(trainer())
    grpo_fast.DataPreparationActor = ray.remote(actors.Prompts)
    grpo_fast.print_rich_single_line_metrics = lambda values: log(folder / STEPS, values)
    in_turn(grpo_fast)
    ray.init = alone(ray.init, data["ray"])
    if torch.cuda.is_available():
        known(utils, torch.cuda.get_device_name(0))
    print(f"rollout: {actors.Letters} pays", flush=True)  # made here, it is among the verifiers
    grpo_fast.main(
        grpo_utils.ExperimentConfig(**data["experiment"]),
        TokenizerConfig(**data["tokenizer"]),
        ModelConfig(**data["model"]),
        streaming,
        vllm,
        ToolsConfig(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What is another than on a GPU where ROLL runs on a CPU: its platform is told that it has a GPU.

``python3 -m roll_cpu FOLDER`` stands for the driver. The engine is that of roll_cpu_engine.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rollout.frameworks import training_roll as roll
from rollout.frameworks import training_roll_driver as driver
from rollout.frameworks import training_roll_hook as hook
from rollout.frameworks import training_roll_settings as settings

# What ROLL asks of torch.cuda and torch.cpu has not.
ASKED = (
    *("reset_max_memory_allocated", "reset_max_memory_cached", "reset_peak_memory_stats"),
    *("empty_cache", "init", "memory_allocated", "memory_reserved", "device_memory_used"),
    *("max_memory_allocated", "max_memory_reserved"),
)


def platform() -> None:
    """Ray is given a GPU that is none, and tensors go to another process as files."""
    import roll.utils.send_recv_utils as transport
    import torch
    from roll.platforms import current_platform

    cls: Any = type(current_platform)
    cls.ray_device_key = "GPU"
    cls.device_control_env_var = "CUDA_VISIBLE_DEVICES"
    cls.ray_experimental_noset = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    for name in ASKED:
        setattr(cls, name, staticmethod(lambda *_: 0))
    torch.multiprocessing.set_sharing_strategy("file_system")
    transport.monkey_patch_torch_reductions = lambda: None  # it names the GPU of a tensor


def setup() -> None:
    """What is done in each process that Ray starts."""
    hook.setup()
    platform()


def prepare() -> None:
    """Have the adapter start this driver, with this engine."""
    made = settings.configuration

    def configuration(*arguments: Any, **named: Any) -> dict[str, Any]:
        found = made(*arguments, **named)
        found["actor_infer"]["worker_cls"] = "roll_cpu_engine.Engine"
        return found

    settings.configuration = configuration
    roll.DRIVER = "roll_cpu"


if __name__ == "__main__":
    hook.SETUP = "roll_cpu.setup"
    hook.address()
    platform()
    driver.main(Path(sys.argv[1]))

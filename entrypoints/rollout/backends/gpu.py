"""The GPU of the trainer's side, as every backend on one looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollout.problem import Problem

if TYPE_CHECKING:
    import torch


def first() -> tuple[str, torch.device]:
    """The name of the GPU that torch works on, and its device.

    Raises:
        Problem: exit code 3 where CUDA does not start.
    """
    import torch

    try:
        return torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    except (AssertionError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise Problem(
            f"CUDA does not start here ({why}); see 'nvidia-smi' on the host", 3
        ) from None


def collect() -> None:
    """Give back to the GPU what this process holds there and does not use."""
    import torch

    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def used(device: torch.device) -> int:
    """Bytes in use on a GPU by all processes, less what this one holds and does not use."""
    import torch

    collect()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)

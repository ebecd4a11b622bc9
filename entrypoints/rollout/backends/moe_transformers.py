"""The reference engine with a mixture of experts: transformers 5 fuses them, and a refit does not.

A trainer sends the tensors of each expert by its Hugging Face name. Here each is written to its
place in the fused parameter, as vLLM and SGLang do it; transformers' own loader converts whole
checkpoints alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from rollout import experts, faults, moe_faults
from rollout.backends import WEIGHTS, EngineError, transformers
from rollout.transport import as_bytes, receive

if TYPE_CHECKING:
    import torch


class Engine(transformers.Engine):
    """The trainer's side (see :class:`rollout.backends.Engine`)."""

    inside = faults.OF_EXPERTS  # the faults that it can make itself

    @property
    def serve(self) -> Callable[..., None]:
        return _serve


class Worker(transformers.Worker):
    """The engine's own process, with the names of experts."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of all parameters by their Hugging Face names."""
        return experts.taken_apart(self.model.named_parameters())

    def refit(self, connection: Connection) -> None:
        import torch

        if WEIGHTS in self.asleep:
            raise EngineError("asleep: wake the weights before a refit")
        fault = next(iter(self.faults), "")
        places = self.tensors()
        with torch.no_grad():
            for name, tensor in receive(connection):
                if name not in places:
                    raise EngineError(f"unknown tensor {name!r}")
                if places[name].shape != tensor.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(places[name].shape)}"
                    raise EngineError(f"tensor {name!r} has shape {shapes}")
                arriving = moe_faults.arrives_as(name, fault)
                if arriving:
                    places[arriving].copy_(tensor)
                del tensor  # a view of the bucket, which is unmapped at the end

    def digests(self) -> dict[str, str]:
        return {
            name: hashlib.sha256(memoryview(as_bytes(tensor).numpy())).hexdigest()
            for name, tensor in self.tensors().items()
        }

    def inject(self, fault: str) -> None:
        super().inject(fault)
        if fault == moe_faults.UNNORMALISED:
            for module in self.model.modules():
                if hasattr(module, "norm_topk_prob"):
                    module.norm_topk_prob = False


def _serve(connection: Connection, model: str, dummy: bool, parent: int) -> None:
    # A process of its own, where nothing else is served: its worker is ours.
    transformers.Worker = Worker  # type: ignore[misc]
    transformers._serve(connection, model, dummy, parent)

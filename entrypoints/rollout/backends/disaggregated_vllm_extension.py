"""What a trainer elsewhere adds to vLLM's worker (``worker_extension_cls``).

A refit has the steps of the colocated one: ``load_weights`` for each bucket, and once, at its end,
``process_weights_after_loading``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rollout.backends import vllm_extension
from rollout.disaggregated import LOST_BROADCAST, STALE_RANK

if TYPE_CHECKING:
    import torch


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    rank: int  # among the workers of the engine

    def smoke_spoil(self, fault: str) -> None:
        """A fault of this check, made in the worker."""
        self.__dict__["smoke_fault"] = fault

    def smoke_join(self, host: str, port: int, size: int) -> None:
        """Join a group with a trainer, which is its first member."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        store = StatelessProcessGroup.create(host, port, 1 + self.rank, size)
        self.__dict__["smoke_group"] = PyNcclCommunicator(store, device=self.device)

    def smoke_leave(self) -> None:
        """Leave what :meth:`smoke_join` joined."""
        from rollout.backends.disaggregated_vllm import leave

        leave(self.__dict__.pop("smoke_group"))

    def smoke_broadcast(self, tensors: Sequence[Sequence[Any]]) -> None:
        """Take tensors (name, type, shape) that the trainer broadcasts in this order."""
        import torch

        group = self.__dict__["smoke_group"]
        stream = torch.cuda.current_stream(self.device)
        for name, kind, shape in tensors:
            dtype = getattr(torch, kind)
            taken = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            group.broadcast(taken, src=0, stream=stream)
            stream.synchronize()
            if self.__dict__.get("smoke_fault") != LOST_BROADCAST or "norm" not in name:
                self.smoke_place([(name, taken)])
        torch.cuda.synchronize(self.device)

    def smoke_read(self, folder: str) -> None:
        """Load a checkpoint by vLLM's own loader."""
        from vllm.config import LoadConfig
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        config = LoadConfig(load_format="safetensors", use_tqdm_on_load=False)
        loader: Any = DefaultModelLoader(config)
        source = DefaultModelLoader.Source(folder, revision=None)
        self.smoke_place(loader._get_weights_iterator(source))

    def smoke_take(self, addresses: Sequence[str]) -> None:
        """The colocated refit, from this worker's own address."""
        if self.rank and self.__dict__.get("smoke_fault") == STALE_RANK:
            from rollout.cuda_ipc import receive

            receive(addresses[self.rank], self.device, lambda _: None)
            return
        self.smoke_refit(addresses[self.rank])

    def smoke_place(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some weights by their Hugging Face names."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(tensors)

    def smoke_finish(self) -> None:
        """What follows the last weights of a refit."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        with set_current_vllm_config(self.vllm_config):
            model = self.model_runner.get_model()
            process_weights_after_loading(model, self.model_config, self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what was received

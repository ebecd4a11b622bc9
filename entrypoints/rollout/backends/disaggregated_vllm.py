"""vLLM beside a trainer that has GPUs of its own, and divided among two (see
:mod:`rollout.disaggregated`).

NCCL: the trainer and the workers join a group of their own by vLLM's ``StatelessProcessGroup`` and
``PyNcclCommunicator``, as TRL, OpenRLHF and open-instruct do it in a worker extension; the group
stays for the engine's life. Disk: vLLM's own loader reads a checkpoint, as prime-rl has it. Two
GPUs: each worker gets a buffer on its own GPU, as verl's trainer ranks give it.

The start of the engine and the watch over a refit stand in vllm.py too. A change of them there
would be another program for every check of every vLLM image, and void their proofs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import cuda_ipc
from rollout.backends import EngineError, vllm
from rollout.backends.served import free_port
from rollout.disaggregated import DISK, HANDLES, NCCL
from rollout.transport import TransportError

if TYPE_CHECKING:
    import torch

EXTENSION = "rollout.backends.disaggregated_vllm_extension.Extension"
HOST = "127.0.0.1"
JOINING = 120  # seconds in which all of a group have to come together
POLL = 0.001


class Engine(vllm.Engine):
    """The trainer's side of vLLM (see :class:`rollout.backends.Engine`)."""

    transports = (NCCL, DISK, HANDLES)

    def __init__(self) -> None:
        super().__init__()
        self._gpus = 1
        self._group: Any = None

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8:
            raise EngineError("this backend starts a disaggregated vLLM in bfloat16 only")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = vllm.arguments(model, total, dummy=dummy, fp8=False)
        options["worker_extension_cls"] = EXTENSION
        if gpus > 1:
            # verl switches vLLM's own all-reduce off: it maps memory of the other GPU, which stays
            # where it is while the engine sleeps.
            options |= {"tensor_parallel_size": gpus, "disable_custom_all_reduce": True}
        self._gpus = gpus
        try:
            self._llm = LLM(**vllm.known(options))
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self._follow()
        if self._fault:
            self._rpc("smoke_spoil", self._fault)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        ways = {NCCL: self._by_nccl, DISK: self._by_disk, HANDLES: self._by_handles}
        return ways[transport or self.transports[0]](tensors)

    def _by_nccl(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """From another GPU, tensor by tensor: name, type and shape come before it."""
        import torch

        group, device = self._joined()
        stream = torch.cuda.current_stream(device)
        sent = 0
        with torch.cuda.device(device):
            for bucket in _buckets(tensors):
                there = [(name, tensor.detach().to(device).contiguous()) for name, tensor in bucket]
                # What was copied from another GPU has to be here before it is read.
                torch.cuda.synchronize(device)
                said = [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in there]
                answer = self._ask("smoke_broadcast", said)
                for _, tensor in there:
                    group.broadcast(tensor, src=0, stream=stream)
                    sent += tensor.numel() * tensor.element_size()
                self._wait(stream, answer)
        self._rpc("smoke_finish")
        return sent

    def _joined(self) -> tuple[Any, torch.device]:
        """The trainer's place in a group of its GPU and the engine's, and that GPU."""
        import torch
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        last = torch.cuda.device_count() - 1
        if last < self._gpus:
            raise EngineError("a refit by NCCL needs a GPU that the engine does not use")
        device = torch.device("cuda", last)
        if self._group is None:
            port, size = free_port(), self._gpus + 1
            answer = self._ask("smoke_join", HOST, port, size)
            try:
                store = StatelessProcessGroup.create(HOST, port, 0, size, store_timeout=JOINING)
                self._group = PyNcclCommunicator(store, device=device)
            except Exception as error:
                if not answer.empty():
                    self._result(answer)  # what went wrong on its side says more
                raise EngineError(f"no NCCL group with the engine came to be: {error}") from error
            self._result(answer)
        return self._group, device

    def _by_disk(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """As a checkpoint, which is gone again when the engine has read it."""
        from safetensors.torch import save_file

        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        with tempfile.TemporaryDirectory(prefix="rollout-refit-") as folder:
            save_file(kept, Path(folder, "model.safetensors"))
            self._rpc("smoke_read", folder)
        self._rpc("smoke_finish")
        return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def _by_handles(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """To each worker from memory on its own GPU, one worker after another."""
        import torch

        listed, sent = list(tensors), 0
        with tempfile.TemporaryDirectory(prefix="rollout-refit-") as folder:
            addresses = [f"ipc://{folder}/{rank}.sock" for rank in range(self._gpus)]
            answer = self._ask("smoke_take", addresses)
            try:
                for rank, address in enumerate(addresses):
                    device = torch.device("cuda", rank)
                    sent = cuda_ipc.send(listed, address, device, self._watch(answer))
            except TransportError as error:
                raise EngineError(str(error)) from None
            self._result(answer)
        return sent

    def _ask(self, method: str, *args: object) -> queue.SimpleQueue[Any]:
        """Begin a call of every worker; its answer comes while this side does its own part."""
        return self._submit(lambda: self._llm.collective_rpc(method, args=args))

    def _watch(self, answer: queue.SimpleQueue[Any]) -> Callable[[], None]:
        """Raises, when it is called, where the engine ended before its part was done."""
        ended = 0

        def alive() -> None:
            nonlocal ended
            self._alive()
            if not answer.empty():
                ended += 1  # its last word may be on its way still
                if ended > 1:
                    self._result(answer)
                    raise EngineError("the engine ended the refit before its last weights")

        return alive

    def _wait(self, stream: torch.cuda.Stream, answer: queue.SimpleQueue[Any]) -> None:
        """Wait for a broadcast; without end it would be where a worker failed before its part."""
        import torch

        done = torch.cuda.Event()
        done.record(stream)
        while not done.query():
            if not answer.empty():
                self._result(answer)
                break  # all of them have received it
            self._alive()
            time.sleep(POLL)
        else:
            self._result(answer)
        stream.synchronize()

    def stop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):  # what is broken is killed below
                answer = self._ask("smoke_leave")
                leave(group)
                self._result(answer, JOINING)
        super().stop()


def leave(communicator: Any) -> None:
    """Give a communicator of vLLM back; older versions have no method for it.

    With its GPU as the current one, and back to the process' own after it: on two H200s a process
    stood on the communicator's GPU later, and what it made next lay there.
    """
    import torch

    with torch.cuda.device(communicator.device):
        if hasattr(communicator, "destroy"):
            communicator.destroy()
        else:
            communicator.nccl.ncclCommDestroy(communicator.comm)


def _buckets(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterable[list[tuple[str, torch.Tensor]]]:
    """The tensors in buckets, as they are sent over CUDA IPC."""
    for bucket in cuda_ipc.plan(tensors, cuda_ipc.BUCKET_BYTES):
        yield [(name, tensor) for name, tensor, _ in bucket]

"""Moving weights from a trainer process to an engine process, in buckets of shared memory.

The order is that of verl's ``BucketedWeightSender`` with ``use_shm``: one buffer of fixed size, a
message that says which tensor lies where, an acknowledgement before the buffer is used again. A
tensor larger than the buffer goes in parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 8 << 20  # fits the 64 MiB of /dev/shm that container engines give by default
_ALIGNMENT = 64
TIMEOUT = 300.0  # seconds without an answer after which the other side counts as hung


@dataclass(frozen=True)
class Piece:
    """Where a part of a tensor lies in the bucket. Offsets and sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    at: int  # offset in the bucket
    start: int  # offset in the tensor
    size: int
    total: int  # bytes of the whole tensor


class TransportError(RuntimeError):
    """The other side reported an error, died or stopped answering."""


def answer(connection: Connection, timeout: float = TIMEOUT) -> object:
    """The next message of the other side.

    Raises:
        TransportError: it sent an exception, ended, or said nothing for ``timeout`` seconds.
    """
    try:
        if not connection.poll(timeout):
            raise TransportError(f"the engine did not answer for {timeout:.0f} s")
        message = connection.recv()
    except (EOFError, OSError):
        raise TransportError("the engine process ended") from None
    if isinstance(message, Exception):
        raise TransportError(f"{type(message).__name__}: {message}")
    return message


def deliver(message: object, connection: Connection) -> None:
    """Send a message.

    Raises:
        TransportError: the other side is gone.
    """
    try:
        connection.send(message)
    except OSError:
        raise TransportError("the engine process ended") from None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as uint8 of shape (size in bytes,), not copied where contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def plan(
    tensors: Iterable[tuple[str, torch.Tensor]], size: int
) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
    """Cut tensors into buckets: lists of (where it lies, the whole tensor's bytes)."""
    bucket: list[tuple[Piece, torch.Tensor]] = []
    used = 0
    for name, tensor in tensors:
        data = as_bytes(tensor)
        dtype, total, start = str(tensor.dtype).removeprefix("torch."), data.numel(), 0
        while start < total or not total:
            if used >= size:
                yield bucket
                bucket, used = [], 0
            part = min(total - start, size - used)
            piece = Piece(name, tuple(tensor.shape), dtype, used, start, part, total)
            bucket.append((piece, data))
            start += part
            used += -(-part // _ALIGNMENT) * _ALIGNMENT
            if not total:  # a tensor without elements is one piece without bytes
                break
    if bucket:
        yield bucket


def send(
    tensors: Iterable[tuple[str, torch.Tensor]], connection: Connection, size: int = BUCKET_BYTES
) -> int:
    """Send named tensors (any shape, any dtype, CPU); returns the bytes of weights sent.

    Raises:
        TransportError: the receiver failed or stopped answering.
    """
    import torch

    sent = 0
    memory = SharedMemory(create=True, size=size)
    buffer = torch.frombuffer(memory.buf, dtype=torch.uint8)
    try:
        deliver(memory.name, connection)
        answer(connection)
        for bucket in plan(tensors, size):
            for piece, data in bucket:
                end = piece.at + piece.size
                buffer[piece.at : end].copy_(data[piece.start : piece.start + piece.size])
                sent += piece.size
            deliver([piece for piece, _ in bucket], connection)
            answer(connection)
        deliver(None, connection)
        answer(connection)
    finally:
        del buffer  # it looks into memory that is unmapped now
        memory.close()
        memory.unlink()
    return sent


def receive(connection: Connection) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that :func:`send` sends, in its order.

    A tensor is a view of the bucket: it is valid until the next one is asked for, and reading it
    after the last one ends the process, since the bucket is unmapped then.
    """
    import torch

    memory = SharedMemory(name=connection.recv())
    buffer = torch.frombuffer(memory.buf, dtype=torch.uint8)
    parts: torch.Tensor | None = None
    try:
        connection.send("ready")
        while pieces := connection.recv():
            for piece in pieces:
                data = buffer[piece.at : piece.at + piece.size]
                if piece.size < piece.total:
                    if piece.start == 0:
                        parts = torch.empty(piece.total, dtype=torch.uint8)
                    if parts is None:
                        raise TransportError(f"{piece.name!r} begins in its middle")
                    parts[piece.start : piece.start + piece.size].copy_(data)
                    if piece.start + piece.size < piece.total:
                        continue
                    data = parts
                yield piece.name, data.view(getattr(torch, piece.dtype)).reshape(piece.shape)
            del data
            connection.send("ack")
    finally:
        del buffer
        parts = None
        memory.close()
    connection.send("done")

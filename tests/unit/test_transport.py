"""What moving weights promises: every byte arrives, and a side that fails is not waited for."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from rollout import transport
from rollout.transport import Piece, TransportError

from .tensors import of_any_kind, same

Pipe = tuple[Connection, Connection]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ours, theirs = multiprocessing.Pipe()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sides that wait for each other fail a test instead of holding it for minutes."""
    monkeypatch.setattr(transport.answer, "__defaults__", (10.0,))


# the other side


def test_a_message_is_an_answer(pipe: Pipe) -> None:
    ours, theirs = pipe
    theirs.send(("anything", 1))
    assert transport.answer(ours) == ("anything", 1)


def test_an_exception_of_the_other_side_is_raised_with_its_name(pipe: Pipe) -> None:
    ours, theirs = pipe
    theirs.send(KeyError("model.norm"))
    with pytest.raises(TransportError, match=r"^KeyError: 'model\.norm'$"):
        transport.answer(ours)


def test_a_process_that_ended_is_not_waited_for(pipe: Pipe) -> None:
    ours, theirs = pipe
    theirs.close()
    with pytest.raises(TransportError, match=r"^the engine process ended$"):
        transport.answer(ours)


def test_a_process_that_says_nothing_counts_as_hung(pipe: Pipe) -> None:
    with pytest.raises(TransportError, match=r"^the engine did not answer for 0 s$"):
        transport.answer(pipe[0], timeout=0.01)


# tensors (with torch: inside the images)


def received(connection: Connection, into: dict[str, Any]) -> None:
    """Copies what arrives, as an engine does; its errors are answers."""
    try:
        for name, tensor in transport.receive(connection):
            into[name] = tensor.clone()
    except Exception as error:
        connection.send(error)


def moved(pipe: Pipe, tensors: dict[str, Any], size: int) -> tuple[dict[str, Any], int]:
    """The tensors on the other side, and the bytes sent."""
    ours, theirs = pipe
    there: dict[str, Any] = {}
    receiver = threading.Thread(target=received, args=(theirs, there), daemon=True)
    receiver.start()
    try:
        return there, transport.send(tensors.items(), ours, size)
    finally:
        receiver.join(10)
        assert not receiver.is_alive(), "the receiver still waits"


def shared_memories() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("psm_")}


@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_tensors_of_any_kind_arrive_to_the_bit(torch: Any, pipe: Pipe, size: int) -> None:
    tensors = of_any_kind(torch)
    before = shared_memories()
    there, sent = moved(pipe, tensors, size)
    assert list(there) == list(tensors)
    assert [name for name in tensors if not same(torch, there[name], tensors[name])] == []
    assert sent == sum(t.numel() * t.element_size() for t in tensors.values())
    assert shared_memories() == before


def test_an_empty_tensor_arrives_too(torch: Any, pipe: Pipe) -> None:
    there, sent = moved(pipe, {"a": torch.ones(2), "empty": torch.ones(0, 4)}, 64)
    assert sent == 8
    assert [(name, tuple(tensor.shape)) for name, tensor in there.items()] == [
        *(("a", (2,)), ("empty", (0, 4)))
    ]


def test_a_plan_fills_buckets_without_overlap_or_loss(torch: Any) -> None:
    tensors = [(str(n), torch.zeros(n, dtype=torch.uint8)) for n in (1, 63, 64, 65, 500)]
    seen: dict[str, int] = {}
    for bucket in transport.plan(tensors, 256):
        end = 0
        for piece, _ in bucket:
            assert piece.at >= end
            assert piece.at % 64 == 0
            end = piece.at + piece.size
            assert end <= 256
            assert piece.start == seen.get(piece.name, 0), "parts come in their order"
            seen[piece.name] = piece.start + piece.size
    assert seen == {name: tensor.numel() for name, tensor in tensors}


def test_what_the_receiver_cannot_take_is_raised_here_and_leaves_no_memory(
    torch: Any, pipe: Pipe
) -> None:
    before = shared_memories()
    ours, theirs = pipe

    def refuse() -> None:
        for name, _ in transport.receive(theirs):
            theirs.send(ValueError(f"unknown tensor {name!r}"))
            return

    receiver = threading.Thread(target=refuse, daemon=True)
    receiver.start()
    with pytest.raises(TransportError, match=r"^ValueError: unknown tensor 'a'$"):
        transport.send([("a", torch.ones(3))], ours, 64)
    receiver.join(10)
    assert shared_memories() == before


def test_an_engine_that_is_gone_is_said_in_a_sentence(torch: Any, pipe: Pipe) -> None:
    before = shared_memories()
    pipe[1].close()
    with pytest.raises(TransportError, match=r"^the engine process ended$"):
        transport.send([("a", torch.ones(3))], pipe[0], 64)
    assert shared_memories() == before


@pytest.mark.usefixtures("torch")
def test_a_tensor_that_begins_in_its_middle_is_refused(pipe: Pipe) -> None:
    ours, theirs = pipe
    memory = SharedMemory(create=True, size=64)
    try:
        ours.send(memory.name)
        ours.send([Piece("a", (64,), "float32", 0, 128, 64, 256)])
        with pytest.raises(TransportError, match=r"^'a' begins in its middle$"):
            list(transport.receive(theirs))
    finally:
        memory.close()
        memory.unlink()

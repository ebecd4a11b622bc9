"""What moving weights on one GPU promises, on a CPU: only the handles are others there."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import cuda_ipc
from rollout.cuda_ipc import Bucket
from rollout.transport import TransportError

from .tensors import of_any_kind, same


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/w"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sides that wait for each other fail a test instead of holding it for minutes."""
    monkeypatch.setattr(cuda_ipc, "TIMEOUT", 20.0)


# buckets


def planned(*sizes: int, buffer: int) -> list[list[tuple[str, int, int | None]]]:
    """Buckets of tensors that are nothing but large: (name, size, offset)."""
    tensors: list[Any] = [
        (str(n), SimpleNamespace(numel=lambda size=size: size // 2, element_size=lambda: 2))
        for n, size in enumerate(sizes)
    ]
    lengths = {name: tensor.numel() * 2 for name, tensor in tensors}
    return [
        [(name, lengths[name], offset) for name, _, offset in bucket]
        for bucket in cuda_ipc.plan(tensors, buffer)
    ]


@pytest.mark.parametrize("buffer", [256, 1000, 1024, 1 << 20])
def test_every_tensor_lies_in_one_bucket_aligned_and_over_no_other(buffer: int) -> None:
    sizes = [2, 254, 256, 258, 0, 1000, 1024, 1026, 0, 510, 512, 5000, 6]
    buckets = planned(*sizes, buffer=buffer)
    for bucket in buckets:
        assert bucket
        end = 0
        for _, size, offset in bucket:
            if offset is None:
                continue
            assert offset % cuda_ipc._ALIGNMENT == 0
            assert offset >= end
            end = offset + size
            assert end <= buffer
    names = [name for bucket in buckets for name, _, _ in bucket]
    assert sorted(names, key=int) == [str(n) for n in range(len(sizes))]


def test_a_tensor_larger_than_the_buffer_goes_alone() -> None:
    buckets = planned(300, 1026, 1024, 300, buffer=1024)
    assert [("1", 1026, None)] in buckets
    assert [len(bucket) for bucket in buckets if bucket[0][2] is None] == [1]
    assert [("2", 1024, 0)] in buckets, "one that just fits lies in it"


def test_a_bucket_is_filled_before_the_next_one_is_begun() -> None:
    assert planned(256, 256, 256, buffer=512) == [
        [("0", 256, 0), ("1", 256, 256)],
        [("2", 256, 0)],
    ]
    assert planned(buffer=512) == []


# both sides (with torch and pyzmq: inside the images)


class Side(threading.Thread):
    """One of the two, in a thread of its own; keeps what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.function()
        except Exception as error:
            self.error = error

    def ended(self) -> Exception | None:
        self.join(10)
        assert not self.is_alive(), "it still waits for the other side"
        return self.error


def receiver(torch: Any, address: str, load: Callable[[Bucket], Any]) -> Side:
    return Side(lambda: cuda_ipc.receive(address, torch.device("cpu"), load))


def fine() -> None:
    """An engine that lives."""


def send(torch: Any, tensors: Any, address: str, size: int, alive: Any = fine) -> int:
    return cuda_ipc.send(tensors, address, torch.device("cpu"), alive, size)


@pytest.mark.parametrize("size", [256, 1000, 1 << 20])
def test_tensors_of_any_kind_arrive_to_the_bit(torch: Any, address: str, size: int) -> None:
    tensors = of_any_kind(torch)
    there: dict[str, Any] = {}
    engine = receiver(torch, address, lambda b: there.update((n, t.clone()) for n, t in b))
    sent = send(torch, tensors.items(), address, size)
    assert engine.ended() is None
    assert set(there) == set(tensors)
    assert [name for name in tensors if not same(torch, there[name], tensors[name])] == []
    assert sent == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_bucket_is_loaded_as_one_and_before_the_next_is_written(torch: Any, address: str) -> None:
    buckets: list[list[tuple[str, float]]] = []
    engine = receiver(torch, address, lambda b: buckets.append([(n, t.sum().item()) for n, t in b]))
    ones = {name: torch.full((64,), float(number)) for number, name in enumerate("abcde")}
    send(torch, ones.items(), address, 512)
    assert engine.ended() is None
    assert buckets == [[("a", 0.0), ("b", 64.0)], [("c", 128.0), ("d", 192.0)], [("e", 256.0)]]


def test_nothing_to_send_is_a_refit_too(torch: Any, address: str) -> None:
    engine = receiver(torch, address, pytest.fail)
    assert send(torch, [], address, 512) == 0
    assert engine.ended() is None


def test_what_the_engine_cannot_take_is_raised_on_both_sides(torch: Any, address: str) -> None:
    seen: list[str] = []

    def load(bucket: Bucket) -> None:
        seen.append(bucket[0][0])
        if bucket[0][0] == "b":
            raise KeyError("no such tensor")

    engine = receiver(torch, address, load)
    tensors = [(name, torch.ones(64)) for name in "abc"]
    with pytest.raises(TransportError, match=r"^KeyError: 'no such tensor'$"):
        send(torch, tensors, address, 256)
    error = engine.ended()
    assert isinstance(error, KeyError)
    assert seen == ["a", "b"]


class Gone(Exception):
    """What ``alive`` raises."""


def test_an_engine_that_never_listens_ends_the_sending(torch: Any, address: str) -> None:
    asked: list[None] = []

    def alive() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise Gone

    trainer = Side(lambda: send(torch, [("a", torch.ones(3))], address, 512, alive))
    assert isinstance(trainer.ended(), Gone)


def test_an_engine_that_dies_while_it_loads_ends_the_sending(
    torch: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "TIMEOUT", 2.0)
    loading, dead = threading.Event(), threading.Event()

    def load(_: Bucket) -> None:
        loading.set()
        assert dead.wait(10)

    def alive() -> None:
        if loading.is_set():
            raise Gone

    engine = receiver(torch, address, load)
    trainer = Side(lambda: send(torch, [("a", torch.ones(3))], address, 512, alive))
    assert isinstance(trainer.ended(), Gone)
    dead.set()
    assert isinstance(engine.ended(), TransportError), "the trainer is gone in its turn"


def test_an_engine_that_says_nothing_counts_as_hung(
    torch: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "TIMEOUT", 0.01)
    trainer = Side(lambda: send(torch, [("a", torch.ones(3))], address, 512))
    error = trainer.ended()
    assert isinstance(error, TransportError), repr(error)
    assert str(error) == "the engine did not answer for 0 s"


@pytest.mark.parametrize("begun", [False, True], ids=["before its first message", "after it"])
def test_a_trainer_that_says_nothing_is_not_waited_for(
    torch: Any, address: str, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    import zmq

    monkeypatch.setattr(cuda_ipc, "TIMEOUT", 1.0)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        buffer = torch.zeros(512, dtype=torch.uint8)
        engine = receiver(torch, address, pytest.fail)
        if begun:
            socket.send(pickle.dumps(cuda_ipc._shared(buffer)))
            assert socket.recv() == b""
        error = engine.ended()
    assert isinstance(error, TransportError), repr(error)
    assert str(error) == "the trainer sent nothing for 1 s"

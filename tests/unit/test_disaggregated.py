"""A trainer on GPUs of its own: the check, and vLLM beside it, with no GPU and no vLLM here."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import cuda_ipc, disaggregated, smoke
from rollout.backends import EngineError, disaggregated_vllm
from rollout.backends.disaggregated_vllm_extension import Extension
from rollout.checks import CHECKS, Failed, Metrics, Trial
from rollout.disaggregated import LOST_BROADCAST, STALE_RANK
from rollout.faults import FAULTS, Faulty

from . import test_vllm
from .test_checks import OTHERS, WEIGHTS, Toy, failure, started, trial
from .test_vllm import MODEL, Llm, takes

CHECK = CHECKS["disaggregated"]
base = test_vllm.llm  # a fixture


class Elsewhere(Toy):
    """An engine that takes weights by each way; in the ways below it is wrong."""

    transports = ("nccl", "disk", "cuda-ipc")

    def __init__(self, *, lost: str = "", stale: str = "", filled: bool = False) -> None:
        super().__init__()
        self.lost, self.stale, self.gpus = lost, stale, 1  # ways by which nothing arrives
        self.begins = dict(WEIGHTS) if filled else self.begins
        self.spoiled = ""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.gpus = gpus
        super().start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        before = dict(self.weights or {})
        sent = super().refit(tensors, transport)
        if transport == (self.lost if self.gpus == 1 else self.stale):
            self.weights = before
        return sent

    def inject(self, fault: str) -> None:
        self.spoiled = fault


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """Gives the trial of an engine, and the check the engine that is wrong in these ways."""
    monkeypatch.setattr("rollout.checks.digest", str)

    def make(**wrong: Any) -> Trial:
        there = Elsewhere(**wrong)
        monkeypatch.setattr(disaggregated, "apart", lambda *_: there)
        return trial(started())

    return make


def test_weights_arrive_by_each_way_and_on_two_gpus(made: Callable[..., Trial]) -> None:
    given = made()
    own: Any = given.engine
    metrics: Metrics = CHECK(given)
    assert given.engine is own
    assert own.calls == ["stop"]  # nothing else holds the GPU
    there: Any = disaggregated.elsewhere(own)
    kept = [call for call in there.calls if call != "reset"]
    assert kept == [
        "start dummy=True fp8=False level=1 gpus=1",
        *("refit nccl", "refit nccl", "refit disk", "refit disk", "stop"),
        "start dummy=True fp8=False level=1 gpus=2",
        *("refit disk", "refit disk", "refit cuda-ipc", "refit cuda-ipc", "stop"),
    ]
    assert {"nccl_gb_per_s", "disk_gb_per_s", "divided_disk_gb_per_s"} <= metrics.keys()
    assert metrics["gpus"] == 2
    assert metrics["divided_divergence"] < given.bound


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"filled": True}, "control: the engine had the weights before they were sent"),
        ({"lost": "nccl"}, "by nccl the engine does not hold what was sent: body, lm_head.weight"),
        ({"lost": "disk"}, "by disk the engine does not hold what was sent: body"),
        ({"stale": "disk"}, "on 2 GPUs, sent by disk, the output is not that of the weights"),
        (
            {"stale": "cuda-ipc"},
            "on 2 GPUs, sent by cuda-ipc, the output is not that of the weights",
        ),
    ],
    ids=["filled before", "nccl", "disk", "two by disk", "two by handles"],
)
def test_a_way_by_which_nothing_arrives_is_not_passed(
    made: Callable[..., Trial], wrong: dict[str, Any], reason: str
) -> None:
    given = made(**wrong)
    own = given.engine
    assert failure(CHECK, given) == reason
    there: Any = disaggregated.elsewhere(own)
    assert there.calls[-1] == "stop"
    assert given.engine is own


def test_an_engine_that_holds_the_weights_already_proves_no_transport(
    made: Callable[..., Trial],
) -> None:
    given = made()
    there: Any = disaggregated.elsewhere(given.engine)
    there.begins = dict(OTHERS)
    there.digests = lambda: {name: str(value) for name, value in WEIGHTS.items()}
    with pytest.raises(Failed, match="control: the engine held what was to be sent by nccl"):
        CHECK(given)


@pytest.mark.parametrize("fault", [LOST_BROADCAST, STALE_RANK])
def test_a_fault_of_this_check_is_made_in_its_engine(
    made: Callable[..., Trial], fault: str
) -> None:
    given = made()
    given.fault = fault
    given.engine = Faulty(given.engine, fault)  # type: ignore[assignment]
    CHECK(given)
    there: Any = disaggregated.elsewhere(given.engine)
    assert there.spoiled == fault
    assert FAULTS[fault].check == "disaggregated"


def test_it_needs_two_gpus_and_one_says_so() -> None:
    wanted = {"sleep_levels": [1], "refit": ["cuda-ipc"], "disaggregated": True}
    assert "disaggregated" in smoke.promised(wanted)
    assert "disaggregated" in smoke.available(wanted, 2)
    assert "disaggregated" not in smoke.available(wanted, 1)
    assert smoke.skipped(wanted, 1) == {"disaggregated": "it needs 2 GPUs; one GPU is visible"}
    assert smoke.skipped(wanted, 2) == {}
    assert "disaggregated" not in smoke.promised({"sleep_levels": [1], "refit": ["cuda-ipc"]})


# vLLM beside a trainer


class Tensor:
    """A tensor of four bytes that tells where it was last."""

    dtype, shape = "torch.float32", (1,)

    def __init__(self, name: str) -> None:
        self.name, self.place = name, "cpu"

    def detach(self) -> Tensor:
        return self

    contiguous = cpu = detach

    def to(self, place: Any) -> Tensor:
        self.place = place
        return self

    def numel(self) -> int:
        return 1

    def element_size(self) -> int:
        return 4


class Group:
    """vLLM's communicator, which notes what goes through it."""

    made: list[Group]
    fails = ""

    def __init__(self, store: Any, *, device: Any) -> None:
        if Group.fails:
            raise RuntimeError(Group.fails)
        self.store, self.device, self.sent = store, device, list[Any]()
        self.left = False
        Group.made.append(self)

    def broadcast(self, tensor: Any, *, src: int, **_: Any) -> None:
        assert src == 0
        self.sent.append(tensor)

    def destroy(self) -> None:
        self.left = True


class Event:
    """Something on a stream that is over when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self, _: Any) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2


@pytest.fixture
def llm(base: Llm, monkeypatch: pytest.MonkeyPatch) -> Llm:
    """A machine with vLLM and two GPUs."""
    takes(monkeypatch)
    kind: Any = sys.modules["vllm.engine.arg_utils"]
    names = [*kind.EngineArgs.__dataclass_fields__, "disable_custom_all_reduce"]
    kind.EngineArgs = importlib.import_module("dataclasses").make_dataclass("EngineArgs", names)
    torch: Any = sys.modules["torch"]
    stream = SimpleNamespace(synchronize=lambda: None)
    vars(torch.cuda).update(
        device_count=lambda: 2,
        synchronize=lambda *_: None,
        current_stream=lambda _: stream,
        Event=Event,
        device=lambda _: contextlib.nullcontext(),
    )
    Group.made, Group.fails = [], ""
    stores = SimpleNamespace(create=lambda *asked, **_: asked)
    for name, content in {
        "vllm.distributed": {},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Group},
        "vllm.distributed.utils": {"StatelessProcessGroup": stores},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(disaggregated_vllm, "free_port", lambda: 4711)
    return base


@pytest.fixture
def engine(llm: Llm) -> Iterator[disaggregated_vllm.Engine]:
    """A started engine."""
    made = disaggregated_vllm.Engine()
    made.start(MODEL, dummy=True)
    llm.calls.clear()
    yield made
    made.stop()


def test_it_is_started_as_any_vllm_is_with_another_worker_extension(llm: Llm) -> None:
    engine = disaggregated_vllm.Engine()
    engine.start(MODEL, dummy=True)
    module, _, name = llm.options["worker_extension_cls"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is Extension
    assert "tensor_parallel_size" not in llm.options
    engine.stop()
    engine.start(MODEL, dummy=True, gpus=2)
    assert llm.options["tensor_parallel_size"] == 2
    assert llm.options["disable_custom_all_reduce"] is True
    engine.stop()


def test_it_is_the_one_that_the_check_gets_for_a_vllm() -> None:
    wrapped: Any = SimpleNamespace(within=test_vllm.vllm.Engine.__new__(test_vllm.vllm.Engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disaggregated_vllm.Engine, "__init__", lambda _: None)
        patch.setattr(disaggregated_vllm.Engine, "stop", lambda _: None)
        assert isinstance(disaggregated.elsewhere(wrapped), disaggregated_vllm.Engine)


def test_both_sides_join_one_group_once_and_every_tensor_is_broadcast_as_it_was_announced(
    llm: Llm, engine: disaggregated_vllm.Engine
) -> None:
    pair: Any = [("a", Tensor("a")), ("b", Tensor("b"))]
    assert engine.refit(pair, "nccl") == 8
    assert engine.refit(pair, "nccl") == 8
    (group,) = Group.made
    assert group.store == ("127.0.0.1", 4711, 0, 2)  # the first of two
    assert group.device == ("cuda", 1)
    assert [(t.name, t.place) for t in group.sent[:2]] == [("a", group.device), ("b", group.device)]
    said = [["a", "float32", [1]], ["b", "float32", [1]]]
    assert llm.calls == [
        ("smoke_join", "127.0.0.1", 4711, 2),
        *[("smoke_broadcast", said), ("smoke_finish",)] * 2,
    ]
    engine.stop()
    assert group.left
    assert ("smoke_leave",) in llm.calls


def test_what_a_worker_raises_in_the_middle_ends_the_refit(
    llm: Llm, engine: disaggregated_vllm.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Event, "query", lambda _: False)  # a broadcast that nobody takes part in
    llm.answers["smoke_broadcast"] = KeyError("no such tensor")
    with pytest.raises(EngineError, match=r"^KeyError: 'no such tensor'$"):
        engine.refit([("a", Tensor("a"))], "nccl")  # type: ignore[list-item]


def test_a_group_that_does_not_come_to_be_is_an_error(engine: disaggregated_vllm.Engine) -> None:
    Group.fails = "timed out"
    with pytest.raises(EngineError, match="no NCCL group with the engine came to be: timed out"):
        engine.refit([], "nccl")


@pytest.mark.usefixtures("llm")
def test_nccl_needs_a_gpu_that_the_engine_does_not_use() -> None:
    engine = disaggregated_vllm.Engine()
    engine.start(MODEL, dummy=True, gpus=2)
    with pytest.raises(EngineError, match="needs a GPU that the engine does not use"):
        engine.refit([], "nccl")
    engine.stop()


def test_a_checkpoint_is_there_while_it_is_read_and_gone_afterwards(
    llm: Llm, engine: disaggregated_vllm.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[list[str], Path]] = []

    def save(tensors: dict[str, Any], path: Path) -> None:
        path.touch()
        written.append((list(tensors), path))

    module = ModuleType("safetensors.torch")
    vars(module)["save_file"] = save
    monkeypatch.setitem(sys.modules, "safetensors", ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    there: list[bool] = []
    llm.answers["smoke_read"] = lambda: there.append(written[0][1].exists())
    given: Any = [("a", Tensor("a")), ("b", Tensor("b"))]
    assert engine.refit(given, "disk") == 8
    ((names, path),) = written
    assert names == ["a", "b"]
    assert there == [True]
    assert not path.parent.exists()
    assert llm.calls == [("smoke_read", str(path.parent)), ("smoke_finish",)]


def test_each_worker_is_sent_its_weights_from_its_own_gpu(
    llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Any]] = []

    def send(tensors: Any, address: str, device: Any, _: Any) -> int:
        sent.append((address, device))
        return len(tensors)

    monkeypatch.setattr(cuda_ipc, "send", send)
    engine = disaggregated_vllm.Engine()
    engine.start(MODEL, dummy=True, gpus=2)
    llm.calls.clear()
    given: Any = iter([("a", Tensor("a"))])  # a stream that can be read once
    assert engine.refit(given, "cuda-ipc") == 1
    assert [device for _, device in sent] == [("cuda", 0), ("cuda", 1)]
    assert llm.calls == [("smoke_take", [address for address, _ in sent])]
    engine.stop()


# its worker


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, llm: Llm) -> Any:  # noqa: ARG001 - it stands for torch
    """vLLM's second worker, with a model that notes what it loads."""
    made: Any = Extension()
    made.device, made.rank, made.vllm_config, made.model_config = ("cuda", 1), 1, "all", "model"
    made.loaded, made.processed = [], []
    model = SimpleNamespace(load_weights=lambda given: made.loaded.extend(n for n, _ in given))
    made.model_runner = SimpleNamespace(get_model=lambda: model)
    torch: Any = sys.modules["torch"]
    vars(torch).update(float32="float32", empty=lambda *_, **__: "empty")

    class Config:
        def __init__(self, _: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    class Loader:
        Source = staticmethod(lambda folder, **_: folder)

        def __init__(self, config: Any) -> None:
            assert config == {"load_format": "safetensors", "use_tqdm_on_load": False}

        def _get_weights_iterator(self, folder: str) -> Iterator[tuple[str, str]]:
            yield f"{folder}/weight", "read"

    for name, content in {
        "vllm.config": {"set_current_vllm_config": Config, "LoadConfig": dict},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": Loader},
        "vllm.model_executor.model_loader.utils": {
            "process_weights_after_loading": lambda *given: made.processed.append(given[1:])
        },
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_a_worker_joins_behind_the_trainer_and_loads_what_is_broadcast(worker: Any) -> None:
    worker.smoke_join("here", 7, 3)
    (group,) = Group.made
    assert group.store == ("here", 7, 2, 3)  # the trainer, the first worker, this one
    worker.smoke_broadcast([["a.norm", "float32", [1]], ["b", "float32", [1]]])
    assert worker.loaded == ["a.norm", "b"]
    assert len(group.sent) == 2
    assert worker.processed == []  # once, at the end of a refit
    worker.smoke_finish()
    assert worker.processed == [("model", worker.device)]
    worker.smoke_leave()
    assert group.left


def test_a_worker_reads_a_checkpoint_by_vllms_own_loader(worker: Any) -> None:
    worker.smoke_read("folder")
    assert worker.loaded == ["folder/weight"]


def test_a_worker_takes_part_in_a_broadcast_whose_weights_it_loses(worker: Any) -> None:
    worker.smoke_join("here", 7, 3)
    worker.smoke_spoil(LOST_BROADCAST)
    worker.smoke_broadcast([["a.norm", "float32", [1]], ["b", "float32", [1]]])
    assert worker.loaded == ["b"]
    assert len(Group.made[0].sent) == 2  # a member that left one out would hang all others


@pytest.mark.parametrize("stale", [False, True])
def test_a_worker_takes_from_its_own_address_and_a_stale_one_loads_nothing(
    worker: Any, monkeypatch: pytest.MonkeyPatch, *, stale: bool
) -> None:
    from rollout.backends import vllm_extension

    read: list[tuple[str, str]] = []
    monkeypatch.setattr(
        vllm_extension.Extension, "smoke_refit", lambda _, address: read.append(("loads", address))
    )
    monkeypatch.setattr(cuda_ipc, "receive", lambda address, *_: read.append(("drops", address)))
    if stale:
        worker.smoke_spoil(STALE_RANK)
    worker.smoke_take(["first", "second"])
    assert read == [("drops" if stale else "loads", "second")]


def test_every_name_is_one_that_no_worker_has() -> None:
    names = [name for name in vars(Extension) if not name.startswith("__")]
    assert names
    assert all(name.startswith("smoke_") for name in names)

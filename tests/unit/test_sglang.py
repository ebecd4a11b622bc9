"""What the trainer's side of SGLang promises: verl's settings, and an end to every call.

SGLang and torch are not here: what answers in their place is like the real ones at their worst.
"""

from __future__ import annotations

import base64
import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from images.catalog import ROOT
from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError, served, sglang
from rollout.backends.sglang import KV_BYTES
from rollout.problem import Problem

from . import fake_sglang
from .web import Played, Site, played

GIB = 1 << 30
CONFIG = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
TOKEN = 2 * 2 * 16 * 8 * 64  # bytes of keys and values of one token


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder."""
    return folder(tmp_path / "model")


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"dummy": True, "level": 1, "gpus": 1}
    return sglang.arguments(model, **(settings | changes))


# what it is started with


def test_it_is_started_as_a_trainer_starts_it(model: Path) -> None:
    options = arguments(model)
    assert options["model_path"] == str(model)
    assert options["enable_memory_saver"] is True
    assert options["skip_tokenizer_init"] is True
    assert options["dtype"] == "bfloat16"
    assert options["tp_size"] == 1
    hides = [name for name in options if name.startswith("disable")]
    assert hides == [], "CUDA graphs and the radix cache are what a trainer uses"


@pytest.mark.parametrize(("dummy", "format_"), [(True, "dummy"), (False, "auto")])
def test_an_engine_on_dummy_weights_reads_none(model: Path, dummy: bool, format_: str) -> None:
    assert arguments(model, dummy=dummy)["load_format"] == format_


@pytest.mark.parametrize(("level", "backup"), [(1, True), (2, False)])
def test_a_copy_of_the_weights_is_for_the_level_that_needs_one(
    model: Path, level: int, backup: bool
) -> None:
    assert arguments(model, level=level)["enable_weights_cpu_backup"] is backup


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({}, TOKEN),
        ({"num_key_value_heads": 4}, TOKEN // 2),
        ({"num_key_value_heads": None}, TOKEN * 4),  # as many as there are heads
        ({"head_dim": None}, TOKEN),  # 2048 among 32
        ({"head_dim": 128}, TOKEN * 2),
        ({"num_hidden_layers": 2}, TOKEN // 8),
    ],
    ids=["all said", "fewer heads", "no kv heads", "no head_dim", "wider heads", "fewer layers"],
)
@pytest.mark.parametrize("gpus", [1, 2])
def test_the_cache_takes_as_much_of_every_gpu_whatever_the_model(
    tmp_path: Path, changes: dict[str, Any], token: int, gpus: int
) -> None:
    options = arguments(folder(tmp_path / "m", **changes), gpus=gpus)
    assert options["max_total_tokens"] == KV_BYTES * gpus // token
    share = options["max_total_tokens"] * token // gpus
    assert KV_BYTES - token < share <= KV_BYTES
    assert options["tp_size"] == gpus


def test_requests_fit_into_the_cache_and_into_a_cuda_graph(model: Path) -> None:
    options = arguments(model)
    longest = options["context_length"] * options["max_running_requests"]
    assert longest < options["max_total_tokens"]
    assert options["cuda_graph_max_bs"] == options["max_running_requests"]


# a machine with a GPU


class Tensor:
    """A tensor that is nothing but large, and knows where it lies."""

    dtype = "torch.bfloat16"

    def __init__(self, size: int, where: str = "cpu") -> None:
        self.size, self.where = size, where
        self.shape = (size // 2,)

    def numel(self) -> int:
        return self.size // 2

    def element_size(self) -> int:
        return 2

    def detach(self) -> Tensor:
        return self

    def contiguous(self) -> Tensor:
        return self

    def to(self, device: str) -> Tensor:
        return Tensor(self.size, device)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return self.size


def tensors(*sizes: int) -> Any:
    return [(f"t{number}", Tensor(size)) for number, size in enumerate(sizes)]


class Torch(ModuleType):
    """torch on a machine with GPUs; ``done`` is what it was asked for."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.gpus = 1
        self.done: list[Any] = []
        do = self.done.append
        self.multiprocessing = ModuleType("torch.multiprocessing")
        self.cuda = SimpleNamespace(
            get_device_name=lambda: "a GPU",
            current_device=lambda: 0,
            device_count=lambda: self.gpus,
            device=lambda device: contextlib.nullcontext(do(f"on {device}")),
            mem_get_info=lambda _: (30 * GIB, 80 * GIB),
            empty_cache=lambda: do("empty"),
            ipc_collect=lambda: do("collect"),
            synchronize=lambda device: do(f"synchronize {device}"),
        )
        self.distributed = SimpleNamespace(
            broadcast=lambda tensor, src, group: do((tensor, src, group)),
            destroy_process_group=lambda group: do(f"destroy {group}"),
        )

    def device(self, kind: str, index: int) -> str:
        return f"{kind}:{index}"


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Torch:
    made = Torch()
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setitem(sys.modules, "torch.multiprocessing", made.multiprocessing)
    monkeypatch.delenv(served.LOG, raising=False)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "logs"))
    return made


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_a_machine_without_cuda_is_told_in_one_sentence(
    torch: Torch, error: type[Exception]
) -> None:
    def name() -> str:
        raise error("\nFound no NVIDIA driver on your system.\nSee a page.")

    torch.cuda.get_device_name = name
    with pytest.raises(Problem) as caught:
        sglang.Engine()
    assert caught.value.code == 3
    assert "(Found no NVIDIA driver on your system.)" in caught.value.sentence


# a driver that is none: it answers as it is told, in a process of its own

FACTS = {"held": 7, "levels": [1], "witness": True, "insisting": {"BALANCE": "1"}}
FORK = multiprocessing.get_context("fork")
Answer = Callable[..., Any]


def nothing(*_: object) -> None:
    """What most of the calls give back."""


class Drive:
    """Answers by method name; what raises is an answer too. ``told`` says what it was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.facts: Any = FACTS
        self.begin: Callable[[dict[str, Any], str], None] = nothing
        self.stays = False  # when it was asked to end

    def __call__(
        self, connection: Connection, options: dict[str, Any], log: str, parent: int
    ) -> None:
        self.begin(options, log)
        assert parent == os.getppid()
        connection.send(self.facts)
        calls: list[Any] = []
        with contextlib.suppress(EOFError):
            while True:
                method, given = connection.recv()
                if method == "told":
                    connection.send((calls, options, log))
                    continue
                calls.append((method, *given))
                try:
                    connection.send(self.answers.get(method, nothing)(*given))
                except Exception as error:
                    connection.send(RuntimeError(str(error)))
                if method == "stop":
                    time.sleep(600 if self.stays else 0)
                    return


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch, torch: Torch) -> Drive:
    del torch
    made = Drive()

    def context(kind: str) -> Any:
        assert kind == "spawn", "CUDA cannot be forked; this driver has none"
        return FORK

    monkeypatch.setattr(multiprocessing, "get_context", context)
    monkeypatch.setattr(sglang, "drive", made)
    monkeypatch.setattr(sglang.Engine, "patience", 20.0)
    return made


@pytest.fixture
def engine(drive: Drive) -> Iterator[sglang.Engine]:
    """An engine that is not started yet; its driver's answers are given before."""
    del drive
    made = sglang.Engine()
    yield made
    made.stop()


def start(engine: sglang.Engine, model: Path, **changes: Any) -> None:
    engine.start(model, **({"dummy": True} | changes))


def told(engine: sglang.Engine) -> list[Any]:
    """What the driver was asked for, but for sessions of updates."""
    calls: list[Any] = engine._call("told")[0]
    return [call for call in calls if call[0] not in ("begin", "end")]


def logs() -> list[str]:
    return [path.name for path in Path(tempfile.gettempdir()).iterdir()]


def test_a_driver_is_given_verls_options_a_port_and_a_log(
    engine: sglang.Engine, model: Path
) -> None:
    start(engine, model, level=2, gpus=2)
    _, options, log = engine._call("told")
    port = options.pop("nccl_port")
    assert options == arguments(model, level=2, gpus=2)
    assert 1024 < port < 65536
    assert logs() == [Path(log).name]


def test_what_the_engine_says_of_itself_is_known_when_it_has_started(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    assert (engine.device, engine.cache_block, engine.mlp_bias) == ("a GPU", 1, False)
    assert engine.transports == ("cuda-ipc", "cuda-ipc-flattened", "nccl", "disk")
    assert (engine.levels, engine.witness, engine.insisting) == ((), False, {})
    start(engine, model)
    assert (engine.levels, engine.witness, engine.insisting) == ((1,), True, {"BALANCE": "1"})
    assert (engine.held(), engine.memory()) == (7, 50 * GIB)
    engine.stop()
    drive.facts = FACTS | {"levels": [2], "witness": False}
    start(engine, model)
    assert (engine.levels, engine.witness) == ((2,), False)


def test_weights_in_fp8_are_refused_before_anything_is_started(
    engine: sglang.Engine, model: Path
) -> None:
    with pytest.raises(EngineError, match="in bfloat16 only"):
        start(engine, model, fp8=True)
    with pytest.raises(EngineError, match="in bfloat16 only"):
        sglang.Server().start(model, dummy=True, fp8=True)
    assert logs() == []


def test_a_folder_without_a_model_leaves_nothing_behind(
    engine: sglang.Engine, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        start(engine, tmp_path)
    assert logs() == []


CALLS: list[Callable[[sglang.Engine], Any]] = [
    lambda engine: engine.generate([[1]], 1),
    lambda engine: engine.interrupt([[1]], 9, 1),
    lambda engine: engine.sleep(1),
    lambda engine: engine.wake((WEIGHTS,)),
    lambda engine: engine.refit(tensors(2)),
    lambda engine: engine.reset_prefix_cache(),
    lambda engine: engine.digests(),
    lambda engine: engine.remember(),
    lambda engine: engine.unchanged(),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("torch")
def test_an_engine_that_is_not_started_answers_nothing(call: Callable[[Any], Any]) -> None:
    with pytest.raises(EngineError, match=r"^the engine is not started$"):
        call(sglang.Engine())


def test_answers_are_tokens_with_their_log_probabilities_and_what_was_cached(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers["generate"] = lambda prompts, _: [((5, 6), (-0.5, -0.25), 3) for _ in prompts]
    drive.answers["interrupt"] = lambda *_: [([5], [-0.5], 0)]
    start(engine, model)
    found = engine.generate([(1, 2), (3,)], 2)
    assert found == [Completion((5, 6), (-0.5, -0.25))] * 2
    assert [answer.cached for answer in found] == [3, 3]
    assert engine.interrupt([(1, 2)], 9, 4) == [Completion((5,), (-0.5,))]
    assert told(engine) == [
        ("generate", [[1, 2], [3]], 2),
        ("interrupt", [[1, 2]], 9, 4),
    ]


def test_other_calls_are_passed_on(drive: Drive, engine: sglang.Engine, model: Path) -> None:
    drive.answers |= {"rpc": lambda _: {"a": "digest"}, "check": lambda what: (what != "x", "")}
    start(engine, model)
    engine.sleep(1)
    engine.wake([WEIGHTS, KV_CACHE])
    engine.reset_prefix_cache()
    assert engine.digests() == {"a": "digest"}
    engine.remember()
    assert engine.unchanged() is True
    assert told(engine) == [
        *(("sleep", 1), ("wake", (WEIGHTS, KV_CACHE)), ("flush",), ("rpc", "smoke_digests")),
        *(("check", "snapshot"), ("check", "compare")),
    ]


def test_a_checker_that_takes_no_snapshot_is_an_error_and_a_difference_is_none(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers["check"] = lambda what: (False, f"no {what}")
    start(engine, model)
    with pytest.raises(EngineError, match=r"took no snapshot: no snapshot$"):
        engine.remember()
    assert engine.unchanged() is False


# what goes wrong


def fails(*_: object) -> None:
    raise ValueError("no such level")


def test_what_the_driver_raises_is_told_and_the_next_call_is_made(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers["sleep"] = fails
    start(engine, model)
    with pytest.raises(EngineError, match=r"^RuntimeError: no such level$"):
        engine.sleep(3)
    engine.reset_prefix_cache()
    assert [call[0] for call in told(engine)] == ["sleep", "flush"]


@pytest.mark.parametrize("call", CALLS)
def test_a_driver_that_dies_ends_the_call_that_waits_for_it_and_every_other(
    drive: Drive, engine: sglang.Engine, model: Path, call: Callable[[Any], Any]
) -> None:
    for name in ("generate", "interrupt", "sleep", "wake", "from_tensors", "flush", "rpc", "check"):
        drive.answers[name] = lambda *_: os._exit(1)
    start(engine, model)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"^the engine process ended$"):
            call(engine)
    engine.stop()
    assert logs() == []


def test_a_driver_that_lives_and_says_nothing_counts_as_hung(
    drive: Drive, engine: sglang.Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive.answers["sleep"] = lambda _: time.sleep(0.3)
    start(engine, model)
    monkeypatch.setattr(sglang.Engine, "patience", 0.05)
    with pytest.raises(EngineError, match=r"^the engine did not answer for 0 s$"):
        engine.sleep(1)


@pytest.mark.parametrize(
    ("log", "last", "reason"),
    [
        ("Traceback\nValueError: unbalanced\nReceived sigquit\n", None, "ValueError: unbalanced"),
        ("loading\n", None, "the engine process ended"),
        ("loading\n", RuntimeError("no memory"), "RuntimeError: no memory"),
        ("OSError: no port\n", RuntimeError("scheduler died"), "OSError: no port"),
    ],
    ids=["killed, with a log", "killed without a word", "told", "told, and better in the log"],
)
def test_an_engine_that_does_not_start_says_why_and_leaves_no_process_and_no_log(
    drive: Drive,
    engine: sglang.Engine,
    model: Path,
    log: str,
    last: Exception | None,
    reason: str,
) -> None:
    def begin(_: object, path: str) -> None:
        Path(path).write_text(log)
        if last is None:
            os.kill(os.getpid(), signal.SIGKILL)

    drive.begin, drive.facts = begin, last
    with pytest.raises(EngineError) as caught:
        start(engine, model)
    assert str(caught.value) == f"SGLang did not start: {reason}"
    assert logs() == []
    assert multiprocessing.active_children() == []
    with pytest.raises(EngineError, match="not started"):
        engine.sleep(1)


# the end


def test_stopping_is_harmless_twice_and_leaves_no_process_and_no_log(
    engine: sglang.Engine, model: Path
) -> None:
    start(engine, model)
    process = engine._process
    engine.stop()
    assert process.exitcode == 0, "it was asked to stop, and did"
    assert logs() == []
    engine.stop()
    with pytest.raises(EngineError, match="not started"):
        engine.sleep(1)


def test_a_driver_that_answers_and_does_not_end_is_killed(
    drive: Drive, engine: sglang.Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive.stays = True
    start(engine, model)
    process, join = engine._process, engine._process.join
    monkeypatch.setattr(process, "join", lambda wait=None: join(0.05 if wait else None))
    engine.stop()
    assert process.exitcode == -signal.SIGKILL
    assert logs() == []


@pytest.mark.usefixtures("torch")
def test_an_engine_that_never_started_is_stopped_too() -> None:
    sglang.Engine().stop()


def test_a_log_that_the_user_named_is_kept(
    engine: sglang.Engine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.log"
    mine.write_text("of an earlier run\n")
    monkeypatch.setenv(served.LOG, str(mine))
    start(engine, model)
    assert engine._call("told")[2] == str(mine)
    engine.stop()
    assert mine.exists()


def test_an_engine_starts_again_after_it_was_stopped(engine: sglang.Engine, model: Path) -> None:
    for level in (1, 2):
        start(engine, model, level=level)
        engine.sleep(level)
        assert told(engine) == [("sleep", level)]
        engine.stop()
    assert logs() == []


# a refit


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), []),
        ((100, 200, 300), [["t0", "t1", "t2"]]),
        ((600, 600, 600), [["t0"], ["t1"], ["t2"]]),
        ((100, 5000, 100), [["t1"], ["t0", "t2"]]),
        ((5000, 6000), [["t0"], ["t1"]]),
        ((1024, 2), [["t0"], ["t1"]]),
        ((0, 2, 0), [["t0", "t1", "t2"]]),
    ],
)
def test_buckets_hold_what_fits_and_what_is_larger_goes_alone(
    sizes: tuple[int, ...], expected: list[list[str]]
) -> None:
    given = tensors(*sizes)
    found = [list(bucket) for bucket in sglang.buckets(given, 1024)]
    assert [[name for name, _ in bucket] for bucket in found] == expected
    names = [name for bucket in found for name, _ in bucket]
    assert sorted(names) == [name for name, _ in given]
    for bucket in found:
        assert len(bucket) == 1 or sum(tensor.size for _, tensor in bucket) <= 1024


class Handle:
    """What only a process that the pickler knows about can be told of."""


@pytest.mark.usefixtures("torch")
def test_tensors_are_told_as_torch_teaches_the_pickler() -> None:
    ForkingPickler.register(Handle, lambda handle: (str, (f"opened {type(handle).__name__}",)))
    try:
        data = sglang.serialize([("a", Handle())])
    finally:
        del ForkingPickler._extra_reducers[Handle]  # type: ignore[attr-defined]
    assert pickle.loads(data) == [("a", "opened Handle")]  # noqa: S301 - our own


MIB = 1 << 20


def test_weights_go_as_handles_bucket_by_bucket(
    torch: Torch, engine: sglang.Engine, model: Path
) -> None:
    start(engine, model, gpus=2)
    assert engine.refit(tensors(200 * MIB, 200 * MIB, 10)) == 400 * MIB + 10
    first, second = told(engine)
    for (method, serialized, load_format), names in ((first, ["t0"]), (second, ["t1", "t2"])):
        assert (method, load_format) == ("from_tensors", None)
        assert len(serialized) == 2, "one for each rank"
        for data in serialized:
            sent = pickle.loads(data)  # noqa: S301 - our own
            assert [name for name, _ in sent] == names
            assert {tensor.where for _, tensor in sent} == {"cuda:0"}
    synchronize = "synchronize cuda:0"
    assert torch.done[:2] == [synchronize, synchronize], "before each handle is told"
    assert torch.done[2:4] == ["collect", "empty"]


@pytest.mark.usefixtures("safetensors", "nccl")
@pytest.mark.parametrize(
    ("transport", "calls"),
    [
        ("cuda-ipc", ["begin", "from_tensors", "from_tensors", "end"]),
        ("nccl", ["begin", "join_group", "from_group", "from_group", "leave_group", "end"]),
        ("disk", ["from_disk"]),
    ],
)
def test_weights_come_in_one_session_and_a_checkpoint_in_none(
    engine: sglang.Engine, model: Path, transport: str, calls: list[str]
) -> None:
    """A newer SGLang refuses weights outside of a session, and finishes them at its end."""
    start(engine, model)
    engine.refit(tensors(200 * MIB, 200 * MIB), transport)
    assert [call[0] for call in engine._call("told")[0]] == calls


def test_a_session_whose_weights_were_refused_is_not_finished(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers["from_tensors"] = fails
    start(engine, model)
    with pytest.raises(EngineError):
        engine.refit(tensors(2))
    assert [call[0] for call in engine._call("told")[0]] == ["begin", "from_tensors"]


def test_each_rank_gets_a_handle_of_its_own(
    engine: sglang.Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def serialize(_: object) -> bytes:
        made.append(b"%d" % len(made))
        return made[-1]

    monkeypatch.setattr(sglang, "serialize", serialize)
    start(engine, model, gpus=2)
    engine.refit(tensors(2))
    assert told(engine) == [("from_tensors", [b"0", b"1"], None)]


@pytest.mark.parametrize("home", ["weight_sync.tensor_bucket", "model_executor.model_runner"])
def test_a_flattened_bucket_is_of_sglangs_own_type_wherever_it_lies(
    engine: sglang.Engine, model: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    class Bucket:
        def __init__(self, *, named_tensors: Any) -> None:
            self.named = named_tensors

        def get_flattened_tensor(self) -> Any:
            return Tensor(sum(tensor.size for _, tensor in self.named), self.named[0][1].where)

        def get_metadata(self) -> Any:
            return [(name, tensor.size) for name, tensor in self.named]

    fake_sglang.install(monkeypatch, {home: {"FlattenedTensorBucket": Bucket}})
    start(engine, model)
    assert engine.refit(tensors(6, 8), "cuda-ipc-flattened") == 14
    ((method, (data,), load_format),) = told(engine)
    assert (method, load_format) == ("from_tensors", "flattened_bucket")
    assert pickle.loads(data) == {  # noqa: S301 - our own
        "flattened_tensor": Tensor(14, "cuda:0"),
        "metadata": [("t0", 6), ("t1", 8)],
    }


@pytest.fixture
def safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes names and sizes."""

    def save_file(given: dict[str, Tensor], path: Path, *, metadata: dict[str, str]) -> None:
        assert metadata == {"format": "pt"}
        assert {tensor.where for tensor in given.values()} <= {"cpu"}
        path.write_text(json.dumps({name: tensor.size for name, tensor in given.items()}))

    package, module = ModuleType("safetensors"), ModuleType("safetensors.torch")
    vars(module)["save_file"] = save_file
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize("takes", [True, False], ids=["taken", "refused"])
def test_a_checkpoint_is_read_while_it_is_there_and_not_left_behind(
    drive: Drive, engine: sglang.Engine, model: Path, takes: bool
) -> None:
    seen = Path(tempfile.gettempdir()) / "seen.json"

    def read(path: str) -> None:
        names = sorted(file.name for file in Path(path).iterdir())
        weights = json.loads((Path(path) / "model.safetensors").read_text())
        config = json.loads((Path(path) / "config.json").read_text())
        seen.write_text(json.dumps([names, weights, config]))
        if not takes:
            raise RuntimeError("SGLang refused the weights: no")

    drive.answers["from_disk"] = read
    start(engine, model)
    if takes:
        assert engine.refit(tensors(6, 8), "disk") == 14
    else:
        with pytest.raises(EngineError, match="refused the weights"):
            engine.refit(tensors(6, 8), "disk")
    names, weights, config = json.loads(seen.read_text())
    assert names == ["config.json", "model.safetensors"]
    assert (weights, config) == ({"t0": 6, "t1": 8}, CONFIG)
    ((_, path),) = told(engine)
    assert not Path(path).exists()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch, torch: Torch) -> list[dict[str, Any]]:
    """SGLang's way to a process group: it waits there for the others."""
    groups: list[dict[str, Any]] = []

    def group(**given: Any) -> str:
        groups.append(given)
        return "the group"

    fake_sglang.install(monkeypatch, {"utils": {"init_custom_process_group": group}})
    torch.gpus = 2
    return groups


def test_weights_are_broadcast_from_a_gpu_that_the_engine_does_not_use(
    torch: Torch, nccl: list[dict[str, Any]], engine: sglang.Engine, model: Path
) -> None:
    start(engine, model)
    torch.done.clear()
    assert engine.refit(tensors(200 * MIB, 200 * MIB, 10), "nccl") == 400 * MIB + 10
    calls = told(engine)
    join, first, second, leave = calls
    _, address, port, size, name = join
    assert (address, size) == ("127.0.0.1", 2)
    assert nccl == [
        {
            "backend": "nccl",
            "init_method": f"tcp://127.0.0.1:{port}",
            "world_size": 2,
            "rank": 0,
            "group_name": name,
        }
    ]
    half = 100 * MIB
    assert first == ("from_group", [("t0", "bfloat16", [half])], name)
    assert second == (*("from_group", [("t1", "bfloat16", [half]), ("t2", "bfloat16", [5])], name),)
    assert leave == ("leave_group", name)
    there = [Tensor(size, "cuda:1") for size in (200 * MIB, 200 * MIB, 10)]
    assert torch.done == [
        *("on cuda:1", (there[0], 0, "the group"), "synchronize cuda:1"),
        *((there[1], 0, "the group"), (there[2], 0, "the group"), "synchronize cuda:1"),
        "destroy the group",
    ]


def test_one_group_is_not_the_next(
    nccl: list[dict[str, Any]], engine: sglang.Engine, model: Path
) -> None:
    start(engine, model)
    for _ in range(2):
        engine.refit(tensors(2), "nccl")
    assert nccl[0]["group_name"] != nccl[1]["group_name"]


@pytest.mark.parametrize(("gpus", "parts"), [(1, 1), (2, 2)])
def test_two_processes_on_one_gpu_are_no_group(
    torch: Torch,
    nccl: list[dict[str, Any]],
    engine: sglang.Engine,
    model: Path,
    gpus: int,
    parts: int,
) -> None:
    torch.gpus = gpus
    start(engine, model, gpus=parts)
    with pytest.raises(EngineError, match="needs a GPU that the engine does not use"):
        engine.refit(tensors(2), "nccl")
    assert (told(engine), nccl) == ([], [])


def test_a_group_is_left_when_weights_are_refused_and_the_next_answer_is_the_next_calls(
    torch: Torch, nccl: list[dict[str, Any]], drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers |= {"from_group": fails, "rpc": lambda _: {"a": "digest"}}
    start(engine, model)
    with pytest.raises(EngineError, match="no such level"):
        engine.refit(tensors(2), "nccl")
    assert engine.digests() == {"a": "digest"}
    assert [call[0] for call in told(engine)] == ["join_group", "from_group", "leave_group", "rpc"]
    assert torch.done[-1] == "destroy the group"
    assert len(nccl) == 1


@pytest.mark.usefixtures("nccl")
def test_a_driver_that_dies_in_a_group_ends_the_refit(
    drive: Drive, engine: sglang.Engine, model: Path
) -> None:
    drive.answers["from_group"] = lambda *_: os._exit(1)
    start(engine, model)
    with pytest.raises(EngineError, match=r"^the engine process ended$"):
        engine.refit(tensors(2), "nccl")


# faults made inside


@pytest.mark.parametrize(
    ("fault", "level", "tags", "made"),
    [
        ("lost-buffer", 2, (WEIGHTS,), ["smoke_lose_buffers"]),
        ("lost-buffer", 2, (WEIGHTS, KV_CACHE), ["smoke_lose_buffers"]),
        ("lost-buffer", 2, (KV_CACHE,), []),
        ("lost-buffer", 1, (WEIGHTS, KV_CACHE), []),
        ("leak-per-cycle", 1, (WEIGHTS, KV_CACHE), ["smoke_leak"]),
        ("leak-per-cycle", 2, (KV_CACHE,), ["smoke_leak"]),
        ("leak-per-cycle", 1, (WEIGHTS,), []),
        ("dropped-tensor", 2, (WEIGHTS, KV_CACHE), []),
    ],
)
def test_a_fault_inside_is_made_at_its_wake(
    engine: sglang.Engine,
    model: Path,
    fault: str,
    level: int,
    tags: tuple[str, ...],
    made: list[str],
) -> None:
    start(engine, model)
    engine.inject(fault)
    engine.sleep(level)
    engine.wake(tags)
    assert told(engine) == [("sleep", level), ("wake", tags), *(("rpc", name) for name in made)]


# the real driver, with an SGLang on disk that is none


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Torch) -> None:
    """A spawned process finds it."""
    del torch
    monkeypatch.syspath_prepend(str(fake_sglang.package(tmp_path / "packages")))
    monkeypatch.setattr(sglang.Engine, "patience", 60.0)


@pytest.mark.usefixtures("package")
def test_the_driver_answers_keeps_off_the_terminal_and_outlives_a_ctrl_c(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = sglang.Engine()
    try:
        start(engine, model, level=2)
        assert (engine.held(), engine.levels, engine.witness) == (5, (2,), False)
        os.kill(engine._process.pid, signal.SIGINT)
        found = engine.generate([[1, 2], [3]], 2)
        assert found == [Completion((2, 3), (-0.5, -0.5)), Completion((1, 2), (-0.5, -0.5))]
        assert found[0].cached == 1
        with pytest.raises(EngineError, match=r"^RuntimeError: 'no prompt'$"):
            engine.generate([], 1)
        with pytest.raises(EngineError, match=r"it has no level 1$"):
            engine.sleep(1)
        assert engine._log.read_text().splitlines() == ["loading", "generating", "generating"]
        process = engine._process
    finally:
        engine.stop()
    assert process.exitcode == 0
    assert (capfd.readouterr(), logs()) == (("", ""), [])


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("killed", "ValueError: The memory capacity is unbalanced."),
        ("raises", r"RuntimeError: and the last one"),
    ],
)
def test_a_driver_whose_engine_does_not_start_says_why(
    tmp_path: Path, kind: str, reason: str
) -> None:
    engine = sglang.Engine()
    with pytest.raises(EngineError) as caught:
        start(engine, folder(tmp_path / kind))
    said = str(caught.value)
    assert said.startswith("SGLang did not start: ")
    # The one that raises may have told it before its traceback is in the log, or behind.
    assert said.endswith(reason) or (kind == "raises" and "one line" in said)
    assert logs() == []
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("package")
def test_a_driver_that_dies_in_a_call_is_told(model: Path) -> None:
    engine = sglang.Engine()
    start(engine, model)
    with pytest.raises(EngineError, match=r"^the engine process ended$"):
        engine.reset_prefix_cache()
    engine.stop()
    assert logs() == []


def test_a_driver_dies_with_the_trainer_that_started_it(tmp_path: Path) -> None:
    from rollout.backends.vllm import _running

    package = fake_sglang.package(tmp_path)
    code = (
        "import multiprocessing, os, time; from rollout.backends.sglang_worker import drive;"
        " context = multiprocessing.get_context('spawn'); ours, theirs = context.Pipe();"
        f" given = (theirs, {{'model_path': '/m'}}, {str(tmp_path / 'log')!r}, os.getpid());"
        " process = context.Process(target=drive, args=given); process.start();"
        " facts = ours.recv(); print(process.pid, facts['held'], flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT / 'entrypoints'}:{package}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    with trainer.stdout:
        process, held = map(int, trainer.stdout.readline().split())
        assert held == 5
        assert _running(process)
        trainer.kill()
        trainer.wait()
    end = time.monotonic() + 10
    while _running(process) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _running(process)


# SGLang's own server, which is none


class Scheduler:
    """What is behind SGLang's HTTP server, at its worst: busy, unforgiving, and slow to end."""

    def __init__(self, site: Site, *, old: bool = False) -> None:
        self.old = old
        self.servers: list[Played] = []
        self.busy = 0  # so many times it refuses to flush
        self.asleep: set[str] = set()
        self.dead = ""
        self.updates: Any = (200, {"success": True, "message": "Success"})
        self.aborted: dict[str, threading.Event] = {}
        self.forgets = False  # an abort
        self.short = 0  # tokens after which it ends an answer by itself
        self.breaks = 0  # tokens after which it reports an error
        site.routes |= {
            "/health": lambda _: (200, ""),
            "/health_generate": lambda _: (200, ""),
            "/generate": self.generate,
            "/abort_request": self.abort,
            "/flush_cache": self.flush,
            "/release_memory_occupation": self.release,
            "/resume_memory_occupation": self.resume,
            "/update_weights_from_tensor": lambda _: self.updates,
            "/update_weights_from_disk": self.load,
            "/get_server_info": lambda _: (200, self.info),
        }
        self.info: dict[str, Any] = {"model_path": "/model", "tp_size": 2, "load_format": "dummy"}
        self.loaded: list[tuple[dict[str, Any], list[str]]] = []
        self.paused = False
        if not old:
            site.routes |= {
                "/server_info": lambda _: (200, self.info | {"pp_size": 2}),
                "/pause_generation": self.pause,
                "/continue_generation": self.go_on,
            }

    def load(self, body: Any) -> Any:
        if self.busy >= 0:
            self.dead = "it was not idle"
        self.loaded.append((body, sorted(path.name for path in Path(body["model_path"]).iterdir())))
        return self.updates

    def pause(self, body: Any) -> Any:
        if body is None:
            return 405, {"detail": "Method Not Allowed"}
        self.paused = True
        for event in self.aborted.values():
            event.set()
        return 200, {"message": "Generation paused successfully.", "status": "ok"}

    def go_on(self, _: Any) -> Any:
        self.paused = False
        return 200, {"message": "Generation continued successfully.", "status": "ok"}

    def output(self, prompt: list[int], count: int) -> dict[str, Any]:
        chosen = [[-0.5 * place, sum(prompt) + place, None] for place in range(count)]
        meta = {"output_token_logprobs": chosen, "cached_tokens": 2, "finish_reason": None}
        return {"output_ids": [token for _, token, _ in chosen], "meta_info": meta}

    def generate(self, body: Any) -> Any:
        asked = body["sampling_params"]
        assert body["return_logprob"] is True
        assert (asked["temperature"], asked["ignore_eos"]) == (0.0, True)
        if body.get("stream"):
            return self.stream(body, asked["max_new_tokens"])
        assert all(isinstance(prompt, list) for prompt in body["input_ids"])
        return 200, [self.output(prompt, asked["max_new_tokens"]) for prompt in body["input_ids"]]

    def stream(self, body: Any, tokens: int) -> Iterator[Any]:
        aborted = self.aborted.setdefault(body["rid"], threading.Event())
        for count in range(1, tokens + 1):
            if self.breaks and count > self.breaks:
                yield {"error": {"message": "out of vocabulary"}}
                return
            yield self.output(body["input_ids"], count)
            if count == self.short:
                return
            if aborted.wait(0.002):
                if not self.forgets:  # the last word has a token more, and the reason
                    last = self.output(body["input_ids"], count + 1)
                    last["meta_info"]["finish_reason"] = {"type": "abort"}
                    yield last
                return

    def abort(self, body: Any) -> Any:
        self.aborted.setdefault(body["rid"], threading.Event()).set()
        return 200, ""

    def flush(self, _: Any) -> Any:
        self.busy -= 1
        if self.busy >= 0:
            return 400, "Cache flushed.\nPlease check backend logs for more details.\n"
        return 200, "Cache flushed.\nPlease check backend logs for more details.\n"

    def tags(self, body: Any) -> set[str]:
        assert not (self.old and "tags" in body), "unknown then, and silently left out"
        return set(body.get("tags") or ("kv_cache", "weights"))

    def release(self, body: Any) -> Any:
        if self.busy >= 0:
            self.dead = "it was not idle"
        self.asleep |= self.tags(body)
        return 200, "null"

    def resume(self, body: Any) -> Any:
        for tag in self.tags(body):
            if tag not in self.asleep:
                self.dead = f"{tag} was awake"
            self.asleep.discard(tag)
        return 200, "null"


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["newer", "0.4.6"])
def scheduler(
    request: pytest.FixtureRequest, site: Site, monkeypatch: pytest.MonkeyPatch, torch: Torch
) -> Scheduler:
    """A machine with SGLang, of either kind, whose server stands already."""
    del torch
    old = bool(request.param)
    fake_sglang.install(
        monkeypatch,
        {
            "server_args": fake_sglang.server_args(old=old),
            "managers.io_struct": fake_sglang.io_struct(old=old),
        },
    )
    made = Scheduler(site, old=old)
    monkeypatch.setattr(sglang, "Http", played(site, made.servers))
    monkeypatch.setattr(sglang, "IDLE", 0.2)
    monkeypatch.setattr(served, "TIMEOUT", 10.0)
    return made


@pytest.fixture
def web(scheduler: Scheduler, model: Path) -> Iterator[sglang.Server]:
    """A started server, for the deepest level."""
    del scheduler
    made = sglang.Server()
    made.start(model, dummy=True, level=2)
    yield made
    made.stop()


def test_a_server_is_started_with_what_its_version_knows(
    scheduler: Scheduler, site: Site, model: Path
) -> None:
    server = sglang.Server()
    server.start(model, dummy=True, level=1, gpus=2)
    (http,) = scheduler.servers
    assert http.argv[:3] == ["--model-path", str(model), "--skip-tokenizer-init"]
    assert http.argv[http.argv.index("--tp-size") + 1] == "2"
    assert ("--enable-weights-cpu-backup" in http.argv) is not scheduler.old
    assert ("--nccl-port" in http.argv) is not scheduler.old
    assert http.variables == {}
    asked = ["/pause_generation", "/server_info", *(["/get_server_info"] if scheduler.old else [])]
    asked.insert(1, sglang.BEGIN)
    assert site.paths() == ["/health", "/health_generate", *asked]
    assert not scheduler.paused, "asked whether it is there, and not for it"
    assert server.pauses is not scheduler.old
    assert server.levels == ((2,) if scheduler.old else (1,))
    assert (server.witness, server.held()) == (False, 2 * KV_BYTES)
    assert logs() == [http.log.name]
    server.stop()
    assert (http.ended, logs()) == (1, [])
    server.stop()
    assert http.ended == 1


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("ValueError: no such model", "the server ended: ValueError: no such model"),
        ("no command", "rollout"),
    ],
)
def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    scheduler: Scheduler, model: Path, monkeypatch: pytest.MonkeyPatch, fails: str, reason: str
) -> None:
    monkeypatch.setattr(Played, "fails", fails)
    server = sglang.Server()
    with pytest.raises(EngineError) as caught:
        server.start(model, dummy=True)
    assert str(caught.value) == f"SGLang's server did not start: {reason}"
    assert [http.ended for http in scheduler.servers] == ([] if fails == "no command" else [1])
    assert logs() == []
    with pytest.raises(EngineError, match="not started"):
        server.generate([[1]], 1)


@pytest.mark.parametrize("call", [call for call in CALLS if call not in CALLS[6:]])
@pytest.mark.usefixtures("torch")
def test_a_server_that_is_not_started_answers_nothing(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(sglang, "IDLE", 0.0)
    server = sglang.Server()
    server.levels, server._asleep = (1,), {WEIGHTS}
    with pytest.raises(EngineError, match=r"^the engine is not started$"):
        call(server)


def test_a_server_answers_with_tokens_and_their_log_probabilities(
    web: sglang.Server, site: Site
) -> None:
    found = web.generate([(1, 2), (3,)], 2)
    assert found == [Completion((3, 4), (0.0, -0.5)), Completion((3, 4), (0.0, -0.5))]
    assert found[0].cached == 2
    (body,) = site.bodies("/generate")
    assert body["input_ids"] == [[1, 2], [3]]
    assert body["sampling_params"]["max_new_tokens"] == 2


def test_rollouts_of_a_server_are_aborted_by_name_and_kept(
    web: sglang.Server, scheduler: Scheduler, site: Site
) -> None:
    found = web.interrupt([(1, 2), (10,), (20, 1)], 500, 4)
    assert [part.tokens[:2] for part in found] == [(3, 4), (10, 11), (21, 22)]
    assert all(4 < len(part.tokens) < 500 for part in found), "and the last word is taken"
    asked = [body["rid"] for body in site.bodies("/generate")]
    assert sorted(body["rid"] for body in site.bodies("/abort_request")) == sorted(asked)
    assert len(set(asked)) == 3
    assert all(event.is_set() for event in scheduler.aborted.values())


def test_rollouts_of_a_server_are_stopped_by_a_pause_of_all_that_runs(
    web: sglang.Server, scheduler: Scheduler, site: Site
) -> None:
    if scheduler.old:
        with pytest.raises(EngineError, match="answered /pause_generation with 404"):
            web.halt([(1, 2)], 500, 4)
        return
    found = web.halt([(1, 2), (10,)], 500, 4)
    assert [part.tokens[:2] for part in found] == [(3, 4), (10, 11)]
    assert all(4 < len(part.tokens) < 500 for part in found)
    assert site.bodies("/pause_generation")[-1] == {}
    assert site.bodies("/abort_request") == []
    assert scheduler.paused
    web.resume()
    assert (scheduler.paused, site.bodies("/continue_generation")) == (False, [{}])


def test_a_server_says_what_a_trainer_reads_of_it(web: sglang.Server, scheduler: Scheduler) -> None:
    """slime takes the number of GPUs from it, and refuses an engine that has another."""
    assert web.about() == {"model": "/model", "gpus": 2 if scheduler.old else 4}
    info = "/get_server_info" if scheduler.old else "/server_info"
    assert web.endpoints() == sorted(["/health", "/health_generate", info])


def test_a_server_reads_a_checkpoint_and_not_dummy_weights(
    web: sglang.Server, scheduler: Scheduler, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: object, started: Path, folder: Path) -> int:
        assert started == model, "the config of a checkpoint is the model's"
        return (folder / "x").write_text("four")

    monkeypatch.setattr(sglang, "write", write)
    scheduler.busy = 2
    assert web.refit(tensors(4), "disk") == 4
    ((body, files),) = scheduler.loaded
    assert (body["load_format"], files) == ("auto", ["x"])
    assert not Path(body["model_path"]).exists(), "and it is gone when it has been read"
    assert scheduler.dead == ""
    scheduler.updates = (200, {"success": False, "message": "no such file"})
    with pytest.raises(EngineError, match=r"^SGLang refused the weights: no such file$"):
        web.refit(tensors(4), "disk")


def test_a_server_offers_no_transport_that_it_is_not_driven_by(web: sglang.Server) -> None:
    assert web.transports == ("cuda-ipc", "cuda-ipc-flattened", "disk")
    with pytest.raises(EngineError, match="by no NCCL"):
        web.refit(tensors(2), "nccl")


def test_a_server_may_end_an_aborted_answer_without_a_last_word(
    web: sglang.Server, scheduler: Scheduler
) -> None:
    scheduler.forgets = True
    assert all(len(part.tokens) >= 4 for part in web.interrupt([(1, 2), (10,)], 500, 4))


def test_an_answer_that_ends_early_or_with_an_error_is_told(
    web: sglang.Server, scheduler: Scheduler
) -> None:
    scheduler.short = 3
    with pytest.raises(EngineError, match="before it had 4 tokens"):
        web.interrupt([(1, 2), (10,)], 500, 4)
    scheduler.short, scheduler.breaks = 0, 2
    with pytest.raises(EngineError, match="the server ended an answer: "):
        web.interrupt([(1, 2), (10,)], 500, 4)


def test_a_cache_is_emptied_as_soon_as_the_server_is_idle(
    web: sglang.Server, scheduler: Scheduler, site: Site
) -> None:
    scheduler.busy = 2
    web.reset_prefix_cache()
    assert site.bodies("/flush_cache") == [{}, {}, {}]


def test_a_server_that_is_never_idle_is_an_error(
    web: sglang.Server, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "IDLE", 0.03)
    scheduler.busy = 1 << 20
    with pytest.raises(EngineError, match="answered /flush_cache with 400: Cache flushed"):
        web.reset_prefix_cache()
    with pytest.raises(EngineError, match="/flush_cache"):
        web.sleep(2)
    assert scheduler.asleep == set(), "it would have ended the scheduler"


def test_a_server_sleeps_when_it_is_idle_and_wakes_by_tags_where_it_knows_them(
    web: sglang.Server, scheduler: Scheduler, site: Site
) -> None:
    scheduler.busy = 1
    web.sleep(2)
    assert scheduler.asleep == {WEIGHTS, KV_CACHE}
    web.wake((WEIGHTS,))
    assert scheduler.asleep == (set() if scheduler.old else {KV_CACHE})
    web.wake((WEIGHTS, KV_CACHE))
    assert scheduler.asleep == set()
    web.wake((KV_CACHE,))
    assert scheduler.dead == "", "what is awake is not woken again"
    resumed = site.bodies("/resume_memory_occupation")
    assert resumed == ([{}] if scheduler.old else [{"tags": [WEIGHTS]}, {"tags": [KV_CACHE]}])


def test_a_server_wakes_as_a_whole_too(web: sglang.Server, scheduler: Scheduler) -> None:
    web.sleep(2)
    web.wake((WEIGHTS, KV_CACHE))
    assert (scheduler.asleep, scheduler.dead) == (set(), "")


def test_a_server_that_starts_again_is_awake(
    web: sglang.Server, scheduler: Scheduler, model: Path, site: Site
) -> None:
    web.sleep(2)
    web.stop()
    scheduler.asleep.clear()
    web.start(model, dummy=True, level=2)
    web.wake((WEIGHTS,))
    assert site.bodies("/resume_memory_occupation") == []


def test_a_server_is_not_asked_for_a_sleep_that_it_was_not_started_for(
    web: sglang.Server, site: Site
) -> None:
    with pytest.raises(EngineError, match="not started for sleep of level 1"):
        web.sleep(1)
    assert "/release_memory_occupation" not in site.paths()


def test_weights_are_posted_as_handles_in_words(web: sglang.Server, site: Site) -> None:
    assert web.refit(tensors(200 * MIB, 200 * MIB)) == 400 * MIB
    bodies = site.bodies("/update_weights_from_tensor")
    assert len(bodies) == 2
    for number, body in enumerate(bodies):
        (data,) = body["serialized_named_tensors"]
        sent = pickle.loads(base64.b64decode(data))  # noqa: S301 - our own
        assert sent == [(f"t{number}", Tensor(200 * MIB, "cuda:0"))]
        assert (body["load_format"], body["flush_cache"]) == (None, False)
    assert web.held() == KV_BYTES + 400 * MIB


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (200, "SGLang refused the weights: no such tensor"),
        (400, "the server answered /update_weights_from_tensor with 400: "),
    ],
)
def test_weights_that_a_server_refuses_are_an_error(
    web: sglang.Server, scheduler: Scheduler, status: int, reason: str
) -> None:
    scheduler.updates = (status, {"success": False, "message": "no such tensor"})
    with pytest.raises(EngineError) as caught:
        web.refit(tensors(2))
    assert str(caught.value).startswith(reason)
    assert "no such tensor" in str(caught.value)
    assert web.held() == KV_BYTES


def test_a_server_gives_no_digests(web: sglang.Server) -> None:
    with pytest.raises(EngineError, match="gives no digests"):
        web.digests()

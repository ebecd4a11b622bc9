"""vLLM and SGLang for long sequences: what they are started with, and what they count.

Neither is here: what answers in their place does what their sources say.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import probe
from rollout.backends import EngineError, long_sglang, long_vllm, sglang, sglang_worker, vllm

from . import fake_sglang

GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of the probe that a GPU is given, with no weights in it."""
    config = probe.config("1b") | {"max_position_embeddings": long_vllm.LONGEST}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def options(model: Path, fault: str = "") -> dict[str, Any]:
    return long_vllm.arguments(model, 141 * GIB, dummy=True, longest=long_vllm.LONGEST, fault=fault)


# vLLM


def test_vllm_is_started_as_for_every_check_but_for_lengths_its_cache_and_its_counts(
    model: Path,
) -> None:
    usual, given = vllm.arguments(model, 141 * GIB, dummy=True, fp8=False), options(model)
    changed = {name: value for name, value in given.items() if usual.get(name) != value}
    assert changed == {
        "max_model_len": 16384,
        "kv_cache_memory_bytes": 20480 * 8192,  # 2 layers, 8 heads of 128, keys and values
        "disable_log_stats": False,
        "worker_extension_cls": "rollout.backends.long_vllm_extension.Extension",
    }
    assert given["max_num_batched_tokens"] == long_vllm.CHUNK < given["max_model_len"]
    assert usual.keys() <= given.keys()


def test_its_worker_extension_is_a_class_that_exists_and_has_all_methods_of_the_other(
    model: Path,
) -> None:
    module, _, cls = options(model)["worker_extension_cls"].rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    for method in ("smoke_follow", "smoke_refit", "smoke_capacity", "smoke_spoil_rotary"):
        assert callable(getattr(found, method))


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 8192), ({"num_key_value_heads": None}, 32768), ({"head_dim": None}, 8192)],
)
def test_a_token_takes_keys_and_values_of_every_layer(changes: dict[str, Any], size: int) -> None:
    config = {k: v for k, v in (probe.config("1b") | changes).items() if v is not None}
    assert long_vllm.token_bytes(config) == size


def test_a_halved_window_is_told_to_vllm_as_its_model(model: Path) -> None:
    found = options(model, "halved-window")
    assert found["hf_overrides"] == {
        "layer_types": ["sliding_attention", "sliding_attention"],
        "sliding_window": 8192,
    }
    assert "hf_overrides" not in options(model, "frozen-rotary")


def metric(name: str, value: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=value)


def test_preemptions_are_counted_over_all_of_vllms_engines() -> None:
    found = [metric("vllm:num_preemptions", 2.0), metric("vllm:num_preemptions", 1)]
    other = [metric("vllm:prompt_tokens", 99)]
    assert long_vllm.counted([*found, *other]) == 3
    with pytest.raises(EngineError, match="have no 'vllm:num_preemptions'"):
        long_vllm.counted(other)


class Llm:
    """Answers as it is told."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[tuple[Any, ...]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((method, *args))
        return [{"smoke_capacity": 20464}.get(method, 0)]

    def get_metrics(self) -> list[Any]:
        return [metric("vllm:num_preemptions", 5)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Llm]]:
    """A machine with vLLM and one GPU; the engines that were started."""
    found: list[Llm] = []

    def start(**options: Any) -> Llm:
        found.append(Llm(**options))
        return found[-1]

    cuda = SimpleNamespace(
        get_device_name=lambda: "a GPU",
        current_device=lambda: 0,
        mem_get_info=lambda _: (30 * GIB, 80 * GIB),
    )
    modules = {
        "vllm": {"LLM": start},
        "torch": {"cuda": cuda, "device": lambda kind, index: (kind, index)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    takes(monkeypatch)
    for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "ERROR")
    yield found


def takes(monkeypatch: pytest.MonkeyPatch, *lacking: str) -> None:
    """Let this vLLM be one that has all arguments but these."""
    usual = vllm.arguments(Path("/m"), GIB, dummy=True, fp8=True)
    names = [*usual, "disable_log_stats", "num_gpu_blocks_override"]
    module = ModuleType("vllm.engine.arg_utils")
    kept = [name for name in names if name not in lacking]
    vars(module)["EngineArgs"] = dataclasses.make_dataclass("EngineArgs", kept)
    monkeypatch.setitem(sys.modules, "vllm.engine", ModuleType("vllm.engine"))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)


def test_vllm_tells_what_its_cache_holds_and_whom_it_preempted(
    made: list[Llm], model: Path
) -> None:
    engine = long_vllm.Engine()
    engine.start(model, dummy=True, level=2)
    assert (engine.capacity(), engine.preemptions()) == (20464, 5)
    assert "num_gpu_blocks_override" not in made[0].options
    assert not any(call[0] == "smoke_spoil_rotary" for call in made[0].calls)
    engine.stop()


@pytest.mark.parametrize(("fault", "place"), [("frozen-rotary", 4096), ("shifted-chunk", 2048)])
def test_a_fault_of_rotations_is_made_in_vllms_worker(
    made: list[Llm], model: Path, fault: str, place: int
) -> None:
    engine = long_vllm.Engine()
    engine.inject(fault)
    engine.start(model, dummy=True)
    assert ("smoke_spoil_rotary", fault, place) in made[0].calls
    engine.stop()


def test_an_older_vllm_is_told_its_cache_in_blocks(
    made: list[Llm], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(monkeypatch, "kv_cache_memory_bytes")
    engine = long_vllm.Engine()
    engine.start(model, dummy=True)
    assert made[0].options["num_gpu_blocks_override"] == 20480 // 16
    engine.stop()


@pytest.mark.usefixtures("made")
def test_a_vllm_that_counts_nothing_is_not_started(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(monkeypatch, "disable_log_stats")
    with pytest.raises(EngineError, match="has no argument 'disable_log_stats'"):
        long_vllm.Engine().start(model, dummy=True)


@pytest.mark.usefixtures("made")
def test_vllm_is_started_so_on_one_gpu_in_bfloat16(model: Path) -> None:
    for given in ({"fp8": True}, {"gpus": 2}):
        with pytest.raises(EngineError, match="in bfloat16 on one GPU"):
            long_vllm.Engine().start(model, dummy=True, **given)  # type: ignore[arg-type]


def test_the_worker_counts_tokens_by_blocks() -> None:
    from rollout.backends import long_vllm_extension

    cache = SimpleNamespace(num_gpu_blocks=1279, block_size=16)
    worker: Any = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
    assert long_vllm_extension.Extension.smoke_capacity(worker) == 20464


# SGLang


def test_sglang_is_started_as_for_every_check_but_for_lengths_and_its_cache(model: Path) -> None:
    usual = sglang.arguments(model, dummy=True, level=2, gpus=1)
    given = long_sglang.arguments(model, dummy=True, level=2, longest=16384)
    changed = {name: value for name, value in given.items() if usual.get(name) != value}
    assert changed == {
        "max_total_tokens": 20480,
        "context_length": 16384,
        "chunked_prefill_size": 2048,
        "schedule_conservativeness": 0.05,
    }
    assert usual.keys() <= given.keys()


class Batch:
    """SGLang's batch, of a newer version that returns three things or an older one of two."""

    def __init__(self, *found: Any) -> None:
        self.found = found

    def retract_decode(self, server_args: Any) -> Any:
        assert server_args == "arguments"
        return self.found


def test_retracted_requests_are_counted_and_everything_is_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_sglang.Count, "retracted", 0)
    counted = long_sglang.counting(Batch.retract_decode)
    assert counted(Batch(["a", "b"], 0.5), "arguments") == (["a", "b"], 0.5)
    assert counted(Batch(["c"], 0.5, []), server_args="arguments") == (["c"], 0.5, [])
    assert long_sglang.Count.retracted == 3


def test_sglangs_scheduler_runs_with_our_methods_and_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Scheduler:
        max_total_num_tokens = 20480

    ran: list[Any] = []
    batch = type("ScheduleBatch", (), {"retract_decode": lambda *_: (["a"], 1.0)})
    fake_sglang.install(
        monkeypatch,
        {
            "managers.scheduler": {
                "Scheduler": Scheduler,
                "run_scheduler_process": lambda *given, **_: ran.append(given),
            },
            "managers.schedule_batch": {"ScheduleBatch": batch},
        },
    )
    monkeypatch.setattr(sglang_worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(sglang_worker, "_rank", lambda: 0)
    monkeypatch.setattr(long_sglang.Count, "retracted", 0)
    long_sglang.schedule("server_args", gpu_id=0)
    assert ran == [("server_args",)]
    scheduler: Any = Scheduler()
    batch().retract_decode("arguments")  # type: ignore[attr-defined]
    answers = {}
    for method in ("smoke_capacity", "smoke_retractions"):
        path = tmp_path / method
        getattr(scheduler, method)(path=str(path))
        answers[method] = json.loads(path.read_text())
        getattr(scheduler, method)({"path": str(path)})  # as older ones call it
    assert answers == {"smoke_capacity": 20480, "smoke_retractions": 1}
    spoilt: list[Any] = []
    monkeypatch.setattr(long_sglang.rotary, "spoil", lambda *given: spoilt.append(given[1:]))
    monkeypatch.setattr(sglang_worker, "_runner", lambda _: SimpleNamespace(model="model"))
    for method in long_sglang.FAULTS.values():
        getattr(scheduler, method)(path=str(tmp_path / method))
    assert spoilt == [("frozen-rotary", 4096), ("shifted-chunk", 2048)]


def test_the_driver_starts_the_scheduler_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sglang_worker, "schedule", sglang_worker.schedule)  # put back behind it
    monkeypatch.setattr(
        sglang_worker, "drive", lambda *given: seen.append((sglang_worker.schedule, given))
    )
    pipe: Any = "pipe"
    long_sglang.drive(pipe, {"a": 1}, "log", 7)
    assert seen == [(long_sglang.schedule, ("pipe", {"a": 1}, "log", 7))]

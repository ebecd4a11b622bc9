"""What the trainer's side of vLLM promises: verl's settings, and an end to every call.

vLLM and torch are not here: what answers in their place does what the real ones do at their worst.
"""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import cuda_ipc
from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError, vllm
from rollout.transport import TransportError

GIB = 1 << 30
MODEL = Path("/model")

# what it is started with


def test_it_is_started_as_a_trainer_starts_it() -> None:
    options = vllm.arguments(MODEL, 141 * GIB, dummy=True, fp8=False)
    assert options["model"] == "/model"
    assert options["load_format"] == "dummy"
    assert options["enable_sleep_mode"] is True
    assert options["enable_prefix_caching"] is True
    assert options["dtype"] == "bfloat16"
    assert "enforce_eager" not in options, "CUDA graphs are what a trainer uses"
    assert vllm.arguments(MODEL, GIB, dummy=False, fp8=False)["load_format"] == "auto"


def test_its_worker_extension_is_a_class_that_exists() -> None:
    name = vllm.arguments(MODEL, GIB, dummy=True, fp8=False)["worker_extension_cls"]
    module, _, cls = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), cls), type)


def test_fp8_adds_how_weights_are_quantised_and_nothing_else() -> None:
    plain = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=False)
    fp8 = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=True)
    assert "quantization" not in plain
    added = {key: value for key, value in fp8.items() if plain.get(key) != value}
    assert added.keys() == {"quantization", "hf_overrides"}
    assert added["quantization"] == "fp8"
    config = added["hf_overrides"]["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])


@pytest.mark.parametrize("total", [4, 8, 16, 24, 80, 141, 288])
def test_its_share_of_a_gpu_is_at_most_nine_tenths_and_holds_the_cache(total: int) -> None:
    options = vllm.arguments(MODEL, total * GIB, dummy=True, fp8=False)
    share = options["gpu_memory_utilization"]
    assert 0 < share <= 0.9
    if total >= 16:
        assert share * total * GIB > 2 * options["kv_cache_memory_bytes"]
    assert options["kv_cache_memory_bytes"] == vllm.KV_BYTES


# a vLLM that is none


class Llm:
    """Answers as it is told; its engine process sleeps."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {"smoke_held": 7, "reset_prefix_cache": True}
        self.broken: Exception | None = None  # what its start raises
        code = "import time; time.sleep(600)"
        self.process = subprocess.Popen([sys.executable, "-c", code])
        self.answers["smoke_follow"] = self.process.pid
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=lambda: self.answer("shutdown"))
        )

    def __call__(self, **options: Any) -> Llm:
        self.options = options
        if self.broken:
            raise self.broken
        return self

    def answer(self, name: str, *arguments: Any) -> Any:
        self.calls.append((name, *arguments))
        found = self.answers.get(name)
        if isinstance(found, Exception):
            raise found
        return found() if callable(found) else found

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [self.answer(method, *args)]

    def generate(self, prompts: Any, parameters: Any, *, use_tqdm: bool) -> Any:
        assert use_tqdm is False
        return self.answer("generate", prompts, parameters)

    def sleep(self, level: int) -> Any:
        return self.answer("sleep", level)

    def wake_up(self, tags: list[str]) -> Any:
        return self.answer("wake_up", tags)

    def reset_prefix_cache(self) -> Any:
        return self.answer("reset_prefix_cache")


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Llm]:
    """A machine with vLLM and one GPU."""
    fake, torch, made = ModuleType("vllm"), ModuleType("torch"), Llm()
    vars(fake).update(LLM=made, SamplingParams=lambda **settings: settings)
    cuda = SimpleNamespace(
        get_device_name=lambda: "a GPU",
        current_device=lambda: 0,
        mem_get_info=lambda _: (30 * GIB, 80 * GIB),
        empty_cache=lambda: None,
    )
    vars(torch).update(cuda=cuda, device=lambda kind, index: (kind, index))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # the engine sets it where nobody did
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def engine(llm: Llm) -> Iterator[vllm.Engine]:
    """A started engine."""
    made = vllm.Engine()
    made.start(MODEL, dummy=True)
    llm.calls.clear()
    yield made
    made.stop()


def test_it_starts_on_what_this_gpu_has(llm: Llm) -> None:
    engine = vllm.Engine()
    engine.start(MODEL, dummy=True, fp8=True)
    assert llm.options == vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=True)
    assert (engine.device, engine.transports) == ("a GPU", ("cuda-ipc",))
    assert (engine.held(), engine.memory()) == (7, 50 * GIB)
    assert [call[0] for call in llm.calls] == ["smoke_follow", "smoke_held"]
    engine.stop()


def test_an_engine_that_does_not_start_says_why(llm: Llm) -> None:
    llm.broken = ValueError("no GPU memory")
    engine = vllm.Engine()
    with pytest.raises(EngineError, match=r"^vLLM did not start: no GPU memory$"):
        engine.start(MODEL, dummy=True)
    engine.stop()


@pytest.mark.usefixtures("llm")
def test_an_engine_that_is_not_started_answers_nothing() -> None:
    engine = vllm.Engine()
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate([[1]], 1),
        lambda: engine.sleep(1),
        lambda: engine.wake((WEIGHTS,)),
        lambda: engine.refit([]),
        engine.reset_prefix_cache,
        engine.digests,
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"^the engine is not started$"):
            call()


def test_tokens_are_asked_for_greedily_and_come_with_their_log_probabilities(
    llm: Llm, engine: vllm.Engine
) -> None:
    def found(logprob: float) -> SimpleNamespace:
        return SimpleNamespace(logprob=logprob)

    # A step may name more tokens than the one that was chosen.
    steps = [{5: found(-0.5), 9: found(-0.1)}, {6: found(-0.25)}]
    output = SimpleNamespace(token_ids=[5, 6], logprobs=steps)
    llm.answers["generate"] = [SimpleNamespace(outputs=[output])]
    assert engine.generate([(1, 2)], 2) == [Completion((5, 6), (-0.5, -0.25))]
    ((_, prompts, settings),) = llm.calls
    assert prompts == [{"prompt_token_ids": [1, 2]}]
    assert settings["max_tokens"] == 2
    assert settings["temperature"] == 0.0
    assert settings["ignore_eos"] is True


# what goes wrong


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("out of memory", "RuntimeError: out of memory"),
        ("Traceback\n  of many lines\n\nlast words\n\n", "RuntimeError: last words"),
        ("", "RuntimeError: "),
    ],
)
def test_what_the_engine_raises_is_told_by_its_last_line(
    llm: Llm, engine: vllm.Engine, text: str, sentence: str
) -> None:
    llm.answers["sleep"] = RuntimeError(text)
    with pytest.raises(EngineError) as caught:
        engine.sleep(1)
    assert str(caught.value) == sentence
    llm.answers["sleep"] = None
    engine.sleep(1)  # the next call is made as if nothing had been


def test_an_engine_process_that_dies_ends_the_call_that_waits_for_it(
    llm: Llm, engine: vllm.Engine
) -> None:
    hangs = threading.Event()

    def dies() -> None:
        llm.process.kill()
        hangs.wait(60)

    llm.answers["sleep"] = dies
    try:
        with pytest.raises(EngineError, match=r"^the engine process ended$"):
            engine.sleep(1)
    finally:
        hangs.set()


def test_an_engine_that_lives_and_says_nothing_counts_as_hung(
    llm: Llm, engine: vllm.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    llm.answers["sleep"] = lambda: hangs.wait(60)
    monkeypatch.setattr(vllm.Engine._result, "__defaults__", (0.4,))
    try:
        with pytest.raises(EngineError, match=r"^the engine did not answer for 0 s$"):
            engine.sleep(1)
    finally:
        hangs.set()


def test_a_prefix_cache_that_is_not_reset_is_an_error(llm: Llm, engine: vllm.Engine) -> None:
    engine.reset_prefix_cache()
    llm.answers["reset_prefix_cache"] = None  # older versions say nothing
    engine.reset_prefix_cache()
    llm.answers["reset_prefix_cache"] = False
    with pytest.raises(EngineError, match="refused to reset its prefix cache"):
        engine.reset_prefix_cache()


# the end


@pytest.mark.parametrize("shutdown", [None, RuntimeError("already dead")])
def test_stopping_is_harmless_twice_and_leaves_no_process(
    llm: Llm, engine: vllm.Engine, shutdown: Exception | None
) -> None:
    llm.answers["shutdown"] = shutdown  # which the process outlives
    engine.stop()
    assert llm.process.wait(10) == -9
    engine.stop()
    assert [call[0] for call in llm.calls] == ["shutdown"]
    with pytest.raises(EngineError, match="not started"):
        engine.sleep(1)


def test_a_process_that_shuts_down_is_not_killed(llm: Llm, engine: vllm.Engine) -> None:
    def shutdown() -> None:
        llm.process.terminate()
        llm.process.wait(10)

    llm.answers["shutdown"] = shutdown
    engine.stop()
    assert llm.process.returncode == -15


def test_an_engine_starts_again_after_it_was_stopped(llm: Llm, engine: vllm.Engine) -> None:
    engine.stop()
    llm.process.wait(10)
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        llm.answers["smoke_follow"] = second.pid
        engine.start(MODEL, dummy=True, fp8=True)
        engine.sleep(1)
        engine.stop()
        assert second.wait(10) == -9
    finally:
        second.kill()
        second.wait()


@pytest.mark.usefixtures("llm")
def test_what_an_interrupted_start_has_begun_does_not_outlive_the_proof() -> None:
    begun = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    begun.start()
    vllm.Engine().stop()
    assert begun.exitcode == -9


@pytest.mark.usefixtures("llm")
def test_an_engine_that_never_started_is_stopped_too() -> None:
    vllm.Engine().stop()


def test_a_process_that_only_waits_to_be_collected_is_not_running(llm: Llm) -> None:
    import os

    assert vllm._running(llm.process.pid)
    llm.process.kill()
    os.waitid(os.P_PID, llm.process.pid, os.WEXITED | os.WNOWAIT)
    assert not vllm._running(llm.process.pid)
    llm.process.wait()
    assert not vllm._running(llm.process.pid)


# a refit

Send = Callable[[Any, str, Any, Callable[[], None]], int]


@pytest.fixture
def sends(monkeypatch: pytest.MonkeyPatch) -> Callable[[Send], None]:
    """Puts a function in the place of the transport."""
    return lambda function: monkeypatch.setattr(cuda_ipc, "send", function)


def test_weights_are_sent_while_the_engine_takes_them(
    llm: Llm, engine: vllm.Engine, sends: Callable[[Send], None]
) -> None:
    begun, sent = threading.Event(), threading.Event()

    def takes() -> None:
        begun.set()
        assert sent.wait(10)

    def send(tensors: Any, address: str, device: Any, alive: Callable[[], None]) -> int:
        assert begun.wait(10)
        alive()
        assert Path(address.removeprefix("ipc://")).parent.is_dir()
        assert (list(tensors), device) == ([("a", 1)], ("cuda", 0))
        sent.set()
        return 99

    llm.answers["smoke_refit"] = takes
    sends(send)
    assert engine.refit([("a", 1)]) == 99  # type: ignore[list-item]
    ((method, address),) = llm.calls
    assert method == "smoke_refit"
    assert not Path(address.removeprefix("ipc://")).parent.exists()


def waits(_: Any, __: str, ___: Any, alive: Callable[[], None]) -> int:
    """A trainer to whom nobody answers."""
    import time

    end = time.monotonic() + 10
    while time.monotonic() < end:
        alive()
        time.sleep(0.01)
    raise AssertionError("the trainer still waits")


def test_an_engine_that_fails_before_it_listens_ends_the_refit(
    llm: Llm, engine: vllm.Engine, sends: Callable[[Send], None]
) -> None:
    sends(waits)
    llm.answers["smoke_refit"] = ImportError("no module named zmq")
    with pytest.raises(EngineError, match=r"^ImportError: no module named zmq$"):
        engine.refit([])


def test_an_engine_that_stops_listening_too_early_ends_the_refit(
    llm: Llm, engine: vllm.Engine, sends: Callable[[Send], None]
) -> None:
    sends(waits)
    llm.answers["smoke_refit"] = None
    with pytest.raises(EngineError, match="ended the refit before its last weights"):
        engine.refit([])


def test_what_the_transport_reports_is_the_engines_report(
    engine: vllm.Engine, sends: Callable[[Send], None]
) -> None:
    def send(*_: Any) -> int:
        raise TransportError("KeyError: 'no such tensor'")

    sends(send)
    with pytest.raises(EngineError, match=r"^KeyError: 'no such tensor'$"):
        engine.refit([])


# faults made inside


@pytest.mark.parametrize(
    ("fault", "level", "tags", "made"),
    [
        ("lost-buffer", 2, (WEIGHTS,), ["smoke_lose_buffers"]),
        ("lost-buffer", 2, (KV_CACHE,), []),
        ("lost-buffer", 1, (WEIGHTS, KV_CACHE), []),
        ("leak-per-cycle", 1, (WEIGHTS, KV_CACHE), ["smoke_leak"]),
        ("leak-per-cycle", 1, (WEIGHTS,), []),
        ("dropped-tensor", 2, (WEIGHTS, KV_CACHE), []),
    ],
)
def test_a_fault_inside_is_made_at_its_wake(
    llm: Llm, engine: vllm.Engine, fault: str, level: int, tags: tuple[str, ...], made: list[str]
) -> None:
    engine.inject(fault)
    engine.sleep(level)
    engine.wake(tags)
    assert [call[0] for call in llm.calls] == ["sleep", "wake_up", *made]
    assert llm.calls[1] == ("wake_up", list(tags))

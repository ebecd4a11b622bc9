"""What the trainer's side of vLLM promises: verl's settings, and an end to every call.

vLLM and torch are not here: what answers in their place does what the real ones do at their worst.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import cuda_ipc
from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError, served, vllm
from rollout.problem import Problem
from rollout.transport import TransportError

from .web import Played, Site, played

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
        self.answers: dict[str, Any] = {
            "smoke_held": 7,
            "smoke_block": 32,
            "reset_prefix_cache": True,
        }
        self.broken: Exception | None = None  # what its start raises
        code = "import time; time.sleep(600)"
        self.process = subprocess.Popen([sys.executable, "-c", code])
        self.answers["smoke_follow"] = self.process.pid
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=lambda: self.answer("shutdown")),
            add_request=lambda *asked: self.answer("add_request", *asked),
            has_unfinished_requests=lambda: self.answer("has_unfinished_requests"),
            step=lambda: self.answer("step"),
            abort_request=lambda names: self.answer("abort_request", names),
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


def takes(monkeypatch: pytest.MonkeyPatch, *lacking: str) -> None:
    """Let this vLLM be one whose arguments are all that we give but these, and some of its own."""
    options = vllm.arguments(MODEL, GIB, dummy=True, fp8=True)
    names = [name for name in (*options, "tensor_parallel_size") if name not in lacking]
    module = ModuleType("vllm.engine.arg_utils")
    vars(module)["EngineArgs"] = dataclasses.make_dataclass("EngineArgs", names)
    monkeypatch.setitem(sys.modules, "vllm.engine", ModuleType("vllm.engine"))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)


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
        ipc_collect=lambda: None,
    )
    vars(torch).update(cuda=cuda, device=lambda kind, index: (kind, index))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "torch", torch)
    takes(monkeypatch)
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
    assert (engine.levels, engine.cache_block) == ((1, 2), 32)
    assert (engine.mlp_bias, engine.witness, engine.insisting) == (True, False, {})
    assert (engine.held(), engine.memory()) == (7, 50 * GIB)
    assert [call[0] for call in llm.calls] == ["smoke_follow", "smoke_held", "smoke_block"]
    engine.stop()


def test_what_an_older_version_lacks_and_nothing_depends_on_is_left_out(
    llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(monkeypatch, "kv_cache_memory_bytes", "use_tqdm_on_load")
    engine = vllm.Engine()
    engine.start(MODEL, dummy=True)
    whole = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=False)
    assert whole.keys() - llm.options.keys() == {"kv_cache_memory_bytes", "use_tqdm_on_load"}
    assert llm.options.items() <= whole.items()
    engine.stop()


@pytest.mark.parametrize("lacking", ["enable_sleep_mode", "worker_extension_cls"])
def test_an_engine_without_an_argument_that_the_proof_needs_is_not_started(
    llm: Llm, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    takes(monkeypatch, lacking)
    for engine in (vllm.Engine(), vllm.Server()):
        with pytest.raises(EngineError, match=f"no argument '{lacking}'"):
            engine.start(MODEL, dummy=True)
        engine.stop()
    assert not llm.options


def test_an_engine_that_does_not_start_says_why(llm: Llm) -> None:
    llm.broken = ValueError("no GPU memory")
    engine = vllm.Engine()
    with pytest.raises(EngineError, match=r"^vLLM did not start: no GPU memory$"):
        engine.start(MODEL, dummy=True)
    engine.stop()


@pytest.mark.usefixtures("llm")
def test_a_machine_without_cuda_is_told_in_one_sentence() -> None:
    def name() -> str:
        raise RuntimeError("\nFound no NVIDIA driver on your system.\nSee a page.")

    torch: Any = sys.modules["torch"]
    torch.cuda.get_device_name = name
    with pytest.raises(Problem) as caught:
        vllm.Engine()
    assert caught.value.code == 3
    assert "(Found no NVIDIA driver on your system.)" in caught.value.sentence


@pytest.mark.usefixtures("llm")
def test_an_engine_is_not_divided_among_gpus() -> None:
    with pytest.raises(EngineError, match="on one GPU only"):
        vllm.Engine().start(MODEL, dummy=True, gpus=2)


@pytest.mark.usefixtures("llm")
def test_an_engine_has_no_checker_of_its_own() -> None:
    for call in (vllm.Engine().remember, vllm.Engine().unchanged):
        with pytest.raises(EngineError, match="no weights checker of its own"):
            call()


@pytest.mark.usefixtures("llm")
def test_an_engine_that_is_not_started_answers_nothing() -> None:
    engine = vllm.Engine()
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate([[1]], 1),
        lambda: engine.interrupt([[1]], 9, 1),
        lambda: engine.sleep(1),
        lambda: engine.wake((WEIGHTS,)),
        lambda: engine.refit([]),
        engine.reset_prefix_cache,
        engine.digests,
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"^the engine is not started$"):
            call()


def found(logprob: float) -> SimpleNamespace:
    return SimpleNamespace(logprob=logprob)


def output(count: int, cached: int | None = None, name: str = "") -> SimpleNamespace:
    """One of vLLM's answers; a step may name more tokens than the one that was chosen."""
    steps = [{place: found(-0.5 * place), 99: found(-0.1)} for place in range(count)]
    one = SimpleNamespace(token_ids=list(range(count)), logprobs=steps)
    return SimpleNamespace(request_id=name, outputs=[one], num_cached_tokens=cached)


@pytest.mark.parametrize(("said", "cached"), [(16, 16), (0, 0), (None, 0)])
def test_tokens_are_asked_for_greedily_and_come_with_their_log_probabilities(
    llm: Llm, engine: vllm.Engine, said: int | None, cached: int
) -> None:
    llm.answers["generate"] = [output(2, said)]
    answers = engine.generate([(1, 2)], 2)
    assert answers == [Completion((0, 1), (0.0, -0.5))]
    assert answers[0].cached == cached
    ((_, prompts, settings),) = llm.calls
    assert prompts == [{"prompt_token_ids": [1, 2]}]
    assert settings["max_tokens"] == 2
    assert settings["temperature"] == 0.0
    assert settings["ignore_eos"] is True


def test_rollouts_are_aborted_once_each_has_enough(llm: Llm, engine: vllm.Engine) -> None:
    def names() -> list[str]:
        return [call[1] for call in llm.calls if call[0] == "add_request"]

    steps = 0

    def step() -> list[Any]:
        """The second one begins later; a step may give nothing."""
        nonlocal steps
        steps += 1
        one, two = names()[-2:]
        if steps == 2:
            return []
        return [output(steps, 16, one)] + ([output(steps - 3, 0, two)] if steps > 3 else [])

    llm.answers |= {"has_unfinished_requests": True, "step": step}
    first, second = engine.interrupt([(1, 2), (3,)], 128, 4)
    assert (len(first.tokens), len(second.tokens)) == (7, 4)
    assert (first.cached, second.cached) == (16, 0)
    asked = [call[2] for call in llm.calls if call[0] == "add_request"]
    assert asked == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    assert ("abort_request", names()) in llm.calls
    assert llm.calls[-1][0] == "abort_request", "no step is made behind it"
    steps = 0
    engine.interrupt([(1, 2), (3,)], 128, 4)
    assert len(set(names())) == 4, "no name is used twice"


def test_rollouts_that_end_by_themselves_are_whole(llm: Llm, engine: vllm.Engine) -> None:
    unfinished = [True, True, False]
    counts = [1, 3]
    name: list[str] = []
    llm.answers |= {
        "has_unfinished_requests": lambda: unfinished.pop(0),
        "step": lambda: [output(counts.pop(0), 0, name[0])],
    }
    add = llm.llm_engine.add_request

    def remembers(*asked: Any) -> Any:
        name.append(asked[0])
        return add(*asked)

    llm.llm_engine.add_request = remembers
    assert engine.interrupt([(1,)], 3, 9) == [Completion((0, 1, 2), (0.0, -0.5, -1.0))]
    assert "abort_request" not in [call[0] for call in llm.calls]


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
    assert engine.refit([("a", 1)]) == 99
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


# vLLM's own server, which is none

LATE = 0.002  # seconds between two tokens


class Service:
    """What is behind vLLM's HTTP server; ``answers`` of its worker by method."""

    def __init__(self, site: Site, process: int) -> None:
        self.servers: list[Played] = []
        self.answers: dict[str, Any] = {"smoke_follow": process, "smoke_held": 7, "smoke_block": 32}
        self.short = 0  # tokens after which it ends an answer by itself
        self.paused = threading.Event()
        site.routes |= {
            "/health": lambda _: (200, ""),
            "/collective_rpc": self.call,
            "/v1/completions": self.complete,
            "/v1/models": lambda _: (200, {"data": [{"id": "mine", "root": "/model"}]}),
            "/pause": self.pause,
            "/resume": lambda _: (200, {"status": "resumed"}),
            **{path: lambda _: (200, "") for path in ("/sleep", "/wake_up", "/reset_prefix_cache")},
        }

    def pause(self, body: Any) -> Any:
        if body is None:
            return 405, {"detail": "Method Not Allowed"}
        self.paused.set()
        return 200, {"status": "paused"}

    def call(self, body: Any) -> Any:
        result = self.answers.get(body["method"])
        if callable(result):
            result = result(*body["args"])
        plain = result is None or isinstance(result, dict | list)
        return 200, {"results": [result if plain else str(result)]}

    def complete(self, body: Any) -> Any:
        assert (body["temperature"], body["ignore_eos"], body["logprobs"]) == (0.0, True, 0)
        assert body["return_token_ids"] is True
        count, prompt = body["max_tokens"], body["prompt"]
        if body.get("stream"):
            return self.stream(prompt, count)
        choices = [part(ids, 0, count) | {"index": n} for n, ids in enumerate(prompt)]
        return 200, {"choices": choices[::-1]}  # in whatever order they end

    def stream(self, prompt: list[int], count: int) -> Iterator[Any]:
        yield {"choices": [{"index": 0, "text": "", "token_ids": None, "logprobs": None}]}
        for place in range(0, count, 2):  # two at a time, as one that is slow to listen gets them
            if self.short and place >= self.short:
                return
            time.sleep(LATE)
            yield {"choices": [part(prompt, place, 2)]}
            if self.paused.is_set():
                yield {"choices": [part(prompt, 0, 0) | {"finish_reason": "abort"}]}
                return
        yield {"choices": [{"index": 0, "token_ids": [], "finish_reason": "length"}]}


def part(prompt: list[int], start: int, count: int) -> dict[str, Any]:
    """Some tokens of an answer, which are the prompt's sum and those that follow."""
    places = range(start, start + count)
    return {
        "index": 0,
        "token_ids": [sum(prompt) + place for place in places],
        "logprobs": {"token_logprobs": [-0.5 * place for place in places], "tokens": ["?"] * count},
    }


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def service(llm: Llm, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Service:
    made = Service(site, llm.process.pid)
    monkeypatch.setattr(vllm, "Http", played(site, made.servers))
    monkeypatch.setattr(served, "TIMEOUT", 10.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(served.LOG, raising=False)
    return made


@pytest.fixture
def web(service: Service, site: Site) -> Iterator[vllm.Server]:
    """A started server."""
    del service
    made = vllm.Server()
    made.start(MODEL, dummy=True)
    site.calls.clear()
    yield made
    made.stop()


def test_a_server_is_started_as_the_engine_is_and_offers_what_a_trainer_calls(
    llm: Llm, service: Service, site: Site, tmp_path: Path
) -> None:
    server = vllm.Server()
    server.start(MODEL, dummy=True)
    (http,) = service.servers
    options = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=False)
    del options["model"], options["skip_tokenizer_init"]
    assert http.argv == ["/model", *served.flags(options)]
    assert http.variables == {"VLLM_SERVER_DEV_MODE": "1"}
    assert "--enable-sleep-mode" in http.argv
    assert site.paths() == ["/health", *vllm.PAUSING, *["/collective_rpc"] * 3]
    assert server.pauses and not service.paused.is_set(), (
        "asked whether it is there, and not for it"
    )
    assert (server.held(), server.memory()) == (7, 50 * GIB)
    assert server.cache_block == 32
    assert http.log.parent == tmp_path
    server.stop()
    assert http.ended == 1
    assert not http.log.exists()
    assert llm.process.wait(10) == -9, "its engine does not outlive it"
    server.stop()
    assert http.ended == 1
    with pytest.raises(EngineError, match=r"^the engine is not started$"):
        server.generate([[1]], 1)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("ValueError: no such model", "the server ended: ValueError: no such model"),
        ("no command", "rollout"),
    ],
)
def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, reason: str
) -> None:
    monkeypatch.setattr(Played, "fails", fails)
    server = vllm.Server()
    with pytest.raises(EngineError) as caught:
        server.start(MODEL, dummy=True)
    assert str(caught.value) == f"vLLM's server did not start: {reason}"
    assert [http.ended for http in service.servers] == ([] if fails == "no command" else [1])
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_its_development_mode_did_not_start(service: Service, site: Site) -> None:
    del site.routes["/collective_rpc"]
    server = vllm.Server()
    with pytest.raises(EngineError, match=r"did not start: .*/collective_rpc with 404"):
        server.start(MODEL, dummy=True)
    assert [http.ended for http in service.servers] == [1]


@pytest.mark.parametrize("asked", [{"fp8": True}, {"gpus": 2}])
def test_a_server_is_not_started_as_something_that_it_would_not_be(
    service: Service, asked: dict[str, Any]
) -> None:
    with pytest.raises(EngineError, match="in bfloat16 and on one GPU only"):
        vllm.Server().start(MODEL, dummy=True, **asked)
    assert service.servers == []


@pytest.mark.usefixtures("llm")
def test_a_server_that_is_not_started_answers_nothing() -> None:
    server = vllm.Server()
    calls: list[Callable[[], Any]] = [
        lambda: server.generate([[1]], 1),
        lambda: server.interrupt([[1]], 9, 1),
        lambda: server.sleep(1),
        lambda: server.wake((WEIGHTS,)),
        lambda: server.refit([]),
        server.reset_prefix_cache,
        server.digests,
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"^the engine is not started$"):
            call()
    server.stop()


def test_a_server_answers_with_tokens_in_the_order_of_the_prompts(
    web: vllm.Server, site: Site
) -> None:
    assert web.generate([(1, 2), (10,)], 2) == [
        Completion((3, 4), (0.0, -0.5)),
        Completion((10, 11), (0.0, -0.5)),
    ]
    ((path, body),) = site.calls
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", [[1, 2], [10]], 2)
    assert "stream" not in body


def test_rollouts_of_a_server_end_when_the_trainer_hangs_up(web: vllm.Server, site: Site) -> None:
    first, second = web.interrupt([(1, 2), (10,)], 10000, 5)
    for answer, begin in ((first, 3), (second, 10)):
        count = len(answer.tokens)
        assert 5 <= count < 10000
        assert answer.tokens == tuple(range(begin, begin + count)), "every part, once, in order"
        assert answer.logprobs == tuple(-0.5 * place for place in range(count))
    end = time.monotonic() + 10
    while len(site.hung_up) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    assert site.hung_up == ["/v1/completions"] * 2


def test_rollouts_of_a_server_are_stopped_by_a_pause_and_nobody_hangs_up(
    web: vllm.Server, service: Service, site: Site
) -> None:
    first, second = web.halt([(1, 2), (10,)], 10000, 5)
    for answer, begin in ((first, 3), (second, 10)):
        assert 5 <= len(answer.tokens) < 10000
        assert answer.tokens == tuple(range(begin, begin + len(answer.tokens)))
    assert (site.bodies("/pause"), site.hung_up) == ([{}], [])
    assert service.paused.is_set()
    web.resume()
    assert site.bodies("/resume") == [{}]
    assert {"/pause", "/resume", "/v1/completions"} < set(web.endpoints())


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("path", vllm.PAUSING)
def test_a_server_without_a_pause_or_its_end_is_not_asked_for_one(site: Site, path: str) -> None:
    del site.routes[path]
    server = vllm.Server()
    server.start(MODEL, dummy=True)
    assert not server.pauses
    server.stop()


def test_a_server_says_which_model_it_has(web: vllm.Server) -> None:
    assert web.about() == {"model": "/model"}


def test_a_rollout_of_a_server_that_ends_early_is_an_error(
    web: vllm.Server, service: Service
) -> None:
    service.short = 4
    with pytest.raises(EngineError, match="before it had 5 tokens"):
        web.interrupt([(1, 2), (10,)], 128, 5)


def test_a_server_is_asked_over_http_for_all_that_the_engine_does(
    web: vllm.Server, service: Service, site: Site
) -> None:
    service.answers["smoke_digests"] = {"a": "digest"}
    web.sleep(2)
    web.wake((WEIGHTS, KV_CACHE))
    web.reset_prefix_cache()
    assert web.digests() == {"a": "digest"}
    assert site.calls == [
        ("/sleep?level=2", {}),
        ("/wake_up?tags=weights&tags=kv_cache", {}),
        ("/reset_prefix_cache", {}),
        ("/collective_rpc", {"method": "smoke_digests", "args": []}),
    ]


def test_what_a_server_refuses_is_an_error(web: vllm.Server, site: Site) -> None:
    site.routes["/sleep"] = lambda _: (500, "Internal Server Error")
    with pytest.raises(EngineError, match=r"answered /sleep\?level=1 with 500: Internal Server"):
        web.sleep(1)


def test_an_engine_that_dies_behind_its_server_ends_the_call_that_waits(
    llm: Llm, web: vllm.Server, site: Site
) -> None:
    hangs = threading.Event()

    def dies(_: Any) -> Any:
        llm.process.kill()
        hangs.wait(10)
        return 200, ""

    site.routes["/sleep"] = dies
    try:
        with pytest.raises(EngineError, match=r"^the engine process ended$"):
            web.sleep(1)
    finally:
        hangs.set()


def test_weights_are_sent_to_the_engine_behind_the_server(
    web: vllm.Server, service: Service, site: Site, sends: Callable[[Send], None]
) -> None:
    begun, sent = threading.Event(), threading.Event()

    def takes(_: str) -> None:
        begun.set()
        assert sent.wait(10)

    def send(tensors: Any, address: str, _: Any, alive: Callable[[], None]) -> int:
        assert begun.wait(10)
        alive()
        assert list(tensors) == [("a", 1)]
        assert Path(address.removeprefix("ipc://")).parent.is_dir()
        sent.set()
        return 99

    service.answers["smoke_refit"] = takes
    sends(send)
    assert web.refit([("a", 1)]) == 99
    ((path, body),) = site.calls
    assert (path, body["method"]) == ("/collective_rpc", "smoke_refit")
    assert body["args"][0].startswith("ipc://")


@pytest.mark.parametrize(
    ("choice", "tokens", "logprobs"),
    [
        ({"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}}, (5,), (-0.5,)),
        ({"token_ids": None, "logprobs": None}, (), ()),
        ({"token_ids": [], "logprobs": {"token_logprobs": None}}, (), ()),
        ({"text": ""}, (), ()),
    ],
)
def test_a_part_of_an_answer_may_have_no_token(
    choice: dict[str, Any], tokens: tuple[int, ...], logprobs: tuple[float, ...]
) -> None:
    assert vllm.chosen(choice) == Completion(tokens, logprobs)

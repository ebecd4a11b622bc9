"""vLLM and SGLang under pressure: how they are started, asked, ended, and what they say they hold.

Neither is here: what answers in their place does what their sources say.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import probe
from rollout.backends import (
    EngineError,
    crowd,
    pressure_sglang,
    pressure_vllm,
    pressure_vllm_scheduler,
    sglang,
    sglang_worker,
    vllm,
)
from rollout.backends.crowd import LEAKED, Asked, Said, Usage
from rollout.problem import Problem

from . import fake_sglang

GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of the probe that a GPU is given, with no weights in it."""
    (tmp_path / "config.json").write_text(json.dumps(probe.config("1b")))
    return tmp_path


# vLLM


def options(model: Path, fault: str = "") -> dict[str, Any]:
    return pressure_vllm.arguments(model, 141 * GIB, dummy=True, fault=fault)


def test_vllm_is_started_as_for_every_check_but_for_its_slots_and_what_it_tells(
    model: Path,
) -> None:
    usual, given = vllm.arguments(model, 141 * GIB, dummy=True, fp8=False), options(model)
    changed = {name: value for name, value in given.items() if usual.get(name) != value}
    assert changed == {
        "max_num_seqs": 128,
        "disable_log_stats": False,
        "worker_extension_cls": "rollout.backends.pressure_vllm_extension.Extension",
    }
    assert usual.keys() <= given.keys()
    longest = 75 + pressure_vllm.ANSWERS[1]
    assert longest < vllm.LONGEST
    assert pressure_vllm.SLOTS < pressure_vllm.REQUESTS


def test_the_classes_that_vllm_is_told_by_name_exist(model: Path) -> None:
    module, _, name = options(model)["worker_extension_cls"].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    for method in ("smoke_follow", "smoke_refit", "smoke_blocks"):
        assert callable(getattr(found, method))
    assert options(model, LEAKED)["scheduler_cls"].rpartition(".")[0] == (
        pressure_vllm_scheduler.__name__
    )
    assert options(model, LEAKED)["async_scheduling"] is False
    assert "scheduler_cls" not in options(model)


def test_a_scheduler_that_leaks_keeps_a_block_for_each_request_that_is_aborted() -> None:
    taken: list[int] = []

    class Scheduler:
        kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_new_blocks=taken.append))

        def finish_requests(self, request_ids: Any, status: str) -> tuple[Any, str]:
            return request_ids, status

    scheduler = pressure_vllm_scheduler.leaking(Scheduler)()
    assert scheduler.finish_requests(["a", "b"], "aborted") == (["a", "b"], "aborted")
    assert scheduler.finish_requests(None, "aborted") == (None, "aborted")
    assert taken == [2]
    with pytest.raises(AttributeError):
        _ = pressure_vllm_scheduler.Another  # type: ignore[attr-defined]


def test_the_scheduler_is_made_of_vllms_own_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = type("Scheduler", (), {})
    parts = ["vllm", "v1", "core", "sched", "scheduler"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules["vllm.v1.core.sched.scheduler"])["Scheduler"] = own
    assert issubclass(pressure_vllm_scheduler.Scheduler, own)  # type: ignore[attr-defined]


class Params(SimpleNamespace):
    """Sampling parameters: what they were made with."""


def output(name: str, tokens: list[int], *, finished: bool = False) -> SimpleNamespace:
    logprobs = [{token: SimpleNamespace(logprob=-1.0 - token)} for token in tokens]
    first = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
    return SimpleNamespace(
        request_id=name, outputs=[first], finished=finished, num_cached_tokens=None
    )


def metric(name: str, value: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=value)


class Core:
    """``LLMEngine``: answers one token to each request in a step, and none in every second one."""

    def __init__(self) -> None:
        self.wanted: dict[str, Params] = {}
        self.aborted: list[str] = []
        self.steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Params) -> None:
        assert prompt["prompt_token_ids"]
        assert (params.temperature, params.logprobs, params.ignore_eos) == (1.0, 0, True)
        self.wanted[name] = params

    def has_unfinished_requests(self) -> bool:
        return bool(self.wanted)

    def step(self) -> list[SimpleNamespace]:
        assert self.wanted, "vLLM would wait for ever"
        self.steps += 1
        if self.steps % 2:
            return []
        found = []
        for name, params in list(self.wanted.items()):
            params.max_tokens -= 1
            found.append(output(name, [self.steps], finished=not params.max_tokens))
            if not params.max_tokens:
                del self.wanted[name]
        return found

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self.wanted.pop(name, None)


class Llm:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.llm_engine = Core()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        assert not args
        return [{"smoke_blocks": 32767}.get(method, 0)]

    def get_metrics(self) -> list[Any]:
        names = (pressure_vllm.RUNNING, pressure_vllm.WAITING, "vllm:num_preemptions")
        running = float(len(self.llm_engine.wanted))
        counted = [metric(name, value) for name, value in zip(names, (running, 2, 5), strict=True)]
        return [*counted, metric(pressure_vllm.IN_USE, 12 / 32767)]

    def generate(self, prompts: list[Any], wanted: list[Params], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert len(prompts) == len(wanted)
        assert not hasattr(wanted[0], "output_kind"), "a plain call asks for whole answers"
        return [output("", [7] * one.max_tokens, finished=True) for one in wanted]


@pytest.fixture
def engine(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> Iterator[tuple[pressure_vllm.Engine, list[Llm]]]:
    """An engine on a machine with vLLM and one GPU, started; and what it was made of."""
    found: list[Llm] = []

    def start(**options: Any) -> Llm:
        found.append(Llm(**options))
        return found[-1]

    cuda = SimpleNamespace(
        get_device_name=lambda: "a GPU",
        current_device=lambda: 0,
        mem_get_info=lambda _: (30 * GIB, 80 * GIB),
        ipc_collect=lambda: None,
        empty_cache=lambda: None,
    )
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": start, "SamplingParams": Params},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {
            "EngineArgs": dataclasses.make_dataclass(
                "EngineArgs",
                [(name, Any, dataclasses.field(default=None)) for name in options(model, LEAKED)],
            )
        },
        "torch": {"cuda": cuda, "device": lambda kind, index: (kind, index)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "ERROR")
    made = pressure_vllm.Engine()
    made.start(model, dummy=True)
    yield made, found
    made._process = 0
    made.stop()


ASKED = [Asked("a", (1, 2), 2), Asked("b", (3,), 1), Asked("c", (4,), 9)]


def test_vllms_requests_are_followed_token_by_token_and_ended_by_their_names(
    engine: tuple[pressure_vllm.Engine, list[Llm]],
) -> None:
    made, (llm,) = engine
    made.submit(ASKED)
    assert {params.output_kind for params in llm.llm_engine.wanted.values()} == {"delta"}
    assert made.listen() == [
        Said("a", (2,), (-3.0,), False),
        Said("b", (2,), (-3.0,), True),
        Said("c", (2,), (-3.0,), False),
    ], "a step that says nothing is waited through"
    assert made.abort(["c", "b"]) == []
    assert llm.llm_engine.aborted == ["c", "b"]
    assert made.listen() == [Said("a", (4,), (-5.0,), True)]
    assert made.listen() == [], "nothing is left, and vLLM is not waited for"


def test_vllm_says_what_it_holds_after_a_step_of_its_own(
    engine: tuple[pressure_vllm.Engine, list[Llm]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, (llm,) = engine
    monkeypatch.setattr(crowd, "shared", lambda _: 4096)
    found = made.usage()
    assert found == Usage(2, 12, 50 * GIB, found.files, 4096)
    assert found.files > 2
    assert llm.llm_engine.steps == 2, "one request renewed the metrics"


def test_vllms_own_batch_is_one_plain_call(
    engine: tuple[pressure_vllm.Engine, list[Llm]],
) -> None:
    made, _ = engine
    assert [len(answer.tokens) for answer in made.plain(ASKED)] == [2, 1, 9]


def test_metrics_that_vllm_does_not_have_are_an_error() -> None:
    with pytest.raises(EngineError, match="have no 'vllm:num_requests_waiting'"):
        pressure_vllm.metered([metric(pressure_vllm.RUNNING, 1.0)])


def test_a_fault_is_made_at_vllms_start_and_another_is_refused(
    engine: tuple[pressure_vllm.Engine, list[Llm]], model: Path
) -> None:
    made, llms = engine
    with pytest.raises(Problem, match="is not made in vLLM"):
        made.inject("lost-request")
    made.inject(LEAKED)
    made.start(model, dummy=True)
    assert llms[-1].options["scheduler_cls"] == pressure_vllm.LEAKING


@pytest.mark.parametrize("more", [{"fp8": True}, {"gpus": 2}])
@pytest.mark.parametrize("backend", [pressure_vllm, pressure_sglang])
def test_many_requests_go_to_bfloat16_on_one_gpu(
    backend: Any, more: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    made = backend.Engine.__new__(backend.Engine)
    with pytest.raises(EngineError, match="for many requests in bfloat16"):
        made.start(model, dummy=True, **more)


# SGLang


def test_sglang_is_started_as_for_every_check_but_for_its_slots(model: Path) -> None:
    usual = sglang.arguments(model, dummy=True, level=1, gpus=1)
    given = pressure_sglang.arguments(model, dummy=True, level=1)
    changed = {name: value for name, value in given.items() if usual[name] != value}
    assert changed == {"max_running_requests": 128, "cuda_graph_max_bs": 128}


def told(count: int, reason: str = "", *, logprobs: bool = True) -> dict[str, Any]:
    """An output of a stream, which has all tokens so far."""
    meta: dict[str, Any] = {"finish_reason": {"type": reason} if reason else None}
    if logprobs:
        meta["output_token_logprobs"] = [(-0.5 - n, 10 + n, None) for n in range(count)]
    return {"meta_info": meta}


def test_of_a_stream_only_what_is_new_counts() -> None:
    assert pressure_sglang.new(told(3), 1) == ((11, 12), (-1.5, -2.5), False)
    assert pressure_sglang.new(told(3, "length"), 3) == ((), (), True)
    assert pressure_sglang.new(told(0, "abort", logprobs=False), 0) == ((), (), False)


class Manager:
    """``TokenizerManager``: a token each time the loop comes round, until it is aborted."""

    def __init__(self) -> None:
        self.aborted: set[str] = set()
        self.forgets = False

    async def generate_request(self, asked: Any, _: None) -> AsyncIterator[dict[str, Any]]:
        assert asked.stream
        assert asked.return_logprob
        assert asked.sampling_params["temperature"] == 1.0
        wanted = asked.sampling_params["max_new_tokens"]
        for count in range(1, wanted + 1):
            await asyncio.sleep(0.001)
            if asked.rid in self.aborted:
                if self.forgets:
                    await asyncio.sleep(60)
                yield told(count - 1, "abort")
                return
            yield told(count, "length" if count == wanted else "")

    def abort_request(self, name: str) -> None:
        self.aborted.add(name)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake_sglang.install(monkeypatch, {"managers.io_struct": fake_sglang.io_struct()})

    def begin(self: Any, _: dict[str, Any]) -> None:
        self.manager = Manager()
        self.engine = SimpleNamespace(loop=loop, generate=generate)

    def generate(*, input_ids: Any, sampling_params: Any, return_logprob: bool) -> list[Any]:
        assert return_logprob
        assert len(input_ids) == len(sampling_params)
        return [told(one["max_new_tokens"], "length") for one in sampling_params]

    loop = asyncio.new_event_loop()
    monkeypatch.setattr(sglang_worker.Driver, "__init__", begin)
    yield pressure_sglang.Driver({})
    loop.close()


def everything(driver: Any) -> dict[str, tuple[int, bool]]:
    """How many tokens came of each request, and whether it ended."""
    found: dict[str, tuple[int, bool]] = {}
    while heard := driver.listen():
        for name, tokens, values, ended in heard:
            assert len(tokens) == len(values)
            found[name] = (found.get(name, (0, False))[0] + len(tokens), ended)
    return found


GIVEN = [("a", [1, 2], 4), ("b", [3], 2)]


def test_sglangs_requests_are_followed_to_their_ends(driver: Any) -> None:
    driver.submit(GIVEN)
    assert everything(driver) == {"a": (4, True), "b": (2, True)}
    assert driver.listen() == []


@pytest.mark.parametrize("forgets", [False, True])
def test_an_aborted_request_of_sglang_has_its_last_word_in_the_abort(
    driver: Any, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    monkeypatch.setattr(sglang_worker, "ABORTED", 0.05)
    driver.manager.forgets = forgets
    driver.submit([*GIVEN, ("c", [4], 500)])
    before = driver.listen()
    last = driver.abort(["c"])
    assert not any(ended for name, *_, ended in last if name == "c")
    after = everything(driver)
    assert "c" not in after, "nothing comes later"
    assert {name for name, *_ in before} | after.keys() >= {"a", "b"}
    assert driver.tasks == {}


def test_a_request_that_sglang_refuses_is_an_error(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> AsyncIterator[dict[str, Any]]:
        raise ValueError("too long")
        yield {}

    monkeypatch.setattr(driver.manager, "generate_request", refuse)
    driver.submit(GIVEN)
    with pytest.raises(ValueError, match="too long"):
        driver.listen()


def test_an_sglang_that_says_nothing_is_an_error(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "PATIENCE", 0.05)
    driver.manager.aborted, driver.manager.forgets = {"a", "b"}, True
    driver.submit(GIVEN)
    with pytest.raises(RuntimeError, match="said nothing"):
        driver.listen()


def test_sglangs_own_batch_is_one_plain_call(driver: Any) -> None:
    assert [len(tokens) for tokens, *_ in driver.plain(GIVEN)] == [4, 2]


def test_what_a_step_on_its_way_still_holds_is_waited_for(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[0, 3, 77], [0, 0, 77]]
    monkeypatch.setattr(driver, "rpc", lambda _: answers.pop(0))
    requests, tokens, processes = driver.usage()
    assert (requests, tokens) == (0, 0)
    assert 77 in processes
    monkeypatch.setattr(driver, "rpc", lambda _: [2, 3, 77])
    assert driver.usage()[:2] == (2, 3), "requests that run are told at once"


def test_sglangs_scheduler_tells_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def request(*, finished: bool) -> SimpleNamespace:
        return SimpleNamespace(finished=lambda: finished)

    scheduler = type(
        "Scheduler",
        (),
        {
            "waiting_queue": [request(finished=False)],
            "running_batch": SimpleNamespace(
                reqs=[request(finished=True), request(finished=False)]
            ),
            "max_total_num_tokens": 100,
            "token_to_kv_pool_allocator": SimpleNamespace(available_size=lambda: 60),
            "tree_cache": SimpleNamespace(evictable_size=lambda: 30),
        },
    )
    ran: list[Any] = []
    fake_sglang.install(
        monkeypatch,
        {
            "managers.scheduler": {
                "Scheduler": scheduler,
                "run_scheduler_process": lambda *given, **_: ran.append(given),
            }
        },
    )
    monkeypatch.setattr(sglang_worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(sglang_worker, "_rank", lambda: 0)
    pressure_sglang.schedule("server_args", gpu_id=0)
    assert ran == [("server_args",)]
    made: Any = scheduler()
    made.smoke_usage(path=str(tmp_path / "answer"))
    assert json.loads((tmp_path / "answer").read_text())[:2] == [2, 10]


def test_the_driver_of_sglang_is_the_one_that_follows_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    for name in ("schedule", "Driver"):  # put back behind it
        monkeypatch.setattr(sglang_worker, name, getattr(sglang_worker, name))
    monkeypatch.setattr(
        sglang_worker,
        "drive",
        lambda *given: seen.append((sglang_worker.schedule, sglang_worker.Driver, given)),
    )
    pipe: Any = "pipe"
    pressure_sglang.drive(pipe, {"a": 1}, "log", 7)
    ours = (pressure_sglang.schedule, pressure_sglang.Driver)
    assert seen == [(*ours, ("pipe", {"a": 1}, "log", 7))]


def test_the_trainers_side_of_sglang_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = pressure_sglang.Engine.__new__(pressure_sglang.Engine)
    answers: dict[str, Any] = {
        "listen": [("a", (1,), (-1.0,), True)],
        "abort": [("b", (2,), (-2.0,), False)],
        "usage": (0, 0, []),
        "plain": [((1,), (-1.0,), 0)],
        "submit": None,
    }
    calls: list[Any] = []

    def call(method: str, *given: Any) -> Any:
        calls.append((method, *given))
        return answers[method]

    monkeypatch.setattr(engine, "_call", call)
    monkeypatch.setattr(engine, "memory", lambda: 5)
    engine.submit(ASKED[:1])
    assert calls == [("submit", [("a", [1, 2], 2)])]
    assert engine.listen() == [Said("a", (1,), (-1.0,), True)]
    assert engine.abort(["b"]) == [Said("b", (2,), (-2.0,), False)]
    assert engine.usage().memory == 5
    assert engine.plain(ASKED[:1])[0].tokens == (1,)
    with pytest.raises(Problem, match="looks for it and ends"):
        engine.inject(LEAKED)

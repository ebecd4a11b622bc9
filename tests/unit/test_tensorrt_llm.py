"""What the trainer's side of TensorRT-LLM promises, held against a record of the engine's sources.

The engine is not here and cannot be had here. Its modules are made of the record
(tests/unit/tensorrt_llm.api.json), so a name, an argument or a field that the sources do not have
fails. What it does is played, as its sources say.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError, gpu, tensorrt_llm
from rollout.backends import tensorrt_llm_weights as weights
from rollout.backends.interface import Comparison, compared
from rollout.backends.tensorrt_llm_worker import parts

from . import recorded
from .recorded import Record

FILE = Path(__file__).with_name("tensorrt_llm.api.json")
WHOLE = json.loads(FILE.read_text(encoding="utf-8"))
RECORD: Record = recorded.read(FILE)
LLM = "tensorrt_llm:AsyncLLM"
RESULT = "tensorrt_llm.executor.result:GenerationResult"
WORKER = "tensorrt_llm.executor.ray_gpu_worker:RayGPUWorker"
EXTENSION = "tensorrt_llm.llmapi.rlhf_utils:WorkerExtension"
ARGUMENTS = "tensorrt_llm.llmapi.llm_args"
UUID = "GPU-3f0c"


def with_sleep_config(record: Record) -> Record:
    """The record of a later version, as verl calls it at its head: SleepConfig, in llm_args."""
    later = copy.deepcopy(record)
    fields = later[f"{ARGUMENTS}:TorchLlmArgs"]["fields"]
    fields[fields.index("enable_sleep")] = "sleep_config"
    types = later.pop("tensorrt_llm._torch.virtual_memory:ExecutorMemoryType")
    types["members"]["MODEL_WEIGHTS_MAIN"] = "model_weights"
    later[f"{ARGUMENTS}:ExecutorMemoryType"] = types
    later[f"{ARGUMENTS}:SleepConfig"] = {"kind": "fields", "fields": ["restore_modes"]}
    return later


class Tensor:
    """A tensor as far as the backend looks."""

    def __init__(self, value: int, numel: int = 1) -> None:
        self.value, self._numel = value, numel

    def detach(self) -> Tensor:
        return self

    def to(self, *_: object, **given: object) -> Tensor:
        return Tensor(self.value, self._numel) if given.get("copy") else self

    def contiguous(self) -> Tensor:
        return self

    def numel(self) -> int:
        return self._numel

    def element_size(self) -> int:
        return 2

    def dim(self) -> int:
        return 2


def reduced(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """As torch's reduce_tensor: a function and its arguments, of which the seventh is a device."""
    return rebuilt, (tensor.value, 1, 2, 3, 4, 5, "the trainer's", 7)


def rebuilt(value: int, *_: object) -> int:
    assert _[5] == 0, "the worker puts its own device there"
    return value


class Played:
    """What the engine's processes do, as its sources say; ``names`` are the functions' own."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.asleep: set[str] = set()
        self.live, self.staged = {"w": 0}, {"w": 0}
        self.calls: list[str] = []
        self.cached = True
        self.open = 0  # requests that run
        self.steps = 10
        self.silent = False
        self.names: dict[str, Callable[..., Any]] = {
            f"{LLM}.__await__": lambda self: _self(self).__await__(),
            f"{LLM}.release": lambda self, tags: self.played.worker("sleep", tags),
            f"{LLM}.resume": lambda self, tags: self.played.worker("wakeup", tags),
            f"{LLM}.update_weights": lambda self, weights: self.played.worker(
                "update_weights", weights
            ),
            f"{LLM}.shutdown": lambda self: self.played.calls.append("shutdown"),
            f"{RESULT}.__await__": lambda self: _whole(self).__await__(),
            f"{RESULT}.__aiter__": lambda self: self,
            f"{RESULT}.__anext__": lambda self: _step(self),
            f"{RESULT}.abort": lambda self: setattr(self, "aborted", True),
            f"{RESULT}.finished": lambda self: self.done,
            f"{WORKER}.sleep": lambda self, sleep_tags: self.played.memory("sleep", sleep_tags),
            f"{WORKER}.wakeup": lambda self, wakeup_tags: self.played.memory("wake", wakeup_tags),
            "tensorrt_llm._torch.utils:get_device_uuid": lambda **_: UUID,
        }
        self.device = UUID

    def begin(self, llm: Any, given: dict[str, Any]) -> None:
        """AsyncLLM.__init__: what pydantic would refuse, and the worker with its extension."""
        own = ("placement_groups", "placement_bundle_indices", "per_worker_gpu_share")
        kwargs = given["kwargs"]
        sys.modules[ARGUMENTS].TorchLlmArgs(**kwargs)
        assert [given[name] for name in own] == [None] * 3
        self.options = kwargs
        llm.played = self
        path, _, name = kwargs["ray_worker_extension_cls"].rpartition(".")
        extension = getattr(__import__(path, fromlist=[name]), name)
        worker: Any = sys.modules["tensorrt_llm.executor.ray_gpu_worker"].RayGPUWorker
        taken = [n for n in dir(extension) if not n.startswith("__") and hasattr(worker, n)]
        assert taken == [], "the engine refuses such an extension"
        made = type("Worker", (worker, extension), {})()
        model = SimpleNamespace(parameters=lambda: [Tensor(0, 5), Tensor(0, 6)])
        made.played, made.device_id = self, 0
        made.engine = SimpleNamespace(
            model_engine=SimpleNamespace(model=model),
            reset_prefix_cache=lambda: setattr(self, "cached", False),
        )
        self.made = made

    def worker(self, method: str, *given: Any) -> list[Any]:
        """A call of every worker, of which there is one."""
        self.calls.append(method)
        return [getattr(self.made, method)(*given)]

    def memory(self, way: str, tags: list[str]) -> None:
        known = self.types()
        assert set(tags) <= known, f"unknown tags {set(tags) - known}"
        if way == "sleep":
            assert not self.open, "requests run"
            self.asleep |= set(tags)
        else:
            assert set(tags) <= self.asleep
            self.asleep -= set(tags)

    def types(self) -> set[str]:
        module = sys.modules[ARGUMENTS]
        found = getattr(module, "ExecutorMemoryType", None)
        found = found or sys.modules["tensorrt_llm._torch.virtual_memory"].ExecutorMemoryType
        return {member.value for member in found}

    def update(self, ipc_handles: Any) -> None:
        if ipc_handles is None:
            self.live, self.cached = dict(self.staged), False
            return
        assert "model" not in self.asleep, "weights are loaded into memory that is not there"
        if self.device not in ipc_handles:
            raise ValueError(f"Device UUID {self.device} not found in ipc_handles")
        pairs = pickle.loads(base64.b64decode(ipc_handles[self.device]))  # noqa: S301 - its own
        for name, (func, args) in pairs:
            given = list(args)
            given[6] = 0
            self.staged[name] = func(*given)


async def _self(llm: Any) -> Any:
    return llm


async def _step(result: Any) -> Any:
    await asyncio.sleep(0)
    if result.done:
        raise StopAsyncIteration
    played = result.played
    if played.silent:
        await asyncio.sleep(3600)
    if not result.aborted and len(result.outputs[0].token_ids) < result.tokens:
        first = result.outputs[0]
        token = sum(played.live.values()) + len(first.token_ids)
        first.token_ids = [*first.token_ids, token]
        entry = sys.modules["tensorrt_llm.executor.result"].Logprob(logprob=-0.5, rank=1)
        first.logprobs = [*first.logprobs, {token: entry}]
    if result.aborted or len(result.outputs[0].token_ids) == result.tokens:
        result.done = True
        played.open -= 1
    return result


async def _whole(result: Any) -> Any:
    while not result.done:
        await _step(result)
    return result


def _begin(self: Any, **given: Any) -> None:
    CURRENT[0].begin(self, given)


def _rpc(self: Any, method: str, args: Any, kwargs: Any, unique_reply_rank: Any) -> Any:
    assert (kwargs, unique_reply_rank) == (None, None)
    return self.played.worker(method, *args)


def _ask(self: Any, inputs: list[int], sampling_params: Any, streaming: bool, **_: Any) -> Any:
    played = self.played
    assert not played.asleep
    assert inputs
    assert all(isinstance(token, int) for token in inputs)
    assert sampling_params.end_id is not None, "the engine has no tokenizer to ask"
    module = sys.modules["tensorrt_llm.executor.result"]
    result = module.GenerationResult()
    result.played, result.done, result.aborted = played, False, False
    result.tokens, result.streaming = sampling_params.max_tokens, streaming
    result.outputs = [module.CompletionOutput(token_ids=[], logprobs=[])]
    played.open += 1
    return result


CURRENT: list[Played] = []


@pytest.fixture
def played() -> Played:
    found = Played()
    found.names |= {
        f"{LLM}.__init__": _begin,
        f"{LLM}.collective_rpc": _rpc,
        f"{LLM}.generate_async": _ask,
        f"{EXTENSION}.update_weights": lambda ipc_handles, **_: found.update(ipc_handles),
    }
    CURRENT[:] = [found]
    return found


Install = Callable[[Record], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, played: Played) -> Install:
    """Put an engine that is made of a record in the place of the real one."""

    def put(record: Record) -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "tensorrt_llm"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in recorded.modules(record, played.names).items():
            monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of torch and Ray as the backend calls."""
    cuda = SimpleNamespace(
        synchronize=lambda _: None,
        get_device_properties=lambda _: SimpleNamespace(uuid=UUID.removeprefix("GPU-")),
    )
    fakes: dict[str, Any] = {
        "torch": SimpleNamespace(cuda=cuda),
        "torch.multiprocessing": ModuleType("torch.multiprocessing"),
        "torch.multiprocessing.reductions": SimpleNamespace(reduce_tensor=reduced),
        "ray": SimpleNamespace(shutdown=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(gpu, "first", lambda: ("a GPU", "cuda:0"))
    monkeypatch.setattr(gpu, "collect", lambda: None)
    monkeypatch.setattr(gpu, "used", lambda _: 5)
    for name in tensorrt_llm.SETTINGS:
        monkeypatch.delenv(name, raising=False)


CONFIG = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 2}))
    return tmp_path


@pytest.fixture
def engine(install: Install, torch: None) -> Iterator[tensorrt_llm.Engine]:  # noqa: ARG001
    install(RECORD)
    found = tensorrt_llm.Engine()
    yield found
    found.stop()


PROMPTS = [[1, 2, 3], [4, 5]]
CALM = Completion((0, 1, 2), (-0.5,) * 3)


# the record


def test_every_entry_of_the_record_says_where_it_was_read() -> None:
    sources = WHOLE["sources"]
    assert {entry["source"] for entry in RECORD.values()} | {"verl"} == set(sources)
    for about in sources.values():
        assert re.fullmatch(r"github [\w.-]+/[\w.-]+", about["repository"])
        assert about["file"]
        # A commit, or at least how long the file is that was read.
        assert about["commit"] or about["characters"]
    for name, entry in RECORD.items():
        if entry["source"] == "verl":
            assert entry["verl"], name
        if entry["verl"]:
            assert re.fullmatch(r"verl/[\w/]+\.py:\d+", entry["verl"])
    assert sources["verl"]["tag"] == "v0.7.1"


def test_the_record_does_not_claim_a_tag_that_nobody_knows() -> None:
    others = {name: about for name, about in WHOLE["sources"].items() if name != "verl"}
    assert {about["tag"] for about in others.values()} == {None}
    assert "The tag of TensorRT-LLM that a file is of is not known" in WHOLE["about"]


# the interface


def test_what_the_backend_says_it_uses_is_what_the_sources_have(install: Install) -> None:
    install(RECORD)
    found = compared("tensorrt-llm", ["fp8"])
    assert found["problems"] == []
    assert found["without"] == ["sleep_config", "cached_tokens"]
    assert found["looked_at"]["calls"] >= 14


def test_a_later_version_sleeps_another_way_and_agrees_too(install: Install) -> None:
    install(with_sleep_config(RECORD))
    found = compared("tensorrt-llm")
    assert found["problems"] == []
    assert found["without"] == ["cached_tokens"]


# What the backend does not call of the record: the engine's own, and the worker's. Every class
# has an __init__.
UNUSED = {f"{LLM}.setup_async", f"{LLM}.__init__", f"{EXTENSION}.check_weights_updated"} | {
    name for name in RECORD if name.startswith(f"{WORKER}.")
}


@pytest.mark.parametrize("name", sorted(RECORD.keys() - UNUSED))
def test_each_name_that_the_sources_would_not_have_is_found(install: Install, name: str) -> None:
    lost = {key: entry for key, entry in RECORD.items() if not f"{key}.".startswith(f"{name}.")}
    install(lost)
    assert compared("tensorrt-llm")["problems"] != []


@pytest.mark.parametrize(
    ("name", "signature", "said"),
    [
        (f"{LLM}.release", "(self)", "cannot be called with (tags)"),
        (f"{LLM}.update_weights", "(self, weights, version)", "'version'"),
        (f"{LLM}.collective_rpc", "(self, method, arguments=())", "'args'"),
        (f"{LLM}.generate_async", "(self, prompt, sampling_params=None)", "'prompt'"),
        (f"{EXTENSION}.update_weights", "(self)", "cannot be called with (handles)"),
    ],
)
def test_another_signature_is_found(install: Install, name: str, signature: str, said: str) -> None:
    record = copy.deepcopy(RECORD)
    record[name]["signature"] = signature
    install(record)
    problems = compared("tensorrt-llm")["problems"]
    assert [where for where, what in problems if said in what] == [name]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(
            (f"{ARGUMENTS}:TorchLlmArgs", f)
            for f in ("load_format", "sampler_type", "enable_sleep")
        ),
        ("tensorrt_llm:SamplingParams", "ignore_eos"),
        ("tensorrt_llm.llmapi:KvCacheConfig", "max_tokens"),
        ("tensorrt_llm.executor.result:CompletionOutput", "logprobs"),
    ],
)
def test_a_field_that_is_gone_is_found(install: Install, name: str, field: str) -> None:
    record = copy.deepcopy(RECORD)
    record[name]["fields"].remove(field)
    install(record)
    assert name in [where for where, _ in compared("tensorrt-llm")["problems"]]


def test_a_worker_that_has_a_name_of_the_extension_is_found(install: Install) -> None:
    record = copy.deepcopy(RECORD)
    own = {"kind": "function", "signature": "(self)", "source": "", "line": None, "verl": None}
    record[f"{WORKER}.smoke_held"] = own
    install(record)
    (problem,) = compared("tensorrt-llm")["problems"]
    assert problem == (WORKER, "has 'smoke_held' itself, and refuses an extension that has it")


def test_without_the_engine_everything_is_a_problem_and_nothing_raises() -> None:
    assert "tensorrt_llm" not in sys.modules
    seen = Comparison()
    from rollout.backends import tensorrt_llm_interface

    tensorrt_llm_interface.compare(seen)
    assert len(seen.problems) > 10


# the backend, whole


def test_it_is_started_as_verl_starts_it(
    engine: tensorrt_llm.Engine, played: Played, model: Path
) -> None:
    engine.start(model, dummy=True, level=1)
    options = played.options
    assert options["backend"] == "pytorch"
    assert options["load_format"] == "dummy"
    assert options["enable_sleep"] is True
    assert options["kv_cache_config"].enable_block_reuse is True
    # 2 (key and value) * 2 bytes * 2 layers * 2 heads * 64
    assert options["kv_cache_config"].max_tokens == tensorrt_llm.KV_BYTES // 1024
    assert "cuda_graph_config" not in options, "CUDA graphs are what a trainer uses"
    assert engine.levels == (1,)
    assert engine.held() == 22 + tensorrt_llm.KV_BYTES
    assert engine.memory() == 5


def test_it_has_a_ray_of_its_own(
    engine: tensorrt_llm.Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "0")
    engine.start(model, dummy=True)
    assert os.environ["TLLM_RAY_FORCE_LOCAL_CLUSTER"] == "1"
    assert os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "0", "the user's stays"


def test_it_answers_every_prompt_with_tokens_and_their_log_probabilities(
    engine: tensorrt_llm.Engine, model: Path
) -> None:
    engine.start(model, dummy=True)
    assert engine.generate(PROMPTS, 3) == [CALM, CALM]


def test_a_turn_of_the_loop_brings_new_weights_and_only_once_they_are_finalized(
    engine: tensorrt_llm.Engine, played: Played, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout import cuda_ipc

    monkeypatch.setattr(cuda_ipc, "BUCKET_BYTES", 1000)
    engine.start(model, dummy=True)
    engine.sleep(1)
    assert played.asleep == {tag for tag in played.types() if not tag.startswith("_")}
    engine.wake([WEIGHTS])
    assert played.asleep == {KV_CACHE}
    played.calls.clear()
    sent = engine.refit((f"w{n}", Tensor(10, 200)) for n in range(3))
    assert played.calls == ["update_weights"] * 3, "two buckets of 800 and 400 bytes, and the end"
    assert sent == 3 * 400
    engine.wake([KV_CACHE])
    assert not played.cached, "keys and values of old weights are gone"
    assert engine.generate([[1]], 2)[0].tokens == (30, 31)
    played.cached = True
    engine.reset_prefix_cache()
    assert not played.cached


def test_what_is_sent_is_a_copy(
    engine: tensorrt_llm.Engine, played: Played, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        tensorrt_llm, "_handles", lambda kept: seen.extend(t for _, t in kept) or ""
    )
    monkeypatch.setattr(played, "update", lambda _: None)
    engine.start(model, dummy=True)
    own = Tensor(1, 4)
    engine.refit([("w", own)])
    assert own not in seen
    assert len(seen) == 1


def test_a_rollout_is_interrupted_when_every_prompt_has_its_tokens_and_nothing_runs_on(
    engine: tensorrt_llm.Engine, played: Played, model: Path
) -> None:
    engine.start(model, dummy=True)
    found = engine.interrupt(PROMPTS, 50, 4)
    assert [len(answer.tokens) for answer in found] == [4, 4]
    assert played.open == 0
    assert [len(a.tokens) for a in engine.interrupt(PROMPTS, 2, 4)] == [2, 2], "they end before"
    engine.sleep(1)


def test_with_enable_sleep_the_weights_are_kept_and_no_other_level_is_promised(
    engine: tensorrt_llm.Engine, model: Path
) -> None:
    with pytest.raises(EngineError, match=r"keeps the weights in main memory .* level 1 alone"):
        engine.start(model, dummy=True, level=2)
    engine.start(model, dummy=True, level=1)
    with pytest.raises(EngineError, match="was not started for level 2"):
        engine.sleep(2)


@pytest.mark.parametrize(("level", "mode"), [(1, "PINNED"), (2, "NONE")])
@pytest.mark.usefixtures("torch")
def test_with_sleep_config_it_is_started_for_a_level(
    install: Install, played: Played, model: Path, level: int, mode: str
) -> None:
    install(with_sleep_config(RECORD))
    engine = tensorrt_llm.Engine()
    engine.start(model, dummy=True, level=level)
    modes = played.options["sleep_config"].restore_modes
    assert {key.value: value for key, value in modes.items()} == {
        "model_weights": mode,
        "kv_cache": "NONE",
    }
    engine.sleep(level)
    assert {"model_weights", "model", "kv_cache"} <= played.asleep
    engine.wake([WEIGHTS, KV_CACHE])
    assert not played.asleep
    engine.stop()


@pytest.mark.usefixtures("torch")
def test_one_that_cannot_sleep_is_refused(install: Install, model: Path) -> None:
    record = copy.deepcopy(RECORD)
    record[f"{ARGUMENTS}:TorchLlmArgs"]["fields"].remove("enable_sleep")
    install(record)
    with pytest.raises(EngineError, match="this TensorRT-LLM cannot sleep"):
        tensorrt_llm.Engine().start(model, dummy=True)


@pytest.mark.usefixtures("torch")
def test_an_argument_that_it_does_not_have_is_named(install: Install, model: Path) -> None:
    record = copy.deepcopy(RECORD)
    record[f"{ARGUMENTS}:TorchLlmArgs"]["fields"].remove("sampler_type")
    install(record)
    with pytest.raises(EngineError, match="has no argument 'sampler_type'"):
        tensorrt_llm.Engine().start(model, dummy=True)


def test_fp8_starts_on_dummy_weights_and_is_sent_quantised_weights(
    engine: tensorrt_llm.Engine, played: Played, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "quantise", lambda t: (Tensor(t.value + 1), Tensor(100)))
    with pytest.raises(EngineError, match="start it on dummy"):
        engine.start(model, dummy=False, fp8=True)
    engine.start(model, dummy=True, fp8=True)
    config = played.options["model_kwargs"]["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    name = "model.layers.0.mlp.up_proj.weight"
    engine.refit([(name, Tensor(1)), ("model.norm.weight", Tensor(7))])
    assert played.live == {"w": 0, name: 2, f"{name}_scale_inv": 100, "model.norm.weight": 7}


def test_a_refit_that_the_engine_refuses_is_an_error(
    engine: tensorrt_llm.Engine, played: Played, model: Path
) -> None:
    engine.start(model, dummy=True)
    played.device = "GPU-another"
    with pytest.raises(EngineError, match=r"ValueError: Device UUID GPU-another not found"):
        engine.refit([("w", Tensor(1))])


def test_an_engine_on_another_gpu_is_an_error(
    engine: tensorrt_llm.Engine, played: Played, model: Path, install: Install
) -> None:
    played.names["tensorrt_llm._torch.utils:get_device_uuid"] = lambda **_: "GPU-else"
    install(RECORD)
    with pytest.raises(EngineError, match="works on the GPU GPU-else, the trainer on 3f0c"):
        engine.start(model, dummy=True)


def test_an_engine_that_answers_nothing_is_given_up(
    engine: tensorrt_llm.Engine, played: Played, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.start(model, dummy=True)
    monkeypatch.setattr(tensorrt_llm, "TIMEOUT", 0.2)
    played.silent = True
    with pytest.raises(EngineError, match="did not answer for 0 s"):
        engine.generate(PROMPTS, 3)


def test_what_it_does_not_have_is_said(engine: tensorrt_llm.Engine, model: Path) -> None:
    with pytest.raises(EngineError, match="on one GPU only"):
        engine.start(model, dummy=True, gpus=2)
    with pytest.raises(EngineError, match="is not started"):
        engine.generate(PROMPTS, 1)
    for call in (engine.remember, engine.unchanged):
        with pytest.raises(EngineError, match="no weights checker"):
            call()


def test_it_is_stopped_twice_without_harm(
    engine: tensorrt_llm.Engine, played: Played, model: Path
) -> None:
    engine.start(model, dummy=True)
    engine.stop()
    engine.stop()
    assert played.calls.count("shutdown") == 1
    with pytest.raises(EngineError, match="is not started"):
        engine.sleep(1)


# what is inside


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_weights_in_8_bits_are_those_of_verl(name: str, linear: bool) -> None:
    assert weights.is_linear(name) == linear


def test_packed_parameters_are_taken_apart_by_their_rows() -> None:
    config = SimpleNamespace(
        **CONFIG, num_key_value_heads=2, head_dim=64, intermediate_size=512, vocab_size=1000
    )
    assert parts("l.0.self_attn.qkv_proj.weight", (512, 256), config) == [
        ("l.0.self_attn.q_proj.weight", 0, 256),
        ("l.0.self_attn.k_proj.weight", 256, 384),
        ("l.0.self_attn.v_proj.weight", 384, 512),
    ]
    assert parts("l.0.mlp.gate_up_proj.weight", (1024, 256), config) == [
        ("l.0.mlp.gate_proj.weight", 0, 512),
        ("l.0.mlp.up_proj.weight", 512, 1024),
    ]
    assert parts("lm_head.weight", (1024, 256), config) == [("lm_head.weight", 0, 1000)]
    assert parts("l.0.mlp.down_proj.weight", (256, 512), config)[0][1:] == (0, 256)


def test_a_call_that_the_sources_do_not_have_fails(
    engine: tensorrt_llm.Engine, model: Path
) -> None:
    engine.start(model, dummy=True)
    with pytest.raises(EngineError, match=r"AttributeError: .*no attribute 'wake_up'"):
        engine._call(lambda: engine._llm.wake_up())
    with pytest.raises(EngineError, match=r"TypeError: .*unexpected keyword argument 'level'"):
        engine._call(lambda: engine._llm.release([], level=1))

"""What the check `interface` promises: what a backend uses of its engine, and the engine lacks, is
found by name, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from images.catalog import ROOT
from rollout import presence, verify
from rollout.backends import interface, vllm, vllm_interface
from rollout.backends.interface import Comparison
from rollout.backends.vllm_extension import Extension
from rollout.placement import PACKED

from .conftest import found

# looking


@dataclasses.dataclass
class Options:
    model: str
    dtype: str = "auto"


class Base:
    def __init__(self) -> None:
        self.device: str | None = None


class Engine(Base):
    def __init__(self, model: str, **others: object) -> None:
        super().__init__()
        self.model = model, others

    def sleep(self, level: int = 1) -> None: ...

    @staticmethod
    def make(name: str) -> None: ...


HERE = __name__


def test_what_is_there_is_counted_and_no_problem() -> None:
    seen = Comparison()
    seen.called(f"{HERE}:Engine.__init__", model="x", seed=0)
    seen.called(f"{HERE}:Engine.sleep", level=2)
    seen.called(f"{HERE}:Engine.make", "name")
    seen.called(f"{HERE}:Engine", "model")
    seen.assigned(f"{HERE}:Engine", ["device", "model", "sleep"])
    seen.fields((f"{HERE}:Options",), ["model", "dtype"])
    assert seen.problems == []
    assert seen.looked_at == {"names": 6, "calls": 4, "attributes": 3, "fields": 2}


@pytest.mark.parametrize(
    ("look", "where", "what"),
    [
        (lambda s: s.thing("no_such_engine:LLM"), "no_such_engine:LLM", "ModuleNotFoundError"),
        (lambda s: s.thing(f"{HERE}:Engine.wake"), f"{HERE}:Engine.wake", "no attribute 'wake'"),
        (lambda s: s.called(f"{HERE}:Engine.wake"), f"{HERE}:Engine.wake", "no attribute 'wake'"),
        (
            lambda s: s.called(f"{HERE}:Engine.sleep", level=1, mode="keep"),
            f"{HERE}:Engine.sleep",
            "unexpected keyword argument 'mode'",
        ),
        (lambda s: s.called(f"{HERE}:Engine.make"), f"{HERE}:Engine.make", "'name'"),
        (lambda s: s.assigned(f"{HERE}:Engine", ["runner"]), f"{HERE}:Engine", "'runner'"),
        (lambda s: s.fields((f"{HERE}:Options",), ["seed"]), f"{HERE}:Options", "field 'seed'"),
    ],
)
def test_what_is_missing_is_named(look: Callable[[Comparison], Any], where: str, what: str) -> None:
    seen = Comparison()
    look(seen)
    ((place, problem),) = seen.problems
    assert place == where
    assert what in problem


def test_what_has_moved_is_found_at_its_other_place() -> None:
    seen = Comparison()
    seen.fields(("no_such_engine:Options", f"{HERE}:Options"), ["model"])
    assert seen.thing("no_such_engine:Options", f"{HERE}:Options") is Options
    assert not seen.problems


def test_what_can_be_done_without_is_noted_and_no_problem() -> None:
    seen = Comparison()
    seen.fields((f"{HERE}:Options",), ["model", "progress"], {"progress"})
    assert (seen.problems, seen.without) == ([], ["progress"])


@pytest.mark.parametrize("error", [RuntimeError("oh\nat length"), SystemExit(2), KeyError("x")])
def test_a_part_that_cannot_be_looked_at_is_a_problem_and_no_end(error: BaseException) -> None:
    seen = Comparison()
    with seen.part("the server"):
        raise error
    ((where, what),) = seen.problems
    assert where == "the server"
    assert what.startswith(f"cannot be looked at: {type(error).__name__}: ")
    assert "\n" not in what


# vLLM, which is none: classes of the shape that the backend uses


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All that the backend uses of vLLM, by module; a test takes something away."""

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            self.llm_engine = model, options

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> None: ...
        def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None: ...
        def sleep(self, level: int = 1) -> None: ...
        def wake_up(self, tags: Any = None) -> None: ...
        def reset_prefix_cache(self) -> None: ...

    class LLMEngine:
        def __init__(self) -> None:
            self.engine_core = None

        def add_request(self, request_id: str, prompt: Any, params: Any) -> None: ...
        def has_unfinished_requests(self) -> None: ...
        def step(self) -> None: ...
        def abort_request(self, request_ids: Any) -> None: ...

    class SyncMPClient:
        def shutdown(self, timeout: float | None = None) -> None: ...

    class SamplingParams:
        def __init__(
            self,
            temperature: float,
            max_tokens: int,
            ignore_eos: bool,
            logprobs: int,
            detokenize: bool,
        ) -> None: ...

    class Worker:
        def __init__(self) -> None:
            self.model_runner = self.model_config = self.vllm_config = None
            self.device: Any = None

        def sleep(self, level: int = 1) -> None: ...
        def wake_up(self, tags: Any = None) -> None: ...

    class GPUModelRunner:
        def get_model(self) -> None: ...

    class Fp8LinearMethod:
        def create_weights(
            self,
            layer: Any,
            input_size_per_partition: int,
            output_partition_sizes: Any,
            input_size: int,
            output_size: int,
            params_dtype: Any,
            **extra: Any,
        ) -> None:
            del input_size, output_size, extra
            layer.logical_widths = output_partition_sizes
            layer.orig_dtype = params_dtype
            layer.input_size_per_partition = input_size_per_partition

        def process_weights_after_loading(self, layer: Any) -> None: ...

    class Linear:
        def __init__(self) -> None:
            self.input_size = self.output_size = self.input_size_per_partition = 1
            self.output_sizes: list[int] = []

        def weight_loader_v2(self, parameter: Any, loaded: Any) -> None: ...

    class Embedding:
        def __init__(self) -> None:
            self.org_vocab_size = 1

    class LlamaForCausalLM:
        packed_modules_mapping: ClassVar = {name: list(parts) for name, parts in PACKED.items()}

        def load_weights(self, weights: Any) -> None: ...

    def record(*names: str) -> type:
        return dataclasses.make_dataclass("Record", names)

    def set_current_vllm_config(config: Any) -> None: ...
    def process_weights_after_loading(model: Any, config: Any, device: Any) -> None: ...

    class Parser:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def parse_args(self, given: list[str]) -> Any:
            unknown = [word for word in given if word.startswith("--") and word not in self.names]
            if unknown:
                raise SystemExit(2)
            return SimpleNamespace(enable_sleep_mode=True, load_format="dummy")

    parser = Parser()
    options = vllm.arguments(Path("m"), 1 << 40, dummy=True, fp8=True)
    bf16 = vllm.arguments(Path("m"), 1 << 40, dummy=True, fp8=False)
    parser.names = {w for w in vllm.served(Path("m"), bf16) if w.startswith("--")}
    paths = [*vllm.PATHS, *vllm.PAUSING]
    app = SimpleNamespace(routes=[SimpleNamespace(path=path) for path in paths])
    platform = SimpleNamespace(device_type="")
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": record(*options)},
        "vllm.config": {
            "ParallelConfig": record("worker_extension_cls"),
            "CacheConfig": record("block_size"),
            "set_current_vllm_config": set_current_vllm_config,
        },
        "vllm.envs": {
            "environment_variables": {"VLLM_SERVER_DEV_MODE": 1, "VLLM_LOGGING_LEVEL": 1}
        },
        "vllm.platforms": {"current_platform": platform},
        "vllm.outputs": {
            "RequestOutput": record("request_id", "outputs", "num_cached_tokens"),
            "CompletionOutput": record("token_ids", "logprobs"),
        },
        "vllm.logprobs": {"Logprob": record("logprob")},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.llm_engine": {"LLMEngine": LLMEngine},
        "vllm.v1.engine.core_client": {"SyncMPClient": SyncMPClient},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu_worker": {"Worker": Worker},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": GPUModelRunner},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.utils": {
            "process_weights_after_loading": process_weights_after_loading
        },
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {"LlamaForCausalLM": LlamaForCausalLM},
        layers: {},
        f"{layers}.quantization": {},
        f"{layers}.quantization.fp8": {"Fp8LinearMethod": Fp8LinearMethod},
        f"{layers}.linear": dict.fromkeys(
            ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"), Linear
        ),
        f"{layers}.vocab_parallel_embedding": {"VocabParallelEmbedding": Embedding},
        "vllm.entrypoints": {},
        "vllm.entrypoints.openai": {},
        "vllm.entrypoints.openai.api_server": {"build_app": lambda _: app},
        "vllm.entrypoints.openai.cli_args": {
            "make_arg_parser": lambda _: parser,
            "FlexibleArgumentParser": object,
        },
        "vllm.entrypoints.openai.protocol": {
            "CompletionRequest": record(*vllm.asked([], 1, stream=True)),
            "CompletionResponse": record("choices"),
            "CompletionResponseChoice": record("index", "logprobs", "token_ids"),
            "CompletionResponseStreamChoice": record("index", "logprobs", "token_ids"),
            "CompletionLogProbs": record("token_logprobs"),
            "ModelCard": record("root"),
        },
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    sources = {
        vllm_interface.ALLOCATOR: (
            "class CuMemAllocator:\n"
            "    def get_instance(): ...\n"
            "    def get_current_usage(self): ...\n"
        ),
        f"{layers}.quantization.fp8": 'name = "weight_scale_inv"\n',
    }
    monkeypatch.setattr(vllm_interface, "_source", lambda module: sources[module])
    there = {"vllm.cumem_allocator"}
    monkeypatch.setattr(vllm_interface, "find_spec", lambda name: name in there or None)
    monkeypatch.delenv(vllm.DEVELOPMENT, raising=False)
    return SimpleNamespace(
        contents=contents, paths=app, parser=parser, sources=sources, there=there, record=record
    )


PROMISED = ("fp8", "server")


def problems() -> list[tuple[str, str]]:
    seen = Comparison(PROMISED)
    vllm_interface.compare(seen)
    return seen.problems


@pytest.mark.usefixtures("engine")
def test_a_vllm_that_has_everything_is_found_whole_and_much_was_looked_at() -> None:
    seen = Comparison(PROMISED)
    vllm_interface.compare(seen)
    assert (seen.problems, seen.without) == ([], [])
    assert seen.looked_at["routes"] == len(vllm.PATHS) + len(vllm.PAUSING)
    assert seen.looked_at["fields"] >= len(vllm.arguments(Path(), 1, dummy=True, fp8=True))
    assert all(seen.looked_at[kind] > 0 for kind in ("names", "calls", "attributes", "arguments"))


@pytest.mark.parametrize(
    ("module", "kind", "method"),
    [
        ("vllm", "LLM", "wake_up"),
        ("vllm", "LLM", "collective_rpc"),
        ("vllm.v1.engine.llm_engine", "LLMEngine", "abort_request"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "get_model"),
        (
            "vllm.model_executor.layers.quantization.fp8",
            "Fp8LinearMethod",
            "process_weights_after_loading",
        ),
    ],
)
def test_a_method_that_vllm_lost_is_named(engine: Any, module: str, kind: str, method: str) -> None:
    delattr(engine.contents[module][kind], method)
    assert f"{module}:{kind}.{method}" in [where for where, _ in problems()]


def test_a_module_is_not_there_where_its_package_is_not_either() -> None:
    assert presence.find_spec("json.decoder") is not None
    assert presence.find_spec("json.nothing") is None
    assert presence.find_spec("json.nothing.at_all") is None


def test_a_method_that_wants_more_than_it_is_given_is_named(engine: Any) -> None:
    class Llm(engine.contents["vllm"]["LLM"]):  # type: ignore[misc]
        def sleep(self, level: int, mode: str) -> None: ...

    sys.modules["vllm"].LLM = Llm  # type: ignore[attr-defined]
    assert any(w == "vllm:LLM.sleep" and "'mode'" in what for w, what in problems())


@pytest.mark.parametrize("name", sorted(vllm.arguments(Path(), 1, dummy=True, fp8=True)))
def test_an_argument_that_vllm_lost_is_named_or_done_without(engine: Any, name: str) -> None:
    whole = vllm.arguments(Path(), 1, dummy=True, fp8=True)
    kind = engine.record(*[field for field in whole if field != name])
    sys.modules["vllm.engine.arg_utils"].EngineArgs = kind  # type: ignore[attr-defined]
    seen = Comparison(PROMISED)
    vllm_interface.compare(seen)
    where = "vllm.engine.arg_utils:EngineArgs"
    if name in vllm.DISPENSABLE:
        assert (seen.problems, seen.without) == ([], [name])
    else:
        assert (where, f"has no field {name!r}") in seen.problems


def test_what_serves_a_promise_alone_is_not_looked_at_where_nothing_promises_it(
    engine: Any,
) -> None:
    engine.paths.routes = []
    engine.sources["vllm.model_executor.layers.quantization.fp8"] = ""
    seen = Comparison()
    vllm_interface.compare(seen)
    assert (seen.problems, seen.looked_at["routes"]) == ([], 0)
    assert len(problems()) > len(vllm.PATHS), "promised, all of it is missed"


@pytest.mark.parametrize("path", [*vllm.PATHS, *vllm.PAUSING])
def test_a_path_that_the_server_lost_is_named(engine: Any, path: str) -> None:
    engine.paths.routes = [route for route in engine.paths.routes if route.path != path]
    ((where, what),) = problems()
    assert where == "the server"
    assert what.endswith(path)


def test_a_server_that_was_never_paused_is_done_without(engine: Any) -> None:
    kept = [route for route in engine.paths.routes if route.path not in vllm.PAUSING]
    engine.paths.routes = kept
    seen = Comparison(PROMISED)
    vllm_interface.compare(seen)
    assert (seen.problems, seen.without) == ([], list(vllm.PAUSING))


def test_a_flag_that_the_servers_command_refuses_fails(engine: Any) -> None:
    engine.parser.names.remove("--enable-sleep-mode")
    assert ("command", "cannot be looked at: SystemExit: 2") in problems()


def test_a_field_of_an_answer_that_is_gone_is_named(engine: Any) -> None:
    module: Any = sys.modules["vllm.entrypoints.openai.protocol"]
    module.CompletionResponseStreamChoice = engine.record("index", "logprobs")
    ((where, what),) = problems()
    assert where.endswith(":CompletionResponseStreamChoice")
    assert "'token_ids'" in what


def test_a_worker_that_has_a_name_of_our_extension_is_refused(engine: Any) -> None:
    worker = engine.contents["vllm.v1.worker.gpu_worker"]["Worker"]
    worker.smoke_refit = Extension.smoke_refit
    ((where, what),) = problems()
    assert where == vllm_interface.WORKER
    assert "'smoke_refit'" in what


def test_a_pool_that_does_not_count_is_named(engine: Any) -> None:
    engine.sources[vllm_interface.ALLOCATOR] = "class CuMemAllocator:\n    pass\n"
    assert [what for _, what in problems()] == [
        "has no method 'get_instance'",
        "has no method 'get_current_usage'",
    ]


def test_a_vllm_without_its_pool_is_named(engine: Any) -> None:
    engine.there.clear()
    ((where, what),) = problems()
    assert (where, "cannot sleep" in what) == ("vllm.cumem_allocator", True)


def test_factors_of_another_name_are_named(engine: Any) -> None:
    engine.sources["vllm.model_executor.layers.quantization.fp8"] = 'name = "scale"\n'
    ((_, what),) = problems()
    assert "'weight_scale_inv'" in what


# the process


def test_it_prints_one_object_whatever_an_engine_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rollout.backends.interface", "vllm"],
        env={"PYTHONPATH": str(ROOT / "entrypoints")},
        capture_output=True,
        text=True,
        check=True,
    )
    outcome = json.loads(done.stdout)
    assert set(outcome) == {"looked_at", "without", "problems"}
    assert any(where.startswith("vllm:LLM") for where, _ in outcome["problems"]), "it is not here"


FACTS = {"backend": "vllm"}


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter that does what a line of shell says; it notes how it was called."""

    def make(line: str) -> str:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n{line}\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_what_was_looked_at_is_in_the_metrics(python: Callable[[str], str], tmp_path: Path) -> None:
    line = """echo '{"looked_at": {"calls": 3}, "without": ["a", "b"], "problems": []}'"""
    findings = verify.interface(FACTS, python(line))
    assert not findings.problems
    assert (findings.metrics["calls"], findings.metrics["without"]) == (3, "a,b")
    assert (tmp_path / "called").read_text() == "-I -B -m rollout.backends.interface vllm\n"
    verify.interface({**FACTS, "smoke": {"server": True, "fp8": False}}, python(line))
    called = (tmp_path / "called").read_text()
    assert called == "-I -B -m rollout.backends.interface vllm server\n", "and what is promised"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            """echo '{"looked_at": {"calls": 3}, "without": [],"""
            """ "problems": [["LLM", "is gone"]]}'""",
            "LLM: is gone",
        ),
        ("echo oh >&2; exit 1", "vllm: cannot be compared: oh"),
        ("kill -SEGV $$", "vllm: cannot be compared: ended by signal 11"),
    ],
)
def test_what_a_comparison_finds_fails_the_check(
    python: Callable[[str], str], line: str, sentence: str
) -> None:
    assert sentence in found(verify.interface(FACTS, python(line)))


def test_a_backend_that_names_nothing_proves_nothing(python: Callable[[str], str]) -> None:
    line = """echo '{"looked_at": {}, "without": [], "problems": []}'"""
    assert verify.interface(FACTS, python(line)).unproved


def test_a_backend_that_does_not_say_what_it_uses_is_not_asked() -> None:
    assert "interface" in verify.available({"backend": "vllm"})
    assert not interface.has("transformers")
    for facts in ({}, {"backend": "transformers"}):
        assert "interface" not in verify.available(facts)

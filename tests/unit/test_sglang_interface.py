"""What the check `interface` promises of SGLang: what its backend uses and it lacks is named."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout.backends import sglang, sglang_interface
from rollout.backends.interface import Comparison

from . import fake_sglang

NEWEST = ("begin_weight_update", "end_weight_update")


class Linear:
    output_sizes: tuple[int, ...] = ()


class Embedding:
    org_vocab_size = 0


class Llama:
    def load_weights(self, weights: Any) -> None: ...


def engine() -> type:
    """SGLang's engine: each method has the arguments that the newest has."""

    class Engine:
        run_scheduler_process_func = None

        def __init__(self) -> None:
            self.tokenizer_manager = None

        def generate(
            self, prompt: Any = None, sampling_params: Any = None, input_ids: Any = None,
            return_logprob: bool = False,
        ) -> None: ...  # fmt: skip
        def collective_rpc(self, method: str, **options: Any) -> None: ...
        def flush_cache(self) -> None: ...
        def release_memory_occupation(self, tags: Any = None) -> None: ...
        def resume_memory_occupation(self, tags: Any = None) -> None: ...
        def update_weights_from_disk(self, model_path: str, load_format: Any = None) -> None: ...
        def init_weights_update_group(
            self, master_address: str, master_port: int, rank_offset: int, world_size: int,
            group_name: str, backend: str = "nccl",
        ) -> None: ...  # fmt: skip
        def update_weights_from_distributed(
            self, names: Any, dtypes: Any, shapes: Any, group_name: str = "", flush_cache: Any = 1
        ) -> None: ...
        def shutdown(self) -> None: ...
        def begin_weight_update(self, selector: str = "all") -> None: ...
        def end_weight_update(self) -> None: ...

    Engine.__module__ = "sglang.srt.entrypoints.engine"
    return Engine


class Manager:
    def generate_request(self, obj: Any, request: Any = None) -> None: ...
    def abort_request(self, rid: str) -> None: ...
    def update_weights_from_tensor(self, obj: Any, request: Any = None) -> None: ...
    def check_weights(self, obj: Any, request: Any = None) -> None: ...


class Scheduler:
    def process(self) -> None: ...


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Modules of an SGLang that has everything, by name below ``sglang.srt``; one may take away."""
    paths = [*sglang_interface.PATHS, *sglang_interface.PAUSING, sglang.BEGIN, sglang.END]
    routes = [SimpleNamespace(path=path) for path in [*paths, sglang_interface.NAMES[0]]]

    def asked(*names: str) -> type:
        return dataclasses.make_dataclass("Asked", [(n, Any, None) for n in names])

    layers = {"QKVParallelLinear": Linear, "MergedColumnParallelLinear": Linear}
    found: dict[str, Any] = {
        "server_args": fake_sglang.server_args(),
        "entrypoints.engine": {"Engine": engine()},
        "entrypoints.http_server": {"app": SimpleNamespace(routes=routes)},
        "managers.tokenizer_manager": {"TokenizerManager": Manager},
        "managers.io_struct": {
            "GenerateReqInput": asked(
                "input_ids", "sampling_params", "return_logprob", "stream", "rid"
            ),
            "UpdateWeightsFromTensorReqInput": asked(
                "serialized_named_tensors", "load_format", "flush_cache"
            ),
            "CheckWeightsReqInput": asked("action"),
        },
        "managers.scheduler": {"Scheduler": Scheduler, "run_scheduler_process": print},
        "sampling.sampling_params": {
            "SamplingParams": asked("temperature", "max_new_tokens", "ignore_eos")
        },
        "models.llama": {"LlamaForCausalLM": Llama},
        "layers.linear": layers,
        "layers.vocab_parallel_embedding": {"VocabParallelEmbedding": Embedding},
        "weight_sync.tensor_bucket": {"FlattenedTensorBucket": asked("named_tensors")},
        "utils": {"init_custom_process_group": print},
    }
    fake_sglang.install(monkeypatch, found)
    source = tmp_path / "scheduler.py"
    source.write_text("self.tp_worker = worker\n")
    monkeypatch.setattr(
        sys.modules["sglang.srt.managers.scheduler"], "__file__", str(source), raising=False
    )
    monkeypatch.setattr("inspect.getsource", lambda _: "self.tokenizer_manager = 1\n")
    monkeypatch.setitem(sys.modules, "torch_memory_saver", ModuleType("torch_memory_saver"))
    monkeypatch.setattr(sglang_interface, "as_on_a_gpu", lambda: None)
    found["source"] = source
    return found


def seen(*promised: str) -> Comparison:
    made = Comparison(promised or ("server",))
    sglang_interface.compare(made)
    return made


@pytest.mark.usefixtures("there")
def test_an_sglang_that_has_everything_is_found_whole_and_much_was_looked_at() -> None:
    found = seen()
    assert (found.problems, found.without) == ([], [])
    assert found.looked_at["arguments"] == len(sglang_interface._given())
    assert found.looked_at["routes"] == len(sglang_interface.PATHS) + 3
    assert all(found.looked_at[kind] > 0 for kind in ("names", "calls", "attributes"))


@pytest.mark.parametrize(
    "method", ["generate", "collective_rpc", "flush_cache", "update_weights_from_disk", "shutdown"]
)
def test_a_method_that_the_engine_lost_is_named(there: dict[str, Any], method: str) -> None:
    delattr(there["entrypoints.engine"]["Engine"], method)
    assert f"{sglang_interface.ENGINE}.{method}" in [where for where, _ in seen().problems]


def test_what_older_versions_lack_is_noted_and_no_problem(there: dict[str, Any]) -> None:
    for name in NEWEST:
        delattr(there["entrypoints.engine"]["Engine"], name)
    sys.modules["sglang.srt.server_args"].ServerArgs = fake_sglang.server_args(old=True)[  # type: ignore[attr-defined]
        "ServerArgs"
    ]
    del sys.modules["sglang.srt.weight_sync.tensor_bucket"].FlattenedTensorBucket  # type: ignore[attr-defined]
    found = seen()
    assert found.problems == []
    wanted = [*sglang_interface.DISPENSABLE, *NEWEST, "FlattenedTensorBucket"]
    assert sorted(found.without) == sorted(wanted)


def test_an_option_that_is_gone_is_named_and_one_of_another_name_is_found(
    there: dict[str, Any],
) -> None:
    del there
    names = [n for n in (*fake_sglang.OPTIONS, *fake_sglang.NEWER) if n != "cuda_graph_max_bs"]
    for more, missing in ((["cuda_graph_max_bs_decode"], []), ([], ["cuda_graph_max_bs"])):
        kind = dataclasses.make_dataclass("ServerArgs", [(n, Any, None) for n in [*names, *more]])
        sys.modules["sglang.srt.server_args"].ServerArgs = kind  # type: ignore[attr-defined]
        assert [what for _, what in seen().problems] == [f"has no option {n!r}" for n in missing]


def test_a_scheduler_whose_worker_lies_elsewhere_is_named(there: dict[str, Any]) -> None:
    there["source"].write_text("self.tp_workers = [worker]\n")
    assert seen().problems == [(sglang_interface.SCHEDULER, "assigns no 'tp_worker'")]


@pytest.mark.parametrize("path", [*sglang_interface.PATHS, sglang.END, "/pause_generation"])
def test_a_path_that_the_server_lost_is_named(there: dict[str, Any], path: str) -> None:
    app = there["entrypoints.http_server"]["app"]
    app.routes = [route for route in app.routes if route.path != path]
    ((where, what),) = seen().problems
    assert where == "the server"
    assert path in what
    assert seen("fp8").problems == [], "nothing promises a server"


def test_without_a_gpu_it_looks_as_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: False)
    torch = ModuleType("torch")
    vars(torch)["cuda"] = cuda
    monkeypatch.setitem(sys.modules, "torch", torch)
    sglang_interface.as_on_a_gpu()
    assert cuda.is_available()
    assert cuda.get_device_capability() == (9, 0)
    assert cuda.get_device_properties(0).major == 9

"""vLLM with room for an adapter: how it is started, asked, refitted, and what its worker does.

Neither vLLM nor torch is here: what stands in their place has their names and does as little.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import cuda_ipc, placement
from rollout.backends import EngineError, adapters, lora_vllm, vllm, vllm_extension
from rollout.backends.adapters import Unwrapped
from rollout.backends.lora_vllm_worker import Extension, in_memory, renamed

from . import test_vllm
from .test_vllm import GIB, MODEL, Llm, output, takes

base = test_vllm.llm  # a fixture


class Requests:
    """vLLM's request for an adapter."""

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str, **more: Any) -> None:
        self.said = (lora_name, lora_int_id, lora_path)
        vars(self).update(more, lora_int_id=lora_int_id)


@pytest.fixture
def llm(base: Llm, monkeypatch: pytest.MonkeyPatch) -> Llm:
    """A machine with vLLM whose requests may have an adapter."""
    takes(monkeypatch)
    kind: Any = sys.modules["vllm.engine.arg_utils"]
    names = [*kind.EngineArgs.__dataclass_fields__, *lora_vllm.OPTIONS]
    kind.EngineArgs = importlib.import_module("dataclasses").make_dataclass(
        "EngineArgs", sorted(set(names))
    )
    module = ModuleType("vllm.lora.request")
    vars(module)["LoRARequest"] = Requests
    for name, one in (("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", module)):
        monkeypatch.setitem(sys.modules, name, one)
    loaded: list[int] = []

    def add(request: Requests) -> bool:
        loaded.append(request.said[1])
        return bool(base.answer("add_lora", request.said) is not False)

    def remove(number: int) -> bool:
        return number in loaded and not loaded.remove(number)  # type: ignore[func-returns-value]

    def generate(prompts: Any, parameters: Any, *, use_tqdm: bool, lora_request: Any) -> Any:
        assert use_tqdm is False
        assert parameters["temperature"] == 0.0
        return base.answer("generate", prompts, [one and one.said for one in lora_request])

    vars(base.llm_engine).update(add_lora=add, remove_lora=remove, list_loras=lambda: {*loaded})
    monkeypatch.setattr(base, "generate", generate)
    base.answers["loaded"] = loaded
    return base


@pytest.fixture
def engine(llm: Llm) -> Iterator[lora_vllm.Engine]:
    made = lora_vllm.Engine()
    made.start(MODEL, dummy=True)
    llm.calls.clear()
    yield made
    made.stop()


def test_it_is_started_as_any_vllm_is_and_with_room_for_one_adapter(llm: Llm) -> None:
    engine = lora_vllm.Engine()
    engine.start(MODEL, dummy=True)
    plain = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=False)
    assert llm.options == plain | lora_vllm.OPTIONS
    assert (llm.options["enable_lora"], llm.options["max_loras"]) == (True, 1)
    module, _, name = llm.options["worker_extension_cls"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is Extension
    engine.stop()


@pytest.mark.usefixtures("llm")
@pytest.mark.parametrize("wanted", [{"fp8": True}, {"gpus": 2}])
def test_it_is_started_in_bfloat16_on_one_gpu_alone(wanted: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="in bfloat16 on one GPU only"):
        lora_vllm.Engine().start(MODEL, dummy=True, **wanted)


def test_an_engine_that_does_not_start_says_why(llm: Llm) -> None:
    llm.broken = ValueError("this model takes no adapters")
    with pytest.raises(EngineError, match="with adapters: this model takes no adapters"):
        lora_vllm.Engine().start(MODEL, dummy=True)


@pytest.mark.usefixtures("llm")
def test_it_is_the_one_that_the_check_gets_for_a_vllm() -> None:
    assert type(adapters.adapting(vllm.Engine())) is lora_vllm.Engine


def test_requests_of_one_batch_have_each_their_adapter(llm: Llm, engine: lora_vllm.Engine) -> None:
    engine.load(1, Path("/a"))
    llm.answers["generate"] = [output(2), output(2)]
    assert len(engine.adapted([(1,), (2,)], 2, [0, 1])) == 2
    asked = [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    assert llm.calls == [
        ("add_lora", ("1", 1, "/a")),
        ("generate", asked, [None, ("1", 1, "/a")]),
    ]


def test_an_adapter_that_vllm_does_not_take_is_an_error(llm: Llm, engine: lora_vllm.Engine) -> None:
    llm.answers["add_lora"] = False
    with pytest.raises(EngineError, match="vLLM did not load the adapter of /a"):
        engine.load(1, Path("/a"))
    with pytest.raises(EngineError, match="vLLM did not remove adapter 7"):
        engine.drop(7)


def test_an_adapter_from_memory_goes_the_way_of_a_refit(
    llm: Llm, engine: lora_vllm.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(vllm.Engine, "refit", lambda _self, tensors: sent.append(dict(tensors)))
    tensors: Any = {"x.lora_A.weight": 1}
    engine.take(123, {"r": 8}, tensors)
    assert llm.calls == [("smoke_expect", 123, {"r": 8})]
    assert sent == [tensors]
    # The worker would look for a folder of that name, and the engine would end.
    with pytest.raises(EngineError, match="adapter 123 is not loaded"):
        engine.adapted([[1]], 1, [123])
    llm.answers["loaded"].append(123)
    llm.answers["generate"] = [output(1)]
    engine.adapted([[1]], 1, [123])
    assert llm.calls[-1][2] == [("123", 123, "in-memory")]
    assert engine.loaded() == [123]
    engine.drop(123)
    with pytest.raises(EngineError, match="adapter 123 was never loaded"):
        engine.adapted([[1]], 1, [123])


def test_what_a_worker_knows_is_asked_of_it(llm: Llm, engine: lora_vllm.Engine) -> None:
    llm.answers |= {"smoke_names": {"a": "b"}, "smoke_takes": "verl 1", "smoke_imprint": "x"}
    assert engine.wrapped(["a"]) == {"a": "b"}
    assert (engine.takes_tensors(), engine.imprint()) == ("verl 1", "x")


# faults


def test_an_adapter_that_is_not_replaced_is_the_first_one_under_every_number(
    llm: Llm, engine: lora_vllm.Engine
) -> None:
    engine.inject(adapters.KEPT)
    engine.load(1, Path("/a"))
    engine.load(2, Path("/b"))
    assert [call[1] for call in llm.calls] == [("1", 1, "/a"), ("2", 2, "/a")]
    llm.calls.clear()
    engine.take(2, {}, {})
    assert llm.calls == []


def test_other_faults_are_made_in_the_worker(
    llm: Llm, engine: lora_vllm.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(vllm.Engine, "refit", lambda _self, tensors, _="": sent.append([*tensors]))
    engine.inject(adapters.SCALED)
    engine.load(1, Path("/a"))
    assert llm.calls[-1] == ("smoke_unscale",)
    engine.inject(adapters.LOST)
    engine.wake(("weights",))
    assert llm.calls[-1] == ("smoke_lose_adapters",)
    engine.wake(("kv_cache",))
    assert llm.calls[-1][0] == "wake_up"
    stream: Any = [("a.base_layer.weight", 1), ("b.weight", 2)]
    engine.refit(stream)
    engine.inject(adapters.UNDER)
    engine.refit(stream)
    assert sent == [stream, stream[1:]]


# the worker


class Model:
    """Names of modules and parameters as vLLM has them with its layers wrapped."""

    packed_modules_mapping = placement.PACKED
    parameters = (
        ("model.embed_tokens.base_layer.weight", 5),
        ("model.layers.0.self_attn.qkv_proj.base_layer.weight", 8),
        ("model.layers.0.self_attn.o_proj.base_layer.bias", 4),
        ("model.norm.weight", 3),
        ("lm_head.weight", 5),
    )

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, rows in self.parameters:
            yield name, SimpleNamespace(shape=(rows, 2), dim=lambda: 2)

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        for name, rows in self.parameters:
            path = name.rpartition(".")[0]
            inner = SimpleNamespace(output_sizes=[4, 2, 2], org_vocab_size=rows - 1)
            if path.endswith(".base_layer"):
                yield path.removesuffix(".base_layer"), "a wrapper"
            yield path, inner


def test_tensors_are_sent_by_the_names_that_they_have_under_a_wrapper() -> None:
    layer = "model.layers.0.self_attn"
    names = {
        "model.embed_tokens.weight": "model.embed_tokens.base_layer.weight",
        f"{layer}.k_proj.weight": f"{layer}.k_proj.base_layer.weight",
        f"{layer}.o_proj.bias": f"{layer}.o_proj.base_layer.bias",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert renamed(Model(), list(names)) == names


def test_digests_have_the_names_that_a_trainer_knows() -> None:
    found = placement.places(Unwrapped(Model()))
    layer = "model.layers.0.self_attn"
    assert found[f"{layer}.k_proj.weight"] == (f"{layer}.qkv_proj.weight", 4, 6)
    assert found["model.embed_tokens.weight"] == ("model.embed_tokens.weight", 0, 4)
    assert not [name for name in found if "base_layer" in name]


def test_every_name_is_one_that_no_worker_has() -> None:
    names = [name for name in dir(Extension) if not name.startswith("__")]
    assert [name for name in names if not name.startswith("smoke_")] == []


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's worker without verl, whose manager of adapters keeps what it is given."""
    given: list[Any] = []
    made: Any = Extension()
    made.device, made.given = "cuda:0", given
    made.remove_lora = lambda number: given.append(("remove", number))

    class Manager:
        vocab_size = 9
        lora_config = SimpleNamespace(lora_dtype="bfloat16")
        _adapter_manager = SimpleNamespace(model=SimpleNamespace())

        class _lora_model_cls:  # noqa: N801 - vLLM's name for it
            @staticmethod
            def from_lora_tensors(**asked: Any) -> Any:
                given.append(asked)
                return "an adapter"

        def _load_adapter(self, request: Any) -> Any:
            return f"from {request.said[2]}"

    manager = Manager()
    made.manager = manager
    made.add_lora = lambda request: manager._load_adapter(request)
    helper = SimpleNamespace(from_dict=lambda _: SimpleNamespace(validate_legal=given.append))
    for name, content in {
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Requests},
        "vllm.lora.peft_helper": {"PEFTHelper": helper},
        "vllm.lora.worker_manager": {"LRUCacheWorkerLoRAManager": Manager},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("rollout.backends.lora_vllm_worker._made", [])
    monkeypatch.setattr("rollout.backends.lora_vllm_worker.find_spec", lambda _: None)
    return made


def test_an_adapter_from_memory_takes_the_place_of_the_one_before(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = SimpleNamespace(clone=lambda: "a copy")
    monkeypatch.setattr(
        cuda_ipc, "receive", lambda _one, _two, keep: keep([("x.lora_A.weight", tensor)])
    )
    worker.smoke_expect(123, {"r": 8})
    worker.smoke_load("an address")
    removed, config, asked = worker.given
    assert (removed, config) == (("remove", 123), worker.manager.lora_config)
    assert asked["lora_model_id"] == 123
    assert asked["tensors"] == {"x.lora_A.weight": "a copy"}
    assert worker.smoke_takes() == "ours, as verl's"
    # Folders are loaded as before, and what takes the place of vLLM's method does so once.
    kind = in_memory()
    assert in_memory() is kind
    assert worker.manager._load_adapter(Requests("1", 1, "/a")) == "from /a"


def test_a_refit_is_a_refit_where_no_adapter_is_expected(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        vllm_extension.Extension, "smoke_load", lambda _self, address: asked.append(address)
    )
    worker.smoke_load("one")
    assert (asked, worker.given) == (["one"], [])


def test_where_verl_is_installed_its_own_code_takes_the_adapter(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    own = ModuleType("verl.utils.vllm")
    hijack = SimpleNamespace(hijack=lambda: made.append("hijacked"))
    vars(own).update(TensorLoRARequest=Requests, VLLMHijack=hijack)
    monkeypatch.setitem(sys.modules, "verl.utils.vllm", own)
    place = "rollout.backends.lora_vllm_worker"
    monkeypatch.setattr(f"{place}.find_spec", lambda _: "there")
    monkeypatch.setattr(f"{place}.version", lambda _: "0.7.1")
    assert in_memory() is Requests
    assert (made, worker.smoke_takes()) == (["hijacked"], "verl 0.7.1")


class Numbers:
    """A tensor of one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def zero_(self) -> None:
        self.value = 0.0

    def div_(self, by: float) -> None:
        self.value /= by


def test_faults_of_adapters_are_made_in_what_the_layers_multiply_with(worker: Any) -> None:
    packed = SimpleNamespace(
        lora_a_stacked=(Numbers(1.0), Numbers(2.0)), lora_b_stacked=(Numbers(4.0), Numbers(6.0))
    )
    embedding = SimpleNamespace(lora_a_stacked=Numbers(3.0), lora_b_stacked=Numbers(8.0))
    bare = SimpleNamespace()
    modules = {"a": packed, "b": embedding, "c": bare}
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(modules=modules))
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    worker.smoke_unscale()
    assert [one.value for one in packed.lora_b_stacked] == [2.0, 3.0]
    assert (embedding.lora_b_stacked.value, packed.lora_a_stacked[1].value) == (4.0, 2.0)
    worker.smoke_lose_adapters()
    assert {one.value for one in (*packed.lora_a_stacked, *packed.lora_b_stacked)} == {0.0}
    assert embedding.lora_a_stacked.value == 0.0

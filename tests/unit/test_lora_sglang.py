"""SGLang with room for adapters: what is asked of it, and what its processes do besides.

SGLang is not here: what stands in its place notes what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.backends import EngineError, adapters, lora_sglang, sglang, sglang_worker
from rollout.backends import lora_sglang_worker as worker

from .fake_sglang import install

LAYER = "model.layers.0.self_attn"


def test_tensors_are_sent_by_the_names_by_which_the_model_finds_them() -> None:
    """SGLang's wrapper has the weight of what it wraps under its own name as well."""
    there = [f"{LAYER}.qkv_proj.weight", f"{LAYER}.o_proj.base_layer.bias", "model.norm.weight"]
    names = [
        f"{LAYER}.k_proj.weight",
        f"{LAYER}.o_proj.bias",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert lora_sglang.renamed(there, names) == {
        f"{LAYER}.k_proj.weight": f"{LAYER}.k_proj.weight",
        f"{LAYER}.o_proj.bias": f"{LAYER}.o_proj.base_layer.bias",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the process of the engine is asked, and answers nothing to."""
    found: list[Any] = []

    def call(_: object, method: str, *arguments: object) -> Any:
        found.append((method, *arguments))
        return [] if method in ("loaded", "adapted") else None

    monkeypatch.setattr(sglang.gpu, "first", lambda: ("a GPU", "cuda:0"))
    monkeypatch.setattr(lora_sglang.Engine, "_call", call)
    monkeypatch.setattr(lora_sglang.Engine, "_synchronize", lambda _: None)
    monkeypatch.setattr(sglang, "serialize", lambda given: repr(given).encode())
    yield found


def test_an_adapter_is_asked_for_by_its_number(asked: list[Any]) -> None:
    engine = lora_sglang.Engine()
    engine.load(1, Path("/a"))
    engine.adapted([(1,), (2,)], 4, [1, 0])
    engine.drop(1)
    assert asked == [
        ("load", 1, "/a"),
        ("adapted", [[1], [2]], 4, ["1", None]),
        ("drop", 1),
    ]


def test_tensors_go_as_handles(asked: list[Any]) -> None:
    tensor: Any = SimpleNamespace(detach=lambda: SimpleNamespace(to=lambda device: device))
    lora_sglang.Engine().take(123, {"r": 8}, {"x": tensor})
    ((method, number, config, text),) = asked
    assert (method, number, config) == ("take", 123, {"r": 8})
    assert isinstance(text, str)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("wanted", [{"fp8": True}, {"gpus": 2}])
def test_it_is_started_in_bfloat16_on_one_gpu_alone(wanted: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="in bfloat16 on one GPU only"):
        lora_sglang.Engine().start(Path("/m"), dummy=True, **wanted)


def test_faults_are_made_on_both_sides(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(sglang.Engine, "refit", lambda _self, tensors, _="": sent.extend(tensors))
    monkeypatch.setattr(sglang.Engine, "wake", lambda _self, _tags: None)
    engine = lora_sglang.Engine()
    engine.inject(adapters.KEPT)
    engine.load(1, Path("/a"))
    engine.load(2, Path("/b"))
    engine.inject(adapters.SCALED)
    engine.load(3, Path("/c"))
    engine.inject(adapters.LOST)
    engine.wake(("weights",))
    assert asked == [
        *(("load", 1, "/a"), ("load", 2, "/a"), ("load", 3, "/c")),
        *(("rpc", "smoke_unscale"), ("rpc", "smoke_lose_adapters")),
    ]
    engine.inject(adapters.UNDER)
    stream: Any = [(f"{LAYER}.q_proj.weight", 1), ("model.norm.weight", 2)]
    engine.refit(stream)
    assert sent == stream[1:]


# its processes


def driver(monkeypatch: pytest.MonkeyPatch, *, from_memory: bool = True) -> tuple[Any, list[Any]]:
    """A driver whose engine knows its adapters and notes what it is asked."""
    install(
        monkeypatch,
        {
            "server_args": {"ServerArgs": SimpleNamespace},
            "managers.io_struct": {
                "LoadLoRAAdapterFromTensorsReqInput": lambda **given: SimpleNamespace(**given)
            },
        },
    )
    monkeypatch.setattr(worker.records, "fields", lambda _: {"enable_lora"})
    there: dict[str, str] = {}
    asked: list[Any] = []

    def done() -> Any:
        return SimpleNamespace(success=True, error_message=None, loaded_adapters=dict(there))

    def load(name: str, path: str) -> Any:
        asked.append(("load", name, path))
        there[name] = path
        return done()

    def unload(name: str) -> Any:
        asked.append(("unload", name))
        del there[name]
        return done()

    def take(request: Any, _: object) -> Any:
        asked.append(("take", request.lora_name, request.config_dict, request.serialized_tensors))
        there[request.lora_name] = "__tensor__"
        return done()

    def start(self: Any, _: object) -> None:
        self.engine = SimpleNamespace(load_lora_adapter=load, unload_lora_adapter=unload)
        ways = {"load_lora_adapter_from_tensors": take} if from_memory else {}
        self.manager = SimpleNamespace(**ways)
        self.await_ = lambda found: found

    monkeypatch.setattr(sglang_worker.Driver, "__init__", start)
    return worker.Driver({}), asked


def test_what_has_the_number_already_goes_before_tensors_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, asked = driver(monkeypatch)
    made.load(2, "/b")
    made.take(123, {"r": 8}, "handles")
    assert made.loaded() == [2, 123]
    made.take(123, {"r": 8}, "others")
    made.drop(2)
    assert made.loaded() == [123]
    assert [one[:2] for one in asked] == [
        *(("load", "2"), ("take", "123"), ("unload", "123"), ("take", "123"), ("unload", "2")),
    ]


def test_a_release_that_takes_none_from_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver(monkeypatch, from_memory=False)[0].takes() == ""
    assert driver(monkeypatch)[0].takes() == "SGLang's own, as verl calls it"


def test_a_release_that_takes_adapters_at_its_start_alone_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver(monkeypatch)
    monkeypatch.setattr(worker.records, "fields", lambda _: {"lora_paths"})
    with pytest.raises(RuntimeError, match="takes no adapters while it runs"):
        worker.Driver({})


def test_a_refusal_of_sglang_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = driver(monkeypatch)
    refused = SimpleNamespace(success=False, error_message="rank 8 is too high")
    made.engine.load_lora_adapter = lambda *_: refused
    with pytest.raises(RuntimeError, match="refused the adapter: rank 8 is too high"):
        made.load(1, "/a")


def test_the_scheduler_has_the_methods_of_both_and_those_for_adapters_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[type] = []
    monkeypatch.setattr(sglang_worker, "Extension", sglang_worker.Extension)
    monkeypatch.setattr(worker, "_schedule", lambda: seen.append(sglang_worker.Extension))
    base = sglang_worker.Extension
    worker.schedule()
    made = vars(seen[0])
    assert made["smoke_digests"] is vars(worker.Extension)["smoke_digests"]
    assert made["smoke_held"] is vars(base)["smoke_held"]
    assert "smoke_imprint" in made

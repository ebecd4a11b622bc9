"""The check of a KV cache in 8 bits: its oracle, its faults, and how vLLM is asked for scales."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import faults, fp8_kv, program, smoke
from rollout.backends import fp8_kv_vllm, fp8_kv_vllm_extension
from rollout.fp8_kv_faults import FAULTS, wrapped

BEFORE = {"a": {"k": 2.0, "v": 0.5, "k_float": 2.0}, "b": {"k": 3.0, "v": 0.25, "k_float": 3.0}}


def extended() -> Any:
    """Our extension of a worker whose model has one attention layer, as far as scales go."""
    torch = pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    layer: Any = torch.nn.Module()
    layer.kv_cache_dtype, layer.quant_method = "fp8_e4m3", object()
    layer._k_scale, layer._v_scale = torch.tensor(2.0), torch.tensor([0.5])
    layer._k_scale_float = 2.0
    model: Any = torch.nn.Module()
    model.layer = torch.nn.Module()
    model.layer.attn = layer
    extension: Any = fp8_kv_vllm_extension.Extension()
    extension.model_runner = SimpleNamespace(get_model=lambda: model)
    return extension


def test_scales_are_read_by_the_layer_s_name_in_the_checkpoint() -> None:
    assert extended().smoke_scales() == {"layer": {"k": 2.0, "v": 0.5, "k_float": 2.0}}


def test_scales_are_replaced_where_they_lie() -> None:
    extension = extended()
    layer = extension.model_runner.get_model().layer.attn
    place = layer._k_scale.data_ptr()
    extension.smoke_put_scales({"layer": {"k": 8.0, "k_float": 8.0}})
    assert layer._k_scale.data_ptr() == place
    assert extension.smoke_scales() == {"layer": {"k": 8.0, "v": 0.5, "k_float": 8.0}}


def test_a_refit_leaves_alone_what_a_layer_has_given_away(monkeypatch: Any) -> None:
    extension = extended()
    layer, seen = extension.model_runner.get_model().layer.attn, []
    method = layer.quant_method
    parent = fp8_kv_vllm_extension.vllm_extension.Extension
    monkeypatch.setattr(parent, "smoke_load", lambda *_: seen.append(layer.quant_method))
    extension.smoke_load("ipc://nowhere")
    assert seen == [None]
    assert layer.quant_method is method


def test_vllm_is_started_in_e4m3_and_calculates_where_it_is_asked_to() -> None:
    plain = fp8_kv_vllm.arguments(Path("m"), 80 << 30, dummy=False, calculate=False)
    assert plain["kv_cache_dtype"] == "fp8_e4m3"
    assert plain["load_format"] == "auto"
    assert "calculate_kv_scales" not in plain
    asked = fp8_kv_vllm.arguments(Path("m"), 80 << 30, dummy=False, calculate=True)
    assert asked["calculate_kv_scales"] is True


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "are reset to 1.0 (k, v)"), (0.0, "are lost, and 0.0 (k, v)"), (9.0, "are changed")],
)
def test_what_became_of_scales_is_named_by_what_is_measured(value: float, said: str) -> None:
    after = {name: there | {"k": value, "v": value} for name, there in BEFORE.items()}
    assert said in fp8_kv.changed(BEFORE, after)


def test_scales_that_are_the_same_to_the_bit_are_not_named() -> None:
    assert fp8_kv.changed(BEFORE, BEFORE) == ""


def test_a_last_bit_of_one_scale_is_seen() -> None:
    after = {**BEFORE, "b": BEFORE["b"] | {"k": 3.0000002384185791}}
    assert "are changed" in fp8_kv.changed(BEFORE, after)


def test_the_gains_change_no_product_of_the_model() -> None:
    torch = pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    ones = {f"l.self_attn.{name}": torch.ones(1, dtype=torch.bfloat16) for name in names}
    query, key, value, output = fp8_kv.gained(ones).values()
    assert float(query * key) == float(value * output) == 1.0


class Fake:
    """An engine that keeps what it is given."""

    def __init__(self) -> None:
        self.there: Any = {name: dict(found) for name, found in BEFORE.items()}
        self.resets = 0

    def start(self, *_: Any, **__: Any) -> None: ...

    def scales(self) -> Any:
        return {name: dict(found) for name, found in self.there.items()}

    def put(self, scales: Any) -> None:
        for name, found in scales.items():
            self.there[name] |= found

    def refit(self, *_: Any) -> int:
        return 0

    def wake(self, _: Any) -> None: ...

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def test_each_fault_breaks_what_it_says() -> None:
    for fault in FAULTS:
        fake: Any = Fake()
        engine: Any = wrapped(fake, fault)
        engine.start(Path("m"), dummy=False)
        engine.refit({})
        engine.put(BEFORE)
        engine.reset_prefix_cache()
        engine.wake(("kv_cache",))
        engine.put(BEFORE)
        right = fake.there == BEFORE and engine.scales() == BEFORE and fake.resets == 1
        assert right is (fault == "scale-lost-in-refit")  # it had them before
        new = {name: dict.fromkeys(found, 7.0) for name, found in BEFORE.items()}
        engine.put(new)
        assert (fake.there == new and fake.resets == 1) is False, fault


def test_the_faults_are_known_with_their_check() -> None:
    assert {faults.FAULTS[name].check for name in FAULTS} == {"fp8-kv"}


def test_who_asks_by_name_gets_the_check_where_no_image_promises_it() -> None:
    data = {"backend": "vllm", "smoke": {"sleep_levels": [1, 2]}}
    assert smoke.tried(data, smoke.Options())["smoke"] == data["smoke"]
    found = smoke.tried(data, smoke.Options(only=("fp8-kv",)))
    assert found["smoke"]["fp8-kv"] == "put-back"
    other = {"backend": "sglang", "smoke": {"sleep_levels": [1, 2]}}
    assert smoke.tried(other, smoke.Options(only=("fp8-kv",))) == other


def test_what_an_image_promises_of_scales_is_in_the_identity_of_this_check_alone() -> None:
    base = {"sleep_levels": [1, 2], "refit": ["cuda-ipc"]}
    checks = ("generation", "fp8-kv")
    one, two = (
        program.identity("vllm", (), checks, program.settings(base | {"fp8-kv": promised}))
        for promised in ("kept", "put-back")
    )
    assert one["generation"] == two["generation"]
    assert one["fp8-kv"] != two["fp8-kv"]

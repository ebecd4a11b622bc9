"""Where an engine keeps each tensor of a checkpoint: packed ones taken apart, padding left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout import checks, placement


class Parameter:
    """A parameter that has nothing but a shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def dim(self) -> int:
        return len(self.shape)


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def model(
    packed: dict[str, list[str]] | None = PACKED, **modules: tuple[Any, dict[str, Any]]
) -> Any:
    """A model of named modules (dots written as double underscores) with named parameters."""
    named = {name.replace("__", "."): part for name, part in modules.items()}
    return SimpleNamespace(
        **({} if packed is None else {"packed_modules_mapping": packed}),
        named_modules=lambda: [(name, module) for name, (module, _) in named.items()],
        named_parameters=lambda: [
            (f"{name}.{attribute}", value)
            for name, (_, values) in named.items()
            for attribute, value in values.items()
        ],
    )


@pytest.mark.parametrize("packed", [PACKED, None], ids=["the model says how", "as all do"])
def test_packed_tensors_are_taken_apart_in_their_order(
    packed: dict[str, list[str]] | None,
) -> None:
    qkv = SimpleNamespace(output_sizes=[8, 2, 2])
    gate_up = SimpleNamespace(output_sizes=[5, 5])
    found = placement.places(
        model(
            packed,
            layers__0__self_attn__qkv_proj=(
                qkv,
                {"weight": Parameter(12, 4), "bias": Parameter(12)},
            ),
            layers__0__mlp__gate_up_proj=(gate_up, {"weight": Parameter(10, 4)}),
            layers__0__norm=(SimpleNamespace(), {"weight": Parameter(4)}),
        )
    )
    attention, mlp = "layers.0.self_attn", "layers.0.mlp"
    weight, bias = f"{attention}.qkv_proj.weight", f"{attention}.qkv_proj.bias"
    assert found == {
        f"{attention}.q_proj.weight": (weight, 0, 8),
        f"{attention}.k_proj.weight": (weight, 8, 10),
        f"{attention}.v_proj.weight": (weight, 10, 12),
        f"{attention}.q_proj.bias": (bias, 0, 8),
        f"{attention}.k_proj.bias": (bias, 8, 10),
        f"{attention}.v_proj.bias": (bias, 10, 12),
        f"{mlp}.gate_proj.weight": (f"{mlp}.gate_up_proj.weight", 0, 5),
        f"{mlp}.up_proj.weight": (f"{mlp}.gate_up_proj.weight", 5, 10),
        "layers.0.norm.weight": ("layers.0.norm.weight", 0, 4),
    }


def test_a_model_that_says_what_it_packs_is_believed() -> None:
    both = SimpleNamespace(output_sizes=[3, 3])
    parts = {"w12": ["w1", "w2"]}
    found = placement.places(model(parts, mlp__w12=(both, {"weight": Parameter(6, 4)})))
    assert found == {
        "mlp.w1.weight": ("mlp.w12.weight", 0, 3),
        "mlp.w2.weight": ("mlp.w12.weight", 3, 6),
    }
    found = placement.places(model(parts, a__qkv_proj=(both, {"weight": Parameter(6, 4)})))
    assert found == {"a.qkv_proj.weight": ("a.qkv_proj.weight", 0, 6)}


def test_the_padding_of_a_vocabulary_is_left_out() -> None:
    vocabulary = SimpleNamespace(org_vocab_size=1000)
    found = placement.places(
        model(
            embed_tokens=(vocabulary, {"weight": Parameter(1024, 4)}),
            lm_head=(vocabulary, {"weight": Parameter(960, 4)}),
            scale=(SimpleNamespace(), {"value": Parameter()}),
        )
    )
    assert found["embed_tokens.weight"] == ("embed_tokens.weight", 0, 1000)
    assert found["lm_head.weight"] == ("lm_head.weight", 0, 960), "never more rows than there are"
    assert found["scale.value"] == ("scale.value", 0, 0)


def test_parts_that_are_not_all_there_are_no_places() -> None:
    qkv = SimpleNamespace(output_sizes=[8, 4])  # three names for two sizes
    with pytest.raises(ValueError, match="zip"):
        placement.places(model(a__qkv_proj=(qkv, {"weight": Parameter(12, 4)})))


# with torch: inside the images


def test_digests_are_the_trainers_of_every_tensor_packed_or_padded(torch: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    sent = {
        **{f"a.{name}_proj.weight": noise(8 if name == "q" else 2, 4) for name in "qkv"},
        "embed.weight": noise(10, 4),
    }
    whole = torch.cat([sent[f"a.{name}_proj.weight"] for name in "qkv"])
    padded = torch.cat([sent["embed.weight"], noise(6, 4)])
    found = placement.digests(
        model(
            a__qkv_proj=(SimpleNamespace(output_sizes=[8, 2, 2]), {"weight": whole}),
            embed=(SimpleNamespace(org_vocab_size=10), {"weight": padded}),
        )
    )
    assert found == {name: checks.digest(tensor) for name, tensor in sent.items()}

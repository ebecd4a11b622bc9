"""An adapter made from a seed: PEFT's files, the weights that it comes to, whose cache is whose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import adapter
from rollout.backends.lora_transformers import Cached

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def test_its_config_is_one_that_peft_and_engines_read() -> None:
    found = json.loads(json.dumps(adapter.config("/model")))
    assert (found["peft_type"], found["bias"], found["modules_to_save"]) == ("LORA", "none", None)
    assert found["lora_alpha"] / found["r"] == adapter.SCALE == 2.0, "rounds nothing"
    assert found["base_model_name_or_path"] == "/model"
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(found["target_modules"]) == linear


def test_its_tensors_have_the_names_that_peft_gives_them() -> None:
    prefix = f"base_model.model.{Q}"
    assert adapter.names(Q) == (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")


def test_what_was_cached_with_one_adapter_is_nothing_to_another() -> None:
    cached = Cached()
    cached[(1, 2)] = 7
    assert ((1, 2) in cached, cached.get((1, 2))) == (True, 7)
    cached.number = 3
    assert ((1, 2) in cached, cached.get((1, 2))) == (False, None)
    cached[(1, 2)] = 8
    assert len(cached) == 2, "each takes a block"
    assert cached.pop(next(iter(cached))) == 7, "the oldest goes, whoever's it is"


# with torch: inside the images


@pytest.fixture
def weights(torch: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = {f"{Q}.weight": (64, 32), f"{DOWN}.weight": (32, 96), "lm_head.weight": (10, 32)}
    made = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    return {**made, f"{Q}.bias": torch.zeros(64)}


def test_one_seed_makes_one_adapter_of_the_linear_layers(weights: Any, torch: Any) -> None:
    one, same, other = (adapter.make(weights, seed) for seed in (1, 1, 2))
    assert one.layers() == [Q, DOWN]
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, same.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])
    down, up = (one.tensors[name] for name in adapter.names(DOWN))
    assert (tuple(down.shape), tuple(up.shape)) == ((adapter.RANK, 96), (32, adapter.RANK))


def test_what_it_adds_is_a_part_of_the_layers_own_product(weights: Any, torch: Any) -> None:
    made = adapter.make(weights, 1)
    given = torch.randn(512, 96)
    own = (given @ weights[f"{DOWN}.weight"].float().T).std()
    added = (given @ made.added(DOWN).T).std()
    assert 0.7 < float(added / own) / adapter.SHARES["down_proj"] < 1.3


def test_merged_weights_are_those_of_before_afterwards_to_the_bit(weights: Any, torch: Any) -> None:
    held = {name: tensor.float() for name, tensor in weights.items()}
    model = SimpleNamespace(get_parameter=held.__getitem__)
    oracle: Any = SimpleNamespace(_model=model)
    made = adapter.make(weights, 1)
    with adapter.merged(oracle, made) as found:
        assert found is oracle
        expected = weights[f"{Q}.weight"].float() + made.added(Q)
        assert torch.equal(held[f"{Q}.weight"], expected)
    with pytest.raises(ZeroDivisionError), adapter.merged(oracle, made, without=Q):
        assert torch.equal(held[f"{Q}.weight"], weights[f"{Q}.weight"].float())
        assert not torch.equal(held[f"{DOWN}.weight"], weights[f"{DOWN}.weight"].float())
        raise ZeroDivisionError
    for name, tensor in weights.items():
        assert torch.equal(held[name], tensor.float())


def test_its_files_hold_it(weights: Any, torch: Any, tmp_path: Path) -> None:
    load = pytest.importorskip("safetensors.torch", reason="in the images").load_file
    made = adapter.make(weights, 1, "/model")
    folder = made.save(tmp_path / "one")
    assert json.loads((folder / "adapter_config.json").read_text()) == made.config
    found = load(folder / "adapter_model.safetensors")
    assert found.keys() == made.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.tensors.items())

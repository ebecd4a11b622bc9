"""What the probe and the oracle promise: the same bytes from the same seed, and a sharp measure.

Whether the probe is sharp enough as a whole is measured by `python -m rollout.calibrate`; here its
parts are held to their word, on a model small enough for every test run.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import calibrate, oracle, probe
from rollout.problem import Problem

SMALL = {
    **probe.config("tiny"),
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}


def torch_or_skip() -> Any:
    return pytest.importorskip("torch", reason="torch lives in the images, not in this environment")


def transformers_or_skip() -> Any:
    torch_or_skip()
    return pytest.importorskip("transformers", reason="transformers lives in the images")


def saved(directory: Path, config: dict[str, Any] | None = None) -> Path:
    """A complete model directory."""
    torch_or_skip()
    pytest.importorskip("safetensors", reason="safetensors lives in the images")
    config = SMALL if config is None else config
    probe.save(directory, config, probe.weights(config, 1))
    return directory


# The seed decides, and nothing else.


def test_the_same_seed_gives_the_same_bytes() -> None:
    torch = torch_or_skip()
    first, second = probe.weights(SMALL, 1), probe.weights(SMALL, 1)
    assert list(first) == list(second) == list(probe.shapes(SMALL))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tensor_is_the_same_on_every_machine_and_version() -> None:
    torch_or_skip()
    values = probe.tensor(SMALL, 1, "model.layers.0.mlp.up_proj.bias")[:4].tolist()
    assert values == [1.015625, -0.162109375, -1.46875, 1.453125]


def test_another_seed_gives_other_bytes_in_every_tensor() -> None:
    torch = torch_or_skip()
    first, second = probe.weights(SMALL, 1), probe.weights(SMALL, 2)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_no_two_tensors_of_a_model_are_alike() -> None:
    """Or a transport that mixes up two tensors of one shape would go unseen."""
    torch_or_skip()
    tensors = probe.weights(SMALL, 1).values()
    contents = [tuple(tensor.flatten().tolist()) for tensor in tensors]
    assert len(set(contents)) == len(contents)


def test_a_tensor_does_not_depend_on_the_others() -> None:
    torch = torch_or_skip()
    deeper = {**SMALL, "num_hidden_layers": 3}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(probe.weights(SMALL, 1)[name], probe.weights(deeper, 1)[name])
    assert torch.equal(probe.weights(SMALL, 1)[name], probe.tensor(SMALL, 1, name))


def test_all_weights_are_bfloat16_and_shaped_as_told() -> None:
    torch = torch_or_skip()
    for tensors in (probe.weights(SMALL, 1), probe.dummy(SMALL)):
        assert {name: tuple(t.shape) for name, t in tensors.items()} == probe.shapes(SMALL)
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_what_an_engine_holds_before_a_refit_differs_in_every_tensor() -> None:
    torch = torch_or_skip()
    weights, dummy = probe.weights(SMALL, 1), probe.dummy(SMALL)
    assert not any(torch.equal(weights[name], dummy[name]) for name in weights)


def test_tensors_are_as_large_as_their_rule_says() -> None:
    torch_or_skip()
    for name, tensor in probe.weights(probe.config("tiny"), 1).items():
        size = tensor.float().pow(2).mean().sqrt().item()
        assert size == pytest.approx(probe.spread(probe.config("tiny"), name), rel=0.15), name


def test_norm_weights_resemble_neither_ones_nor_each_other() -> None:
    torch_or_skip()
    weights = probe.weights(probe.config("tiny"), 1)
    norm = weights["model.norm.weight"].float()
    assert abs(norm.mean().item()) < 0.2
    assert norm.abs().min().item() >= 0.5


# The configurations, which need no torch.


def test_importing_needs_the_standard_library_alone(tmp_path: Path) -> None:
    import subprocess
    import sys

    for name in ("torch", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('imported at module level')\n")
    package = Path(probe.__file__).parents[1]
    code = "import rollout.probe, rollout.oracle, rollout.calibrate"
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(package)!r}]; "
    subprocess.run([sys.executable, "-c", path + code], check=True)


@pytest.mark.parametrize("size", ["tiny", "1b"])
def test_a_config_reads_alike_in_old_and_new_engines(size: str) -> None:
    config = probe.config(size)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert config["head_dim"] in (64, 128)
    assert config["vocab_size"] % 64 == 0
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] not in (10000, 500000, 1000000)  # the defaults of engines
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 2e6, 2e7), ("1b", 0.8e9, 1.2e9)])
def test_a_size_is_what_its_name_says(size: str, least: float, most: float) -> None:
    count = sum(math.prod(shape) for shape in probe.shapes(probe.config(size)).values())
    assert least <= count <= most


def test_biases_exist_so_that_their_loss_is_covered() -> None:
    names = probe.shapes(probe.config("tiny"))
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(name.endswith(f"{part}.bias") for name in names), part


def test_an_engine_without_mlp_biases_can_be_proved_too() -> None:
    names = probe.shapes(probe.config("tiny", mlp_bias=False))
    assert not any("mlp" in name and name.endswith(".bias") for name in names)
    assert any(name.endswith("k_proj.bias") for name in names)


def test_an_unknown_size_is_wrong_usage() -> None:
    with pytest.raises(Problem, match="7b") as caught:
        probe.config("7b")
    assert caught.value.code == 2


# Prompts.


def test_prompts_span_several_blocks_and_end_inside_one() -> None:
    for prompt in probe.prompts(SMALL, 1, 8):
        assert len(prompt) > 3 * probe.BLOCK
        assert len(prompt) % probe.BLOCK != 0


def test_some_prompts_share_whole_blocks_and_no_two_are_equal() -> None:
    prompts = probe.prompts(SMALL, 1, 8)
    heads = [tuple(prompt[: 2 * probe.BLOCK]) for prompt in prompts]
    assert 1 < heads.count(heads[0]) < len(prompts)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


def test_prompts_hold_ordinary_tokens_only_and_depend_on_the_seed_alone() -> None:
    prompts = probe.prompts(SMALL, 1, 8)
    tokens = {token for prompt in prompts for token in prompt}
    assert min(tokens) >= len(probe.SPECIAL)
    assert max(tokens) < SMALL["vocab_size"]
    assert prompts == probe.prompts(SMALL, 1, 8)
    assert prompts[:3] == probe.prompts(SMALL, 1, 3)
    assert prompts != probe.prompts(SMALL, 2, 8)


# Files.


def test_a_saved_probe_loads_back_equal(tmp_path: Path) -> None:
    torch = torch_or_skip()
    config, weights = probe.load(saved(tmp_path / "probe"))
    right = probe.weights(SMALL, 1)
    assert config == SMALL
    assert list(weights) == list(right)
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second")
    files = sorted(file.name for file in first.iterdir())
    assert "model.safetensors" in files
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_shards_with_an_index_load_as_one_model(tmp_path: Path) -> None:
    torch = torch_or_skip()
    directory = shard(saved(tmp_path))
    _, weights = probe.load(directory)
    right = probe.weights(SMALL, 1)
    assert all(torch.equal(weights[name], right[name]) for name in right)


def shard(directory: Path) -> Path:
    from safetensors.torch import load_file, save_file

    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(whole)}
    for file in set(names.values()):
        save_file({n: t for n, t in whole.items() if names[n] == file}, directory / file)
    index = {"weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_a_float32_model_is_loaded_as_the_engine_will_hold_it(tmp_path: Path) -> None:
    torch = torch_or_skip()
    saved(tmp_path)
    right = probe.weights(SMALL, 1)
    probe.save(tmp_path, SMALL, {name: tensor.float() for name, tensor in right.items()})
    _, weights = probe.load(tmp_path)
    assert all(torch.equal(weights[name], right[name]) for name in right)


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def other_architecture(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))


def no_architecture(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def wrong_size(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({**SMALL, "hidden_size": "wide"}))


def other_shape(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({**SMALL, "vocab_size": 320}))


def too_few_tensors(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 3}))


def too_many_tensors(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 1}))


def no_tensors(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def cut_tensors(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def missing_shard(directory: Path) -> None:
    (shard(directory) / "part-1.safetensors").unlink()


def stray_shard(directory: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_config, "config.json"),
        (break_config, "config.json"),
        (list_config, "config.json"),
        (other_architecture, "GPT2LMHeadModel"),
        (no_architecture, "architecture"),
        (wrong_size, "hidden_size"),
        (other_shape, "lm_head"),
        (too_few_tensors, r"model.layers.2"),
        (too_many_tensors, r"model.layers.1"),
        (no_tensors, "safetensors"),
        (cut_tensors, "model.safetensors"),
        (missing_shard, "part-1.safetensors"),
        (stray_shard, "outside.safetensors"),
        (empty_index, "weight_map"),
    ],
)
def test_a_malformed_directory_is_named_in_a_sentence(
    tmp_path: Path, damage: Any, named: str
) -> None:
    damage(saved(tmp_path))
    with pytest.raises(Problem, match=named) as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [None], {"a": 1}])
def test_a_config_without_an_architecture_is_said_with_those_that_are_known(
    tmp_path: Path, names: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "architectures": names}))
    with pytest.raises(Problem) as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2
    assert str(caught.value).startswith(
        f"{tmp_path} names no architecture in its config.json: take a model of LlamaForCausalLM, "
    )


@pytest.mark.parametrize("kind", [None, "", 7, ["llama"]])
def test_a_config_without_a_model_type_is_said(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": kind}))
    what = "names no model_type beside LlamaForCausalLM in its config.json"
    with pytest.raises(Problem) as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2
    assert str(caught.value).startswith(f"{tmp_path} {what}: name a complete model directory")


@pytest.mark.parametrize("kind", ["llama9", "gpt2", "Llama"])
def test_a_model_type_that_is_not_the_architectures_is_said(tmp_path: Path, kind: str) -> None:
    """transformers would know no such model, or make one of another kind."""
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": kind}))
    with pytest.raises(Problem) as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2
    what = f"names the model_type {kind!r} in its config.json, which is not of LlamaForCausalLM"
    assert str(caught.value).startswith(f"{tmp_path} {what}: write 'llama' there, or take a model")


def test_a_model_newer_than_transformers_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = SimpleNamespace(CONFIG_MAPPING={"llama": object}, __version__="4.50.0")
    monkeypatch.setitem(sys.modules, "transformers", old)
    newer = {**SMALL, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(Problem) as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2
    assert str(caught.value) == (
        f"{tmp_path} is of Qwen3ForCausalLM, which transformers 4.50.0 does not know: "
        "take an older model, or an image of a newer engine."
    )


@pytest.mark.parametrize("architecture", probe._ARCHITECTURES)
def test_every_architecture_that_the_probe_knows_is_accepted(
    tmp_path: Path, architecture: str
) -> None:
    """With the model_type that transformers itself writes beside it."""
    transformers = transformers_or_skip()
    kind = getattr(transformers, architecture).config_class.model_type
    config = {**SMALL, "architectures": [architecture], "model_type": kind}
    assert probe.load(saved(tmp_path, config))[0] == config


def test_a_directory_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="nowhere") as caught:
        probe.load(tmp_path / "nowhere")
    assert caught.value.code == 2


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    torch = torch_or_skip()
    weights = probe.weights(SMALL, 1)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    probe.save(saved(tmp_path), SMALL, weights)
    with pytest.raises(Problem, match="lm_head") as caught:
        probe.load(tmp_path)
    assert caught.value.code == 2


def test_a_place_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    torch_or_skip()
    pytest.importorskip("safetensors", reason="safetensors lives in the images")
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match="file") as caught:
        probe.save(tmp_path / "file", SMALL, {})
    assert caught.value.code == 2


def test_the_tokenizer_has_a_word_for_every_token(tmp_path: Path) -> None:
    transformers = transformers_or_skip()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved(tmp_path))
    assert len(tokenizer) == SMALL["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    prompt = probe.prompts(SMALL, 1, 1)[0]
    assert tokenizer(tokenizer.decode(prompt), add_special_tokens=False)["input_ids"] == prompt


def test_transformers_reads_the_directory_as_the_same_model(tmp_path: Path) -> None:
    torch, transformers = torch_or_skip(), transformers_or_skip()
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    right = probe.weights(SMALL, 1)
    assert {name for name, _ in model.named_parameters()} == set(right)
    assert all(torch.equal(p.bfloat16(), right[name]) for name, p in model.named_parameters())


# The measure and the oracle.


def test_divergence_of_equals_is_one_and_grows_with_every_difference() -> None:
    assert oracle.divergence([-1.0, -2.0], [-1.0, -2.0]) == 1.0
    assert oracle.divergence([-1.0], [-1.5]) == pytest.approx(math.exp(0.5))
    assert oracle.divergence([-1.5], [-1.0]) == pytest.approx(math.exp(0.5))
    assert oracle.divergence([-1.0, -1.0], [-1.0, -2.0]) == pytest.approx((1 + math.e) / 2)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, -1e6])
def test_what_is_no_number_can_never_pass(bad: float) -> None:
    assert oracle.divergence([bad], [-1.0]) == math.inf


@pytest.mark.parametrize(("engine", "right"), [([], []), ([-1.0], []), ([-1.0], [-1.0, -2.0])])
def test_comparing_nothing_is_an_error_not_a_pass(engine: list[float], right: list[float]) -> None:
    with pytest.raises(ValueError, match="compare"):
        oracle.divergence(engine, right)


def test_the_oracle_is_float32_to_its_last_buffer() -> None:
    torch = torch_or_skip()
    transformers_or_skip()
    model = oracle.Oracle(SMALL, probe.weights(SMALL, 1))._model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = model.model.rotary_emb.inv_freq
    right = SMALL["rope_theta"] ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(found.double(), right, rtol=1e-6, atol=0.0)


def test_the_oracle_agrees_with_arithmetic_written_out_by_hand() -> None:
    """Llama in float64 from its definition: the oracle shares no code with this."""
    torch = torch_or_skip()
    transformers_or_skip()
    weights = probe.weights(SMALL, 1)
    prompt = probe.prompts(SMALL, 1, 1)[0]
    completion = [7, 9, 7]
    right = by_hand(torch, SMALL, weights, prompt + completion)[len(prompt) - 1 : -1]
    judge = oracle.Oracle(SMALL, weights)
    expected = [row[token].item() for row, token in zip(right, completion, strict=True)]
    assert judge.logprobs(prompt, completion) == pytest.approx(expected, abs=1e-4)
    two = right.topk(2, dim=-1).values
    leads = (two[:, 0] - two[:, 1]).tolist()
    assert judge.margins(prompt, completion) == pytest.approx(leads, abs=1e-4)


def by_hand(torch: Any, config: dict[str, Any], weights: dict[str, Any], row: list[int]) -> Any:
    """Log-probabilities [position, token] in float64."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    heads, groups, size = (
        config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    count = len(row)

    def norm(name: str, x: Any) -> Any:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return x * scale * exact[name + ".weight"]

    def linear(name: str, x: Any) -> Any:
        return x @ exact[name + ".weight"].T + exact[name + ".bias"]

    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = torch.arange(count)[:, None].double() * config["rope_theta"] ** -steps
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotate(x: Any) -> Any:  # [position, head, dimension], halves rotated against each other
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = exact["model.embed_tokens.weight"][torch.tensor(row)]
    hidden_later = torch.full((count, count), -math.inf, dtype=torch.float64).triu(1)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        y = norm(layer + "input_layernorm", x)
        q, k, v = (linear(f"{layer}self_attn.{p}_proj", y).view(count, -1, size) for p in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size) + hidden_later
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
        x = x + linear(layer + "self_attn.o_proj", mixed.reshape(count, -1))
        y = norm(layer + "post_attention_layernorm", x)
        gate = linear(layer + "mlp.gate_proj", y)
        y = gate * gate.sigmoid() * linear(layer + "mlp.up_proj", y)
        x = x + linear(layer + "mlp.down_proj", y)
    return (norm("model.norm", x) @ exact["lm_head.weight"].T).log_softmax(-1)


def test_the_oracle_scores_in_a_batch_as_it_does_alone() -> None:
    torch_or_skip()
    transformers_or_skip()
    judge = oracle.Oracle(SMALL, probe.weights(SMALL, 1))
    prompts = [probe.prompts(SMALL, 1, 2)[0], [5, 6, 7]]
    completions = [[8, 9], [10, 11, 12, 13]]
    for prompt, completion, (logprobs, margins) in zip(
        prompts, completions, judge.scores(prompts, completions), strict=True
    ):
        assert logprobs == pytest.approx(judge.logprobs(prompt, completion), abs=1e-4)
        assert margins == pytest.approx(judge.margins(prompt, completion), abs=1e-4)
        assert len(logprobs) == len(margins) == len(completion)


def test_the_oracle_refuses_weights_of_another_model() -> None:
    torch_or_skip()
    transformers_or_skip()
    weights = probe.weights(SMALL, 1)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head"):
        oracle.Oracle(SMALL, weights)


def test_the_oracle_refuses_an_empty_prompt() -> None:
    torch_or_skip()
    transformers_or_skip()
    with pytest.raises(ValueError, match="empty"):
        oracle.Oracle(SMALL, probe.weights(SMALL, 1)).logprobs([], [1])


# The calibration.


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """One repeat on a model too small to be sharp: the form is judged here, not the numbers."""
    torch_or_skip()
    transformers_or_skip()
    return calibrate.measure(SMALL, 1, repeats=1)


def test_every_tensor_is_lost_in_every_way(report: dict[str, Any]) -> None:
    tensors = report["loss"]["tensors"]
    assert set(tensors) == set(probe.shapes(SMALL))
    assert all(set(ways) == set(calibrate.WAYS) for ways in tensors.values())
    assert report["loss"]["min"] == min(min(ways.values()) for ways in tensors.values())


def test_a_calibration_leaves_the_weights_as_they_were(report: dict[str, Any]) -> None:
    again = calibrate.measure(SMALL, 1, repeats=1)
    assert again["noise"] == report["noise"]
    assert again["loss"] == report["loss"]


def test_a_report_is_strict_json(report: dict[str, Any]) -> None:
    assert report["schema"] == "rollout-calibration/1"
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def good(config: dict[str, Any]) -> dict[str, Any]:
    """A report in which every guarantee holds, without measuring."""
    ways = dict.fromkeys(calibrate.WAYS, 1.0 + 10.1 * (oracle.BOUND_BF16 - 1.0))
    return {
        "bound": oracle.BOUND_BF16,
        "config": config,
        "noise": {"max": 1.01},
        "loss": {"tensors": {name: dict(ways) for name in probe.shapes(config)}},
        "margin": {"median_in_noise": 20.0},
        "text": {"distinct_mean": 9.0},
    }


def test_a_good_calibration_holds() -> None:
    assert calibrate.margins_hold(good(SMALL)) == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("noise", "max"), 1.03, "Correct weights"),
        (("noise", "max"), math.nan, "Correct weights"),
        (("loss", "tensors", "model.norm.weight", "default"), 1.4, "model.norm.weight"),
        (("loss", "tensors", "model.norm.weight"), {}, "model.norm.weight as zeros was not"),
        (("margin", "median_in_noise"), 3.0, "top token"),
        (("text", "distinct_mean"), 1.0, "distinct tokens"),
    ],
)
def test_a_broken_guarantee_is_a_sentence(path: tuple[str, ...], value: Any, named: str) -> None:
    report = copy.deepcopy(good(SMALL))
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    sentences = calibrate.margins_hold(report)
    assert sentences
    assert all(named.split(" as ")[0] in sentence for sentence in sentences)
    assert named in sentences[0]


def test_a_calibration_of_no_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="repeat"):
        calibrate.measure(SMALL, 1, repeats=0)


def test_the_command_line_says_wrong_usage_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(["--size", "7b"]) == 2
    assert "7b" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        calibrate.main(["--repeats", "0"])
    assert caught.value.code == 2


def test_the_calibrated_seed_is_the_one_that_is_proved() -> None:
    from rollout import smoke

    assert smoke.SEED == calibrate.SEED


def test_a_calibration_names_the_image_it_was_made_in(tmp_path: Path) -> None:
    assert calibrate.of_image(tmp_path) == {}
    (tmp_path / "share/rollout").mkdir(parents=True)
    (tmp_path / "share/rollout/image.json").write_text('{"reference": "a:b"}')
    (tmp_path / "share/rollout/requirements.lock").write_text("")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert calibrate.of_image(tmp_path) == {"image": "a:b", "lock_sha256": empty}

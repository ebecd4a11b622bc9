"""The check of a mixture of experts: its probe, where experts lie, and that every fault is found.

What needs torch runs inside the image (tests/image/test_inside.py), against the real reference
engine in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from images.catalog import ROOT
from rollout import (
    backends,
    calibrate,
    experts,
    faults,
    moe,
    moe_calibrate,
    moe_faults,
    moe_oracle,
    moe_probe,
    probe,
    program,
    smoke,
)
from rollout.backends import moe_vllm_extension, vllm_extension
from rollout.checks import Failed, Trial
from rollout.faults import FAULTS, OF_EXPERTS
from rollout.problem import Problem

TINY = moe_probe.config("tiny")
GPU = moe_probe.config("gpu")
# Small enough for every test run; as many experts as there are, because the code is for those.
SMALL = {
    **TINY,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
}
FACTS: dict[str, Any] = {
    "backend": "transformers",
    "cuda": False,
    "smoke": {"sleep_levels": [1, 2], "refit": ["shared-memory"], "moe": True},
}


@pytest.fixture
def needs_torch() -> Any:
    torch = pytest.importorskip("torch", reason="torch lives in the images")
    pytest.importorskip("transformers", reason="transformers lives in the images")
    return torch


inside = pytest.mark.usefixtures("needs_torch")


# The probe.


def test_there_is_no_probe_of_another_size() -> None:
    with pytest.raises(Problem, match="no probe of size '7b'") as caught:
        moe_probe.config("7b")
    assert caught.value.code == 2


@pytest.mark.parametrize("config", [TINY, GPU], ids=["tiny", "gpu"])
def test_it_is_a_mixture_that_fused_kernels_serve(config: dict[str, Any]) -> None:
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert 8 <= config["num_experts"] <= 16
    assert 2 <= config["num_experts_per_tok"] <= 4
    assert config["moe_intermediate_size"] % 128 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["norm_topk_prob"] is True


def test_on_a_gpu_its_widths_are_those_of_models_that_people_train() -> None:
    assert (GPU["hidden_size"], GPU["moe_intermediate_size"], GPU["head_dim"]) == (2048, 768, 128)


def test_every_layer_has_a_router_and_every_expert_its_three_tensors() -> None:
    names = list(moe_probe.shapes(TINY))
    layers, count = TINY["num_hidden_layers"], TINY["num_experts"]
    assert sum(name.endswith(".mlp.gate.weight") for name in names) == layers
    assert sum(experts.expert_of(name) is not None for name in names) == 3 * layers * count
    assert not [name for name in names if "shared" in name], "Qwen3-MoE has none"


def test_levels_of_chosen_experts_stand_well_above_the_others() -> None:
    found = moe_probe.levels(TINY)
    chosen = TINY["num_experts_per_tok"]
    assert found == sorted(found, reverse=True)
    assert len(found) == TINY["num_experts"]
    assert found[chosen - 1] - found[chosen] > 3 * (found[0] - found[chosen - 1])


def test_the_same_seed_gives_the_same_bytes(needs_torch: Any) -> None:
    first, second = moe_probe.weights(SMALL, 1), moe_probe.weights(SMALL, 1)
    assert list(first) == list(second) == list(moe_probe.shapes(SMALL))
    assert all(needs_torch.equal(first[name], second[name]) for name in first)
    shaped = {name: tuple(tensor.shape) for name, tensor in first.items()}
    assert shaped == moe_probe.shapes(SMALL)
    assert {tensor.dtype for tensor in first.values()} == {needs_torch.bfloat16}


def test_another_seed_gives_other_bytes_in_every_tensor(needs_torch: Any) -> None:
    first, second = moe_probe.weights(SMALL, 1), moe_probe.weights(SMALL, 2)
    assert not any(needs_torch.equal(first[name], second[name]) for name in first)
    dummy = moe_probe.dummy(SMALL)
    assert not any(needs_torch.equal(first[name], dummy[name]) for name in first)


@inside
def test_no_two_tensors_are_alike() -> None:
    """Or two experts that change places would go unseen."""
    contents = [tuple(t.flatten().tolist()) for t in moe_probe.weights(SMALL, 1).values()]
    assert len(set(contents)) == len(contents)


@inside
def test_the_dense_probe_is_what_it_was() -> None:
    assert probe.tensor(probe.config("tiny"), 1, "model.layers.0.mlp.up_proj.bias").shape == (2048,)


@inside
def test_nothing_writes_into_the_code() -> None:
    channels = moe_probe._channels(SMALL)
    assert len(channels.unique()) == moe_probe.CHANNELS * SMALL["num_experts"]
    for name, tensor in moe_probe.weights(SMALL, 1).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not tensor[channels].any(), name


def test_a_token_chooses_its_experts_by_its_code_in_every_layer(needs_torch: Any) -> None:
    torch = needs_torch
    codes = moe_probe._codes(SMALL, 1).float().reshape(128, SMALL["num_experts"], -1)
    highest = (codes * moe_probe._marks(SMALL, 1)).mean(-1).topk(2).indices
    assert torch.bincount(highest.reshape(-1), minlength=8).min() > 0
    oracle = moe_oracle.MoeOracle(SMALL, moe_probe.weights(SMALL, 1))
    tokens = list(range(4, 20))
    oracle.scores([tokens], [[]])
    for layer, logits in enumerate(oracle.logits):
        slots = moe_probe._ranks(
            probe._bits((8,), 1, f"model.layers.{layer}.slots")
        )  # of each expert
        reads = slots[logits.topk(2).indices].sort().values
        assert torch.equal(reads, highest[tokens].sort().values), layer


# Where the tensors of experts lie.


def test_an_expert_is_known_by_its_name() -> None:
    name = "model.layers.3.mlp.experts.12.down_proj.weight"
    assert experts.expert_of(name) == 12
    assert experts.renumbered(name, 7) == "model.layers.3.mlp.experts.7.down_proj.weight"
    for other in ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.down_proj.weight"):
        assert experts.expert_of(other) is None
        with pytest.raises(ValueError, match="no tensor of an expert"):
            experts.renumbered(other, 1)


@pytest.mark.parametrize(
    ("pairs", "downs"),
    [
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ("mlp.experts.w13_weight", "mlp.experts.w2_weight"),
        ("mlp.experts.routed_experts.w13_weight", "mlp.experts.routed_experts.w2_weight"),
    ],
    ids=["transformers 5", "vLLM and SGLang", "vLLM 0.24"],
)
def test_fused_tensors_are_taken_apart_as_they_were_put_together(
    needs_torch: Any, pairs: str, downs: str
) -> None:
    weights = moe_probe.weights(SMALL, 1)
    packed = {
        name.replace("mlp.experts.gate_up_proj", pairs).replace("mlp.experts.down_proj", downs): t
        for name, t in experts.fused(weights).items()
    }
    apart = experts.taken_apart(packed.items())
    assert apart.keys() == weights.keys()
    assert all(needs_torch.equal(apart[name], weights[name]) for name in weights)


def test_what_is_written_into_a_view_is_in_the_fused_parameter(needs_torch: Any) -> None:
    torch = needs_torch
    parameter = torch.nn.Parameter(torch.zeros(3, 4, 5))
    view = experts.taken_apart([("m.experts.w13_weight", parameter)])["m.experts.1.up_proj.weight"]
    view.copy_(torch.ones(2, 5))
    assert parameter[1, 2:].min() == 1
    assert parameter.sum() == 10


@inside
def test_a_layer_that_lacks_a_tensor_is_not_fused() -> None:
    weights = moe_probe.weights(SMALL, 1)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts lacks"):
        experts.fused(weights)


def test_digests_of_an_engine_are_by_the_names_of_a_checkpoint(needs_torch: Any) -> None:
    torch = needs_torch

    def bare(**parameters: Any) -> Any:
        module = torch.nn.Module()
        for name, value in parameters.items():
            if isinstance(value, torch.nn.Module):
                module.add_module(name, value)
            else:
                module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        return module

    pairs, downs = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    packed = bare(weight=torch.randn(8, 4))
    packed.output_sizes = [4, 2, 2]
    model = bare(
        qkv_proj=packed,
        gate=bare(weight=torch.randn(2, 4)),
        experts=bare(w13_weight=pairs, w2_weight=downs),
    )
    found = experts.digests(bare(mlp=model))
    assert sorted(found) == sorted(
        [f"mlp.{part}_proj.weight" for part in "qkv"]
        + ["mlp.gate.weight"]
        + [f"mlp.experts.{n}.{p}_proj.weight" for n in (0, 1) for p in ("gate", "up", "down")]
    )
    digest = hashlib.sha256(pairs[1, 3:].contiguous().numpy().tobytes()).hexdigest()
    assert found["mlp.experts.1.up_proj.weight"] == digest
    digest = hashlib.sha256(packed.weight[4:6].numpy().tobytes()).hexdigest()
    assert found["mlp.k_proj.weight"] == digest


def test_a_fused_parameter_that_lost_its_loader_gets_that_of_its_module() -> None:
    def loader() -> None: ...

    lost, kept = SimpleNamespace(), SimpleNamespace(weight_loader="its own")
    module = SimpleNamespace(w13_weight=lost, w2_weight=kept, weight_loader=loader)
    linear = SimpleNamespace(weight=SimpleNamespace(), weight_loader=loader)
    experts.loadable(SimpleNamespace(modules=lambda: [module, linear, SimpleNamespace()]))
    assert lost.weight_loader is loader
    assert kept.weight_loader == "its own"
    assert not hasattr(linear.weight, "weight_loader")


# The check, on an engine that is played: what it holds decides what it answers.


class Weight:
    """A tensor of which nothing but its number and its size is asked."""

    def __init__(self, value: float) -> None:
        self.value = value

    def numel(self) -> int:
        return 500

    def element_size(self) -> int:
        return 2


WEIGHTS: dict[str, Any] = {"a": Weight(0.25), "b": Weight(0.5)}
OTHERS: dict[str, Any] = {"a": Weight(2.0), "b": Weight(3.0)}


class Judge(moe_oracle.MoeOracle):
    def __init__(self, weights: Mapping[str, Any], routes: moe_oracle.Routes) -> None:
        self.value = sum(weight.value for weight in weights.values())
        self.found = routes

    def logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], scale: float = 1.0
    ) -> list[float]:
        assert prompt
        return [-self.value * scale for _ in completion]

    def routes(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> moe_oracle.Routes:
        assert len(prompts) == len(completions)
        return self.found


class Played:
    """An engine of paper, with what is wrong with it."""

    device = "paper"
    transports = ("one", "two")
    kv_bytes = 1000
    cache_block = 16
    mlp_bias = True
    witness = False
    insisting: Mapping[str, str] = {}

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.held_weights = {"a": 9.0, "b": 9.0}
        self.levels: tuple[int, ...] = (1, 2)
        self.calls: list[str] = []
        self.asleep = 0

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        assert (str(model), fp8, gpus) == ("/model", False, 1)
        self.calls.append(f"start {level} dummy={dummy}")
        if self.wrong == "has them already":
            self.held_weights = {name: weight.value for name, weight in WEIGHTS.items()}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[backends.Completion]:
        assert tokens
        value = sum(self.held_weights.values())
        if self.wrong == "answers otherwise":
            value += 0.5
        if self.wrong == "wrong in a batch" and len(prompts) > 1:
            value += 0.5
        if self.wrong == "wrong when woken" and "wake" in self.calls:
            value += 0.01
        if self.wrong == "wrong by the second" and "refit two" in self.calls:
            value += 0.01
        return [backends.Completion((1, 2), (-value, -value)) for _ in prompts]

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        self.calls.append(f"refit {transport}")
        for name, weight in tensors:
            if not (self.wrong == "never takes a" and name == "a"):
                self.held_weights[name] = weight.value
        return 2

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.asleep = level
        if level == 2 and self.wrong != "keeps its weights":
            self.held_weights = {"a": 0.0, "b": 0.0}

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append("wake")
        self.asleep = 0 if "kv_cache" in tags else self.asleep
        if self.wrong == "loses a weight" and self.held_weights["a"]:
            self.held_weights["a"] = 0.0

    def reset_prefix_cache(self) -> None: ...

    def held(self) -> int:
        return 3000

    def memory(self) -> int:
        return 1000 if self.asleep and self.wrong != "frees nothing" else 4000

    def stop(self) -> None: ...


class Table(Trial):
    """A trial of played weights."""

    def differing(self, weights: Mapping[str, Any]) -> list[str]:
        there = self.engine.held_weights  # type: ignore[attr-defined]
        return sorted(name for name, weight in weights.items() if there[name] != weight.value)

    def train(self, size: int) -> None: ...


ROUTES = moe_oracle.Routes(((3, 1), (2, 2)), 0.8)


def table(wrong: str = "", routes: moe_oracle.Routes = ROUTES, **given: Any) -> Table:
    engine: Any = Played(wrong)
    options: dict[str, Any] = {
        "engine": engine,
        "model": Path("/model"),
        "weights": WEIGHTS,
        "others": OTHERS,
        "oracle": Judge(WEIGHTS, routes),
        "other_oracle": Judge(OTHERS, routes),
        "prompts": [[1], [2]],
        "cycles": 1,
        "bound": 1.043,
        "sleep_levels": [1, 2],
        "transports": ["one", "two"],
    }
    return Table(**(options | given))


def test_a_sound_engine_is_refitted_by_each_transport_and_sleeps_to_each_level() -> None:
    trial = table()
    metrics = moe.moe(trial)
    engine: Any = trial.engine
    assert [call for call in engine.calls if call != "wake"] == [
        *("start 1 dummy=True", "refit one", "refit one", "refit two", "refit two", "refit one"),
        *("sleep 1", "sleep 2", "refit one"),
    ]
    assert metrics["divergence"] == metrics["other_batch_divergence"] == 1.0
    assert metrics["control_divergence"] > 1.043 < metrics["stranger_divergence"]
    assert metrics["freed_fraction_1"] == metrics["freed_fraction_2"] == 1.0
    assert (metrics["margin"], metrics["experts"], metrics["least_chosen"]) == (0.8, 4, 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("has them already", "control: the engine had the weights before"),
        ("never takes a", "by one the engine does not hold what was sent: a"),
        ("answers otherwise", "by one the digests agree, yet the output is not that of these"),
        ("wrong in a batch", "by one the digests agree, yet the output is not that of these"),
        ("wrong by the second", "by two the output is not that of these experts: the same"),
        ("frees nothing", "level 1: sleep freed only 0%"),
        ("loses a weight", "level 1: awake, the engine holds wrong tensors: a"),
        ("wrong when woken", "level 1: the weights are right, and the output is another"),
        ("keeps its weights", "control: level 2: weights survived it: a, b"),
    ],
)
def test_an_engine_that_is_wrong_is_not_passed(wrong: str, reason: str) -> None:
    with pytest.raises(Failed) as caught:
        moe.moe(table(wrong))
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        (moe_oracle.Routes(((3, 1), (4, 0)), 0.8), "control: no token chooses the experts 1.1"),
        (moe_oracle.Routes(((3, 1), (2, 2)), 0.1), "control: a choice of the router leads by 0.10"),
    ],
    ids=["an expert that is never chosen", "a choice that rounding could turn"],
)
def test_prompts_that_say_nothing_of_an_expert_are_not_passed(
    routes: moe_oracle.Routes, reason: str
) -> None:
    with pytest.raises(Failed) as caught:
        moe.moe(table(routes=routes))
    assert caught.value.reason.startswith(reason)


def test_an_oracle_that_cannot_tell_two_sets_of_weights_apart_is_found_out() -> None:
    with pytest.raises(Failed, match="control: the oracle of other weights agrees"):
        moe.moe(table(other_oracle=Judge(WEIGHTS, ROUTES)))


# Where the check runs.


def test_it_runs_where_the_image_promises_it_and_before_a_training() -> None:
    wanted = FACTS["smoke"] | {"training": True}
    assert smoke.promised(wanted)[-2:] == ["moe", "training"]
    assert "moe" not in smoke.promised(wanted | {"moe": False})
    assert smoke.selected(["moe"], wanted) == ["moe"], "it needs no engine of the other checks"


@pytest.mark.parametrize("backend", ["transformers", "vllm", "sglang"])
def test_every_backend_that_can_serve_a_mixture_has_a_module_for_it(backend: str) -> None:
    able = backends.abilities(backend)
    assert able is not None
    assert able.moe
    file = ROOT / "entrypoints/rollout/backends" / f"moe_{backend}.py"
    assert "class Engine(" in file.read_text(encoding="utf-8")


def test_its_identity_stands_on_its_own_probe_and_backend_and_no_other_check_does() -> None:
    sources = program.Sources()
    for backend in ("transformers", "vllm", "sglang"):
        own = {f"rollout.backends.moe_{backend}.Engine", "rollout.moe_probe.tensor"}
        roots = [*sources.whole("rollout.moe"), *sources.whole(f"rollout.backends.moe_{backend}")]
        assert own <= sources.closure(roots, "moe").keys()
        dense = sources.closure([*sources.whole(f"rollout.backends.{backend}")], "refit")
        assert not [name for name in dense if ".moe" in name or ".experts" in name]


# Its faults.


def test_each_fault_of_experts_is_looked_for_by_this_check() -> None:
    assert all(FAULTS[name].check == "moe" for name in OF_EXPERTS)
    for name in OF_EXPERTS:
        assert smoke.fault(name, FACTS["smoke"]) == name
        with pytest.raises(Problem, match="is found by moe, which this image has not"):
            smoke.fault(name, FACTS["smoke"] | {"moe": False})


def test_what_is_lost_on_the_way_can_be_aimed_at_one_transport() -> None:
    for name in OF_EXPERTS[:3]:
        assert smoke.fault(f"{name}@shared-memory", FACTS["smoke"]) == f"{name}@shared-memory"
    with pytest.raises(Problem, match="is made in no transport"):
        smoke.fault(f"{OF_EXPERTS[3]}@shared-memory", FACTS["smoke"])


NAMES = [name for name in moe_probe.shapes(TINY) if ".mlp." in name]


def test_one_expert_of_one_layer_is_never_refitted() -> None:
    lost = [name for name in NAMES if not moe_faults.arrives_as(name, moe_faults.EXPERT)]
    stem = "model.layers.1.mlp.experts.2."
    assert lost == [f"{stem}{part}_proj.weight" for part in ("gate", "up", "down")]


def test_two_experts_of_one_layer_are_swapped() -> None:
    moved = {n: moe_faults.arrives_as(n, moe_faults.SWAPPED) for n in NAMES}
    moved = {name: to for name, to in moved.items() if name != to}
    assert len(moved) == 6
    assert set(moved) == set(moved.values())
    assert all(moved[to] == name for name, to in moved.items())


def test_one_router_is_never_refitted() -> None:
    lost = [name for name in NAMES if not moe_faults.arrives_as(name, moe_faults.ROUTER)]
    assert lost == ["model.layers.1.mlp.gate.weight"]


class Recorded(Played):
    """An engine that remembers which names arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.config: dict[str, Any] = {}

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.config = json.loads((model / "config.json").read_text())
        self.calls += [f"{dummy} {fp8} {level} {gpus}"]

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        self.names = [name for name, _ in tensors]
        return len(transport)

    def inject(self, fault: str) -> None:
        self.calls.append(fault)


@pytest.mark.parametrize("fault", OF_EXPERTS[:3])
def test_in_the_engine_of_another_a_fault_is_made_in_the_names_that_are_sent(fault: str) -> None:
    engine: Any = Recorded()
    faulty = moe_faults.Faulty(engine, fault)
    faulty.refit(((name, Weight(0.0)) for name in NAMES), "one")  # type: ignore[misc]
    arriving = [moe_faults.arrives_as(name, fault) for name in NAMES]
    assert engine.names == [name for name in arriving if name] != NAMES


def test_a_fault_that_is_aimed_leaves_other_transports_alone() -> None:
    engine: Any = Recorded()
    faulty = moe_faults.Faulty(engine, f"{moe_faults.ROUTER}@two")
    faulty.refit(((name, Weight(0.0)) for name in NAMES), "one")  # type: ignore[misc]
    assert engine.names == NAMES
    faulty.refit(((name, Weight(0.0)) for name in NAMES), "two")  # type: ignore[misc]
    assert len(engine.names) == len(NAMES) - 1


def test_in_the_engine_of_another_the_config_says_that_nothing_is_normalised(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine: Any = Recorded()
    moe_faults.Faulty(engine, moe_faults.UNNORMALISED).start(tmp_path, dummy=True)
    assert engine.config == {**TINY, "norm_topk_prob": False}


def test_an_engine_of_ours_makes_the_fault_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine: Any = Recorded()
    engine.inside = OF_EXPERTS
    faulty = moe_faults.Faulty(engine, moe_faults.SWAPPED)
    faulty.start(tmp_path, dummy=True)
    faulty.refit(((name, Weight(0.0)) for name in NAMES), "one")  # type: ignore[misc]
    assert engine.calls == ["True False 1 1", moe_faults.SWAPPED]
    assert engine.names == NAMES
    assert engine.config == TINY


def test_without_a_fault_the_engine_is_itself() -> None:
    engine: Any = Played()
    assert moe_faults.wrapped(engine, None) is engine


# vLLM's worker.


def test_every_name_in_vllms_worker_is_one_that_it_has_not() -> None:
    names = [name for name in dir(moe_vllm_extension.Extension) if not name.startswith("__")]
    assert [name for name in names if not name.startswith("smoke_")] == []


def test_a_refit_of_vllm_is_the_dense_one_with_a_loader_for_every_fused_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(experts, "loadable", lambda model: done.append(f"loadable {model}"))
    monkeypatch.setattr(experts, "digests", lambda model: {"of": model})
    monkeypatch.setattr(
        vllm_extension.Extension, "smoke_load", lambda _, address: done.append(f"load {address}")
    )
    made = moe_vllm_extension.Extension()
    made.model_runner = SimpleNamespace(get_model=lambda: "the model")
    made.smoke_load("ipc://x")
    assert done == ["loadable the model", "load ipc://x"]
    assert made.smoke_digests() == {"of": "the model"}


# On the real reference engine.


@contextmanager
def real(fault: str | None = None) -> Iterator[Trial]:
    with moe.prepared(FACTS, ["shared-memory"], fault) as trial:
        yield trial


@inside
def test_a_sound_engine_passes_ten_times_in_a_row() -> None:
    for _ in range(10):
        with real() as trial:
            metrics = moe.moe(trial)
        assert metrics["experts"] == TINY["num_experts"] * TINY["num_hidden_layers"]
        assert metrics["least_chosen"] > 0


@inside
@pytest.mark.parametrize("fault", OF_EXPERTS)
def test_every_fault_is_found_for_its_reason(fault: str) -> None:
    with real(fault) as trial, pytest.raises(Failed) as caught:
        moe.moe(trial)
    assert not faults.unseen(fault, {"moe": caught.value.reason}, ["moe"]), caught.value.reason


@inside
@pytest.mark.parametrize("fault", OF_EXPERTS)
def test_every_fault_is_found_by_the_output_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the engine holds what was sent, and computes with something else."""
    monkeypatch.setattr(Trial, "differing", lambda *_: [])
    with real(fault) as trial, pytest.raises(Failed) as caught:
        moe.moe(trial)
    assert caught.value.reason.startswith("by shared-memory the digests agree, yet the output")
    assert caught.value.metrics["worst_request"] > 1.0 + calibrate.TENFOLD * 0.043


# Its calibration: whole by `python -m rollout.moe_calibrate`, here on fewer repeats.


@pytest.fixture(scope="module")
def calibrated() -> dict[str, Any]:
    torch = pytest.importorskip("torch", reason="torch lives in the images")
    torch.set_num_threads(1)
    return moe_calibrate.measure(TINY, moe.SEED, repeats=3)


def test_the_probe_keeps_its_margins_and_no_choice_of_experts_turns(
    calibrated: dict[str, Any],
) -> None:
    assert moe_calibrate.margins_hold(calibrated) == []


def test_every_single_tensor_is_lost_in_every_way(calibrated: dict[str, Any]) -> None:
    tensors = calibrated["loss"]["tensors"]
    assert list(tensors) == list(moe_probe.shapes(TINY))
    assert all(set(ways) == set(calibrate.WAYS) for ways in tensors.values())


GOOD = {"margin": 0.8, "moved": 0.02, "turned": 0, "choices": 100, "least_chosen": 5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"turned": 1}, "1 of 100 choices"),
        ({"margin": 0.2}, "leads by 0.20 only"),
        ({"moved": 0.09}, "moves a router's logit by 0.090"),
        ({"least_chosen": 0}, "chosen by no token"),
        ({"moved": float("nan")}, "moves a router's logit"),
    ],
)
def test_a_broken_guarantee_of_routing_is_a_sentence(change: dict[str, Any], said: str) -> None:
    found = moe_calibrate.routes_hold(GOOD | change)
    assert len(found) == bool(change)
    assert said in "".join(found)

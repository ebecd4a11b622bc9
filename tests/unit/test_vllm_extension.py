"""What the proof adds to vLLM's worker: names apart, tensors taken apart, parameters that stay."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from images.catalog import ROOT
from rollout import checks, cuda_ipc
from rollout.backends import vllm_extension
from rollout.backends.vllm import _running
from rollout.backends.vllm_extension import BLOCK, Extension, quantise


def test_every_name_is_one_that_no_worker_has() -> None:
    # vLLM refuses an extension that has a name of its worker.
    names = [name for name in dir(Extension) if not name.startswith("__")]
    assert names
    assert [name for name in names if not name.startswith("smoke_")] == []


def test_an_engine_process_dies_with_the_trainer_that_started_it() -> None:
    inner = (
        "import time; from rollout.backends.vllm_extension import Extension;"
        " print(Extension().smoke_follow(), flush=True); time.sleep(600)"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    trainer = subprocess.Popen(
        [sys.executable, "-c", outer],
        env={"PYTHONPATH": str(ROOT / "entrypoints")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    with trainer.stdout:
        engine = int(trainer.stdout.readline())
        assert _running(engine)
        trainer.kill()
        trainer.wait()
    end = time.monotonic() + 10
    while _running(engine) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _running(engine)


# where each tensor lies


class Parameter:
    """A parameter that has nothing but a shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def dim(self) -> int:
        return len(self.shape)


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def model(**modules: tuple[Any, dict[str, Any]]) -> Any:
    """A model of named modules (dots written as double underscores) with named parameters."""
    named = {name.replace("__", "."): part for name, part in modules.items()}
    return SimpleNamespace(
        packed_modules_mapping=PACKED,
        named_modules=lambda: [(name, module) for name, (module, _) in named.items()],
        named_parameters=lambda: [
            (f"{name}.{attribute}", value)
            for name, (_, values) in named.items()
            for attribute, value in values.items()
        ],
    )


def test_packed_tensors_are_taken_apart_in_their_order() -> None:
    qkv = SimpleNamespace(output_sizes=[8, 2, 2])
    gate_up = SimpleNamespace(output_sizes=[5, 5])
    found = vllm_extension._places(
        model(
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


def test_the_padding_of_a_vocabulary_is_left_out() -> None:
    vocabulary = SimpleNamespace(org_vocab_size=1000)
    found = vllm_extension._places(
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
        vllm_extension._places(model(a__qkv_proj=(qkv, {"weight": Parameter(12, 4)})))


# with torch: inside the images


def worker(model: Any, torch: Any) -> Extension:
    """vLLM's worker with the extension mixed in."""
    made = Extension()
    made.model_runner = SimpleNamespace(get_model=lambda: model)
    made.model_config = "config"
    made.device = torch.device("cpu")
    return made


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
    found = worker(
        model(
            a__qkv_proj=(SimpleNamespace(output_sizes=[8, 2, 2]), {"weight": whole}),
            embed=(SimpleNamespace(org_vocab_size=10), {"weight": padded}),
        ),
        torch,
    ).smoke_digests()
    assert found == {name: checks.digest(tensor) for name, tensor in sent.items()}


def test_a_lost_buffer_is_a_fault_of_buffers_alone(torch: Any) -> None:
    layer = torch.nn.BatchNorm1d(3)
    worker(layer, torch).smoke_lose_buffers()
    assert not layer.running_var.any()
    assert layer.weight.all()


def test_a_leak_is_kept(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_extension, "LEAK_BYTES", 1000)
    leaking = worker(None, torch)
    leaking.smoke_leak()
    leaking.smoke_leak()
    kept = vars(leaking)["smoke_leaks"]
    assert [tensor.numel() for tensor in kept] == [1000, 1000]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (1, 1), (127, 129)], ids=str)
def test_a_weight_in_eight_bits_is_what_it_was_but_for_rounding(
    torch: Any, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(torch.bfloat16)
    small, scale = quantise(weight)
    assert (tuple(small.shape), small.dtype) == (shape, torch.float8_e4m3fn)
    assert small.is_contiguous()
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == tuple(-(-length // BLOCK) for length in shape)
    factors = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    factors = factors[: shape[0], : shape[1]]
    error = (small.float() * factors - weight.float()).abs()
    # Three bits behind the point; what is too small for an exponent is rounded to 2**-9.
    assert (error <= weight.float().abs() / 16 + factors * 2**-10 + 1e-9).all()


def test_the_factor_of_a_block_is_its_largest_over_the_largest_of_its_type(torch: Any) -> None:
    weight = torch.ones(130, 260)
    weight[0, 0], weight[129, 259], weight[5, 130] = 7.0, -14.0, 28.0
    _, scale = quantise(weight)
    expected = torch.tensor([[7.0, 28.0, 1.0], [1.0, 1.0, 14.0]]) / 448
    assert torch.allclose(scale, expected, rtol=1e-6, atol=0)


def test_a_block_of_zeros_stays_zero(torch: Any) -> None:
    weight = torch.zeros(256, 128)
    weight[128:] = 1.0
    small, scale = quantise(weight)
    assert not small[:128].float().any()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(small[128:].float() * scale[1], weight[128:])


# a refit, with a vLLM that is none


@pytest.fixture
def fp8_method(monkeypatch: pytest.MonkeyPatch, torch: Any) -> Iterator[Any]:
    """What a refit imports of vLLM: how fp8 layers are made, and what strips them after loading."""

    class Fp8LinearMethod:
        def create_weights(self, layer: Any, **options: Any) -> None:
            assert options["weight_loader"] is layer.weight_loader_v2
            shape = (sum(options["output_partition_sizes"]), options["input_size_per_partition"])
            blocks = [-(-length // BLOCK) for length in shape]
            for name, value in {
                "weight": torch.empty(shape, dtype=torch.float8_e4m3fn),
                "weight_scale_inv": torch.empty(blocks),
            }.items():
                parameter = torch.nn.Parameter(value, requires_grad=False)
                parameter.load = parameter.data.copy_  # what stripped ones have lost
                setattr(layer, name, parameter)

        def process_weights_after_loading(self, layer: Any) -> None:
            for name, parameter in dict(layer.named_parameters()).items():
                stripped = torch.nn.Parameter(parameter.data, requires_grad=False)
                setattr(layer, name, stripped)

    def process(model: Any, config: Any, device: Any) -> None:
        assert (config, device.type) == ("config", "cpu")
        model.processed += 1

    package = "vllm.model_executor"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        package: {},
        f"{package}.model_loader": {},
        f"{package}.model_loader.utils": {"process_weights_after_loading": process},
        f"{package}.layers": {},
        f"{package}.layers.quantization": {},
        f"{package}.layers.quantization.fp8": {"Fp8LinearMethod": Fp8LinearMethod},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return Fp8LinearMethod()


def refit(worker: Extension, monkeypatch: pytest.MonkeyPatch, *buckets: Any) -> None:
    """A refit by these buckets, without a transport."""

    def receive(address: str, _: Any, load: Callable[[Any], None]) -> None:
        assert address == "ipc://x"
        for bucket in buckets:
            load(bucket)

    monkeypatch.setattr(cuda_ipc, "receive", receive)
    worker.smoke_refit("ipc://x")


def small_model(torch: Any, method: Any) -> Any:
    """A layer in fp8 (if there is a method for it) and a norm, loaded as vLLM loads."""

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(4, bias=False)
            self.proj = torch.nn.Linear(200, 130, bias=False)
            self.processed = 0
            self.loads: list[list[str]] = []

        def load_weights(self, stream: Any) -> None:
            assert not self.processed
            parameters = dict(self.named_parameters())
            self.loads.append([name for name, _ in stream])
            for name, tensor in stream:
                parameter = parameters[name]
                assert parameter.shape == tensor.shape
                getattr(parameter, "load", parameter.data.copy_)(tensor)

    made = Model().requires_grad_(False)
    if method is not None:
        layer = made.proj
        vars(layer).update(
            quant_method=method,
            logical_widths=[130],
            input_size_per_partition=200,
            input_size=200,
            output_size=130,
            orig_dtype=torch.bfloat16,
            weight_loader_v2=lambda *_: None,
        )
        del layer.weight
        shapes = {"weight": (130, 200), "weight_scale_inv": (2, 2)}
        for name, shape in shapes.items():
            dtype = torch.float8_e4m3fn if name == "weight" else torch.float32
            value = torch.zeros(shape, dtype=dtype)
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return made


def test_a_refit_loads_each_bucket_and_processes_once_at_its_end(
    torch: Any, fp8_method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del fp8_method  # its modules have to be there, whether or not a layer is in fp8
    model = small_model(torch, None)
    norm, weight = torch.full((4,), 3.0), torch.randn(130, 200)
    refit(worker(model, torch), monkeypatch, [("norm.weight", norm)], [("proj.weight", weight)])
    assert model.loads == [["norm.weight"], ["proj.weight"]]
    assert model.processed == 1
    assert torch.equal(model.proj.weight, weight)


def test_a_refit_in_fp8_quantises_on_the_way_and_keeps_every_parameters_place(
    torch: Any, fp8_method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(torch, fp8_method)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    norm, weight = torch.full((4,), 3.0), torch.randn(130, 200).to(torch.bfloat16)
    for turn in (1.0, 2.0):
        bucket = [("norm.weight", norm * turn), ("proj.weight", weight * turn)]
        refit(worker(model, torch), monkeypatch, bucket)
        small, scale = quantise(weight * turn)
        assert torch.equal(model.proj.weight.view(torch.uint8), small.view(torch.uint8))
        assert torch.equal(model.proj.weight_scale_inv, scale)
        assert torch.equal(model.norm.weight, norm * turn)
        # CUDA graphs have recorded the addresses.
        after = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
        assert after == before
    assert model.loads[0] == ["norm.weight", "proj.weight", "proj.weight_scale_inv"]

"""What the proof adds to vLLM's worker: names apart, tensors taken apart, parameters that stay."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from images.catalog import ROOT
from rollout import cuda_ipc, placement
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


def test_digests_are_of_the_model_that_the_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "digests", lambda model: {"of": model})
    made = Extension()
    made.model_runner = SimpleNamespace(get_model=lambda: "the model")
    assert made.smoke_digests() == {"of": "the model"}


def test_the_block_of_the_cache_is_the_one_that_vllm_settled_on() -> None:
    made = Extension()
    made.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=64))
    assert made.smoke_block() == 64


# with torch: inside the images


def worker(model: Any, torch: Any) -> Extension:
    """vLLM's worker with the extension mixed in."""
    made = Extension()
    made.model_runner = SimpleNamespace(get_model=lambda: model)
    made.model_config = "config"
    made.vllm_config = "everything"
    made.device = torch.device("cpu")
    return made


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

SETTINGS: list[Any] = []  # the configuration that is set now


@pytest.fixture
def fp8_method(monkeypatch: pytest.MonkeyPatch, torch: Any) -> Any:
    """What a refit imports of vLLM: how fp8 layers are made, and what strips them after loading."""

    class Fp8LinearMethod:
        kernel: object = None

        def create_weights(self, layer: Any, **options: Any) -> None:
            assert SETTINGS == ["everything"], "newer layers cannot be made without"
            self.kernel = object()
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
            assert SETTINGS == ["everything"]
            for name, parameter in dict(layer.named_parameters()).items():
                stripped = torch.nn.Parameter(parameter.data, requires_grad=False)
                setattr(layer, name, stripped)

    def process(model: Any, config: Any, device: Any) -> None:
        assert SETTINGS == ["everything"]
        assert (config, device.type) == ("config", "cpu")
        model.processed += 1

    @contextlib.contextmanager
    def current(config: Any) -> Iterator[None]:
        SETTINGS.append(config)
        yield
        SETTINGS.pop()

    package = "vllm.model_executor"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"set_current_vllm_config": current},
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
    fp8_method.kernel = chosen = object()
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
        assert fp8_method.kernel is chosen, "compiled graphs call the kernel of the start"
    assert not SETTINGS
    assert model.loads[0] == ["norm.weight", "proj.weight", "proj.weight_scale_inv"]

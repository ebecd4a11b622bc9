"""Every sentence of docs/findings.md is printed as it stands there, on a host that is so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.preflight import devices, gpu, library, network, variables
from rollout.preflight.finding import Finding, Host
from rollout.preflight.known import KNOWN
from tests.unit import hosts
from tests.unit.hosts import BUSY, ENVIRON, FIRST, FULL, SECOND, Nvml, install, libcuda

DRIVER = "570.86.15"
ANOTHER = ("H200", SECOND, 141 << 30, 140 << 30)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """What makes a sound host the one of an example."""

    environ: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[Path], object] = lambda _: None
    nvml: Callable[[], Any] = lambda: Nvml(FULL)
    backend: str = "vllm"


def gone(*paths: str) -> Callable[[Path], object]:
    return lambda root: [(root / path).unlink() for path in paths]


def there(*paths: str) -> Callable[[Path], object]:
    return lambda root: [hosts.write(root / path, "") for path in paths]


def ill(**says: tuple[int, ...]) -> Case:
    return Case(nvml=lambda: Nvml(FULL, says=says))


def visible(value: str, *gpus: tuple[str, str, int, int], backend: str = "vllm") -> Case:
    return Case({gpu.VISIBLE: value}, nvml=lambda: Nvml(FULL, *gpus), backend=backend)


def silent(code: int) -> Case:
    return Case(nvml=lambda: Nvml(FULL, init=code))


def missing() -> None:
    raise OSError


def elsewhere(root: Path) -> None:
    gone(f"usr/lib64/libcuda.so.{DRIVER}")(root)
    libcuda(root, "/usr/local/nvidia/lib64", DRIVER)


CASES: dict[str, dict[str, Case]] = {
    "gpu": {
        "gpu-driver-missing": Case(change=gone("proc/driver/nvidia/version")),
        "gpu-not-in-container": Case(change=gone("dev/nvidia0")),
        "gpu-control-missing": Case(change=gone("dev/nvidiactl")),
        "gpu-uvm-missing": Case(change=gone("dev/nvidia-uvm")),
        "gpu-closed": Case(),  # by the fixture: only root can give a file away
        "gpu-driver-too-old": Case(change=lambda root: install(root, "470.256.02")),
        "gpu-driver-too-old-for-nvcc": Case(
            change=there(
                "opt/rollout/lib/python3.11/site-packages/nvidia_cuda_nvcc-13.0.88.dist-info/METADATA"
            )
        ),
        "gpu-driver-shadowed": Case(
            {"LD_LIBRARY_PATH": "/opt/rollout/cuda/lib64:/usr/local/cuda/compat"},
            lambda root: libcuda(root, "/usr/local/cuda/compat", "575.57.08"),
        ),
        "gpu-driver-library-elsewhere": Case(change=elsewhere),
        "gpu-driver-library-missing": Case(change=gone(f"usr/lib64/libcuda.so.{DRIVER}")),
        "gpu-driver-hangs": Case(),  # by the fixture
        "gpu-nvml-missing": Case(nvml=missing),
        "gpu-driver-mismatch": silent(18),
        "gpu-driver-silent": silent(999),
        "gpu-all-hidden": visible(""),
        "gpu-number-unknown": visible("2", ANOTHER),
        "gpu-uuid-unknown": visible(SECOND),
        "gpu-named-twice": visible("0,0"),
        "gpus-cut-off": visible("0,7"),
        "gpu-named-by-uuid": visible(SECOND, ANOTHER),
        "gpus-named-by-uuid": visible(f"{FIRST},{SECOND}", ANOTHER, backend="sglang"),
        "gpu-lost": Case(nvml=lambda: Nvml(FULL, lost=0)),
        "gpu-fabric-not-ready": ill(Fabric=(2, 0)),
        "gpu-fabric-failed": ill(Fabric=(3, 999)),
        "gpu-prohibited": ill(DeviceGetComputeMode=(2,)),
        "gpu-exclusive": ill(DeviceGetComputeMode=(3,)),
        "gpu-mig-empty": ill(DeviceGetMigMode=(1, 1)),
        "gpu-memory-bad": ill(DeviceGetRemappedRows=(0, 9, 1, 1)),
        "gpu-reset-pending": ill(DeviceGetRemappedRows=(0, 1, 1, 0)),
        "gpu-memory-errors": ill(DeviceGetTotalEccErrors=(3,)),
        "gpu-ecc-changes": ill(DeviceGetEccMode=(1, 0)),
        "gpu-memory-short": Case(nvml=lambda: Nvml(BUSY)),
        "gpu-too-small": Case(nvml=lambda: Nvml(("L4", FIRST, 22 << 30, 22 << 30))),
        "gpu-shared": Case(nvml=lambda: Nvml(("H200", FIRST, 141 << 30, 100 << 30))),
    },
    "variables": {
        "allocator-excludes-sleep": Case({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        "engine-port-is-address": Case({"VLLM_PORT": "tcp://10.0.0.7:8000"}),
        "port-is-address": Case({"MASTER_PORT": "tcp://10.0.0.7:29500"}),
        "gloo-interface-missing": Case({"GLOO_SOCKET_IFNAME": "ib0"}),
        "library-path-replaced": Case({"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}),
        "libraries-replaced": Case(
            {"LD_LIBRARY_PATH": "/opt/rollout/cuda/lib64:/usr/local/cuda/lib64"},
            there("usr/local/cuda/lib64/libcublas.so.12"),
        ),
        "cuda-home-replaced": Case({"CUDA_HOME": "/usr/local/cuda"}),
        "nccl-way-off": Case({"NCCL_P2P_DISABLE": "1"}),
        "nccl-cumem-on": Case({"NCCL_CUMEM_ENABLE": "1"}),
        "nccl-interface-missing": Case({"NCCL_SOCKET_IFNAME": "ib0"}),
        "launches-block": Case({"CUDA_LAUNCH_BLOCKING": "1"}),
        "mps-not-there": Case({"CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps"}),
        "path-replaced": Case({"PATH": "/usr/bin:/bin"}),
        "python-home-replaced": Case({"PYTHONHOME": "/opt/conda"}),
        "python-path-hides": Case({"PYTHONPATH": "{root}/home/me/site-packages"}),
        "compiler-missing": Case({"CC": "/opt/cray/bin/cc"}),
        "preload-missing": Case({"LD_PRELOAD": "/opt/xalt/lib64/libxalt_init.so"}),
        "proxy-takes-local": Case({"http_proxy": "http://proxy:3128"}),
        "not-utf8": Case({"SITE_NAME": os.fsdecode(b"M\xfcnchen")}),
    },
    "network": {
        "vocabulary-missing": Case({"TIKTOKEN_ENCODINGS_BASE": "/data/encodings"}),
        "interface-not-chosen": Case(change=lambda root: hosts.interfaces(root, "ib0")),
        "fast-network-not-in-container": Case(change=there("sys/class/infiniband/mlx5_0/x")),
        "fast-network-off": Case(
            {"NCCL_IB_DISABLE": "1"},
            there("sys/class/infiniband/mlx5_0/x", "dev/infiniband/uverbs0"),
        ),
        "efa-without-plugin": Case(
            change=there("sys/class/infiniband/rdmap0s31/x", "dev/infiniband/uverbs0")
        ),
    },
}
LOOKS = {"gpu": gpu.look, "variables": variables.look, "network": network.look}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[Finding]]:
    """All findings of a kind on the host of one example."""

    def of(kind: str, name: str) -> list[Finding]:
        case = CASES[kind][name]
        hosts.tree(tmp_path)
        install(tmp_path, DRIVER)
        libcuda(tmp_path, "/usr/lib64", DRIVER)
        hosts.image(tmp_path, case.backend, "return int(physical_device_id)")
        hosts.interfaces(tmp_path, "lo", "eth0")
        hosts.write(tmp_path / "home/me/site-packages/torch/__init__.py", "")
        hosts.write(tmp_path / "opt/rollout/lib/python3.11/site-packages/torch/__init__.py", "")
        case.change(tmp_path)
        monkeypatch.setattr(gpu, "nvml", case.nvml)
        if name == "gpu-driver-hangs":
            monkeypatch.setattr(library, "ask", lambda *_: library.Answer(library.HANGS))
        if name == "gpu-closed":
            closed, stat = SimpleNamespace(st_mode=0o020660, st_gid=44), Path.stat
            monkeypatch.setattr(devices.os, "access", lambda *_: False)
            monkeypatch.setattr(devices.os, "getuid", lambda: 1000)
            monkeypatch.setattr(
                Path, "stat", lambda p, **how: closed if p.name == "nvidia0" else stat(p, **how)
            )
        given = {key: value.replace("{root}", str(tmp_path)) for key, value in case.environ.items()}
        many = {"SLURM_JOB_NUM_NODES": "2"} if kind == "network" else {}
        host = Host(tmp_path, {**ENVIRON, **many, **given}, "12.8")
        return [
            Finding(f.kind, f.name, f.sentence.replace(str(tmp_path), ""), f.stops)
            for f in LOOKS[kind](host)
        ]

    return of


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in LOOKS for name in KNOWN[kind]])
def test_the_sentence_of_the_page_is_the_one_that_is_printed(
    made: Callable[[str, str], list[Finding]], kind: str, name: str
) -> None:
    known = KNOWN[kind][name]
    assert made(kind, name) == [Finding(kind, name, known.example, known.stops)]


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in LOOKS])
def test_the_sentences_of_other_kinds_are_held_against_the_page_in_their_own_tests(
    kind: str,
) -> None:
    text = (HERE / f"test_preflight_{kind}.py").read_text(encoding="utf-8")
    assert "def example(name: str) -> Finding:" in text
    assert [name for name in KNOWN[kind] if f'"{name}"' not in text] == []

"""What is known of a whole machine before an engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout import preflight
from rollout.preflight import gpu, memory
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import BUSY, FULL, Nvml, install, libcuda, meminfo


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return hosts.tree(tmp_path)


def test_the_most_fundamental_finding_comes_first(machine: Path) -> None:
    meminfo(machine, 0)
    environ = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "XDG_CACHE_HOME": "/none",
    }
    (machine / "dev/shm").rmdir()
    found = preflight.findings("12.8", machine, environ)
    assert [sentence.split()[0] for sentence in found] == [
        *("no", "PYTORCH_CUDA_ALLOC_CONF", "/dev/shm", "/none")
    ]
    # Main memory is what an engine on the CPU lives on.
    assert "GiB of memory free" in preflight.findings(None, machine, environ)[-2]


def test_an_obstacle_on_the_way_to_the_gpu_comes_before_the_others(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(BUSY))
    install(machine, "570.86.15")
    libcuda(machine, "/compat", "575.57.08")
    (machine / "dev/shm").rmdir()
    environ = {"XDG_CACHE_HOME": "/cache", "LD_LIBRARY_PATH": "/compat"}
    found = preflight.findings("12.8", machine, environ)
    assert [sentence.split()[0] for sentence in found] == ["/compat", "GPU", "/dev/shm"]
    found = preflight.findings(None, machine, environ)  # no GPU is of interest to a CPU image
    assert [sentence.split()[0] for sentence in found] == ["/dev/shm"]


def test_shared_memory_for_one_gpu_only_is_no_obstacle_and_said(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = {machine / "dev/shm": 64 << 20}
    usage = lambda path: SimpleNamespace(total=total[path], free=total[path])  # noqa: E731
    monkeypatch.setattr(memory.shutil, "disk_usage", usage)
    assert list(memory.shared_memory(Host(machine, {}, None))) == []
    assert preflight.warnings("12.8", machine, {}) == [
        "/dev/shm has 64 MiB, which is enough for one GPU; tensor parallelism "
        "(NCCL, vLLM's queues) needs '--shm-size 10g' or '--ipc host'"
    ]
    assert preflight.warnings(None, machine, {}) == []
    total[machine / "dev/shm"] = memory.SHM_OF_MANY
    assert preflight.warnings("12.8", machine, {}) == []


def test_what_is_a_finding_is_no_warning_too(tmp_path: Path) -> None:
    assert list(memory.shared_memory(Host(tmp_path, {}, None))) != []
    assert preflight.warnings("12.8", tmp_path, {}) == []


def test_a_machine_with_everything_has_no_findings(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL))
    usage = SimpleNamespace(free=memory.SHM_NEEDED, total=memory.SHM_OF_MANY)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage)
    install(machine, "580.65.06")
    libcuda(machine, "/lib64", "580.65.06")
    environ = {"XDG_CACHE_HOME": "/cache"}
    for cuda in (None, "12.8", "13.0"):
        assert preflight.findings(cuda, machine, environ) == []

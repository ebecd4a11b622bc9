"""Healthy hosts, of which no kind has anything to say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rollout.preflight import gpu, network, variables
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import ENVIRON, FIRST, FULL, SECOND, Nvml

SERVICES = {"KUBERNETES_PORT": "tcp://10.0.0.1:443", "KUBERNETES_SERVICE_PORT": "443"}
HOSTS = {
    "docker": {"NVIDIA_VISIBLE_DEVICES": "all", "HOSTNAME": "4711"},
    "pod": {**SERVICES, "RAY_HEAD_SVC_SERVICE_PORT": "6379", "NVIDIA_VISIBLE_DEVICES": FIRST},
    "slurm": {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TMPDIR": "/tmp",
        "NCCL_SOCKET_IFNAME": "^lo,docker",
        "GLOO_SOCKET_IFNAME": "eth0",
        "LANG": "de_DE.UTF-8",
        "http_proxy": "http://proxy:3128",
        "no_proxy": "localhost,127.0.0.1,.cluster",
    },
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hosts.tree(tmp_path)
    hosts.install(tmp_path, "580.65.06")
    hosts.libcuda(tmp_path, "/usr/lib/x86_64-linux-gnu", "580.65.06")
    hosts.interfaces(tmp_path, "lo", "eth0", "ib0", "docker0")
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "dev/infiniband").mkdir()
    (tmp_path / "dev/infiniband/uverbs0").touch()
    (tmp_path / "dev/nvidia1").touch()
    (tmp_path / "tmp").mkdir()
    says = {"Fabric": (3, 0), "DeviceGetComputeMode": (0,), "DeviceGetMigMode": (0, 0)}
    other = (FULL[0], SECOND, *FULL[2:])
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL, other, says=says))
    return tmp_path


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("backend", ["vllm", "sglang"])
@pytest.mark.parametrize("cuda", ["12.8", "13.0", None])
@pytest.mark.parametrize("kind", HOSTS)
def test_a_healthy_host_is_not_remarked_on(
    machine: Path, kind: str, cuda: str | None, backend: str, proof: bool
) -> None:
    hosts.image(machine, backend, "return int(physical_device_id)")
    host = Host(machine, {**ENVIRON, **HOSTS[kind]}, cuda, proof)
    for look in (gpu.look, variables.look, network.look):
        assert list(look(host)) == []


def test_all_three_looks_take_milliseconds(machine: Path) -> None:
    hosts.image(machine, "vllm")
    host = Host(machine, {**ENVIRON, **HOSTS["slurm"]}, "12.8")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for look in (gpu.look, variables.look, network.look):
            list(look(host))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05

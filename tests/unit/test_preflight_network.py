"""What is known of the network before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.preflight import network
from rollout.preflight.finding import Finding, Host
from tests.unit import hosts
from tests.unit.hosts import ENVIRON

MANY = {"SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    hosts.image(tmp_path, "vllm")
    hosts.interfaces(tmp_path, "lo", "eth0", "docker0", "veth12ab")
    return tmp_path


def found(
    root: Path, *, asked: bool = False, cuda: str | None = "12.8", **more: str
) -> list[Finding]:
    return list(network.look(Host(root, {**ENVIRON, **more}, cuda, all=asked)))


def only(findings: list[Finding]) -> tuple[str, bool, str]:
    (finding,) = findings
    assert finding.kind == "network"
    return finding.name, finding.stops, finding.sentence


def adapter(root: Path, name: str, *, inside: bool = True) -> None:
    (root / "sys/class/infiniband" / name).mkdir(parents=True)
    if inside:
        (root / "dev/infiniband").mkdir(parents=True, exist_ok=True)
        (root / "dev/infiniband/uverbs0").touch()


def test_a_host_without_a_network_is_not_remarked_on(tmp_path: Path) -> None:
    hosts.interfaces(tmp_path, "lo")
    assert found(tmp_path, asked=True, **MANY) == []


# vocabularies


def test_a_folder_without_the_vocabulary_is_named(machine: Path) -> None:
    (machine / "encodings").mkdir()
    name, stops, sentence = only(found(machine, TIKTOKEN_ENCODINGS_BASE="/encodings"))
    assert (name, stops) == ("vocabulary-missing", False)
    assert "is /encodings, where o200k_base.tiktoken is not to be found" in sentence
    (machine / "encodings/o200k_base.tiktoken").touch()
    assert found(machine, TIKTOKEN_ENCODINGS_BASE="/encodings") == []


def test_an_address_of_vocabularies_is_not_looked_up(machine: Path) -> None:
    assert found(machine, TIKTOKEN_ENCODINGS_BASE="https://mirror.example/encodings") == []


# interfaces


@pytest.mark.parametrize(
    "environ",
    [
        MANY,
        {"SLURM_NNODES": "4"},
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
        {"PET_NNODES": "2"},
    ],
)
def test_nodes_that_choose_among_interfaces_by_themselves_are_told_their_names(
    machine: Path, environ: dict[str, str]
) -> None:
    assert found(machine, **environ) == []  # one leads outward
    hosts.interfaces(machine, "ib0")
    name, stops, sentence = only(found(machine, **environ))
    assert (name, stops) == ("interface-not-chosen", False)
    assert "each chooses among eth0, ib0 by itself; set NCCL_SOCKET_IFNAME" in sentence
    assert found(machine, GLOO_SOCKET_IFNAME="ib0", **environ) == []
    (machine / "sys/class/net/ib0/operstate").write_text("down\n")
    assert found(machine, **environ) == []


@pytest.mark.parametrize(
    "environ", [{}, {"SLURM_NNODES": "1"}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}]
)
def test_one_node_has_nothing_to_choose(machine: Path, environ: dict[str, str]) -> None:
    hosts.interfaces(machine, "ib0")
    assert found(machine, asked=True, **environ) == []


# adapters


@pytest.mark.parametrize(("name", "kind"), [("mlx5_0", "InfiniBand or RoCE"), ("rdmap0s31", "EFA")])
def test_a_fast_network_that_is_not_in_the_container_is_named(
    machine: Path, name: str, kind: str
) -> None:
    adapter(machine, name, inside=False)
    finding, stops, sentence = only(found(machine, **MANY))
    assert (finding, stops) == ("fast-network-not-in-container", False)
    assert sentence.startswith(f"the host has {kind} ({name}), and /dev/infiniband is not in this")
    assert only(found(machine, asked=True))[0] == finding  # who asks is told
    assert found(machine) == []  # a job on one node needs none
    assert found(machine, cuda=None, asked=True, **MANY) == []


def test_infiniband_that_is_in_the_container_is_not_remarked_on(machine: Path) -> None:
    adapter(machine, "mlx5_0")
    assert found(machine, asked=True, NCCL_IB_DISABLE="0", **MANY) == []


def test_infiniband_that_nccl_may_not_use_is_named(machine: Path) -> None:
    adapter(machine, "mlx5_0")
    name, stops, sentence = only(found(machine, NCCL_IB_DISABLE="1", **MANY))
    assert (name, stops) == ("fast-network-off", False)
    assert "and not over mlx5_0; unset it" in sentence


def test_efa_without_its_plugin_is_told_what_to_mount(machine: Path) -> None:
    adapter(machine, "efa_0")
    name, stops, sentence = only(found(machine, **MANY))
    assert (name, stops) == ("efa-without-plugin", False)
    assert "aws-ofi-nccl) and libfabric (libfabric.so.1) are not found" in sentence
    assert sentence.endswith(
        "mount /opt/amazon of the host and set LD_LIBRARY_PATH=/opt/rollout/cuda/lib64:"
        "/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib"
    )


def test_efa_with_its_plugin_outside_of_the_library_path_is_told_the_whole_value(
    machine: Path,
) -> None:
    adapter(machine, "rdmap0s31")
    for path in ("opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so", "opt/amazon/efa/lib/libfabric.so.1"):
        (machine / path).parent.mkdir(parents=True)
        (machine / path).touch()
    whole = "/opt/rollout/cuda/lib64:/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib"
    sentence = only(found(machine, **MANY))[2]
    assert sentence.endswith(f"goes over TCP; set LD_LIBRARY_PATH={whole}")
    assert found(machine, **{**MANY, "LD_LIBRARY_PATH": whole}) == []
    (machine / "opt/amazon/efa/lib/libfabric.so.1").unlink()
    sentence = only(found(machine, **{**MANY, "LD_LIBRARY_PATH": whole}))[2]
    assert "and libfabric (libfabric.so.1) is not found" in sentence

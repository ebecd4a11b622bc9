"""What is known of the job's variables before an engine starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from images.catalog import ROOT
from rollout.preflight import image, variables
from rollout.preflight.finding import Finding, Host
from tests.unit import hosts
from tests.unit.hosts import ENVIRON, sentences


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    hosts.image(tmp_path, "vllm")
    hosts.interfaces(tmp_path, "lo", "eth0")
    return tmp_path


def found(root: Path, cuda: str | None = "12.8", **more: str) -> list[Finding]:
    return list(variables.look(Host(root, {**ENVIRON, **more}, cuda)))


def only(findings: list[Finding]) -> tuple[str, bool, str]:
    (finding,) = findings
    assert finding.kind == "variables"
    return finding.name, finding.stops, finding.sentence


def test_what_the_image_sets_is_not_remarked_on(machine: Path) -> None:
    assert found(machine) == []
    assert found(machine, None) == []


def test_what_the_look_takes_for_the_images_own_is_what_its_recipe_sets() -> None:
    recipe = (ROOT / "images/recipes/Dockerfile").read_text(encoding="utf-8")
    for name in ("CUDA_HOME", "LD_LIBRARY_PATH"):
        assert re.search(rf"\b{name}=([^\s\\]+)", recipe)[1] == ENVIRON[name]  # type: ignore[index]
    assert f"ENV PATH={image.PREFIX}/bin:" in recipe


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "a:1, Expandable_Segments: true"])
def test_an_allocator_that_excludes_sleep_is_named(name: str, value: str) -> None:
    (sentence,) = sentences(variables.allocator({name: value}))
    assert sentence == f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
    fine = {name: "expandable_segments:False,max_split_size_mb:64"}
    assert sentences(variables.allocator(fine)) == []


# Kubernetes


def test_the_port_that_kubernetes_sets_for_a_service_named_vllm_stops_vllm(machine: Path) -> None:
    name, stops, sentence = only(found(machine, VLLM_PORT="tcp://10.0.0.7:8000"))
    assert (name, stops) == ("engine-port-is-address", True)
    assert "'enableServiceLinks: false' in the pod's spec, or run 'env -u VLLM_PORT …'" in sentence


@pytest.mark.parametrize(
    "name", ["SGLANG_PORT", "SGLANG_GRPC_PORT", "RAY_PORT", "MASTER_PORT", "VLLM_DP_MASTER_PORT"]
)
def test_other_ports_that_are_addresses_are_warned_of(machine: Path, name: str) -> None:
    found_name, stops, sentence = only(found(machine, **{name: "tcp://10.0.0.7:1"}))
    assert (found_name, stops) == ("port-is-address", False)
    assert sentence.startswith(f"{name} is tcp://10.0.0.7:1: ")


def test_the_usual_variables_of_services_are_not_remarked_on(machine: Path) -> None:
    services = {
        "KUBERNETES_PORT": "tcp://10.0.0.1:443",
        "VLLM_SERVICE_PORT": "8000",
        "VLLM_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "VLLM_SERVER_PORT": "tcp://10.0.0.8:8000",  # a Service named vllm-server
        "RAY_HEAD_PORT": "tcp://10.0.0.9:6379",
        "RAYCLUSTER_A_HEAD_SVC_PORT": "tcp://10.0.0.9:6379",
        "VLLM_PORT": "8000",
        "MASTER_PORT": "29500",
    }
    assert found(machine, **services) == []


# interfaces


def test_an_interface_for_gloo_that_is_not_there_stops(machine: Path) -> None:
    for value in ("ib0", "eth0,ib0"):
        name, stops, sentence = only(found(machine, GLOO_SOCKET_IFNAME=value))
        assert (name, stops) == ("gloo-interface-missing", True)
        assert "there is no interface ib0 in this container" in sentence
        assert "name one of eth0, lo" in sentence
    assert found(machine, GLOO_SOCKET_IFNAME="eth0") == []


@pytest.mark.parametrize("value", ["ib0", "=eth", "^eth,lo", "eth1"])
def test_an_interface_for_nccl_that_is_not_there_is_a_warning(machine: Path, value: str) -> None:
    name, stops, sentence = only(found(machine, NCCL_SOCKET_IFNAME=value))
    assert (name, stops) == ("nccl-interface-missing", False)
    assert "interfaces (eth0, lo)" in sentence


@pytest.mark.parametrize("value", ["eth0", "eth", "=eth0", "^lo,docker", "^=lo", "ib,eth", ""])
def test_nccl_reads_beginnings_of_names_and_exclusions(machine: Path, value: str) -> None:
    assert found(machine, NCCL_SOCKET_IFNAME=value) == []


def test_where_the_kernel_tells_of_no_interface_none_is_missing(tmp_path: Path) -> None:
    assert found(tmp_path, GLOO_SOCKET_IFNAME="ib0", NCCL_SOCKET_IFNAME="ib0") == []


# libraries and programs


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        ("/usr/local/nvidia/lib64", "/opt/rollout/cuda/lib64:/usr/local/nvidia/lib64"),
        ("", "/opt/rollout/cuda/lib64"),
        (":/a::/b", "/opt/rollout/cuda/lib64:/a:/b"),
    ],
)
def test_a_library_path_without_the_images_folder_is_told_the_whole_value(
    machine: Path, value: str, whole: str
) -> None:
    name, stops, sentence = only(found(machine, LD_LIBRARY_PATH=value))
    assert (name, stops) == ("library-path-replaced", False)
    assert sentence.endswith(f"; set LD_LIBRARY_PATH={whole}")
    assert found(machine, LD_LIBRARY_PATH=whole) == []


def test_a_library_path_with_the_sites_own_cuda_is_named(machine: Path) -> None:
    site = machine / "usr/local/cuda/lib64"
    site.mkdir(parents=True)
    (site / "libcuda.so.1").touch()
    path = "/opt/rollout/cuda/lib64:/usr/local/cuda/lib64"
    assert found(machine, LD_LIBRARY_PATH=path) == []  # the driver's alone
    (site / "libcublas.so.12").touch()
    name, stops, sentence = only(found(machine, LD_LIBRARY_PATH=path))
    assert (name, stops) == ("libraries-replaced", False)
    assert "has /usr/local/cuda/lib64, which holds libcublas.so.12" in sentence
    assert sentence.endswith("; set LD_LIBRARY_PATH=/opt/rollout/cuda/lib64")


@pytest.mark.parametrize("value", ["/usr/local/cuda", ""])
def test_another_toolkit_than_the_images_is_named(machine: Path, value: str) -> None:
    name, stops, sentence = only(found(machine, CUDA_HOME=value))
    assert (name, stops) == ("cuda-home-replaced", False)
    assert sentence.endswith("; set CUDA_HOME=/opt/rollout/cuda")


def test_an_image_without_a_toolkit_asks_for_none(tmp_path: Path) -> None:
    host = Host(tmp_path, {"PATH": ENVIRON["PATH"]}, "12.8")
    assert list(variables.look(host)) == []


def test_a_path_without_the_images_programs_is_told_the_whole_value(machine: Path) -> None:
    name, stops, sentence = only(found(machine, PATH="/site/bin:/usr/bin"))
    assert (name, stops) == ("path-replaced", False)
    assert sentence.endswith("; set PATH=/opt/rollout/bin:/site/bin:/usr/bin")


def test_another_python_before_the_images_is_named(machine: Path) -> None:
    (machine / "site/bin").mkdir(parents=True)
    assert found(machine, PATH="/site/bin:/opt/rollout/bin:/usr/bin") == []
    (machine / "site/bin/python3").touch()
    name, stops, sentence = only(found(machine, PATH="/site/bin:/opt/rollout/bin:/usr/bin"))
    assert (name, stops) == ("path-replaced", False)
    assert sentence == (
        "PATH has /site/bin before /opt/rollout/bin, so python3 is not the image's; set "
        "PATH=/opt/rollout/bin:/site/bin:/usr/bin"
    )


@pytest.mark.parametrize("name", ["CC", "CXX", "NVCC_CCBIN"])
def test_a_compiler_that_is_not_in_the_container_is_named(machine: Path, name: str) -> None:
    for value in ("/opt/cray/bin/cc -O2", "icpc"):
        found_name, stops, sentence = only(found(machine, **{name: value}))
        assert (found_name, stops) == ("compiler-missing", False)
        assert sentence.startswith(f"{name} is {value}, which is not in this container")
    (machine / "usr/bin").mkdir(parents=True)
    (machine / "usr/bin/g++-11").touch()
    assert found(machine, **{name: "/usr/bin/g++-11"}) == []
    assert found(machine, **{name: "g++-11 -m64"}) == []


def test_a_preloaded_library_that_is_not_in_the_container_is_named(machine: Path) -> None:
    name, stops, sentence = only(found(machine, LD_PRELOAD="libjemalloc.so.2:/opt/xalt.so"))
    assert (name, stops) == ("preload-missing", False)
    assert "names /opt/xalt.so, which is not in this container" in sentence
    (machine / "opt/xalt.so").touch()
    assert found(machine, LD_PRELOAD="/opt/xalt.so") == []


# NCCL and CUDA


@pytest.mark.parametrize("name", ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"])
def test_a_way_of_nccl_that_is_off_is_named(machine: Path, name: str) -> None:
    found_name, stops, sentence = only(found(machine, **{name: "1"}))
    assert (found_name, stops) == ("nccl-way-off", False)
    assert sentence.startswith(f"{name} is 1, so ")
    assert found(machine, **{name: "0"}) == []


def test_buffers_of_nccl_that_survive_no_sleep_are_named(machine: Path) -> None:
    name, stops, sentence = only(found(machine, NCCL_CUMEM_ENABLE="1"))
    assert (name, stops) == ("nccl-cumem-on", False)
    assert "set NCCL_CUMEM_ENABLE=0" in sentence


def test_kernels_that_block_are_named(machine: Path) -> None:
    assert only(found(machine, CUDA_LAUNCH_BLOCKING="1"))[:2] == ("launches-block", False)
    assert found(machine, CUDA_LAUNCH_BLOCKING="0") == []


def test_a_folder_of_mps_without_its_daemon_is_named(machine: Path) -> None:
    name, stops, sentence = only(found(machine, CUDA_MPS_PIPE_DIRECTORY="/mps"))
    assert (name, stops) == ("mps-not-there", False)
    assert "is /mps, where no daemon of MPS listens" in sentence
    (machine / "mps").mkdir()
    (machine / "mps/control").touch()
    assert found(machine, CUDA_MPS_PIPE_DIRECTORY="/mps") == []


# proxies and text


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("but", "whole"),
    [
        (None, "localhost,127.0.0.1"),
        (".corp,10.0.0.0/8", ".corp,10.0.0.0/8,localhost,127.0.0.1"),
        ("localhost", "localhost,127.0.0.1"),
    ],
)
def test_a_proxy_for_the_host_itself_is_told_the_whole_value_and_not_printed(
    machine: Path, name: str, but: str | None, whole: str
) -> None:
    more = {name: "http://user:secret@proxy:3128"} | ({"no_proxy": but} if but else {})
    found_name, stops, sentence = only(found(machine, **more))
    assert (found_name, stops) == ("proxy-takes-local", False)
    assert f"set no_proxy={whole} and NO_PROXY to the same" in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize("but", ["localhost,127.0.0.1", "*", "localhost 127.0.0.0/8"])
@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_a_proxy_that_leaves_the_host_alone_is_not_remarked_on(
    machine: Path, name: str, but: str
) -> None:
    assert found(machine, **{"http_proxy": "http://proxy:3128", name: but}) == []


def test_an_image_without_a_server_calls_nobody_on_the_host(machine: Path) -> None:
    assert found(machine, None, http_proxy="http://proxy:3128") == []


def test_a_proxy_for_https_takes_no_call_of_the_host(machine: Path) -> None:
    assert found(machine, https_proxy="http://proxy:3128") == []


def test_bytes_that_are_no_utf8_are_named_on_one_printable_line(machine: Path) -> None:
    name, stops, sentence = only(found(machine, SITE=os.fsdecode(b"M\xfcnchen\n")))
    assert (name, stops) == ("not-utf8", False)
    assert sentence.startswith("SITE holds bytes that are no UTF-8")
    assert sentence.isascii()
    assert sentence.isprintable()
    assert found(machine, SITE="München") == []

"""What is known of the GPU and its driver before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from rollout.preflight import devices, drivers, gpu
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import FULL, OPEN, PROPRIETARY, Nvml, install, libcuda, sentences


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return hosts.tree(tmp_path)


def host(root: Path, environ: Mapping[str, str] | None = None, cuda: str = "12.8") -> Host:
    return Host(root, environ or {}, cuda)


@pytest.mark.parametrize("form", [PROPRIETARY, OPEN], ids=["proprietary", "open"])
@pytest.mark.parametrize("version", ["550.54.15", "570.86.15", "535.54", "580.65.06"])
def test_the_driver_is_known_by_either_kernel_module(
    machine: Path, form: str, version: str
) -> None:
    install(machine, version, form)
    assert drivers.driver(machine) == version


def test_no_driver_is_no_version(machine: Path) -> None:
    assert drivers.driver(machine) is None
    (machine / "proc/driver/nvidia/version").write_text("something else 1.2.3 \n")
    assert drivers.driver(machine) is None


def test_a_host_without_a_driver_is_said(machine: Path) -> None:
    assert sentences(devices.look(host(machine))) == [
        "no NVIDIA driver on this host; run it on a GPU host"
    ]


def test_a_container_without_its_gpu_is_said_with_the_option(machine: Path) -> None:
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    (found,) = sentences(devices.look(host(machine)))
    assert found.startswith("no GPU in this container; start it with '--gpus all'")


@pytest.mark.parametrize(
    ("cuda", "driver", "oldest"),
    [
        ("12.8", "525.60.11", "525.60.13"),
        ("12.8", "470.256.02", "525.60.13"),
        ("13.0", "570.86.15", "580.65.06"),
        ("13.1", "580.65.05", "580.65.06"),
    ],
)
def test_a_driver_older_than_the_cuda_release_needs_is_said_with_what_it_needs(
    machine: Path, cuda: str, driver: str, oldest: str
) -> None:
    install(machine, driver)
    assert sentences(drivers.old(host(machine, {}, cuda), None)) == [
        f"driver {driver} is older than CUDA {cuda} needs; "
        f"update it to {oldest} or newer, or take an image of an older CUDA"
    ]


@pytest.mark.parametrize(
    ("cuda", "driver"),
    [("12.8", "525.60.13"), ("12.8", "535.54"), ("13.0", "580.65.06"), ("13.0", "590.1")],
)
def test_a_driver_that_is_new_enough_is_not_remarked_on(
    machine: Path, cuda: str, driver: str
) -> None:
    install(machine, driver)
    assert sentences(drivers.old(host(machine, {}, cuda), None)) == []


def nvcc(root: Path, name: str) -> None:
    (root / "opt/rollout/lib/python3.11/site-packages" / name).mkdir(parents=True)


def test_a_driver_too_old_for_what_the_image_compiles_is_warned_of(machine: Path) -> None:
    install(machine, "570.86.15")
    nvcc(machine, "nvidia_cuda_nvcc_cu12-12.8.93.dist-info")  # without a compiler
    assert list(drivers.compiled(host(machine))) == []
    nvcc(machine, "nvidia_cuda_nvcc-13.0.88.dist-info")
    (found,) = drivers.compiled(host(machine))
    assert (found.name, found.stops) == ("gpu-driver-too-old-for-nvcc", False)
    assert found.sentence.startswith("driver 570.86.15 does not run what nvcc 13.0.88 of this")
    assert "update it to 580.65.06 or newer" in found.sentence
    install(machine, "580.65.06")
    assert list(drivers.compiled(host(machine))) == []


def test_an_image_for_the_cpu_asks_for_no_gpu(tmp_path: Path) -> None:
    assert sentences(gpu.look(Host(tmp_path, {}, None))) == []


def test_the_drivers_own_library_is_not_remarked_on(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    assert sentences(drivers.library(host(machine, {}))) == []
    assert sentences(drivers.library(host(machine, {"LD_LIBRARY_PATH": ":/nowhere:$ORIGIN"}))) == []


@pytest.mark.parametrize("pattern", ["/etc/ld.so.conf.d/*.conf", "ld.so.conf.d/*.conf"])
def test_a_library_that_shadows_the_driver_is_named_with_its_folder(
    machine: Path, pattern: str
) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    libcuda(machine, "/usr/local/cuda/compat", "575.57.08")
    versions = "libcuda.so.1 of driver 575.57.08, but the driver of this host is 570.86.15"
    environ = {"LD_LIBRARY_PATH": "/nowhere:/usr/local/cuda/compat:/usr/lib/x86_64-linux-gnu"}
    assert sentences(drivers.library(host(machine, environ))) == [
        f"/usr/local/cuda/compat holds the {versions}; take that folder out: "
        "set LD_LIBRARY_PATH=/nowhere:/usr/lib/x86_64-linux-gnu"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/lib/x86_64-linux-gnu:/usr/local/cuda/compat"}
    assert sentences(drivers.library(host(machine, environ))) == []  # the loader takes the first
    (machine / "etc/ld.so.conf.d").mkdir(parents=True)
    (machine / "etc/ld.so.conf").write_text(f"include {pattern}\n")
    (machine / "etc/ld.so.conf.d/x86_64.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
    (machine / "etc/ld.so.conf.d/00-compat.conf").write_text("# c\n\n/usr/local/cuda/compat # c\n")
    assert sentences(drivers.library(host(machine, {}))) == [
        f"/usr/local/cuda/compat holds the {versions}; "
        "remove cuda-compat there, or restart the host if its driver was just updated"
    ]


def test_links_lead_where_they_lead_inside_the_tree(machine: Path) -> None:
    """An absolute link of a container means the container's file, not this machine's."""
    install(machine, "570.86.15")
    libcuda(machine, "/opt/cuda-13.0/compat", "580.65.06")
    (machine / "usr/local").mkdir(parents=True)
    (machine / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    (machine / "etc/alternatives").mkdir(parents=True)
    (machine / "etc/alternatives/cuda").symlink_to("../../../../opt/./cuda-13.0")
    environ = {"LD_LIBRARY_PATH": "/usr/local/cuda/compat"}
    assert "driver 580.65.06" in sentences(drivers.library(host(machine, environ)))[0]


def test_a_link_that_ends_nowhere_is_passed_over(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib64", "570.86.15")
    (machine / "round").mkdir()
    (machine / "round/libcuda.so.1").symlink_to("libcuda.so.1")
    (machine / "lost").mkdir()
    (machine / "lost/libcuda.so.1").symlink_to("/gone/libcuda.so.570.86.15")
    environ = {"LD_LIBRARY_PATH": "/round:/lost;/dev/nvidia0"}
    assert sentences(drivers.library(host(machine, environ))) == []

    def closed(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_file", closed)  # root may look everywhere
    assert "not in this container" in sentences(drivers.library(host(machine, environ)))[0]


@pytest.mark.parametrize("name", ["libcuda.so.1", "libcuda.so.1.1", "libcuda.so"])
def test_a_library_without_a_version_in_its_name_says_nothing(machine: Path, name: str) -> None:
    install(machine, "570.86.15")
    (machine / "usr/lib64").mkdir(parents=True)
    (machine / "usr/lib64" / name).touch()
    if name != "libcuda.so.1":
        (machine / "usr/lib64/libcuda.so.1").symlink_to(name)
    assert sentences(drivers.library(host(machine, {}))) == []


def test_a_folder_that_only_the_loaders_cache_names_is_known(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/opt/driver", "570.86.15")
    (machine / "etc").mkdir()
    cache = b"glibc-ld.so.cache1.1\0\0libcuda.so.1\0/gone/libcuda.so.1\0/opt/driver/libcuda.so.1\0"
    (machine / "etc/ld.so.cache").write_bytes(cache)
    assert sentences(drivers.library(host(machine, {}))) == []


def test_a_container_without_the_drivers_libraries_is_told_how_to_start(machine: Path) -> None:
    install(machine, "570.86.15")
    assert sentences(drivers.library(host(machine, {}))) == [
        "the driver's libraries (libcuda.so.1) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ]
    libcuda(machine, "/usr/local/nvidia/lib64", "570.86.15")
    assert sentences(drivers.library(host(machine, {}))) == [
        "no libcuda.so.1 is found but in /usr/local/nvidia/lib64; "
        "set LD_LIBRARY_PATH=/usr/local/nvidia/lib64"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert sentences(drivers.library(host(machine, environ))) == []


def test_the_whole_value_of_the_library_path_is_said_with_the_images_own_folder(
    machine: Path,
) -> None:
    install(machine, "570.86.15")
    hosts.image(machine, "vllm")
    libcuda(machine, "/usr/local/nvidia/lib64", "570.86.15")
    (found,) = sentences(drivers.library(host(machine, {"LD_LIBRARY_PATH": "/site"})))
    whole = "/opt/rollout/cuda/lib64:/site:/usr/local/nvidia/lib64"
    assert found.endswith(f"; set LD_LIBRARY_PATH={whole}")


def test_a_library_path_of_which_nothing_is_left_is_to_be_unset(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/compat", "575.57.08")
    (found,) = sentences(drivers.library(host(machine, {"LD_LIBRARY_PATH": "/compat"})))
    assert found.endswith("take that folder out: unset LD_LIBRARY_PATH")


@pytest.mark.parametrize("way", ["docker", "podman, CDI", "Apptainer", "Kubernetes"])
def test_a_container_without_its_gpu_is_told_every_way_to_start(machine: Path, way: str) -> None:
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    (machine / "dev/nvidia-caps").mkdir()
    assert f"({way})" in sentences(devices.look(host(machine)))[0]


@pytest.mark.parametrize(
    ("node", "name", "remedy"),
    [
        ("nvidiactl", "gpu-control-missing", "start it with '--gpus all'"),
        ("nvidia-uvm", "gpu-uvm-missing", "run 'nvidia-modprobe -u -c 0' on the host"),
    ],
)
def test_each_missing_node_has_its_own_remedy(
    machine: Path, node: str, name: str, remedy: str
) -> None:
    install(machine, "570.86.15")
    assert list(devices.look(host(machine))) == []
    (machine / "dev" / node).unlink()
    (found,) = devices.look(host(machine))
    assert (found.name, found.stops) == (name, True)
    assert f"/dev/{node} is not in this container" in found.sentence
    assert remedy in found.sentence


@pytest.mark.parametrize("node", ["nvidia0", "nvidiactl", "nvidia-uvm"])
def test_a_node_that_this_user_may_not_open_is_said_with_its_group(
    machine: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    install(machine, "570.86.15")
    path = machine / "dev" / node
    path.chmod(0o660)
    # root may open every file
    monkeypatch.setattr(devices.os, "access", lambda where, _: where != path)
    (found,) = sentences(devices.look(host(machine)))
    group = path.stat().st_gid
    assert found.startswith(f"/dev/{node} is closed to user ")
    assert f"its mode is 0660, its group {group}; start the container with" in found
    assert f"'--group-add {group}'" in found


def test_a_job_with_one_of_many_gpus_is_not_told_of_the_closed_ones(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine, "570.86.15")
    (machine / "dev/nvidia1").touch()
    closed = machine / "dev/nvidia0"
    monkeypatch.setattr(devices.os, "access", lambda where, _: where != closed)
    assert list(devices.look(host(machine))) == []


@pytest.fixture
def windows(machine: Path) -> Path:
    """Linux inside of Windows: no module, no nodes, the driver in a folder of its own."""
    for path in (machine / "dev").glob("nvidia*"):
        path.unlink()
    (machine / "proc/driver/nvidia").rmdir()
    (machine / "proc/sys/kernel").mkdir(parents=True)
    (machine / "proc/sys/kernel/osrelease").write_text("6.6.87.2-microsoft-standard-WSL2\n")
    (machine / "dev/dxg").touch()
    (machine / "usr/lib/wsl/lib").mkdir(parents=True)
    (machine / "usr/lib/wsl/lib/libcuda.so.1").touch()
    (machine / "etc/ld.so.conf.d").mkdir(parents=True)
    (machine / "etc/ld.so.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")
    (machine / "etc/ld.so.conf.d/ld.wsl.conf").write_text("/usr/lib/wsl/lib\n")
    return machine


def test_windows_with_a_gpu_is_no_host_without_a_driver(
    windows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = {"SystemGetCudaDriverVersion_v2": (12080,)}
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL, says=says))
    assert sentences(gpu.look(host(windows))) == []
    (found,) = sentences(gpu.look(host(windows, {}, "13.0")))
    assert found == (
        "the driver of this host runs CUDA 12.8 at most, and the image is of CUDA 13.0; update it "
        "to 580.65.06 or newer, or take an image of an older CUDA"
    )


def test_windows_without_its_gpu_is_told_how_to_start(windows: Path) -> None:
    (windows / "etc/ld.so.conf.d/ld.wsl.conf").unlink()
    (found,) = sentences(drivers.library(host(windows)))
    assert found.endswith("but in /usr/lib/wsl/lib; set LD_LIBRARY_PATH=/usr/lib/wsl/lib")
    (windows / "dev/dxg").unlink()
    assert sentences(devices.look(host(windows)))[0].startswith("no GPU in this container; start")

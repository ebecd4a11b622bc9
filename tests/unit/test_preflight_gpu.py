"""What is known of the GPU and its driver before an engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout.preflight import gpu
from tests.unit import hosts
from tests.unit.hosts import (
    BUSY,
    FIRST,
    FULL,
    OPEN,
    PROPRIETARY,
    SECOND,
    SLICE,
    Nvml,
    install,
    libcuda,
    sentences,
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return hosts.tree(tmp_path)


@pytest.mark.parametrize("form", [PROPRIETARY, OPEN], ids=["proprietary", "open"])
@pytest.mark.parametrize("version", ["550.54.15", "570.86.15", "535.54", "580.65.06"])
def test_the_driver_is_known_by_either_kernel_module(
    machine: Path, form: str, version: str
) -> None:
    install(machine, version, form)
    assert gpu.driver(machine) == version


def test_no_driver_is_no_version(machine: Path) -> None:
    assert gpu.driver(machine) is None
    (machine / "proc/driver/nvidia/version").write_text("something else 1.2.3 \n")
    assert gpu.driver(machine) is None


def test_a_host_without_a_driver_is_said(machine: Path) -> None:
    assert sentences(gpu.gpu("12.8", machine)) == [
        "no NVIDIA driver on this host; run it on a GPU host"
    ]


def test_a_container_without_its_gpu_is_said_with_the_option(machine: Path) -> None:
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    (found,) = sentences(gpu.gpu("12.8", machine))
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
    assert sentences(gpu.gpu(cuda, machine)) == [
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
    assert sentences(gpu.gpu(cuda, machine)) == []


def test_an_image_for_the_cpu_asks_for_no_gpu(tmp_path: Path) -> None:
    assert sentences(gpu.gpu(None, tmp_path)) == []


def test_the_drivers_own_library_is_not_remarked_on(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    assert sentences(gpu.driver_library(machine, {})) == []
    assert sentences(gpu.driver_library(machine, {"LD_LIBRARY_PATH": ":/nowhere:$ORIGIN"})) == []


@pytest.mark.parametrize("pattern", ["/etc/ld.so.conf.d/*.conf", "ld.so.conf.d/*.conf"])
def test_a_library_that_shadows_the_driver_is_named_with_its_folder(
    machine: Path, pattern: str
) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    libcuda(machine, "/usr/local/cuda/compat", "575.57.08")
    versions = "libcuda.so.1 of driver 575.57.08, but the driver of this host is 570.86.15"
    environ = {"LD_LIBRARY_PATH": "/nowhere:/usr/local/cuda/compat:/usr/lib/x86_64-linux-gnu"}
    assert sentences(gpu.driver_library(machine, environ)) == [
        f"/usr/local/cuda/compat holds the {versions}; take that folder out of LD_LIBRARY_PATH"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/lib/x86_64-linux-gnu:/usr/local/cuda/compat"}
    assert sentences(gpu.driver_library(machine, environ)) == []  # the loader takes the first
    (machine / "etc/ld.so.conf.d").mkdir(parents=True)
    (machine / "etc/ld.so.conf").write_text(f"include {pattern}\n")
    (machine / "etc/ld.so.conf.d/x86_64.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
    (machine / "etc/ld.so.conf.d/00-compat.conf").write_text("# c\n\n/usr/local/cuda/compat # c\n")
    assert sentences(gpu.driver_library(machine, {})) == [
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
    assert "driver 580.65.06" in sentences(gpu.driver_library(machine, environ))[0]


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
    assert sentences(gpu.driver_library(machine, environ)) == []

    def closed(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_file", closed)  # root may look everywhere
    assert "not in this container" in sentences(gpu.driver_library(machine, environ))[0]


@pytest.mark.parametrize("name", ["libcuda.so.1", "libcuda.so.1.1", "libcuda.so"])
def test_a_library_without_a_version_in_its_name_says_nothing(machine: Path, name: str) -> None:
    install(machine, "570.86.15")
    (machine / "usr/lib64").mkdir(parents=True)
    (machine / "usr/lib64" / name).touch()
    if name != "libcuda.so.1":
        (machine / "usr/lib64/libcuda.so.1").symlink_to(name)
    assert sentences(gpu.driver_library(machine, {})) == []


def test_a_folder_that_only_the_loaders_cache_names_is_known(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/opt/driver", "570.86.15")
    (machine / "etc").mkdir()
    cache = b"glibc-ld.so.cache1.1\0\0libcuda.so.1\0/gone/libcuda.so.1\0/opt/driver/libcuda.so.1\0"
    (machine / "etc/ld.so.cache").write_bytes(cache)
    assert sentences(gpu.driver_library(machine, {})) == []


def test_a_container_without_the_drivers_libraries_is_told_how_to_start(machine: Path) -> None:
    install(machine, "570.86.15")
    assert sentences(gpu.driver_library(machine, {})) == [
        "the driver's libraries (libcuda.so.1) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ]
    libcuda(machine, "/usr/local/nvidia/lib64", "570.86.15")
    assert sentences(gpu.driver_library(machine, {})) == [
        "no libcuda.so.1 is found but in /usr/local/nvidia/lib64; "
        "add that folder to LD_LIBRARY_PATH"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert sentences(gpu.driver_library(machine, environ)) == []


def test_of_a_missing_gpu_the_libraries_say_nothing(machine: Path) -> None:
    assert sentences(gpu.driver_library(machine, {})) == []
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    assert sentences(gpu.driver_library(machine, {})) == []


def memory_of(library: Nvml, visible: str | None = None, **more: str) -> list[str]:
    environ = more if visible is None else {"CUDA_VISIBLE_DEVICES": visible, **more}
    found = sentences(gpu.gpu_memory(environ, lambda: library))
    assert library.open == 0  # every session was closed
    return found


def test_a_gpu_that_another_process_fills_is_said_with_numbers() -> None:
    numbers = "3.0 of 141.0 GiB free, 24 needed"
    change = "stop the other process on it, or choose another GPU by CUDA_VISIBLE_DEVICES"
    assert memory_of(Nvml(BUSY, FULL)) == [f"GPU 0 has {numbers}; {change}"]
    assert memory_of(Nvml(FULL, BUSY), SECOND) == [f"GPU {SECOND} has {numbers}; {change}"]


def test_a_gpu_that_is_too_small_is_not_blamed_on_another_process() -> None:
    small = ("L4", FIRST, 22 << 30, 22 << 30)
    assert memory_of(Nvml(small)) == [
        "GPU 0 has 22.0 of 22.0 GiB free, 24 needed; choose a larger GPU by CUDA_VISIBLE_DEVICES"
    ]


def test_a_gpu_with_just_enough_memory_is_not_remarked_on() -> None:
    needed = gpu.GPU_NEEDED
    assert memory_of(Nvml(("A", FIRST, needed, needed))) == []
    assert len(memory_of(Nvml(("A", FIRST, needed, needed - 1)))) == 1


@pytest.mark.parametrize("visible", ["0", "0,1", " 0", FIRST, f"{FIRST},{SECOND}", None])
def test_only_the_first_visible_gpu_is_asked_about(visible: str | None) -> None:
    assert memory_of(Nvml(FULL, BUSY), visible) == []
    assert len(memory_of(Nvml((*BUSY[:1], FIRST, *BUSY[2:]), FULL), visible)) == 1


def test_a_slice_of_a_gpu_is_asked_about_by_its_name() -> None:
    mig = ("H200 MIG", SLICE, 16 << 30, 16 << 30)
    assert memory_of(Nvml(FULL, mig), SLICE)[0].startswith(f"GPU {SLICE} has 16.0 of 16.0 GiB")


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles", ","])
def test_a_setting_that_hides_every_gpu_is_named(visible: str) -> None:
    assert memory_of(Nvml(FULL), visible) == [
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU; unset it, or name one"
    ]


def test_a_gpu_that_does_not_exist_is_named() -> None:
    assert memory_of(Nvml(FULL, FULL), "2,0") == [
        "CUDA_VISIBLE_DEVICES names GPU 2, but this container has 2, counted from 0; "
        "name one of these"
    ]
    assert memory_of(Nvml(FULL), SECOND) == [
        f"CUDA_VISIBLE_DEVICES names {SECOND}, which is not in this container; "
        "name one that 'nvidia-smi -L' lists"
    ]


def test_a_shortened_name_is_left_to_cuda() -> None:
    """CUDA takes the beginning of a name, NVML does not."""
    assert memory_of(Nvml(BUSY), SECOND[:12]) == []


def test_of_unlike_gpus_a_number_means_one_only_where_cuda_counts_by_slot() -> None:
    """CUDA's GPU 0 is the fastest by default, NVML's the one in the first slot."""
    library = Nvml(("T400", SECOND, 4 << 30, 4 << 30), FULL)
    assert memory_of(library, "0") == []
    assert len(memory_of(library, "0", CUDA_DEVICE_ORDER="PCI_BUS_ID")) == 1
    assert len(memory_of(library, SECOND)) == 1


def test_where_nvml_does_not_answer_there_is_no_finding() -> None:
    def missing() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert sentences(gpu.gpu_memory({}, missing)) == []
    assert sentences(gpu.gpu_memory({}, SimpleNamespace)) == []  # a library without its functions
    assert memory_of(Nvml(BUSY, init=18)) == []  # library and driver of different versions
    for name in ("Count_v2", "HandleByIndex_v2", "MemoryInfo"):
        broken = Nvml(BUSY)
        setattr(broken, f"nvmlDeviceGet{name}", lambda *_: 999)
        assert memory_of(broken) == [], name

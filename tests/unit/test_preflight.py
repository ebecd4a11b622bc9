"""What is known before an engine starts, from trees of files that stand for a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import preflight

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar 19 01:02:03 UTC 2024\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@x)\n"
GCC = "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A tree with a GPU, enough of everything, and no driver yet."""
    for name in ("proc/driver/nvidia", "dev/shm", "cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "dev/nvidiactl").touch()
    meminfo(tmp_path, preflight.MEMORY_NEEDED)
    return tmp_path


def install(root: Path, version: str, form: str = OPEN) -> None:
    (root / "proc/driver/nvidia/version").write_text(form.format(version) + GCC)


def libcuda(root: Path, folder: str, version: str) -> None:
    """A libcuda as the container toolkit mounts it: a file with a version, and a link to it."""
    place = root / folder.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    (place / f"libcuda.so.{version}").touch()
    (place / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")


class Nvml:
    """NVML of a machine with the given GPUs: (name, UUID, total and free bytes)."""

    def __init__(self, *gpus: tuple[str, str, int, int], init: int = 0) -> None:
        self.gpus = gpus
        self.init = init
        self.open = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's names
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        if index.value >= len(self.gpus):
            return 2
        handle._obj.value = index.value + 1  # never 0, which ctypes reads back as None
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        for index, gpu in enumerate(self.gpus):
            if gpu[1] == name.decode():
                handle._obj.value = index + 1
                return 0
        return 6

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:  # noqa: N802
        assert len(name) == length.value
        name.value = self.gpus[handle.value - 1][0].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        _, _, total, free = self.gpus[handle.value - 1]
        memory._obj[:] = [total, free, total - free]
        return 0


FIRST = "GPU-4279062b-846a-33ce-0869-868e6263c3a6"
SECOND = "GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4"
SLICE = "MIG-41b36413-d1a0-5b07-ae32-8b6e3a8a4bb1"
FULL, BUSY = ("H200", FIRST, 141 << 30, 140 << 30), ("H200", SECOND, 141 << 30, 3 << 30)


def meminfo(root: Path, available: int) -> None:
    lines = f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {available >> 10} kB\n"
    (root / "proc/meminfo").write_text(lines)


@pytest.mark.parametrize("form", [PROPRIETARY, OPEN], ids=["proprietary", "open"])
@pytest.mark.parametrize("version", ["550.54.15", "570.86.15", "535.54", "580.65.06"])
def test_the_driver_is_known_by_either_kernel_module(
    machine: Path, form: str, version: str
) -> None:
    install(machine, version, form)
    assert preflight.driver(machine) == version


def test_no_driver_is_no_version(machine: Path) -> None:
    assert preflight.driver(machine) is None
    (machine / "proc/driver/nvidia/version").write_text("something else 1.2.3 \n")
    assert preflight.driver(machine) is None


def test_a_host_without_a_driver_is_said(machine: Path) -> None:
    assert preflight.gpu("12.8", machine) == ["no NVIDIA driver on this host; run it on a GPU host"]


def test_a_container_without_its_gpu_is_said_with_the_option(machine: Path) -> None:
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    (found,) = preflight.gpu("12.8", machine)
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
    assert preflight.gpu(cuda, machine) == [
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
    assert preflight.gpu(cuda, machine) == []


def test_an_image_for_the_cpu_asks_for_no_gpu(tmp_path: Path) -> None:
    assert preflight.gpu(None, tmp_path) == []


def test_the_drivers_own_library_is_not_remarked_on(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    assert preflight.driver_library(machine, {}) == []
    assert preflight.driver_library(machine, {"LD_LIBRARY_PATH": ":/nowhere:$ORIGIN"}) == []


@pytest.mark.parametrize("pattern", ["/etc/ld.so.conf.d/*.conf", "ld.so.conf.d/*.conf"])
def test_a_library_that_shadows_the_driver_is_named_with_its_folder(
    machine: Path, pattern: str
) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/usr/lib/x86_64-linux-gnu", "570.86.15")
    libcuda(machine, "/usr/local/cuda/compat", "575.57.08")
    versions = "libcuda.so.1 of driver 575.57.08, but the driver of this host is 570.86.15"
    environ = {"LD_LIBRARY_PATH": "/nowhere:/usr/local/cuda/compat:/usr/lib/x86_64-linux-gnu"}
    assert preflight.driver_library(machine, environ) == [
        f"/usr/local/cuda/compat holds the {versions}; take that folder out of LD_LIBRARY_PATH"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/lib/x86_64-linux-gnu:/usr/local/cuda/compat"}
    assert preflight.driver_library(machine, environ) == []  # the loader takes the first
    (machine / "etc/ld.so.conf.d").mkdir(parents=True)
    (machine / "etc/ld.so.conf").write_text(f"include {pattern}\n")
    (machine / "etc/ld.so.conf.d/x86_64.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
    (machine / "etc/ld.so.conf.d/00-compat.conf").write_text("# c\n\n/usr/local/cuda/compat # c\n")
    assert preflight.driver_library(machine, {}) == [
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
    assert "driver 580.65.06" in preflight.driver_library(machine, environ)[0]


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
    assert preflight.driver_library(machine, environ) == []

    def closed(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_file", closed)  # root may look everywhere
    assert "not in this container" in preflight.driver_library(machine, environ)[0]


@pytest.mark.parametrize("name", ["libcuda.so.1", "libcuda.so.1.1", "libcuda.so"])
def test_a_library_without_a_version_in_its_name_says_nothing(machine: Path, name: str) -> None:
    install(machine, "570.86.15")
    (machine / "usr/lib64").mkdir(parents=True)
    (machine / "usr/lib64" / name).touch()
    if name != "libcuda.so.1":
        (machine / "usr/lib64/libcuda.so.1").symlink_to(name)
    assert preflight.driver_library(machine, {}) == []


def test_a_folder_that_only_the_loaders_cache_names_is_known(machine: Path) -> None:
    install(machine, "570.86.15")
    libcuda(machine, "/opt/driver", "570.86.15")
    (machine / "etc").mkdir()
    cache = b"glibc-ld.so.cache1.1\0\0libcuda.so.1\0/gone/libcuda.so.1\0/opt/driver/libcuda.so.1\0"
    (machine / "etc/ld.so.cache").write_bytes(cache)
    assert preflight.driver_library(machine, {}) == []


def test_a_container_without_the_drivers_libraries_is_told_how_to_start(machine: Path) -> None:
    install(machine, "570.86.15")
    assert preflight.driver_library(machine, {}) == [
        "the driver's libraries (libcuda.so.1) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ]
    libcuda(machine, "/usr/local/nvidia/lib64", "570.86.15")
    assert preflight.driver_library(machine, {}) == [
        "no libcuda.so.1 is found but in /usr/local/nvidia/lib64; "
        "add that folder to LD_LIBRARY_PATH"
    ]
    environ = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert preflight.driver_library(machine, environ) == []


def test_of_a_missing_gpu_the_libraries_say_nothing(machine: Path) -> None:
    assert preflight.driver_library(machine, {}) == []
    install(machine, "570.86.15")
    (machine / "dev/nvidia0").unlink()
    assert preflight.driver_library(machine, {}) == []


def memory_of(library: Nvml, visible: str | None = None, **more: str) -> list[str]:
    environ = more if visible is None else {"CUDA_VISIBLE_DEVICES": visible, **more}
    found = preflight.gpu_memory(environ, lambda: library)
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
    needed = preflight.GPU_NEEDED
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

    assert preflight.gpu_memory({}, missing) == []
    assert preflight.gpu_memory({}, SimpleNamespace) == []  # a library without its functions
    assert memory_of(Nvml(BUSY, init=18)) == []  # library and driver of different versions
    for name in ("Count_v2", "HandleByIndex_v2", "MemoryInfo"):
        broken = Nvml(BUSY)
        setattr(broken, f"nvmlDeviceGet{name}", lambda *_: 999)
        assert memory_of(broken) == [], name


def test_little_shared_memory_is_said_with_the_option(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {machine / "dev/shm": preflight.SHM_NEEDED}
    usage = lambda path: SimpleNamespace(free=free[path])  # noqa: E731
    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    assert preflight.shared_memory(machine) == []
    free[machine / "dev/shm"] -= 1
    option = "start the container with '--shm-size 1g'"
    assert preflight.shared_memory(machine) == [f"/dev/shm has 15 MiB free; {option}"]


def test_no_shared_memory_is_said_with_the_option(tmp_path: Path) -> None:
    option = "start the container with '--shm-size 1g'"
    assert preflight.shared_memory(tmp_path) == [f"/dev/shm does not exist; {option}"]


def test_a_cache_that_cannot_be_written_is_named(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine / "cache"
    assert preflight.cache({"XDG_CACHE_HOME": str(path)}) == []
    monkeypatch.setattr(preflight.os, "access", lambda *_: False)  # root may write everywhere
    way_out = "mount a writable folder there, or run with group 0"
    assert preflight.cache({"XDG_CACHE_HOME": str(path)}) == [
        f"{path} cannot be written; {way_out}"
    ]
    assert preflight.cache({}) == [f"/var/cache/rollout cannot be written; {way_out}"]


def test_little_memory_is_said_with_numbers(machine: Path) -> None:
    assert preflight.memory(machine) == []
    meminfo(machine, 3 << 29)
    assert preflight.memory(machine) == [
        "1.5 GiB of memory free, 3 needed; free some, or raise the container's limit (--memory)"
    ]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "a:1, Expandable_Segments: true"])
def test_an_allocator_that_excludes_sleep_is_named(name: str, value: str) -> None:
    (found,) = preflight.allocator({name: value})
    assert found == f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
    assert preflight.allocator({name: "expandable_segments:False,max_split_size_mb:64"}) == []


def test_the_most_fundamental_finding_comes_first(machine: Path) -> None:
    meminfo(machine, 0)
    environ = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "XDG_CACHE_HOME": str(machine / "none"),
    }
    (machine / "dev/shm").rmdir()
    found = preflight.findings("12.8", machine, environ)
    assert [sentence.split()[0] for sentence in found] == [
        *("no", "PYTORCH_CUDA_ALLOC_CONF", "/dev/shm", str(machine / "none"))
    ]
    # Main memory is what an engine on the CPU lives on.
    assert "GiB of memory free" in preflight.findings(None, machine, environ)[-1]


def test_an_obstacle_on_the_way_to_the_gpu_comes_before_the_others(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "nvml", lambda: Nvml(BUSY))
    install(machine, "570.86.15")
    libcuda(machine, "/compat", "575.57.08")
    (machine / "dev/shm").rmdir()
    environ = {"XDG_CACHE_HOME": str(machine / "cache"), "LD_LIBRARY_PATH": "/compat"}
    found = preflight.findings("12.8", machine, environ)
    assert [sentence.split()[0] for sentence in found] == ["/compat", "GPU", "/dev/shm"]
    found = preflight.findings(None, machine, environ)  # no GPU is of interest to a CPU image
    assert [sentence.split()[0] for sentence in found] == ["/dev/shm"]


def test_shared_memory_for_one_gpu_only_is_no_obstacle_and_said(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = {machine / "dev/shm": 64 << 20}
    usage = lambda path: SimpleNamespace(total=total[path], free=total[path])  # noqa: E731
    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    assert preflight.shared_memory(machine) == []
    assert preflight.warnings("12.8", machine, {}) == [
        "/dev/shm has 64 MiB, which is enough for one GPU; tensor parallelism "
        "(NCCL, vLLM's queues) needs '--shm-size 10g' or '--ipc host'"
    ]
    assert preflight.warnings(None, machine, {}) == []
    total[machine / "dev/shm"] = preflight.SHM_OF_MANY
    assert preflight.warnings("12.8", machine, {}) == []


def test_what_is_a_finding_is_no_warning_too(tmp_path: Path) -> None:
    assert preflight.shared_memory(tmp_path) != []
    assert preflight.warnings("12.8", tmp_path, {}) == []


def test_a_machine_with_everything_has_no_findings(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "nvml", lambda: Nvml(FULL))
    usage = SimpleNamespace(free=preflight.SHM_NEEDED)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    install(machine, "580.65.06")
    libcuda(machine, "/lib64", "580.65.06")
    environ = {"XDG_CACHE_HOME": str(machine / "cache")}
    for cuda in (None, "12.8", "13.0"):
        assert preflight.findings(cuda, machine, environ) == []


def test_the_limit_of_the_container_counts_where_the_machine_has_more(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 64000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("0\n")
    (group / "memory.max").write_text("max\n")
    assert preflight.memory(tmp_path) == []
    (group / "memory.max").write_text(f"{1 << 30}\n")
    assert preflight.memory(tmp_path)[0].startswith("1.0 GiB of memory free, 3 needed")


def test_files_that_nobody_uses_any_more_are_no_used_memory(tmp_path: Path) -> None:
    """What `rollout verify` read stays in memory until somebody needs the place."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 64000000 kB\n")
    (group / "memory.max").write_text(f"{8 << 30}\n")
    (group / "memory.current").write_text(f"{7 << 30}\n")
    assert preflight.memory(tmp_path)[0].startswith("1.0 GiB of memory free, 3 needed")
    (group / "memory.stat").write_text(
        f"anon {1 << 30}\nfile {6 << 30}\nshmem {1 << 30}\ninactive_anon {5 << 30}\n"
        f"inactive_file {3 << 30}\nactive_file {2 << 30}\n"
    )
    assert preflight.memory(tmp_path) == []
    (group / "memory.stat").write_text(f"anon {7 << 30}\ninactive_file 0\nactive_file 0\n")
    assert preflight.memory(tmp_path)[0].startswith("1.0 GiB of memory free, 3 needed")
    (group / "memory.max").write_text("nonsense\n")
    assert preflight.memory(tmp_path) == []

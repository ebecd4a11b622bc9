"""What is known before an engine starts, from trees of files that stand for a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

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


def test_a_machine_with_everything_has_no_findings(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=preflight.SHM_NEEDED)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    install(machine, "580.65.06")
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

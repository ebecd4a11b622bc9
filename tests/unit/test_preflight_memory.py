"""What is known of memory before an engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout.preflight import memory
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import meminfo, sentences


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return hosts.tree(tmp_path)


def test_little_shared_memory_is_said_with_the_option(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {machine / "dev/shm": memory.SHM_NEEDED}
    usage = lambda path: SimpleNamespace(free=free[path], total=free[path])  # noqa: E731
    monkeypatch.setattr(memory.shutil, "disk_usage", usage)
    assert sentences(memory.shared_memory(Host(machine, {}, None))) == []
    free[machine / "dev/shm"] -= 1
    option = "start the container with '--shm-size 1g'"
    assert sentences(memory.shared_memory(Host(machine, {}, None))) == [
        f"/dev/shm has 15 MiB free; {option}"
    ]


def test_no_shared_memory_is_said_with_the_option(tmp_path: Path) -> None:
    option = "start the container with '--shm-size 1g'"
    assert sentences(memory.shared_memory(Host(tmp_path, {}, None))) == [
        f"/dev/shm does not exist; {option}"
    ]


def test_little_memory_is_said_with_numbers(machine: Path) -> None:
    assert sentences(memory.memory(machine)) == []
    meminfo(machine, 3 << 29)
    assert sentences(memory.memory(machine)) == [
        "1.5 GiB of memory free, 3 needed; free some, or raise the container's limit (--memory)"
    ]


def test_the_limit_of_the_container_counts_where_the_machine_has_more(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 64000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("0\n")
    (group / "memory.max").write_text("max\n")
    assert sentences(memory.memory(tmp_path)) == []
    (group / "memory.max").write_text(f"{1 << 30}\n")
    assert sentences(memory.memory(tmp_path))[0].startswith("1.0 GiB of memory free, 3 needed")


def test_files_that_nobody_uses_any_more_are_no_used_memory(tmp_path: Path) -> None:
    """What `rollout verify` read stays in memory until somebody needs the place."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 64000000 kB\n")
    (group / "memory.max").write_text(f"{8 << 30}\n")
    (group / "memory.current").write_text(f"{7 << 30}\n")
    assert sentences(memory.memory(tmp_path))[0].startswith("1.0 GiB of memory free, 3 needed")
    (group / "memory.stat").write_text(
        f"anon {1 << 30}\nfile {6 << 30}\nshmem {1 << 30}\ninactive_anon {5 << 30}\n"
        f"inactive_file {3 << 30}\nactive_file {2 << 30}\n"
    )
    assert sentences(memory.memory(tmp_path)) == []
    (group / "memory.stat").write_text(f"anon {7 << 30}\ninactive_file 0\nactive_file 0\n")
    assert sentences(memory.memory(tmp_path))[0].startswith("1.0 GiB of memory free, 3 needed")
    (group / "memory.max").write_text("nonsense\n")
    assert sentences(memory.memory(tmp_path)) == []

"""What is known of memory, and of the limits of processes, before an engine starts."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout.preflight import memory
from rollout.preflight.finding import Finding, Host
from rollout.preflight.known import KNOWN
from tests.unit import hosts
from tests.unit.hosts import meminfo

GIB = 1 << 30
INFINITE = resource.RLIM_INFINITY
GROUPS = "/sys/fs/cgroup"
V2 = f"30 21 0:26 / {GROUPS} ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    f"31 30 0:27 {{root}} {GROUPS}/memory ro - cgroup cgroup rw,memory\n"
    f"32 30 0:28 {{root}} {GROUPS}/pids ro - cgroup cgroup rw,pids\n"
)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What /dev/shm has: enough, where a test does not say otherwise."""
    usage = SimpleNamespace(free=10 * GIB, total=10 * GIB)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage)
    return usage


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = hosts.tree(tmp_path)
    meminfo(root, 64 * GIB)
    return root


def limits(**hard: int) -> memory.Limits:
    """Soft and hard limits of a process: none, but those named."""
    names = {getattr(resource, f"RLIMIT_{name}"): value for name, value in hard.items()}
    return lambda name: (names.get(name, INFINITE), names.get(name, INFINITE))


def looked(
    root: Path, cuda: str | None = None, *, proof: bool = True, **hard: int
) -> list[Finding]:
    return list(memory.look(Host(root, {}, cuda, proof), limits(**hard)))


def example(name: str) -> Finding:
    """A finding as the table shows it."""
    known = KNOWN["memory"][name]
    return Finding("memory", name, known.example, known.stops)


def group(root: Path, path: str, **files: int | str) -> None:
    """A control group: its files, "memory_max" for memory.max."""
    for name, value in files.items():
        hosts.write(root / GROUPS[1:] / path / name.replace("_", ".", 1), f"{value}\n")


# shared memory


def test_little_shared_memory_is_said_with_the_option(machine: Path, room: SimpleNamespace) -> None:
    room.free = memory.SHM_NEEDED
    assert looked(machine) == []
    room.free -= 1
    assert looked(machine) == [example("shm-full")]


def test_no_shared_memory_is_said_with_the_option(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Path) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(memory.shutil, "disk_usage", missing)
    assert looked(machine, "12.8") == [example("shm-missing")]


def test_a_shared_memory_of_root_alone_is_said(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.os, "access", lambda *_: False)
    assert looked(machine) == [example("shm-not-writable")]


def test_shared_memory_for_one_gpu_is_warned_of_in_images_of_a_gpu(
    machine: Path, room: SimpleNamespace
) -> None:
    room.total = 64 << 20
    assert looked(machine, "12.8") == [example("shm-for-one-gpu")]
    assert looked(machine, None) == []
    room.total = memory.SHM_OF_MANY
    assert looked(machine, "12.8") == []


# main memory


def test_little_memory_is_said_with_numbers(machine: Path) -> None:
    meminfo(machine, memory.MEMORY_NEEDED)
    assert looked(machine) == []
    meminfo(machine, 3 << 29)
    assert looked(machine) == [example("memory-short")]


def test_a_proof_on_a_gpu_takes_main_memory_too(machine: Path) -> None:
    meminfo(machine, memory.MEMORY_NEEDED_BY_CUDA)
    assert looked(machine, "12.8") == []
    meminfo(machine, memory.MEMORY_NEEDED_BY_CUDA - 1024)
    (found,) = looked(machine, "12.8")
    assert (found.name, found.stops) == ("memory-short", True)
    assert found.sentence.startswith("8.0 GiB of memory free, 8 needed")


def test_memory_is_not_asked_for_where_another_command_is_to_run(machine: Path) -> None:
    meminfo(machine, 0)
    assert looked(machine, proof=False) == []
    assert looked(machine, "12.8", proof=False) == []


def test_a_kernel_that_does_not_tell_of_memory_is_no_finding(machine: Path) -> None:
    (machine / "proc/meminfo").write_text("MemFree: 1 kB\n")
    assert looked(machine) == []
    (machine / "proc/meminfo").unlink()
    assert looked(machine) == []


def test_the_limit_of_the_container_counts_where_the_machine_has_more(machine: Path) -> None:
    group(machine, "", memory_max="max", memory_current=0)
    assert looked(machine) == []
    group(machine, "", memory_max=GIB)
    (found,) = looked(machine)
    assert found.sentence.startswith("1.0 GiB of memory free, 3 needed: /sys/fs/cgroup allows 1.0")
    group(machine, "", memory_max="nonsense")
    assert looked(machine) == []


def test_where_the_machine_has_less_than_a_group_allows_the_machine_is_named(
    machine: Path,
) -> None:
    group(machine, "", memory_max=2 * GIB, memory_current=0)
    meminfo(machine, 3 << 29)
    assert looked(machine) == [example("memory-short")]


@pytest.mark.parametrize("tight", ["job/step", "job", ""])
def test_every_group_around_the_process_counts(machine: Path, tight: str) -> None:
    hosts.write(machine / "proc/self/mountinfo", V2)
    hosts.write(machine / "proc/self/cgroup", "0::/job/step\n")
    for path in ("job/step", "job", ""):
        group(machine, path, memory_max="max", memory_current=GIB)
    assert looked(machine) == []
    group(machine, tight, memory_max=8 * GIB, memory_current=7 * GIB)
    (found,) = looked(machine)
    assert found.name == "memory-limited"
    assert f": {GROUPS}/{tight}".rstrip("/") + " allows 8.0 GiB" in found.sentence
    if tight == "job/step":
        assert found == example("memory-limited")


def test_the_group_of_another_process_is_no_limit(machine: Path) -> None:
    hosts.write(machine / "proc/self/mountinfo", V2)
    hosts.write(machine / "proc/self/cgroup", "0::/job/step\n")
    group(machine, "job/step", memory_max=8 * GIB, memory_current=0)
    group(machine, "job/other", memory_max=GIB, memory_current=0)
    assert looked(machine) == []


def test_without_a_namespace_the_hosts_path_is_found_below_the_mount(machine: Path) -> None:
    """docker's own way: the kernel tells the host's path, and the mount shows a part of it."""
    bound = V2.replace("0:26 / ", "0:26 /docker/abc ")
    hosts.write(machine / "proc/self/mountinfo", bound)
    group(machine, "", memory_max=GIB, memory_current=0)
    group(machine, "in", memory_max=2 * GIB, memory_current=0)
    for path in ("/docker/abc", "/docker/abc/in", "/../elsewhere", "/docker/abcd"):
        hosts.write(machine / "proc/self/cgroup", f"0::{path}\n")
        (found,) = looked(machine)
        assert f"{GROUPS} allows 1.0 GiB" in found.sentence, path


@pytest.mark.parametrize("root", ["/", "/docker/abc"])
def test_groups_of_the_first_version_count_too(machine: Path, root: str) -> None:
    hosts.write(machine / "proc/self/mountinfo", V1.format(root=root))
    own = root if root != "/" else ""
    hosts.write(machine / "proc/self/cgroup", f"5:cpu,cpuacct:/x\n4:memory:{own}/job\n1:name=a:/\n")
    unlimited = 0x7FFFFFFFFFFFF000  # what the kernel says for none
    folder = "memory/job"
    group(machine, folder, memory_limit_in_bytes=unlimited, memory_usage_in_bytes=GIB)
    group(machine, "memory", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=GIB)
    assert looked(machine) == []
    group(machine, folder, memory_limit_in_bytes=8 * GIB, memory_usage_in_bytes=7 * GIB)
    (found,) = looked(machine)
    assert found.sentence.startswith(
        f"1.0 GiB of memory free, 3 needed: {GROUPS}/memory/job allows 8.0 GiB"
    )
    group(machine, folder, memory_stat=f"inactive_file 0\ntotal_inactive_file {5 * GIB}")
    assert looked(machine) == []


def test_the_first_version_tells_the_limit_of_groups_that_are_not_seen(machine: Path) -> None:
    group(machine, "memory", memory_limit_in_bytes=1 << 62, memory_usage_in_bytes=GIB)
    assert looked(machine) == []
    group(machine, "memory", memory_stat=f"hierarchical_memory_limit {2 * GIB}")
    (found,) = looked(machine)
    assert f"{GROUPS}/memory allows 2.0 GiB" in found.sentence


def test_files_that_nobody_uses_any_more_are_no_used_memory(machine: Path) -> None:
    """What `rollout verify` read stays in memory until somebody needs the place."""
    group(machine, "", memory_max=8 * GIB, memory_current=7 * GIB)
    assert [finding.name for finding in looked(machine)] == ["memory-limited"]
    stat = f"anon {GIB}\nshmem {GIB}\ninactive_anon {5 * GIB}\ninactive_file {3 * GIB}\n"
    group(machine, "", memory_stat=f"{stat}active_file {2 * GIB}")
    assert looked(machine) == []
    group(machine, "", memory_stat=f"anon {7 * GIB}\ninactive_file 0\nactive_file 0")
    assert [finding.name for finding in looked(machine)] == ["memory-limited"]


# limits of processes


def test_a_host_without_limits_is_not_remarked_on(machine: Path) -> None:
    hosts.write(machine / "dev/infiniband/uverbs0", "")
    assert looked(machine, "12.8") == []
    enough = {"NOFILE": 65535, "NPROC": 16384, "MEMLOCK": memory.LOCKED_OF_MANY}
    assert looked(machine, "12.8", **enough) == []


@pytest.mark.parametrize(
    ("name", "limit", "value"),
    [("files-limited", "NOFILE", 4096), ("processes-limited", "NPROC", 4096)],
)
def test_a_limit_of_a_process_is_warned_of_in_images_of_a_gpu(
    machine: Path, name: str, limit: str, value: int
) -> None:
    assert looked(machine, "12.8", **{limit: value}) == [example(name)]
    assert looked(machine, None, **{limit: value}) == []


def test_a_low_soft_limit_of_files_is_raised_by_engines_and_not_remarked_on(
    machine: Path,
) -> None:
    host = Host(machine, {}, "12.8")

    def soft(name: int) -> tuple[int, int]:
        return (1024 if name == resource.RLIMIT_NOFILE else INFINITE), INFINITE

    assert list(memory.look(host, soft)) == []


def test_locked_memory_matters_where_there_is_infiniband(machine: Path) -> None:
    assert looked(machine, "12.8", MEMLOCK=8 << 20) == []
    hosts.write(machine / "dev/infiniband/uverbs0", "")
    assert looked(machine, "12.8", MEMLOCK=8 << 20) == [example("locked-memory-limited")]
    assert looked(machine, None, MEMLOCK=8 << 20) == []


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_group_that_allows_few_processes_is_warned_of(machine: Path, version: str) -> None:
    path = "job" if version == "v2" else "pids/job"
    hosts.write(machine / "proc/self/mountinfo", V2 if version == "v2" else V1.format(root="/"))
    hosts.write(machine / "proc/self/cgroup", "0::/job\n" if version == "v2" else "7:pids:/job\n")
    group(machine, path, pids_max="max", pids_current=48)
    assert looked(machine, "12.8") == []
    group(machine, path, pids_max=memory.PROCESSES_OF_MANY + 48)
    assert looked(machine, "12.8") == []
    group(machine, path, pids_max=2048)
    (found,) = looked(machine, "12.8")
    assert found.sentence.replace("cgroup/pids", "cgroup") == example("pids-limited").sentence
    assert not found.stops
    assert looked(machine, None) == []

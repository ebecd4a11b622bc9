"""What is known of a whole machine before an engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout import preflight
from rollout.preflight import gpu, memory
from rollout.preflight.finding import Finding, Host
from tests.unit import hosts
from tests.unit.hosts import BUSY, FULL, Nvml, install, libcuda, meminfo


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with a GPU that is free, and enough of everything."""
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL))
    usage = SimpleNamespace(free=memory.SHM_NEEDED, total=memory.SHM_OF_MANY)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage)
    root = hosts.tree(tmp_path)
    install(root, "580.65.06")
    libcuda(root, "/lib64", "580.65.06")
    return root


def names(root: Path, cuda: str | None, **environ: str) -> list[str]:
    """What stops on a host; the limits of this process may well be those of a small machine."""
    host = Host(root, {"XDG_CACHE_HOME": "/cache", **environ}, cuda)
    return [finding.name for finding in preflight.look(host) if finding.stops]


def test_a_machine_with_everything_has_no_findings(machine: Path) -> None:
    for cuda in (None, "12.8", "13.0"):
        assert names(machine, cuda) == []


def test_the_most_fundamental_finding_comes_first(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(BUSY))
    libcuda(machine, "/compat", "575.57.08")
    meminfo(machine, 0)
    everything = {
        "LD_LIBRARY_PATH": "/compat",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "XDG_CACHE_HOME": "/proc/driver/nvidia/version",  # no folder, and none can be made there
    }
    others = ["memory-short", "cache-not-writable"]
    assert names(machine, "12.8", **everything) == [
        *("gpu-driver-shadowed", "gpu-memory-short", "allocator-excludes-sleep", *others)
    ]
    # No GPU is of interest to an image of the CPU.
    assert names(machine, None, **everything) == ["allocator-excludes-sleep", *others]
    # Without a driver there is nothing to ask about it.
    (machine / "proc/driver/nvidia/version").unlink()
    assert names(machine, "12.8", **everything)[:2] == [
        *("gpu-driver-missing", "allocator-excludes-sleep")
    ]


def test_what_stops_and_what_only_warns_are_told_apart(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rollout smoke` ends with the first of the former."""
    stops = Finding("cache", "a", "a is wrong; mend a")
    warns = Finding("cache", "b", "b is wrong; mend b", stops=False)
    kind = SimpleNamespace(look=lambda _: iter([warns, stops]))
    monkeypatch.setattr(preflight, "KINDS", (kind, kind))
    assert preflight.look(Host(machine, {}, "12.8")) == [stops, stops, warns, warns]

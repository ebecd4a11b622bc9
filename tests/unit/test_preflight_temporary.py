"""What is known of the folder of temporary files before an engine starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.preflight import cache, temporary
from rollout.preflight.finding import Finding, Host
from rollout.preflight.known import KNOWN
from tests.unit import hosts

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    hosts.image(tmp_path, "vllm")
    return tmp_path


def disk(free: int) -> Callable[[Path], Any]:
    found = SimpleNamespace(f_bavail=free >> 12, f_frsize=4096, f_files=99, f_favail=9)
    return lambda _: found


def looked(
    root: Path,
    *,
    cuda: str | None = "12.8",
    proof: bool = True,
    access: cache.Access = os.access,
    free: int = 99 * GIB,
    **environ: str,
) -> list[Finding]:
    return list(temporary.look(Host(root, environ, cuda, proof), access, disk(free)))


def names(found: list[Finding]) -> list[tuple[str, bool]]:
    return [(finding.name, finding.stops) for finding in found]


def example(name: str) -> Finding:
    """A finding as the table shows it."""
    known = KNOWN["temporary"][name]
    return Finding("temporary", name, known.example, known.stops)


def folder(root: Path, length: int) -> str:
    path = "/" + "a" * (length - 1)
    (root / path[1:]).mkdir()
    return path


def test_a_usual_folder_is_not_remarked_on(machine: Path) -> None:
    assert looked(machine) == []
    assert looked(machine, TMPDIR="/tmp") == []
    assert looked(machine, TMPDIR="") == []


def test_a_folder_that_is_not_there_is_named_with_the_one_that_is_taken(machine: Path) -> None:
    assert looked(machine, TMPDIR="/scratch/4711") == [example("tmpdir-not-writable")]
    (found,) = looked(machine, TMPDIR="/scratch/4711", access=lambda *_: False)
    assert found.sentence.endswith(
        "which is not there or cannot be written; mount it into the container"
    )


def test_of_a_folder_that_is_not_taken_the_length_is_no_matter(machine: Path) -> None:
    assert names(looked(machine, TMPDIR="/" + "a" * 99)) == [("tmpdir-not-writable", False)]


@pytest.mark.parametrize(("backend", "most"), [("vllm", 70), ("sglang", 95)])
def test_a_folder_too_long_for_the_engines_sockets_stops(
    tmp_path: Path, backend: str, most: int
) -> None:
    hosts.image(tmp_path, backend)
    ray = {"RAY_TMPDIR": "/tmp"}
    assert looked(tmp_path, TMPDIR=folder(tmp_path, most), **ray) == []
    (found,) = looked(tmp_path, TMPDIR=folder(tmp_path, most + 1), **ray)
    assert names([found]) == [("tmpdir-too-long", True)]
    assert f"({most} bytes at most); set TMPDIR=/tmp" in found.sentence


@pytest.mark.parametrize("name", ["tmpdir-too-long", "tmpdir-too-long-for-ray"])
def test_a_folder_that_is_too_long_is_said_as_the_page_has_it(machine: Path, name: str) -> None:
    path = KNOWN["temporary"][name].example.removeprefix("TMPDIR is ").split(",")[0]
    (machine / path[1:]).mkdir(parents=True)
    assert looked(machine, TMPDIR=path) == [example(name)]


def test_a_folder_too_long_for_ray_is_a_warning(machine: Path) -> None:
    assert looked(machine, TMPDIR=folder(machine, 35)) == []
    (found,) = looked(machine, TMPDIR=folder(machine, 36))
    assert names([found]) == [("tmpdir-too-long-for-ray", False)]
    assert found.sentence.endswith("set RAY_TMPDIR=/tmp")


def test_an_image_without_an_engine_takes_any_folder(tmp_path: Path) -> None:
    hosts.image(tmp_path, "transformers")
    assert looked(tmp_path, cuda=None, TMPDIR=folder(tmp_path, 120)) == []


def test_too_little_room_for_the_probe_stops_the_proof_on_a_gpu_alone(machine: Path) -> None:
    assert looked(machine, free=GIB) == [example("tmpdir-full")]
    for cuda, proof in ((None, True), ("12.8", False)):
        assert looked(machine, cuda=cuda, proof=proof, free=GIB) == []
        assert names(looked(machine, cuda=cuda, proof=proof, free=63 << 20)) == [
            ("tmpdir-full", True)
        ]


def test_the_room_is_asked_of_the_folder_that_is_taken(machine: Path) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> Any:
        asked.append(path)
        return disk(99 * GIB)(path)

    list(temporary.look(Host(machine, {"TMPDIR": "/scratch/1"}, None), os.access, statvfs))
    assert asked == [machine / "tmp"]


def test_the_cache_takes_temporary_files_where_nothing_else_can(machine: Path) -> None:
    (machine / "cache").mkdir()
    (machine / "tmp").rmdir()
    environ = {"TMPDIR": "/scratch/1", "XDG_CACHE_HOME": "/cache"}
    assert temporary.work_folder(environ, machine) == Path("/cache")
    assert temporary.work_folder({"XDG_CACHE_HOME": "/nowhere"}, machine) is None

"""A wheel that no index has is compiled in the image that it is for, once."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from images import catalog, host
from images.building import build, fetching, wheel
from images.building.buildah import Buildah
from images.building.builder import Built
from images.catalog import ROOT, Image
from images.locking import lock, resolution
from images.locking.lock import Locked
from rollout.problem import Problem

from ..conftest import sha256

IMAGES = catalog.load()
CUDA_13 = ["verl-rollout:trtllm-1.2", "verl-rollout:vllm-0.24", "verl-rollout:vllm-0.33"]
TWO = ("use_remove_padding=False", "attn_implementation=sdpa")


def image_of(reference: str) -> Image:
    return catalog.find(reference, IMAGES)


@pytest.fixture
def script() -> ModuleType:
    """images/recipes/flash-attn as a module."""
    loader = importlib.machinery.SourceFileLoader("flash_attn_stage", str(wheel.SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


# Where it can be compiled -------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_it_is_compiled_where_nvcc_is_of_torch_s_cuda_and_refused_in_one_sentence_elsewhere(
    image: Image,
) -> None:
    why = wheel.refusal(image, lock.read(image))
    assert (not why) == (image.reference in CUDA_13)
    if why:
        assert image.reference in why
        assert "\n" not in why
        assert ". " not in why


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ("verl-rollout:vllm-0.12", ("CUDA 12.8", "nvcc of 13.0", *TWO, "docs/adding.md")),
        ("verl-rollout:vllm-0.11", ("CUDA 12.8", "nvcc of 13.0", *TWO, "docs/adding.md")),
        ("verl-rollout:vllm-0.8", ("CUDA 12.4", "no nvcc", "docs/adding.md")),
        ("roll-rollout:vllm-0.10.2", ("CUDA 12.8", "no nvcc", "docs/adding.md")),
        ("open-instruct-rollout:vllm-0.14.1", ("nvcc of 13.0", ">=2.8.3", "docs/adding.md")),
        ("verl-rollout:sglang-0.5.12", ("flash-attn-4 4.0.0b15", "flash_attn", "docs/adding.md")),
        ("verl-rollout:transformers-cpu", ("for the CPU",)),
    ],
)
def test_a_refusal_says_what_does_not_fit_and_what_helps(
    reference: str, named: Sequence[str]
) -> None:
    image = image_of(reference)
    why = wheel.refusal(image, lock.read(image))
    assert [word for word in named if word not in why] == []
    with pytest.raises(Problem) as caught:
        wheel.main([wheel.NAME, reference])
    assert (caught.value.code, caught.value.sentence) == (3, why)


def test_every_torch_of_cuda_12_has_a_public_wheel_on_the_page_with_its_sha256_and_source() -> None:
    page = (ROOT / "docs/adding.md").read_text("utf-8")
    rows = [line.split("|") for line in page.splitlines() if "`flash_attn-" in line]
    assert all(len(row[3].strip()) == 64 + 2 and row[4].strip() for row in rows)
    for image in IMAGES:
        versions = lock.versions(lock.read(image))
        if str(lock.cuda(versions)).startswith("12."):
            series = ".".join(versions["torch"].split(".")[:2])
            assert [row for row in rows if row[1].strip() == series], image.reference


# What decides it ----------------------------------------------------------------------------------


def changed(locked: Sequence[Locked], name: str) -> list[Locked]:
    return [
        Locked(e.name, e.version, sha256("other"), e.above) if e.name == name else e for e in locked
    ]


@pytest.mark.parametrize("name", ["torch", "nvidia-cuda-nvcc", "nvidia-cublas", "ninja"])
def test_another_compiler_or_another_torch_makes_another_wheel(name: str) -> None:
    locked = lock.read(image_of("vllm-0.33"))
    assert name in lock.versions(locked)
    assert wheel.kept(wheel.inputs(changed(locked, name))) != wheel.kept(wheel.inputs(locked))


def test_what_is_not_compiled_in_leaves_it_as_it_is() -> None:
    locked = lock.read(image_of("vllm-0.33"))
    assert wheel.kept(wheel.inputs(changed(locked, "vllm"))) == wheel.kept(wheel.inputs(locked))


def test_another_script_or_another_source_makes_another_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = lock.read(image_of("vllm-0.33"))
    before = wheel.kept(wheel.inputs(locked))
    text = resolution.FLASH_LOCK.read_text()
    (tmp_path / "lock").write_text(text.replace(wheel.wanted()[0].sha256, sha256("other")))
    monkeypatch.setattr(resolution, "FLASH_LOCK", tmp_path / "lock")
    source = wheel.kept(wheel.inputs(locked))
    monkeypatch.undo()
    (tmp_path / "script").write_text(wheel.SCRIPT.read_text() + "#\n")
    monkeypatch.setattr(wheel, "SCRIPT", tmp_path / "script")
    assert len({before, source, wheel.kept(wheel.inputs(locked))}) == 3


def test_the_committed_lock_is_of_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    question = resolution.project_question(project, resolution.FLASH)
    text = resolution.FLASH_LOCK.read_text()
    found = lock.versions(wheel.wanted())
    assert {f"{name}=={version}" for name, version in found.items()} == {*question.requirements}
    assert question.sources == (wheel.NAME,)
    assert f"resolved as of {question.resolved_as_of}" in text
    assert all(entry.sha256 for entry in wheel.wanted())


# The stage ----------------------------------------------------------------------------------------

WHEEL = "flash_attn-1-cp311-cp311-linux_x86_64.whl"


@dataclass
class Store(Buildah):
    """A builder whose containers compile at once."""

    writes: str = WHEEL
    ran: list[Any] = field(default_factory=list)

    def inspect(self, name: str) -> Built | None:  # noqa: ARG002
        return Built(sha256("image"), {}, ("sha256:a",))

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        yield f"container of {image}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A host whose cache is empty, with a builder that compiles at once."""
    tool = Store()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:secret@index.example/simple")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(build, "current", lambda *_: tool.inspect(""))

    def fetch(*given: Any) -> list[Path]:
        folder, look = given[5], given[6]
        folder.mkdir()
        (folder / "flash_attn-1.tar.gz").write_bytes(b"source")
        (tmp_path / "target/wheel").mkdir(parents=True, exist_ok=True)
        look(tmp_path / "target")
        return []

    def run(argv: Sequence[str], env: dict[str, str]) -> None:
        volumes = dict(v.split(":/mnt", 1) for v in argv if ":/mnt/rollout/" in v)
        given = next(Path(s) for s, t in volumes.items() if t == "/rollout/in:ro")
        tool.ran.append((list(argv), dict(env), sorted(p.name for p in given.iterdir())))
        out = next(Path(s) for s, t in volumes.items() if t == "/rollout/out")
        if tool.writes:
            (out / tool.writes).write_bytes(b"compiled")

    monkeypatch.setattr(fetching, "fetch", fetch)
    monkeypatch.setattr(wheel.streaming, "run", run)
    monkeypatch.setattr(wheel.builders, "detect", lambda _: tool)
    return tool


def test_it_is_compiled_once_apart_from_the_network_and_the_host_s_settings(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [wheel.NAME, "vllm-0.33", "--output", str(tmp_path / "given"), "--jobs", "3"]
    assert wheel.main(ask) == 0
    ((argv, env, given),) = store.ran
    assert {"--net", "--mount", "--pid"} <= {*argv[: argv.index("--")]}
    assert "/mnt/rollout/in/flash-attn" in argv
    assert argv[-2:] == ["--jobs", "3"]
    assert given == ["flash-attn", "source", "tools"]
    assert "secret" not in " ".join([*argv, *env, *env.values()])
    assert (tmp_path / "given" / WHEEL).read_bytes() == b"compiled"
    said = capsys.readouterr().out
    assert host.sha256(tmp_path / "given" / WHEEL) in said
    assert "FROM verl-rollout:vllm-0.33\nUSER 0:0\nRUN --mount=type=bind" in said
    assert wheel.main(ask) == 0
    assert len(store.ran) == 1, "it is kept"
    record = json.loads(next((tmp_path / "cache").rglob("wheel.json")).read_text())
    assert record["inputs"] == wheel.inputs(lock.read(image_of("vllm-0.33")))
    assert record["sha256"] == host.sha256(tmp_path / "given" / WHEEL)


def test_ci_takes_what_is_kept_and_compiles_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    ask = [wheel.NAME, "vllm-0.33", "--output", str(tmp_path / "given")]
    with pytest.raises(Problem, match="not compiled in CI") as caught:
        wheel.main(ask)
    assert caught.value.code == 3
    monkeypatch.delenv("CI")
    assert wheel.main(ask) == 0
    monkeypatch.setenv("CI", "true")
    assert wheel.main(ask) == 0
    assert len(store.ran) == 1


def test_a_stage_that_leaves_nothing_keeps_nothing(store: Store, tmp_path: Path) -> None:
    store.writes = ""
    for _ in range(2):
        with pytest.raises(Problem, match="left no wheel"):
            wheel.main([wheel.NAME, "vllm-0.33", "--output", str(tmp_path / "given")])
    assert len(store.ran) == 2
    assert not list((tmp_path / "cache").rglob("*.whl"))


# The script of the stage --------------------------------------------------------------------------


def test_the_compilers_see_nothing_of_the_host_and_look_for_no_ready_wheel(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "PIP_INDEX_URL", "MAX_JOBS", "NVCC_PREPEND_FLAGS", "PYTHONPATH"):
        monkeypatch.setenv(name, "of the host")
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    monkeypatch.setattr(script, "local", lambda: "cu130torch2.14.0")
    found = script.variables(7)
    assert "of the host" not in found.values()
    assert found["CUDA_HOME"] == "/cuda"
    assert found["MAX_JOBS"] == "7"
    assert found["FLASH_ATTENTION_FORCE_BUILD"] == "TRUE"
    assert found["FLASH_ATTN_CUDA_ARCHS"] == "80;90"
    # Measured: without it two compilations of one file differ, by the name of a temporary file.
    assert found["NVCC_APPEND_FLAGS"] == "--objdir-as-tempdir"


@pytest.mark.parametrize("asked", ["17", "20"])
def test_its_c_plus_plus_is_what_the_headers_of_the_installed_torch_ask_for(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    header = tmp_path / "torch/include/ATen/ATen.h"
    header.parent.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    # What the script imports goes again with the test: others ask whether there is a torch.
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    del sys.modules["torch"]
    header.write_text(f"#error C++{asked} or later compatible compiler is required to use ATen.\n")
    assert script.standard() == f"c++{asked}"
    header.write_text("#pragma once\n")
    with pytest.raises(SystemExit, match=r"names no C\+\+ standard"):
        script.standard()


def test_the_source_is_laid_out_in_one_place_with_that_standard(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "flash_attn-2"
    top.mkdir()
    (top / "setup.py").write_text('flags = ["-O3", "-std=c++17"]\nmore = ["-std=c++17"]\n')
    kernels = top / "csrc/flash_attn/src"
    kernels.mkdir(parents=True)
    for name in ("one", "two"):
        (kernels / f"{name}.cu").write_text("template<> void run<int>() {}")
    (tmp_path / "in/source").mkdir(parents=True)
    (tmp_path / "in/tools/wheel").mkdir(parents=True)
    with tarfile.open(tmp_path / "in/source/flash_attn-2.tar.gz", "w:gz") as archive:
        archive.add(top, top.name)
    monkeypatch.setattr(script, "PLACE", tmp_path / "place")
    monkeypatch.setattr(script, "standard", lambda: "c++20")
    (tmp_path / "place/tmp").mkdir(parents=True)
    (tmp_path / "place/tmp/of an earlier run").write_text("")
    source = script.unpack(tmp_path / "in")
    assert source == tmp_path / "place/source"
    assert (source / "setup.py").read_text().count("-std=c++20") == 2
    assert list((tmp_path / "place/tmp").iterdir()) == []
    assert (tmp_path / "place/tools/wheel").is_dir()
    # Measured: without a function of its own an object has the number of nvcc's process in it.
    ends = {p.stem: p.read_text().splitlines()[-1] for p in source.rglob("*.cu")}
    assert ends == {"one": "void rollout_module_one() {}", "two": "void rollout_module_two() {}"}


def test_a_source_that_names_no_standard_is_not_compiled(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn-3").mkdir()
    (tmp_path / "flash_attn-3/setup.py").write_text("")
    (tmp_path / "in/source").mkdir(parents=True)
    (tmp_path / "in/tools").mkdir()
    with tarfile.open(tmp_path / "in/source/flash_attn-3.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "flash_attn-3", "flash_attn-3")
    monkeypatch.setattr(script, "PLACE", tmp_path / "place")
    monkeypatch.setattr(script, "standard", lambda: "c++20")
    with pytest.raises(SystemExit, match="another than was read"):
        script.unpack(tmp_path / "in")


def test_there_is_always_one_job_and_never_more_than_cores(script: ModuleType) -> None:
    assert 1 <= script.jobs() <= len(os.sched_getaffinity(0))
    script.GIB = 1 << 30
    assert script.jobs() == 1


def test_the_script_needs_nothing_but_python(tmp_path: Path) -> None:
    """In an image it runs before anything of ours is there."""
    shutil.copy(wheel.SCRIPT, tmp_path / "stage")
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-S", str(tmp_path / "stage"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

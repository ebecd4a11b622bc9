"""What `rollout verify` compiles: each way once, as the library does it that needs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.compilers import compilers, ways

HOME = {"CUDA_HOME": "/opt/rollout/cuda"}


def names(environ: dict[str, str], site: Path) -> list[str]:
    return [way.who for way in ways(environ, site)]


def sglang(site: Path) -> Path:
    """The source that SGLang from 0.5.10 on compiles at its first start."""
    source = site / "sglang/jit_kernel/csrc/elementwise/activation.cuh"
    source.parent.mkdir(parents=True)
    source.touch()
    return source


def test_an_image_without_nvcc_compiles_for_triton_and_inductor_alone(tmp_path: Path) -> None:
    sglang(tmp_path)
    assert names({}, tmp_path) == ["Triton", "inductor"]


def test_sglangs_own_source_is_compiled_where_it_is(tmp_path: Path) -> None:
    assert names(HOME, tmp_path) == ["Triton", "inductor", "FlashInfer"]
    source = sglang(tmp_path)
    *others, way = ways(HOME, tmp_path)
    assert [other.who for other in others] == ["Triton", "inductor", "FlashInfer"]
    assert way.who == "SGLang"
    assert f'#include "{source}"' in way.source
    assert "-std=c++20" in way.argv, "the standard that g++ 12 fails at"
    assert f"-I{tmp_path}/sglang/jit_kernel/include" in way.argv


def test_a_compiler_that_refuses_a_source_is_told_by_its_first_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cc", "g++"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho warning: x >&2; echo 'a.c:1: error: no' >&2; exit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = compilers({"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert [problem.where for problem in found.problems] == ["stub.c", "loop.cpp"]
    assert all("a.c:1: error: no" in problem.what for problem in found.problems)

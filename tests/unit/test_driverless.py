"""What is linked to the driver's library loads where there is no driver, to be looked at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rollout import driverless

CC = pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A library that asks for the driver's, as compiled parts of engines do."""
    name = tmp_path / driverless.NAME
    (tmp_path / "driver.c").write_text("int cuInit_v2(void) { return 0; }\n")
    (tmp_path / "part.c").write_text("int cuInit_v2(); int start(void) { return cuInit_v2(); }\n")
    for argv in (
        ["cc", "-shared", "driver.c", f"-Wl,-soname,{driverless.NAME}", "-o", str(name)],
        ["cc", "-shared", "-fPIC", "part.c", "-Wl,-z,now", str(name), "-o", "part.so"],
    ):
        subprocess.run(argv, check=True, cwd=tmp_path)
    name.unlink()
    return tmp_path / "part.so"


def loads(library: Path, environ: dict[str, str]) -> bool:
    """It loads, all of its symbols bound at once, and is told that there is no device."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).start() != 100)"
    argv = [sys.executable, "-c", code, str(library)]
    return subprocess.run(argv, env=environ, capture_output=True, check=False).returncode == 0


@CC
def test_what_asks_for_the_driver_loads_and_the_stand_in_is_gone_afterwards(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driverless, "missing", lambda: True)
    header = linked.with_name("site") / driverless.HEADER
    header.parent.mkdir(parents=True)
    header.write_text("#define cuInit cuInit_v2\nCUresult CUDAAPI cuInit(unsigned int Flags);\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(linked.with_name("site")))
    monkeypatch.setenv(driverless.PATH, "/elsewhere")
    assert not loads(linked, dict(os.environ)), "this machine has a driver"
    with driverless.environment() as environ:
        folder, rest = environ[driverless.PATH].split(":")
        assert rest == "/elsewhere"
        assert loads(linked, environ)
    assert not Path(folder).exists()
    assert os.environ[driverless.PATH] == "/elsewhere"


def test_a_driver_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driverless, "missing", lambda: False)
    with driverless.environment() as environ:
        assert environ == dict(os.environ)


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driverless, "missing", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    with driverless.environment() as environ:
        assert environ == dict(os.environ)

"""Unit tests that need torch run where torch is: inside the image, with the host's pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from images.building import builder
from images.catalog import ROOT

from .conftest import Container

pytestmark = pytest.mark.image
FILES = (
    *("test_probe.py", "test_transport.py", "test_faults.py", "test_smoke.py"),
    *("test_checks.py", "test_cuda_ipc.py", "test_vllm_extension.py", "test_placement.py"),
    *("test_long.py", "test_long_engine.py", "test_pressure_engine.py"),
    *("test_moe.py", "test_fp8_kv.py", "test_fp8_kv_engine.py"),
)


def test_the_unit_tests_that_need_torch_pass_in_the_image(
    container: Callable[[], Container],
) -> None:
    tools = Path(pytest.__file__).resolve().parent.parent
    here = container()
    command = builder.Command(
        "",
        [
            *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=auto"),
            *(f"/checkout/tests/unit/{name}" for name in FILES),
        ],
        volumes={str(ROOT): "/checkout:ro", str(tools): "/tools:ro"},
        env={"PYTHONPATH": "/tools", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    done = here.execute(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout

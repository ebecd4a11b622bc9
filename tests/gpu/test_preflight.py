"""What the look at a real GPU finds. Skipped with its reason where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rollout.preflight import gpu, library
from rollout.preflight.finding import Host

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu() -> None:
    """Skip where there is no GPU, and say so."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("no NVIDIA GPU on this machine (/dev/nvidia0 is not there)")


def test_a_gpu_host_on_which_images_were_proved_is_not_remarked_on() -> None:
    environ = {k: v for k, v in os.environ.items() if k in ("CUDA_VISIBLE_DEVICES",)}
    assert list(gpu.look(Host(Path("/"), environ, "12.8"))) == []


def test_the_driver_tells_of_every_gpu_in_under_a_second() -> None:
    answer = library.ask(library.nvml, limit=1)
    assert answer.code == library.SUCCESS
    assert answer.gpus
    assert all(one.name and one.uuid.startswith("GPU-") and one.total for one in answer.gpus)

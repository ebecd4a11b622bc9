"""What only a GPU can show. Collected everywhere, skipped with its reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from images import catalog, host
from images.building.buildah import Buildah
from images.catalog import Image
from rollout.problem import Problem

from ..launched import proof

pytestmark = pytest.mark.gpu
GPU_IMAGES = [image for image in catalog.load() if "cuda" in image.expect]


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skip where there is no GPU, and say so."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("no NVIDIA GPU on this machine (/dev/nvidia0 is not there)")


@pytest.mark.parametrize("image", GPU_IMAGES, ids=lambda image: image.tag)
def test_a_cuda_image_of_the_catalog_is_proved_on_this_gpu(image: Image, tmp_path: Path) -> None:
    tool = Buildah()
    try:
        host.require("buildah", "zstd")
        code = proof(image, tool, tmp_path)
    except Problem as problem:
        if problem.code != 3:  # else no room for it, or a user who may not mount
            raise
        pytest.skip(problem.sentence)
    assert code == 0

"""What only a GPU can show. Collected everywhere, skipped with its reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from images import builder, catalog, prove

pytestmark = pytest.mark.gpu
GPU_IMAGES = [image for image in catalog.load() if "cuda" in image.expect]


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skip where there is no GPU, and say so."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("no NVIDIA GPU on this machine (/dev/nvidia0 is not there)")


def test_every_cuda_image_of_the_catalog_is_proved_on_this_gpu() -> None:
    if not GPU_IMAGES:
        pytest.skip("the catalog has no CUDA image yet: there is nothing to show on this GPU")
    for image in GPU_IMAGES:
        assert prove.prove(image, builder.detect(), [], keep=False) == 0, image.reference

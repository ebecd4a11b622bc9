"""What the launcher of an export leaves on another machine is a proof here, as on a GPU host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from images import catalog, host
from images.building.buildah import Buildah
from images.proving import proofs

from ..launched import proof

pytestmark = pytest.mark.image


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into; pytest's own are closed to all others."""
    with TemporaryDirectory(prefix="rollout-launched-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.usefixtures("built")
def test_reports_of_the_launcher_prove_the_image(
    image: catalog.Image,
    tool: Buildah,
    open_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host.require("zstd")
    monkeypatch.setattr(proofs, "REPORTS", tmp_path)  # the last report of this checkout stays
    assert proof(image, tool, open_folder) == 0
    assert proofs.report_path(image).exists()

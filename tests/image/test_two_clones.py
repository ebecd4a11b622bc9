"""Two clones that build the default image at once, from nothing, in one storage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from images import catalog, host
from images.building import build, layers
from images.building.buildah import Buildah
from images.host import leftovers
from images.proving import reproduce
from rollout.problem import Problem

pytestmark = pytest.mark.image


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder on the disk, for a storage of the test's own."""
    with TemporaryDirectory(prefix="rollout-clones-", dir=host.scratch()) as name:
        yield Path(name)
        leftovers.discard(Path(name))
        Path(name).mkdir()


@pytest.mark.usefixtures("tool")
def test_both_end_well_with_one_image_of_the_recorded_layers(
    image: catalog.Image, place: Path
) -> None:
    try:
        build.check_disk(place, 2 * build.DISK_NEEDED)
    except Problem as problem:
        pytest.skip(problem.sentence)
    conf = place / "storage.conf"
    conf.write_text(reproduce.storage_conf(place), encoding="utf-8")
    env = {"CONTAINERS_STORAGE_CONF": str(conf)}
    clones = []
    for name in ("one", "two"):
        reproduce.copy_checkout(place / name)
        clones.append(
            subprocess.Popen(
                [sys.executable, "-m", "images.building.build", image.reference, "--no-cache"],
                cwd=place / name,
                env={**os.environ, **env, "PYTHONPATH": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        )
    said = [clone.communicate()[0] for clone in clones]
    assert [clone.returncode for clone in clones] == [0, 0], [text[-3000:] for text in said]
    ids = {found[1] for text in said if (found := re.search(r" is ([0-9a-f]{64})$", text, re.M))}
    assert len(ids) == 1, said
    tool = Buildah()
    with reproduce.variables(env):
        built = tool.inspect(tool.local + image.reference)
        left = host.run(["buildah", "containers", "--quiet"], quiet=True).stdout
    assert built is not None and built.id in ids
    assert left == "", "no container of either is left"
    verdict = layers.compare(layers.read(image), build.inputs(image), built, tool.version())
    assert not verdict.differs, verdict.sentence

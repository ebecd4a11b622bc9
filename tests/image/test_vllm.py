"""verl-rollout:vllm-0.12, as far as it shows without a GPU: whole, and ready to compile kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from images import catalog, host
from images.building import build, builder, layers
from images.building.buildah import Buildah
from images.locking import lock
from images.proving import proofs
from images.telling import tables
from rollout import preflight, verify
from rollout.problem import Problem

from .conftest import Container, Sealed

pytestmark = pytest.mark.image
NEEDED = 30 << 30  # bytes: the wheels, their copy in the builder's cache, and the layers of them


# These stand for the fixtures of the default image, and what is made of those.


@pytest.fixture(scope="session")
def image() -> catalog.Image:
    """The image of verl's vLLM."""
    return catalog.find("verl-rollout:vllm-0.12", catalog.load())


@pytest.fixture(scope="session")
def built(image: catalog.Image, tool: Buildah) -> builder.Built:
    """It, built where there is room for it."""
    try:
        build.check_disk(tool.storage(), NEEDED)
    except Problem as problem:
        pytest.skip(problem.sentence)
    return build.build(image, tool)


def test_the_layers_are_the_recorded_ones_and_a_proof_of_others_is_not_called_one(
    image: catalog.Image, built: builder.Built
) -> None:
    recorded = layers.read(image)
    assert recorded is not None
    assert recorded.inputs == build.inputs(image), "recorded from other inputs: reproduce it again"
    assert built.diff_ids[:-1] == recorded.diff_ids
    proof = json.loads(proofs.kept(image).read_text(encoding="utf-8"))
    below_ours = tuple(proof["layers"][:-1])
    engine = recorded.diff_ids[:-1]  # the framework's layer comes last
    found = tables.standing(image).lower()
    assert ("stale" in found) == (below_ours[: len(engine)] != engine)
    if below_ours != recorded.diff_ids:
        assert not found.startswith("[proved]")


def test_an_untouched_image_passes_every_check(container: Callable[[], Container]) -> None:
    here = container()
    done = here.run("rollout", "verify", "--report", "/var/cache/rollout/report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((here.root / "var/cache/rollout/report.json").read_text())
    found = {check["name"]: check["status"] for check in report["checks"]}
    assert found == dict.fromkeys(verify.CHECKS, "passed")


def test_info_says_what_the_catalog_expects(image: catalog.Image, sealed: Sealed) -> None:
    facts = json.loads(sealed.run("rollout", "info", "--json").stdout)
    locked = {entry.name: entry.version for entry in lock.read(image)}
    assert f"{image.engine}=={locked[image.engine]}" in image.requirements
    assert facts["reference"] == image.reference
    assert facts["engine"] == {"name": image.backend, "version": locked[image.engine]}
    assert (facts["torch"], facts["cuda"]) == (image.expect["torch"], image.expect["cuda"])
    assert facts["lock_sha256"] == host.sha256(image.lock)


def test_smoke_without_a_gpu_is_one_sentence_and_exit_code_3(sealed: Sealed) -> None:
    if preflight.driver():
        pytest.skip("there is an NVIDIA driver on this host, which a container sees")
    done = sealed.run("rollout", "smoke")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "rollout: no NVIDIA driver on this host; run it on a GPU host\n"


def test_a_kernel_of_flashinfer_is_compiled_and_loaded_with_no_network(sealed: Sealed) -> None:
    """By the image's own nvcc; of the driver there is the stub that CUDA_HOME has for linking."""
    (sealed.cache / "driver").mkdir()
    stub = f"{sealed.env['CUDA_HOME']}/lib64/stubs/libcuda.so"
    (sealed.cache / "driver/libcuda.so.1").symlink_to(stub)
    sealed.env["LD_LIBRARY_PATH"] += ":/var/cache/rollout/driver"
    sealed.env["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"  # else it asks the GPU
    code = (
        "from flashinfer.jit.norm import gen_norm_module\n"
        "module = gen_norm_module().build_and_load()\n"
        "assert callable(module.rmsnorm)\n"
    )
    # It asks where home is even though it is told a folder, and this user has what rollout says.
    done = sealed.run("rollout", "python3", "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(sealed.cache.glob("flashinfer/**/norm.so")), "it was not compiled here"


def test_a_kernel_is_linked_to_what_wheels_have_under_a_numbered_name_alone(
    sealed: Sealed,
) -> None:
    """FlashInfer's fp8 GEMM asks the linker for -lnvrtc, every kernel for -lcudart."""
    home, file = sealed.env["CUDA_HOME"], "/var/cache/rollout/linked.so"
    sealed.env["TMPDIR"] = "/var/cache/rollout"  # the root is read-only
    asked = ("-Wl,--no-as-needed", f"-L{home}/lib64", "-lnvrtc", "-lcudart")
    done = sealed.run("gcc", "-shared", "-o", file, "-x", "c", "/dev/null", *asked)
    assert done.returncode == 0, done.stderr
    code = f"import ctypes; library = ctypes.CDLL('{file}'); library.nvrtcVersion"
    done = sealed.run("rollout", "python3", "-c", code)
    assert done.returncode == 0, done.stderr

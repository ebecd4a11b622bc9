"""What users of such images reported, each tried again as it was reported: what a host is told.

Each test names threads of the reports. What is no matter of the host (a refit of a model, a
registry) has its tests elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout import preflight
from rollout.preflight import gpu, memory
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import ENVIRON, FIRST, FULL, SECOND, Nvml, install, libcuda

from .launcher import Run, passed, words

GIB = 1 << 30
ANOTHER = ("H200", SECOND, 141 << 30, 140 << 30)
Said = Callable[..., dict[str, str]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound host with the image of vLLM on it, whose limits are none."""
    root = hosts.tree(tmp_path / "host")
    install(root, "580.65.06")
    libcuda(root, "/usr/lib64", "580.65.06")
    hosts.image(root, "vllm", "return int(physical_device_id)")
    hosts.interfaces(root, "lo", "eth0")
    (root / "tmp").mkdir()
    usage = SimpleNamespace(free=10 * GIB, total=10 * GIB)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(memory.look, "__defaults__", (lambda _: (-1, -1),))
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL, ANOTHER))
    return root


@pytest.fixture
def said(machine: Path) -> Said:
    """Every sentence about the machine, by the finding's name."""

    def of(cuda: str | None = "12.8", *, proof: bool = True, **environ: str) -> dict[str, str]:
        host = Host(machine, {**ENVIRON, **environ}, cuda, proof)
        # What is free on the disk of this test is no matter of the case.
        found = [f for f in preflight.look(host) if f.name not in ("tmpdir-full", "cache-full")]
        found = [f for f in found if f.name != "cache-nearly-full"]
        return {finding.name: finding.sentence for finding in found}

    return of


def test_a_sound_host_is_told_nothing(said: Said) -> None:
    for proof in (True, False):
        assert said(proof=proof) == {}


def test_case_2_the_driver_is_too_old_for_what_the_image_compiles(
    machine: Path, said: Said
) -> None:
    """vllm 37140, xorbitsai/inference 4507: what nvcc 13 makes asks for a driver of CUDA 13."""
    (
        machine / "opt/rollout/lib/python3.11/site-packages/nvidia_cuda_nvcc-13.0.88.dist-info"
    ).mkdir()
    assert said() == {}
    for driver in ("535.154.05", "550.54.15", "560.35.05", "570.86.15"):
        (machine / "usr/lib64/libcuda.so.1").unlink()
        libcuda(machine, "/usr/lib64", driver)
        install(machine, driver)
        found = said()
        assert list(found) == ["gpu-driver-too-old-for-nvcc"]
        assert "update it to 580.65.06 or newer" in found["gpu-driver-too-old-for-nvcc"]


def test_case_3_who_follows_our_advice_on_the_library_path_keeps_what_the_image_needs(
    machine: Path, said: Said
) -> None:
    """sglang 36533: the plugin's folder in LD_LIBRARY_PATH put the image's own out of it."""
    (machine / "usr/lib64/libcuda.so.1").unlink()
    libcuda(machine, "/usr/local/nvidia/lib64", "580.65.06")
    advice = said()["gpu-driver-library-elsewhere"]
    value = re.search(r"set LD_LIBRARY_PATH=(\S+)$", advice)
    assert value
    assert said(LD_LIBRARY_PATH=value[1]) == {}
    (name,) = said(LD_LIBRARY_PATH="/usr/local/nvidia/lib64")
    assert name == "library-path-replaced"


def test_case_4_a_path_that_hides_a_locked_module_is_said_before_every_command(
    machine: Path, said: Said
) -> None:
    """Hyperloom 968: another torch than the one that was proved."""
    folder = machine / "site/torch"
    hosts.write(folder / "__init__.py", "")
    hosts.write(machine / "opt/rollout/lib/python3.11/site-packages/torch/__init__.py", "")
    for proof in (True, False):
        found = said(proof=proof, PYTHONPATH=str(folder.parent))
        assert f"{folder.parent} holds torch" in found["python-path-hides"]


def test_case_7_memory_is_what_every_group_leaves_and_read_files_are_no_used_memory(
    machine: Path, said: Said
) -> None:
    """vllm 57469, ray 42894: a limit of cgroup v1 was not seen, and the page cache counted."""
    v1 = machine / "sys/fs/cgroup/memory"
    hosts.write(v1 / "memory.limit_in_bytes", f"{GIB}\n")
    hosts.write(v1 / "memory.usage_in_bytes", "0\n")
    for cuda, needed in ((None, 3), ("12.8", 8)):
        assert f"1.0 GiB of memory free, {needed} needed" in said(cuda)["memory-limited"]
    hosts.write(v1 / "memory.limit_in_bytes", f"{0x7FFFFFFFFFFFF000}\n")
    group = machine / "sys/fs/cgroup"
    hosts.write(group / "memory.max", f"{4 * GIB}\n")
    hosts.write(group / "memory.current", f"{19 * GIB // 10}\n")
    assert "memory-limited" in said(None)
    hosts.write(group / "memory.stat", f"anon 1\ninactive_file {18 * GIB // 10}\nactive_file 0\n")
    assert said(None) == {}
    # Above this one the kernel lets nobody go on.
    hosts.write(group / "memory.high", f"{2 * GIB}\n")
    assert "allows 2.0 GiB" in said(None)["memory-limited"]


def test_case_9_a_job_on_many_nodes_reaches_the_image_and_what_does_not_pass_is_named(
    run: Run,
) -> None:
    """aws-do-eks 50 and 69, aicr 2169, pyxis 26."""
    job = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO", "NCCL_CUMEM_ENABLE": "1"}
    done = run("--gpus", "none", "--print", "serve", HF_HOME="/shared/hf", **job)
    assert job.items() <= passed(done).items()
    assert passed(done)["HF_HOME"] == "/var/cache/rollout/hf"
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["HF_HOME"]


def test_case_11_a_gpu_that_is_named_by_its_uuid_is_told_its_number(said: Said) -> None:
    """vllm 41848 and 20939."""
    found = said(proof=False, CUDA_VISIBLE_DEVICES=SECOND)["gpu-named-by-uuid"]
    assert found.endswith("set CUDA_VISIBLE_DEVICES=1")
    assert said(CUDA_VISIBLE_DEVICES="1") == {}
    # And no sentence recommends a UUID.
    unknown = said(CUDA_VISIBLE_DEVICES=FIRST[:-1] + "0")["gpu-uuid-unknown"]
    assert "nvidia-smi -L" not in unknown


def test_case_12_nodes_of_a_job_do_not_compile_into_one_folder(
    machine: Path, said: Said, run: Run, tmp_path: Path
) -> None:
    """sglang 31347, prime-rl 2305: files of one node vanish under another (ESTALE)."""
    (tmp_path / "local").mkdir()
    done = run("--print", SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="2", TMPDIR=f"{tmp_path}/local")
    assert f"rw\t/var/cache/rollout\t{tmp_path}/local/" in done.stdout
    line = "36 21 8:1 / /cache rw shared:1 - nfs4 filer:/home rw\n"
    hosts.write(machine / "proc/self/mountinfo", line)
    assert "lies on NFS (filer:/home)" in said(proof=False)["cache-on-nfs"]


def test_case_14_gpus_that_went_away_or_never_came_up_are_told_apart(
    machine: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-container-toolkit 1227, huggingface_hub 4134, pytorch 49081: nvidia-smi is healthy."""
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL, init=999))
    assert "start the container anew" in said(proof=False)["gpu-driver-silent"]
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(FULL, says={"Fabric": (1, 0)}))
    assert "nvidia-fabricmanager" in said(proof=False)["gpu-fabric-not-ready"]
    (machine / "dev/nvidia-uvm").unlink()
    assert "nvidia-modprobe -u -c 0" in said(proof=False)["gpu-uvm-missing"]


def test_case_15_a_folder_of_vocabularies_passes_and_is_looked_at(
    machine: Path, said: Said, run: Run
) -> None:
    """openai/harmony 101, sglang 18074: gpt-oss fetches its vocabulary."""
    folder = {"TIKTOKEN_ENCODINGS_BASE": "/var/cache/rollout/encodings"}
    assert passed(run("--print", **folder))["TIKTOKEN_ENCODINGS_BASE"] == (
        "/var/cache/rollout/encodings"
    )
    assert "o200k_base.tiktoken" in said(proof=False, **folder)["vocabulary-missing"]
    hosts.write(machine / "var/cache/rollout/encodings/o200k_base.tiktoken", "")
    assert said(proof=False, **folder) == {}


def test_case_17_a_trainer_outside_can_hand_over_cuda_memory(run: Run) -> None:
    """vllm 55906, UCX 10968: a handle is opened by who sees the sender's processes and /dev/shm."""
    alone, shared = run("--print"), run("--print", "--share")
    assert "--pid" in words(alone) or "--unshare-pid" in words(alone)
    assert "--pid" not in words(shared) and "--unshare-pid" not in words(shared)
    assert "tmpfs\t/dev/shm" in alone.stdout
    assert "tmpfs\t/dev/shm" not in shared.stdout


def test_case_x2_a_card_of_24_gb_is_not_blamed_on_another_process(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    l4 = ("L4", FIRST, (24 << 30) - (1200 << 20), (24 << 30) - (1700 << 20))
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(l4))
    assert "too small for the proof" in said()["gpu-too-small"]
    assert said(proof=False) == {}

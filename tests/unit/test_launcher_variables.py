"""Which variables of a job the launcher of an export passes, and what it says of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from images.building import labels

from .launcher import IMAGE, Run, passed, words

JOB = {
    "GLOO_SOCKET_IFNAME": "ib0",
    "TP_SOCKET_IFNAME": "ib0",
    "NCCL_IB_HCA": "mlx5_0:1",
    "UCX_NET_DEVICES": "mlx5_0:1",
    "NVSHMEM_IB_GID_INDEX": "3",
    "FI_PROVIDER": "efa",
    "RDMAV_FORK_SAFE": "1",
    "PMI_RANK": "3",
    "PMI2_X": "1",
    "PMIX_RANK": "3",
    "OMPI_COMM_WORLD_RANK": "3",
    "I_MPI_FABRICS": "ofi",
    "SLURM_SUBMIT_DIR": "/home/me/job",  # nowhere in the image, and only tells of the job
    "SLURMD_NODENAME": "n1",
    "MASTER_ADDR": "n1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "a",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",
    "CUDA_VISIBLE_DEVICES": "3",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "VLLM_USE_V2": "1\n2",
    "SGLANG_X": "1",
    "SGL_X": "1",
    "FLASHINFER_DISABLE_VERSION_CHECK": "1",
    "HF_TOKEN": "a b$c",
    "TRANSFORMERS_OFFLINE": "1",
    "TIKTOKEN_ENCODINGS_BASE": "/tmp/vocabulary",
    "WANDB_MODE": "offline",
    "VERL_LOGGING_LEVEL": "INFO",
    "RAY_DEDUP_LOGS": "0",
    "USER": "me",
    "https_proxy": "http://proxy:3128",
    "OMP_NUM_THREADS": "4",
}


def test_what_a_job_on_many_nodes_sets_passes_without_a_word(run: Run) -> None:
    done = run("--print", "--cache", "/var/tmp", **JOB)
    found = passed(done)
    assert {name: found.get(name) for name in JOB} == JOB
    assert done.stderr == ""


def test_the_job_is_right_about_settings_and_the_image_about_where_its_files_lie(run: Run) -> None:
    given = {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": "/of/the/host"}
    done = run("--print", **given)
    found = passed(done)
    assert (found["NCCL_DEBUG"], found["TOKENIZERS_PARALLELISM"]) == ("INFO", "false")
    assert found["HF_HOME"] == "/var/cache/rollout/hf"
    assert done.stderr == (
        "run: HF_HOME of this job does not pass: the image has its files under "
        "/var/cache/rollout/hf\n"
    )
    assert passed(run("--print"))["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SSL_CERT_FILE", "/etc/pki/ca.pem", "there is no /etc/pki/ca.pem in the image; --bind it"),
        ("HF_HUB_CACHE", "/shared/hub:/x", "there is no /shared/hub in the image; --bind it"),
        ("ROLLOUT_LAYERS", "sha256:b", "it says what this image is"),
        ("LD_LIBRARY_PATH", "/opt/lib", "it is about this host's installation"),
        ("PYTHONPATH", "/home/me/site", "it is about this host's installation"),
        ("CUDA_HOME", "/usr/local/cuda", "it is about this host's installation"),
    ],
)
def test_a_variable_that_does_not_pass_is_named_with_its_reason(
    run: Run, name: str, value: str, why: str
) -> None:
    done = run("--print", **{name: value})
    assert passed(done).get(name) != value
    assert done.stderr.startswith(f"run: {name} of this job does not pass: {why}")
    assert done.stderr.count("\n") == 1


def test_a_path_passes_where_it_leads_to_something(
    run: Run, unpacked: Path, tmp_path: Path
) -> None:
    given = {
        "SSL_CERT_FILE": "/etc/ca.pem",  # a file of the image
        "HF_HUB_CACHE": "/shared/hub",  # below a --bind
        "NCCL_TOPO_FILE": "/sys/topo.xml",  # the host's
        "VLLM_RPC_BASE_PATH": "/tmp/rpc",
        "WANDB_DIR": "/var/cache/rollout/wandb",
    }
    (unpacked / "rootfs/etc/ca.pem").touch()
    done = run("--print", "--bind", f"{tmp_path}:/shared", **given)
    assert given.items() <= passed(done).items()
    assert done.stderr == ""


def test_what_env_says_stands_above_all_and_needs_no_word(run: Run) -> None:
    done = run("--print", "--env", "HF_HOME=/mine", HF_HOME="/of/the/host")
    assert passed(done)["HF_HOME"] == "/mine"
    assert done.stderr == ""


def test_variables_of_nobody_s_family_stay_out_and_a_line_in_a_value_is_no_variable(
    run: Run,
) -> None:
    given = {"OTHER": "x\nGLOO_SOCKET_IFNAME=1", "AWS_SECRET_ACCESS_KEY": "a", "HF_HOME": ""}
    done = run("--print", **given)
    assert set(passed(done)) <= {*(line.split("=")[0] for line in IMAGE.splitlines()), "TERM"}
    assert done.stderr == "", "a variable that is set to nothing says nothing"


@pytest.mark.parametrize("gpus", ["all", "none"])
def test_what_asks_a_container_engine_for_the_gpu_is_not_what_the_launcher_does(
    run: Run, unpacked: Path, gpus: str
) -> None:
    """The job's own list of GPUs stands, and nobody is told "all" where there is none."""
    with (unpacked / "environment").open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in labels.GPU.items())
    found = words(run("--print", "--gpus", gpus))
    assert not [word for word in found if word.startswith("NVIDIA_")]
    done = run("--print", "--gpus", gpus, NVIDIA_VISIBLE_DEVICES="2,3", CUDA_VISIBLE_DEVICES="1")
    said = "run: CUDA_VISIBLE_DEVICES of this job does not pass: --gpus none\n"
    assert done.stderr == (said if gpus == "none" else "")
    found = words(done)
    assert [word for word in found if word.startswith("NVIDIA_")] == ["NVIDIA_VISIBLE_DEVICES=2,3"]

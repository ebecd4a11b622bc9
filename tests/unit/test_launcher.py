"""How the launcher of an export takes its arguments, and what it mounts; no image is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from images.building import export

from .launcher import Run, plan, words


def test_the_launcher_is_plain_shell() -> None:
    subprocess.run(["sh", "-n", str(export.LAUNCHER)], check=True)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gpu", "all"], "unknown option --gpu"),
        (["--gpus", "1"], "all or none"),
        (["--cache"], "--cache needs a value"),
        (["--uid", "me"], "--uid me is not a number"),
        (["--env", "NAME"], "no value"),
        (["--env", "A-B=1"], "no name"),
        (["--env", "=1"], "no name"),
        (["--env", "1A=1"], "no name"),
        (["--cache", ""], "--cache needs a value"),
        (["--bind", ""], "--bind needs a value"),
        (["--cache", "/"], "the image would write there"),
        (["--cache", "/usr/.."], "the image would write there"),
        (["--bind", "/nowhere/at/all"], "there is no /nowhere/at/all"),
        (["--bind", "/usr:relative"], "no place in the image"),
        (["--bind", "/usr:/a/../b"], "no place in the image"),
        (["--bind", "/usr:/"], "no place in the image"),
        (["--bind", "/usr:/lib/x"], "/lib is a link in the image"),
        (["--bind", "/usr:/dev/x"], "is this host's"),
        (["--bind", "/usr:/a\tb"], "no tab"),
    ],
)
def test_wrong_usage_of_the_launcher_is_one_sentence_and_exit_code_2(
    run: Run, argv: list[str], sentence: str
) -> None:
    done = run(*argv)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "pair", ["NCCL_IB_HCA==mlx5_0:1", "OPTS=--x=1", "URL=http://h/?a=b", "EMPTY=", "_A1=b c"]
)
def test_the_value_of_a_variable_may_hold_anything(run: Run, pair: str) -> None:
    assert pair in words(run("--print", "--env", pair))


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_to_the_launcher_finds_the_image_beside_the_launcher(
    unpacked: Path, tmp_path: Path, relative: bool
) -> None:
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "rollout-image"
    target = Path(os.path.relpath(unpacked / "run", link.parent)) if relative else unpacked / "run"
    link.symlink_to(target)
    env = {"PATH": f"{link.parent}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
    argv = ["sh", str(link), "--print"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    if "make no namespaces" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert f"argument\t{unpacked / 'rootfs'}\n" in done.stdout
    assert str(link) not in done.stdout, "the second stage is the launcher itself"


def test_a_launcher_without_its_image_says_so(tmp_path: Path) -> None:
    shutil.copy(export.LAUNCHER, tmp_path / "run")
    done = subprocess.run(
        ["sh", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "no image beside" in done.stderr


def test_arguments_arrive_as_given_and_a_bare_run_is_info(run: Run) -> None:
    assert words(run("--print"))[-2:] == ["rollout", "info"]
    command = ["python3", "-c", "print('a  b')", "", "$HOME", "--gpus"]
    assert words(run("--print", *command))[-len(command) :] == command
    assert words(run("--print", "--", "--help"))[-1] == "--help"


def test_a_place_that_the_image_lacks_is_made_beside_what_it_has(
    run: Run, unpacked: Path, tmp_path: Path
) -> None:
    steps = plan(run("--print", "--bind", f"{tmp_path}:/usr/local/new/x:ro"))
    rootfs = unpacked / "rootfs"
    assert steps[:3] == [
        ["tmpfs", "/usr/local", "mode=0755,size=1m"],
        ["image", "/usr/local/bin", f"{rootfs}/usr/local/bin"],
        ["link", "/usr/local/man", "share/man"],
    ]
    bound = steps.index(["ro", "/usr/local/new/x", str(tmp_path)])
    assert steps[bound + 1] == ["seal", "/usr/local", "read-only"]


def test_a_place_that_is_there_or_writable_needs_no_making(run: Run, tmp_path: Path) -> None:
    binds = [f"{tmp_path}:/etc", f"{tmp_path}:/tmp/x", f"{tmp_path}:/var/cache/rollout/x"]
    steps = plan(run("--print", *(part for bind in binds for part in ("--bind", bind))))
    assert not [step for step in steps if step[0] == "seal"]


# The driver

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (a@b)\n"
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue May 27 01:02:03 UTC 2025\n"
)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """The files of a host with a driver in one folder, and remains of another in a second one."""
    host = tmp_path / "host"
    for folder in ("proc/driver/nvidia", "usr/local/nvidia/lib64", "usr/lib64", "usr/bin"):
        (host / folder).mkdir(parents=True)
    (host / "proc/driver/nvidia/version").write_text(f"{OPEN}GCC version:  gcc version 12.3.0\n")
    for name in ("cuda", "nvidia-ml", "nvidia-nvvm", "nvidia-glcore"):
        (host / f"usr/local/nvidia/lib64/lib{name}.so.580.159.04").touch()
        (host / f"usr/lib64/lib{name}.so.550.54.15").touch()
    (host / "usr/bin/nvidia-smi").touch(mode=0o755)
    return host


@pytest.mark.parametrize("text", [OPEN, CLOSED])
def test_the_libraries_of_the_running_driver_are_found_and_no_others(
    run: Run, driver: Path, text: str
) -> None:
    (driver / "proc/driver/nvidia/version").write_text(text)
    done = run("--print", ROLLOUT_TEST_HOST=str(driver))
    inside, outside = "/usr/local/nvidia", f"{driver}/usr/local/nvidia/lib64"
    steps = [step for step in plan(done) if step[1].startswith(f"{inside}/")]
    assert ["ro", f"{inside}/lib64/libcuda.so.580.159.04", f"{outside}/libcuda.so.580.159.04"] in (
        steps
    )
    assert ["link", f"{inside}/lib64/libcuda.so.1", "libcuda.so.580.159.04"] in steps
    assert ["link", f"{inside}/lib64/libnvidia-nvvm.so.4", "libnvidia-nvvm.so.580.159.04"] in steps
    assert ["ro", f"{inside}/bin/nvidia-smi", f"{driver}/usr/bin/nvidia-smi"] in steps
    assert "550.54" not in done.stdout and "glcore" not in done.stdout
    assert f"LD_LIBRARY_PATH={inside}/lib64" in words(done)
    assert f"PATH=/usr/bin:{inside}/bin" in words(done)


def test_without_gpus_the_driver_stays_out(run: Run, driver: Path) -> None:
    done = run("--print", "--gpus", "none", ROLLOUT_TEST_HOST=str(driver))
    assert "nvidia/" not in done.stdout
    assert "CUDA_VISIBLE_DEVICES=" in words(done)


def test_a_driver_without_its_libraries_cannot_be_run_here(run: Run, driver: Path) -> None:
    (driver / "usr/local/nvidia/lib64/libcuda.so.580.159.04").unlink()
    done = run(ROLLOUT_TEST_HOST=str(driver))
    assert done.returncode == 3
    assert "libcuda.so.580.159.04" in done.stderr and "--gpus none" in done.stderr

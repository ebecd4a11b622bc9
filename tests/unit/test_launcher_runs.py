"""The launcher runs commands for real: the programs of this host are the image."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from .launcher import Run


@pytest.fixture
def real(unpacked: Path) -> Iterator[tuple[Path, Path]]:
    """An unpacked export in which commands of this host run, and a folder for its cache."""
    ways = ["unshare --mount true", "unshare --user --map-root-user --mount --pid --fork true"]
    if not any(subprocess.run(way.split(), capture_output=True).returncode == 0 for way in ways):
        pytest.skip("no namespaces can be made here")
    with TemporaryDirectory(prefix="rollout-launcher-", dir="/var/tmp") as name:
        top = Path(name)
        top.chmod(0o755)
        shutil.copytree(unpacked, top / "image", symlinks=True)
        root = top / "image/rootfs"
        for folder in ("usr", "tmp", "proc", "sys", "dev"):
            (root / folder).mkdir(exist_ok=True)
        shutil.rmtree(root / "usr/local")
        for link in ("bin", "lib64"):
            (root / link).symlink_to(f"usr/{link}")
        (root / "opt/rollout/bin/rollout").write_text('#!/bin/sh\nexec "$@"\n')
        yield top / "image", top / "cache"


def launched(real: tuple[Path, Path], *options: str, script: str) -> subprocess.Popen[str]:
    top, cache = real
    argv = ["sh", str(top / "run"), "--gpus", "none", "--cache", str(cache), *options]
    return subprocess.Popen(
        [*argv, "--bind", "/usr:/usr:ro", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )


def said(process: subprocess.Popen[str], code: int) -> list[str]:
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    return out.splitlines()


def sleeping(seconds: str) -> bool:
    """Whether a process of this machine sleeps for that time."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
        except OSError:
            continue
    return False


def until(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within seconds."""
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize("share", [True, False])
def test_only_a_shared_run_sees_the_processes_and_the_memory_of_this_host(
    real: tuple[Path, Path], share: bool
) -> None:
    script = "readlink /proc/self/ns/pid /proc/self/ns/ipc; stat -c %d:%i /dev/shm; exit 7"
    found = said(launched(real, *["--share"] * share, script=script), 7)
    shm = Path("/dev/shm").stat()
    own = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "ipc")]
    assert (found[0] == own[0]) is share
    assert found[1] == own[1]
    assert (found[2] == f"{shm.st_dev}:{shm.st_ino}") is share


def test_a_shared_run_keeps_this_host_s_memory_out_of_binds(run: Run, tmp_path: Path) -> None:
    done = run("--share", "--bind", f"{tmp_path}:/dev/shm/x")
    assert done.returncode == 2
    assert "--bind: /dev/shm/x is this host's, with --share" in done.stderr


@pytest.mark.parametrize("end", ["by itself", "by SIGTERM"])
def test_a_shared_run_ends_all_that_it_started(real: tuple[Path, Path], end: str) -> None:
    seconds = f"{5000 + os.getpid() % 1000}.{len(end)}"
    script = f"trap 'exit 9' TERM; setsid sleep {seconds} & echo up; "
    last = "exit 7" if end == "by itself" else "while :; do sleep 0.1; done"
    process = launched(real, "--share", script=script + last)
    code = 7
    if end == "by SIGTERM":
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert until(lambda: sleeping(seconds)), "or nothing is shown"
        process.send_signal(signal.SIGTERM)
        code = 9
    said(process, code)
    assert until(lambda: not sleeping(seconds))


def test_the_cache_of_a_job_is_made_for_its_user_alone(
    real: tuple[Path, Path], tmp_path: Path
) -> None:
    top, _ = real
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    argv = ["sh", str(top / "run"), "--gpus", "none", "--bind", "/usr:/usr:ro"]
    for number in ("1", "2"):  # the second finds what the first made
        command = [*argv, "sh", "-c", f"touch kernel-{number}; exit 7"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        said(process, 7)
    cache = tmp_path / f"image-{os.geteuid()}"
    assert sorted(path.name for path in cache.iterdir()) == ["kernel-1", "kernel-2"]
    assert cache.stat().st_uid == os.geteuid()
    assert cache.stat().st_mode & 0o7777 == (0o2770 if os.geteuid() == 0 else 0o700)

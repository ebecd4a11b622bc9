"""Where the launcher of an export keeps what an image writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .launcher import Run, plan


@pytest.mark.parametrize("way", ["made before", "made by the launcher"])
def test_a_cache_that_only_root_can_write_is_said_with_what_to_do(
    run: Run, tmp_path: Path, way: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is somebody else inside")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)  # the folders above do not matter: it is mounted by itself
    cache = closed / "cache"
    if way == "made before":
        cache.mkdir(mode=0o755)
    done = run("--cache", str(cache))
    said = f"run 'chgrp 0 {cache}' and 'chmod g+rwxs {cache}', or say --cache DIR"
    assert (said in done.stderr) is (way == "made before"), done.stderr
    if way == "made before":
        assert done.returncode == 3
        assert "by user 1000 with group 0" in done.stderr
        cache.chmod(0o2775)
        os.chown(cache, 0, 0)
        assert "cannot be written" not in run("--cache", str(cache)).stderr


def test_the_cache_is_named_after_the_folder_and_not_made_by_a_question(
    run: Run, tmp_path: Path
) -> None:
    line = ["rw", "/var/cache/rollout", str(tmp_path / "home/.cache/verl rollout-toy")]
    assert line in plan(run("--print"))
    assert not (tmp_path / "home").exists()
    done = run("--print", HOME="")
    assert done.returncode == 2 and "--cache DIR" in done.stderr


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A job of Slurm, with a folder on a disk of its node."""
    (tmp_path / "local").mkdir()
    return {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path / "local")}


def cache_of(done: subprocess.CompletedProcess[str]) -> str:
    """The folder of this host that is the image's cache."""
    return next(step[2] for step in plan(done) if step[1] == "/var/cache/rollout")


def test_in_a_job_of_slurm_the_cache_is_on_a_disk_of_the_node(
    run: Run, tmp_path: Path, job: dict[str, str]
) -> None:
    name = f"verl rollout-toy-{os.geteuid()}"
    assert cache_of(run("--print", **job)) == str(tmp_path / "local" / name)
    given = {**job, "SLURM_TMPDIR": "/local/7"}
    assert cache_of(run("--print", **given)) == f"/local/7/{name}"
    assert cache_of(run("--print", "--cache", "/var/tmp", **job)) == "/var/tmp"
    assert not any((tmp_path / "local").iterdir()), "a question makes nothing"
    del job["TMPDIR"]
    assert cache_of(run("--print", **job)) == f"/tmp/{name}"


@pytest.mark.parametrize("planted", ["a link", "a file", "open to all", "somebody else's"])
def test_a_cache_that_somebody_else_could_have_filled_is_refused(
    run: Run, tmp_path: Path, job: dict[str, str], planted: str
) -> None:
    cache = tmp_path / "local" / f"verl rollout-toy-{os.geteuid()}"
    mode = 0o2770 if os.geteuid() == 0 else 0o700
    if planted == "a link":
        cache.symlink_to(tmp_path)
    elif planted == "a file":
        cache.touch()
    else:
        cache.mkdir()
        cache.chmod(0o777 if planted == "open to all" else mode)
    if planted == "somebody else's":
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder somebody else's")
        os.chown(cache, 12345, 0)
        cache.chmod(mode)
    done = run("--print", **job)
    assert done.returncode == 3
    assert f"the cache {cache} is not a folder that is user {os.geteuid()}'s alone" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_that_hands_its_group_on_is_a_place_for_a_cache(
    run: Run, tmp_path: Path, job: dict[str, str]
) -> None:
    (tmp_path / "local").chmod(0o2777)
    cache = tmp_path / "local" / f"verl rollout-toy-{os.geteuid()}"
    run(**job)  # there is no image to run, but the cache is made before
    assert cache.is_dir()
    assert cache_of(run("--print", **job)) == str(cache)


def on(kind: str, tmp_path: Path) -> str:
    """A PATH on which every folder lies on that kind of file system."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake = tmp_path / "bin/stat"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" != -f ] || {{ echo {kind}; exit; }}\nexec /usr/bin/stat "$@"\n'
    )
    fake.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("kind", "warned"),
    [
        ("nfs", 1),
        ("lustre", 1),
        ("gpfs", 1),
        ("fhgfs", 1),
        ("smb2", 1),
        ("ext2/ext3", 0),
        ("xfs", 0),
    ],
)
def test_a_cache_that_nodes_share_is_warned_of_once(
    run: Run, tmp_path: Path, job: dict[str, str], kind: str, warned: int
) -> None:
    path = on(kind, tmp_path)
    for given in ({}, job):
        done = run("--print", PATH=path, **given)
        assert done.stderr.count(f" lies on {kind}, where several nodes") == warned
        assert done.stderr.count("\n") == warned
    assert run("--print", "--cache", "/var/tmp", PATH=path).stderr == "", "whoever says it knows"

"""What an export holds, and how its launcher takes its arguments; no image is needed."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from images import catalog
from images.building import builders, export, labels, layers
from images.building.build import TIMESTAMP
from images.building.docker import Docker
from rollout.problem import Problem

IMAGE = catalog.find(catalog.DEFAULT, catalog.load())
CONFIG = {
    "Env": ["PATH=/opt/rollout/bin:/usr/bin", "HF_HOME=/var/cache/rollout/hf"],
    "Labels": {"rollout.cuda": "12.8", "org.example.two": "two\nlines"},
    "WorkingDir": "/var/cache/rollout",
    "Entrypoint": ["rollout"],
    "Cmd": ["info"],
}

LAYERS = ["sha256:" + "1" * 64, "sha256:" + "2" * 64]

# Archives


def test_each_format_has_a_file_of_its_own() -> None:
    files = [export.target(IMAGE, kind, Path("/out")).name for kind in export.FORMATS]
    assert files == [
        f"{IMAGE.tag}.oci.tar",
        f"{IMAGE.tag}.rootfs.tar.zst",
        f"{IMAGE.tag}.sqsh",
    ]


def test_commands_keep_time_users_and_window_fixed() -> None:
    assert layers.zstd_argv(10) == ["zstd", "--quiet", "--stdout", "-10", "--long=27", "-T0"]
    argv = " ".join(export.sqsh_argv(Path("/root"), Path("/out/x"), 10))
    moment = TIMESTAMP
    assert f"-mkfs-time {moment} -all-time {moment}" in argv
    assert "-all-root" in argv and "-comp zstd -Xcompression-level 10" in argv
    assert export.oci_argv("localhost/a:b", Path("/out/x"), "a:b", "zstd")[-3:] == [
        "zstd",
        "localhost/a:b",
        "oci-archive:/out/x:a:b",
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with what makes archives differ: links of both kinds, devices, sockets, long names."""
    root = tmp_path / "image"
    for folder in ("dev", "etc", "usr/bin", "usr/dev", "n" * 120):
        (root / folder).mkdir(parents=True)
    (root / "usr/bin/b").write_bytes(b"b" * 5000)
    os.link(root / "usr/bin/b", root / "usr/bin/a")
    (root / "bin").symlink_to("usr/bin")
    (root / "dev/null").write_text("of the host that exports")
    (root / "usr/dev/kept").write_text("only /dev itself is emptied")
    (root / ("n" * 120) / ("ä" * 60)).write_text("long")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "etc/s"))
    return root


def archive(root: Path) -> bytes:
    stream = io.BytesIO()
    export.write_tar(stream, root, "top", export.environment(CONFIG, LAYERS))
    return stream.getvalue()


def test_a_rootfs_holds_launcher_variables_and_files_below_one_folder(tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive(tree))) as tar:
        members = {member.name: member for member in tar.getmembers()}
        environment = tar.extractfile("top/environment")
        assert environment is not None
        assert environment.read().decode().splitlines() == [
            *CONFIG["Env"],
            f"ROLLOUT_LAYERS={','.join(LAYERS)}",
        ]
    assert all(name == "top" or name.startswith("top/") for name in members)
    assert members["top/run"].mode == 0o755
    assert members["top/rootfs/usr/bin/b"].islnk(), "a hard link stays one: it is not there twice"
    assert members["top/rootfs/usr/bin/b"].linkname == "top/rootfs/usr/bin/a"
    assert members["top/rootfs/bin"].linkname == "usr/bin"
    assert "top/rootfs/usr/dev/kept" in members
    assert not {"top/rootfs/dev/null", "top/rootfs/etc/s"} & set(members)
    assert {member.mtime for member in members.values()} == {TIMESTAMP}
    assert {member.uname + member.gname for member in members.values()} == {""}


def test_the_same_files_give_the_same_archive_whatever_their_times_and_order(
    tree: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["cp", "-a", f"{tree}/.", str(other)], check=True)
    for path in other.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert archive(other) == archive(tree)


def test_hard_links_are_counted_once(tree: Path) -> None:
    folders = 8 * 4096 + 60  # directories and the link, at most
    assert 5000 <= export.size(tree) < 10000 + folders


def test_a_compressor_that_fails_is_a_problem_not_a_short_file(tmp_path: Path) -> None:
    def write(stream: object) -> None:
        for _ in range(100):
            stream.write(bytes(1 << 20))  # type: ignore[attr-defined]

    early = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(Problem, match="exited with 7"):
        export.pack(early, tmp_path / "x", write)


def test_an_interrupted_export_leaves_no_compressor_behind(tmp_path: Path) -> None:
    def write(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.pack([sys.executable, "-c", "import time; time.sleep(99)"], tmp_path / "x", write)


# enroot


def test_enroot_finds_its_settings_where_it_looks() -> None:
    files = export.enroot_files(CONFIG, LAYERS)
    assert set(files) == {"etc/rc", "etc/rc.local", "etc/environment", "etc/fstab"}
    assert "PATH=/opt/rollout/bin:/usr/bin" in files["etc/environment"].splitlines()
    assert files["etc/fstab"] == ""
    assert "# rollout.cuda 12.8\n" in files["etc/rc"]
    assert "lines" not in files["etc/rc"], "a second line of a label would be run"
    volume = export.enroot_files({"Volumes": {"/data": {}}}, LAYERS)["etc/fstab"]
    assert volume == "${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev\n"


def test_an_image_asks_enroot_for_the_driver_as_it_asks_every_other_engine() -> None:
    asking = [f"{name}={value}" for name, value in labels.GPU.items()]
    files = export.enroot_files({**CONFIG, "Env": [*CONFIG["Env"], *asking]}, LAYERS)
    assert set(asking) < set(files["etc/environment"].splitlines())
    assert "NVIDIA" not in export.enroot_files(CONFIG, LAYERS)["etc/environment"]


@pytest.mark.parametrize(("given", "seen"), [([], "info"), (["a b", "c"], "a b|c")])
def test_the_script_for_enroot_starts_the_entrypoint(
    tmp_path: Path, given: list[str], seen: str
) -> None:
    tool = tmp_path / "rollout"
    tool.write_text('#!/bin/sh\nIFS="|"\necho "$*"\n')
    tool.chmod(0o755)
    rc = tmp_path / "rc"
    rc.write_text(export.enroot_files({**CONFIG, "WorkingDir": str(tmp_path)}, LAYERS)["etc/rc"])
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", rc, *given], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == seen


# The session's own arguments


def test_docker_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "detect", lambda _: Docker())
    with pytest.raises(Problem, match="only images of buildah") as caught:
        export.main([IMAGE.tag, "--format", "oci", "--builder", "docker"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "rootfs", "--level", "20"], "zstd has 1 to 19"),
        (["--format", "oci", "--output", "/a:b"], "no colon"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(options: list[str], words: str) -> None:
    with pytest.raises(Problem, match=words):
        export.main([IMAGE.tag, *options])


# The launcher

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """An unpacked export with no image in it, in a folder whose name needs quoting."""
    top = tmp_path / "verl rollout-toy"
    for folder in ("opt/rollout/bin", "usr/local/bin", "mnt", "etc", "var/cache/rollout"):
        (top / "rootfs" / folder).mkdir(parents=True)
    (top / "rootfs/opt/rollout/bin/rollout").touch(mode=0o755)
    (top / "rootfs/usr/local/man").symlink_to("share/man")
    (top / "rootfs/lib").symlink_to("usr/lib")
    (top / "environment").write_text("PATH=/usr/bin\nHF_HOME=/var/cache/rollout/hf\n")
    shutil.copy(export.LAUNCHER, top / "run")
    return top


@pytest.fixture
def run(unpacked: Path, tmp_path: Path) -> Run:
    """Runs the launcher with little more than a PATH."""

    def once(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), **env}
        command = ["sh", str(unpacked / "run"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if "make no namespaces" in done.stderr:
            pytest.skip(done.stderr.strip())
        return done

    return once


def plan(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line[1] for line in plan(done) if line[0] == "argument"]


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


def test_variables_of_a_job_pass_and_those_of_the_host_do_not(run: Run) -> None:
    given = {
        "VLLM_USE_V2": "1\n2",
        "CUDA_VISIBLE_DEVICES": "3",
        "HF_HOME": "/of/the/host",
        "LD_LIBRARY_PATH": "/of/the/host",
        "PYTHONPATH": "/of/the/host",
        "OTHER": "x\nNCCL_DEBUG=1",
    }
    text = run("--print", "--env", "HF_HUB_OFFLINE=1", **given).stdout
    seen = text.split("argument\t")
    at = {pair.strip("\n"): number for number, pair in enumerate(seen)}
    assert {"VLLM_USE_V2=1\n2", "CUDA_VISIBLE_DEVICES=3", "HF_HUB_OFFLINE=1"} <= set(at)
    assert at["HF_HOME=/of/the/host"] < at["HF_HOME=/var/cache/rollout/hf"], "the image's is last"
    assert not [pair for pair in at if pair.startswith(("LD_", "PYTHON", "OTHER", "NCCL", "HOME"))]


@pytest.mark.parametrize("gpus", ["all", "none"])
def test_what_asks_a_container_engine_for_the_gpu_is_not_what_the_launcher_does(
    run: Run, unpacked: Path, gpus: str
) -> None:
    """The job's own list of GPUs stands, and nobody is told "all" where there is none."""
    with (unpacked / "environment").open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in labels.GPU.items())
    found = words(run("--print", "--gpus", gpus))
    assert not [word for word in found if word.startswith("NVIDIA_")]
    found = words(run("--print", "--gpus", gpus, NVIDIA_VISIBLE_DEVICES="2,3"))
    assert [word for word in found if word.startswith("NVIDIA_")] == ["NVIDIA_VISIBLE_DEVICES=2,3"]


def test_the_cache_is_named_after_the_folder_and_not_made_by_a_question(
    run: Run, tmp_path: Path
) -> None:
    line = ["rw", "/var/cache/rollout", str(tmp_path / "home/.cache/verl rollout-toy")]
    assert line in plan(run("--print"))
    assert not (tmp_path / "home").exists()
    done = run("--print", HOME="")
    assert done.returncode == 2 and "--cache DIR" in done.stderr


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

"""What an export holds; no image is needed."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
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

"""An exported image does what the image does, with no container engine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.building import builder, export
from images.building.buildah import Buildah
from rollout.problem import Problem

pytestmark = pytest.mark.image
Result = subprocess.CompletedProcess[str]
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def exported(image: catalog.Image, tool: Buildah, kind: str, folder: Path) -> Path:
    try:
        host.require(export.FORMATS[kind][1])
    except Problem as problem:
        pytest.skip(problem.sentence)
    return export.export(image, tool, kind, folder, level=1)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user can look into; pytest's own are closed to all others."""
    with tempfile.TemporaryDirectory(prefix="rollout-export-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def archive(
    image: catalog.Image,
    tool: Buildah,
    built: builder.Built,  # noqa: ARG001 - what is exported has to be there
    folder: Path,
) -> Path:
    """The image as a rootfs."""
    return exported(image, tool, "rootfs", folder / "first")


@dataclass(frozen=True)
class Launched:
    """The unpacked export, and one way of getting into it."""

    top: Path
    way: str
    before: Sequence[str]
    env: dict[str, str]

    def argv(self, *arguments: str) -> list[str]:
        return [*self.before, str(self.top / "run"), *arguments]

    def run(self, *arguments: str) -> Result:
        """Run something by the launcher, its output kept."""
        return subprocess.run(
            self.argv(*arguments), capture_output=True, text=True, env=self.env, check=False
        )


@pytest.fixture(scope="module")
def top(archive: Path, image: catalog.Image, folder: Path) -> Path:
    """The unpacked export."""
    command = f"zstd -dc '{archive}' | tar -x -C '{folder}'"
    subprocess.run(["sh", "-c", command], check=True)
    return folder / export.stem(image)


@pytest.fixture(params=["root", "bwrap", "namespace"])
def launched(request: pytest.FixtureRequest, top: Path, folder: Path) -> Launched:
    """The launcher as root, and as nobody, by bubblewrap and by a user namespace."""
    way = request.param
    if way == "bwrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    home = folder / f"home-{way}"
    home.mkdir(exist_ok=True)
    os.chown(home, *((0, 0) if way == "root" else (65534, 65534)))
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    if way == "namespace":  # a bubblewrap that is not allowed to do anything
        fake = folder / "bin" / "bwrap"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text("#!/bin/sh\nexit 1\n")
        fake.chmod(0o755)
        env["PATH"] = f"{fake.parent}:{env['PATH']}"
    found = Launched(top, way, () if way == "root" else NOBODY, env)
    if way != "root" and "make no namespaces" in found.run("--print").stderr:
        pytest.skip("ordinary users may make no namespaces here")
    return found


def test_the_same_image_gives_the_same_archive(
    image: catalog.Image, tool: Buildah, archive: Path, folder: Path
) -> None:
    again = exported(image, tool, "rootfs", folder / "again")
    assert host.sha256(again) == host.sha256(archive)
    again.unlink()


def containers() -> set[str]:
    """Working containers of our own stations; other people's have other names."""
    listed = host.run(["buildah", "containers", "--json"], quiet=True).stdout
    names = {entry["containername"] for entry in json.loads(listed) or []}
    return {name for name in names if name.startswith("rollout-")}


def test_an_export_leaves_no_container_and_no_half_file(
    archive: Path, image: catalog.Image
) -> None:
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    before = containers()
    command = (
        sys.executable,
        "-m",
        "images.building.export",
        image.reference,
        "--format",
        "rootfs",
    )
    output = archive.parent.parent / "killed"
    process = subprocess.Popen([*command, "--output", str(output)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(output.glob(".*.rootfs.tar.zst.*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(output.iterdir())
    assert containers() <= before


def test_the_launcher_tells_what_the_image_is(launched: Launched, image: catalog.Image) -> None:
    done = launched.run()
    assert done.returncode == 0, done.stderr
    assert image.reference in done.stdout


def test_every_file_is_the_locked_one_after_the_way_through_an_archive(
    launched: Launched,
) -> None:
    done = launched.run("verify")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_change_is_found_in_an_image_that_is_put_together_from_mounts(
    launched: Launched, folder: Path
) -> None:
    path = launched.top / "rootfs/usr/bin/yes"
    path.chmod(0o4755)
    try:  # a place that the image lacks makes the launcher mount its folders one by one
        done = launched.run("--bind", f"{folder}:/foreign", "verify")
    finally:
        path.chmod(0o755)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/usr/bin/yes: changed: mode 4755, not 0755 (the set-user bit is set)" in done.stdout
    assert "covered by mounts" not in done.stdout


def test_only_cache_and_temporary_folders_can_be_written(launched: Launched) -> None:
    code = (
        "import os, pathlib\n"
        "for p in ('/', '/usr', '/opt/rollout', '/usr/local', '/mnt', '/tmp', '/dev/shm', "
        "'/var/cache/rollout', '/data', '/extra/deep'):\n"
        "    try: (pathlib.Path(p) / 'mark').write_text('x'); print(p)\n"
        "    except OSError: pass\n"
    )
    data = Path(launched.env["HOME"]) / "data"
    data.mkdir(mode=0o777, exist_ok=True)
    data.chmod(0o777)
    binds = ("--bind", f"{data}:/data:ro", "--bind", f"{data}:/extra/deep")
    done = launched.run(*binds, "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["/tmp", "/dev/shm", "/var/cache/rollout", "/extra/deep"]
    assert (data / "mark").exists()
    assert (Path(launched.env["HOME"]) / ".cache" / launched.top.name / "mark").exists()
    assert not (launched.top / "rootfs/extra").exists()


def test_exit_codes_and_input_pass(launched: Launched) -> None:
    assert launched.run("python3", "-c", "raise SystemExit(42)").returncode == 42
    assert launched.run("no-such-command").returncode == 2
    done = subprocess.run(
        launched.argv("cat"), input="through", capture_output=True, text=True, env=launched.env
    )
    assert (done.returncode, done.stdout) == (0, "through")


def test_the_root_user_is_left_behind(launched: Launched) -> None:
    code = "import os; print(os.getuid(), os.getgid(), os.getcwd())"
    # In a namespace of its own the ordinary user is called root, and is not.
    names = {"root": "1000 0", "bwrap": "65534 65534", "namespace": "0 0"}
    done = launched.run("python3", "-c", code)
    assert done.stdout.strip() == f"{names[launched.way]} /var/cache/rollout"
    if launched.way == "root":
        done = launched.run("--uid", "12345", "python3", "-c", code)
        assert done.stdout.startswith("12345 0 ")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 9), (signal.SIGINT, 10), (signal.SIGKILL, -9)]
)
def test_a_signal_ends_everything_inside(
    launched: Launched, number: signal.Signals, code: int
) -> None:
    mark = f"{4000 + os.getpid() % 1000}.{number}"
    script = (
        "import signal, subprocess, sys, time\n"
        f"subprocess.Popen(['sleep', '{mark}'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('up', flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(10)\n"
    )
    process = subprocess.Popen(
        launched.argv("python3", "-c", script),
        stdout=subprocess.PIPE,
        env=launched.env,
        text=True,
        # A shell starts what runs in its background with Ctrl-C ignored: so may be these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(20) == code
    deadline = time.monotonic() + 5
    while sleeping(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sleeping(mark)


def sleeping(mark: str) -> list[str]:
    """Processes of this machine that sleep for a certain time."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == f"sleep\0{mark}\0".encode():
                found.append(path.parent.name)
    return found


def test_nothing_stays_mounted_and_nothing_was_written(
    top: Path, archive: Path, folder: Path
) -> None:
    assert str(folder) not in Path("/proc/mounts").read_text(encoding="utf-8")
    with subprocess.Popen(["zstd", "-dc", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            packed = {member.name for member in tar}
    found = {str(path.relative_to(folder)) for path in export.tree(top)} | {top.name}
    assert found == packed


def test_an_oci_archive_holds_the_image_to_the_digest(
    image: catalog.Image, tool: Buildah, built: builder.Built, folder: Path
) -> None:
    file = exported(image, tool, "oci", folder)
    with tarfile.open(file) as tar:

        def read(name: str) -> dict[str, Any]:
            member = tar.extractfile(name)
            assert member is not None
            found: dict[str, Any] = json.load(member)
            return found

        [entry] = read("index.json")["manifests"]
        inner = read(f"blobs/sha256/{entry['digest'].removeprefix('sha256:')}")
    assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert image.reference in entry["annotations"].values()
    assert inner["config"]["digest"] == f"sha256:{built.id}"
    kinds = {layer["mediaType"] for layer in inner["layers"]}
    assert kinds == {"application/vnd.oci.image.layer.v1.tar+zstd"}
    file.unlink()


def test_a_squashfs_file_holds_what_enroot_reads_and_is_the_same_again(
    image: catalog.Image, tool: Buildah, built: builder.Built, folder: Path
) -> None:
    file = exported(image, tool, "sqsh", folder)
    first = host.sha256(file)

    def read(name: str) -> str:
        argv = ["unsquashfs", "-cat", str(file), name]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    layers = f"ROLLOUT_LAYERS={','.join(built.diff_ids)}"
    assert read("etc/environment").splitlines() == [*built.config["Env"], layers]
    assert 'exec rollout "$@"' in read("etc/rc")
    assert read("etc/fstab") == ""
    argv = ["unsquashfs", "-lln", str(file)]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert " squashfs-root/opt/rollout/bin/rollout" in listed
    assert " squashfs-root/dev\n" in listed and "squashfs-root/dev/" not in listed
    owners = {line.split()[1] for line in listed.splitlines() if line[:1] in "-dl"}
    assert owners == {"0/0"}
    assert host.sha256(exported(image, tool, "sqsh", folder)) == first

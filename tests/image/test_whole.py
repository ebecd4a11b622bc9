"""``rollout verify`` notices every change of the real image, and calls no run of it a change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from images.building import builder
from images.building.buildah import Buildah

from .conftest import Container, Sealed, containers, lines

pytestmark = pytest.mark.image
LIBRARIES = "usr/lib/x86_64-linux-gnu"
SITE = "opt/rollout/lib/python3.11/site-packages"


def flip(path: Path) -> None:
    """Another last byte, and nothing else: not the size, not the mode."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def shell(root: Path) -> None:
    # The command itself starts one, so it has to stay one.
    (root / "usr/bin/sh").unlink()
    shutil.copy2(root / "usr/bin/dash", root / "usr/bin/sh")
    with (root / "usr/bin/sh").open("ab") as file:
        file.write(b"\0")


def libc(root: Path) -> None:
    flip(root / LIBRARIES / "libc.so.6")


def library_of_python(root: Path) -> None:
    with (root / "usr/lib/python3.11/antigravity.py").open("a") as file:
        file.write("# once more\n")


def preload(root: Path) -> None:
    (root / "etc/ld.so.preload").touch()


def mode(root: Path) -> None:
    (root / "etc/pam.d").chmod(0o777)


def owner(root: Path) -> None:
    os.chown(root / "usr/bin/env", 1000, 0)


def set_user(root: Path) -> None:
    (root / "usr/bin/find").chmod(0o4755)


def execute(root: Path) -> None:
    (root / "usr/bin/tac").chmod(0o644)


def execute_inside(root: Path) -> None:
    (root / "opt/rollout/bin/hf").chmod(0o644)


def owner_inside(root: Path) -> None:
    os.chown(root / SITE / "torch/version.py", 1000, 1000)


def empty_folder(root: Path) -> None:
    (root / "usr/lib/foreign").mkdir()


def empty_folder_inside(root: Path) -> None:
    (root / SITE / "foreign").mkdir()


def folder_lost(root: Path) -> None:
    (root / "etc/opt").rmdir()


def link(root: Path) -> None:
    (root / "usr/bin/awk").unlink()
    (root / "usr/bin/awk").symlink_to("/tmp/awk")


def deleted(root: Path) -> None:
    (root / "usr/bin/yes").unlink()


def device(root: Path) -> None:
    os.mknod(root / "srv/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))


def capability(root: Path) -> None:
    # Version 2 of the kernel's form: cap_net_raw, permitted and effective.
    data = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(root / "usr/bin/ls", "security.capability", data)


def loader(root: Path) -> None:
    """The cache names another library for a name that programs ask for."""
    path = root / "etc/ld.so.cache"
    old, new = b"/lib/x86_64-linux-gnu/libm.so.6\0", b"/tmp/x86_64-linux-gnu/libm.so.6\0"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def number_zero(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("toor:x:0:0::/:/bin/sh\n")


DAMAGE: dict[Callable[[Path], None], tuple[str, str]] = {
    shell: ("/usr/bin/sh", "changed: a file, not a link"),
    libc: (f"/{LIBRARIES}/libc.so.6", "changed: sha256"),
    library_of_python: ("/usr/lib/python3.11/antigravity.py", "changed: "),
    preload: ("/etc/ld.so.preload", "extra: a file that no layer has"),
    mode: ("/etc/pam.d", "changed: mode 0777, not 0755"),
    owner: ("/usr/bin/env", "changed: it belongs to 1000:0, not 0:0"),
    set_user: ("/usr/bin/find", "the set-user bit is set"),
    execute: ("/usr/bin/tac", "nobody may execute it"),
    execute_inside: ("bin/hf", "nobody may execute it"),
    owner_inside: (f"{SITE[12:]}/torch/version.py", "it belongs to 1000:1000"),
    empty_folder: ("/usr/lib/foreign", "extra: an empty folder"),
    empty_folder_inside: (f"{SITE[12:]}/foreign", "extra: an empty folder"),
    folder_lost: ("/etc/opt", "missing: a folder"),
    link: ("/usr/bin/awk", "changed: a link to /tmp/awk, not to"),
    deleted: ("/usr/bin/yes", "missing: a file"),
    device: ("/srv/zero", "extra: a device, pipe or socket"),
    capability: ("/usr/bin/ls", "has rights beyond its mode (security.capability)"),
    loader: ("/etc/ld.so.cache", "libm.so.6 is /tmp/x86_64-linux-gnu/libm.so.6"),
    number_zero: ("/etc/passwd", "toor has number 0"),
}


@pytest.fixture(scope="module")
def damaged(tool: Buildah, built: builder.Built) -> Iterator[list[str]]:
    """What verify says of an image with all the damage at once, by lines."""
    with containers(tool, built) as make:
        here = make()
        for damage in DAMAGE:
            damage(here.root)
        done = here.run("rollout", "verify")
        assert done.returncode == 1, done.stdout + done.stderr
        yield [line.strip() for line in lines(done)]


@pytest.mark.parametrize("damage", DAMAGE, ids=[damage.__name__ for damage in DAMAGE])
def test_every_kind_of_change_is_named_with_what_to_do(
    damage: Callable[[Path], None], damaged: list[str]
) -> None:
    where, what = DAMAGE[damage]
    said = [line for line in damaged if line.startswith(f"{where}: ")]
    assert len(said) == 1, "\n".join(damaged)
    assert what in said[0]
    assert "; take the image anew" in said[0] or "; remove it" in said[0]


def test_nothing_but_the_damage_is_named(damaged: list[str]) -> None:
    named = [line for line in damaged if "; take the image anew" in line or "; remove it" in line]
    assert len(named) == len(DAMAGE)


# What is no damage ------------------------------------------------------------------------------


def metrics(here: Container) -> dict[str, object]:
    """The metrics of the check, which has to pass."""
    report = "/var/cache/rollout/report.json"
    done = here.run("rollout", "verify", "--report", report)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((here.root / report[1:]).read_text())["checks"]
    found: dict[str, object] = checks[0]["metrics"]
    return found


def test_the_list_is_small_and_the_seal_covers_it(container: Callable[[], Container]) -> None:
    root = container().root / "opt/rollout/share/rollout"
    data = (root / "image.list").read_bytes()
    packed = subprocess.run(["zstd", "-q10"], input=data, capture_output=True, check=True).stdout
    assert len(packed) < 500_000
    assert "  share/rollout/image.list\n" in (root / "unrecorded.sha256").read_text()


def test_the_same_image_is_sealed_to_the_same_bytes(container: Callable[[], Container]) -> None:
    here = container()
    folder = here.root / "opt/rollout/share/rollout"
    before = {name: (folder / name).read_bytes() for name in ("image.list", "unrecorded.sha256")}
    assert metrics(here)["seal"] == hashlib.sha256(before["unrecorded.sha256"]).hexdigest()
    done = here.run("/opt/rollout/bin/python", "-B", "-m", "rollout.verify", "--seal", user="0:0")
    assert done.returncode == 0, done.stderr
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_additions_and_what_engines_write_are_named_and_are_no_damage(
    container: Callable[[], Container],
) -> None:
    here = container()
    (here.root / "opt/mine").mkdir()
    (here.root / "opt/mine/train.py").touch()
    (here.root / "data").mkdir()
    (here.root / "opt/added/lib").mkdir()
    (here.root / ".dockerenv").touch()
    (here.root / "etc/mtab").symlink_to("/proc/mounts")
    with (here.root / "etc/passwd").open("a") as file:
        file.write("12345:*:12345:0:container user:/:/bin/sh\n")
    aside = str(metrics(here)["aside"])
    assert "beside the image: /data, /opt/mine" in aside
    assert "written by an engine: /.dockerenv, /etc/passwd" in aside


def test_the_driver_that_nvidias_toolkit_brings_is_no_change(
    container: Callable[[], Container], tmp_path: Path
) -> None:
    here = container()
    driver = tmp_path / "libcuda.so.550.1"
    name = "/var/cache/rollout/libcuda.so"
    shared = ("gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", name, "-x", "c", "/dev/null")
    assert here.run(*shared).returncode == 0
    shutil.move(here.root / name[1:], driver)
    place = here.root / LIBRARIES
    # As libnvidia-container: a place to mount on, links to it, and ldconfig.
    (place / "libcuda.so.1").symlink_to("libcuda.so.550.1")
    (place / "libcuda.so").symlink_to("libcuda.so.1")
    (here.root / "etc/ld.so.conf.d/00-nvcr-123.conf").write_text(f"/{LIBRARIES}\n")
    made = here.execute(
        builder.Command(
            "",
            ("sh", "-c", "/sbin/ldconfig && /sbin/ldconfig -p | grep libcuda && rollout verify"),
            "0:0",
            {str(driver): f"/{LIBRARIES}/libcuda.so.550.1"},
        )
    )
    assert made.returncode == 0, made.stdout + made.stderr


def test_a_mount_over_a_file_of_the_image_is_said(
    container: Callable[[], Container], tmp_path: Path
) -> None:
    other = tmp_path / "bashrc"
    other.write_text("alias ls=ls\n")
    done = container().execute(
        builder.Command("", ("rollout", "verify"), "", {str(other): "/etc/bash.bashrc"})
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "covered by mounts: /etc/bash.bashrc" in done.stdout


def test_any_user_finds_it_unchanged_on_a_read_only_root(sealed: Sealed) -> None:
    done = sealed.run("rollout", "verify")
    assert done.returncode == 0, done.stdout + done.stderr


def test_owners_of_another_user_are_called_not_comparable(
    container: Callable[[], Container],
) -> None:
    here = container()
    subprocess.run(["chown", "-hR", "5000:5000", here.root / "usr", here.root / "etc"], check=True)
    done = here.run("rollout", "verify")
    assert done.returncode == 1, "of a part of the image they are a change"
    assert f"and {len(lines(done))}" not in done.stdout
    subprocess.run(["chown", "-hR", "5000:5000", here.root], check=True)
    done = here.run("rollout", "verify", user="5000:5000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "owners not comparable (root's are 5000:5000's here)" in done.stdout

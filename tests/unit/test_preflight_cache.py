"""What is known of the caches before an engine starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.preflight import cache
from rollout.preflight.finding import Finding, Host
from rollout.preflight.known import KNOWN
from tests.unit import hosts

HERE = "/var/cache/rollout"
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = hosts.tree(tmp_path)
    (root / "var/cache/rollout/triton").mkdir(parents=True)
    (root / "tmp").mkdir()
    return root


def example(name: str) -> Finding:
    """A finding as the table shows it."""
    known = KNOWN["cache"][name]
    return Finding("cache", name, known.example, known.stops)


def disk(free: int, files: int = 9) -> Callable[[Path], Any]:
    found = SimpleNamespace(f_bavail=free >> 12, f_frsize=4096, f_files=99, f_favail=files)
    return lambda _: found


def closed(*paths: Path) -> cache.Access:
    """A system on which this user may do all but what these folders would need."""
    return lambda path, _: Path(path) not in paths


def looked(
    root: Path,
    environ: dict[str, str] | None = None,
    cuda: str | None = "12.8",
    *,
    access: cache.Access = closed(),  # noqa: B008 - answers, and keeps nothing
    statvfs: Callable[[Path], Any] = disk(99 * GIB),  # noqa: B008
    proof: bool = True,
) -> list[Finding]:
    images_own = {"XDG_CACHE_HOME": HERE, "TRITON_CACHE_DIR": f"{HERE}/triton"}
    host = Host(root, images_own | (environ or {}), cuda, proof)
    return list(cache.look(host, access, statvfs))


def mounted(root: Path, *lines: str) -> None:
    hosts.write(root / "proc/self/mountinfo", "".join(f"{line}\n" for line in lines))


ROOT_DISK = "21 1 0:1 / / rw,relatime - overlay overlay rw,lowerdir=/a"


def at(point: str, kind: str = "ext4", source: str = "/dev/sda1", options: str = "rw") -> str:
    return f"36 21 8:1 / {point} {options},relatime shared:1 - {kind} {source} rw"


def test_a_host_with_everything_is_not_remarked_on(machine: Path) -> None:
    assert looked(machine) == []
    mounted(machine, ROOT_DISK, at(HERE))
    assert looked(machine) == []


def test_a_cache_that_is_mounted_read_only_is_named(machine: Path) -> None:
    mounted(machine, ROOT_DISK, at(HERE, options="ro"))
    assert looked(machine) == [example("cache-read-only")]
    # The flag of the file system counts as much as the mount's own.
    mounted(machine, ROOT_DISK, f"36 21 8:1 / {HERE} rw - ext4 /dev/sda1 ro,errors=remount-ro")
    assert looked(machine) == [example("cache-read-only")]


def test_a_read_only_root_is_no_matter_where_the_cache_has_a_mount_of_its_own(
    machine: Path,
) -> None:
    read_only = ROOT_DISK.replace("rw,relatime", "ro,relatime")
    mounted(machine, read_only)
    assert looked(machine) == [example("cache-read-only")]
    mounted(machine, read_only, at(HERE))
    assert looked(machine) == []
    mounted(machine, read_only, at(HERE, options="ro"), at(HERE))  # the last one is seen
    assert looked(machine) == []


def test_a_cache_that_cannot_be_written_is_named(machine: Path) -> None:
    found = looked(machine, access=closed(machine / HERE[1:]))
    assert found == [example("cache-not-writable")]
    # Of a folder that is not there yet, the one decides in which it would be made.
    found = looked(machine, {"XDG_CACHE_HOME": "/cache/new"}, access=closed(machine / "cache"))
    assert [finding.name for finding in found] == ["cache-not-writable"]
    assert found[0].sentence.startswith("/cache/new cannot be written; mount a writable folder")


def test_a_folder_that_a_variable_names_is_looked_at_like_the_root(machine: Path) -> None:
    (machine / "shared/triton").mkdir(parents=True)
    own = {"TRITON_CACHE_DIR": "/shared/triton"}
    assert looked(machine, own) == []
    assert looked(machine, own, None, access=closed(machine / "shared/triton")) == []
    (found,) = looked(machine, own, access=closed(machine / "shared/triton"))
    assert found.sentence.startswith("/shared/triton (TRITON_CACHE_DIR) cannot be written; ")
    mounted(machine, ROOT_DISK, at("/shared", options="ro"))
    (found,) = looked(machine, own)
    assert found.name == "cache-read-only"
    assert found.sentence.endswith("give a writable folder: set TRITON_CACHE_DIR to one")


def test_a_link_leads_to_the_disk_that_it_leads_to(machine: Path) -> None:
    (machine / "scratch").mkdir()
    (machine / "var/cache/rollout/inductor").symlink_to(machine / "scratch")
    mounted(machine, ROOT_DISK, at("/scratch", "nfs4", "filer:/s"))
    (found,) = looked(machine, {"TORCHINDUCTOR_CACHE_DIR": f"{HERE}/inductor"})
    assert found.name == "cache-on-nfs"


def test_a_cache_from_which_nothing_can_be_loaded_stops_where_kernels_are_compiled(
    machine: Path,
) -> None:
    mounted(machine, ROOT_DISK, at(HERE, "tmpfs", "tmpfs", "rw,noexec"))
    assert looked(machine) == [example("cache-noexec")]
    assert looked(machine, cuda=None) == []
    mounted(machine, ROOT_DISK, at(HERE), at("/models", options="rw,noexec"))
    assert looked(machine, {"HF_HOME": "/models/hf"}) == []  # nothing is loaded from there


@pytest.mark.parametrize(
    ("kind", "source", "name"),
    [
        ("nfs4", "home:/export", "cache-on-nfs"),
        ("nfs", "home:/export", "cache-on-nfs"),
        ("lustre", "mds@o2ib:/scratch", "cache-on-cluster-disk"),
        ("cifs", "//server/share", "cache-on-cifs"),
        ("fuse.s3fs", "bucket", "cache-on-fuse"),
    ],
)
def test_a_cache_that_several_nodes_share_is_warned_of(
    machine: Path, kind: str, source: str, name: str
) -> None:
    mounted(machine, ROOT_DISK, at(HERE, kind, source))
    assert looked(machine) == [example(name)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("gpfs", "GPFS"), ("beegfs", "BeeGFS"), ("wekafs", "WekaFS"), ("pvfs2", "OrangeFS")],
)
def test_the_file_system_of_a_cluster_is_said_by_its_name(
    machine: Path, kind: str, said: str
) -> None:
    mounted(machine, ROOT_DISK, at(HERE, kind, "fs0"))
    (found,) = looked(machine)
    assert f"lies on {said} (fs0)" in found.sentence


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "overlay", "tmpfs", "zfs", "btrfs", "fuse.fuse-overlayfs", "fuseblk"]
)
def test_a_local_disk_is_not_remarked_on(machine: Path, kind: str) -> None:
    mounted(machine, ROOT_DISK, at(HERE, kind))
    assert looked(machine) == []


def test_models_on_a_shared_disk_are_as_they_should_be(machine: Path) -> None:
    mounted(machine, ROOT_DISK, at(HERE), at("/data", "nfs4", "filer:/data"))
    assert looked(machine, {"HF_HOME": "/data/hf"}) == []


def test_models_that_cannot_be_added_to_are_warned_of_unless_nothing_is_fetched(
    machine: Path,
) -> None:
    (machine / "data/hf").mkdir(parents=True)
    mounted(machine, ROOT_DISK, at("/data", options="ro"))
    assert looked(machine, {"HF_HOME": "/data/hf"}) == [example("cache-cannot-grow")]
    assert looked(machine, {"HF_HOME": "/data/hf", "HF_HUB_OFFLINE": "1"}) == []
    found = looked(machine, {"CUDA_CACHE_PATH": "/data/c", "HF_HUB_OFFLINE": "1"})
    assert [finding.name for finding in found] == ["cache-cannot-grow"]


def compiled(machine: Path, mode: int) -> list[Path]:
    """Two folders that user 1000 compiled kernels into."""
    folders = [machine / "var/cache/rollout/triton" / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "kernel.so").touch()
        folder.chmod(mode)
        if os.geteuid() == 0:
            os.chown(folder, 1000, 0)
    return folders


def as_owned(name: str) -> Finding:
    """The example, as this test's user can make it."""
    known = example(name)
    sentence = known.sentence.replace(
        "user 1000", f"user {1000 if os.geteuid() == 0 else os.geteuid()}"
    )
    return Finding(known.kind, name, sentence, known.stops)


def in_order(found: list[Finding]) -> list[Finding]:
    """The folder that is found first is the file system's choice."""
    return [
        Finding(f.kind, f.name, f.sentence.replace("triton/b (", "triton/a ("), f.stops)
        for f in found
    ]


def test_kernels_that_another_user_closed_are_named_and_counted(machine: Path) -> None:
    paths = compiled(machine, 0o700)
    found = looked(machine, access=closed(*paths))
    assert in_order(found) == [as_owned("cache-unreadable")]


def test_kernels_that_another_user_left_readable_are_only_warned_of(machine: Path) -> None:
    paths = compiled(machine, 0o755)

    def access(path: str, mode: int) -> bool:
        return not (Path(path) in paths and mode & os.W_OK)

    assert in_order(looked(machine, access=access)) == [as_owned("cache-of-another-user")]


@pytest.mark.parametrize(("name", "found"), [("a.lock", True), ("jit.log", True), ("k.so", False)])
def test_a_lock_of_another_user_that_cannot_be_opened_again_is_warned_of(
    machine: Path, name: str, found: bool
) -> None:
    path = machine / "var/cache/rollout/triton" / name
    path.touch()

    def access(asked: str, mode: int) -> bool:
        return not (Path(asked) == path and mode & os.W_OK)

    said = [finding.name for finding in looked(machine, access=access)]
    assert said == ["cache-of-another-user"] * found


def test_a_folder_below_one_that_is_closed_ends_no_command(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_folder, stat = str(machine / "root"), os.stat

    def refused(path: Any, *rest: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(f"{closed_folder}/"):  # root may look everywhere
            raise PermissionError(13, "Permission denied")
        return stat(path, *rest, **more)

    (machine / "root").mkdir()
    monkeypatch.setattr(os, "stat", refused)
    (found,) = looked(machine, {"TRITON_CACHE_DIR": "/root/t"}, access=closed(machine / "root"))
    assert found.name == "cache-not-writable"


def test_what_lies_in_a_cache_and_is_not_compiled_may_be_anybodys(machine: Path) -> None:
    own = machine / "var/cache/rollout/.bash_history"
    own.touch()
    assert looked(machine, access=closed(own)) == []


def test_a_look_through_a_large_cache_ends(machine: Path) -> None:
    for index in range(cache._ENTRIES + 50):
        (machine / f"var/cache/rollout/triton/{index}").touch()
    asked: list[str] = []

    def access(path: str, _: int) -> bool:
        asked.append(path)
        return True

    assert looked(machine, access=access) == []
    assert len(asked) < cache._ENTRIES + 20


def test_a_look_through_a_slow_cache_ends(machine: Path) -> None:
    for index in range(100):
        (machine / f"var/cache/rollout/triton/{index}").touch()
    asked: list[str] = []

    def access(path: str, _: int) -> bool:
        asked.append(path)
        time.sleep(cache._SECONDS / 10)
        return True

    looked(machine, access=access)
    assert len(asked) < 50


def test_a_full_disk_stops_and_a_nearly_full_one_is_warned_of(machine: Path) -> None:
    def names(free: int, files: int = 9, cuda: str | None = "12.8") -> list[str]:
        return [f.name for f in looked(machine, None, cuda, statvfs=disk(free, files))]

    assert names(2 * GIB) == []
    assert names(2 * GIB - 4096) == ["cache-nearly-full"]
    assert names(2 * GIB - 4096, cuda=None) == []
    assert names((64 << 20) - 4096, cuda=None) == ["cache-full"]
    assert names(9 * GIB, files=0) == ["cache-full"]
    assert example("cache-nearly-full") in looked(machine, statvfs=disk(GIB))
    assert example("cache-full") in looked(machine, statvfs=disk(63 << 20))


def test_a_file_system_that_does_not_count_files_has_room_for_them(machine: Path) -> None:
    found = SimpleNamespace(f_bavail=9 << 20, f_frsize=4096, f_files=0, f_favail=0)
    assert looked(machine, statvfs=lambda _: found) == []


def test_a_relative_folder_and_a_broken_table_of_mounts_are_passed_over(machine: Path) -> None:
    mounted(machine, "", "36 21", "36 21 8:1 / /x rw - ", ROOT_DISK)
    assert looked(machine, {"TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": ""}) == []


def test_a_blank_in_a_mount_point_is_a_blank(machine: Path) -> None:
    mounted(machine, ROOT_DISK, at(r"/my\040disk", "nfs", "filer:/d"))
    (machine / "my disk").mkdir()
    (found,) = looked(machine, {"TRITON_CACHE_DIR": "/my disk/triton"})
    assert found.name == "cache-on-nfs"

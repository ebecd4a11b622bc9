"""What is mounted over an image, and which of it is the image's own."""

from __future__ import annotations

from rollout import mounts
from rollout.mounts import Mount, Mounts


def test_a_mount_with_a_space_in_its_name_is_read() -> None:
    line = "36 35 98:0 /a\\040b /mnt/c\\040d rw,noatime master:1 - ext3 /dev/root rw"
    assert mounts.parse(f"{line}\nnonsense\n") == [Mount("/mnt/c d", "98:0", "/a b")]


def below(root: str, prefix: str, *listed: tuple[str, str, str]) -> Mounts:
    return mounts.below(root, prefix, [Mount(*fields) for fields in listed])


def test_in_a_container_all_but_the_root_was_brought_along() -> None:
    found = below(
        "/",
        "/opt/rollout",
        ("/", "0:41", "/"),
        ("/proc", "0:21", "/"),
        ("/etc/hosts", "254:0", "/containers/1/hosts"),
        ("/etc/passwd", "254:0", "/etc/passwd"),
    )
    assert found.own == {""}
    assert found.foreign == {"proc", "etc/hosts", "etc/passwd"}
    assert found.over("usr/bin/env") is None
    assert found.over("proc/self/maps") == "proc"
    assert found.leads("etc")
    assert not found.leads("usr")


def test_folders_that_a_launcher_mounts_back_are_the_images_own() -> None:
    found = below(
        "/",
        "/opt/rollout",
        ("/", "0:50", "/"),  # its tmpfs
        ("/usr", "8:1", "/stash/rootfs/usr"),
        ("/opt", "8:1", "/stash/rootfs/opt"),
        ("/usr/local", "0:51", "/"),
        ("/usr/local/bin", "8:1", "/stash/rootfs/usr/local/bin"),
        ("/usr/local/nvidia/lib64/libcuda.so.1", "8:1", "/usr/lib/libcuda.so.1"),
        ("/data", "8:1", "/stash/data"),
    )
    assert found.own == {"usr", "opt", "usr/local/bin"}
    assert found.over("usr/local/bin/x") is None
    assert found.over("usr/local/nvidia") == "usr/local"
    assert found.over("bin") == ""
    assert found.over("data/x") == "data"


def test_an_image_that_is_run_by_chroot_alone_has_no_mount_of_its_own() -> None:
    found = below("/", "/opt/rollout", ("/dev", "0:6", "/"))
    assert not found.own
    assert found.foreign == {"dev"}
    assert found.over("usr") is None


def test_an_image_in_a_folder_is_told_by_what_its_environment_lies_on() -> None:
    found = below("/srv/image", "/srv/image/opt/rollout", ("/", "8:1", "/"), ("/srv", "8:2", "/s"))
    assert not found.foreign
    found = below(
        "/srv/image",
        "/srv/image/opt/rollout",
        ("/srv", "8:2", "/s"),
        ("/srv/image/usr", "8:2", "/s/image/usr"),
        ("/srv/image/etc", "8:2", "/etc"),
    )
    assert found.own == {"usr"}
    assert found.foreign == {"etc"}

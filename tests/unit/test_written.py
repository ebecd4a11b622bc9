"""What engines write into an image is taken for what it is, and no more."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rollout import written
from rollout.mounts import Mounts

NONE = Mounts(frozenset(), frozenset())


def cache(*libraries: tuple[str, str], old: bool = False) -> bytes:
    """A cache of the loader, as ldconfig writes it."""
    entries, strings = b"", b""
    start = 48 + 24 * len(libraries)
    for name, path in libraries:
        key = start + len(strings)
        strings += name.encode() + b"\0"
        value = start + len(strings)
        strings += path.encode() + b"\0"
        entries += struct.pack("<iIIIQ", 0x303, key, value, 0, 0)
    head = b"glibc-ld.so.cache1.1" + struct.pack("<II", len(libraries), len(strings)) + bytes(20)
    before = b"ld.so-1.7.0\0" + struct.pack("<I", 1) + bytes(12) + bytes(4) if old else b""
    return before + head + entries + strings


@pytest.mark.parametrize("old", [False, True])
def test_a_cache_of_the_loader_is_read(old: bool) -> None:
    libraries = [("libc.so.6", "/lib/libc.so.6"), ("libm.so.6", "/lib/libm.so.6")]
    assert list(written.cached(cache(*libraries, old=old))) == libraries


@pytest.mark.parametrize(
    ("name", "where", "doubt"),
    [
        ("libc.so.6", "/lib/libc.so.6", ""),
        ("libcuda.so.1", "/lib/libcuda.so.1", ""),
        ("libc.so.6", "/tmp/libc.so.6", "libc.so.6 is /tmp/libc.so.6"),
        ("libc.so.6", "/lib/libcuda.so.1", "libc.so.6 is /lib/libcuda.so.1"),
        ("libx.so", "/lib/libx.so", "no layer and no mount has that"),
    ],
)
def test_a_cache_names_what_the_image_has_or_what_is_mounted(
    tmp_path: Path, name: str, where: str, doubt: str
) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr/lib/libcuda.so.1").symlink_to("libcuda.so.550")
    (tmp_path / "etc").mkdir()
    (tmp_path / written.CACHE).write_bytes(cache((name, where)))
    mounted = Mounts(frozenset({"usr/lib/libcuda.so.550"}), frozenset())
    locked = {"usr/lib/libc.so.6"}.__contains__
    found = written.doubtful(str(tmp_path), written.CACHE, mounted, locked)
    assert doubt in found
    assert bool(doubt) == bool(found)


@pytest.mark.parametrize("data", [b"", b"nonsense", cache(("a", "/a"))[:60]])
def test_what_is_no_cache_is_doubted(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / written.CACHE).write_bytes(data)
    assert written.doubtful(str(tmp_path), written.CACHE, NONE, bool) == (
        "it is no cache of the loader"
    )


@pytest.mark.parametrize(
    ("line", "doubt"),
    [
        ("12345:*:12345:0:container user:/:/bin/sh", ""),
        ("root:x:0:0:root:/root:/bin/bash", ""),
        ("toor:x:0:0::/:/bin/sh", "toor has number 0, as root has"),
    ],
)
def test_nobody_but_root_may_have_its_number(tmp_path: Path, line: str, doubt: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(f"{line}\n")
    assert written.doubtful(str(tmp_path), "etc/passwd", NONE, bool) == doubt


def test_links_are_followed_inside_of_the_image(tmp_path: Path) -> None:
    for link, target in {"a": "/b", "b": "c/../d", "loop": "loop", "up": "../../e"}.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "c").mkdir()
    root = str(tmp_path)
    assert written.resolve(root, "/a/x") == "d/x"
    assert written.resolve(root, "up") == "e"
    assert written.resolve(root, "loop") == ""


def test_a_link_counts_as_the_drivers_where_it_leads_to_a_mount(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")
    (tmp_path / "libcuda.so.1").symlink_to("/drivers/libcuda.so.550")
    mounted = Mounts(frozenset({"drivers"}), frozenset())
    assert written.to_mount(str(tmp_path), "libcuda.so", mounted)
    assert not written.to_mount(str(tmp_path), "libcuda.so", NONE)
    assert not written.to_mount(
        str(tmp_path), "libcuda.so", Mounts(frozenset({""}), frozenset())
    ), "a root that is put together holds everything"

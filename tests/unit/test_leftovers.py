"""What a killed run has left is gone at the next start, and what a running one uses stays."""

from __future__ import annotations

import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from images import host
from images.catalog import ROOT
from images.host import leftovers, owner
from images.publishing import packing
from images.publishing.oci import LAYER, Descriptor

DEAD = replace(owner.this(), process=4194305)  # more than the greatest process id of Linux


@pytest.fixture(autouse=True)
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a folder for temporary files of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def aged(path: Path, seconds: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    moment = time.time() - seconds
    os.utime(path, (moment, moment))
    return path


def test_a_temporary_folder_has_its_owner_and_is_gone_at_the_end(tmp_path: Path) -> None:
    for place in (None, tmp_path):
        with leftovers.temporary("report", place) as folder:
            assert folder.is_dir()
            assert folder.parent == (place or tmp_path / "tmp")
            assert folder.name.startswith("rollout-report-")
            assert owner.parse(folder.name) == owner.this()
        assert not folder.exists()


def test_what_killed_runs_have_left_is_removed_wherever_runs_put_it(tmp_path: Path) -> None:
    places = [tmp_path / "tmp", host.scratch(), host.cache(), packing.store(), tmp_path / "build"]
    left, staying = [], []
    for place in places:
        for whose, paths in ((DEAD, left), (owner.this(), staying)):
            (place / f"rollout-layers-{whose}-x" / "inside").mkdir(parents=True)
            (place / f".half.tar.{whose}").touch()
            paths += [place / f"rollout-layers-{whose}-x", place / f".half.tar.{whose}"]
        staying.append(place / f"another-program-{DEAD}")
        staying[-1].touch()
    leftovers.sweep(tmp_path / "build")
    assert [path for path in left if path.exists()] == []
    assert [path for path in staying if not path.exists()] == []


def test_what_a_killed_builder_has_left_is_removed() -> None:
    old = [
        aged(leftovers.buildah() / name, 25 * 3600)
        for name in ("buildah123", "container_images_storage1")
    ]
    new = aged(leftovers.buildah() / "buildah456", 23 * 3600)
    leftovers.sweep()
    assert [path for path in old if path.exists()] == []
    assert new.exists()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    link = host.scratch() / f"rollout-layers-{DEAD}-x"
    link.symlink_to(tmp_path / "mine")
    leftovers.sweep()
    assert not link.is_symlink()
    assert (tmp_path / "mine" / "file").exists()


def test_mounts_of_a_failed_build_are_taken_off_from_the_innermost() -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\n"
        "/dev/vda /w/reproduce-1-x/second-own/graphroot/overlay ext4 rw 0 0\n"
        "overlay /w/reproduce-1-x/second-own/graphroot/overlay/c0\\040ffee/merged overlay rw 0 0\n"
        "overlay /w/reproduce-1-xy/merged overlay rw 0 0\n"
    )
    assert leftovers.mounted(Path("/w/reproduce-1-x"), mounts) == [
        "/w/reproduce-1-x/second-own/graphroot/overlay/c0 ffee/merged",
        "/w/reproduce-1-x/second-own/graphroot/overlay",
    ]


def test_a_half_written_file_has_its_owner_in_its_name(tmp_path: Path) -> None:
    with host.replacing(tmp_path / "file") as temporary:
        temporary.touch()
        assert owner.parse(temporary.name) == owner.this()


@pytest.mark.parametrize(
    "name", ["base-0123.tar", "debs/0123.deb", "layers/compressed/0123.tar.zst"]
)
def test_what_was_not_used_for_long_makes_room(name: str) -> None:
    old = aged(host.cache() / name, leftovers.UNUSED + 60)
    new = aged(host.cache() / name.replace("0123", "4567"), leftovers.UNUSED - 60)
    leftovers.prune()
    assert not old.exists()
    assert new.exists()


def test_the_record_of_a_compressed_layer_stays() -> None:
    """It is small, and a registry that has the layer needs no file of it."""
    record = aged(packing.store() / "0123.json", leftovers.UNUSED * 2)
    leftovers.prune()
    assert record.exists()


def test_a_compressed_layer_that_is_of_use_stays_for_another_while() -> None:
    file = aged(packing.packed("sha256:0123"), leftovers.UNUSED + 60)
    assert packing.kept("sha256:0123", Descriptor(LAYER, "sha256:4567", 0)) == file
    leftovers.prune()
    assert file.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "images").rglob("*.py")), ids=lambda p: p.name)
def test_no_module_makes_temporary_folders_that_nobody_would_know_again(path: Path) -> None:
    """Those inside of another's folder go with it."""
    if path.name == "leftovers.py":
        return
    found = re.findall(r"^.*(?:TemporaryDirectory|mkdtemp)\(.*$", path.read_text(), re.MULTILINE)
    assert [
        line for line in found if "dir=folder" not in line and "leftovers.name" not in line
    ] == []

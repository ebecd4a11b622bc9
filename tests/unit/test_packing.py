"""Layers on their way to a registry: compressed once, believed only whole, exported only if new."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from images import host
from images.building import layering, layers
from images.building.buildah import Buildah
from images.building.builder import Built
from images.locking import lock
from images.publishing import copies, packing
from rollout.problem import Problem

from ..conftest import Checkout, sha256

DIFF_ID = f"sha256:{sha256('a')}"
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is not installed")

# Compressed once


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layers of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar(folder: Path, data: bytes) -> tuple[str, Path]:
    """A layer: its diff_id, and the file."""
    name = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    return f"sha256:{name}", folder / name


@needs_zstd
def test_a_layer_is_compressed_into_what_its_record_says(tmp_path: Path) -> None:
    diff_id, file = tar(tmp_path, b"".join(b"line %d\n" % n for n in range(100_000)))
    found = packing.compress(diff_id, file)
    packed = packing.packed(diff_id)
    assert found == packing.remembered(diff_id)
    assert (found.size, found.digest) == (packed.stat().st_size, f"sha256:{host.sha256(packed)}")
    assert packing.kept(diff_id, found) == packed
    argv = [*layers.zstd_argv(), str(file)]
    assert packed.read_bytes() == subprocess.run(argv, capture_output=True, check=True).stdout


def test_a_layer_for_tools_that_read_no_zstd_is_the_same_tar_in_gzip(tmp_path: Path) -> None:
    data = b"".join(b"line %d\n" % n for n in range(100_000))
    diff_id, file = tar(tmp_path, data)
    found = packing.compress(diff_id, file, packing.GZIP)
    os.utime(file, (1, 1))
    assert packing.compress(diff_id, file, packing.GZIP) == found, "no time of the file is in it"
    packed = packing.packed(diff_id, packing.GZIP)
    assert packed.name.endswith(".tar.gz") and gzip.decompress(packed.read_bytes()) == data
    assert found.media_type == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert packing.remembered(diff_id, packing.GZIP) == found
    assert packing.remembered(diff_id) is None, "each way has a record of its own"
    assert packing.kept(diff_id, found, packing.GZIP) == packed


@needs_zstd
def test_a_layer_that_is_not_what_its_name_says_is_not_compressed(tmp_path: Path) -> None:
    diff_id, file = tar(tmp_path, b"whole")
    file.write_bytes(b"damaged")
    with pytest.raises(Problem, match="is damaged"):
        packing.compress(diff_id, file)
    assert packing.remembered(diff_id) is None
    assert not list(packing.store().iterdir())


@needs_zstd
def test_a_compressed_layer_that_was_cut_off_is_not_used(tmp_path: Path) -> None:
    diff_id, file = tar(tmp_path, b"x" * 1000)
    found = packing.compress(diff_id, file)
    with packing.packed(diff_id).open("r+b") as packed:
        packed.truncate(found.size - 1)
    assert packing.kept(diff_id, found) is None
    assert packing.remembered(diff_id) == found, "a registry may still have it"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", '{"mediaType": "x", "digest": "y", "size": 1}']
)
def test_a_record_of_another_form_is_made_anew(text: str) -> None:
    host.write(packing.packed(DIFF_ID).with_name(f"{DIFF_ID[7:]}.json"), text)
    assert packing.remembered(DIFF_ID) is None


# Out of buildah's storage


class Store(Buildah):
    """A storage that holds one image of two layers."""

    def __init__(self, config: bytes, names: tuple[str, ...]) -> None:
        self.id, self.names, self.exported = hashlib.sha256(config).hexdigest(), names, 0

    @property
    def built(self) -> Built:
        return Built(self.id, {}, tuple(f"sha256:{sha256(data)}" for data in self.names))

    def blobs(self, name: str, folder: Path) -> list[Path]:
        assert name == self.id, "another clone may give the name away"
        self.exported += 1
        return [tar(folder, data.encode())[1] for data in self.names]


Stored = Callable[[bytes], Store]


@pytest.fixture
def stored(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Storages whose configuration skopeo reads as ``config``."""
    image = checkout.image()
    names = tuple(f"layer {n}" for n in layering.layer_names(image, lock.read(image)))

    def make(config: bytes) -> Store:
        (tmp_path / "config").write_bytes(b'{"of": "buildah"}')
        monkeypatch.setattr(packing, "config_argv", lambda _: ["cat", str(tmp_path / "config")])
        return Store(config, names)

    return make


def test_the_configuration_is_taken_to_the_byte_or_not_at_all(
    checkout: Checkout, stored: Stored
) -> None:
    image = checkout.image()
    tool = stored(b'{"of": "buildah"}')
    assert packing.source(image, tool, tool.built).config == b'{"of": "buildah"}'
    tool = stored(b"{}")
    with pytest.raises(Problem, match="does not read") as caught:
        packing.source(image, tool, tool.built)
    assert caught.value.code == 3


@needs_zstd
def test_an_image_is_exported_for_new_layers_alone_and_leaves_nothing(
    checkout: Checkout, stored: Stored
) -> None:
    tool = stored(b'{"of": "buildah"}')
    source = packing.source(checkout.image(), tool, tool.built)
    assert tool.exported == 0
    first = copies.of_source(source, {})
    assert tool.exported == 1
    assert copies.of_source(source, {}).data == first.data
    assert tool.exported == 1
    assert [layer.name for layer in source.layers] == list(first.names.values())
    assert not list(host.scratch().iterdir())

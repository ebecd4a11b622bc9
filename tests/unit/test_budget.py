"""A build is held against its size and the rules for layers, and reads no layer without need."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from images import host
from images.building import budget, builder, layers
from images.building.buildah import Buildah
from images.building.contents import Summary
from images.building.layers import Layer, Record
from images.catalog import Image
from images.locking.rootfs import EPOCH
from rollout.problem import Problem

from ..conftest import Checkout

NONE = Summary({}, "", "", "", "")


def sized(name: str, compressed: float) -> Layer:
    """A layer of so many bytes in a registry."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Layer(name, f"sha256:{digest}", round(compressed * 3), round(compressed), NONE)


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image that may take 1 MB, in layers of 400 KB; nothing is remembered yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(checkout.root / "cache"))
    return checkout.image({"size": '{ compressed = "1 MB", largest-layer = "0.4 MB" }'})


# Sizes


def test_an_image_within_its_budgets_exceeds_none(image: Image) -> None:
    assert budget.over(image, [sized("base", 3e5), sized("torch", 4e5), sized("engine", 3e5)]) == []


@pytest.mark.parametrize(
    ("sizes", "keys"),
    [
        ((3e5, 4e5, 3e5 + 1), ["size.compressed"]),
        ((3e5, 4e5 + 1, 1e5), ["size.largest-layer"]),
        ((9e5, 9e5, 9e5), ["size.compressed", "size.largest-layer"]),
    ],
)
def test_a_budget_that_is_exceeded_is_named_by_its_key(
    image: Image, sizes: tuple[float, ...], keys: list[str]
) -> None:
    found = budget.over(image, [sized(str(number), size) for number, size in enumerate(sizes)])
    assert [key for sentence in found for key in keys if f"'{key}'" in sentence] == keys
    assert len(found) == len(keys)


def test_what_is_too_large_is_told_with_both_numbers(checkout: Checkout) -> None:
    found = [sized("base", 2.25e9), sized("torch", 1.5e9)]
    assert budget.over(checkout.image(), found) == [
        "it takes 3.75 GB compressed, and 'size.compressed' allows 3.60 GB",
        "its layer base takes 2.25 GB compressed, and 'size.largest-layer' allows 1.50 GB",
    ]


# The check after a build


class Storage(Buildah):
    """A builder's storage with one image: a layer of one file of 2 KB for each path."""

    def __init__(self, *paths: str) -> None:
        contents = (str(number).encode() * 2000 for number in range(len(paths)))
        self.tars = [self.tar(path, content) for path, content in zip(paths, contents, strict=True)]
        self.pushed = 0

    @staticmethod
    def tar(path: str, content: bytes) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as made:
            info = tarfile.TarInfo(path)
            info.size, info.mtime = len(content), EPOCH
            made.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    @property
    def built(self) -> builder.Built:
        digests = (hashlib.sha256(tar).hexdigest() for tar in self.tars)
        return builder.Built("id", {}, tuple(f"sha256:{digest}" for digest in digests))

    def blobs(self, name: str, folder: Path) -> list[Path]:
        assert name == self.built.id
        self.pushed += 1
        found = []
        for tar, diff_id in zip(self.tars, self.built.diff_ids, strict=True):
            found.append(folder / diff_id.removeprefix("sha256:"))
            found[-1].write_bytes(tar)
        return found

    def layer(self, number: int, compressed: int = 1) -> Layer:
        """One of its layers as a record has it."""
        diff_id, size = self.built.diff_ids[number], len(self.tars[number])
        return Layer(f"layer-{number}", diff_id, size, compressed, NONE)


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were compressed, by their sha256; each takes 100 KB then."""
    names: list[str] = []

    def compress(blob: Path) -> int:
        names.append(blob.name)
        return 100_000

    monkeypatch.setattr(layers, "compressed", compress)
    return names


def check(image: Image, storage: Storage) -> None:
    labels = [f"layer-{number}" for number in range(len(storage.tars))]
    budget.check(image, storage, storage.built, labels)


def record(image: Image, *found: Layer) -> None:
    layers.write(image, Record("inputs", "buildah 1", found))


def files(checkout: Checkout) -> list[Path]:
    """What is remembered, as it lies on the disk."""
    return sorted((checkout.root / "cache").rglob("*.json"))


@pytest.mark.usefixtures("compressed")
def test_a_new_image_is_read_once_and_remembered(image: Image) -> None:
    storage = Storage("usr/a", "usr/b", "usr/c")
    check(image, storage)
    assert storage.pushed == 1
    remembered = budget.remembered()
    assert tuple(remembered) == tuple(sorted(storage.built.diff_ids))
    assert {layer.name for layer in remembered.values()} == {"layer-0", "layer-1", "layer-2"}
    assert {layer.compressed for layer in remembered.values()} == {100_000}
    check(image, storage)
    assert storage.pushed == 1


def test_recorded_layers_are_not_read(image: Image, compressed: list[str]) -> None:
    storage = Storage("usr/a", "usr/b", "usr/c")
    record(image, *(storage.layer(number) for number in range(3)))
    check(image, storage)
    assert (storage.pushed, compressed) == (0, [])


def test_layers_that_another_image_has_recorded_are_not_read(
    image: Image, checkout: Checkout
) -> None:
    storage = Storage("usr/a", "usr/b", "usr/c")
    record(checkout.image(tag="vllm-0.13"), storage.layer(0), storage.layer(1))
    check(image, storage)
    assert storage.pushed == 0
    assert set(budget.known()) == set(storage.built.diff_ids[:2])


def test_a_new_last_layer_alone_is_not_read(image: Image, compressed: list[str]) -> None:
    """It holds our own files, and each edit of them makes another."""
    storage = Storage("usr/a", "usr/b", "usr/c")
    record(image, storage.layer(0), storage.layer(1))
    check(image, storage)
    assert (storage.pushed, compressed) == (0, [])
    assert budget.remembered() == {}


def test_a_new_layer_below_is_read_and_alone_compressed(
    image: Image, compressed: list[str]
) -> None:
    storage = Storage("usr/a", "usr/b", "usr/c")
    record(image, storage.layer(0), storage.layer(2))
    check(image, storage)
    new = storage.built.diff_ids[1].removeprefix("sha256:")
    assert (storage.pushed, compressed) == (1, [new])


@pytest.mark.usefixtures("compressed")
def test_a_broken_rule_ends_a_build_and_nothing_is_remembered(
    image: Image, checkout: Checkout
) -> None:
    storage = Storage("usr/a", "tmp/left", "usr/c")
    for reads in (1, 2):  # it is not taken for checked the second time
        with pytest.raises(Problem) as caught:
            check(image, storage)
        assert caught.value.code == 1
        assert caught.value.sentence == (
            "verl-rollout:vllm-0.12 breaks its rules (images/catalog/verl-rollout/vllm-0.12.toml): "
            "cache: a cache or temporary file: tmp/left"
        )
        assert (storage.pushed, files(checkout)) == (reads, [])


@pytest.mark.usefixtures("compressed")
def test_a_file_in_two_layers_ends_a_build(image: Image) -> None:
    with pytest.raises(Problem, match=r"twice: in two layers: usr/a$"):
        check(image, Storage("usr/a", "usr/a"))


@pytest.mark.usefixtures("compressed", "image")
def test_a_rule_and_a_budget_are_both_named(checkout: Checkout) -> None:
    small = checkout.image({"size": '{ compressed = "0.25 MB", largest-layer = "1 MB" }'})
    with pytest.raises(Problem, match=r"; it takes \d+\.\d MB compressed, .*") as caught:
        check(small, Storage("usr/a", "var/log/x", "usr/c"))
    assert "logs: a log: var/log/x; " in caught.value.sentence
    assert files(checkout) == []


def test_recorded_layers_are_held_against_the_budget_too(image: Image) -> None:
    """A budget may be lowered after a record was made."""
    storage = Storage("usr/a", "usr/b", "usr/c")
    record(image, storage.layer(0, 400_001), storage.layer(1), storage.layer(2))
    with pytest.raises(Problem, match=r"its layer layer-0 takes .* 'size\.largest-layer' allows"):
        check(image, storage)
    assert storage.pushed == 0


@pytest.mark.usefixtures("compressed")
def test_a_record_counts_where_both_know_a_layer(image: Image) -> None:
    storage = Storage("usr/a", "usr/b")
    check(image, storage)
    record(image, storage.layer(0, 400_001))
    with pytest.raises(Problem, match="its layer layer-0 takes"):
        check(image, storage)


@pytest.mark.usefixtures("compressed")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "base"}', '{"parts": {"usr": "x"}}'])
def test_what_another_version_has_remembered_counts_as_nothing(image: Image, text: str) -> None:
    storage = Storage("usr/a", "usr/b")
    host.write(budget._checked() / "other.json", text)
    assert budget.remembered() == {}
    check(image, storage)
    assert set(budget.remembered()) == set(storage.built.diff_ids)


def test_a_layer_is_remembered_as_it_was_measured(image: Image, compressed: list[str]) -> None:
    storage = Storage("usr/bin/a", "usr/bin/b")
    check(image, storage)
    lowest = budget.remembered()[storage.built.diff_ids[0]]
    assert (lowest.name, lowest.bytes, lowest.compressed) == ("layer-0", 10240, 100_000)
    assert {name: part.files for name, part in lowest.summary.parts.items()} == {"usr/bin": 1}
    assert len(compressed) == 2

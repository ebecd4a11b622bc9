"""What several clones of this repository share in one storage, and what each may count on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from images import host
from images.building import build, payload, storage
from images.building.buildah import Buildah
from images.building.builder import Built
from images.catalog import Image
from images.host import owner
from rollout.problem import Problem

from ..conftest import Checkout, sha256

OLD, NEW = (Built(sha256(name), {}, ("sha256:a",), "sha256:m") for name in ("old", "new"))


@dataclass
class Store(Buildah):
    """A storage with images by name and id."""

    folder: Path
    images: dict[str, Built] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    in_use: tuple[str, ...] = ()

    def storage(self) -> Path:
        return self.folder

    def inspect(self, name: str) -> Built | None:
        return self.images.get(name)

    def tags(self, repository: str) -> list[str]:
        return [n.rpartition(":")[2] for n in self.images if n.startswith(f"{repository}:")]

    def remove(self, name: str) -> bool:
        self.removed.append(name)
        return name not in self.in_use


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "graphroot")


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setattr(build, "everything", lambda _: "today")
    return checkout.image()


# which image


def test_the_image_of_todays_inputs_is_found_whatever_its_name_says(
    image: Image, store: Store
) -> None:
    store.images = {OLD.id: OLD, NEW.id: NEW, f"localhost/{image.reference}": OLD}
    storage.remember(store, "today", NEW.id)
    assert build.current(image, store) == NEW, "another clone has given the name to its own"


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, "is not built here"),
        ({"localhost/verl-rollout:vllm-0.12": OLD}, "but built from other inputs than today's"),
    ],
    ids=["never built", "stale"],
)
def test_what_is_not_todays_image_is_not_handed_out(
    image: Image, store: Store, there: dict[str, Built], said: str
) -> None:
    store.images = dict(there)
    storage.remember(store, "before", OLD.id)
    storage.remember(store, "today", NEW.id)  # and somebody has removed it since
    with pytest.raises(Problem) as caught:
        build.current(image, store)
    assert caught.value.code == 3
    assert said in caught.value.sentence
    assert f"nox -s build -- {image.reference}" in caught.value.sentence


@pytest.mark.parametrize("text", ["", "latest", "../x", "\x00", "é", "0" * 63])
def test_a_note_that_names_no_image_says_nothing(image: Image, store: Store, text: str) -> None:
    store.images = {text.strip(): OLD}
    host.write(store.own() / "built" / "today", text)
    with pytest.raises(Problem, match="is not built here"):
        build.current(image, store)


def test_a_change_of_an_entrypoint_or_a_variable_makes_an_image_stale(
    checkout: Checkout, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    (own / "backends").mkdir(parents=True)
    (own / "cli.py").write_text("1")
    monkeypatch.setattr(payload, "ENTRYPOINTS", own)
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    image = checkout.image()
    store.images = {NEW.id: NEW}
    storage.remember(store, build.everything(image), NEW.id)
    assert build.current(image, store) == NEW
    (own / "cli.py").write_text("2")
    with pytest.raises(Problem, match="nox -s build"):
        build.current(image, store)
    (own / "cli.py").write_text("1")
    assert build.current(checkout.image(), store) == NEW
    with pytest.raises(Problem, match="nox -s build"):
        build.current(checkout.image({"env": '{ A = "other" }'}), store)


# one at a time

HOLD = """
import sys
from pathlib import Path
from images.building import storage
from images.building.buildah import Buildah

class Store(Buildah):
    def storage(self):
        return Path(sys.argv[1])

with storage.alone(Store()):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""


def test_two_clones_build_one_after_the_other_and_the_second_says_for_whom_it_waits(
    store: Store,
) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    argv = [sys.executable, "-c", HOLD, str(store.folder)]
    first: subprocess.Popen[str] = subprocess.Popen(argv, **pipes)  # type: ignore[call-overload]
    assert first.stdout and first.stdin and first.stdout.readline() == "in\n"
    second: subprocess.Popen[str] = subprocess.Popen(argv, **pipes)  # type: ignore[call-overload]
    assert second.stdout and second.stdin
    said = second.stdout.readline()
    assert (
        said == f"another build (process {first.pid}) is running in this storage; waiting for it\n"
    )
    first.kill()  # the lock goes with its holder, however that ends
    assert second.stdout.readline() == "in\n"
    second.communicate("\n")
    first.communicate()
    assert second.returncode == 0


def test_builds_in_two_storages_do_not_wait_for_each_other(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    with storage.alone(one), storage.alone(two):
        for each in (one, two):
            assert owner.parse((each.own() / "lock").read_text()) == owner.this()


# old bases


def test_a_base_that_nothing_used_for_long_is_removed_and_no_other(store: Store) -> None:
    names = [f"localhost/base:{tag}" for tag in ("today", "old", "busy", "unknown")]
    store.images = dict.fromkeys((*names, "localhost/other:old"), OLD)
    store.in_use = ("localhost/base:busy",)
    notes = store.own() / "bases"
    for tag in ("today", "old", "busy"):
        host.write(notes / tag, "")
    unused = -1.0  # every note is older than that
    storage.keep_base(store, "localhost/base:today", unused=unused)
    assert "localhost/base:unknown" not in store.removed, "its time begins now"
    assert sorted(store.removed) == ["localhost/base:busy", "localhost/base:old"]
    assert not (notes / "old").exists()
    assert (notes / "busy").exists(), "it is tried again"
    store.removed.clear()
    storage.keep_base(store, "localhost/base:today")
    assert store.removed == []

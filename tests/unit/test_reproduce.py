"""What two builds from nothing promise: other circumstances, and every difference by its name."""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.building import build, builders, contents, context, layering, layers, streaming
from images.building.buildah import Buildah
from images.building.builder import Built
from images.building.contents import Entry, Part, Summary
from images.building.layers import Layer, Record
from images.catalog import Image
from images.host import owner
from images.locking import lock
from images.locking.rootfs import EPOCH
from images.proving import reproduce
from images.proving.reproduce import BUILDS, Outcome
from images.schema import LEVELS
from rollout.problem import Problem

from ..conftest import Checkout, sha256

FIRST, SECOND = BUILDS
BUILDAH = "buildah 1.28.2"
NAMES = ["base", "nvidia", "torch", "dependencies", "engine", "entrypoints"]
DIFF_IDS = tuple(f"sha256:{sha256(name)}" for name in NAMES)
CONFIG = {"User": "1000:0", "Env": ["PATH=/bin"]}
BUILT = Built("0123", CONFIG, DIFF_IDS, f"sha256:{sha256('manifest')}")


def entry(path: str, content: str = "c", **changes: Any) -> Entry:
    whole = Entry(path, "file", content, 0o644, "0:0", float(EPOCH), (), len(content))
    return replace(whole, **changes)


def other_layer(name: str) -> Built:
    """A build whose layer of that name is another one."""
    diff_ids = tuple("sha256:x" if n == name else d for n, d in zip(NAMES, DIFF_IDS, strict=True))
    return replace(BUILT, diff_ids=diff_ids, manifest="sha256:other")


# the level


def test_builds_are_as_alike_as_the_highest_level_that_holds() -> None:
    manifest = replace(BUILT, manifest="sha256:other")
    assert reproduce.level(BUILT, BUILT, same_files=True) == "R4"
    assert reproduce.level(BUILT, manifest, same_files=True) == "R3"
    assert reproduce.level(BUILT, other_layer("torch"), same_files=True) == "R2"
    assert reproduce.level(BUILT, other_layer("torch"), same_files=False) == "R1"


def test_every_level_has_a_meaning_and_a_later_one_is_a_higher_one() -> None:
    assert list(reproduce.MEANING) == sorted(reproduce.MEANING)
    assert set(LEVELS) == set(reproduce.MEANING) - {"R0"}


@pytest.mark.parametrize(
    ("second", "same"),
    [
        ([[entry("a", mode=0o600, owner="1:1", mtime=5.0)], [entry("b")]], True),
        ([[entry("b"), entry("a")], []], True),
        ([[entry("a")], [entry("b", "other")]], False),
        ([[entry("a")], [entry("b", type="link")]], False),
        ([[entry("a")], []], False),
        ([[entry("a")], [entry("b"), entry("c")]], False),
    ],
    ids=["other modes", "other layers", "other bytes", "another type", "fewer", "more"],
)
def test_files_are_the_same_where_a_container_reads_the_same(
    second: list[list[Entry]], same: bool
) -> None:
    assert reproduce.same_files([[entry("a")], [entry("b")]], second) is same


def test_of_two_files_with_one_path_the_upper_one_is_read() -> None:
    image = [[entry("a", "lower")], [entry("a", "upper")]]
    assert reproduce.same_files(image, [[], [entry("a", "upper")]])
    assert not reproduce.same_files(image, image[::-1])


# what differs


def test_a_difference_is_named_with_layer_file_and_kind() -> None:
    one = [[entry("x")], [entry("a"), entry("b", mtime=1.0), entry("gone")]]
    two = [[entry("x")], [entry("a", "d", mode=0o600), entry("b", mtime=2.0)]]
    assert reproduce.explained(["base", "torch"], one, two) == [
        "layer torch: 3 differ (1 missing, 1 content, 1 mode, 1 mtime)",
        "  a: content, mode (1 bytes each)",
        "  b: mtime (1.0 and 2.0)",
        "  gone: missing",
    ]


def test_layers_without_a_difference_are_not_named() -> None:
    assert reproduce.explained(["base"], [[entry("x")]], [[entry("x")]]) == []


@pytest.mark.parametrize("more", [0, 1, 30])
def test_of_many_differences_the_first_are_shown_and_all_are_counted(more: int) -> None:
    count = reproduce.SHOWN + more
    one = [entry(f"{i:03}") for i in range(count)]
    two = [entry(f"{i:03}", "other") for i in range(count)]
    head, *rest = reproduce.explained(["torch"], [one], [two])
    assert head == f"layer torch: {count} differ ({count} content)"
    shown = [f"  {i:03}: content (1 and 5 bytes)" for i in range(reproduce.SHOWN)]
    assert rest == [*shown, *([f"  … and {more} more"] if more else [])]


def test_a_configuration_differs_key_by_key() -> None:
    other = {"User": "0:0", "Env": ["PATH=/bin"], "Labels": {}}
    assert reproduce.config_differences(CONFIG, other) == [
        "configuration, Labels: None and {}",
        "configuration, User: '1000:0' and '0:0'",
    ]
    assert reproduce.config_differences(CONFIG, dict(CONFIG)) == []


# the circumstances of the two builds


def test_the_two_builds_differ_in_all_that_must_not_show() -> None:
    assert FIRST.name != SECOND.name
    assert FIRST.checkout != SECOND.checkout
    assert len(FIRST.checkout) != len(SECOND.checkout), "a path of another length moves bytes"
    assert FIRST.umask != SECOND.umask
    assert FIRST.env["TZ"] != SECOND.env["TZ"]
    assert FIRST.env.get(context.CLOCK) != SECOND.env[context.CLOCK]
    assert SECOND.reversed_cache
    assert not FIRST.reversed_cache, "there is no cache before the first"


@pytest.mark.parametrize("circumstances", BUILDS, ids=lambda c: c.name)
def test_a_build_keeps_caches_storage_and_temporary_files_below_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circumstances: reproduce.Circumstances
) -> None:
    for name in ("XDG_CACHE_HOME", "TMPDIR", "CONTAINERS_STORAGE_CONF"):
        monkeypatch.setenv(name, "/of/the/host")
    own = tmp_path / f"{circumstances.name}-own"
    found = reproduce.environment(tmp_path, circumstances)
    for name in ("XDG_CACHE_HOME", "TMPDIR", "CONTAINERS_STORAGE_CONF"):
        assert Path(found[name]).is_relative_to(own), name
    assert not [key for key, value in found.items() if value.startswith("/of/the/host")]
    assert found.items() >= dict(circumstances.env).items()
    storage = tomllib.loads(reproduce.storage_conf(own))["storage"]
    assert storage["driver"] == "overlay"
    for key in ("graphroot", "runroot"):
        assert Path(storage[key]).is_relative_to(own), key


def test_the_two_builds_share_no_folder(tmp_path: Path) -> None:
    one, two = (reproduce.environment(tmp_path, circumstances) for circumstances in BUILDS)
    for name in ("XDG_CACHE_HOME", "TMPDIR", "CONTAINERS_STORAGE_CONF"):
        assert one[name] != two[name], name


def test_a_build_finds_the_tools_of_this_run_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "build/tools::/elsewhere")
    found = reproduce.environment(tmp_path / "work", FIRST)["PYTHONPATH"]
    assert found == f"{tmp_path}/build/tools:/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert reproduce.environment(tmp_path / "work", FIRST)["PYTHONPATH"] == ""


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def listed(folder: Path) -> list[str]:
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(str(p.relative_to(folder)) for p in found)


def test_a_copy_of_the_checkout_has_what_git_has_and_nothing_that_builds_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    kept = ["README.md", ".gitignore", "images/recipes/install", "images/building/build.py"]
    put(root, *kept, "build/reports/x.json", ".git/HEAD", ".nox/lint/bin/python")
    put(root, "images/__pycache__/build.pyc", ".mypy_cache/x", "images/.ruff_cache/x")
    (root / "images/recipes/install").chmod(0o755)
    monkeypatch.setattr(reproduce, "ROOT", root)
    target = tmp_path / "a copy" / "deep"
    reproduce.copy_checkout(target)
    assert listed(target) == sorted(kept)
    assert (target / "README.md").read_text() == "README.md"
    assert (target / "images/recipes/install").stat().st_mode & 0o777 == 0o755


def test_a_copy_of_a_worktree_is_no_worktree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "checkout", "README.md", ".git")  # there it is a file
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "checkout")
    reproduce.copy_checkout(tmp_path / "copy")
    assert listed(tmp_path / "copy") == ["README.md"]


def test_a_copy_inside_of_the_checkout_does_not_hold_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "README.md", ".cache/verl-rollout/x")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    target = tmp_path / ".cache/verl-rollout/scratch/one"
    reproduce.copy_checkout(target)
    assert listed(target) == ["README.md"]


def test_a_cache_turned_around_has_the_same_files_without_a_second_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "one", tmp_path / "two" / "cache"
    put(source, "wheels/a.whl", "wheels/b.whl", "archive/torch/lib/x.so", ".lock")
    (source / "empty").mkdir()
    (source / "wheels/latest").symlink_to("b.whl")
    (source / "wheels/unpacked").symlink_to("../archive/torch")
    (source / "wheels/gone").symlink_to("nowhere")
    reproduce.turn_around(source, target)
    assert listed(target) == listed(source)
    assert (target / "empty").is_dir()
    for name in listed(source):
        if (source / name).is_symlink():
            assert (target / name).readlink() == (source / name).readlink()
        else:
            assert (target / name).samefile(source / name)


def test_a_cache_turned_around_is_filled_from_the_other_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "one", "a", "b", "c")
    made: list[str] = []
    monkeypatch.setattr(os, "link", lambda _, to: made.append(to.name))
    reproduce.turn_around(tmp_path / "one", tmp_path / "two")
    assert made == ["c", "b", "a"]


def test_variables_are_as_before_whatever_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.delenv("ADDED", raising=False)
    before = dict(os.environ)
    with (
        pytest.raises(ZeroDivisionError),
        reproduce.variables({"CHANGED": "now", "ADDED": "now"}),
    ):
        assert (os.environ["CHANGED"], os.environ["ADDED"]) == ("now", "now")
        os.environ["BY SOMEBODY"] = "else"
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_a_machine_is_told_from_others_without_its_name() -> None:
    found = reproduce.machine()
    assert found == reproduce.machine()
    assert found.keys() == {"cpu", "cores", "kernel", "boot"}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert platform.node() not in json.dumps(found)
    assert boot[:8] not in found["boot"]


# one of the two builds


@dataclass
class Machine:
    """A machine that builds nothing, and what it was told."""

    streams: list[dict[str, Any]] = field(default_factory=list)
    storages: list[str] = field(default_factory=list)
    image: Built | None = BUILT


@pytest.fixture
def machine(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    def stream(
        argv: Sequence[str], env: Mapping[str, str], cwd: Path, umask: int, *, station: bool
    ) -> None:
        assert station
        made.streams.append({"argv": argv, "env": env, "cwd": cwd, "umask": umask})
        put(Path(env["UV_CACHE_DIR"]), "wheels/a.whl")

    def inspect(_: Buildah, name: str) -> Built | None:
        assert name == "localhost/verl-rollout:vllm-0.12"
        made.storages.append(os.environ["CONTAINERS_STORAGE_CONF"])
        return made.image

    (checkout.root / "README.md").write_text("of this checkout")
    monkeypatch.setattr(reproduce, "ROOT", checkout.root)
    monkeypatch.setattr(streaming, "run", stream)
    monkeypatch.setattr(Buildah, "inspect", inspect)
    return made


@pytest.fixture
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_a_build_starts_from_nothing_in_its_circumstances(
    checkout: Checkout, machine: Machine, work: Path
) -> None:
    image = checkout.image()
    outcomes = [reproduce.build_once(image, work, circumstances) for circumstances in BUILDS]
    for circumstances, outcome, seen in zip(BUILDS, outcomes, machine.streams, strict=True):
        assert outcome.built == BUILT
        assert outcome.storage == work / f"{circumstances.name}-own"
        assert seen["argv"][1:4] == ["-m", "images.building.build", image.reference]
        assert "--no-cache" in seen["argv"]
        assert seen["cwd"] == work / circumstances.checkout
        assert (seen["cwd"] / "README.md").read_text() == "of this checkout"
        assert seen["umask"] == circumstances.umask
        assert dict(seen["env"]) == reproduce.environment(work, circumstances)
        conf = Path(seen["env"]["CONTAINERS_STORAGE_CONF"])
        assert conf.read_text() == reproduce.storage_conf(outcome.storage)
    assert machine.storages == [str(o.storage / "storage.conf") for o in outcomes]
    assert "CONTAINERS_STORAGE_CONF" not in os.environ or (
        os.environ["CONTAINERS_STORAGE_CONF"] not in machine.storages
    )


@pytest.mark.usefixtures("machine")
def test_the_second_build_finds_the_packages_of_the_first(checkout: Checkout, work: Path) -> None:
    image = checkout.image()
    for circumstances in BUILDS:
        reproduce.build_once(image, work, circumstances)
    wheel = "uv/wheels/a.whl"
    # The fake overwrites it, in the one file that both have.
    assert (work / "first-own" / wheel).samefile(work / "second-own" / wheel)


def test_a_build_that_leaves_no_image_is_no_outcome(
    checkout: Checkout, machine: Machine, work: Path
) -> None:
    machine.image = None
    with pytest.raises(Problem, match=r"the first build left no image in .*/first-own"):
        reproduce.build_once(checkout.image(), work, FIRST)


def test_the_layers_of_a_build_are_read_from_its_own_storage(
    checkout: Checkout, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blobs(_: Buildah, name: str, folder: Path) -> list[Path]:
        assert name == "localhost/verl-rollout:vllm-0.12"
        assert os.environ["CONTAINERS_STORAGE_CONF"] == str(work / "first-own/storage.conf")
        assert folder.is_relative_to(work)
        return [Path("lower"), Path("upper")]

    monkeypatch.setattr(Buildah, "blobs", blobs)
    monkeypatch.setattr(contents, "load", lambda path: ([entry(f"of {path}")], {}))
    found = reproduce.look(checkout.image(), Outcome(BUILT, 1.0, work / "first-own"), work)
    assert found == [[entry("of lower")], [entry("of upper")]]
    assert list(work.iterdir()) == []


# both builds, and what is said of them


@dataclass
class Two:
    """Two builds that were made already, and how often layers were read."""

    one: Built = BUILT
    two: Built = BUILT
    first: dict[str, list[Entry]] = field(default_factory=dict)
    second: dict[str, list[Entry]] = field(default_factory=dict)
    looked: list[Path] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)


def recorded_layer(name: str, diff_id: str, content: str = "0123456789ab") -> Layer:
    part = Part("torch", 3, 400, content, "ba9876543210")
    return Layer(name, diff_id, 1024, 512, Summary({f"opt/{name}": part}, "o", "m", "x", "r"))


def record(image: Image, built: Built = BUILT, **changes: Any) -> Record:
    """The record of an image of these inputs."""
    found = tuple(recorded_layer(n, d) for n, d in zip(NAMES, built.diff_ids, strict=True))
    return replace(Record(build.inputs(image), BUILDAH, found[:-1]), **changes)


@pytest.fixture
def two(checkout: Checkout, work: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    made = Two()

    def build_once(_: Image, where: Path, circumstances: reproduce.Circumstances) -> Outcome:
        assert where == work
        built = made.one if circumstances is FIRST else made.two
        return Outcome(built, 100.04, work / f"{circumstances.name}-own")

    def look(_: Image, outcome: Outcome, __: Path) -> list[list[Entry]]:
        made.looked.append(outcome.storage)
        files = made.first if outcome.storage.name == "first-own" else made.second
        return [files.get(name, [entry(f"opt/{name}")]) for name in NAMES]

    def recorded(image: Image, _: Buildah, __: Built) -> Record:
        made.recorded.append(os.environ["CONTAINERS_STORAGE_CONF"])
        return record(image, made.one)

    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    monkeypatch.setattr(reproduce, "build_once", build_once)
    monkeypatch.setattr(reproduce, "look", look)
    monkeypatch.setattr(build, "record", recorded)
    monkeypatch.setattr(Buildah, "version", lambda _: BUILDAH)
    assert layering.layer_names(checkout.image(), lock.read(checkout.image())) == NAMES
    return made


def differing(two: Two, name: str) -> None:
    """Make the second build differ in the bytes of one file of one layer."""
    two.two = other_layer(name)
    two.first[name] = [entry(f"opt/{name}"), entry("lib/libx.so", "old")]
    two.second[name] = [entry(f"opt/{name}"), entry("lib/libx.so", "new")]


def claim(checkout: Checkout, level: str) -> Image:
    return checkout.image({"reproducible": f'"{level}"'})


Said = Callable[[], list[str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().out.splitlines()


def nothing_is_kept(image: Image) -> bool:
    return not layers.path(image).exists() and not reproduce.path(image).exists()


def test_two_builds_with_one_manifest_reproduce_the_image(
    checkout: Checkout, work: Path, two: Two, said: Said
) -> None:
    image = claim(checkout, "R4")
    assert reproduce.reproduce(image, work, keep=False) == 0
    assert said() == [
        "verl-rollout:vllm-0.12: R4 (the same manifest digest), claimed is R4; "
        "no layers are recorded for this image"
    ]
    assert two.looked == two.recorded == [], "nothing is read without need"
    assert nothing_is_kept(image)


@pytest.mark.parametrize("keep", [False, True])
def test_below_its_claim_an_image_fails_and_layer_file_and_kind_are_named(
    checkout: Checkout, work: Path, two: Two, said: Said, keep: bool
) -> None:
    image = claim(checkout, "R2")
    differing(two, "torch")
    assert reproduce.reproduce(image, work, keep=keep) == 1
    assert said() == [
        "layer torch: 1 differ (1 content)",
        "  lib/libx.so: content (3 bytes each)",
        "verl-rollout:vllm-0.12: R1 (every input is pinned, the files differ), claimed is R2; "
        "no layers are recorded for this image",
    ]
    assert nothing_is_kept(image)


def test_the_same_files_in_other_layers_fail_a_claim_of_layers_and_no_lower_one(
    checkout: Checkout, work: Path, two: Two, said: Said
) -> None:
    two.two = other_layer("torch")
    two.second["torch"] = [entry("opt/torch", mtime=5.0)]
    assert reproduce.reproduce(claim(checkout, "R3"), work, keep=False) == 1
    assert said()[0] == "layer torch: 1 differ (1 mtime)"
    assert reproduce.reproduce(claim(checkout, "R2"), work, keep=False) == 0


def test_the_same_layers_fail_a_claim_of_the_manifest_and_no_lower_one(
    checkout: Checkout, work: Path, two: Two, said: Said
) -> None:
    two.two = replace(BUILT, config={**CONFIG, "User": "0:0"}, manifest="sha256:other")
    assert reproduce.reproduce(claim(checkout, "R4"), work, keep=False) == 1
    first, last = said()
    assert first == "configuration, User: '1000:0' and '0:0'"
    assert "R3 (the same layers, another manifest), claimed is R4" in last
    assert reproduce.reproduce(claim(checkout, "R3"), work, keep=False) == 0
    assert two.looked == [], "layers that are the same need not be read"


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_not_recorded_fails_with_its_folder_and_the_record_stays(
    checkout: Checkout, work: Path, two: Two, said: Said, keep: bool
) -> None:
    image = claim(checkout, "R4")
    old = record(image, other_layer("torch"))
    changed = recorded_layer("torch", "sha256:x", "ffffffffffff")
    layers.write(image, replace(old, layers=(*old.layers[:2], changed, *old.layers[3:])))
    before = layers.path(image).read_bytes()
    assert reproduce.reproduce(image, work, keep=keep) == 1
    assert said() == [
        "verl-rollout:vllm-0.12: R4 (the same manifest digest), claimed is R4; "
        "NOT the recorded layers: layer 3 differs, from the same inputs; that is a bug",
        "recorded layer torch: opt/torch: content (3 files of 400 bytes, and 3 of 400)",
    ]
    assert two.recorded == [str(work / "first-own/storage.conf")]
    assert layers.path(image).read_bytes() == before
    assert not reproduce.path(image).exists()


def test_our_own_package_may_be_another_and_the_record_holds(
    checkout: Checkout, work: Path, two: Two, said: Said
) -> None:
    """A sentence that is reworded there makes another last layer, and another manifest."""
    image = claim(checkout, "R4")
    layers.write(image, record(image))
    before = layers.path(image).read_bytes()
    last = (*BUILT.diff_ids[:-1], "sha256:reworded")
    two.one = two.two = replace(BUILT, diff_ids=last, manifest="sha256:other")
    assert reproduce.reproduce(image, work, keep=True) == 0
    assert layers.path(image).read_bytes() == before
    assert "the layers are the recorded ones, byte for byte" in said()[-2]


def test_what_differs_is_said_even_where_a_layer_breaks_the_rules(
    checkout: Checkout, work: Path, two: Two, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = claim(checkout, "R4")
    layers.write(image, record(image, other_layer("engine")))
    differing(two, "torch")

    def broken(*_: object) -> Record:
        raise Problem("is not recorded: bytecode")

    monkeypatch.setattr(build, "record", broken)
    with pytest.raises(Problem, match="bytecode"):
        reproduce.reproduce(image, work, keep=False)
    assert "layer torch: 1 differ (1 content)" in said()


def test_an_input_that_is_not_pinned_is_no_level_whatever_the_builds_agree_in(
    checkout: Checkout, work: Path, two: Two, said: Said
) -> None:
    image = claim(checkout, "R1")
    text = image.dockerfile.read_text()
    image.dockerfile.write_text(text.replace("${BASE}", "debian:12"))
    assert reproduce.reproduce(image, work, keep=True) == 1
    first, last = said()
    assert first.startswith("not pinned: images/recipes/Dockerfile: FROM debian:12")
    assert "R0 (not every input is pinned), claimed is R1" in last
    assert two.recorded == []
    assert nothing_is_kept(image)


@pytest.mark.usefixtures("two")
def test_keep_writes_the_layers_and_the_run_that_reproduced_them(
    checkout: Checkout, work: Path, said: Said
) -> None:
    image = claim(checkout, "R4")
    assert reproduce.reproduce(image, work, keep=True) == 0
    assert layers.read(image) == record(image)
    path = checkout.root / "images/proofs/verl-rollout/vllm-0.12.reproduced.json"
    assert reproduce.path(image) == path
    data = json.loads(path.read_text())
    (run,) = data.pop("runs")
    assert data == {
        "schema": "rollout-reproduced/1",
        "image": "verl-rollout:vllm-0.12",
        "inputs": build.inputs(image),
    }
    assert run.pop("started").endswith("Z")
    assert run == {
        "level": "R4",
        "build_seconds": [100.0, 100.0],
        "record": "no layers are recorded for this image",
        "manifest": BUILT.manifest,
        "machine": reproduce.machine(),
        "builder": BUILDAH,
    }
    kept = "lockfiles/verl-rollout/vllm-0.12.layers"
    assert said()[-1] == f"kept: {kept}, images/proofs/verl-rollout/vllm-0.12.reproduced.json"
    assert reproduce.reproduce(image, work, keep=True) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["record"] == "the layers are the recorded ones, byte for byte"


def test_keep_replaces_the_record_of_other_inputs(checkout: Checkout, work: Path, two: Two) -> None:
    image = claim(checkout, "R4")
    layers.write(image, record(image, other_layer("torch"), inputs="others"))
    assert reproduce.reproduce(image, work, keep=True) == 0
    assert layers.read(image) == record(image)
    assert two.recorded == [str(work / "first-own/storage.conf")]


# the runs that are kept


def run(machine: str, level: str = "R4") -> dict[str, Any]:
    return {"level": level, "machine": {"boot": machine}}


def runs(image: Image) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(reproduce.path(image).read_text())["runs"]
    return found


def test_a_run_is_kept_for_each_machine_and_the_last_one_of_it(checkout: Checkout) -> None:
    image = checkout.image()
    kept = Record("inputs", BUILDAH, ())
    for one in (run("a"), run("b"), run("a", "R3")):
        reproduce.remember(image, kept, one)
    assert runs(image) == [run("b"), run("a", "R3")]


def test_runs_of_other_inputs_are_dropped(checkout: Checkout) -> None:
    image = checkout.image()
    kept = Record("inputs", BUILDAH, ())
    reproduce.remember(image, kept, run("a"))
    reproduce.remember(image, replace(kept, inputs="others"), run("b"))
    assert runs(image) == [run("b")]
    assert json.loads(reproduce.path(image).read_text())["inputs"] == "others"


# the session


@dataclass
class Session:
    """What a session was asked to do, and where."""

    asked: list[tuple[str, Path, bool]] = field(default_factory=list)
    raises: BaseException | None = None


@pytest.fixture
def session(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session of root, with buildah, whose builds are made by nobody."""
    made = Session()

    def reproduced(image: Image, where: Path, *, keep: bool) -> int:
        assert where.is_dir()
        (where / "one").mkdir()
        made.asked.append((image.reference, where, keep))
        if made.raises:
            raise made.raises
        return 1

    checkout.image()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(builders, "detect", lambda _: Buildah())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(build, "check_disk", lambda *_: None)
    monkeypatch.setattr(reproduce, "reproduce", reproduced)
    return made


def test_a_session_gives_the_exit_code_and_leaves_no_build_behind(session: Session) -> None:
    assert reproduce.main(["vllm-0.12"]) == 1
    ((reference, where, keep),) = session.asked
    assert (reference, keep) == ("verl-rollout:vllm-0.12", False)
    assert where.parent == host.scratch()
    assert not where.exists()


def test_a_session_that_is_interrupted_leaves_no_build_behind(session: Session) -> None:
    session.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(["vllm-0.12", "--keep"])
    ((_, where, keep),) = session.asked
    assert keep
    assert list(host.scratch().iterdir()) == []
    assert not where.exists()


def test_the_builds_go_where_they_are_told_from_any_folder(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").mkdir()
    monkeypatch.chdir(tmp_path)
    reproduce.main(["vllm-0.12", "--work", "large"])
    ((_, where, _),) = session.asked
    assert where.is_absolute(), "the builds run in other folders"
    assert where.parent == tmp_path / "large"


def test_a_folder_that_is_none_is_named(session: Session, tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        reproduce.main(["vllm-0.12", "--work", str(tmp_path / "none")])
    assert caught.value.code == 2
    sentence = f"--work: {tmp_path}/none is not a folder; name one with room for two builds"
    assert caught.value.sentence == sentence
    assert session.asked == []


def test_too_little_room_is_said_before_anything_is_made(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed: int) -> None:
        assert folder == host.scratch()
        assert needed == reproduce.room(catalog.find("vllm-0.12", catalog.load()))
        raise Problem("no disk space", 3)

    monkeypatch.setattr(build, "check_disk", full)
    with pytest.raises(Problem, match="no disk space"):
        reproduce.main(["vllm-0.12"])
    assert session.asked == []
    assert list(host.scratch().iterdir()) == []


def test_a_user_who_is_not_root_is_told_so(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Problem, match="reproduce needs root") as caught:
        reproduce.main(["vllm-0.12"])
    assert caught.value.code == 3
    assert session.asked == []


def test_an_unknown_image_is_answered_before_anything_is_installed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(builders, "detect")
    with pytest.raises(Problem) as caught:
        reproduce.main(["vllm-0.21"])
    assert caught.value.code == 2
    assert session.asked == []


def test_the_room_that_builds_need_grows_with_the_image(checkout: Checkout) -> None:
    image = checkout.image()
    guessed = reproduce.room(image)
    assert guessed > 2 * image.size.compressed + build.DISK_NEEDED
    large = recorded_layer("torch", "sha256:a")
    for size in (10**9, 10**10):
        found = replace(record(image), layers=(replace(large, bytes=size),))
        layers.write(image, found)
        assert reproduce.room(image) > 2 * size + build.DISK_NEEDED


def test_a_large_layer_needs_room_for_a_copy_of_it(checkout: Checkout) -> None:
    image = checkout.image()
    half = replace(recorded_layer("torch", "sha256:a"), bytes=10**9)
    rooms = []
    for sizes in ([10**9, 10**9], [2 * 10**9]):
        found = tuple(replace(half, bytes=size) for size in sizes)
        layers.write(image, replace(record(image), layers=found))
        rooms.append(reproduce.room(image))
    assert rooms[1] - rooms[0] == 10**9


def test_what_a_killed_run_has_left_makes_room_for_the_next(
    session: Session, tmp_path: Path
) -> None:
    gone = replace(owner.this(), process=4194305)  # more than the greatest process id of Linux
    left = tmp_path / f"rollout-reproduce-{gone}-x"
    (left / "first-own/graphroot/overlay").mkdir(parents=True)
    assert reproduce.main(["vllm-0.12", "--work", str(tmp_path)]) == 1
    assert not left.exists()
    assert session.asked


def test_what_the_host_needs_no_proxy_for_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "mirror.example")
    first, second = (reproduce.environment(tmp_path, c)["NO_PROXY"] for c in reproduce.BUILDS)
    assert first == "mirror.example"
    assert second == "mirror.example,trace-of-the-host.example"

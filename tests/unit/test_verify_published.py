"""How a verification runs and ends; tests/registry has one test for each way to tamper."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.publishing import (
    attestations,
    evidence,
    oci,
    provenance,
    published,
    unpacking,
    verify_published,
)
from images.publishing.attestations import Attestation
from images.publishing.failures import Broken, Unreachable
from images.publishing.published import Published
from images.publishing.registry import Registry
from images.publishing.unpacking import LOCK_INSIDE
from images.publishing.verify_published import CHECKS, NEEDS
from rollout import hashes, report
from rollout.problem import Problem

REGISTRY = "127.0.0.1:5000"


class Answering(Registry):
    """A registry that answers, and has nothing else to say."""

    def blob_size(self, repository: str, digest: str) -> int | None:  # noqa: ARG002
        return None


@pytest.fixture
def image() -> Published:
    return Published(Answering(REGISTRY), "verl-rollout", "vllm-0.12")


def ending(monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Problem | None]) -> None:
    """Checks that end like this, in their own order; the others pass."""

    def check(name: str) -> Any:
        def run(_: Published) -> dict[str, Any]:
            problem = outcomes.get(name)
            if problem:
                raise problem
            return {"of": name}

        return run

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, check(name))


def run(image: Published, *, layers: bool = False) -> list[tuple[str, str]]:
    checks = verify_published.verify(image, layers=layers, show=lambda _: None)
    return [(check.name, check.status) for check in checks]


# How it runs


def test_every_check_runs_and_contents_only_where_layers_are_read(
    image: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, {})
    assert [name for name, _ in run(image, layers=True)] == list(CHECKS)
    assert [name for name, _ in run(image)] == [name for name in CHECKS if name != "contents"]


def test_what_a_check_needs_comes_before_it() -> None:
    order = list(CHECKS)
    for name, needs in NEEDS.items():
        assert all(order.index(need) < order.index(name) for need in needs), name


@pytest.mark.parametrize(
    ("broken", "silent"),
    [
        ("manifest", set(CHECKS) - {"manifest"}),
        ("config", {"tags", "provenance", "report", "sbom", "contents"}),
        ("attestations", {"provenance", "report", "sbom", "contents"}),
        ("provenance", {"report", "sbom", "contents"}),
        ("sbom", {"contents"}),
        ("layers", {"contents"}),
        ("signature", {"contents"}),
        ("tags", set()),
    ],
)
def test_what_stands_on_a_broken_check_is_not_run_and_the_table_says_so(
    image: Published, monkeypatch: pytest.MonkeyPatch, broken: str, silent: set[str]
) -> None:
    ending(monkeypatch, {broken: Problem("broken")})
    checks = verify_published.verify(image, layers=True, show=lambda _: None)
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.name for check in checks if check.status == "unproved"} == silent
    assert {check.reason for check in checks if check.name in silent} <= {
        f"not run: {broken} failed"
    }
    assert [check.name for check in checks if check.status == "failed"] == [broken]
    assert report.verdict(checks, list(CHECKS)) == "failed"


def test_a_check_that_cannot_be_shown_keeps_nobody_from_running(
    image: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, {name: Problem("no key", 3) for name in ("signature", "provenance")})
    found = dict(run(image, layers=True))
    assert list(found) == list(CHECKS)
    assert {name for name, status in found.items() if status == "unproved"} == {
        "signature",
        "provenance",
    }


def test_every_check_is_shown_as_it_ends(image: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, {"tags": Problem("it has moved")})
    said: list[str] = []
    verify_published.verify(image, show=said.append)
    assert said[0] == report.header()
    assert len(said) == 1 + len(CHECKS) - 1, "all but contents"
    assert re.match(r"manifest +passed +0\.00  of=manifest", said[1])
    assert re.match(r"tags +failed +0\.00\n +it has moved", said[3])


@pytest.mark.parametrize("name", list(CHECKS))
@pytest.mark.parametrize("outage", [Unreachable("no credentials"), Broken("it broke")])
def test_an_outage_in_any_check_is_no_verdict(
    image: Published, monkeypatch: pytest.MonkeyPatch, name: str, outage: Unreachable
) -> None:
    ending(monkeypatch, {name: outage})
    said: list[str] = []
    with pytest.raises(Unreachable) as caught:
        verify_published.verify(image, layers=True, show=said.append)
    assert caught.value is outage
    assert caught.value.code == 3
    before = list(CHECKS)[: list(CHECKS).index(name)]
    assert [row.split()[:2] for row in said[1:]] == [[other, "passed"] for other in before]


def test_what_a_registry_says_is_shown_in_printable_characters(
    image: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "a\x1b[2Jb\nmanifest   passed\u202e"
    ending(monkeypatch, {"tags": Problem(f"it calls itself {hostile}")})
    monkeypatch.setitem(CHECKS, "config", lambda _: {"image": hostile, "count": 7})
    said: list[str] = []
    checks = {c.name: c for c in verify_published.verify(image, show=said.append)}
    assert checks["config"].metrics["image"].isprintable()
    assert checks["config"].metrics["count"] == 7
    assert checks["tags"].reason
    assert checks["tags"].reason.isprintable()
    assert r"a\x1b[2Jb\nmanifest" in checks["tags"].reason, "what it was can be read"
    assert len(said) == 1 + len(checks)
    assert all(line.isprintable() for row in said for line in row.split("\n"))


def test_a_manifest_that_failed_ends_in_a_verdict_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ending(monkeypatch, {"manifest": Problem("there is no such image")})
    monkeypatch.setattr(verify_published, "Registry", lambda target, **_: Answering(target))
    assert verify_published.main([f"{REGISTRY}/verl-rollout:vllm-0.12"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{REGISTRY}/verl-rollout:vllm-0.12: failed"


@pytest.mark.parametrize(
    ("outcomes", "code", "verdict"),
    [
        ({}, 0, "proved"),
        ({"signature": Problem("no key", 3)}, 3, "unproved"),
        ({"tags": Problem("moved")}, 1, "failed"),
        ({"tags": Problem("moved"), "signature": Problem("no key", 3)}, 1, "failed"),
        ({"tags": Problem("a name that is not allowed", 2)}, 1, "failed"),
    ],
    ids=["all passed", "no key", "failed", "failed and no key", "refused"],
)
def test_the_exit_code_is_the_weakest_of_all_checks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcomes: dict[str, Problem | None],
    code: int,
    verdict: str,
) -> None:
    ending(monkeypatch, outcomes)
    monkeypatch.setitem(CHECKS, "manifest", named)
    monkeypatch.setattr(verify_published, "Registry", lambda target, **_: Answering(target))
    assert verify_published.main([f"{REGISTRY}/verl-rollout:vllm-0.12"]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{REGISTRY}/verl-rollout@sha256:{'1' * 64}: {verdict}"


def named(image: Published) -> dict[str, Any]:
    """A check of the manifest that has found one."""
    image.digest = "sha256:" + "1" * 64
    return {}


# How it is asked for


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vllm-0.12",
        "verl-rollout:vllm-0.12",
        f"{REGISTRY}/verl-rollout",
        "host.example/a@sha1:0",
    ],
)
def test_what_names_no_image_of_a_registry_is_wrong_usage(name: str) -> None:
    with pytest.raises(Problem) as caught:
        verify_published.main([name])
    assert caught.value.code == 2


def test_a_key_that_cannot_be_read_is_told_before_the_registry_is_asked(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"cannot be read .*ask the publisher") as caught:
        verify_published.main([f"{REGISTRY}/a:b", "--key", str(tmp_path / "none.pub")])
    assert caught.value.code == 2
    assert "--new-key" not in caught.value.sentence, "a key of one's own checks nothing"


# What a hostile registry may send


class Sending(Answering):
    """A registry that sends this as the configuration of every image."""

    config = b""

    def blob(
        self,
        repository: str,  # noqa: ARG002
        digest: str,  # noqa: ARG002
        size: int | None = None,  # noqa: ARG002
    ) -> bytes:
        return self.config


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config": None},
        {"config": []},
        {"config": {"Labels": ["a"]}},
        {"config": {"Labels": {oci.TITLE: 7}}},
        {"config": {"Labels": {oci.TITLE: "a:b", "org.opencontainers.image.version": "v"}}},
    ],
)
def test_a_configuration_of_any_shape_is_refused_not_tripped_over(config: Any) -> None:
    registry = Sending(REGISTRY)
    layer = oci.Descriptor(oci.LAYER, "sha256:" + "0" * 64, 1)
    registry.config = json.dumps({**config, "rootfs": {"diff_ids": ["sha256:0"]}}).encode()
    image = Published(registry, "a", "b", manifest=oci.Manifest(layer, (layer,)))
    with pytest.raises(Problem, match="no image of ours"):
        published.check_config(image)


def test_a_configuration_with_another_number_of_layers_is_refused() -> None:
    registry = Sending(REGISTRY)
    layer = oci.Descriptor(oci.LAYER, "sha256:" + "0" * 64, 1)
    registry.config = b'{"rootfs": {"diff_ids": ["sha256:0", "sha256:1"]}}'
    image = Published(registry, "a", "b", manifest=oci.Manifest(layer, (layer,)))
    with pytest.raises(Problem, match="names 2 layers, the manifest 1"):
        published.check_config(image)


def test_attestations_that_no_provenance_names_do_not_pass(image: Published) -> None:
    """Whatever came before: the order of the checks is not all that stands between."""
    image.labels = {oci.TITLE: "a:b"}
    image.attestations = [
        Attestation("x", kind, kind, b"{}") for kind in (attestations.REPORT, attestations.SBOM)
    ]
    for check in (evidence.check_report, evidence.check_sbom):
        with pytest.raises(Problem, match="is not one that the provenance names"):
            check(image)


class Signed(Answering):
    """A registry with so many signatures of an image, by somebody."""

    count = 0

    def manifest(
        self,
        repository: str,  # noqa: ARG002
        reference: str,  # noqa: ARG002
    ) -> tuple[bytes, oci.Descriptor] | None:
        layers = [oci.describe(b"%d" % n, oci.SIMPLE_SIGNING) for n in range(self.count)]
        data = oci.manifest(oci.describe(b"{}", oci.CONFIG), layers)
        return data, oci.describe(data, oci.MANIFEST)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "no signature is there"),
        (1, "1 signature is there"),
        (2, "2 signatures are there"),
    ],
)
def test_signatures_are_counted_as_people_do(count: int, words: str) -> None:
    registry = Signed(REGISTRY)
    registry.count = count
    with pytest.raises(Problem, match=f"^{words}; --key FILE.pub") as caught:
        published.check_signature(Published(registry, "a", "b", digest="sha256:0"))
    assert caught.value.code == 3


class Sized(Answering):
    """A registry that is asked for nothing without the size that was announced."""

    def __init__(self, blobs: list[bytes]) -> None:
        super().__init__(REGISTRY)
        self.blobs = {oci.digest(data): data for data in blobs}
        self.asked: dict[str, int | None] = {}

    def blob(self, repository: str, digest: str, size: int | None = None) -> bytes:  # noqa: ARG002
        self.asked[digest] = size
        return self.blobs[digest]

    def download(
        self,
        repository: str,  # noqa: ARG002
        digest: str,
        path: Path,
        size: int | None = None,
    ) -> None:
        self.asked[digest] = size
        path.write_bytes(self.blobs[digest])


def test_no_layer_is_downloaded_beyond_the_size_that_the_manifest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host, "require", lambda *_: None)
    data = b"12345"
    registry, layer = Sized([data]), oci.describe(data, oci.LAYER)
    image = Published(registry, "a", "b", manifest=oci.Manifest(layer, (layer,)))
    image.diff_ids = ("sha256:0",)
    monkeypatch.setattr(unpacking, "unpacked", lambda *_: unpacking.Unpacked("sha256:1", 1, b""))
    with pytest.raises(Problem, match="unpacks to sha256:1"):
        unpacking.check_contents(image)
    assert registry.asked == {layer.digest: len(data)}


# A layer

needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is not installed")


def tar(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@needs_zstd
@pytest.mark.parametrize("name", [LOCK_INSIDE, f"./{LOCK_INSIDE}"])
@pytest.mark.parametrize("program", ["zstd", "gzip"])
def test_a_layer_is_read_to_its_last_byte_and_the_lock_found_in_it(
    tmp_path: Path, name: str, program: str
) -> None:
    data = tar(("etc/x", b"1" * 3_000_000), (name, b"torch==1"), ("etc/y", b"2")) + bytes(70_000)
    packed = subprocess.run([program, "-cq"], input=data, capture_output=True, check=True).stdout
    (tmp_path / "layer").write_bytes(packed)
    found = unpacking.unpacked(tmp_path / "layer", "layer 1")
    assert (found.diff_id, found.size, found.lock) == (oci.digest(data), len(data), b"torch==1")


@needs_zstd
def test_the_seal_in_a_layer_is_found_as_verify_prints_it(tmp_path: Path) -> None:
    path = compressed(tmp_path / "layer", tar((f"opt/rollout/{hashes.SEAL}", b"sealed")))
    found = unpacking.unpacked(path, "layer 1")
    assert found.seal == hashlib.sha256(b"sealed").hexdigest()


def compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(
        subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout
    )
    return path


@needs_zstd
@pytest.mark.parametrize("behind", [False, True], ids=["in a file", "behind the tar"])
def test_a_layer_that_unpacks_to_more_than_any_of_ours_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    much = bytes(20_000_000)
    data = tar(("x", b"1")) + much if behind else tar(("x", much))
    path = compressed(tmp_path / "layer", data)
    assert path.stat().st_size < 10_000, "few bytes, which become many"
    monkeypatch.setattr(unpacking, "LARGEST_LAYER", len(data))
    assert unpacking.unpacked(path, "layer 1").size == len(data)
    monkeypatch.setattr(unpacking, "LARGEST_LAYER", len(data) - 1)
    with pytest.raises(Problem, match=r"layer 1 unpacks to more than .* not read further"):
        unpacking.unpacked(path, "layer 1")


@needs_zstd
def test_a_lock_that_is_longer_than_any_of_ours_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed(tmp_path / "layer", tar((LOCK_INSIDE, b"torch==1")))
    monkeypatch.setattr(unpacking, "LONGEST_LOCK", 8)
    assert unpacking.unpacked(path, "layer 1").lock == b"torch==1"
    monkeypatch.setattr(unpacking, "LONGEST_LOCK", 7)
    with pytest.raises(Problem, match=r"layer 1 holds a .*requirements\.lock of 8 bytes, .* 7 of"):
        unpacking.unpacked(path, "layer 1")


@needs_zstd
def test_a_layer_that_breaks_off_is_refused(tmp_path: Path) -> None:
    data = tar(("etc/x", host.sha256(Path(__file__)).encode() * 100_000))
    packed = subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout
    (tmp_path / "layer").write_bytes(packed[:-20])
    with pytest.raises(Problem, match=r"layer 1 (is no compressed tar|cannot be unpacked)"):
        unpacking.unpacked(tmp_path / "layer", "layer 1")


CI = "git+https://forge.example/team/images@refs/tags/v1"
WORKFLOW = "https://forge.example/team/images/.github/workflows/publish.yml@refs/tags/v1"


@pytest.mark.parametrize(
    ("builder", "checkout", "fits"),
    [
        (provenance.LOCAL_BUILDER, "", True),
        (WORKFLOW, CI, True),
        (WORKFLOW, "", False),
        (provenance.LOCAL_BUILDER, CI, False),
        (WORKFLOW.replace("team", "others"), CI, False),
        (WORKFLOW.replace("tags/v1", "heads/mine"), CI, False),
        (WORKFLOW.replace("/.github/workflows/", "/"), CI, False),
    ],
    ids=[
        *("a person's", "a workflow's", "without a repository", "with a repository"),
        *("another repository's", "another branch's", "no workflow"),
    ],
)
def test_a_builder_is_of_the_repository_that_it_built(
    builder: str, checkout: str, fits: bool
) -> None:
    names = {field.name: () for field in fields(provenance.Origin)}
    origin = provenance.Origin(**names | {"builder": builder, "checkout": checkout})  # type: ignore[arg-type]
    assert origin.built_there is fits

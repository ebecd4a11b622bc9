"""How a verification runs and ends; tests/registry has one test for each way to tamper."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from images import host, oci, verify_published
from images.registry import Registry
from images.verify_published import CHECKS, LOCK_INSIDE, NEEDS, Published
from rollout import report
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
        ("papers", {"provenance", "report", "sbom", "contents"}),
        ("sbom", {"contents"}),
        ("layers", {"contents"}),
        ("signature", set()),
        ("tags", set()),
    ],
)
def test_what_stands_on_a_broken_check_says_nothing_and_the_rest_goes_on(
    image: Published, monkeypatch: pytest.MonkeyPatch, broken: str, silent: set[str]
) -> None:
    ending(monkeypatch, {broken: Problem("broken")})
    found = dict(run(image, layers=True))
    assert set(CHECKS) - set(found) == silent
    assert [name for name, status in found.items() if status == "failed"] == [broken]


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
    assert len(said) == 1 + len(CHECKS) - 1
    assert re.match(r"manifest +passed +0\.00  of=manifest", said[1])
    assert re.match(r"tags +failed +0\.00\n +it has moved", said[3])


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
    with pytest.raises(Problem, match="cannot be read") as caught:
        verify_published.main([f"{REGISTRY}/a:b", "--key", str(tmp_path / "none.pub")])
    assert caught.value.code == 2


# What a hostile registry may send


class Sending(Answering):
    """A registry that sends this as the configuration of every image."""

    config = b""

    def blob(self, repository: str, digest: str) -> bytes:  # noqa: ARG002
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
        verify_published.check_config(image)


def test_a_configuration_with_another_number_of_layers_is_refused() -> None:
    registry = Sending(REGISTRY)
    layer = oci.Descriptor(oci.LAYER, "sha256:" + "0" * 64, 1)
    registry.config = b'{"rootfs": {"diff_ids": ["sha256:0", "sha256:1"]}}'
    image = Published(registry, "a", "b", manifest=oci.Manifest(layer, (layer,)))
    with pytest.raises(Problem, match="names 2 layers, the manifest 1"):
        verify_published.check_config(image)


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
    found = verify_published.unpacked(tmp_path / "layer", "layer 1")
    assert (found.diff_id, found.size, found.lock) == (oci.digest(data), len(data), b"torch==1")


@needs_zstd
def test_a_layer_that_breaks_off_is_refused(tmp_path: Path) -> None:
    data = tar(("etc/x", host.sha256(Path(__file__)).encode() * 100_000))
    packed = subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout
    (tmp_path / "layer").write_bytes(packed[:-20])
    with pytest.raises(Problem, match=r"layer 1 (is no compressed tar|cannot be unpacked)"):
        verify_published.unpacked(tmp_path / "layer", "layer 1")

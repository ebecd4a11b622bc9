"""What is decided before a registry is asked: names, proofs, and the names of failures."""

from __future__ import annotations

import itertools
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.building import build, builders, layers
from images.building.contents import Summary
from images.building.docker import Docker
from images.catalog import Image
from images.proving import proofs
from images.publishing import failures, oci, promotion, proof, publish, tags
from images.publishing.failures import Broken
from images.publishing.names import is_tag, parse_reference, parse_target
from images.publishing.registry import Registry
from images.publishing.skopeo import copy_argv
from rollout import report
from rollout.problem import Problem

from .. import reports
from ..conftest import Checkout, sha256

DIFF_IDS = tuple(f"sha256:{sha256(name)}" for name in ("base", "engine", "ours"))
NAME = "registry.example.com/team/verl-rollout"

# Names


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("registry.example.com", ("registry.example.com", "")),
        (
            "registry.example.com/team/a_b/c__d/e-f/g.h",
            ("registry.example.com", "team/a_b/c__d/e-f/g.h"),
        ),
        ("docker://127.0.0.1:5000/x/", ("127.0.0.1:5000", "x")),
        ("localhost/x", ("localhost", "x")),
        ("[::1]:5000", ("[::1]:5000", "")),
    ],
)
def test_a_host_and_a_prefix_are_taken_apart(text: str, found: tuple[str, str]) -> None:
    assert parse_target(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "team/images", "registry", "https://registry.example.com", "-a.example.com"),
        *("registry.example.com/Team", "registry.example.com/a//b", "registry.example.com/_a"),
        *("registry.example.com/a___b", "registry.example.com/a:b", "registry.example.com/a b"),
        *("registry.example.com/a@b", "registry.example.com:port", "user@registry.example.com"),
        "registry.example.com/" + "a" * 300,
    ],
)
def test_a_name_that_no_registry_takes_is_wrong_usage(text: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_target(text)
    assert caught.value.code == 2
    assert repr(text) in caught.value.sentence


def test_a_reference_in_full_is_taken_apart_by_tag_and_by_digest() -> None:
    digest = oci.digest(b"")
    assert parse_reference("127.0.0.1:5000/a/b:c") == ("127.0.0.1:5000/a", "b", "c")
    assert parse_reference(f"localhost/b@{digest}") == ("localhost", "b", digest)
    there = Registry("localhost/a")
    assert there.reference("b", "c") == "localhost/a/b:c"
    assert there.reference("b", digest) == f"localhost/a/b@{digest}"


@pytest.mark.parametrize(
    "text",
    [
        *("b:c", "localhost/b", "127.0.0.1:5000/b", "localhost/b:", "localhost/b@sha256:1"),
        *("localhost/B:c", f"localhost/b:c@{oci.digest(b'')}", "localhost/b:-c"),
    ],
)
def test_what_is_no_reference_in_full_is_wrong_usage(text: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_reference(text)
    assert caught.value.code == 2


def test_an_immutable_tag_names_engine_cuda_python_and_lock(checkout: Checkout) -> None:
    image = checkout.image()
    names = tags.of_image(image)
    assert names.moving == image.tag
    assert names.immutable.endswith(f"-py311-{host.sha256(image.lock)[:8]}")
    assert is_tag(names.immutable)


def test_what_is_unproved_has_other_tags_than_what_is_proved(checkout: Checkout) -> None:
    image = checkout.image()
    proved, unproved = tags.of_image(image), tags.of_image(image, unproved=True)
    assert unproved.immutable == f"{proved.immutable}-unproved"
    assert unproved.moving == f"{proved.moving}-unproved"


def test_an_image_with_layers_of_gzip_has_other_tags_than_one_with_layers_of_zstd(
    checkout: Checkout,
) -> None:
    image = checkout.image()
    usual, gzip = tags.of_image(image), tags.of_image(image, gzip=True)
    assert gzip == tags.Tags(f"{usual.immutable}-gzip", f"{usual.moving}-gzip")
    both = tags.of_image(image, gzip=True, unproved=True)
    assert both.moving == f"{usual.moving}-gzip-unproved"


def test_every_image_of_the_catalog_has_tags_that_a_registry_takes() -> None:
    for image in catalog.load():
        for unproved, gzip in itertools.product((False, True), repeat=2):
            names = tags.of_image(image, unproved=unproved, gzip=gzip)
            assert is_tag(names.immutable) and is_tag(names.moving)
        assert Registry("localhost").name(image.repository)


# The proof


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image whose recorded layers are those of the reports below."""
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    found = checkout.image()
    nothing = Summary({}, "owner", "mtime", "xattr", "order")
    below = tuple(layers.Layer("base", diff_id, 2, 1, nothing) for diff_id in DIFF_IDS[:-1])
    layers.write(found, layers.Record(build.inputs(found), "buildah 1", below))
    return found


def leave(of: Image, path: Path, **changes: Any) -> Path:
    """A report as a proof leaves it."""
    host.write(path, json.dumps(reports.of(of, DIFF_IDS) | changes))
    return path


def passing(image: Image) -> tuple[Path, bytes]:
    """The report that allows these layers to be published."""
    found = proof.passing(image, DIFF_IDS)
    assert found.standing.word == "proved"
    return found.path, found.data


def test_the_report_of_the_last_run_comes_before_the_kept_one(image: Image) -> None:
    kept = leave(image, proofs.kept(image))
    assert passing(image) == (kept, kept.read_bytes())
    last = leave(image, proofs.report_path(image), device="another GPU")
    assert passing(image) == (last, last.read_bytes())


FAILED = {"name": "files", "status": "failed", "seconds": 1, "metrics": {}, "reason": "fault"}
UNPROVED = {"name": "x", "status": "unproved", "seconds": 1, "metrics": {}, "reason": "no GPU"}
ANYTHING = {"name": "anything", "status": "passed", "seconds": 1, "metrics": {}, "reason": None}


def test_a_run_that_failed_on_purpose_does_not_undo_a_kept_proof(image: Image) -> None:
    kept = leave(image, proofs.kept(image))
    leave(image, proofs.report_path(image), verdict="failed", checks=[FAILED])
    assert passing(image) == (kept, kept.read_bytes())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [DIFF_IDS[0]]}, "is of other layers"),
        ({"layers": list(reversed(DIFF_IDS))}, "is of other layers"),
        ({"lock_sha256": "0" * 64}, "is of another lock"),
        ({"image": "verl-rollout:other"}, "is of verl-rollout:other"),
        ({"verdict": "unproved", "checks": [UNPROVED]}, "lacks files, distributions"),
        ({"checks": [UNPROVED]}, "is no report"),
        ({"schema": "other"}, "is no report"),
        ({"checks": [ANYTHING]}, "lacks files, distributions, libraries"),
        ({"program": None}, "by earlier checks"),
        ({"engine": {"name": "vllm", "version": "0.13.0"}}, "has the engine vllm 0.13.0"),
    ],
)
def test_a_report_that_does_not_prove_these_layers_publishes_nothing(
    image: Image, changes: dict[str, Any], words: str
) -> None:
    leave(image, proofs.kept(image), **changes)
    with pytest.raises(Problem, match=words) as caught:
        proof.passing(image, DIFF_IDS)
    assert caught.value.code == 1
    assert f"nox -s prove -- {image.reference}" in caught.value.sentence
    assert "--unproved" in caught.value.sentence
    assert "there is no build/reports" in caught.value.sentence


def test_the_report_of_verify_alone_publishes_nothing(image: Image) -> None:
    host.write(proofs.kept(image), json.dumps(reports.verified(image, DIFF_IDS)))
    with pytest.raises(Problem, match="its report lacks start, refit, generation"):
        proof.passing(image, DIFF_IDS)


def test_what_is_proved_in_part_is_published_where_the_catalog_says_why(
    checkout: Checkout, image: Image
) -> None:
    data = reports.alone(image, DIFF_IDS, {"sleep-2": "no room"})
    host.write(proofs.kept(image), json.dumps(data))
    with pytest.raises(Problem, match=r"\[not-shown\] of the catalog has no reason for sleep-2"):
        proof.passing(image, DIFF_IDS)
    told = catalog.parse(checkout.file({"not-shown": '{ sleep-2 = "it takes two GPUs" }'}))
    found = proof.passing(told, DIFF_IDS)
    assert (found.standing.word, list(found.standing.missing)) == ("in part", ["sleep-2"])


def test_a_manifest_says_what_a_proof_does_not_show() -> None:
    assert oci.of_proof(None) == {oci.UNPROVED: "true"}
    assert oci.of_proof({}) == {}
    annotations = oci.of_proof({"nccl": "one GPU"})
    assert oci.not_shown(annotations) == {"nccl": "one GPU"}
    assert oci.not_shown({}) == {}
    for text in ("", "[]", "{}", "nccl", '{"nccl": 1}', '{"nccl": "\\u001b"}'):
        with pytest.raises(Problem, match="is no table of texts"):
            oci.not_shown({oci.NOT_SHOWN: text})


def test_a_report_of_inputs_that_have_changed_publishes_nothing(image: Image) -> None:
    leave(image, proofs.kept(image))
    text = image.dockerfile.read_text()
    image.dockerfile.write_text(text.replace("1000:0", "1001:0"))
    with pytest.raises(Problem, match="is not of these inputs and layers"):
        proof.passing(image, DIFF_IDS)


def test_a_damaged_report_is_no_proof(image: Image) -> None:
    proofs.kept(image).parent.mkdir(parents=True)
    proofs.kept(image).write_bytes(b"\xff{")
    with pytest.raises(Problem, match="is not UTF-8"):
        proof.passing(image, DIFF_IDS)
    proofs.kept(image).unlink()
    proofs.kept(image).symlink_to("nowhere")
    with pytest.raises(Problem, match="is a link"):
        proof.passing(image, DIFF_IDS)


# What failures are called


def skopeo(message: str) -> Problem:
    """What is made of skopeo's last words."""
    text = f'Copying blob sha256:1\\ntime="2026-01-01T00:00:00Z" level=fatal msg="{message}"\\n'
    return failures.meaning_of_skopeo(text.encode().decode("unicode_escape"), 1, NAME)


# As skopeo 1.9.3 printed them.
REUSE = "trying to reuse blob sha256:1 at destination: "


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            f"{REUSE}checking whether a blob sha256:1 exists in x: unauthorized: authentication "
            "required",
            "refuses these credentials",
        ),
        (
            f"{REUSE}pinging container registry x: Get https://x/v2/: x509: certificate signed by "
            "unknown authority",
            "failed: x509: certificate signed by unknown authority; name its CA",
        ),
        (
            f"{REUSE}pinging container registry x: http: server gave HTTP response to HTTPS client",
            "does not speak TLS",
        ),
        (f"{REUSE}dial tcp: lookup x on 10.0.0.1:53: no such host", "there is no host"),
        ("writing blob: something new", "skopeo exited with 1: writing blob: something new"),
    ],
)
def test_what_no_patience_mends_is_said_at_once(message: str, words: str) -> None:
    problem = skopeo(message)
    assert words in problem.sentence
    assert not isinstance(problem, Broken)


@pytest.mark.parametrize(
    "message",
    [
        f"{REUSE}pinging container registry x: dial tcp 127.0.0.1:1: connect: connection refused",
        "writing blob: Patch http://x: write tcp 127.0.0.1:1->127.0.0.1:2: write: connection reset "
        "by peer",
        "writing blob: Patch http://x: write: broken pipe",
        "writing blob: Patch http://x: EOF",
        "writing blob: uploading layer chunked: received unexpected HTTP status: 500 Internal "
        "Server Error",
        "writing manifest: uploading manifest x: manifest blob unknown: blob unknown to registry",
    ],
)
def test_what_another_attempt_may_mend_is_tried_again(message: str) -> None:
    assert isinstance(skopeo(message), Broken)


@pytest.mark.parametrize(
    ("status", "body", "words", "again"),
    [
        (
            500,
            b'{"errors": [{"message": "x", "detail": {"Op": "write", "Err":28}}]}',
            "is full",
            False,
        ),
        (507, b"", "is full", False),
        (500, b"write /x: no space left on device", "is full", False),
        (401, b"", "refuses these credentials", False),
        (403, b'{"errors": [{"message": "quota exceeded"}]}', "(quota exceeded)", False),
        (500, b"", "out of order: it answers 500", True),
        (429, b"", "out of order: it answers 429", True),
        (400, b'{"errors": [{"code": "NAME_INVALID", "message": "x"}]}', "does not allow", False),
        (400, b"<html>", "with 400: <html>", False),
    ],
)
def test_each_answer_that_nobody_wanted_has_its_sentence(
    status: int, body: bytes, words: str, again: bool
) -> None:
    problem = failures.meaning(status, body, NAME)
    assert words in problem.sentence
    assert isinstance(problem, Broken) is again


def test_each_connection_that_is_not_made_has_its_sentence() -> None:
    def said(error: BaseException) -> Problem:
        return failures.unreachable(error, "x:1")

    assert "no host x:1" in said(socket.gaierror(socket.EAI_NONAME, "")).sentence
    assert isinstance(said(socket.gaierror(socket.EAI_AGAIN, "")), Broken)
    assert isinstance(said(ConnectionRefusedError(111, "")), Broken)
    assert isinstance(said(TimeoutError("timed out")), Broken)
    assert "TLS with x:1 failed" in said(ssl.SSLError(1, "alert")).sentence


def test_patience_grows_ends_and_begins_anew_with_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)

    def fails() -> None:
        raise Broken("it broke")

    with pytest.raises(Problem, match="it broke, 4 times in a row") as caught:
        failures.patiently(fails, (1, 2, 4))
    assert not isinstance(caught.value, Broken)
    assert slept == [1, 2, 4]
    slept.clear()
    progress = iter([False, True, False, False, False])
    with pytest.raises(Problem):
        failures.patiently(fails, (1, 2, 4), lambda: next(progress))
    assert slept == [1, 1, 2, 4]
    assert list(failures.WAITS) == sorted(failures.WAITS)


def test_no_option_of_skopeo_weakens_a_copy_of_a_registry_with_tls() -> None:
    argv = copy_argv("oci:/x", "docker://r/a@sha256:1", cert_dir=Path("/c"))
    assert argv[:3] == ["skopeo", "copy", "--preserve-digests"]
    assert not [word for word in argv if "tls-verify" in word]
    assert argv[argv.index("--dest-cert-dir") + 1] == "/c"
    assert "--src-cert-dir" not in argv
    plain = copy_argv("docker://r/a", "docker://s/a", plain=(True, False))
    assert "--src-tls-verify=false" in plain
    assert "--dest-tls-verify=false" not in plain


# Arguments

PROMOTE = ["transformers-cpu", "--to", "localhost", "--promote", "--from"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to publish and where"),
        (["transformers-cpu"], "say what to publish and where"),
        (["transformers-cpu", "--to", "Not/A/Host"], "host of a registry"),
        (["transformers-cpu", "--to", "localhost/Upper"], "lower-case"),
        (["transformers-cpu", "--to", "localhost", "--promote"], "go together"),
        (["transformers-cpu", "--to", "localhost", "--from", "localhost/a:b"], "go together"),
        (
            ["transformers-cpu", "--to", "localhost", "--promote", "--from", "a", "--unproved"],
            "not promoted",
        ),
        (
            [*PROMOTE, "localhost/a:b"],
            "needs --trust FILE.pub",
        ),
        ([*PROMOTE, "a", "--trust", "/nowhere"], "no image of a"),
        ([*PROMOTE, "localhost/a:b", "--trust", "/nowhere"], "/nowhere cannot be read"),
        (["transformers-cpu", "--to", "localhost", "--trust", "x"], "--trust is for --promote"),
        (["transformers-cpu", "--to", "localhost", "--key", "/nowhere"], "cannot be read"),
        (["no-image", "--to", "localhost"], "no image 'no-image'"),
        *(
            (["--new-key", "/nowhere/key", *others], "stands alone")
            for others in (
                ["transformers-cpu"],
                ["--to", "localhost"],
                ["--key", "x"],
                ["--unproved"],
                ["--promote"],
                ["--from", "localhost/a:b"],
                ["--trust", "x"],
                ["--authfile", "x"],
                ["--cert-dir", "x"],
            )
        ),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "require", lambda *_: None)
    monkeypatch.setattr(builders, "detect", lambda *_: pytest.fail("it went on"))
    with pytest.raises(Problem, match=words) as caught:
        publish.main(arguments)
    assert caught.value.code == 2


def test_images_of_docker_are_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "require", lambda *_: None)
    monkeypatch.setattr(builders, "detect", lambda *_: Docker())
    with pytest.raises(Problem, match="only images of buildah") as caught:
        publish.main([catalog.DEFAULT, "--to", "localhost"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("status", "wanting"),
    [
        ({"manifest": "passed", "signature": "passed"}, []),
        ({"manifest": "passed", "signature": "unproved"}, ["signature"]),
        ({"manifest": "passed", "signature": "failed"}, ["signature"]),
        ({"manifest": "unproved", "signature": "passed"}, ["manifest"]),
        ({"manifest": "passed"}, ["signature"]),
        ({}, ["manifest", "signature"]),
    ],
)
def test_every_check_has_to_pass_before_a_promotion(
    status: dict[str, str], wanting: list[str]
) -> None:
    checks = [
        report.Check(name, is_, 1.0, {}, None if is_ == "passed" else "because")
        for name, is_ in status.items()
    ]
    assert promotion.unchecked(checks, ["manifest", "signature"]) == wanting

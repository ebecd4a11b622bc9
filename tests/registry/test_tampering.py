"""Whoever can write to the registry, or is the registry, cannot make another image pass.

One test for each way to tamper: what was published passes, is changed in the registry, and must
then fail in the check that is named. The key is the publisher's; the tamperer has another.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from images import catalog, host
from images.catalog import Image
from images.locking import base, lock
from images.publishing import (
    attach,
    attestations,
    copies,
    oci,
    provenance,
    sbom,
    signatures,
    unpacking,
    verify_published,
)
from images.publishing.attestations import Attestation
from images.publishing.published import Metrics, Published
from images.publishing.registry import Registry
from rollout.problem import Problem
from rollout.report import STATUSES
from tests import reports
from tests.conftest import VERSIONS, Checkout

from .conftest import REPOSITORY
from .published import COMMIT, KEY, OTHER, Release
from .server import PASSWORD, USER, Server

ALL = (
    *("manifest", "config", "tags", "signature", "attestations", "provenance", "report", "sbom"),
    "layers",
)


@dataclass
class Outcome:
    """What ``nox -s verify-published`` ended with and printed."""

    code: int
    text: str

    def rows(self, status: str) -> list[str]:
        """The checks with a status."""
        return re.findall(rf"^(\S+) +{status} +\d", self.text, re.MULTILINE)


Verify = Callable[..., Outcome]


sha256 = host.sha256


def refused(*_: object, **__: object) -> None:
    """Stands for what only the checkout of an image could answer."""
    raise AssertionError("a verification has asked the checkout")


@pytest.fixture
def verify(
    here: Registry,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Verify:
    """Runs the session's entry point, with the registry and the public key and nothing else."""
    for name, key in (("key", KEY), ("other", OTHER)):
        (tmp_path / f"{name}.pub").write_bytes(key.public.pem)

    def run(reference: str, *options: str, key: str = "key") -> Outcome:
        mark = "@" if oci.is_digest(reference) else ":"
        name = f"{here.name(REPOSITORY)}{mark}{reference}"
        given = ["--key", str(tmp_path / f"{key}.pub")] if key else []
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for module in (catalog.load, catalog.parse, lock.read, base.read, host.sha256):
                patch.setattr(f"{module.__module__}.{module.__name__}", refused)
            patch.setattr(provenance, "checkout_commit", refused)
            if "--layers" in options:
                patch.setattr(host, "sha256", sha256)  # of what was downloaded
            code = verify_published.main([name, *given, *options])
        return Outcome(code, capsys.readouterr().out)

    return run


@pytest.fixture
def image(checkout: Checkout) -> Image:
    return checkout.image()


@pytest.fixture
def release(image: Image, here: Registry, tmp_path: Path) -> Release:
    """What was published, with all attestations and a signature."""
    return Release(image, tmp_path / "tars", here).publish()


@pytest.fixture
def stranger(image: Image, here: Registry, tmp_path: Path) -> Release:
    """Another image of the same name and lock, not published: with other bytes in a layer."""
    return Release(image, tmp_path / "tars", here, seed="other")


@pytest.fixture
def damage(server: Server) -> Callable[..., Path]:
    """A blob in the registry's own storage, to be changed; a flipped bit unless told otherwise."""

    def change(digest: str, data: bytes | None = None) -> Path:
        value = digest.removeprefix("sha256:")
        path = server.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"
        if data is None:
            old = path.read_bytes()
            data = old[:-2] + bytes([old[-2] ^ 1]) + old[-1:]
        path.write_bytes(data)
        return path

    return change


Damage = Callable[..., Path]


def found_by(outcome: Outcome, check: str, words: str) -> None:
    """It failed, in this check, for this reason, and no check behind it says otherwise."""
    assert outcome.code == 1, outcome.text
    assert check in outcome.rows("failed"), outcome.text
    assert re.search(words, outcome.text), outcome.text
    assert outcome.text.rstrip().endswith(": failed")
    ran = [name for status in STATUSES for name in outcome.rows(status)]
    assert sorted(name for name in ran if name != "contents") == sorted(ALL), "a row for each"


# What was published, and nothing done to it


@pytest.mark.parametrize("by", ["alias", "immutable tag", "digest"])
def test_what_was_published_passes_every_check(release: Release, verify: Verify, by: str) -> None:
    reference = {
        "alias": release.tags.moving,
        "immutable tag": release.tags.immutable,
        "digest": release.digest,
    }[by]
    outcome = verify(reference)
    assert outcome.rows("passed") == list(ALL), outcome.text
    assert outcome.code == 0
    assert outcome.text.splitlines()[-1].endswith(f"{REPOSITORY}@{release.digest}: proved")


def test_with_layers_everything_is_read_and_passes(release: Release, verify: Verify) -> None:
    outcome = verify(release.tags.moving, "--layers")
    assert outcome.rows("passed") == [*ALL, "contents"], outcome.text
    assert outcome.code == 0


def test_nothing_is_fetched_without_the_size_that_was_announced(
    release: Release, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int | None] = {}
    for method in (Registry.blob, Registry.download):

        def fetch(
            self: Registry,
            repository: str,
            digest: str,
            *rest: Path,
            size: int | None = None,
            method: Callable[..., object] = method,
        ) -> object:
            asked[digest] = size
            return method(self, repository, digest, *rest, size=size)

        monkeypatch.setattr(Registry, method.__name__, fetch)
    assert verify(release.tags.moving, "--layers").code == 0
    wanted = {blob.digest: blob.size for blob in release.copy.manifest.blobs}
    wanted |= {layer.digest: layer.size for layer in signature(release).layers}
    for kind in (attestations.REPORT, attestations.SBOM, attestations.STATEMENT):
        data = release.attestation(kind).data
        wanted[oci.digest(data)] = len(data)
    assert {digest: asked.get(digest) for digest in wanted} == wanted


def test_attestations_of_other_people_do_no_harm(release: Release, verify: Verify) -> None:
    scan = Attestation("scan.json", "application/vnd.example.scan+json", "application/json", b"{}")
    theirs = json.dumps(
        {"_type": provenance.STATEMENT_TYPE, "predicateType": "https://example.com/x"}
    )
    other = Attestation(
        "other",
        attestations.STATEMENT,
        attestations.ENVELOPE,
        signatures.envelope(theirs.encode(), KEY),
    )
    entries = release.registry.referrers(REPOSITORY, release.digest)
    release.relist([*entries, *release.attach(scan, other)])
    outcome = verify(release.tags.moving)
    assert outcome.code == 0, outcome.text
    assert "others=1" in outcome.text


@pytest.mark.parametrize("how", ["an index", "gone", "of another image", "no manifest", "damaged"])
def test_what_others_have_listed_does_no_harm_whatever_it_is(
    release: Release, stranger: Release, verify: Verify, damage: Damage, how: str
) -> None:
    """A list is open to all who write to the registry: what is not ours is not looked into."""
    there = release.registry
    scan = Attestation("scan.json", "application/vnd.example.scan+json", "application/json", b"{}")
    entries = there.referrers(REPOSITORY, release.digest)
    if how == "an index":
        data = oci.index([release.copy.descriptor])
        there.push_manifest(REPOSITORY, oci.digest(data), data, oci.INDEX)
        # With our type or without one: an index is no attestation of ours.
        listed = [
            oci.Descriptor(oci.INDEX, oci.digest(data), len(data), artifact_type=kind)
            for kind in ("", attestations.SBOM)
        ]
        listed.append(oci.Descriptor(oci.MANIFEST, oci.digest(data), len(data)))
    elif how == "gone":
        # Theirs, one of which nobody knows what it was, and one that is called ours.
        report = Attestation("r", attestations.REPORT, attestations.REPORT, stranger.report())
        unknown = dataclasses.replace(scan, data=b"[]")
        listed = release.attach(scan, report, unknown)
        listed[-1] = dataclasses.replace(listed[-1], artifact_type="")
    elif how == "of another image":
        copies.push(stranger.copy, there, REPOSITORY)
        listed = stranger.attach(scan)
    else:
        listed = release.attach(scan)
        damage(listed[0].digest, b"7" if how == "no manifest" else None)
    release.relist([*entries, *listed])
    assert how != "gone" or all(there.forget(REPOSITORY, entry.digest) for entry in listed)
    outcome = verify(release.tags.moving)
    assert outcome.code == 0, outcome.text
    assert f"others={len(listed)}" in outcome.text


def test_an_image_published_twice_keeps_the_attestations_of_both(
    release: Release, verify: Verify
) -> None:
    entries = release.registry.referrers(REPOSITORY, release.digest)
    later = release.attestations(report=release.report(seconds=3.0), commit="d" * 40)
    listed = [e for e in release.attach(*later) if e.digest not in {o.digest for o in entries}]
    assert len(listed) == 2, "the SBOM is the same"
    release.relist([*entries, *listed])
    outcome = verify(release.tags.moving)
    assert outcome.code == 0, outcome.text


# The manifest


def test_a_manifest_replaced_under_the_tags_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    copies.push(stranger.copy, stranger.registry, REPOSITORY)
    for name in (release.tags.moving, release.tags.immutable):
        release.tag(name, stranger)
    for name in (release.tags.moving, release.tags.immutable):
        outcome = verify(name)
        found_by(outcome, "signature", "no signature is there")
        assert "attestations" in outcome.rows("failed")


def test_a_manifest_changed_in_the_storage_is_found(
    release: Release, verify: Verify, damage: Damage
) -> None:
    layer = release.copy.manifest.layers[0].digest.encode()
    damage(release.digest, release.copy.data.replace(layer, b"sha256:" + b"0" * 64))
    found_by(verify(release.digest), "manifest", "other bytes")
    assert verify(release.tags.moving).code == 1


def test_a_list_of_images_in_place_of_an_image_is_found(release: Release, verify: Verify) -> None:
    data = oci.index([release.copy.descriptor])
    release.registry.push_manifest(REPOSITORY, release.tags.moving, data, oci.INDEX)
    found_by(verify(release.tags.moving), "manifest", "no manifest of one image")


def test_an_image_that_is_gone_is_found(release: Release, verify: Verify) -> None:
    assert release.registry.forget(REPOSITORY, release.digest)
    found_by(verify(release.digest), "manifest", "no such image")


# The configuration


def test_a_configuration_changed_in_the_storage_is_found(
    release: Release, verify: Verify, damage: Damage
) -> None:
    damage(release.copy.manifest.config.digest)
    found_by(verify(release.tags.moving), "config", "other bytes")


def test_a_configuration_replaced_under_the_tags_is_found(release: Release, verify: Verify) -> None:
    config = release.config.replace(b'"config": {', b'"config": {"Entrypoint": ["/bin/evil"], ')
    assert config != release.config
    release.registry.push_blob(REPOSITORY, config)
    manifest = release.copy.manifest
    data = oci.manifest(oci.describe(config, oci.CONFIG), manifest.layers)
    for name in (release.tags.moving, release.tags.immutable):
        release.registry.push_manifest(REPOSITORY, name, data, oci.MANIFEST)
    found_by(verify(release.tags.moving), "signature", "no signature is there")


def test_a_label_that_a_terminal_would_obey_is_shown_and_not_obeyed(
    release: Release, verify: Verify
) -> None:
    document = json.loads(release.config)
    document["config"]["Labels"][oci.TITLE] = "verl-rollout:\x1b[2Jx\r\ntags   passed"
    config = json.dumps(document).encode()
    release.registry.push_blob(REPOSITORY, config)
    data = oci.manifest(oci.describe(config, oci.CONFIG), release.copy.manifest.layers)
    release.registry.push_manifest(REPOSITORY, "theirs", data, oci.MANIFEST)
    outcome = verify("theirs")
    found_by(outcome, "tags", r"calls itself verl-rollout:\\x1b\[2Jx\\r\\ntags")
    assert all(line.isprintable() for line in outcome.text.split("\n"))


def test_an_image_that_is_not_ours_is_told(release: Release, verify: Verify) -> None:
    config = json.dumps({"rootfs": {"diff_ids": release.diff_ids}, "config": {}}).encode()
    release.registry.push_blob(REPOSITORY, config)
    data = oci.manifest(oci.describe(config, oci.CONFIG), release.copy.manifest.layers)
    release.registry.push_manifest(REPOSITORY, "theirs", data, oci.MANIFEST)
    found_by(verify("theirs"), "config", "no image of ours")


# The tags


def test_an_immutable_tag_that_has_moved_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    copies.push(stranger.copy, stranger.registry, REPOSITORY)
    release.tag(release.tags.immutable, stranger)
    outcome = verify(release.tags.moving)
    found_by(outcome, "tags", f"immutable tag .* is at {stranger.digest}")
    assert outcome.rows("failed") == ["tags"], "the image itself is the right one"


def test_an_alias_at_another_digest_than_the_immutable_tag_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    """Even where that other image is signed, and has attestations of its own."""
    stranger.tags = dataclasses.replace(stranger.tags, immutable="elsewhere")
    stranger.publish()
    outcome = verify(release.tags.moving)
    found_by(outcome, "tags", f"immutable tag .* is at {release.digest}, and this is")
    assert outcome.rows("failed") == ["tags"]


def test_an_immutable_tag_that_is_gone_is_found(
    release: Release, verify: Verify, server: Server
) -> None:
    tags = server.storage / "docker/registry/v2/repositories" / REPOSITORY / "_manifests/tags"
    (tags / release.tags.immutable / "current/link").unlink()
    found_by(verify(release.tags.moving), "tags", "immutable tag .* is missing")


def test_an_image_under_the_name_of_another_is_found(
    release: Release, checkout: Checkout, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    """Signed, with all attestations: but whoever asks for one engine must not get another."""
    other = checkout.image(tag="vllm-0.11", versions={**VERSIONS, "vllm": "0.11.0"})
    older = Release(other, tmp_path / "tars", here, seed="older").publish()
    assert verify("vllm-0.11").code == 0
    release.tag(release.tags.moving, older)
    outcome = verify(release.tags.moving)
    found_by(outcome, "tags", "called verl-rollout:vllm-0.12 here, and calls itself .*0.11")


# The signature


def signature(release: Release) -> oci.Manifest:
    found = release.registry.manifest(REPOSITORY, oci.signature_tag(release.digest))
    assert found
    return oci.parse(found[0])


def replace_signature(release: Release, payload: bytes, annotations: dict[str, str]) -> None:
    """Write the manifest of signatures anew, with this one alone."""
    layer = oci.describe(payload, oci.SIMPLE_SIGNING, annotations)
    config = oci.signature_config([layer])
    release.registry.push_blob(REPOSITORY, payload)
    release.registry.push_blob(REPOSITORY, config)
    data = oci.manifest(oci.describe(config, oci.CONFIG), [layer])
    tag = oci.signature_tag(release.digest)
    release.registry.push_manifest(REPOSITORY, tag, data, oci.MANIFEST)


def test_a_signature_that_was_removed_is_found(release: Release, verify: Verify) -> None:
    digest = release.registry.resolve(REPOSITORY, oci.signature_tag(release.digest))
    assert digest and release.registry.forget(REPOSITORY, digest)
    outcome = verify(release.tags.moving)
    found_by(outcome, "signature", "no signature is there")
    assert outcome.rows("failed") == ["signature"]


def test_a_signature_by_another_key_is_found(release: Release, verify: Verify) -> None:
    name = release.registry.name(REPOSITORY)
    replace_signature(release, *signatures.signature(release.digest, name, OTHER))
    found_by(verify(release.tags.moving), "signature", "1 signature is there, and none of this")


def test_a_signature_for_another_digest_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    name = release.registry.name(REPOSITORY)
    replace_signature(release, *signatures.signature(stranger.digest, name, KEY))
    found_by(verify(release.tags.moving), "signature", f"has signed {stranger.digest} there")


def test_a_signature_whose_payload_was_edited_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    name = release.registry.name(REPOSITORY)
    payload, annotations = signatures.signature(stranger.digest, name, KEY)
    edited = payload.replace(stranger.digest.encode(), release.digest.encode())
    replace_signature(release, edited, annotations)
    found_by(verify(release.tags.moving), "signature", "1 signature is there, and none of this")


def test_a_signature_changed_in_the_storage_is_found(
    release: Release, verify: Verify, damage: Damage
) -> None:
    damage(signature(release).layers[0].digest)
    found_by(verify(release.tags.moving), "signature", "other bytes")


def test_the_signatures_of_others_beside_ours_do_no_harm(release: Release, verify: Verify) -> None:
    assert attach.sign(release.registry, REPOSITORY, release.digest, OTHER)
    assert len(signature(release).layers) == 2
    assert verify(release.tags.moving).code == 0
    assert verify(release.tags.moving, key="other").rows("failed") == ["provenance"]


# The list of attestations


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_a_list_of_attestations_that_was_stripped_is_found(
    release: Release, verify: Verify, how: str
) -> None:
    if how == "emptied":
        release.relist([])
    else:
        digest = release.registry.resolve(REPOSITORY, oci.fallback_tag(release.digest))
        assert digest and release.registry.forget(REPOSITORY, digest)
    found_by(verify(release.tags.moving), "attestations", "no attestations are attached")


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (attestations.REPORT, "report", "smoke report .* named in the provenance, is missing"),
        (attestations.SBOM, "sbom", "SBOM .* named in the provenance, is missing"),
        (attestations.STATEMENT, "provenance", "no provenance is attached"),
    ],
    ids=["report", "sbom", "provenance"],
)
def test_a_attestation_that_is_no_longer_listed_is_found(
    release: Release, verify: Verify, kind: str, check: str, words: str
) -> None:
    entries = release.registry.referrers(REPOSITORY, release.digest)
    release.relist([entry for entry in entries if entry.artifact_type != kind])
    found_by(verify(release.tags.moving), check, words)


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (attestations.REPORT, "report", "smoke report .* named in the provenance, is missing"),
        (attestations.SBOM, "sbom", "SBOM .* named in the provenance, is missing"),
        (attestations.STATEMENT, "provenance", "no provenance is attached"),
    ],
    ids=["report", "sbom", "provenance"],
)
@pytest.mark.parametrize("how", ["gone", "called something else"])
def test_a_attestation_of_ours_that_is_listed_and_cannot_be_had_is_found(
    release: Release, verify: Verify, server: Server, kind: str, check: str, words: str, how: str
) -> None:
    entries = release.registry.referrers(REPOSITORY, release.digest)
    (entry,) = [entry for entry in entries if entry.artifact_type == kind]
    if how == "gone":
        revisions = server.storage / "docker/registry/v2/repositories" / REPOSITORY
        value = entry.digest.removeprefix("sha256:")
        (revisions / "_manifests/revisions/sha256" / value / "link").unlink()
    else:
        other = dataclasses.replace(entry, artifact_type="application/vnd.example.scan+json")
        release.relist([other if e == entry else e for e in entries])
    outcome = verify(release.tags.moving)
    found_by(outcome, check, words)
    assert "others=1" in outcome.text


def test_a_attestation_of_another_image_in_the_list_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    (attestation,) = [p for p in stranger.attestations() if p.artifact_type == attestations.REPORT]
    entries = release.registry.referrers(REPOSITORY, release.digest)
    stay = [entry for entry in entries if entry.artifact_type != attestations.REPORT]
    release.relist([*stay, *stranger.attach(attestation)])
    found_by(
        verify(release.tags.moving), "attestations", f"listed here, and is of {stranger.digest}"
    )


@pytest.mark.parametrize("kind", [attestations.REPORT, attestations.SBOM, attestations.STATEMENT])
def test_a_attestation_changed_in_the_storage_is_found(
    release: Release, verify: Verify, damage: Damage, kind: str
) -> None:
    damage(oci.digest(release.attestation(kind).data))
    found_by(verify(release.tags.moving), "attestations", "other bytes")


# The report


def test_an_edited_report_is_found(release: Release, verify: Verify) -> None:
    good = release.attestation(attestations.REPORT)
    edited = good.data.replace(b"a GPU", b"an H200")
    assert edited != good.data
    release.swap(dataclasses.replace(good, data=edited))
    outcome = verify(release.tags.moving)
    found_by(outcome, "report", "is not one that the provenance names")
    assert outcome.rows("failed") == ["report"]


def test_a_second_report_beside_the_right_one_is_found(release: Release, verify: Verify) -> None:
    good = release.attestation(attestations.REPORT)
    other = dataclasses.replace(good, data=good.data.replace(b"a GPU", b"an H200"))
    entries = release.registry.referrers(REPOSITORY, release.digest)
    release.relist([*entries, *release.attach(other)])
    found_by(verify(release.tags.moving), "report", "is not one that the provenance names")


def test_the_report_of_another_image_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    release.swap(
        Attestation(
            "smoke-report.json", attestations.REPORT, attestations.REPORT, stranger.report()
        )
    )
    found_by(verify(release.tags.moving), "report", "is not one that the provenance names")


ANYTHING = {"name": "anything", "status": "passed", "seconds": 1, "metrics": {}, "reason": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": ["sha256:" + "0" * 64]}, "its report is of other layers"),
        ({"lock_sha256": "0" * 64}, "its report is of another lock"),
        ({"image": "verl-rollout:vllm-0.11"}, "its report is of verl-rollout:vllm-0.11"),
        ({"verdict": "perfect"}, "the smoke report is no report: verdict"),
        ({"checks": [ANYTHING]}, "its report lacks files, distributions, libraries"),
        ({"program": None}, "by earlier checks: by the checks of"),
        ({"engine": {"name": "vllm", "version": "1"}}, "has the engine vllm 1, and the lock vllm"),
    ],
    ids=["layers", "lock", "name", "schema", "anything", "program", "engine"],
)
def test_a_report_of_something_else_is_found_even_where_the_publisher_has_signed_it(
    image: Image,
    here: Registry,
    tmp_path: Path,
    verify: Verify,
    change: dict[str, object],
    words: str,
) -> None:
    mistaken = Release(image, tmp_path / "tars", here)
    mistaken.publish(mistaken.attestations(report=mistaken.report(**change)))
    found_by(verify(mistaken.tags.moving), "report", words)


NOT_SHOWN = {"sleep-2": "it takes two GPUs"}


def test_what_is_proved_in_part_says_so_in_its_manifest(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    part = Release(image, tmp_path / "tars", here, annotations=oci.of_proof(NOT_SHOWN))
    data = reports.alone(image, part.diff_ids, {"sleep-2": "one GPU"})
    part.publish(part.attestations(report=json.dumps(data).encode()))
    outcome = verify(part.tags.moving)
    assert outcome.code == 0, outcome.text
    assert "not_shown=sleep-2" in outcome.text


@pytest.mark.parametrize(
    "annotations",
    [{}, oci.of_proof({"nccl": "why"}), {oci.NOT_SHOWN: "[]"}],
    ids=["silent", "of something else", "no table"],
)
def test_what_is_proved_in_part_and_does_not_say_so_is_found(
    image: Image,
    here: Registry,
    tmp_path: Path,
    verify: Verify,
    annotations: dict[str, str],
) -> None:
    part = Release(image, tmp_path / "tars", here, annotations=annotations)
    data = reports.alone(image, part.diff_ids, {"sleep-2": "one GPU"})
    part.publish(part.attestations(report=json.dumps(data).encode()))
    words = "is no table of texts" if oci.NOT_SHOWN in annotations else "has no reason for sleep-2"
    if annotations == oci.of_proof({"nccl": "why"}):
        words = "has no reason for sleep-2"
    found_by(verify(part.tags.moving), "report", words)


def test_a_failed_report_fails_and_names_the_check(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    broken = Release(image, tmp_path / "tars", here)
    broken.publish(broken.attestations(report=broken.failed_report()))
    found_by(verify(broken.tags.moving), "report", "says that refit failed")


# The SBOM


def edited_sbom(data: bytes) -> bytes:
    """One without the package that it should have named."""
    document = json.loads(data)
    document["components"] = [c for c in document["components"] if c["name"] != "ray"]
    return attestations.encoded(document)


def test_an_edited_sbom_is_found(release: Release, verify: Verify) -> None:
    good = release.attestation(attestations.SBOM)
    release.swap(dataclasses.replace(good, data=edited_sbom(good.data)))
    outcome = verify(release.tags.moving)
    found_by(outcome, "sbom", "is not one that the provenance names")
    assert outcome.rows("failed") == ["sbom"]


def with_sbom(release: Release, data: bytes) -> Release:
    """Published by the owner of the key, with another SBOM than should be."""
    report, right, _ = release.attestations()
    wrong = dataclasses.replace(right, data=data)
    statement = provenance.make(release.image, release.digest, [report, wrong], COMMIT, {})
    signed = Attestation(
        "p", attestations.STATEMENT, attestations.ENVELOPE, signatures.envelope(statement, KEY)
    )
    return release.publish([report, wrong, signed])


def test_an_sbom_of_another_lock_is_found_even_where_the_publisher_has_signed_it(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    mistaken = Release(image, tmp_path / "tars", here)
    data = sbom.make(image, mistaken.digest)
    other = data.replace(mistaken.lock_sha256.encode(), b"0" * 64)
    assert other != data
    with_sbom(mistaken, other)
    found_by(verify(mistaken.tags.moving), "sbom", "made from another lock")


def test_an_sbom_of_another_base_is_found(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    mistaken = Release(image, tmp_path / "tars", here)
    document = json.loads(sbom.make(image, mistaken.digest))
    for entry in document["metadata"]["component"]["properties"]:
        entry["value"] = "0" * 64 if entry["name"] == sbom.BASE_PROPERTY else entry["value"]
    with_sbom(mistaken, attestations.encoded(document))
    found_by(verify(mistaken.tags.moving), "sbom", r"another base\.lock")


def test_an_sbom_of_another_image_is_found_even_where_the_publisher_has_signed_it(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    mistaken = Release(image, tmp_path / "tars", here)
    with_sbom(mistaken, sbom.make(image, "sha256:" + "0" * 64))
    found_by(verify(mistaken.tags.moving), "sbom", "the SBOM is of sha256:0000")


def test_an_sbom_that_leaves_something_out_is_found_by_the_lock_in_the_image(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    mistaken = Release(image, tmp_path / "tars", here)
    with_sbom(mistaken, edited_sbom(sbom.make(image, mistaken.digest)))
    assert verify(mistaken.tags.moving).code == 0, "nothing beside the layers contradicts it"
    outcome = verify(mistaken.tags.moving, "--layers")
    found_by(outcome, "contents", "differ in pkg:pypi/ray@")


# The provenance


def test_an_edited_provenance_is_found(release: Release, verify: Verify) -> None:
    good = release.attestation(attestations.STATEMENT)
    document = json.loads(good.data)
    payload = base64.b64decode(document["payload"]).replace(COMMIT.encode(), b"d" * 40)
    document["payload"] = base64.b64encode(payload).decode()
    release.swap(dataclasses.replace(good, data=attestations.encoded(document)))
    outcome = verify(release.tags.moving)
    found_by(outcome, "provenance", "1 statement is attached, and none signed")
    assert outcome.rows("failed") == ["provenance"]
    assert outcome.rows("unproved") == ["report", "sbom"]
    assert outcome.text.count("not run: provenance failed") == 2


def test_a_provenance_signed_anew_with_another_key_is_found(
    release: Release, verify: Verify
) -> None:
    good = release.attestation(attestations.STATEMENT)
    payload = signatures.Envelope.parse(good.data).payload
    release.swap(dataclasses.replace(good, data=signatures.envelope(payload, OTHER)))
    found_by(verify(release.tags.moving), "provenance", "1 statement is attached, and none signed")


def test_a_provenance_without_a_signature_is_found(release: Release, verify: Verify) -> None:
    bare = release.attestations(key=None)[-1]
    release.swap(bare)
    found_by(verify(release.tags.moving), "provenance", "1 statement is attached, and none signed")


def test_a_provenance_of_another_image_is_found(
    release: Release, stranger: Release, verify: Verify
) -> None:
    release.swap(stranger.attestations()[-1])
    found_by(verify(release.tags.moving), "provenance", f"provenance is of {stranger.digest}")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"reference": "verl-rollout:vllm-0.12"', b'"reference": "a:b"', "it is of a:b"),
        (b"lockfiles/verl-rollout/vllm-0.12.lock", b"lockfiles/x.lock", r"names the lock \(none\)"),
        (b'"gitCommit"', b'"sha1"', "lacks what one of ours says"),
        (
            provenance.STATEMENT_TYPE.encode(),
            b"https://example.com",
            "lacks what one of ours says",
        ),
        (provenance.PREDICATE_TYPE.encode(), b"https://example.com", "1 statement is attached"),
        (b'"dirty": false', b'"dirty": true', "and changes that are in no commit"),
        (
            provenance.LOCAL_BUILDER.encode(),
            b"https://x.example/y",
            "names https://x.example/y as its",
        ),
    ],
    ids=[
        *("name", "lock", "no commit", "no statement", "another predicate", "uncommitted changes"),
        "another builder",
    ],
)
def test_a_provenance_of_something_else_is_found_even_where_the_publisher_has_signed_it(
    release: Release, verify: Verify, old: bytes, new: bytes, words: str
) -> None:
    good = release.attestation(attestations.STATEMENT)
    payload = signatures.Envelope.parse(good.data).payload
    assert old in payload
    data = signatures.envelope(payload.replace(old, new), KEY)
    release.swap(dataclasses.replace(good, data=data))
    found_by(verify(release.tags.moving), "provenance", words)


# The layers


def test_a_layer_that_is_missing_is_found(release: Release, verify: Verify, damage: Damage) -> None:
    digest = release.copy.manifest.layers[0].digest
    damage(digest).unlink()
    found_by(verify(release.tags.moving), "layers", rf"layer 1 of 2 \({digest}\) is not")


def test_a_layer_that_was_cut_short_is_found(
    release: Release, verify: Verify, damage: Damage
) -> None:
    layer = release.copy.manifest.layers[1]
    damage(layer.digest, b"short")
    found_by(verify(release.tags.moving), "layers", f"5 bytes there, .* says {layer.size}")


def test_a_layer_with_a_flipped_bit_is_found_where_layers_are_read(
    release: Release, verify: Verify, damage: Damage
) -> None:
    damage(release.copy.manifest.layers[0].digest)
    assert verify(release.tags.moving).code == 0, "its size is right, and nobody has read it"
    found_by(verify(release.tags.moving, "--layers"), "contents", "other bytes")


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"no tar, and not compressed", "no compressed tar"), (None, "unpacks to sha256")],
    ids=["no tar", "another layer"],
)
def test_a_layer_that_is_not_the_one_of_the_configuration_is_found(
    release: Release,
    stranger: Release,
    here: Registry,
    verify: Verify,
    tmp_path: Path,
    data: bytes | None,
    words: str,
) -> None:
    """As a publisher would make it whose cache of compressed layers is damaged."""
    if data is None:
        copies.push(stranger.copy, here, REPOSITORY)
        here.download(REPOSITORY, stranger.copy.manifest.layers[0].digest, tmp_path / "layer")
        data = (tmp_path / "layer").read_bytes()
    here.push_blob(REPOSITORY, data)
    wrong = oci.describe(data, oci.LAYER)
    config, (_, last) = release.copy.manifest.config, release.copy.manifest.layers
    manifest = oci.manifest(config, [wrong, last])
    release.copy = dataclasses.replace(release.copy, data=manifest)
    attached = release.attestations()
    here.push_manifest(REPOSITORY, release.tags.immutable, manifest, oci.MANIFEST)
    attach.attach(here, REPOSITORY, release.copy.descriptor, attached, KEY)
    attach.sign(here, REPOSITORY, release.digest, KEY)
    assert verify(release.digest).code == 0
    found_by(verify(release.digest, "--layers"), "contents", words)


def test_an_image_that_holds_another_lock_than_it_names_is_found(
    release: Release, image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    """Signed by its publisher, and with attestations of the lock that it names."""
    text = image.lock.read_bytes()
    image.lock.write_bytes(text.replace(b"2.52.1", b"2.52.2"))
    other = Release(image, tmp_path / "tars", here)
    image.lock.write_bytes(text)
    layers = [release.copy.manifest.layers[0], other.copy.manifest.layers[1]]
    copies.push(other.copy, here, REPOSITORY)
    labels = json.loads(release.config)
    labels["rootfs"]["diff_ids"][1] = other.diff_ids[1]
    config = json.dumps(labels).encode()
    here.push_blob(REPOSITORY, config)
    manifest = oci.manifest(oci.describe(config, oci.CONFIG), layers)
    release.copy = dataclasses.replace(release.copy, data=manifest)
    release.diff_ids = labels["rootfs"]["diff_ids"]
    here.push_manifest(REPOSITORY, release.tags.immutable, manifest, oci.MANIFEST)
    attach.attach(here, REPOSITORY, release.copy.descriptor, release.attestations(), KEY)
    attach.sign(here, REPOSITORY, release.digest, KEY)
    assert verify(release.digest).code == 0
    found_by(verify(release.digest, "--layers"), "contents", "hold another .*requirements.lock")


# What cannot be shown is not called proved


def test_without_a_key_nothing_is_proved_and_the_rest_is_checked(
    release: Release, verify: Verify
) -> None:
    outcome = verify(release.tags.moving, key="")
    assert outcome.code == 3
    assert outcome.rows("unproved") == ["signature", "provenance"]
    assert outcome.rows("passed") == [c for c in ALL if c not in ("signature", "provenance")]
    assert "--key FILE.pub" in outcome.text
    assert outcome.text.rstrip().endswith(": unproved")


def test_without_a_key_a_report_of_another_image_fails_all_the_same(
    release: Release, stranger: Release, verify: Verify
) -> None:
    """Whoever replaces the report can write a provenance for it; but not make it fit."""
    attached = release.attestations(report=stranger.report(), key=None)
    release.relist(release.attach(*attached))
    found_by(verify(release.tags.moving, key=""), "report", "its report is of other layers")


def test_another_key_than_the_publishers_proves_nothing(release: Release, verify: Verify) -> None:
    outcome = verify(release.tags.moving, key="other")
    assert outcome.code == 1
    assert outcome.rows("failed") == ["signature", "provenance"]
    assert outcome.rows("unproved") == ["report", "sbom"], "nobody vouches for them"


def test_layers_that_nobody_has_signed_are_not_unpacked(
    release: Release, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = release.registry.name(REPOSITORY)
    replace_signature(release, *signatures.signature(release.digest, name, OTHER))
    monkeypatch.setattr(unpacking, "unpacked", refused)
    outcome = verify(release.tags.moving, "--layers")
    assert outcome.rows("failed") == ["signature"]
    assert outcome.rows("unproved") == ["contents"]
    assert "not run: signature failed" in outcome.text


@pytest.mark.parametrize(("key", "code"), [("key", 1), ("", 3)])
def test_an_image_that_was_never_signed_is_not_proved(
    image: Image, here: Registry, tmp_path: Path, verify: Verify, key: str, code: int
) -> None:
    unsigned = Release(image, tmp_path / "tars", here).publish(key=None)
    outcome = verify(unsigned.tags.moving, key=key)
    assert outcome.code == code
    status = "failed" if code == 1 else "unproved"
    assert outcome.rows(status) == ["signature", "provenance"]
    attestations_of_nobody = outcome.rows("unproved" if code == 1 else "passed")
    assert {"report", "sbom"} <= set(attestations_of_nobody)


def test_an_image_that_was_published_unproved_is_called_that(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    draft = Release(image, tmp_path / "tars", here, annotations={oci.UNPROVED: "true"})
    draft.publish(draft.attestations(report=None))
    for name in (draft.tags.immutable, draft.tags.moving):
        assert name.endswith("-unproved")
        outcome = verify(name)
        assert outcome.code == 3, outcome.text
        assert outcome.rows("unproved") == ["report"]
        assert "--unproved" in outcome.text


def test_a_report_that_is_attached_later_does_not_prove_what_was_published_unproved(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    draft = Release(image, tmp_path / "tars", here, annotations={oci.UNPROVED: "true"})
    draft.publish(draft.attestations(report=draft.report()))
    outcome = verify(draft.tags.immutable)
    assert outcome.code == 3, outcome.text
    assert outcome.rows("unproved") == ["report"]


def test_the_name_of_a_proved_image_does_not_lead_to_an_unproved_one(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    draft = Release(image, tmp_path / "tars", here, annotations={oci.UNPROVED: "true"})
    draft.publish(draft.attestations(report=None))
    name = draft.tags.immutable.removesuffix("-unproved")
    assert name != draft.tags.immutable
    draft.tag(name, draft)
    found_by(verify(name), "tags", "calls itself")


def test_a_report_that_proves_nothing_proves_nothing(
    image: Image, here: Registry, tmp_path: Path, verify: Verify
) -> None:
    weak = Release(image, tmp_path / "tars", here)
    weak.publish(weak.attestations(report=weak.report(checks=[], verdict="unproved")))
    outcome = verify(weak.tags.moving)
    assert outcome.code == 3, outcome.text
    assert outcome.rows("unproved") == ["report"]


# What is no verdict on an image


def test_a_registry_that_does_not_answer_is_no_verdict(
    release: Release, verify: Verify, server: Server
) -> None:
    server.kill()
    with pytest.raises(Problem, match=r"the connection to .* broke") as caught:
        verify(release.tags.moving)
    assert caught.value.code == 3


@pytest.mark.parametrize("name", ["config", "signature", "attestations", "layers", "contents"])
def test_a_registry_that_goes_away_in_the_middle_is_no_verdict(
    release: Release,
    verify: Verify,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    check = verify_published.CHECKS[name]

    def run(image: Published) -> Metrics:
        server.kill()
        return check(image)

    monkeypatch.setitem(verify_published.CHECKS, name, run)
    with pytest.raises(Problem, match=r"the connection to .* broke") as caught:
        verify(release.tags.moving, "--layers")
    assert caught.value.code == 3
    text = capsys.readouterr().out
    assert re.search("^manifest +passed", text, re.MULTILINE), "the run had begun"
    assert "failed" not in text


def test_an_outage_ends_in_one_sentence_and_exit_code_3(
    release: Release, here: Registry, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kill()
    name = here.reference(REPOSITORY, release.tags.moving)
    assert host.guarded(verify_published.main, [name]) == 3
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert re.match(r"error: the connection to .* broke", said.err)
    assert said.out.splitlines()[0].endswith(": verify-published")
    assert "check  " not in said.out, "no table was begun"


def test_credentials_that_are_refused_are_no_verdict(
    servers: Callable[..., Server], tmp_path: Path
) -> None:
    address = servers(credentials=True).address
    wrong = base64.b64encode(f"{USER}:not {PASSWORD}".encode()).decode()
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {address: {"auth": wrong}}}))
    with pytest.raises(Problem, match="refuses these credentials") as caught:
        verify_published.main([f"{address}/a:b", "--authfile", str(tmp_path / "auth.json")])
    assert caught.value.code == 3


def test_a_registry_with_tls_and_credentials_is_verified_like_any_other(
    servers: Callable[..., Server], certificate: object, image: Image, tmp_path: Path
) -> None:
    server = servers(certificate=certificate, credentials=True)
    good = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {server.address: {"auth": good}}}))
    folder = tmp_path / "certificate"
    there = Registry(f"{server.address}/team", authfile=authfile, cert_dir=folder)
    release = Release(image, tmp_path / "tars", there).publish()
    (tmp_path / "key.pub").write_bytes(KEY.public.pem)
    options = ["--key", str(tmp_path / "key.pub"), "--authfile", str(authfile)]
    name = there.reference(REPOSITORY, release.tags.moving)
    assert verify_published.main([name, *options, "--cert-dir", str(folder), "--layers"]) == 0
    with pytest.raises(Problem, match="TLS"):
        verify_published.main([name, *options])

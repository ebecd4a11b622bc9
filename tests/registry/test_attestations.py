"""What is published is read and believed, or not, by tools that know nothing of this project.

skopeo (containers/image, as in podman and CRI-O) checks the signature by a policy, and reads every
attestation; openssl checks the provenance. Debian's own skopeo finds the signature and then refuses
every image ("Debian-local change: sigstore disabled"): there the tests that need more are skipped,
unless ROLLOUT_TEST_SKOPEO names another skopeo.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from images.catalog import Image
from images.publishing import attach, attestations, copies, keys, oci, signatures
from images.publishing.registry import Registry
from tests.conftest import Checkout

from .conftest import REPOSITORY
from .published import KEY, OTHER, Release
from .server import Server

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def image(checkout: Checkout) -> Image:
    return checkout.image()


@pytest.fixture
def release(image: Image, here: Registry, tmp_path: Path) -> Release:
    """What was published, with all attestations and a signature."""
    return Release(image, tmp_path / "tars", here).publish()


Look = Callable[..., Result]


@pytest.fixture
def look(here: Registry, tmp_path: Path) -> Look:
    """``skopeo copy`` under a policy that takes images with a signature of the key alone."""
    attachments = tmp_path / "registries.d"
    attachments.mkdir()
    settings = {"docker": {here.host: {"use-sigstore-attachments": True}}}
    (attachments / "test.yaml").write_text(json.dumps(settings))  # JSON is YAML too

    def copy(reference: str, key: keys.Key = KEY) -> Result:
        public = tmp_path / "key.pub"
        public.write_bytes(key.public.pem)
        rule = {
            "type": "sigstoreSigned",
            "keyPath": str(public),
            # As everywhere with signatures of cosign's form, which name no tag.
            "signedIdentity": {"type": "matchRepository"},
        }
        policy = {
            "default": [{"type": "reject"}],
            "transports": {"docker": {here.name(REPOSITORY): [rule]}},
        }
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        shutil.rmtree(tmp_path / "pulled", ignore_errors=True)
        argv = [
            *(os.environ.get("ROLLOUT_TEST_SKOPEO", "skopeo"), "copy", "--src-tls-verify=false"),
            *("--policy", str(tmp_path / "policy.json"), "--registries.d", str(attachments)),
            *(f"docker://{here.reference(REPOSITORY, reference)}", f"dir:{tmp_path / 'pulled'}"),
        ]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    return copy


@pytest.fixture
def pull(release: Release, look: Look) -> Look:
    """The same, where this skopeo can check signatures at all; it finds them in any case."""
    said = look(release.digest).stderr
    if "sigstore disabled" in said:
        assert said.count("sigstore disabled") == 1, "for the one signature that it has found"
        pytest.skip("this skopeo has sigstore disabled (Debian); see ROLLOUT_TEST_SKOPEO")
    return look


def skopeo(*argv: str) -> bytes:
    """What a user of skopeo gets."""
    return subprocess.run(["skopeo", *argv], capture_output=True, check=True).stdout


# The signature


@pytest.mark.parametrize("by", ["digest", "alias", "immutable tag"])
def test_skopeo_pulls_a_signed_image_under_a_policy(
    release: Release, pull: Look, tmp_path: Path, by: str
) -> None:
    reference = {
        "digest": release.digest,
        "alias": release.tags.moving,
        "immutable tag": release.tags.immutable,
    }[by]
    done = pull(reference)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pulled/manifest.json").read_bytes() == release.copy.data


def test_skopeo_refuses_it_with_another_key(release: Release, pull: Look) -> None:
    done = pull(release.digest, OTHER)
    assert done.returncode != 0
    assert "cryptographic signature verification failed" in done.stderr


def test_skopeo_refuses_an_image_that_is_not_signed(
    image: Image, here: Registry, tmp_path: Path, look: Look
) -> None:
    unsigned = Release(image, tmp_path / "tars", here).publish(key=None)
    done = look(unsigned.digest)
    assert done.returncode != 0
    assert "signature was required, but no signature exists" in done.stderr


def test_skopeo_refuses_another_image_under_the_signed_tag(
    release: Release, image: Image, here: Registry, tmp_path: Path, pull: Look
) -> None:
    other = Release(image, tmp_path / "tars", here, seed="other")
    copies.push(other.copy, here, REPOSITORY)
    release.tag(release.tags.moving, other)
    assert pull(release.tags.moving).returncode != 0
    assert pull(release.tags.immutable).returncode == 0, "that one was left alone"


def test_skopeo_refuses_the_signature_of_another_image(
    release: Release, image: Image, here: Registry, tmp_path: Path, pull: Look
) -> None:
    other = Release(image, tmp_path / "tars", here, seed="other")
    copies.push(other.copy, here, REPOSITORY)
    found = here.manifest(REPOSITORY, oci.signature_tag(release.digest))
    assert found
    here.push_manifest(REPOSITORY, oci.signature_tag(other.digest), found[0], oci.MANIFEST)
    here.push_manifest(REPOSITORY, "other", other.copy.data, oci.MANIFEST)
    done = pull("other")
    assert done.returncode != 0
    assert release.digest in done.stderr, "what the signature is of"


def test_skopeo_refuses_an_edited_signature(
    release: Release, server: Server, here: Registry, pull: Look
) -> None:
    found = here.manifest(REPOSITORY, oci.signature_tag(release.digest))
    assert found
    value = oci.parse(found[0]).layers[0].digest.removeprefix("sha256:")
    path = server.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"
    path.write_bytes(path.read_bytes().replace(b"127.0.0.1", b"127.0.0.2"))
    assert pull(release.digest).returncode != 0


def test_one_of_several_signatures_is_enough_for_skopeo(
    release: Release, here: Registry, pull: Look
) -> None:
    attach.sign(here, REPOSITORY, release.digest, OTHER)
    for key in (KEY, OTHER):
        done = pull(release.digest, key)
        assert done.returncode == 0, done.stderr


# The attestations


def test_skopeo_lists_the_attestations_of_a_digest_and_reads_each(
    release: Release, here: Registry, tmp_path: Path
) -> None:
    """The commands of the README: the list is under a tag made of the digest."""
    name = f"docker://{here.name(REPOSITORY)}"
    tag = release.digest.replace(":", "-")
    listed = json.loads(skopeo("inspect", "--tls-verify=false", "--raw", f"{name}:{tag}"))
    assert {e["artifactType"] for e in listed["manifests"]} == {
        attestations.REPORT,
        attestations.SBOM,
        attestations.STATEMENT,
    }
    wanted = {
        attestation.artifact_type: attestation
        for attestation in release.attestations(report=release.report())
    }
    for entry in listed["manifests"]:
        folder = tmp_path / entry["digest"].removeprefix("sha256:")
        source = f"{name}@{entry['digest']}"
        skopeo("copy", "--src-tls-verify=false", source, f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert manifest["subject"]["digest"] == release.digest
        (layer,) = manifest["layers"]
        data = (folder / layer["digest"].removeprefix("sha256:")).read_bytes()
        attestation = wanted[entry["artifactType"]]
        assert layer["annotations"] == {oci.TITLE: attestation.name}
        assert layer["mediaType"] == attestation.media_type
        if entry["artifactType"] == attestations.SBOM:
            assert data == attestation.data


def test_openssl_checks_the_provenance_that_skopeo_reads(
    release: Release, here: Registry, tmp_path: Path
) -> None:
    data = release.attestation(attestations.STATEMENT).data
    envelope: dict[str, Any] = json.loads(data)
    opened = signatures.Envelope.parse(data)
    head = f"DSSEv1 {len(envelope['payloadType'])} {envelope['payloadType']} {len(opened.payload)} "
    (tmp_path / "signed").write_bytes(head.encode() + opened.payload)
    (tmp_path / "signature").write_bytes(opened.signatures[0])
    for key, code in ((KEY, 0), (OTHER, 1)):
        (tmp_path / "pub").write_bytes(key.public.pem)
        argv = ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "signature", "signed"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == code
    subject = json.loads(opened.payload)["subject"][0]
    raw = skopeo(
        *("inspect", "--tls-verify=false", "--raw"),
        f"docker://{here.reference(REPOSITORY, release.tags.moving)}",
    )
    assert subject["digest"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_publishing_again_finds_all_attestations_there(release: Release, server: Server) -> None:
    before = server.blobs(), server.tags(REPOSITORY)
    release.publish(release.attestations(report=release.report(seconds=9.0), commit="d" * 40))
    assert (server.blobs(), server.tags(REPOSITORY)) == before

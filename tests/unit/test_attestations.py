"""The attestations of an image: what they say, the same bytes every time, and who signed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cyclonedx.model.bom import Bom

from images import host
from images.building import build
from images.catalog import Image
from images.locking import base, lock
from images.proving import standing
from images.publishing import attestations
from images.publishing.attestations import Key
from rollout.problem import Problem
from tests.conftest import VERSIONS, Checkout, sha256

DIGEST = "sha256:" + "1" * 64
COMMIT = "c" * 40
REPORT = b'{"verdict": "proved"}'
KEY = Key(ec.generate_private_key(ec.SECP256R1()))
OTHER = Key(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def image(checkout: Checkout) -> Image:
    return checkout.image()


def made(image: Image, digest: str = DIGEST, **given: Any) -> list[attestations.Attestation]:
    options = {"report": REPORT, "key": KEY, "commit": COMMIT, **given}
    return attestations.attestations(image, digest=digest, **options)


def statement(image: Image, **given: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made(image, **{"key": None, **given})[-1].data)
    return found


# All of them


def test_report_contents_and_provenance_travel_with_an_image(image: Image) -> None:
    assert [(p.name, p.artifact_type, p.media_type) for p in made(image)] == [
        ("smoke-report.json", attestations.REPORT, attestations.REPORT),
        ("sbom.cdx.json", attestations.SBOM, attestations.SBOM),
        ("provenance.dsse.json", attestations.STATEMENT, attestations.ENVELOPE),
    ]
    assert made(image)[0].data == REPORT, "as the run wrote it, to the byte"


def test_the_same_image_commit_and_key_give_the_same_bytes(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(image)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert made(image) == first


def test_without_a_key_the_provenance_is_a_bare_statement(image: Image) -> None:
    attestation = made(image, key=None)[-1]
    assert (attestation.name, attestation.media_type) == ("provenance.json", attestations.STATEMENT)
    assert json.loads(attestation.data)["_type"] == "https://in-toto.io/Statement/v1"
    signed = attestations.Envelope.parse(made(image)[-1].data)
    assert signed.payload == attestation.data, "a signature adds nothing to what is said"


def test_an_image_without_a_report_names_none(image: Image) -> None:
    found = made(image, report=None)
    assert [attestation.artifact_type for attestation in found] == [
        attestations.SBOM,
        attestations.STATEMENT,
    ]
    byproducts = statement(image, report=None)["predicate"]["runDetails"]["byproducts"]
    assert [entry["name"] for entry in byproducts] == ["sbom.cdx.json"]


# What is in it


def bill(image: Image, digest: str = DIGEST) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(attestations.sbom(image, digest))
    return found


def test_every_distribution_and_debian_package_is_named_with_its_sha256(image: Image) -> None:
    debs = base.read(base.LOCK).debs
    expected = {(d.name, d.version, d.sha256) for d in debs}
    expected |= {(name, version, sha256(name + version)) for name, version in VERSIONS.items()}
    components = bill(image)["components"]
    found = {(c["name"], c["version"], c["hashes"][0]["content"]) for c in components}
    assert found == expected
    assert len(components) == len(expected)
    assert {c["hashes"][0]["alg"] for c in components} == {"SHA-256"}


def test_package_urls_are_those_of_the_specification(checkout: Checkout) -> None:
    image = checkout.image({"expect": "{}"}, versions={"torch": "2.9.0+cpu", "vllm": "0.12.0"})
    found = {c["name"]: c["purl"] for c in bill(image)["components"]}
    assert found["torch"] == "pkg:pypi/torch@2.9.0%2Bcpu"
    deb = next(d for d in base.read(base.LOCK).debs if d.name == "libstdc++6")
    version = deb.version.replace("+", "%2B")
    assert found["libstdc++6"] == (
        f"pkg:deb/debian/libstdc%2B%2B6@{version}?arch=amd64&distro=bookworm"
    )
    every = next(d for d in base.read(base.LOCK).debs if d.path.endswith("_all.deb"))
    assert "arch=all" in found[every.name]


def test_an_sbom_holds_no_moment_and_no_address(image: Image) -> None:
    data = bill(image)
    assert set(data) == {
        *("$schema", "bomFormat", "specVersion", "version", "serialNumber"),
        *("metadata", "components"),
    }
    assert set(data["metadata"]) == {"component"}
    keys = {"bom-ref", "hashes", "name", "purl", "type", "version"}
    assert {frozenset(c) for c in data["components"]} == {frozenset(keys)}


def test_an_sbom_is_of_one_digest_and_names_its_locks(image: Image) -> None:
    data = bill(image)
    whole = data["metadata"]["component"]
    assert (whole["name"], whole["version"], whole["type"]) == ("verl-rollout", DIGEST, "container")
    assert {p["name"]: p["value"] for p in whole["properties"]} == {
        "rollout:lock.sha256": host.sha256(image.lock),
        "rollout:base.lock.sha256": host.sha256(base.LOCK),
    }
    other = bill(image, "sha256:" + "2" * 64)
    assert other["serialNumber"] != data["serialNumber"]
    assert other["components"] == data["components"]


def test_the_library_reads_its_own_sbom_back(image: Image) -> None:
    bom = Bom.from_json(data=bill(image))  # type: ignore[attr-defined]
    assert len(bom.components) == len(VERSIONS) + len(base.read(base.LOCK).debs)
    assert bom.metadata.component.purl.to_string().startswith("pkg:oci/verl-rollout@sha256:1")


def test_an_sbom_is_valid_by_the_schema_of_cyclonedx_1_6(image: Image) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(attestations.sbom(image, DIGEST).decode()) is None
    broken = bill(image)
    broken["components"][0]["purl"] = 7
    assert validator.validate_str(json.dumps(broken)) is not None


# How it was made


def test_a_provenance_names_what_the_image_was_made_from(image: Image) -> None:
    data = statement(image)
    assert data["subject"] == [{"name": image.reference, "digest": {"sha256": "1" * 64}}]
    assert data["predicateType"] == "https://slsa.dev/provenance/v1"
    definition = data["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"reference": "verl-rollout:vllm-0.12"}
    assert definition["internalParameters"] == {
        "inputs": build.inputs(image),
        "promised": {
            "checks": list(standing.promised(image)),
            "transports": ["cuda-ipc"],
            "program": standing.program_of(image),
        },
    }
    *files, source = definition["resolvedDependencies"]
    assert {entry["name"]: entry["digest"] for entry in files} == {
        name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in {
            "images/catalog/verl-rollout/vllm-0.12.toml": image.path,
            "lockfiles/verl-rollout/vllm-0.12.lock": image.lock,
            "lockfiles/base.lock": base.LOCK,
            "images/recipes/Dockerfile": image.dockerfile,
        }.items()
    }
    assert source["digest"] == {"gitCommit": COMMIT}


def test_a_provenance_names_report_and_sbom_by_their_sha256(image: Image) -> None:
    found = made(image)
    byproducts = statement(image)["predicate"]["runDetails"]["byproducts"]
    assert byproducts == [
        {
            "name": attestation.name,
            "mediaType": attestation.media_type,
            "digest": {"sha256": hashlib.sha256(attestation.data).hexdigest()},
        }
        for attestation in found[:2]
    ]


@pytest.mark.parametrize(("commit", "dirty"), [(COMMIT, False), (f"{COMMIT}-dirty", True)])
def test_a_dirty_checkout_is_said_to_be_one(image: Image, commit: str, dirty: bool) -> None:
    source = statement(image, commit=commit)["predicate"]["buildDefinition"][
        "resolvedDependencies"
    ][-1]
    assert source["annotations"] == {"dirty": dirty}
    assert source["digest"] == {"gitCommit": COMMIT}


def test_in_ci_the_workflow_is_the_builder_and_elsewhere_a_checkout(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    local = statement(image)["predicate"]
    assert local["runDetails"]["builder"] == {"id": "urn:verl-rollout:checkout"}
    assert "uri" not in local["buildDefinition"]["resolvedDependencies"][-1]
    run = {
        "ACTIONS": "true",
        "SERVER_URL": "https://forge.example",
        "REPOSITORY": "team/images",
        "WORKFLOW_REF": "team/images/.github/workflows/publish.yml@refs/tags/v1",
        "REF": "refs/tags/v1",
        "RUN_ID": "17",
        "RUN_ATTEMPT": "2",
    }
    for name, value in run.items():
        monkeypatch.setenv(f"GITHUB_{name}", value)
    there = statement(image)["predicate"]
    assert there["runDetails"]["builder"]["id"] == (
        "https://forge.example/team/images/.github/workflows/publish.yml@refs/tags/v1"
    )
    assert there["runDetails"]["metadata"]["invocationId"] == (
        "https://forge.example/team/images/actions/runs/17/attempts/2"
    )
    source = there["buildDefinition"]["resolvedDependencies"][-1]
    assert source["uri"] == "git+https://forge.example/team/images@refs/tags/v1"
    # A release calls the workflow that builds: it is that one which cosign has a certificate of.
    monkeypatch.setenv(
        "GITHUB_WORKFLOW_REF", "team/images/.github/workflows/release.yml@refs/tags/v1"
    )
    monkeypatch.setenv("ROLLOUT_WORKFLOW", ".github/workflows/publish.yml")
    assert statement(image)["predicate"]["runDetails"]["builder"] == there["runDetails"]["builder"]


# The commit

Git = Callable[..., str]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """Runs git in a new repository with one commit, whatever the settings of this host."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    folder = tmp_path / "clone"
    folder.mkdir()

    def run(*argv: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        command = ["git", "-C", str(folder), *who, *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "--quiet")
    (folder / "file").write_text("1")
    (folder / ".gitignore").write_text("/build/\n")
    run("add", ".")
    run("commit", "--quiet", "-m", "one")
    return run


def test_the_commit_is_that_of_the_checkout(git: Git, tmp_path: Path) -> None:
    assert attestations.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD")
    (tmp_path / "clone/build").mkdir()
    (tmp_path / "clone/build/report.json").write_text("ignored by git: not a difference")
    assert attestations.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["file", "new"])
def test_a_changed_or_a_new_file_makes_a_checkout_dirty(
    git: Git, tmp_path: Path, name: str
) -> None:
    (tmp_path / "clone" / name).write_text("2")
    assert attestations.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.usefixtures("git")
def test_an_unpacked_tree_inside_another_checkout_does_not_get_its_commit(tmp_path: Path) -> None:
    inner = tmp_path / "clone" / "unpacked"
    inner.mkdir()
    with pytest.raises(Problem, match="no checkout of git, and the provenance") as caught:
        attestations.checkout_commit(inner)
    assert caught.value.code == 3


def test_a_tree_without_git_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="not a git repository") as caught:
        attestations.checkout_commit(tmp_path)
    assert caught.value.code == 3
    assert "publish from a clone" in caught.value.sentence


def test_a_repository_without_a_commit_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    with pytest.raises(Problem, match="no checkout of git"):
        attestations.checkout_commit(tmp_path)


# Keys


def test_a_new_key_is_for_its_owner_alone_and_has_a_public_half(tmp_path: Path) -> None:
    public = attestations.new_key(tmp_path / "release")
    assert public == tmp_path / "release.pub"
    assert stat.S_IMODE((tmp_path / "release").stat().st_mode) == 0o600
    key = attestations.read_key(tmp_path / "release")
    assert attestations.read_public_key(public) == key.public
    assert key.public.accepts(key.sign(b"text"), b"text")
    assert not key.public.accepts(key.sign(b"text"), b"test")
    assert not OTHER.public.accepts(key.sign(b"text"), b"text")


@pytest.mark.parametrize("there", ["release", "release.pub"])
def test_no_key_is_ever_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("dear to somebody")
    with pytest.raises(Problem, match=f"{there} exists and is not overwritten") as caught:
        attestations.new_key(tmp_path / "release")
    assert caught.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "dear to somebody"


def test_a_place_that_takes_no_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot be written") as caught:
        attestations.new_key(tmp_path / "no" / "folder")
    assert caught.value.code == 2


def test_a_password_closes_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "release"
    monkeypatch.setenv(attestations.PASSWORD, "secret")
    attestations.new_key(file)
    assert attestations.read_key(file).public == attestations.read_public_key(
        tmp_path / "release.pub"
    )
    for password, words in ((None, "has a password; put it into"), ("wrong", "is not opened by")):
        if password is None:
            monkeypatch.delenv(attestations.PASSWORD)
        else:
            monkeypatch.setenv(attestations.PASSWORD, password)
        with pytest.raises(Problem, match=words) as caught:
            attestations.read_key(file)
        assert caught.value.code == 2
        assert "ROLLOUT_KEY_PASSWORD" in caught.value.sentence
        assert "secret" not in caught.value.sentence


def test_a_password_that_nothing_asks_for_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(attestations.PASSWORD, raising=False)
    attestations.new_key(tmp_path / "release")
    monkeypatch.setenv(attestations.PASSWORD, "of another key")
    assert attestations.read_key(tmp_path / "release").public


def pem(key: Any) -> bytes:
    found: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return found


def public_pem(key: Any) -> bytes:
    found: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return found


RSA = rsa.generate_private_key(65537, 2048)
P384 = ec.generate_private_key(ec.SECP384R1())
COSIGN = b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n"
OLD_COSIGN = b"-----BEGIN ENCRYPTED COSIGN PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read"),
        (b"", "is no key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is no key in PEM"),
        (pem(RSA), "not an ECDSA key on P-256"),
        (pem(P384), "not an ECDSA key on P-256"),
        (KEY.public.pem, "is a public key"),
        (COSIGN, "cosign's own encrypted form"),
        (OLD_COSIGN, "cosign's own encrypted form"),
    ],
    ids=["none", "empty", "broken", "rsa", "p384", "public", "cosign", "old cosign"],
)
def test_what_is_no_key_to_sign_with_is_told_in_one_sentence(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    file = tmp_path / "key"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Problem, match=words) as caught:
        attestations.read_key(file)
    assert caught.value.code == 2
    assert str(file) in caught.value.sentence


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read"),
        (b"ssh-ed25519 AAAA", "no public key in PEM"),
        (public_pem(RSA), "not an ECDSA key on P-256"),
        (public_pem(P384), "not an ECDSA key on P-256"),
        (pem(KEY.value), "is a private key"),
        (COSIGN, "is a private key"),
    ],
    ids=["none", "ssh", "rsa", "p384", "private", "cosign"],
)
def test_what_is_no_key_to_check_with_is_told_in_one_sentence(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    file = tmp_path / "key.pub"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Problem, match=words) as caught:
        attestations.read_public_key(file)
    assert caught.value.code == 2
    assert "--new-key" not in caught.value.sentence


def test_who_lacks_a_key_is_told_where_keys_of_that_kind_come_from(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"cannot be read .*; ask the publisher for the public key"):
        attestations.read_public_key(tmp_path / "missing.pub")
    with pytest.raises(Problem, match=r"cannot be read .*; make one with .*--new-key FILE"):
        attestations.read_key(tmp_path / "missing")


# Signatures


def test_what_is_signed_is_what_the_specification_of_dsse_says() -> None:
    """The test vector of DSSE v1.0: its key, its payload, its signature (r and s side by side)."""
    kind, body = "http://example.com/HelloWorld", b"hello world"
    assert attestations.pae(kind, body) == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    number = 97358161215184420915383655311931858321456579547487070936769975997791359926199
    key = Key(ec.derive_private_key(number, ec.SECP256R1()))
    r, s = utils.decode_dss_signature(key.sign(attestations.pae(kind, body)))
    assert base64.b64encode(r.to_bytes(32) + s.to_bytes(32)).decode() == (
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    )


def test_lengths_are_of_bytes_not_of_characters() -> None:
    assert attestations.pae("ä", "ö!".encode()) == "DSSEv1 2 ä 3 ö!".encode()


def sealed(image: Image) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made(image)[-1].data)
    return found


def read(document: object) -> attestations.Envelope:
    return attestations.Envelope.parse(json.dumps(document).encode())


def test_an_envelope_holds_for_its_payload_its_type_and_its_key_alone(image: Image) -> None:
    good = sealed(image)
    assert read(good).signed_by(KEY.public)
    assert not read(good).signed_by(OTHER.public)
    edited = base64.b64decode(good["payload"]).replace(COMMIT.encode(), b"d" * 40)
    assert edited != base64.b64decode(good["payload"])
    for change in (
        {"payload": base64.b64encode(edited).decode()},
        {"payloadType": "text/plain"},
        {"signatures": []},
        {"signatures": [{"sig": base64.b64encode(b"no signature").decode()}]},
    ):
        assert not read({**good, **change}).signed_by(KEY.public), change


def test_one_good_signature_among_others_is_enough(image: Image) -> None:
    good = sealed(image)
    stranger = {"keyid": "somebody", "sig": base64.b64encode(OTHER.sign(b"x")).decode()}
    both = {**good, "signatures": [stranger, *good["signatures"]]}
    assert read(both).signed_by(KEY.public)


def test_both_alphabets_of_base64_are_read(image: Image) -> None:
    good = sealed(image)
    signature = good["signatures"][0]["sig"].replace("+", "-").replace("/", "_")
    payload = good["payload"].replace("+", "-").replace("/", "_")
    assert read({**good, "payload": payload, "signatures": [{"sig": signature}]}).signed_by(
        KEY.public
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"payload": "e30=", "payloadType": "x"}',
        b'{"payload": 7, "payloadType": "x", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "x", "signatures": [7]}',
        b'{"payload": "no base64!", "payloadType": "x", "signatures": []}',
        b'{"payload": "\xff", "payloadType": "x", "signatures": []}',
    ],
)
def test_what_is_no_envelope_is_none(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a DSSE envelope"):
        attestations.Envelope.parse(data)


def test_a_signature_is_the_payload_of_cosign() -> None:
    payload, annotations = attestations.signature(DIGEST, "127.0.0.1:5000/team/verl-rollout", KEY)
    assert json.loads(payload) == {
        "critical": {
            "identity": {"docker-reference": "127.0.0.1:5000/team/verl-rollout"},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    assert set(annotations) == {"dev.cosignproject.cosign/signature"}
    assert attestations.signature(DIGEST, "127.0.0.1:5000/team/verl-rollout", KEY) == (
        payload,
        annotations,
    )


def test_a_signature_holds_for_one_digest_and_one_key() -> None:
    payload, annotations = attestations.signature(DIGEST, "host/name", KEY)
    assert attestations.signed_digest(payload, annotations, KEY.public) == DIGEST
    assert attestations.signed_digest(payload, annotations, OTHER.public) is None
    edited = payload.replace(b"1" * 64, b"2" * 64)
    assert attestations.signed_digest(edited, annotations, KEY.public) is None
    for broken in ({}, {attestations.SIGNATURE: ""}, {attestations.SIGNATURE: "ä?"}):
        assert attestations.signed_digest(payload, broken, KEY.public) is None


@pytest.mark.parametrize(
    "payload",
    [b"{}", b"[]", b"text", b'{"critical": {"type": "another", "image": {}}}'],
)
def test_something_else_that_the_key_has_signed_vouches_for_no_image(payload: bytes) -> None:
    annotations = {attestations.SIGNATURE: base64.b64encode(KEY.sign(payload)).decode()}
    with pytest.raises(ValueError, match="no image"):
        attestations.signed_digest(payload, annotations, KEY.public)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_openssl_accepts_what_is_signed_here(image: Image, tmp_path: Path) -> None:
    (tmp_path / "pub").write_bytes(KEY.public.pem)
    (tmp_path / "other").write_bytes(OTHER.public.pem)
    payload, annotations = attestations.signature(DIGEST, "host/name", KEY)
    envelope = read(sealed(image))
    signed = {
        payload: base64.b64decode(annotations[attestations.SIGNATURE]),
        attestations.pae(envelope.kind, envelope.payload): envelope.signatures[0],
    }
    for data, signature in signed.items():
        (tmp_path / "data").write_bytes(data)
        (tmp_path / "sig").write_bytes(signature)
        codes = []
        for name in ("pub", "other"):
            argv = ["openssl", "dgst", "-sha256", "-verify", name, "-signature", "sig", "data"]
            codes.append(subprocess.run(argv, cwd=tmp_path, capture_output=True).returncode)
        assert codes == [0, 1]


def test_every_image_of_the_catalog_has_its_attestations() -> None:
    from images import catalog

    for image in catalog.load():
        components = json.loads(attestations.sbom(image, DIGEST))["components"]
        assert len(components) == len(lock.read(image)) + len(base.read(base.LOCK).debs)

"""The attestations of an image: what they say, the same bytes every time, and who signed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.model.bom import Bom

from images import host
from images.building import build
from images.catalog import Image
from images.locking import base, lock
from images.proving import standing
from images.publishing import attestations, provenance, publication, sbom, signatures
from images.publishing.keys import Key
from rollout.problem import Problem
from tests.conftest import VERSIONS, Checkout, sha256

DIGEST = "sha256:" + "1" * 64
COMMIT = "c" * 40
REPORT = b'{"verdict": "proved"}'
KEY = Key(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def image(checkout: Checkout) -> Image:
    return checkout.image()


def made(image: Image, digest: str = DIGEST, **given: Any) -> list[attestations.Attestation]:
    options = {"report": REPORT, "key": KEY, "commit": COMMIT, **given}
    return publication.attested(image, digest=digest, **options)


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
    signed = signatures.Envelope.parse(made(image)[-1].data)
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
    found: dict[str, Any] = json.loads(sbom.make(image, digest))
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
    assert validator.validate_str(sbom.make(image, DIGEST).decode()) is None
    broken = bill(image)
    broken["components"][0]["purl"] = 7
    assert validator.validate_str(json.dumps(broken)) is not None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a.json is no JSON object"),
        (b"[]", "a.json is no JSON object"),
        (b"[" * 100_000, "a.json is no JSON object"),
        (b"{}", "is no CycloneDX document of ours"),
        (b'{"metadata": {"component": []}, "components": []}', "is no CycloneDX document of ours"),
    ],
)
def test_what_is_no_sbom_of_ours_is_refused_not_tripped_over(data: bytes, words: str) -> None:
    with pytest.raises(Problem, match=words):
        sbom.parse(attestations.Attestation("a.json", attestations.SBOM, "x", data))


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
            "asked": [],
            "trained": image.framework.named if image.framework else "",
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


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"predicateType": "x"}'])
def test_what_is_no_provenance_of_ours_says_nothing(data: bytes) -> None:
    kind = attestations.STATEMENT
    assert provenance.statement(attestations.Attestation("a", kind, kind, data), None) is None


@pytest.mark.parametrize(("commit", "dirty"), [(COMMIT, False), (f"{COMMIT}-dirty", True)])
def test_a_dirty_checkout_is_said_to_be_one(image: Image, commit: str, dirty: bool) -> None:
    source = statement(image, commit=commit)["predicate"]["buildDefinition"][
        "resolvedDependencies"
    ][-1]
    assert source["annotations"] == {"dirty": dirty}
    assert source["digest"] == {"gitCommit": COMMIT}


def test_a_manifest_names_the_repository_of_a_workflow_and_never_the_commit() -> None:
    """The same image of another commit has the same digest, or its tag could not stay."""
    run = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_SERVER_URL": "https://forge.example",
        "GITHUB_REPOSITORY": "team/images",
        "GITHUB_SHA": COMMIT,
    }
    here = "https://forge.example/team/images"
    assert provenance.repository_of(run) == {"org.opencontainers.image.source": here}
    assert provenance.repository_of({**run, "GITHUB_ACTIONS": ""}) == {}


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
    assert provenance.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD")
    (tmp_path / "clone/build").mkdir()
    (tmp_path / "clone/build/report.json").write_text("ignored by git: not a difference")
    assert provenance.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["file", "new"])
def test_a_changed_or_a_new_file_makes_a_checkout_dirty(
    git: Git, tmp_path: Path, name: str
) -> None:
    (tmp_path / "clone" / name).write_text("2")
    assert provenance.checkout_commit(tmp_path / "clone") == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.usefixtures("git")
def test_an_unpacked_tree_inside_another_checkout_does_not_get_its_commit(tmp_path: Path) -> None:
    inner = tmp_path / "clone" / "unpacked"
    inner.mkdir()
    with pytest.raises(Problem, match="no checkout of git, and the provenance") as caught:
        provenance.checkout_commit(inner)
    assert caught.value.code == 3


def test_a_tree_without_git_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="not a git repository") as caught:
        provenance.checkout_commit(tmp_path)
    assert caught.value.code == 3
    assert "publish from a clone" in caught.value.sentence


def test_a_repository_without_a_commit_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    with pytest.raises(Problem, match="no checkout of git"):
        provenance.checkout_commit(tmp_path)


def test_every_image_of_the_catalog_has_its_attestations() -> None:
    from images import catalog

    for image in catalog.load():
        components = json.loads(sbom.make(image, DIGEST))["components"]
        assert len(components) == len(lock.read(image)) + len(base.read(base.lock_of(image)).debs)

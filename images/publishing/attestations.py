"""What travels with a published image: smoke report, list of contents, provenance, signature.

All pure but for reading keys and asking git. The same image, commit and key give the same bytes:
nothing holds the moment of a run, and signatures are deterministic (RFC 6979). So publishing again
finds its attestations there already.

The forms are other people's, so that other people's tools read them: CycloneDX 1.6, in-toto
Statement v1 with SLSA provenance v1 in a DSSE envelope, and cosign's simple signing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from images import host
from images.building import build
from images.catalog import ROOT, Image, shown
from images.locking import base, lock
from images.locking.apt_sources import SUITE
from images.locking.debian import Deb
from images.locking.lock import Locked
from images.proving import standing
from rollout.problem import Problem

# Artifact types, which are the media types of what is attached: except for a signed provenance,
# which is a statement in an envelope.
REPORT = "application/vnd.verl-rollout.report.v1+json"
SBOM = "application/vnd.cyclonedx+json"
STATEMENT = "application/vnd.in-toto+json"
ENVELOPE = "application/vnd.dsse.envelope.v1+json"
# The annotation under which cosign keeps a signature beside what it signs.
SIGNATURE = "dev.cosignproject.cosign/signature"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# What the parameters and dependencies of a provenance mean; described in docs/verifying.md.
BUILD_TYPE = "urn:verl-rollout:image:1"
# A person's checkout: no platform vouches for what happened in it, only the key.
LOCAL_BUILDER = "urn:verl-rollout:checkout"
# The variable by which a workflow that is called names its own file.
WORKFLOW = "ROLLOUT_WORKFLOW"
# Properties of an SBOM: the locks that it was made from.
LOCK_PROPERTY = "rollout:lock.sha256"
BASE_PROPERTY = "rollout:base.lock.sha256"
BASE_LOCK = "lockfiles/base.lock"  # as a provenance names it
PASSWORD = "ROLLOUT_KEY_PASSWORD"  # noqa: S105 - the name of a variable
DIRTY = "-dirty"  # behind a commit, as 'git describe --dirty' has it


@dataclass(frozen=True)
class Attestation:
    """One thing that is attached to an image: a file name, what it is, and its bytes."""

    name: str
    artifact_type: str
    media_type: str
    data: bytes

    @cached_property
    def sha256(self) -> str:
        """In hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def attestations(
    image: Image, *, digest: str, report: bytes | None, key: Key | None, commit: str
) -> list[Attestation]:
    """The attestations of an image whose manifest has this digest: report, SBOM and provenance.

    An image that is published unproved has no report, and its provenance names none.

    Raises:
        Problem: a lock is missing or malformed.
    """
    found = [] if report is None else [Attestation("smoke-report.json", REPORT, REPORT, report)]
    found.append(Attestation("sbom.cdx.json", SBOM, SBOM, sbom(image, digest)))
    statement = provenance(image, digest, found, commit, os.environ)
    if key is None:
        return [*found, Attestation("provenance.json", STATEMENT, STATEMENT, statement)]
    return [
        *found,
        Attestation("provenance.dsse.json", STATEMENT, ENVELOPE, envelope(statement, key)),
    ]


def encoded(document: object) -> bytes:
    """A document as JSON, the same bytes every time."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


# --- what is in it --------------------------------------------------------------------------------


def pypi_purl(entry: Locked) -> PackageURL:
    """The package URL of a distribution."""
    return PackageURL("pypi", None, entry.name, entry.version)


def deb_purl(deb: Deb) -> PackageURL:
    """The package URL of a Debian package."""
    architecture = Path(deb.path).stem.rpartition("_")[2]
    qualifiers = {"arch": architecture, "distro": SUITE}
    return PackageURL("deb", "debian", deb.name, deb.version, qualifiers)


def image_purl(image: Image, digest: str) -> PackageURL:
    """The package URL of an image: its digest is the version."""
    return PackageURL("oci", None, image.repository.lower(), digest, {"tag": image.tag})


def _component(purl: PackageURL, version: str, sha256: str) -> Component:
    return Component(
        name=purl.name,
        version=version,
        purl=purl,
        bom_ref=purl.to_string(),  # else the library takes a random one
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
    )


def sbom(image: Image, digest: str) -> bytes:
    """What is in an image, as its lock and the base's say: name, version, package URL, sha256.

    Raises:
        Problem: a lock is missing or malformed.
    """
    purl = image_purl(image, digest)
    whole = Component(
        name=image.repository,
        version=digest,
        type=ComponentType.CONTAINER,
        purl=purl,
        bom_ref=purl.to_string(),
        properties=[
            Property(name=LOCK_PROPERTY, value=host.sha256(image.lock)),
            Property(name=BASE_PROPERTY, value=host.sha256(base.LOCK)),
        ],
    )
    bom = Bom(
        metadata=BomMetaData(component=whole),
        components=[
            *(_component(pypi_purl(e), e.version, e.sha256) for e in lock.read(image)),
            *(_component(deb_purl(d), d.version, d.sha256) for d in base.read(base.LOCK).debs),
        ],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, purl.to_string()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the graph that is left out below
        document = json.loads(JsonV1Dot6(bom).output_as_string())
    # An entry without dependencies says that a component has none, which the locks do not say.
    del document["dependencies"]
    del document["metadata"]["timestamp"]  # the moment of this call
    return encoded(document)


# --- how it was made ------------------------------------------------------------------------------


def checkout_commit(folder: Path = ROOT) -> str:
    """The commit of the checkout; ``-dirty`` stands behind it where files are not the commit's.

    Raises:
        Problem: exit code 3 where the folder is no checkout, or git cannot say.
    """
    argv = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    done = host.run(argv, quiet=True, check=False)
    top, _, commit = done.stdout.strip().rpartition("\n")
    # A tree that was unpacked inside another project's checkout would get that project's commit.
    if done.returncode or not top or Path(top).resolve() != folder.resolve():
        said = done.stderr.strip().splitlines()
        why = f" ({said[-1]})" if done.returncode and said else ""
        raise Problem(
            f"{folder} is no checkout of git{why}, and the provenance of an image names the "
            "commit it was built from; publish from a clone of the repository",
            3,
        )
    status = host.run(["git", "-C", str(folder), "status", "--porcelain"], quiet=True)
    return commit + (DIRTY if status.stdout.strip() else "")


def builder(environ: Mapping[str, str]) -> dict[str, Any]:
    """Who ran the build, as SLSA's ``runDetails`` has it: a workflow, or somebody's checkout."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return {"builder": {"id": LOCAL_BUILDER}}
    server, repository = environ["GITHUB_SERVER_URL"], environ["GITHUB_REPOSITORY"]
    run, attempt = environ["GITHUB_RUN_ID"], environ["GITHUB_RUN_ATTEMPT"]
    # GitHub's own variable names the workflow that called the one that builds. The certificates are
    # of the latter, and both have to name the same.
    workflow = environ["GITHUB_WORKFLOW_REF"]
    if environ.get(WORKFLOW):
        workflow = f"{repository}/{environ[WORKFLOW]}@{environ['GITHUB_REF']}"
    return {
        "builder": {"id": f"{server}/{workflow}"},
        "metadata": {
            "invocationId": f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}"
        },
    }


def _source(commit: str, environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "checkout",
        "digest": {"gitCommit": commit.removesuffix(DIRTY)},
        "annotations": {"dirty": commit.endswith(DIRTY)},
    }
    if environ.get("GITHUB_ACTIONS") == "true":
        server, repository = environ["GITHUB_SERVER_URL"], environ["GITHUB_REPOSITORY"]
        found["uri"] = f"git+{server}/{repository}@{environ['GITHUB_REF']}"
    return found


def provenance(
    image: Image,
    digest: str,
    byproducts: Sequence[Attestation],
    commit: str,
    environ: Mapping[str, str],
) -> bytes:
    """An in-toto statement: what the image of this digest was made from, and by whom.

    Raises:
        Problem: a lock is missing or malformed.
    """
    files = {shown(path): path for path in image.files}
    files[BASE_LOCK] = base.LOCK
    return encoded(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": image.reference, "digest": _digest_set(digest)}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"reference": image.reference},
                    # As lockfiles/<repository>/<tag>.layers records it.
                    # And what a proof of it has to show, so that whoever has the image and
                    # the key alone can tell whether the report is one.
                    "internalParameters": {
                        "inputs": build.inputs(image),
                        "promised": {
                            "checks": list(standing.promised(image)),
                            "transports": list(image.smoke.refit),
                            "program": standing.program_of(image),
                        },
                    },
                    "resolvedDependencies": [
                        *(
                            {"name": name, "digest": {"sha256": host.sha256(path)}}
                            for name, path in sorted(files.items())
                        ),
                        _source(commit, environ),
                    ],
                },
                "runDetails": {
                    **builder(environ),
                    "byproducts": [
                        {
                            "name": attestation.name,
                            "mediaType": attestation.media_type,
                            "digest": {"sha256": attestation.sha256},
                        }
                        for attestation in byproducts
                    ],
                },
            },
        }
    )


def _digest_set(digest: str) -> dict[str, str]:
    algorithm, _, value = digest.partition(":")
    return {algorithm: value}


# --- keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicKey:
    """What signatures are held against."""

    value: ec.EllipticCurvePublicKey

    def accepts(self, signature: bytes, data: bytes) -> bool:
        """Whether the owner of the private key has signed these bytes."""
        try:
            self.value.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True

    @property
    def pem(self) -> bytes:
        """As cosign, openssl and containers-policy.json take it."""
        return self.value.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@dataclass(frozen=True)
class Key:
    """What signs."""

    value: ec.EllipticCurvePrivateKey

    def sign(self, data: bytes) -> bytes:
        """A signature in ASN.1: the same of the same bytes, so the same attestations every time."""
        return self.value.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))

    @property
    def public(self) -> PublicKey:
        """The other half."""
        return PublicKey(self.value.public_key())


# What to do without a key: whoever signs makes one, and whoever checks is given one.
_NEW = "make one with 'nox -s publish -- --new-key FILE'"
_ASK = "ask the publisher for the public key"


def _key_file(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Problem(f"--key: {path} cannot be read ({error.strerror}); {advice}", 2) from None


def read_key(path: Path) -> Key:
    """The private key of a file, opened with the password in ROLLOUT_KEY_PASSWORD where it has one.

    Raises:
        Problem: exit code 2 for what is no such key, or a password that does not open it.
    """
    data = _key_file(path, _NEW)
    if b"SIGSTORE PRIVATE KEY" in data or b"COSIGN PRIVATE KEY" in data:
        form = "in cosign's own encrypted form, which is not read"
        raise Problem(f"--key: {path} is {form}; {_NEW}", 2)
    if b"PUBLIC KEY" in data:
        raise Problem(f"--key: {path} is a public key, and signing takes the private one", 2)
    password = os.environ.get(PASSWORD, "").encode() or None
    try:
        key = serialization.load_pem_private_key(data, password)
    except TypeError:
        if password is None:
            raise Problem(f"--key: {path} has a password; put it into {PASSWORD}", 2) from None
        # A password for a key that has none: nothing is wrong with the key.
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, UnsupportedAlgorithm):
        wrong = "is not opened by the password in " + PASSWORD if password else "is no key in PEM"
        raise Problem(f"--key: {path} {wrong}; {_NEW}", 2) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _p256(key.curve):
        raise Problem(f"--key: {path} is not an ECDSA key on P-256; {_NEW}", 2)
    return Key(key)


def read_public_key(path: Path) -> PublicKey:
    """The public key of a file.

    Raises:
        Problem: exit code 2 for what is no such key.
    """
    data = _key_file(path, _ASK)
    if b"PRIVATE KEY" in data:
        raise Problem(f"--key: {path} is a private key, and checking takes the public one", 2)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise Problem(f"--key: {path} is no public key in PEM; {_ASK}", 2) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _p256(key.curve):
        raise Problem(f"--key: {path} is not an ECDSA key on P-256; {_ASK}", 2)
    return PublicKey(key)


def _p256(curve: ec.EllipticCurve) -> bool:
    return isinstance(curve, ec.SECP256R1)


def new_key(path: Path) -> Path:
    """Write a new private key, and beside it FILE.pub, which is returned. Nothing is overwritten.

    The key is closed with the password in ROLLOUT_KEY_PASSWORD where that is set.

    Raises:
        Problem: exit code 2 where one of the files is there already or cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    key = Key(ec.generate_private_key(ec.SECP256R1()))
    password = os.environ.get(PASSWORD, "").encode()
    closed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        closed = serialization.BestAvailableEncryption(password)
    pem = key.value.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, closed
    )
    _create(public, key.public.pem, 0o644)
    try:
        _create(path, pem, 0o600)
    except BaseException:
        public.unlink()
        raise
    return public


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise Problem(f"--new-key: {path} exists and is not overwritten; name another", 2) from None
    except OSError as error:
        raise Problem(f"--new-key: {path} cannot be written ({error.strerror})", 2) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


# --- signatures -----------------------------------------------------------------------------------


def pae(kind: str, body: bytes) -> bytes:
    """What is signed of a payload (DSSE v1.0.2, Pre-Authentication Encoding)."""
    name = kind.encode()
    return b" ".join((b"DSSEv1", b"%d" % len(name), name, b"%d" % len(body), body))


def envelope(statement: bytes, key: Key) -> bytes:
    """A statement in a DSSE envelope, signed.

    Without ``keyid``: it is optional, and tools that make one themselves (each its own way) pass
    over signatures with another.
    """
    signature = key.sign(pae(STATEMENT, statement))
    return encoded(
        {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": STATEMENT,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }
    )


@dataclass(frozen=True)
class Envelope:
    """An envelope that somebody sent: nothing in it is to be believed before it is checked."""

    kind: str
    payload: bytes
    signatures: tuple[bytes, ...]

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Read one; ValueError says what is wrong with it."""
        try:
            found = json.loads(data)
            signatures = tuple(_unpacked(entry["sig"]) for entry in found["signatures"])
            return cls(str(found["payloadType"]), _unpacked(found["payload"]), signatures)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("not a DSSE envelope") from None

    def signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures is of this key and of this very payload and type."""
        return any(key.accepts(found, pae(self.kind, self.payload)) for found in self.signatures)


def _unpacked(text: str) -> bytes:
    """Both alphabets of base64, as DSSE asks of whoever checks."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def signature(digest: str, docker_reference: str, key: Key) -> tuple[bytes, dict[str, str]]:
    """cosign's signature of a manifest: the payload, and the annotations that go with its layer.

    The reference is the repository without a tag, as cosign writes it.
    """
    document = {
        "critical": {
            "identity": {"docker-reference": docker_reference},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    payload = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return payload, {SIGNATURE: base64.b64encode(key.sign(payload)).decode()}


def signed_digest(payload: bytes, annotations: Mapping[str, str], key: PublicKey) -> str | None:
    """The digest that a signature of cosign's form vouches for; None where the key did not sign.

    Raises:
        ValueError: the key signed something that is no such payload.
    """
    try:
        found = base64.b64decode(str(annotations.get(SIGNATURE, "")), validate=True)
    except ValueError:
        return None
    if not key.accepts(found, payload):
        return None
    try:
        critical = json.loads(payload)["critical"]
        if critical["type"] != "cosign container image signature":
            raise KeyError
        return str(critical["image"]["docker-manifest-digest"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("what the key has signed there is no image") from None

"""Check a published image: from what a registry gives, and a public key.

``nox -s verify-published -- HOST[/PREFIX]/REPOSITORY:TAG|@DIGEST --key FILE.pub [--layers]``. Of
the checkout nothing is used but this code: whoever has the key and the registry can tell whether
what is there is what was built, proved and signed. A registry, and whoever can write to it, is
believed in nothing; a registry that cannot be asked is no verdict on any image.

Each check ends as ``passed``, ``failed``, or ``unproved`` where something is missing that only the
caller can bring (a key), or that the publisher says is missing (a proof), or where it stands on a
check that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from images import host
from images.host import leftovers
from images.locking import lock
from images.proving import standing
from images.proving.standing import Today
from images.publishing import attestations, oci
from images.publishing.attestations import Attestation, Envelope, PublicKey
from images.publishing.failures import Unreachable
from images.publishing.names import parse_reference
from images.publishing.oci import Descriptor, Manifest
from images.publishing.registry import Registry
from rollout import report
from rollout.environment import printable
from rollout.problem import Problem
from rollout.report import Check

Metrics = dict[str, Any]
# Labels: the immutable tag, the lock, the engine, and torch.
VERSION = "org.opencontainers.image.version"
LOCK = "rollout.lock.sha256"
BACKEND, ENGINE, TORCH = "rollout.backend", "rollout.engine.version", "rollout.torch"
FRAMEWORK, FRAMEWORK_VERSION = "rollout.framework", "rollout.framework.version"
# Where an image keeps the lock that it was built from (images/recipes/install).
LOCK_INSIDE = "opt/rollout/share/rollout/requirements.lock"
_UNPROVED = 3  # of a Problem that a check raises; any other code is a failure
# More than any image of ours has. A few bytes may unpack to as many as there is room for.
LONGEST_LOCK = 16 << 20
LARGEST_LAYER = 64 << 30


@dataclass(frozen=True)
class Origin:
    """What the provenance says: of whom, from what, and with which attestations."""

    reference: str
    files: Mapping[str, str]  # name -> sha256
    commit: str
    dirty: bool
    builder: str
    checkout: str  # the address of the repository; empty for a person's own
    byproducts: frozenset[tuple[str, str]]  # media type and sha256
    checks: tuple[str, ...]  # that a proof has to show
    transports: tuple[str, ...]
    program: Mapping[str, str]  # the identity of each of the checks

    @property
    def lock(self) -> str:
        """The sha256 of the lock."""
        return self.files.get(f"lockfiles/{self.reference.replace(':', '/')}.lock", "")

    def named(self, kind: str) -> set[str]:
        """The sha256 of each attestation of a kind."""
        return {sha256 for media_type, sha256 in self.byproducts if media_type == kind}


@dataclass
class Published:
    """One image in a registry, and what the checks have found of it so far."""

    registry: Registry
    repository: str
    reference: str
    key: PublicKey | None = None
    digest: str = ""
    manifest: Manifest | None = None
    diff_ids: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    attestations: list[Attestation] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)  # published twice, an image has two
    distributions: dict[str, str] = field(default_factory=dict)  # package URL -> sha256

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """From the lowest up."""
        return self.manifest.layers if self.manifest else ()

    @property
    def unproved(self) -> bool:
        """Whether the publisher says that no proof was there."""
        return bool(self.manifest and self.manifest.annotations.get(oci.UNPROVED))

    def of(self, kind: str) -> list[Attestation]:
        """The attestations of an artifact type."""
        return [
            attestation for attestation in self.attestations if attestation.artifact_type == kind
        ]

    def blob(self, what: Descriptor) -> bytes:
        """Something small, of the bytes and the size that the registry has announced."""
        return self.registry.blob(self.repository, what.digest, size=what.size)


# --- the image ------------------------------------------------------------------------------------


def check_manifest(image: Published) -> Metrics:
    """The reference stands for a manifest of one image, with the digest that was asked for."""
    found = image.registry.manifest(image.repository, image.reference)
    if found is None:
        raise Problem("there is no such image in the registry")
    data, descriptor = found
    image.digest = descriptor.digest
    manifest = oci.parse(data)
    if descriptor.media_type != oci.MANIFEST or not manifest.layers:
        raise Problem(f"it is a {descriptor.media_type}, and an OCI manifest with layers is needed")
    image.manifest = manifest
    return {
        "digest": image.digest,
        "layers": len(manifest.layers),
        "bytes": sum(layer.size for layer in manifest.layers),
    }


def check_config(image: Published) -> Metrics:
    """The configuration is the manifest's, has a diff_id for each layer, and says what it is."""
    assert image.manifest  # noqa: S101 - NEEDS
    data = image.blob(image.manifest.config)
    image.diff_ids = oci.diff_ids(data)
    if len(image.diff_ids) != len(image.layers):
        counts = f"{len(image.diff_ids)} layers, the manifest {len(image.layers)}"
        raise Problem(f"the configuration names {counts}")
    config = json.loads(data).get("config")  # JSON it is: diff_ids has read it
    labels = config.get("Labels") if isinstance(config, dict) else None
    labels = labels if isinstance(labels, dict) else {}
    wanted = (oci.TITLE, VERSION, LOCK, BACKEND, ENGINE, TORCH, FRAMEWORK, FRAMEWORK_VERSION)
    missing = [name for name in wanted if not isinstance(labels.get(name), str)]
    if missing:
        raise Problem(f"it is no image of ours: label {missing[0]} is missing")
    image.labels = labels
    return {"image": labels[oci.TITLE], "lock": labels[LOCK][:8]}


def check_tags(image: Published) -> Metrics:
    """The image is called here what it calls itself, and its immutable tag has not moved."""
    title, immutable = image.labels[oci.TITLE], image.labels[VERSION]
    if not immutable.endswith(image.labels[LOCK][:8]):
        raise Problem(f"the immutable tag {immutable} is not of the lock that the image names")
    repository, _, alias = title.partition(":")
    if image.unproved:  # then neither of its tags is one that a proved image may have
        immutable, alias = immutable + oci.UNPROVED_TAG, alias + oci.UNPROVED_TAG
    here = f"{image.repository}:{image.reference}"
    by_digest = oci.is_digest(image.reference)
    if image.repository != repository or not (by_digest or image.reference in (alias, immutable)):
        raise Problem(f"it is called {here} here, and calls itself {title} ({immutable})")
    found = image.registry.resolve(image.repository, immutable)
    if found is None:
        raise Problem(f"the immutable tag {immutable} is missing")
    if found != image.digest:
        raise Problem(f"the immutable tag {immutable} is at {found}, and this is {image.digest}")
    return {"immutable": immutable}


def check_signature(image: Published) -> Metrics:
    """One of cosign's signatures of this very digest is the key's.

    The repository that it names is not asked for: after a promotion it is the one before.
    """
    tag = oci.signature_tag(image.digest)
    found = image.registry.manifest(image.repository, tag)
    layers = oci.parse(found[0]).layers if found else ()
    layers = tuple(layer for layer in layers if layer.media_type == oci.SIMPLE_SIGNING)
    if image.key is None:
        there = _number(len(layers), "signature", "there")
        raise Problem(f"{there}; --key FILE.pub would check who has signed", _UNPROVED)
    if not layers:
        raise Problem(f"no signature is there (tag {tag}); the image is not signed, or no longer")
    others = set()
    for layer in layers:
        payload = image.blob(layer)
        try:
            signed = attestations.signed_digest(payload, layer.annotations, image.key)
        except ValueError as error:
            raise Problem(str(error)) from None
        if signed == image.digest:
            return {"signatures": len(layers)}
        others |= {signed} - {None}
    if others:
        raise Problem(f"the key has signed {', '.join(map(str, others))} there, and not this image")
    raise Problem(f"{_number(len(layers), 'signature', 'there')}, and none of this key")


def _number(count: int, what: str, where: str) -> str:
    """How many of something there are, as the beginning of a sentence."""
    return f"{count or 'no'} {what} is {where}" if count < 2 else f"{count} {what}s are {where}"


# --- the attestations -----------------------------------------------------------------------------


def check_attestations(image: Published) -> Metrics:
    """Every attestation of ours that is attached is whole, and of this image.

    What else is listed is counted and not read: anybody may attach something, and a list may name
    what is gone. An attestation of ours that is missing is the provenance's to tell.
    """
    listed = image.registry.referrers(image.repository, image.digest)
    if not listed:
        raise Problem("no attestations are attached: the list of referrers is empty, or gone")
    others = 0
    for entry in listed:
        manifest = _attached(image, entry)
        if manifest is None:
            others += 1
            continue
        if manifest.subject is None or manifest.subject.digest != image.digest:
            of = manifest.subject.digest if manifest.subject else "nothing"
            raise Problem(f"the attestation {entry.digest} is listed here, and is of {of}")
        kind = manifest.artifact_type
        for layer in manifest.layers:
            title = str(layer.annotations.get(oci.TITLE, kind))
            image.attestations.append(Attestation(title, kind, layer.media_type, image.blob(layer)))
    return {"attestations": len(image.attestations), "others": others}


_OURS = (attestations.REPORT, attestations.SBOM, attestations.STATEMENT)


def _attached(image: Published, entry: Descriptor) -> Manifest | None:
    """The manifest of an attestation of ours; None for what is somebody else's, or gone."""
    if entry.media_type != oci.MANIFEST or entry.artifact_type not in ("", *_OURS):
        return None
    found = image.registry.manifest(image.repository, entry.digest)
    if found is None or found[1].media_type != oci.MANIFEST:
        return None
    manifest = oci.parse(found[0])
    return manifest if manifest.artifact_type in _OURS else None


def check_provenance(image: Published) -> Metrics:
    """The key has signed a provenance of this digest, made from the lock that the image names."""
    found = image.of(attestations.STATEMENT)
    if not found:
        raise Problem("no provenance is attached")
    statements = [statement_of(attestation, image.key) for attestation in found]
    ours = [s for s in statements if s and s.get("predicateType") == attestations.PREDICATE_TYPE]
    if not ours:
        whose = "signed by this key" if image.key else "a provenance"
        raise Problem(f"{_number(len(found), 'statement', 'attached')}, and none {whose}")
    image.origins = [origin_of(statement, image.digest) for statement in ours]
    for origin in image.origins:
        if origin.reference != image.labels[oci.TITLE]:
            raise Problem(f"it is of {origin.reference}, the image is {image.labels[oci.TITLE]}")
        if origin.lock != image.labels[LOCK]:
            raise Problem(f"it names the lock {origin.lock or '(none)'}, the image another")
        if origin.dirty and not image.unproved:
            raise Problem(
                f"it was built from commit {origin.commit[:12]} and changes that are in no commit"
            )
        if not built_there(origin):
            what = origin.checkout or "no repository"
            raise Problem(f"it names {origin.builder} as its builder, and {what} as what it built")
    metrics = {"commit": origin.commit[:12], "dirty": origin.dirty, "builder": origin.builder}
    if image.key is None:
        raise Problem(
            f"it names commit {origin.commit[:12]}; --key FILE.pub would check who says so",
            _UNPROVED,
        )
    return metrics


def built_there(origin: Origin) -> bool:
    """Whether a builder and a checkout fit: a person's own, or a workflow of that repository."""
    if not origin.checkout:
        return origin.builder == attestations.LOCAL_BUILDER
    repository, _, ref = origin.checkout.removeprefix("git+").rpartition("@")
    return origin.builder.startswith(f"{repository}/.github/workflows/") and (
        origin.builder.endswith(f"@{ref}")
    )


def statement_of(attestation: Attestation, key: PublicKey | None) -> dict[str, Any] | None:
    """The statement in an attestation; None where it is not signed by the key (if there is one)."""
    data = attestation.data
    if attestation.media_type == attestations.ENVELOPE or key is not None:
        try:
            envelope = Envelope.parse(data)
        except ValueError:
            return None
        if envelope.kind != attestations.STATEMENT or (key and not envelope.signed_by(key)):
            return None
        data = envelope.payload
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def origin_of(statement: Mapping[str, Any], digest: str) -> Origin:
    """What a statement says of an image.

    Raises:
        Problem: it is of another image, or says less than a provenance of ours.
    """
    try:
        if statement["_type"] != attestations.STATEMENT_TYPE:
            raise ValueError
        subjects = [f"sha256:{subject['digest']['sha256']}" for subject in statement["subject"]]
        definition = statement["predicate"]["buildDefinition"]
        details = statement["predicate"]["runDetails"]
        inputs = definition["resolvedDependencies"]
        promised = definition["internalParameters"]["promised"]
        source = next(entry for entry in inputs if "gitCommit" in entry["digest"])
        origin = Origin(
            reference=str(definition["externalParameters"]["reference"]),
            files={
                str(entry["name"]): str(entry["digest"]["sha256"])
                for entry in inputs
                if "sha256" in entry["digest"]
            },
            commit=str(source["digest"]["gitCommit"]),
            dirty=bool(source["annotations"]["dirty"]),
            builder=str(details["builder"]["id"]),
            checkout=str(source.get("uri", "")),
            byproducts=frozenset(
                (str(entry["mediaType"]), str(entry["digest"]["sha256"]))
                for entry in details["byproducts"]
            ),
            checks=tuple(map(str, promised["checks"])),
            transports=tuple(map(str, promised["transports"])),
            program={name: str(promised["program"][name]) for name in promised["checks"]},
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise Problem("the provenance lacks what one of ours says") from None
    if subjects != [digest]:
        raise Problem(f"the provenance is of {', '.join(subjects)}, and this is {digest}")
    return origin


def _named(image: Published, found: Sequence[Attestation], kind: str, what: str) -> None:
    """See that the attestations of a kind are exactly those that the provenance names."""
    named = {sha256 for origin in image.origins for sha256 in origin.named(kind)}
    foreign = [attestation.sha256 for attestation in found if attestation.sha256 not in named]
    if foreign:
        raise Problem(f"the {what} with sha256 {foreign[0]} is not one that the provenance names")
    missing = named - {attestation.sha256 for attestation in found}
    if missing:
        raise Problem(f"the {what} with sha256 {min(missing)}, named in the provenance, is missing")


def check_report(image: Published) -> Metrics:
    """The smoke report is the one that the provenance names, of these layers, and a proof.

    What a proof has to show the provenance says. What it does not show the manifest has to say.
    """
    found = image.of(attestations.REPORT)
    _named(image, found, attestations.REPORT, "smoke report")
    if not found and image.unproved:
        raise Problem("published without a proof (--unproved): there is no smoke report", _UNPROVED)
    if not found:
        raise Problem("no smoke report is attached")
    reports = []
    for attestation in found:
        try:
            data = report.parse(attestation.data)
        except ValueError as error:
            raise Problem(f"the smoke report {error}") from None
        origin = next(
            o for o in image.origins if attestation.sha256 in o.named(attestations.REPORT)
        )
        now = today(image, origin)
        worth = standing.judge(data, now)
        why = standing.publishable(worth, now)
        if why:
            code = _UNPROVED if data["verdict"] == "unproved" else 1
            raise Problem(f"the smoke report is no proof: {why}", code)
        reports.append((data, worth))
    if image.unproved:
        raise Problem("published as unproved (--unproved), whatever is attached", _UNPROVED)
    last, worth = max(reports, key=lambda pair: str(pair[0]["started"]))
    metrics: Metrics = {key: last[key] for key in ("device", "started")}
    metrics["checks"] = len(last["checks"])
    if worth.missing:
        metrics["not_shown"] = ", ".join(worth.missing)
    return metrics


def today(image: Published, origin: Origin) -> Today:
    """What a report of an image has to show: by its labels, layers and manifest, and its maker."""
    annotations = image.manifest.annotations if image.manifest else {}
    return Today(
        reference=image.labels[oci.TITLE],
        lock_sha256=image.labels[LOCK],
        engine=(image.labels[BACKEND], image.labels[ENGINE]),
        torch=image.labels[TORCH],
        framework=None
        if image.labels[FRAMEWORK] == "none"
        else (image.labels[FRAMEWORK], image.labels[FRAMEWORK_VERSION]),
        layers=image.diff_ids[:-1],
        checks=origin.checks,
        transports=origin.transports,
        program=origin.program,
        not_shown=oci.not_shown(annotations),
    )


def check_sbom(image: Published) -> Metrics:
    """The SBOM is the one that the provenance names, of this digest, and made from its locks."""
    found = image.of(attestations.SBOM)
    _named(image, found, attestations.SBOM, "SBOM")
    if not found:
        raise Problem("no SBOM is attached")
    for attestation in found:
        hashes = _contents(image, _json(attestation))
    image.distributions = {p: h for p, h in hashes.items() if p.startswith("pkg:pypi/")}
    debs = len(hashes) - len(image.distributions)
    return {"distributions": len(image.distributions), "debian_packages": debs}


def _contents(image: Published, data: Mapping[str, Any]) -> dict[str, str]:
    """The package URL and sha256 of everything that an SBOM of this image names."""
    try:
        whole = data["metadata"]["component"]
        digest = whole["version"]
        made_from = {entry["name"]: entry["value"] for entry in whole["properties"]}
        hashes = {
            str(entry["purl"]): next(h["content"] for h in entry["hashes"] if h["alg"] == "SHA-256")
            for entry in data["components"]
        }
    except (KeyError, TypeError, StopIteration):
        raise Problem("the SBOM is no CycloneDX document of ours") from None
    if digest != image.digest:
        raise Problem(f"the SBOM is of {digest}, and this is {image.digest}")
    if made_from.get(attestations.LOCK_PROPERTY) != image.labels[LOCK]:
        raise Problem("the SBOM was made from another lock than the image")
    bases = {origin.files.get(attestations.BASE_LOCK) for origin in image.origins}
    if bases and made_from.get(attestations.BASE_PROPERTY) not in bases:
        raise Problem("the SBOM was made from another base.lock than the provenance names")
    return hashes


def _json(attestation: Attestation) -> dict[str, Any]:
    try:
        found = json.loads(attestation.data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Problem(f"{attestation.name} is no JSON object")
    return found


# --- the layers -----------------------------------------------------------------------------------


def check_layers(image: Published) -> Metrics:
    """Every layer is in the registry, with as many bytes as the manifest says."""
    for number, layer in enumerate(image.layers, 1):
        size = image.registry.blob_size(image.repository, layer.digest)
        which = f"layer {number} of {len(image.layers)} ({layer.digest})"
        if size is None:
            raise Problem(f"{which} is not in the registry")
        if size != layer.size:
            raise Problem(f"{which} has {size} bytes there, the manifest says {layer.size}")
    return {"layers": len(image.layers)}


def check_contents(image: Published) -> Metrics:
    """Every layer has its digest and its diff_id, and the lock inside is the attested one."""
    host.require("zstd")
    total, text = 0, b""
    with leftovers.temporary("published", host.scratch()) as folder:
        for number, (layer, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True)):
            path = folder / str(number)
            image.registry.download(image.repository, layer.digest, path, size=layer.size)
            which = f"layer {number + 1} of {len(image.layers)} ({layer.digest})"
            found = unpacked(path, which)
            if found.diff_id != diff_id:
                raise Problem(f"{which} unpacks to {found.diff_id}, the configuration: {diff_id}")
            total, text = total + found.size, found.lock or text
            path.unlink()  # or the largest image would be here as a whole
    if hashlib.sha256(text).hexdigest() != image.labels[LOCK]:
        raise Problem(f"the layers hold another {LOCK_INSIDE} than the image names")
    locked = lock.parse(text.decode("utf-8", "replace"), Path(LOCK_INSIDE))
    inside = {attestations.pypi_purl(entry).to_string(): entry.sha256 for entry in locked}
    differing = sorted(set(inside.items()) ^ set(image.distributions.items()))
    if differing:
        raise Problem(f"the SBOM and the lock in the image differ in {differing[0][0]}")
    return {"bytes": total, "distributions": len(inside)}


@dataclass(frozen=True)
class Unpacked:
    """What is in a layer: the sha256 and bytes of its tar, and the lock where it holds that."""

    diff_id: str
    size: int
    lock: bytes


class _Counted:
    """A stream that is hashed and counted as it is read, and has an end."""

    def __init__(self, stream: IO[bytes], which: str) -> None:
        self.stream, self.which, self.size, self.hash = stream, which, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.size += len(piece)
        if self.size > LARGEST_LAYER:
            raise Problem(
                f"{self.which} unpacks to more than {LARGEST_LAYER:,} bytes, as no layer of ours "
                "does; it was not read further"
            )
        self.hash.update(piece)
        return piece


def unpacked(path: Path, which: str) -> Unpacked:
    """Unpack a compressed layer to look into it; nothing is written.

    Raises:
        Problem: it cannot be unpacked, is no tar, or holds more than any layer of ours.
    """
    # zstd opens gzip too. The window is that of layers.zstd_argv.
    argv = ["zstd", "--decompress", "--stdout", "--quiet", "--long=27", str(path)]
    text = b""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout  # noqa: S101 - for mypy: it was asked for
        stream = _Counted(process.stdout, which)
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.name.removeprefix("./") == LOCK_INSIDE:
                        if member.size > LONGEST_LOCK:
                            raise Problem(
                                f"{which} holds a {LOCK_INSIDE} of {member.size:,} bytes, more "
                                f"than the {LONGEST_LOCK:,} of any lock of ours; it was not read"
                            )
                        file = tar.extractfile(member)
                        text = file.read() if file else text
            while stream.read(1 << 20):
                pass
        except tarfile.TarError:
            process.kill()
            raise Problem(f"{which} is no compressed tar") from None
        except BaseException:
            process.kill()  # or it would be waited for to its end
            raise
    if process.returncode:
        raise Problem(f"{which} cannot be unpacked: zstd exited with {process.returncode}")
    return Unpacked(f"sha256:{stream.hash.hexdigest()}", stream.size, text)


# --- all of them ----------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Published], Metrics]] = {
    "manifest": check_manifest,
    "config": check_config,
    "tags": check_tags,
    "signature": check_signature,
    "attestations": check_attestations,
    "provenance": check_provenance,
    "report": check_report,
    "sbom": check_sbom,
    "layers": check_layers,
    "contents": check_contents,  # with --layers
}
# What a check stands on. Where one of those has failed, it is not run: nothing may pass on
# attestations that nobody vouches for, and what nobody has signed is not unpacked.
NEEDS = {
    "config": ("manifest",),
    "tags": ("config",),
    "signature": ("manifest",),
    "attestations": ("manifest",),
    "provenance": ("config", "attestations"),
    "report": ("config", "attestations", "provenance"),
    "sbom": ("config", "attestations", "provenance"),
    "layers": ("manifest",),
    "contents": ("signature", "layers", "sbom"),
}


def names(*, layers: bool) -> list[str]:
    """The checks that a verification consists of."""
    return [name for name in CHECKS if layers or name != "contents"]


def verify(
    image: Published, *, layers: bool = False, show: Callable[[str], None] = host.say
) -> list[Check]:
    """Check an image of a registry, each check shown as it ends. The image gets its digest.

    Raises:
        Unreachable: the registry cannot be asked, or no longer: that is no verdict.
    """
    # Asked first: a registry that lets nobody in is told of before there is a table.
    image.registry.blob_size(image.repository, oci.digest(oci.EMPTY_DATA))
    show(report.header())
    done: list[Check] = []
    broken: dict[str, str] = {}  # check -> the one that has failed, itself or below it
    for name in names(layers=layers):
        cause = next((broken[need] for need in NEEDS.get(name, ()) if need in broken), "")
        if cause:
            done.append(Check(name, "unproved", 0.0, reason=f"not run: {cause} failed"))
        else:
            done.append(_checked(name, image))
            cause = name if done[-1].status == "failed" else ""
        if cause:
            broken[name] = cause
        show(report.row(done[-1]))
    return done


def _checked(name: str, image: Published) -> Check:
    start = time.perf_counter()
    status, metrics, reason = "passed", {}, None
    try:
        metrics = CHECKS[name](image)
    except Unreachable:
        raise
    except Problem as problem:
        status = "unproved" if problem.code == _UNPROVED else "failed"
        reason = printable(problem.sentence)
    # Labels, names and reasons are the registry's words, and a terminal takes some for commands.
    shown = {k: printable(v) if isinstance(v, str) else v for k, v in metrics.items()}
    return Check(name, status, time.perf_counter() - start, shown, reason)


def parser() -> argparse.ArgumentParser:
    """What ``nox -s verify-published --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s verify-published --",
        description="Check a published image and its attestations, from the registry alone.",
    )
    found.add_argument("image", metavar="HOST[/PREFIX]/REPOSITORY:TAG|@DIGEST")
    found.add_argument("--key", type=Path, metavar="FILE.pub", help="the publisher's public key")
    found.add_argument("--layers", action="store_true", help="download and unpack every layer")
    found.add_argument("--authfile", type=Path, help="credentials, as skopeo's")
    found.add_argument("--cert-dir", type=Path, help="certificates of the registry, as skopeo's")
    return found


def main(arguments: Sequence[str]) -> int:
    """``nox -s verify-published -- IMAGE [--key FILE.pub] [--layers]``."""
    given = parser().parse_args(list(arguments))
    target, repository, reference = parse_reference(given.image)
    key = attestations.read_public_key(given.key) if given.key else None
    registry = Registry(target, authfile=given.authfile, cert_dir=given.cert_dir)
    image = Published(registry, repository, reference, key)
    host.say(f"{registry.reference(repository, reference)}: verify-published")
    checks = verify(image, layers=given.layers)
    verdict = report.verdict(checks, names(layers=given.layers))
    host.say(f"{registry.reference(repository, image.digest or reference)}: {verdict}")
    return report.exit_code(verdict)


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

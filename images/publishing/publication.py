"""The publication of an image that buildah holds: what goes to a registry, and in which order.

What a passing report is about is pushed by its digest, then its attestations, and only then the
tags. So a tag stands for something whole at every moment, whenever the registry or this program is
killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from images import catalog, host
from images.building import build
from images.building.buildah import Buildah
from images.catalog import Image
from images.publishing import attach, copies, oci, packing, proof, provenance, sbom, signatures
from images.publishing import tags as naming
from images.publishing.attestations import ENVELOPE, REPORT, SBOM, STATEMENT, Attestation
from images.publishing.copies import Copy
from images.publishing.keys import Key
from images.publishing.packing import Packing
from images.publishing.registry import Registry
from images.publishing.tags import Tags
from rollout.problem import Problem


def attested(
    image: Image, *, digest: str, report: bytes | None, key: Key | None, commit: str
) -> list[Attestation]:
    """The attestations of an image whose manifest has this digest: report, SBOM and provenance.

    An image that is published unproved has no report, and its provenance names none.

    Raises:
        Problem: a lock is missing or malformed.
    """
    found = [] if report is None else [Attestation("smoke-report.json", REPORT, REPORT, report)]
    found.append(Attestation("sbom.cdx.json", SBOM, SBOM, sbom.make(image, digest)))
    said = provenance.make(image, digest, found, commit, os.environ)
    if key is None:
        return [*found, Attestation("provenance.json", STATEMENT, STATEMENT, said)]
    signed = signatures.envelope(said, key)
    return [*found, Attestation("provenance.dsse.json", STATEMENT, ENVELOPE, signed)]


def publish_image(
    image: Image,
    tool: Buildah,
    registry: Registry,
    *,
    key: Key | None = None,
    unproved: bool = False,
    how: Packing = packing.ZSTD,
) -> None:
    """Publish an image of buildah's storage.

    Raises:
        Problem: it has no passing report and is not declared unproved, or the registry refuses.
    """
    built = build.current(image, tool)
    proved = None if unproved else proof.passing(image, built.diff_ids)
    names = naming.of_image(image, unproved=unproved, gzip=how is packing.GZIP)
    commit = provenance.checkout_commit()
    if not unproved and commit.endswith(provenance.DIRTY):
        raise Problem(
            f"{image.reference} is not published: this checkout has changes that are in no commit, "
            "and its provenance names one; commit them, or publish with --unproved",
            2,
        )
    where = registry.name(image.repository)
    host.say(f"{image.reference}: publish to {where} as {names.immutable}")
    registry.resolve(image.repository, names.immutable)  # a wrong host or password is told first
    siblings = {registry.path(other.repository) for other in catalog.load()}
    # The catalog's reasons: with those of one run another run would make another manifest.
    missing = {what: image.not_shown[what] for what in proved.standing.missing} if proved else None
    copy = copies.of_source(
        packing.source(image, tool, built),
        {**oci.of_proof(missing), **provenance.repository_of(os.environ)},
        sorted(siblings - {registry.path(image.repository)}),
        how,
    )
    attaching = attested(
        image,
        digest=copy.descriptor.digest,
        report=proved.data if proved else None,
        key=key,
        commit=commit,
    )
    done = publish(copy, registry, image.repository, names, attaching, key)
    conclude(image, registry, copy, done=done, signed=key is not None)


def publish(
    image: Copy,
    registry: Registry,
    repository: str,
    names: Tags,
    attaching: Sequence[Attestation],
    key: Key | None = None,
) -> bool:
    """Bring an image into a registry, in the order that leaves no tag on anything unfinished.

    Returns whether there was anything to do.
    """
    digest = image.descriptor.digest
    naming.free(image, registry, repository, names.immutable)  # refused before anything is sent
    done = copies.bring(image, registry, repository)
    for name in attach.attach(registry, repository, image.descriptor, attaching, key):
        host.say(f"  {name}  attached")
        done = True
    if key and attach.sign(registry, repository, digest, key):
        host.say(f"  signature  attached, as {oci.signature_tag(digest)}")
        done = True
    return naming.give(image, registry, repository, names) or done


def conclude(image: Image, registry: Registry, copy: Copy, *, done: bool, signed: bool) -> None:
    """Say what has become of an image: where it is, and what it is said to lack."""
    what = registry.reference(image.repository, copy.descriptor.digest)
    if not done:
        host.say(
            f"{image.reference}: nothing to do, {what} is there with its attestations and tags"
        )
        return
    if oci.UNPROVED in copy.manifest.annotations:
        host.say(f"{image.reference}: UNPROVED, which its manifest and its tags say")
    missing = oci.not_shown(copy.manifest.annotations)
    if missing:
        host.say(
            f"{image.reference}: in part, not shown are {', '.join(missing)}: see its manifest"
        )
    if not signed:
        host.say(f"{image.reference}: unsigned; sign it with --key FILE, or with cosign in CI")
    host.say(f"{image.reference}: published as {what}")

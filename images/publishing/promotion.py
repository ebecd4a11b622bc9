"""The promotion of an image from one registry to another, or to its tags in the same one.

Nothing is built or compressed: the same digest and its attestations get the tags of the
destination, once they verify there.
"""

from __future__ import annotations

from collections.abc import Sequence

from images import host
from images.building import labels
from images.catalog import Image, shown
from images.publishing import attach, copies, oci, provenance, publication, verify_published
from images.publishing import tags as naming
from images.publishing.attestations import STATEMENT, Attestation
from images.publishing.keys import Key, PublicKey
from images.publishing.oci import Descriptor
from images.publishing.published import Published
from images.publishing.registry import Registry
from rollout.problem import Problem
from rollout.report import Check


def promote(
    image: Image,
    origin: Registry,
    repository: str,
    reference: str,
    registry: Registry,
    *,
    trusted: PublicKey,
    key: Key | None = None,
) -> None:
    """Give an image of a registry, by its digest, the tags of another or of the same one.

    The manifest is copied to the byte, and the attestations are those that ``verify-published`` has
    passed. The tags are given once it passes at the destination too.

    Raises:
        Problem: it is not there, is another image than this checkout's, unproved, or fails a check.
    """
    found = origin.manifest(repository, reference)
    if found is None:
        raise Problem(f"there is no {origin.reference(repository, reference)}")
    data, what = found
    whole = origin.reference(repository, what.digest)
    if oci.UNPROVED in oci.parse(data).annotations:
        raise Problem(f"{whole} is not promoted: it was published as unproved")
    host.say(f"{image.reference}: promote {whole}")
    staged = Published(origin, repository, what.digest, trusted)
    wanting = unchecked(verify_published.verify(staged), verify_published.names(layers=False))
    if wanting:
        raise Problem(f"{whole} is not promoted: see {', '.join(wanting)} above")
    if staged.labels[labels.LOCK] != host.sha256(image.lock):
        raise Problem(f"{whole} is not promoted: it is of another lock than {shown(image.lock)}")
    siblings = [origin.path(repository)] if origin.host == registry.host else []
    copy = copies.of_registry(data, origin, repository, siblings)
    # Promoted as it is: with layers of gzip, under the names of those.
    gzip = oci.gzipped(oci.parse(data).layers)
    names, there = naming.of_image(image, gzip=gzip), image.repository
    naming.free(copy, registry, there, names.immutable)
    done = copies.bring(copy, registry, there)
    if registry.name(there) != origin.name(repository):
        done = carry(staged, registry, there, copy.descriptor) or done
    if key:
        done = attach.sign(registry, there, what.digest, key) or done
    recheck(registry, there, what.digest, trusted)
    done = naming.give(copy, registry, there, names) or done
    publication.conclude(image, registry, copy, done=done, signed=True)


def unchecked(checks: Sequence[Check], wanted: Sequence[str]) -> list[str]:
    """The checks that stand in the way of a promotion, those that did not run among them."""
    passed = {check.name for check in checks if check.status == "passed"}
    return [name for name in wanted if name not in passed]


def verified(source: Published) -> list[Attestation]:
    """The attestations that a verification with a key has passed; statements of others are none."""
    return [
        one
        for one in source.attestations
        if one.artifact_type != STATEMENT or provenance.statement(one, source.key)
    ]


def carry(source: Published, registry: Registry, destination: str, subject: Descriptor) -> bool:
    """Copy the verified attestations of an image, and all signatures; whether any was missing.

    Those of ours that the destination has and the source has not are replaced; its signatures
    stay beside those that are added.
    """
    copied = attach.attach(registry, destination, subject, verified(source), exactly=True)
    for name in copied:
        host.say(f"  {name}  copied")
    wanted = attach.signatures(source.registry, source.repository, subject.digest)
    added = attach.add_signatures(registry, destination, subject.digest, wanted, source.blob)
    if added:
        host.say(f"  signatures  {added} copied, to {oci.signature_tag(subject.digest)}")
    return bool(copied or added)


def recheck(registry: Registry, repository: str, digest: str, trusted: PublicKey) -> None:
    """See that an image will verify where it is about to get its tags.

    Raises:
        Problem: it would not; says why.
    """
    there = Published(registry, repository, digest, trusted)
    checks = verify_published.verify(there, show=lambda _: None)
    wanted = [name for name in verify_published.names(layers=False) if name != "tags"]
    wanting = unchecked(checks, wanted)
    if wanting:
        reasons = {check.name: check.reason for check in checks}
        whole = registry.reference(repository, digest)
        why = reasons.get(wanting[0]) or "it did not run"
        raise Problem(f"{whole} gets no tags, it fails the check {wanting[0]} there: {why}")

"""The attestations and signatures of an image that a registry has, and those that it is given.

Attestations of ours stay as long as they are about each other and whole, and are replaced
otherwise. What others attach, and who else signs, is left as it is; and where the list of
attestations is written from here, it is read again afterwards: others write it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from images.publishing import oci, provenance
from images.publishing.attestations import STATEMENT, Attestation
from images.publishing.keys import Key
from images.publishing.oci import Damaged, Descriptor
from images.publishing.registry import Registry
from images.publishing.signatures import signature
from rollout.problem import Problem

_RACES = 3  # how often a list that others write too is written again


# Attestations


@dataclass(frozen=True)
class Attached:
    """An attestation in a registry: how it is listed, its manifest, and its bytes."""

    entry: Descriptor
    manifest: bytes
    data: bytes

    @property
    def attestation(self) -> Attestation:
        """As it was before it was attached."""
        (layer,) = oci.parse(self.manifest).layers
        kind = self.entry.artifact_type
        title = layer.annotations.get(oci.TITLE, kind)
        return Attestation(title, kind, layer.media_type, self.data)


def attached(
    registry: Registry,
    repository: str,
    digest: str,
    listed: Sequence[Descriptor] | None = None,
) -> list[Attached]:
    """The attestations of an image that are there in full; a list may name more than there is.

    Raises:
        Problem: the registry did not let one be read, which says nothing of the attestation.
    """
    found = []
    for entry in registry.referrers(repository, digest) if listed is None else listed:
        with suppress(Damaged):  # or no attestation at all: whoever attached it may mend it
            got = registry.manifest(repository, entry.digest)
            if got is None:
                continue
            attestation = oci.parse(got[0])
            if (
                attestation.subject
                and attestation.subject.digest == digest
                and len(attestation.layers) == 1
            ):
                (layer,) = attestation.layers
                data = registry.blob(repository, layer.digest, size=layer.size)
                named = replace(entry, artifact_type=attestation.artifact_type)
                found.append(Attached(named, got[0], data))
    return found


def of_publishing(attestation: Attestation) -> bool:
    """Whether an attestation is of a form that publishing attaches; others attach some too."""
    if attestation.artifact_type != STATEMENT:
        return True
    said = provenance.statement(attestation, None) or {}
    try:
        kind = said["predicate"]["buildDefinition"]["buildType"]
    except (KeyError, TypeError):
        return False
    return bool(kind == provenance.BUILD_TYPE)


def ours(there: Sequence[Attached], kinds: Collection[str]) -> list[Attached]:
    """The attestations of these kinds that publishing attaches."""
    return [p for p in there if p.entry.artifact_type in kinds and of_publishing(p.attestation)]


def sufficient(
    there: Sequence[Attached], kinds: Collection[str], digest: str, key: Key | None = None
) -> bool:
    """Whether one of each kind is attached, and the provenance signed where there is a key.

    A later commit, or a later run of the proof, makes others for the same image. Those that
    it was published with stay: they are about each other, and still true.
    """
    found = [attestation.attestation for attestation in ours(there, kinds)]
    if sorted(attestation.artifact_type for attestation in found) != sorted(kinds):
        return False
    statements = [attestation for attestation in found if attestation.artifact_type == STATEMENT]
    named = {(p.media_type, p.sha256) for p in found if p not in statements}
    for attestation in statements:
        said = provenance.statement(attestation, key.public if key else None)
        try:
            if not said or provenance.parse(said, digest).byproducts != named:
                return False
        except Problem:  # of another image, or less than a provenance of ours
            return False
    return True


def attach(
    registry: Registry,
    repository: str,
    subject: Descriptor,
    attestations: Sequence[Attestation],
    key: Key | None = None,
    *,
    exactly: bool = False,
) -> list[str]:
    """Attach attestations to an image, in place of others of ours; returns their names.

    Others that do as well stay (see :func:`sufficient`) and nothing is attached, unless it is
    ``exactly`` these that have to be there.

    Raises:
        Problem: the registry refuses, or did not let one be read: then nothing was changed.
    """
    kinds = {attestation.artifact_type for attestation in attestations}
    listed = registry.referrers(repository, subject.digest)
    there = attached(registry, repository, subject.digest, listed)
    if not exactly and sufficient(there, kinds, subject.digest, key):
        return []
    made = [oci.artifact(attestation, subject) for attestation in attestations]
    manifests = {oci.digest(data): data for data in made}
    sound = {attestation.entry.digest for attestation in there}
    broken = {e.digest for e in listed if e.digest not in sound and e.artifact_type in kinds}
    others = {attestation.entry.digest for attestation in ours(there, kinds)} - set(manifests)
    replaced = broken | others
    missing = set(manifests) - sound
    if not missing and not replaced:
        return []
    for attestation in attestations:
        registry.push_blob(repository, oci.EMPTY_DATA)
        registry.push_blob(repository, attestation.data)
    refer(registry, repository, subject.digest, list(manifests.values()), replaced)
    return [attestation.name for attestation in attestations]


def refer(
    registry: Registry,
    repository: str,
    subject: str,
    manifests: Sequence[bytes],
    replaced: Collection[str] = (),
) -> None:
    """Put manifests of attestations, and list them where the registry does not do so by itself.

    Those with a digest in ``replaced`` leave the list.

    Raises:
        Problem: others write the same list, again and again.
    """
    entries = [oci.referrer(data) for data in manifests]
    new = {entry.digest for entry in entries}
    listed = [
        registry.push_manifest(repository, oci.digest(data), data, oci.MANIFEST)
        for data in manifests
    ]
    if all(listed):
        for old in set(replaced) - new:
            registry.forget(repository, old)
        return
    for _ in range(_RACES):
        there = registry.referrers(repository, subject)
        stay = [e for e in there if e.digest not in new and e.digest not in replaced]
        if [*stay, *entries] == there:
            return
        data = oci.index([*stay, *entries])
        registry.push_manifest(repository, oci.fallback_tag(subject), data, oci.INDEX)
    if not new <= {e.digest for e in registry.referrers(repository, subject)}:
        raise Problem(
            f"others write the attestations of {subject} in {registry.host} too; run it again"
        )


# Signatures


def sign(registry: Registry, repository: str, digest: str, key: Key) -> bool:
    """Add a signature by this key, where there is none yet; others stay. Whether it was added."""
    payload, annotations = signature(digest, registry.name(repository), key)
    own = oci.describe(payload, oci.SIMPLE_SIGNING, annotations)
    return bool(add_signatures(registry, repository, digest, [own], lambda _: payload))


def signatures(registry: Registry, repository: str, digest: str) -> list[Descriptor]:
    """The signatures of an image, as cosign lists them."""
    found = registry.manifest(repository, oci.signature_tag(digest))
    return list(oci.parse(found[0]).layers) if found else []


def add_signatures(
    registry: Registry,
    repository: str,
    digest: str,
    wanted: Sequence[Descriptor],
    payload: Callable[[Descriptor], bytes],
) -> int:
    """Add signatures to those of an image, which stay; how many were missing."""
    there = signatures(registry, repository, digest)
    missing = [entry for entry in wanted if entry not in there]
    if not missing:
        return 0
    for entry in missing:
        registry.push_blob(repository, payload(entry))
    all_of_them = [*there, *missing]
    config = oci.signature_config(all_of_them)
    registry.push_blob(repository, config)
    data = oci.manifest(oci.describe(config, oci.CONFIG), all_of_them)
    registry.push_manifest(repository, oci.signature_tag(digest), data, oci.MANIFEST)
    return len(missing)

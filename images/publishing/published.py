"""An image in a registry, and the checks of the image itself: what it is, its tags, who signed it.

Of the registry and of whoever can write to it nothing is believed: each check compares what is
there with a digest, with the image's own words or with the publisher's key. What is attached to an
image has its checks in evidence.py, and what its layers hold in unpacking.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from images.building import labels
from images.publishing import attach, oci, signatures, tags
from images.publishing.attestations import Attestation
from images.publishing.keys import PublicKey
from images.publishing.oci import Descriptor, Manifest
from images.publishing.provenance import Origin
from images.publishing.registry import Registry
from rollout.problem import Problem

Metrics = dict[str, Any]
UNPROVED = 3  # the code of a Problem that a check raises; any other code is a failure


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
    def named_layers(self) -> list[tuple[str, Descriptor]]:
        """The layers, each with its place and digest as a sentence has them."""
        count = len(self.layers)
        return [(f"layer {n} of {count} ({e.digest})", e) for n, e in enumerate(self.layers, 1)]

    @property
    def unproved(self) -> bool:
        """Whether the publisher says that no proof was there."""
        return bool(self.manifest and self.manifest.annotations.get(oci.UNPROVED))

    def of(self, kind: str) -> list[Attestation]:
        """The attestations of an artifact type."""
        return [one for one in self.attestations if one.artifact_type == kind]

    def blob(self, what: Descriptor) -> bytes:
        """Something small, of the bytes and the size that the registry has announced."""
        return self.registry.blob(self.repository, what.digest, size=what.size)


def counted(count: int, what: str, where: str) -> str:
    """How many of something there are, as the beginning of a sentence."""
    return f"{count or 'no'} {what} is {where}" if count < 2 else f"{count} {what}s are {where}"


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
    assert image.manifest  # noqa: S101 - verify_published.NEEDS
    data = image.blob(image.manifest.config)
    image.diff_ids = oci.diff_ids(data)
    if len(image.diff_ids) != len(image.layers):
        counts = f"{len(image.diff_ids)} layers, the manifest {len(image.layers)}"
        raise Problem(f"the configuration names {counts}")
    config = oci.document(data).get("config")
    found = config.get("Labels") if isinstance(config, dict) else None
    found = found if isinstance(found, dict) else {}
    for name in (
        *(oci.TITLE, labels.VERSION, labels.LOCK, labels.BACKEND, labels.ENGINE, labels.TORCH),
        *(labels.FRAMEWORK, labels.FRAMEWORK_VERSION),
    ):
        if not isinstance(found.get(name), str):
            raise Problem(f"it is no image of ours: label {name} is missing")
    image.labels = found
    return {"image": found[oci.TITLE], "lock": found[labels.LOCK][:8]}


def check_tags(image: Published) -> Metrics:
    """The image is called here what it calls itself, and its immutable tag has not moved."""
    title, immutable = image.labels[oci.TITLE], image.labels[labels.VERSION]
    if not immutable.endswith(image.labels[labels.LOCK][:8]):
        raise Problem(f"the immutable tag {immutable} is not of the lock that the image names")
    repository, _, alias = title.partition(":")
    # Unproved, it has neither of the tags that a proved image may have.
    behind = tags.ending(unproved=image.unproved, gzip=oci.gzipped(image.layers))
    immutable, alias = immutable + behind, alias + behind
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
    there = attach.signatures(image.registry, image.repository, image.digest)
    layers = [layer for layer in there if layer.media_type == oci.SIMPLE_SIGNING]
    count = counted(len(layers), "signature", "there")
    if image.key is None:
        raise Problem(f"{count}; --key FILE.pub would check who has signed", UNPROVED)
    if not layers:
        tag = oci.signature_tag(image.digest)
        raise Problem(f"{count} (tag {tag}); the image is not signed, or no longer")
    signed = set()
    for layer in layers:
        signed.add(signatures.signed_digest(image.blob(layer), layer.annotations, image.key))
        if image.digest in signed:
            return {"signatures": len(layers)}
    others = ", ".join(filter(None, signed))
    if others:
        raise Problem(f"the key has signed {others} there, and not this image")
    raise Problem(f"{count}, and none of this key")


def check_layers(image: Published) -> Metrics:
    """Every layer is in the registry, with as many bytes as the manifest says."""
    for which, layer in image.named_layers:
        size = image.registry.blob_size(image.repository, layer.digest)
        if size is None:
            raise Problem(f"{which} is not in the registry")
        if size != layer.size:
            raise Problem(f"{which} has {size} bytes there, the manifest says {layer.size}")
    return {"layers": len(image.layers)}

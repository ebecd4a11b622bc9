"""The list of what is in an image (SBOM), as CycloneDX 1.6: made of its lock and the base's."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from images import host
from images.catalog import Image
from images.locking import base, lock
from images.locking.apt_sources import SUITE
from images.locking.debian import Deb
from images.locking.lock import Locked
from images.publishing import oci
from images.publishing.attestations import Attestation, encoded
from images.publishing.oci import Damaged
from rollout.problem import Problem

# Properties: the locks that it was made from.
LOCK_PROPERTY = "rollout:lock.sha256"
BASE_PROPERTY = "rollout:base.lock.sha256"


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


def make(image: Image, digest: str) -> bytes:
    """What is in an image, as its lock and the base's say: name, version, package URL, sha256.

    Raises:
        Problem: a lock is missing or malformed.
    """
    purl, debs = image_purl(image, digest), base.lock_of(image)
    whole = Component(
        name=image.repository,
        version=digest,
        type=ComponentType.CONTAINER,
        purl=purl,
        bom_ref=purl.to_string(),
        properties=[
            Property(name=LOCK_PROPERTY, value=host.sha256(image.lock)),
            Property(name=BASE_PROPERTY, value=host.sha256(debs)),
        ],
    )
    bom = Bom(
        metadata=BomMetaData(component=whole),
        components=[
            *(_component(pypi_purl(e), e.version, e.sha256) for e in lock.read(image)),
            *(_component(deb_purl(d), d.version, d.sha256) for d in base.read(debs).debs),
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


@dataclass(frozen=True)
class Sbom:
    """What an SBOM says: of which digest it is, from which locks, and what is in the image."""

    digest: str
    locks: Mapping[str, str]  # property -> sha256
    contents: Mapping[str, str]  # package URL -> sha256


def parse(attestation: Attestation) -> Sbom:
    """What :func:`make` made, if it was; whoever sent it is not believed.

    Raises:
        Problem: it is no such document.
    """
    try:
        found = oci.document(attestation.data)
    except Damaged:
        raise Problem(f"{attestation.name} is no JSON object") from None
    try:
        whole = found["metadata"]["component"]
        locks = {str(entry["name"]): str(entry["value"]) for entry in whole["properties"]}
        contents = {
            str(entry["purl"]): str(
                next(h["content"] for h in entry["hashes"] if h["alg"] == "SHA-256")
            )
            for entry in found["components"]
        }
        return Sbom(str(whole["version"]), locks, contents)
    except (KeyError, TypeError, StopIteration):
        raise Problem("the SBOM is no CycloneDX document of ours") from None

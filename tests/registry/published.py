"""A small image with everything that travels with one, published to a registry of a test.

What it stands for is made by the project's own functions: labels, lock, report, attestations,
signature.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from images import host
from images.building import build, labels
from images.catalog import Image
from images.locking import lock
from images.publishing import attach, copies, oci, packing, publication, tags
from images.publishing.attestations import Attestation
from images.publishing.copies import Copy
from images.publishing.keys import Key
from images.publishing.packing import Layer, Packing, Source
from images.publishing.registry import Registry
from images.publishing.tags import Tags
from images.publishing.unpacking import LOCK_INSIDE
from rollout import report
from tests import reports

from .conftest import REPOSITORY, tar

COMMIT = "c" * 40
KEY = Key(ec.generate_private_key(ec.SECP256R1()))
OTHER = Key(ec.generate_private_key(ec.SECP256R1()))


def layer(files: Mapping[str, bytes]) -> bytes:
    """The tar of a layer with these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@dataclass
class Release:
    """An image and where it is published."""

    image: Image
    folder: Path
    registry: Registry
    seed: str = "base"
    annotations: Mapping[str, str] | None = None
    how: Packing = packing.ZSTD

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        locked = lock.read(self.image)
        self.lock_sha256 = host.sha256(self.image.lock)
        stamps = labels.of_image(self.image, locked, self.lock_sha256, build.base_name())
        tars = {
            "base": tar(self.seed, 50_000),
            "entrypoints": layer({f"./{LOCK_INSIDE}": self.image.lock.read_bytes()}),
        }
        layers = []
        for name, data in tars.items():
            diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
            (self.folder / diff_id).write_bytes(data)
            layers.append(Layer(name, diff_id))
        self.diff_ids = [entry.diff_id for entry in layers]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": stamps},
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
        }
        self.config = json.dumps(config).encode()
        self.copy: Copy = copies.of_source(
            Source(self.config, tuple(layers), self._opened), self.annotations or {}, how=self.how
        )
        unproved = oci.UNPROVED in (self.annotations or {})
        self.tags: Tags = tags.of_image(
            self.image, unproved=unproved, gzip=self.how is packing.GZIP
        )

    @contextmanager
    def _opened(self, wanted: Collection[str]) -> Iterator[Mapping[str, Path]]:
        yield {diff_id: self.folder / diff_id for diff_id in wanted}

    @property
    def digest(self) -> str:
        return self.copy.descriptor.digest

    def report(self, **changes: Any) -> bytes:
        """A proof of this image, or what the changes make of it."""
        found = reports.of(self.image, self.diff_ids, started=report.now())
        return json.dumps({**found, **changes}, indent=1).encode()

    def failed_report(self) -> bytes:
        """A report of a run in which a check failed."""
        checks = json.loads(self.report())["checks"]
        refit = next(check for check in checks if check["name"] == "refit")
        refit |= {"status": "failed", "reason": "a tensor was lost"}
        return self.report(checks=checks, verdict="failed")

    def attestations(
        self, *, report: bytes | None = b"", key: Key | None = KEY, commit: str = COMMIT
    ) -> list[Attestation]:
        """What travels with it; by default with a proof, and signed."""
        proof = self.report() if report == b"" else report
        return publication.attested(
            self.image, digest=self.digest, report=proof, key=key, commit=commit
        )

    def publish(
        self, given: Sequence[Attestation] | None = None, *, key: Key | None = KEY
    ) -> Release:
        """Bring it into the registry, as ``nox -s publish`` does."""
        attached = self.attestations(key=key) if given is None else given
        publication.publish(self.copy, self.registry, REPOSITORY, self.tags, attached, key)
        return self

    # What somebody can do who may write to the registry

    def attach(self, *given: Attestation) -> list[oci.Descriptor]:
        """Put attestations there without listing them; returns how they would be listed."""
        listed = []
        for attestation in given:
            self.registry.push_blob(REPOSITORY, oci.EMPTY_DATA)
            self.registry.push_blob(REPOSITORY, attestation.data)
            data = oci.artifact(attestation, self.copy.descriptor)
            self.registry.push_manifest(REPOSITORY, oci.digest(data), data, oci.MANIFEST)
            listed.append(oci.referrer(data))
        return listed

    def relist(self, entries: Sequence[oci.Descriptor]) -> None:
        """Write the list of attestations anew."""
        tag = oci.fallback_tag(self.digest)
        self.registry.push_manifest(REPOSITORY, tag, oci.index(entries), oci.INDEX)

    def swap(self, attestation: Attestation) -> None:
        """Another attestation in place of the one of its kind."""
        entries = self.registry.referrers(REPOSITORY, self.digest)
        stay = [entry for entry in entries if entry.artifact_type != attestation.artifact_type]
        assert len(stay) == len(entries) - 1
        self.relist([*stay, *self.attach(attestation)])

    def attestation(self, kind: str) -> Attestation:
        """The attestation of a kind, as it is attached."""
        attached = attach.attached(self.registry, REPOSITORY, self.digest)
        (found,) = [one for one in attached if one.entry.artifact_type == kind]
        return found.attestation

    def tag(self, name: str, other: Release) -> None:
        """Point a tag to another image."""
        self.registry.push_manifest(REPOSITORY, name, other.copy.data, oci.MANIFEST)

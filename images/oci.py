"""Documents of the OCI specifications (image 1.1, distribution 1.1): pure functions, and a folder.

What is published is a manifest, which names a configuration and layers by their sha256, and
papers: manifests of their own, each of which names the image's as its ``subject``. A registry that
knows the referrers API lists them by that; for others there is the specification's fallback, an
index under a tag that is made of the digest. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rollout.problem import Problem

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
EMPTY = "application/vnd.oci.empty.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
EMPTY_DATA = b"{}"
TITLE = "org.opencontainers.image.title"
# Of an image that was published without a passing report: an annotation of its manifest, and what
# stands behind each of its tags.
UNPROVED = "rollout.unproved"
UNPROVED_TAG = "-unproved"
# What a registry is asked for: without these it may answer with an older form of the manifest.
MANIFESTS = (
    *(MANIFEST, INDEX),
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Paper(Protocol):
    """A document that travels with an image, as images/papers.py makes it."""

    @property
    def name(self) -> str: ...
    @property
    def artifact_type(self) -> str: ...
    @property
    def media_type(self) -> str: ...
    @property
    def data(self) -> bytes: ...


@dataclass(frozen=True)
class Descriptor:
    """How one document names another: by type, sha256 and size."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        data: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
        }
        if self.annotations:
            data["annotations"] = dict(self.annotations)
        if self.artifact_type:
            data["artifactType"] = self.artifact_type
        return data


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: of an image, or of a paper."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str = ""

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Everything that has to be there before this manifest may be, each once."""
        return tuple({blob.digest: blob for blob in (*self.layers, self.config)}.values())


def digest(data: bytes) -> str:
    """The name of some bytes in a registry."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether this is a sha256 as the specifications write it."""
    return _DIGEST.fullmatch(text) is not None


def describe(
    data: bytes, media_type: str, annotations: Mapping[str, str] | None = None
) -> Descriptor:
    """The descriptor of some bytes."""
    return Descriptor(media_type, digest(data), len(data), dict(annotations or {}))


def encode(document: Mapping[str, Any]) -> bytes:
    """A document as the bytes that its digest is of."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


# Documents


def manifest(
    config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str] | None = None
) -> bytes:
    """The manifest of an image."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.plain,
            "layers": [layer.plain for layer in layers],
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )


def artifact(paper: Paper, subject: Descriptor) -> bytes:
    """The manifest that attaches a paper to an image."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": paper.artifact_type,
            "config": describe(EMPTY_DATA, EMPTY).plain,
            "layers": [describe(paper.data, paper.media_type, {TITLE: paper.name}).plain],
            # Bare: the digest of a paper must not change with what else is said of the image.
            "subject": Descriptor(subject.media_type, subject.digest, subject.size).plain,
        }
    )


def referrer(data: bytes) -> Descriptor:
    """How an index lists the manifest of a paper: with its artifact type and its annotations."""
    found = parse(data)
    return Descriptor(MANIFEST, digest(data), len(data), found.annotations, found.artifact_type)


def index(manifests: Sequence[Descriptor]) -> bytes:
    """A list of manifests."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [entry.plain for entry in manifests],
        }
    )


def fallback_tag(subject: str) -> str:
    """The tag of the index of papers, where a registry keeps no list of referrers itself."""
    return subject.replace(":", "-")


def signature_tag(subject: str) -> str:
    """The tag under which cosign and containers/image look for signatures of a digest."""
    return f"{fallback_tag(subject)}.sig"


def signature_config(signatures: Sequence[Descriptor]) -> bytes:
    """The configuration of a manifest of signatures, as cosign writes it."""
    never = "0001-01-01T00:00:00Z"
    return encode(
        {
            "architecture": "",
            "created": never,
            "history": [{"created": never}],
            "os": "",
            "rootfs": {"type": "layers", "diff_ids": [entry.digest for entry in signatures]},
            "config": {},
        }
    )


# Reading


def parse_descriptor(data: Mapping[str, Any]) -> Descriptor:
    """What :attr:`Descriptor.plain` made.

    Raises:
        Problem: it is none, or its digest is not a sha256.
    """
    try:
        found = Descriptor(
            str(data["mediaType"]),
            str(data["digest"]),
            int(data["size"]),
            dict(data.get("annotations") or {}),
            str(data.get("artifactType") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Problem("a manifest of the registry names something without type or size") from None
    if not is_digest(found.digest) or found.size < 0:
        raise Problem(f"a manifest of the registry has {found.digest!r}, which is no sha256")
    return found


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Problem("the registry gave a manifest that is no JSON object")
    return found


def parse(data: bytes) -> Manifest:
    """Read the manifest of an image or of a paper.

    Raises:
        Problem: it is none.
    """
    found = _object(data)
    if not isinstance(found.get("config"), dict) or not isinstance(found.get("layers"), list):
        raise Problem("the registry gave something that is no manifest of one image")
    config = parse_descriptor(found["config"])

    # Older papers have no artifact type of their own: their configuration has it.
    kind = str(found.get("artifactType") or config.media_type)
    subject = found.get("subject")
    return Manifest(
        config,
        tuple(parse_descriptor(layer) for layer in found["layers"]),
        dict(found.get("annotations") or {}),
        parse_descriptor(subject) if subject else None,
        kind,
    )


def parse_index(data: bytes) -> list[Descriptor]:
    """Read a list of manifests.

    Raises:
        Problem: it is none.
    """
    entries = _object(data).get("manifests")
    if not isinstance(entries, list):
        raise Problem("the registry gave something that is no list of manifests")
    return [parse_descriptor(entry) for entry in entries]


def diff_ids(config: bytes) -> tuple[str, ...]:
    """The sha256 of each uncompressed layer, from the lowest up, as a configuration names them.

    Raises:
        Problem: it names none.
    """
    try:
        return tuple(str(entry) for entry in json.loads(config)["rootfs"]["diff_ids"])
    except (ValueError, KeyError, TypeError):
        raise Problem("the configuration of the image names no layers") from None


# A folder


def _place(source: Path, target: Path) -> None:
    """A file without a second copy of its bytes: a hard link, or a symbolic one to another disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())


def write_layout(folder: Path, data: bytes, config: bytes, files: Mapping[str, Path]) -> None:
    """An OCI layout of one image; ``files`` are its layers by digest.

    A layer that is not among them is left out, which does for one that the registry has.
    """
    shutil.rmtree(folder, ignore_errors=True)
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for content in (data, config):
        (blobs / digest(content).removeprefix("sha256:")).write_bytes(content)
    for name, path in files.items():
        _place(path, blobs / name.removeprefix("sha256:"))
    (folder / "oci-layout").write_bytes(encode({"imageLayoutVersion": "1.0.0"}))
    (folder / "index.json").write_bytes(index([describe(data, MANIFEST)]))


def read_layout(folder: Path) -> tuple[bytes, Descriptor]:
    """The manifest of the one image of a layout.

    Raises:
        Problem: there is none, or another number of them, or its bytes are not those of its name.
    """
    try:
        entries = parse_index((folder / "index.json").read_bytes())
        if len(entries) != 1:
            raise Problem(f"{folder} has {len(entries)} images; an OCI layout of one is needed", 2)
        path = folder / "blobs" / "sha256" / entries[0].digest.removeprefix("sha256:")
        data = path.read_bytes()
    except OSError as error:
        raise Problem(
            f"{folder} is no OCI layout: {error.strerror} ({error.filename})", 2
        ) from None
    if digest(data) != entries[0].digest:
        raise Problem(f"{path} is damaged: its sha256 is not its name; write the layout anew")
    return data, entries[0]

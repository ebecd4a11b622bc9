"""Documents of the OCI specifications (image 1.1, distribution 1.1): pure functions, and a folder.

What is published is a manifest, which names a configuration and layers by their sha256, and
attestations: manifests of their own, each of which names the image's as its ``subject``. A registry
that knows the referrers API lists them by that; for others there is the specification's fallback,
an index under a tag that is made of the digest. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from images.publishing.attestations import Attestation
from rollout.problem import Problem

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
EMPTY = "application/vnd.oci.empty.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
EMPTY_DATA = b"{}"
TITLE = "org.opencontainers.image.title"
# Of an image that was published without a passing report: an annotation of its manifest, and what
# stands behind each of its tags.
UNPROVED = "rollout.unproved"
# Of one that is proved in part: a JSON object of what is not shown, each with the reason.
NOT_SHOWN = "rollout.not-shown"
# What a registry is asked for: without these it may answer with an older form of the manifest.
MANIFESTS = (
    *(MANIFEST, INDEX),
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONE = re.compile("[\ud800-\udfff]")  # JSON can name half a character, which no file can hold
_SIZE = 1 << 63


class Damaged(Problem):
    """What a registry or a layout holds is not what it should be: a verdict on an image."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, 1)


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
    """What a manifest says: of an image, or of an attestation."""

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


def artifact(attestation: Attestation, subject: Descriptor) -> bytes:
    """The manifest that attaches an attestation to an image."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": attestation.artifact_type,
            "config": describe(EMPTY_DATA, EMPTY).plain,
            "layers": [
                describe(attestation.data, attestation.media_type, {TITLE: attestation.name}).plain
            ],
            # Bare: its digest must not change with what else is said of the image.
            "subject": Descriptor(subject.media_type, subject.digest, subject.size).plain,
        }
    )


def referrer(data: bytes) -> Descriptor:
    """How an index lists the manifest of an attestation: with artifact type and annotations."""
    found = parse(data)
    return Descriptor(MANIFEST, digest(data), len(data), found.annotations, found.artifact_type)


def of_proof(missing: Mapping[str, str] | None) -> dict[str, str]:
    """The annotations that say what a proof does not show; None stands for no proof at all."""
    if missing is None:
        return {UNPROVED: "true"}
    return {NOT_SHOWN: encode(dict(missing)).decode()} if missing else {}


def not_shown(annotations: Mapping[str, str]) -> dict[str, str]:
    """What the manifest of an image says that its proof does not show.

    Raises:
        Damaged: it says nothing that could be understood.
    """
    if NOT_SHOWN not in annotations:
        return {}
    found = None
    with suppress(Damaged):
        found = document(annotations[NOT_SHOWN].encode())
    if not found or not all(
        isinstance(text, str) and text.isprintable() for pair in found.items() for text in pair
    ):
        raise Damaged(f"the annotation {NOT_SHOWN} of the manifest is no table of texts")
    return found


def index(manifests: Sequence[Descriptor]) -> bytes:
    """A list of manifests."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [entry.plain for entry in manifests],
        }
    )


def gzipped(layers: Iterable[Descriptor]) -> bool:
    """Whether layers are for tools that read no zstd."""
    return any(layer.media_type == GZIP_LAYER for layer in layers)


def fallback_tag(subject: str) -> str:
    """The tag of the index of attestations, where a registry keeps no list of referrers itself."""
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


def shown(text: str, most: int = 200) -> str:
    """Text of a registry as a sentence may have it: on one line, nothing that a terminal obeys."""
    safe = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return "".join(safe) + ("..." if len(text) > most else "")


def document(data: bytes) -> dict[str, Any]:
    """The JSON object that a registry gave.

    Raises:
        Damaged: it is none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Damaged("the registry gave a document that is no JSON object")
    return found


def _kind(found: Mapping[str, Any], key: str) -> str:
    """A media type, empty where there is none."""
    kind = found.get(key)
    if kind is not None and not (isinstance(kind, str) and kind.isprintable()):
        raise Damaged(f"a manifest of the registry has a {key} that is none")
    return kind or ""


def _annotations(found: Mapping[str, Any]) -> dict[str, str]:
    given = found.get("annotations")
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(
        isinstance(text, str) and not _LONE.search(text) for pair in given.items() for text in pair
    ):
        raise Damaged("a manifest of the registry has annotations that are no table of texts")
    return given


def parse_descriptor(data: object) -> Descriptor:
    """What :attr:`Descriptor.plain` made.

    Raises:
        Damaged: it is none, or its digest is not a sha256.
    """
    if not isinstance(data, dict):
        raise Damaged("a manifest of the registry has something else where it should name a blob")
    media_type, name, size = _kind(data, "mediaType"), data.get("digest"), data.get("size")
    # JSON's true is a number to Python, and so is 1e999.
    if not media_type or type(size) is not int or not 0 <= size < _SIZE:
        raise Damaged("a manifest of the registry names something without type or size")
    if not isinstance(name, str) or not is_digest(name):
        given = repr(shown(name)) if isinstance(name, str) else "something"
        raise Damaged(f"a manifest of the registry has {given} as a digest, which is no sha256")
    return Descriptor(media_type, name, size, _annotations(data), _kind(data, "artifactType"))


def parse(data: bytes) -> Manifest:
    """Read the manifest of an image or of an attestation.

    Raises:
        Damaged: it is none.
    """
    found = document(data)
    if not isinstance(found.get("config"), dict) or not isinstance(found.get("layers"), list):
        raise Damaged("the registry gave something that is no manifest of one image")
    config = parse_descriptor(found["config"])

    # Older attestations have no artifact type of their own: their configuration has it.
    kind = _kind(found, "artifactType") or config.media_type
    subject = found.get("subject")
    return Manifest(
        config,
        tuple(parse_descriptor(layer) for layer in found["layers"]),
        _annotations(found),
        None if subject is None else parse_descriptor(subject),
        kind,
    )


def parse_index(data: bytes) -> list[Descriptor]:
    """Read a list of manifests.

    Raises:
        Damaged: it is none.
    """
    entries = document(data).get("manifests")
    if not isinstance(entries, list):
        raise Damaged("the registry gave something that is no list of manifests")
    return [parse_descriptor(entry) for entry in entries]


def diff_ids(config: bytes) -> tuple[str, ...]:
    """The sha256 of each uncompressed layer, from the lowest up, as a configuration names them.

    Raises:
        Damaged: it names none.
    """
    found = None
    with suppress(Damaged):
        rootfs = document(config).get("rootfs")
        found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(
        isinstance(entry, str) and entry.isprintable() for entry in found
    ):
        raise Damaged("the configuration of the image names no layers")
    return tuple(found)


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

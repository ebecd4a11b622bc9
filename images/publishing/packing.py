"""Between buildah and a registry: the layers, compressed once and known by what they are.

A layer is read out of buildah's storage only where this machine has never compressed it, or no
longer has the file that a registry lacks. What it became is kept beside it, under the sha256 of its
tar; so an image that was published before is described without reading it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from images import host
from images.building import build, builder, layering, layers
from images.building.buildah import Buildah
from images.catalog import Image
from images.host import leftovers
from images.locking import lock
from images.publishing import oci
from images.publishing.oci import Descriptor
from rollout.problem import Problem


@dataclass(frozen=True)
class Packing:
    """A way to compress layers: its name, what a registry calls the result, and the command."""

    name: str
    media_type: str
    suffix: str
    argv: Callable[[], list[str]]


ZSTD = Packing("zstd", oci.LAYER, ".tar.zst", lambda: layers.zstd_argv())
# For docker before 23, containerd before 1.5, enroot before 4 and Apptainer before 1.5.
GZIP = Packing("gzip", oci.GZIP_LAYER, ".tar.gz", layers.gzip_argv)
PACKINGS = {packing.name: packing for packing in (ZSTD, GZIP)}


@dataclass(frozen=True)
class Layer:
    """A layer by its name for people and the sha256 of its tar."""

    name: str
    diff_id: str


@dataclass(frozen=True)
class Source:
    """An image to publish: the bytes of its configuration, its layers, and a way to their tars.

    ``opened`` gives the tars of the layers asked for (by ``diff_id``), as long as it is entered.
    """

    config: bytes
    layers: tuple[Layer, ...]
    opened: Callable[[Collection[str]], AbstractContextManager[Mapping[str, Path]]]


# What an image is in buildah's storage


def config_argv(identity: str) -> list[str]:
    """The command that prints the configuration of an image to the byte."""
    return ["skopeo", "inspect", "--config", "--raw", f"containers-storage:{identity}"]


def source(image: Image, tool: Buildah, built: builder.Built) -> Source:
    """The image as buildah holds it.

    Raises:
        Problem: exit code 3 where skopeo sees another one.
    """
    config = subprocess.run(config_argv(built.id), capture_output=True, check=False)
    if config.returncode or hashlib.sha256(config.stdout).hexdigest() != built.id:
        raise Problem(
            f"skopeo does not read {image.reference} as buildah does; build the image anew", 3
        )
    names = layering.layer_names(image, lock.read(image))

    @contextmanager
    def opened(wanted: Collection[str]) -> Iterator[Mapping[str, Path]]:
        known = layers.read(image)
        needed = sum(layer.bytes for layer in known.layers) if known else build.DISK_NEEDED
        build.check_disk(host.scratch(), needed)
        with leftovers.temporary("publish", host.scratch()) as folder:
            tars = tool.blobs(built.id, folder)
            found = {f"sha256:{path.name}": path for path in tars}
            for diff_id in set(found) - set(wanted):
                found.pop(diff_id).unlink()  # buildah writes all of them
            yield found

    pairs = zip(names, built.diff_ids, strict=True)
    return Source(config.stdout, tuple(Layer(*pair) for pair in pairs), opened)


# Layers: compressed once


def store() -> Path:
    """Where compressed layers are kept, each under the sha256 of its tar."""
    return host.cache() / "layers" / "compressed"


def _record(diff_id: str, packing: Packing) -> Path:
    name = diff_id.removeprefix("sha256:")
    return store() / (f"{name}.json" if packing is ZSTD else f"{name}.{packing.name}.json")


def packed(diff_id: str, packing: Packing = ZSTD) -> Path:
    """The file of a compressed layer."""
    return store() / f"{diff_id.removeprefix('sha256:')}{packing.suffix}"


def remembered(diff_id: str, packing: Packing = ZSTD) -> Descriptor | None:
    """What a layer is when compressed, None where this machine has not done that yet.

    The file may be gone all the same: a registry that has it needs no other copy.
    """
    try:
        data = json.loads(_record(diff_id, packing).read_text(encoding="utf-8"))
        found = oci.parse_descriptor(data)
    except (OSError, ValueError, AttributeError, TypeError, Problem):
        return None
    return found if found.media_type == packing.media_type else None


def kept(diff_id: str, layer: Descriptor, packing: Packing = ZSTD) -> Path | None:
    """The file of a compressed layer, where it is there in full."""
    file = packed(diff_id, packing)
    if not file.is_file() or file.stat().st_size != layer.size:
        return None
    leftovers.used(file)
    return file


def compress(diff_id: str, tar: Path, packing: Packing = ZSTD) -> Descriptor:
    """Compress a layer into the store; the same tar gives the same bytes with the same zstd.

    Raises:
        Problem: the tar is not what its name says, or it could not be compressed.
    """
    out, size = hashlib.sha256(), 0
    with host.replacing(packed(diff_id, packing)) as temporary, temporary.open("wb") as file:
        for piece in layers.packed(tar, packing.argv()):
            file.write(piece)
            out.update(piece)
            size += len(piece)
        if f"sha256:{host.sha256(tar)}" != diff_id:
            raise Problem(f"a layer is damaged: {tar} is not {diff_id}; build the image anew")
        file.flush()
        os.fsync(file.fileno())  # a record of what a power cut has halved would be believed
    found = Descriptor(packing.media_type, f"sha256:{out.hexdigest()}", size)
    host.write(_record(diff_id, packing), json.dumps(found.plain) + "\n")
    return found


def compressed(
    source: Source, wanted: Collection[str], names: Mapping[str, str], packing: Packing = ZSTD
) -> dict[str, Descriptor]:
    """Compress layers of a source, by ``diff_id``."""
    found = {}
    if wanted:
        leftovers.sweep()
        with source.opened(wanted) as tars:
            for diff_id in wanted:
                found[diff_id] = compress(diff_id, tars[diff_id], packing)
                tell(names[diff_id], found[diff_id], "compressed")
    return found


def tell(name: str, what: Descriptor, outcome: str) -> None:
    """A line on what became of a layer."""
    host.say(f"  {name:<12} {what.digest[:19]}  {what.size:>15,} bytes  {outcome}")

"""A copy of an image for a registry: out of buildah's storage or another registry, brought there.

The layers go first (each compressed once on this machine and kept), then the configuration to the
byte, then the manifest under its digest alone. So nothing unfinished is there to be named, whenever
the registry or this program is killed; running it again uploads what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace

from images import host
from images.host import leftovers
from images.publishing import failures, oci, packing, skopeo
from images.publishing.failures import Broken
from images.publishing.oci import Descriptor
from images.publishing.packing import Packing, Source
from images.publishing.registry import Registry
from rollout.problem import Problem


@dataclass(frozen=True)
class Copy:
    """An image that a registry is to have: its manifest, and how to get what it lacks there.

    ``names`` are for people, by digest of a layer. ``upload`` gives the source for skopeo and
    whether that is a registry without TLS; it is asked with the blobs that are missing.
    """

    data: bytes
    names: Mapping[str, str]
    upload: Callable[[Collection[str]], AbstractContextManager[tuple[str, bool]]]
    siblings: tuple[str, ...] = ()  # other repositories of this registry that may have a blob

    @property
    def manifest(self) -> oci.Manifest:
        return oci.parse(self.data)

    @property
    def descriptor(self) -> Descriptor:
        return oci.describe(self.data, oci.MANIFEST)


# From where


def of_source(
    source: Source,
    annotations: Mapping[str, str],
    siblings: Sequence[str] = (),
    how: Packing = packing.ZSTD,
) -> Copy:
    """A source with its layers compressed, ready for a registry.

    A layer that was compressed here before is not read again; only a registry that lacks it needs
    its file.
    """
    names = {layer.diff_id: layer.name for layer in source.layers}
    found = {diff_id: packing.remembered(diff_id, how) for diff_id in names}
    unseen = [diff_id for diff_id in names if not found[diff_id]]
    new = packing.compressed(source, unseen, names, how)
    packs = {diff_id: pack for diff_id in names if (pack := new.get(diff_id) or found[diff_id])}
    by_digest = {pack.digest: diff_id for diff_id, pack in packs.items()}
    data = oci.manifest(
        oci.describe(source.config, oci.CONFIG),
        [packs[layer.diff_id] for layer in source.layers],
        annotations,
    )

    @contextmanager
    def upload(missing: Collection[str]) -> Iterator[tuple[str, bool]]:
        wanted = {by_digest[name]: name for name in missing if name in by_digest}
        files = {d: file for d, pack in packs.items() if (file := packing.kept(d, pack, how))}
        gone = [diff_id for diff_id in wanted if diff_id not in files]
        for diff_id, again in packing.compressed(source, gone, names, how).items():
            if again.digest != wanted[diff_id]:
                raise Problem(
                    f"layer {names[diff_id]} was compressed into other bytes than before, by "
                    f"another {how.name}; run this again to publish it so"
                )
            files[diff_id] = packing.packed(diff_id, how)
        placed = {packs[diff_id].digest: file for diff_id, file in files.items()}
        with leftovers.temporary("layout", host.scratch()) as folder:
            oci.write_layout(folder / "layout", data, source.config, placed)
            yield f"oci:{folder}/layout", False

    labels = {digest: names[diff_id] for digest, diff_id in by_digest.items()}
    return Copy(data, labels, upload, tuple(siblings))


def of_registry(data: bytes, origin: Registry, repository: str, siblings: Sequence[str]) -> Copy:
    """An image of a registry, by its manifest, ready for another."""
    digest = oci.digest(data)

    @contextmanager
    def upload(_: Collection[str]) -> Iterator[tuple[str, bool]]:
        yield f"docker://{origin.reference(repository, digest)}", origin.plain_http

    names = {layer.digest: f"layer {n}" for n, layer in enumerate(oci.parse(data).layers, 1)}
    return Copy(data, names, upload, tuple(siblings))


# To a registry


def lacking(registry: Registry, repository: str, blobs: Collection[Descriptor]) -> list[Descriptor]:
    """The blobs that a repository does not have, or has in another size."""
    return [b for b in blobs if registry.blob_size(repository, b.digest) != b.size]


def complete(image: Copy, registry: Registry, repository: str) -> bool:
    """Whether a repository has an image in full."""
    found = registry.manifest(repository, image.descriptor.digest)
    return found is not None and not lacking(registry, repository, image.manifest.blobs)


def bring(image: Copy, registry: Registry, repository: str) -> bool:
    """Bring an image into a repository that lacks some of it; whether it did.

    Raises:
        Problem: the registry refuses, or does not come back.
    """
    if complete(image, registry, repository):
        return False
    push(image, registry, repository)
    return True


def push(image: Copy, registry: Registry, repository: str) -> None:
    """Bring an image into a repository, under its digest alone; a line for each layer.

    Raises:
        Problem: the registry refuses, or does not come back.
    """
    blobs, digest = image.manifest.blobs, image.descriptor.digest
    missing = {b.digest: b for b in lacking(registry, repository, blobs)}

    def tell(blob: Descriptor, outcome: str) -> None:
        packing.tell(image.names.get(blob.digest, "config"), blob, outcome)

    def landed(asked: Registry) -> None:
        still = {b.digest for b in lacking(asked, repository, tuple(missing.values()))}
        for name in [name for name in missing if name not in still]:
            tell(missing.pop(name), "uploaded")

    for blob in blobs:
        if blob.digest not in missing:
            tell(blob, "already there")
    for sibling in image.siblings:
        for name in list(missing):
            if registry.mount(repository, name, sibling):
                tell(missing.pop(name), "mounted")
    if missing:
        with image.upload(tuple(missing)) as (origin, plain):
            argv = skopeo.copy_argv(
                origin,
                f"docker://{registry.reference(repository, digest)}",
                plain=(plain, registry.plain_http),
                authfile=registry.authfile,
                cert_dir=registry.cert_dir,
            )
            _upload(argv, registry, repository, landed, missing)
        landed(registry)
    if missing:
        blob = next(iter(missing.values()))
        raise Problem(
            f"{registry.host} took {blob.digest} and does not have it in its {blob.size:,} bytes; "
            "the storage of that registry is damaged"
        )
    if not registry.manifest(repository, digest):
        registry.push_manifest(repository, digest, image.data, oci.MANIFEST)


def _upload(
    argv: Sequence[str],
    registry: Registry,
    repository: str,
    landed: Callable[[Registry], None],
    missing: Collection[str],
) -> None:
    """Run skopeo until everything is there; patience begins anew whenever a layer has landed.

    Raises:
        Problem: the registry refuses, or does not come back.
    """
    hasty = replace(registry, waits=())  # while skopeo is at work, and the one to complain
    left = [len(missing)]

    def tick() -> None:
        with suppress(Problem):
            landed(hasty)

    def moved() -> bool:
        left.append(len(missing))
        return left[-1] < left[-2]

    def once() -> None:
        try:
            skopeo.copy(argv, registry.name(repository), tick)
        except Broken:
            tick()
            found = hasty.why(repository)
            if found and not isinstance(found, Broken):
                raise found from None
            raise

    failures.patiently(once, registry.waits, moved)

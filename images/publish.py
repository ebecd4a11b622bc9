"""Last station: from a proved image to a registry.

``nox -s publish -- REF --to HOST[/PREFIX]`` pushes what a passing report is about, by its digest:
the layers (each compressed once on this machine and kept), the configuration to the byte, the
manifest, then the papers, and only then the tags. So a tag stands for something whole at every
moment, whenever the registry or this program is killed; running it again uploads what is missing.

The immutable tag is never given to another digest. With ``--promote`` the source is a registry:
the same digest and its papers get the tags of the destination, and nothing is built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from images import build, builder, catalog, docs, export, host, layers, lock, oci, prove
from images import registry as registries
from images.catalog import Image, shown
from images.oci import Damaged, Descriptor
from images.registry import Broken, Registry
from rollout import report
from rollout.problem import Problem
from rollout.report import Check

if TYPE_CHECKING:
    from images.papers import Paper
    from images.verify_published import Published

_PIECE = 1 << 20
_RACES = 3  # how often a list that others write too is written again


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


@dataclass(frozen=True)
class Tags:
    """The names that a digest gets: one for good, and one that moves on with the next image."""

    immutable: str
    moving: str


def tags(image: Image, *, unproved: bool = False) -> Tags:
    """The tags of an image.

    What is not proved takes neither of the names that a proved one has, or is going to have.
    """
    name = build.immutable_tag(image, lock.read(image), host.sha256(image.lock))
    ending = oci.UNPROVED_TAG if unproved else ""
    return Tags(name + ending, image.tag + ending)


# The proof


def unfit(where: str, data: bytes, image: Image, diff_ids: Sequence[str]) -> str:
    """Why a report does not allow an image to be published, as a clause; empty if it does."""
    try:
        found = json.loads(data.decode())
    except ValueError:
        return f"{where} cannot be read"
    wrong = report.validate(found)
    if wrong:
        return f"{where} is no report ({wrong[0]})"
    if found["image"] != image.reference:
        return f"{where} is of {found['image']}"
    if found["lock_sha256"] != host.sha256(image.lock):
        return f"{where} is of another lock"
    if found["layers"] != list(diff_ids):
        return f"{where} is of other layers"
    if found["verdict"] != "proved":
        return f"{where} says {found['verdict']}"
    # What the provenance says of the inputs has to be true of these layers.
    recorded = shown(layers.path(image))
    return "" if docs.current(image, found) else f"{recorded} is not of these inputs and layers"


def passing(image: Image, diff_ids: Sequence[str]) -> tuple[Path, bytes]:
    """The report that proves these layers: that of the last run here, else the kept one.

    Its bytes are what was looked at: the file may be another a minute later.

    Raises:
        Problem: none does; says what is wrong with each, and what to run.
    """
    reasons = []
    for path in (prove.report_path(image), prove.kept(image)):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            reason = f"there is no {shown(path)}"
        except OSError:
            reason = f"{shown(path)} cannot be read"
        else:
            reason = unfit(shown(path), data, image, diff_ids)
            if not reason:
                return path, data
        reasons.append(reason)
    raise Problem(
        f"{image.reference} has no passing report: {', and '.join(reasons)}; prove it with "
        f"'nox -s prove -- {image.reference}', or publish it as unproved with --unproved"
    )


# Layers: compressed once, and known by what they are


def store() -> Path:
    """Where compressed layers are kept, each under the sha256 of its tar."""
    return host.cache() / "layers" / "compressed"


def _record(diff_id: str) -> Path:
    return store() / f"{diff_id.removeprefix('sha256:')}.json"


def packed(diff_id: str) -> Path:
    """The file of a compressed layer."""
    return _record(diff_id).with_suffix(".tar.zst")


def remembered(diff_id: str) -> Descriptor | None:
    """What a layer is when compressed, None where this machine has not done that yet.

    The file may be gone all the same: a registry that has it needs no other copy.
    """
    try:
        data = json.loads(_record(diff_id).read_text(encoding="utf-8"))
        found = oci.parse_descriptor(data)
    except (OSError, ValueError, AttributeError, TypeError, Problem):
        return None
    return found if found.media_type == oci.LAYER else None


def kept(diff_id: str, layer: Descriptor) -> Path | None:
    """The file of a compressed layer, where it is there in full."""
    file = packed(diff_id)
    return file if file.is_file() and file.stat().st_size == layer.size else None


def _sweep() -> None:
    """Remove what a killed run has left of a layer."""
    for file in store().glob(".*"):
        pid = file.name.rpartition(".")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            file.unlink(missing_ok=True)


def compress(diff_id: str, tar: Path) -> Descriptor:
    """Compress a layer into the store; the same tar gives the same bytes with the same zstd.

    Raises:
        Problem: the tar is not what its name says, or zstd failed.
    """
    host.require("zstd")
    raw, out, size = hashlib.sha256(), hashlib.sha256(), 0
    with host.replacing(packed(diff_id)) as temporary, temporary.open("wb") as file:
        # It reads the tar itself: with a size to go by it takes other parameters than for a pipe.
        argv = [*layers.zstd_argv(), str(tar)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            while process.stdout and (piece := process.stdout.read(_PIECE)):
                file.write(piece)
                out.update(piece)
                size += len(piece)
        if process.returncode:
            raise Problem(f"zstd exited with {process.returncode}; is there disk space?")
        with tar.open("rb") as stream:
            while piece := stream.read(_PIECE):
                raw.update(piece)
        if f"sha256:{raw.hexdigest()}" != diff_id:
            raise Problem(f"a layer is damaged: {tar} is not {diff_id}; build the image anew")
        file.flush()
        os.fsync(file.fileno())  # a record of what a power cut has halved would be believed
    found = Descriptor(oci.LAYER, f"sha256:{out.hexdigest()}", size)
    host.write(_record(diff_id), json.dumps(found.plain) + "\n")
    return found


def compressed(
    source: Source, wanted: Collection[str], names: Mapping[str, str]
) -> dict[str, Descriptor]:
    """Compress layers of a source, by ``diff_id``."""
    found = {}
    if wanted:
        _sweep()
        with source.opened(wanted) as tars:
            for diff_id in wanted:
                found[diff_id] = compress(diff_id, tars[diff_id])
                _tell(names[diff_id], found[diff_id], "compressed")
    return found


def _tell(name: str, what: Descriptor, outcome: str) -> None:
    host.say(f"  {name:<12} {what.digest[:19]}  {what.size:>15,} bytes  {outcome}")


# What an image is in buildah's storage


def config_argv(name: str) -> list[str]:
    """The command that prints the configuration of an image to the byte."""
    return ["skopeo", "inspect", "--config", "--raw", f"containers-storage:{name}"]


def source(image: Image, tool: builder.Buildah) -> Source:
    """The image as buildah holds it.

    Raises:
        Problem: exit code 3 where it is not built, or from another lock.
    """
    built = export.current(image, tool)
    name = tool.local + image.reference
    config = subprocess.run(config_argv(name), capture_output=True, check=False)
    if config.returncode or hashlib.sha256(config.stdout).hexdigest() != built.id:
        raise Problem(f"skopeo does not read {name} as buildah does; build the image anew", 3)
    names = build.layer_names(image, lock.read(image))

    @contextmanager
    def opened(wanted: Collection[str]) -> Iterator[Mapping[str, Path]]:
        known = layers.read(image)
        needed = sum(layer.bytes for layer in known.layers) if known else build.DISK_NEEDED
        build.check_disk(host.scratch(), needed)
        with tempfile.TemporaryDirectory(prefix="rollout-publish-", dir=host.scratch()) as folder:
            tars = tool.blobs(name, Path(folder))
            found = {f"sha256:{path.name}": path for path in tars}
            for diff_id in set(found) - set(wanted):
                found.pop(diff_id).unlink()  # buildah writes all of them
            yield found

    pairs = zip(names, built.diff_ids, strict=True)
    return Source(config.stdout, tuple(Layer(*pair) for pair in pairs), opened)


# To a registry


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


def lacking(registry: Registry, repository: str, blobs: Collection[Descriptor]) -> list[Descriptor]:
    """The blobs that a repository does not have, or has in another size."""
    return [b for b in blobs if registry.blob_size(repository, b.digest) != b.size]


def push(image: Copy, registry: Registry, repository: str) -> None:
    """Bring an image into a repository, under its digest alone; a line for each layer.

    Raises:
        Problem: the registry refuses, or does not come back.
    """
    blobs = image.manifest.blobs
    missing = {b.digest: b for b in lacking(registry, repository, blobs)}
    for blob in blobs:
        if blob.digest not in missing:
            _tell(image.names.get(blob.digest, "config"), blob, "already there")

    def landed(asked: Registry) -> None:
        still = {b.digest for b in lacking(asked, repository, tuple(missing.values()))}
        for digest in [digest for digest in missing if digest not in still]:
            _tell(image.names.get(digest, "config"), missing.pop(digest), "uploaded")

    for sibling in image.siblings:
        for digest in list(missing):
            if registry.mount(repository, digest, sibling):
                _tell(image.names.get(digest, "config"), missing.pop(digest), "mounted")
    digest = image.descriptor.digest
    if missing:
        with image.upload(tuple(missing)) as (origin, plain):
            argv = registries.copy_argv(
                origin,
                f"docker://{registry.reference(repository, digest)}",
                plain=(plain, registry.plain_http),
                authfile=registry.authfile,
                cert_dir=registry.cert_dir,
            )
            upload(argv, registry, repository, landed, missing)
        landed(registry)
    if missing:
        blob = next(iter(missing.values()))
        raise Problem(
            f"{registry.host} took {blob.digest} and does not have it in its {blob.size:,} bytes; "
            "the storage of that registry is damaged"
        )
    if not registry.manifest(repository, digest):
        registry.push_manifest(repository, digest, image.data, oci.MANIFEST)


def upload(
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
            registries.copy(argv, registry.name(repository), tick)
        except Broken:
            tick()
            found = hasty.why(repository)
            if found and not isinstance(found, Broken):
                raise found from None
            raise

    registries.patiently(once, registry.waits, moved)


def complete(image: Copy, registry: Registry, repository: str) -> bool:
    """Whether a repository has an image in full."""
    found = registry.manifest(repository, image.descriptor.digest)
    return found is not None and not lacking(registry, repository, image.manifest.blobs)


def free(image: Copy, registry: Registry, repository: str, tag: str) -> bool:
    """Whether an immutable tag is still to be given; False where it is this image's already.

    Raises:
        Problem: it is another image's.
    """
    found = registry.manifest(repository, tag)
    if found is None:
        return True
    data, there = found
    if there.digest == image.descriptor.digest:
        return False
    what = registry.reference(repository, tag)
    why = "an immutable tag is never overwritten: a new lock makes a new one"
    if oci.parse(data).config.digest == image.manifest.config.digest:
        why = (
            "that is the same image, and its layers are compressed by another zstd or level; what "
            "is there is what counts, so there is nothing to publish"
        )
    raise Problem(
        f"{what} exists as {there.digest}, and this is {image.descriptor.digest}; nothing was "
        f"changed, and {why}"
    )


def give(registry: Registry, repository: str, image: Copy, names: Tags) -> list[str]:
    """Point the tags to an image that is whole; returns those that were moved.

    The protocol has no way to write a tag on condition that there is none. So of two publishers
    with two images for one immutable tag, in the same moment, the later one wins; the other sees
    it here and fails. A registry that protects tags by itself refuses the later one.

    Raises:
        Problem: the immutable tag is another image's, or has just become it.
    """
    digest, given = image.descriptor.digest, []
    if free(image, registry, repository, names.immutable):
        registry.push_manifest(repository, names.immutable, image.data, oci.MANIFEST)
        given.append(names.immutable)
        if free(image, registry, repository, names.immutable):
            raise Problem(f"{registry.host} took the tag {names.immutable} and does not have it")
    if names.moving and registry.resolve(repository, names.moving) != digest:
        registry.push_manifest(repository, names.moving, image.data, oci.MANIFEST)
        given.append(names.moving)
    return given


# Papers


@dataclass(frozen=True)
class Attached:
    """A paper in a registry: how it is listed, its manifest, and its bytes."""

    entry: Descriptor
    manifest: bytes
    data: bytes

    @property
    def paper(self) -> Paper:
        """As it was before it was attached."""
        from images import papers

        (layer,) = oci.parse(self.manifest).layers
        kind = self.entry.artifact_type
        title = layer.annotations.get(oci.TITLE, kind)
        return papers.Paper(title, kind, layer.media_type, self.data)


def attached(
    registry: Registry,
    repository: str,
    digest: str,
    listed: Sequence[Descriptor] | None = None,
) -> list[Attached]:
    """The papers of an image that are there in full; a list may name more than there is.

    Raises:
        Problem: the registry did not let one be read, which says nothing of the paper.
    """
    found = []
    for entry in registry.referrers(repository, digest) if listed is None else listed:
        with suppress(Damaged):  # or no paper at all: whoever attached it may mend it
            got = registry.manifest(repository, entry.digest)
            if got is None:
                continue
            paper = oci.parse(got[0])
            if paper.subject and paper.subject.digest == digest and len(paper.layers) == 1:
                (layer,) = paper.layers
                data = registry.blob(repository, layer.digest, size=layer.size)
                named = replace(entry, artifact_type=paper.artifact_type)
                found.append(Attached(named, got[0], data))
    return found


def of_publishing(paper: Paper) -> bool:
    """Whether a paper is of a form that publishing attaches; others may attach statements too."""
    from images import papers, verify_published

    if paper.artifact_type != papers.STATEMENT:
        return True
    said = verify_published.statement_of(paper, None) or {}
    try:
        kind = said["predicate"]["buildDefinition"]["buildType"]
    except (KeyError, TypeError):
        return False
    return said.get("predicateType") == papers.PREDICATE_TYPE and bool(kind == papers.BUILD_TYPE)


def ours(there: Sequence[Attached], kinds: Collection[str]) -> list[Attached]:
    """The papers of these kinds that publishing attaches."""
    return [p for p in there if p.entry.artifact_type in kinds and of_publishing(p.paper)]


def sufficient(
    there: Sequence[Attached], kinds: Collection[str], digest: str, key: Any = None
) -> bool:
    """Whether one paper of each kind is attached, and the provenance signed where there is a key.

    A later commit, or a later run of the proof, makes other papers for the same image. Those that
    it was published with stay: they are about each other, and still true.
    """
    from images import papers, verify_published

    found = [paper.paper for paper in ours(there, kinds)]
    if sorted(paper.artifact_type for paper in found) != sorted(kinds):
        return False
    statements = [paper for paper in found if paper.artifact_type == papers.STATEMENT]
    named = {(p.media_type, p.sha256) for p in found if p not in statements}
    for paper in statements:
        said = verify_published.statement_of(paper, key.public if key else None)
        try:
            if not said or verify_published.origin_of(said, digest).byproducts != named:
                return False
        except Problem:  # of another image, or less than a provenance of ours
            return False
    return True


def attach(
    registry: Registry,
    repository: str,
    subject: Descriptor,
    papers: Sequence[oci.Paper],
    key: Any = None,
    *,
    exactly: bool = False,
) -> list[str]:
    """Attach papers to an image, in place of others of ours; returns their names.

    Others that do as well stay (see :func:`sufficient`) and nothing is attached, unless it is
    ``exactly`` these that have to be there.

    Raises:
        Problem: the registry refuses, or did not let a paper be read: then nothing was changed.
    """
    kinds = {paper.artifact_type for paper in papers}
    listed = registry.referrers(repository, subject.digest)
    there = attached(registry, repository, subject.digest, listed)
    if not exactly and sufficient(there, kinds, subject.digest, key):
        return []
    made = [oci.artifact(paper, subject) for paper in papers]
    manifests = {oci.digest(data): data for data in made}
    sound = {paper.entry.digest for paper in there}
    broken = {e.digest for e in listed if e.digest not in sound and e.artifact_type in kinds}
    others = {paper.entry.digest for paper in ours(there, kinds)} - set(manifests)
    replaced = broken | others
    missing = set(manifests) - sound
    if not missing and not replaced:
        return []
    for paper in papers:
        registry.push_blob(repository, oci.EMPTY_DATA)
        registry.push_blob(repository, paper.data)
    refer(registry, repository, subject.digest, list(manifests.values()), replaced)
    return [paper.name for paper in papers]


def refer(
    registry: Registry,
    repository: str,
    subject: str,
    manifests: Sequence[bytes],
    replaced: Collection[str] = (),
) -> None:
    """Put manifests of papers, and list them where the registry does not do so by itself.

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
        raise Problem(f"others write the papers of {subject} in {registry.host} too; run it again")


def sign(registry: Registry, repository: str, digest: str, key: Any) -> bool:
    """Add a signature by this key, where there is none yet; others stay. Whether it was added."""
    from images import papers

    payload, annotations = papers.signature(digest, registry.name(repository), key)
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


# The station


def publish(
    image: Copy,
    registry: Registry,
    repository: str,
    names: Tags,
    papers: Sequence[oci.Paper],
    key: Any = None,
) -> bool:
    """Bring an image into a registry, in the order that leaves no tag on anything unfinished.

    Returns whether there was anything to do.
    """
    digest = image.descriptor.digest
    free(image, registry, repository, names.immutable)  # refused before anything is sent
    done = False
    if not complete(image, registry, repository):
        push(image, registry, repository)
        done = True
    for name in attach(registry, repository, image.descriptor, papers, key):
        host.say(f"  {name}  attached")
        done = True
    if key and sign(registry, repository, digest, key):
        host.say(f"  signature  attached, as {oci.signature_tag(digest)}")
        done = True
    for tag in give(registry, repository, image, names):
        host.say(f"  {registry.reference(repository, tag)}  points to it")
        done = True
    return done


def prepared(source: Source, annotations: Mapping[str, str], siblings: Sequence[str] = ()) -> Copy:
    """A source with its layers compressed, ready for a registry.

    A layer that was compressed here before is not read again; only a registry that lacks it needs
    its file.
    """
    names = {layer.diff_id: layer.name for layer in source.layers}
    found = {diff_id: remembered(diff_id) for diff_id in names}
    new = compressed(source, [diff_id for diff_id in names if not found[diff_id]], names)
    packs = {diff_id: new.get(diff_id) or found[diff_id] for diff_id in names}
    by_digest = {pack.digest: diff_id for diff_id, pack in packs.items() if pack}
    data = oci.manifest(
        oci.describe(source.config, oci.CONFIG),
        [pack for layer in source.layers if (pack := packs[layer.diff_id])],
        annotations,
    )

    @contextmanager
    def upload(missing: Collection[str]) -> Iterator[tuple[str, bool]]:
        wanted = {by_digest[name]: name for name in missing if name in by_digest}
        files = {d: pack for d in packs if (layer := packs[d]) and (pack := kept(d, layer))}
        gone = [diff_id for diff_id in wanted if diff_id not in files]
        for diff_id, again in compressed(source, gone, names).items():
            if again.digest != wanted[diff_id]:
                raise Problem(
                    f"layer {names[diff_id]} was compressed into other bytes than before, by "
                    "another zstd; run this again to publish it so"
                )
            files[diff_id] = packed(diff_id)
        placed = {pack.digest: files[d] for d, pack in packs.items() if pack and d in files}
        with tempfile.TemporaryDirectory(prefix="rollout-layout-", dir=host.scratch()) as folder:
            oci.write_layout(Path(folder) / "layout", data, source.config, placed)
            yield f"oci:{folder}/layout", False

    labels = {digest: names[diff_id] for digest, diff_id in by_digest.items()}
    return Copy(data, labels, upload, tuple(siblings))


def publish_image(
    image: Image,
    tool: builder.Buildah,
    registry: Registry,
    *,
    key: Any = None,
    unproved: bool = False,
) -> None:
    """Publish an image of buildah's storage.

    Raises:
        Problem: it has no passing report and is not declared unproved, or the registry refuses.
    """
    from images import papers

    built = export.current(image, tool)
    proof = None if unproved else passing(image, built.diff_ids)[1]
    names = tags(image, unproved=unproved)
    commit = papers.checkout_commit()
    where = registry.name(image.repository)
    host.say(f"{image.reference}: publish to {where} as {names.immutable}")
    registry.resolve(image.repository, names.immutable)  # a wrong host or password is told first
    siblings = {registry.path(other.repository) for other in catalog.load()}
    annotations = {oci.UNPROVED: "true"} if unproved else {}
    copy = prepared(
        source(image, tool), annotations, sorted(siblings - {registry.path(image.repository)})
    )
    attaching = papers.papers(
        image,
        digest=copy.descriptor.digest,
        report=proof,
        key=key,
        commit=commit,
    )
    done = publish(copy, registry, image.repository, names, attaching, key)
    _conclude(image, registry, copy, done=done, signed=key is not None)


def _conclude(image: Image, registry: Registry, copy: Copy, *, done: bool, signed: bool) -> None:
    what = registry.reference(image.repository, copy.descriptor.digest)
    if not done:
        host.say(f"{image.reference}: nothing to do, {what} is there with its papers and tags")
        return
    if oci.UNPROVED in copy.manifest.annotations:
        host.say(f"{image.reference}: UNPROVED, which its manifest and its tags say")
    if not signed:
        host.say(f"{image.reference}: unsigned; sign it with --key FILE, or with cosign in CI")
    host.say(f"{image.reference}: published as {what}")


# Promotion


def unchecked(checks: Sequence[Check], wanted: Sequence[str]) -> list[str]:
    """The checks that stand in the way of a promotion, those that did not run among them."""
    passed = {check.name for check in checks if check.status == "passed"}
    return [name for name in wanted if name not in passed]


def promote(
    image: Image,
    origin: Registry,
    repository: str,
    reference: str,
    registry: Registry,
    *,
    trusted: Any,
    key: Any = None,
) -> None:
    """Give an image of a registry, by its digest, the tags of another or of the same one.

    Nothing is built or compressed: the manifest is copied to the byte, and the papers are those
    that ``verify-published`` has passed. The tags are given once it passes at the destination too.

    Raises:
        Problem: it is not there, is another image than this checkout's, unproved, or fails a check.
    """
    from images import verify_published

    given = origin.reference(repository, reference)
    found = origin.manifest(repository, reference)
    if found is None:
        raise Problem(f"there is no {given}")
    data, what = found
    whole = origin.reference(repository, what.digest)
    if oci.UNPROVED in oci.parse(data).annotations:
        raise Problem(f"{whole} is not promoted: it was published as unproved")
    host.say(f"{image.reference}: promote {whole}")
    staged = verify_published.Published(origin, repository, what.digest, trusted)
    checks = verify_published.verify(staged)
    wanting = unchecked(checks, verify_published.names(layers=False))
    if wanting:
        raise Problem(f"{whole} is not promoted: see {', '.join(wanting)} above")
    if staged.labels[verify_published.LOCK] != host.sha256(image.lock):
        raise Problem(f"{whole} is not promoted: it is of another lock than {shown(image.lock)}")
    same = origin.host == registry.host
    copy = transfer(data, origin, repository, (origin.path(repository),) if same else ())
    names = tags(image)
    free(copy, registry, image.repository, names.immutable)
    done = False
    if not complete(copy, registry, image.repository):
        push(copy, registry, image.repository)
        done = True
    if registry.name(image.repository) != origin.name(repository):
        done = carry(staged, registry, image.repository, copy.descriptor) or done
    if key:
        done = sign(registry, image.repository, what.digest, key) or done
    recheck(registry, image.repository, what.digest, trusted)
    for tag in give(registry, image.repository, copy, names):
        host.say(f"  {registry.reference(image.repository, tag)}  points to it")
        done = True
    _conclude(image, registry, copy, done=done, signed=True)


def transfer(data: bytes, origin: Registry, repository: str, siblings: tuple[str, ...]) -> Copy:
    """An image of a registry, ready for another."""
    digest = oci.digest(data)

    @contextmanager
    def upload(_: Collection[str]) -> Iterator[tuple[str, bool]]:
        yield f"docker://{origin.reference(repository, digest)}", origin.plain_http

    names = {layer.digest: f"layer {n}" for n, layer in enumerate(oci.parse(data).layers, 1)}
    return Copy(data, names, upload, siblings)


def verified(source: Published) -> list[Paper]:
    """The papers that a verification with a key has passed; statements of others are none."""
    from images import papers, verify_published

    found = []
    for paper in source.papers:
        if paper.artifact_type == papers.STATEMENT:
            said = verify_published.statement_of(paper, source.key)
            if not said or said.get("predicateType") != papers.PREDICATE_TYPE:
                continue
        found.append(paper)
    return found


def carry(source: Published, registry: Registry, destination: str, subject: Descriptor) -> bool:
    """Copy the verified papers of an image, and all signatures; whether there was anything to do.

    Papers of ours that the destination has and the source has not are replaced; its signatures
    stay beside those that are added.
    """
    copied = attach(registry, destination, subject, verified(source), exactly=True)
    for name in copied:
        host.say(f"  {name}  copied")
    origin, repository, digest = source.registry, source.repository, subject.digest
    wanted = signatures(origin, repository, digest)
    added = add_signatures(
        *(registry, destination, digest, wanted),
        lambda entry: origin.blob(repository, entry.digest, size=entry.size),
    )
    if added:
        host.say(f"  signatures  {added} copied, to {oci.signature_tag(digest)}")
    return bool(copied or added)


def recheck(registry: Registry, repository: str, digest: str, trusted: Any) -> None:
    """See that an image will verify where it is about to get its tags.

    Raises:
        Problem: it would not; says why.
    """
    from images import verify_published

    there = verify_published.Published(registry, repository, digest, trusted)
    checks = verify_published.verify(there, show=lambda _: None)
    wanted = [name for name in verify_published.names(layers=False) if name != "tags"]
    wanting = unchecked(checks, wanted)
    if wanting:
        reasons = {check.name: check.reason for check in checks}
        whole = registry.reference(repository, digest)
        why = reasons.get(wanting[0]) or "it did not run"
        raise Problem(f"{whole} gets no tags, it fails the check {wanting[0]} there: {why}")


# Arguments


def parser() -> argparse.ArgumentParser:
    """What ``nox -s publish --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s publish --", description="Publish a proved image, with its papers."
    )
    found.add_argument("ref", metavar="REF", nargs="?")
    found.add_argument("--to", metavar="HOST[/PREFIX]", help="the registry")
    found.add_argument("--key", type=Path, metavar="FILE", help="sign with this key (PEM)")
    found.add_argument("--unproved", action="store_true", help="without a passing report")
    found.add_argument("--promote", action="store_true", help="from a registry; see --from")
    found.add_argument(
        "--from", dest="origin", metavar="HOST[/PREFIX]/REPOSITORY@DIGEST", help="or :TAG"
    )
    found.add_argument(
        "--trust", type=Path, metavar="FILE.pub", help="the key that signed what is promoted"
    )
    found.add_argument("--new-key", type=Path, metavar="FILE", help="make a key, and FILE.pub")
    found.add_argument("--authfile", type=Path, help="credentials; default: those of skopeo login")
    found.add_argument("--cert-dir", type=Path, help="certificates of the registry (ca.crt)")
    return found


def main(arguments: Sequence[str]) -> int:
    """``nox -s publish -- REF --to HOST[/PREFIX] [--key FILE --unproved]``, or with ``--promote``.

    ``--new-key FILE`` makes a key and publishes nothing.
    """
    from images import papers

    options = parser()
    given = options.parse_args(list(arguments))
    if given.new_key:
        others = {name: value for name, value in vars(given).items() if name != "new_key"}
        if any(value != options.get_default(name) for name, value in others.items()):
            raise Problem("--new-key FILE stands alone: it makes a key and publishes nothing", 2)
        public = papers.new_key(given.new_key)
        host.say(f"{given.new_key} signs, and is for you alone; {public} is for everybody")
        return 0
    if not given.ref or not given.to:
        raise Problem("say what to publish and where: REF --to HOST[/PREFIX]", 2)
    if given.promote != bool(given.origin):
        raise Problem("--promote and --from HOST[/PREFIX]/REPOSITORY@DIGEST go together", 2)
    if given.promote and given.unproved:
        raise Problem("what is unproved is not promoted; leave out --unproved", 2)
    if given.trust and not given.promote:
        raise Problem("--trust is for --promote: publish signs with --key, and trusts nobody", 2)
    if given.promote and not given.trust:
        raise Problem(
            "--promote needs --trust FILE.pub, the public key that signed what is promoted: "
            "without it nobody knows whose papers these are",
            2,
        )
    image = catalog.find(given.ref, catalog.load())
    registry = Registry(given.to, authfile=given.authfile, cert_dir=given.cert_dir)
    registry.name(image.repository)  # a name that is not allowed is told before anything runs
    key = papers.read_key(given.key) if given.key else None
    if given.promote:
        target, repository, reference = registries.parse_reference(given.origin)
        origin = Registry(target, authfile=given.authfile, cert_dir=given.cert_dir)
        trusted = papers.read_public_key(given.trust)
        host.require("skopeo", "zstd")
        promote(image, origin, repository, reference, registry, trusted=trusted, key=key)
        return 0
    host.require("skopeo", "zstd")
    tool = builder.detect()
    if not isinstance(tool, builder.Buildah):
        raise Problem("only images of buildah are published", 2)
    publish_image(image, tool, registry, key=key, unproved=given.unproved)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

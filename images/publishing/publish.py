"""Last station: from a proved image to a registry.

``nox -s publish -- REF --to HOST[/PREFIX]`` pushes what a passing report is about, by its digest:
the layers (each compressed once on this machine and kept), the configuration to the byte, the
manifest, then the attestations, and only then the tags. So a tag stands for something whole at
every moment, whenever the registry or this program is killed; running it again uploads what is
missing.

The immutable tag is never given to another digest. With ``--promote`` the source is a registry:
the same digest and its attestations get the tags of the destination, and nothing is built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from images import catalog, host
from images.building import build, builder, labels, layers
from images.catalog import Image, shown
from images.host import leftovers
from images.locking import lock
from images.proving import prove, standing
from images.proving.standing import Standing
from images.publishing import (
    attach,
    attestations,
    failures,
    oci,
    packing,
    skopeo,
    verify_published,
)
from images.publishing.failures import Broken
from images.publishing.names import parse_reference
from images.publishing.oci import Descriptor
from images.publishing.packing import Source
from images.publishing.registry import Registry
from images.publishing.verify_published import Published
from rollout import report
from rollout.problem import Problem
from rollout.report import Check


@dataclass(frozen=True)
class Tags:
    """The names that a digest gets: one for good, and one that moves on with the next image."""

    immutable: str
    moving: str


def tags(image: Image, *, unproved: bool = False) -> Tags:
    """The tags of an image.

    What is not proved takes neither of the names that a proved one has, or is going to have.
    """
    name = labels.immutable_tag(image, lock.read(image), host.sha256(image.lock))
    ending = oci.UNPROVED_TAG if unproved else ""
    return Tags(name + ending, image.tag + ending)


# The proof


@dataclass(frozen=True)
class Proof:
    """The report that allows an image to be published, and what the host finds in it."""

    path: Path
    data: bytes  # as they were looked at: the file may be another a minute later
    standing: Standing


def fitting(path: Path, image: Image, diff_ids: Sequence[str]) -> Proof:
    """A report, if it allows an image with these layers to be published.

    Raises:
        ValueError: it does not; the message says why, as a clause.
    """
    try:
        data = report.content(path)
        found = report.parse(data)
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from None
    now = prove.today(image, diff_ids)
    worth = standing.judge(found, now)
    why = standing.publishable(worth, now)
    if why:
        raise ValueError(f"{shown(path)} allows none, {why}")
    # What the provenance says of the inputs has to be true of these layers.
    if prove.today(image).layers != now.layers:
        raise ValueError(f"{shown(layers.path(image))} is not of these inputs and layers")
    return Proof(path, data, worth)


def passing(image: Image, diff_ids: Sequence[str]) -> Proof:
    """The report that proves these layers: that of the last run here, else the kept one.

    Raises:
        Problem: none does; says what is wrong with each, and what to run.
    """
    reasons = []
    for path in (prove.report_path(image), prove.kept(image)):
        if not path.exists() and not path.is_symlink():
            reasons.append(f"there is no {shown(path)}")
            continue
        try:
            return fitting(path, image, diff_ids)
        except ValueError as error:
            reasons.append(str(error))
    raise Problem(
        f"{image.reference} has no passing report: {', and '.join(reasons)}; prove it with "
        f"'nox -s prove -- {image.reference}', or publish it as unproved with --unproved"
    )


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
            packing.tell(image.names.get(blob.digest, "config"), blob, "already there")

    def landed(asked: Registry) -> None:
        still = {b.digest for b in lacking(asked, repository, tuple(missing.values()))}
        for digest in [digest for digest in missing if digest not in still]:
            packing.tell(image.names.get(digest, "config"), missing.pop(digest), "uploaded")

    for sibling in image.siblings:
        for digest in list(missing):
            if registry.mount(repository, digest, sibling):
                packing.tell(image.names.get(digest, "config"), missing.pop(digest), "mounted")
    digest = image.descriptor.digest
    if missing:
        with image.upload(tuple(missing)) as (origin, plain):
            argv = skopeo.copy_argv(
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
            skopeo.copy(argv, registry.name(repository), tick)
        except Broken:
            tick()
            found = hasty.why(repository)
            if found and not isinstance(found, Broken):
                raise found from None
            raise

    failures.patiently(once, registry.waits, moved)


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
    annotations = oci.parse(data).annotations
    if annotations != image.manifest.annotations:
        why = (
            "what its manifest says of its proof stays what it was when it was published: a new "
            "lock makes a new tag"
        )
    elif oci.parse(data).config.digest == image.manifest.config.digest:
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


# The station


def publish(
    image: Copy,
    registry: Registry,
    repository: str,
    names: Tags,
    attaching: Sequence[oci.Attestation],
    key: attestations.Key | None = None,
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
    for name in attach.attach(registry, repository, image.descriptor, attaching, key):
        host.say(f"  {name}  attached")
        done = True
    if key and attach.sign(registry, repository, digest, key):
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
    found = {diff_id: packing.remembered(diff_id) for diff_id in names}
    new = packing.compressed(source, [diff_id for diff_id in names if not found[diff_id]], names)
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
        files = {d: pack for d in packs if (layer := packs[d]) and (pack := packing.kept(d, layer))}
        gone = [diff_id for diff_id in wanted if diff_id not in files]
        for diff_id, again in packing.compressed(source, gone, names).items():
            if again.digest != wanted[diff_id]:
                raise Problem(
                    f"layer {names[diff_id]} was compressed into other bytes than before, by "
                    "another zstd; run this again to publish it so"
                )
            files[diff_id] = packing.packed(diff_id)
        placed = {pack.digest: files[d] for d, pack in packs.items() if pack and d in files}
        with leftovers.temporary("layout", host.scratch()) as folder:
            oci.write_layout(folder / "layout", data, source.config, placed)
            yield f"oci:{folder}/layout", False

    labels = {digest: names[diff_id] for digest, diff_id in by_digest.items()}
    return Copy(data, labels, upload, tuple(siblings))


def publish_image(
    image: Image,
    tool: builder.Buildah,
    registry: Registry,
    *,
    key: attestations.Key | None = None,
    unproved: bool = False,
) -> None:
    """Publish an image of buildah's storage.

    Raises:
        Problem: it has no passing report and is not declared unproved, or the registry refuses.
    """
    built = build.current(image, tool)
    proof = None if unproved else passing(image, built.diff_ids)
    names = tags(image, unproved=unproved)
    commit = attestations.checkout_commit()
    if not unproved and commit.endswith(attestations.DIRTY):
        raise Problem(
            f"{image.reference} is not published: this checkout has changes that are in no commit, "
            "and its provenance names one; commit them, or publish with --unproved",
            2,
        )
    where = registry.name(image.repository)
    host.say(f"{image.reference}: publish to {where} as {names.immutable}")
    registry.resolve(image.repository, names.immutable)  # a wrong host or password is told first
    siblings = {registry.path(other.repository) for other in catalog.load()}
    # The catalog's reasons: with those of one run another run would make another manifest.
    missing = {name: image.not_shown[name] for name in proof.standing.missing} if proof else None
    annotations = oci.of_proof(missing)
    copy = prepared(
        packing.source(image, tool, built),
        annotations,
        sorted(siblings - {registry.path(image.repository)}),
    )
    attaching = attestations.attestations(
        image,
        digest=copy.descriptor.digest,
        report=proof.data if proof else None,
        key=key,
        commit=commit,
    )
    done = publish(copy, registry, image.repository, names, attaching, key)
    _conclude(image, registry, copy, done=done, signed=key is not None)


def _conclude(image: Image, registry: Registry, copy: Copy, *, done: bool, signed: bool) -> None:
    what = registry.reference(image.repository, copy.descriptor.digest)
    if not done:
        host.say(
            f"{image.reference}: nothing to do, {what} is there with its attestations and tags"
        )
        return
    if oci.UNPROVED in copy.manifest.annotations:
        host.say(f"{image.reference}: UNPROVED, which its manifest and its tags say")
    missing = oci.not_shown(copy.manifest.annotations)
    if missing:
        host.say(
            f"{image.reference}: in part, not shown are {', '.join(missing)}: see its manifest"
        )
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
    trusted: attestations.PublicKey,
    key: attestations.Key | None = None,
) -> None:
    """Give an image of a registry, by its digest, the tags of another or of the same one.

    Nothing is built or compressed: the manifest is copied to the byte, and the attestations are
    those that ``verify-published`` has passed. The tags are given once it passes at the destination
    too.

    Raises:
        Problem: it is not there, is another image than this checkout's, unproved, or fails a check.
    """
    given = origin.reference(repository, reference)
    found = origin.manifest(repository, reference)
    if found is None:
        raise Problem(f"there is no {given}")
    data, what = found
    whole = origin.reference(repository, what.digest)
    if oci.UNPROVED in oci.parse(data).annotations:
        raise Problem(f"{whole} is not promoted: it was published as unproved")
    host.say(f"{image.reference}: promote {whole}")
    staged = Published(origin, repository, what.digest, trusted)
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
        done = attach.sign(registry, image.repository, what.digest, key) or done
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


def verified(source: Published) -> list[attestations.Attestation]:
    """The attestations that a verification with a key has passed; statements of others are none."""
    found = []
    for attestation in source.attestations:
        if attestation.artifact_type == attestations.STATEMENT:
            said = verify_published.statement_of(attestation, source.key)
            if not said or said.get("predicateType") != attestations.PREDICATE_TYPE:
                continue
        found.append(attestation)
    return found


def carry(source: Published, registry: Registry, destination: str, subject: Descriptor) -> bool:
    """Copy the verified attestations of an image, and all signatures; whether any was missing.

    Those of ours that the destination has and the source has not are replaced; its signatures
    stay beside those that are added.
    """
    copied = attach.attach(registry, destination, subject, verified(source), exactly=True)
    for name in copied:
        host.say(f"  {name}  copied")
    origin, repository, digest = source.registry, source.repository, subject.digest
    wanted = attach.signatures(origin, repository, digest)
    added = attach.add_signatures(
        *(registry, destination, digest, wanted),
        lambda entry: origin.blob(repository, entry.digest, size=entry.size),
    )
    if added:
        host.say(f"  signatures  {added} copied, to {oci.signature_tag(digest)}")
    return bool(copied or added)


def recheck(
    registry: Registry, repository: str, digest: str, trusted: attestations.PublicKey
) -> None:
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


# Arguments


def parser() -> argparse.ArgumentParser:
    """What ``nox -s publish --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s publish --", description="Publish a proved image, with its attestations."
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
    options = parser()
    given = options.parse_args(list(arguments))
    if given.new_key:
        others = {name: value for name, value in vars(given).items() if name != "new_key"}
        if any(value != options.get_default(name) for name, value in others.items()):
            raise Problem("--new-key FILE stands alone: it makes a key and publishes nothing", 2)
        public = attestations.new_key(given.new_key)
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
            "without it nobody knows whose attestations these are",
            2,
        )
    image = catalog.find(given.ref, catalog.load())
    registry = Registry(given.to, authfile=given.authfile, cert_dir=given.cert_dir)
    registry.name(image.repository)  # a name that is not allowed is told before anything runs
    key = attestations.read_key(given.key) if given.key else None
    if given.promote:
        target, repository, reference = parse_reference(given.origin)
        origin = Registry(target, authfile=given.authfile, cert_dir=given.cert_dir)
        trusted = attestations.read_public_key(given.trust)
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

"""The names of a published image: one for good, and one that moves on with the next image.

The immutable tag is never given to another digest, and a tag is given to what is whole alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from images import catalog, host
from images.building import labels
from images.catalog import Image
from images.locking import lock
from images.publishing import oci
from images.publishing.copies import Copy
from images.publishing.registry import Registry
from rollout.problem import Problem


@dataclass(frozen=True)
class Tags:
    """The names that a digest gets; without ``moving`` it gets the other alone."""

    immutable: str
    moving: str


def of_image(image: Image, *, unproved: bool = False, gzip: bool = False) -> Tags:
    """The tags of an image.

    What is not proved takes neither of the names that a proved one has, or is going to have. The
    same image with layers of gzip has another manifest, and so names of its own.
    """
    name = labels.immutable_tag(image, lock.read(image), host.sha256(image.lock))
    behind = ending(unproved=unproved, gzip=gzip)
    return Tags(name + behind, image.tag + behind)


def ending(*, unproved: bool, gzip: bool) -> str:
    """What stands behind both tags of an image."""
    return (catalog.GZIP if gzip else "") + (catalog.UNPROVED if unproved else "")


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
    raise Problem(
        f"{registry.reference(repository, tag)} exists as {there.digest}, and this is "
        f"{image.descriptor.digest}; nothing was changed, and {_taken(oci.parse(data), image)}"
    )


def _taken(there: oci.Manifest, image: Copy) -> str:
    """Why the immutable tag of a manifest is not given to an image, as a clause."""
    if there.annotations != image.manifest.annotations:
        return (
            "what its manifest says of its proof stays what it was when it was published: a new "
            "lock makes a new tag"
        )
    if there.config.digest == image.manifest.config.digest:
        return (
            "that is the same image, and its layers are compressed by another zstd or level; what "
            "is there is what counts, so there is nothing to publish"
        )
    return "an immutable tag is never overwritten: a new lock makes a new one"


def give(image: Copy, registry: Registry, repository: str, names: Tags) -> bool:
    """Point the tags to an image that is whole, a line for each; whether one of them moved.

    The protocol has no way to write a tag on condition that there is none. So of two publishers
    with two images for one immutable tag, in the same moment, the later one wins; the other sees
    it here and fails. A registry that protects tags by itself refuses the later one.

    Raises:
        Problem: the immutable tag is another image's, or has just become it.
    """
    given = []
    if free(image, registry, repository, names.immutable):
        registry.push_manifest(repository, names.immutable, image.data, oci.MANIFEST)
        given.append(names.immutable)
        if free(image, registry, repository, names.immutable):
            raise Problem(f"{registry.host} took the tag {names.immutable} and does not have it")
    if names.moving and registry.resolve(repository, names.moving) != image.descriptor.digest:
        registry.push_manifest(repository, names.moving, image.data, oci.MANIFEST)
        given.append(names.moving)
    for tag in given:
        host.say(f"  {registry.reference(repository, tag)}  points to it")
    return bool(given)

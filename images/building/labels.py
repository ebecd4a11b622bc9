"""What an image says of itself to a builder: variables, labels, and the tag that never moves."""

from __future__ import annotations

from collections.abc import Sequence

from images.catalog import Image
from images.locking import base, lock
from images.locking.lock import Locked

# NVIDIA's hooks in container engines give a container the GPU and the part of the driver that
# computes, where its image asks for them. docker's --gpus asks by itself. pyxis, enroot and a
# cluster's default runtime do not, and the image would see no GPU there (enroot 205).
GPU = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}

# By these a published image is checked (images/publishing): the immutable tag, the sha256 of the
# lock, engine and torch, and what trains in it.
VERSION = "org.opencontainers.image.version"
LOCK = "rollout.lock.sha256"
BACKEND, ENGINE, TORCH = "rollout.backend", "rollout.engine.version", "rollout.torch"
FRAMEWORK, FRAMEWORK_VERSION = "rollout.framework", "rollout.framework.version"


def immutable_tag(image: Image, locked: Sequence[Locked], lock_sha256: str) -> str:
    """The tag that never moves: engine version, CUDA, Python and the lock it was built from."""
    versions = lock.versions(locked)
    cuda = lock.cuda(versions)
    platform = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = "py" + image.python.replace(".", "")
    # A tag may not hold the plus sign of a local version.
    version = versions[image.engine].replace("+", "-")
    return f"{image.backend}-{version}-{platform}-{python}-{lock_sha256[:8]}"


def variables(image: Image, locked: Sequence[Locked]) -> dict[str, str]:
    """Variables of an image: the catalog's, and with CUDA those that ask for the GPU."""
    cuda = lock.cuda(lock.versions(locked))
    return {**(GPU if cuda else {}), **image.env}


def of_image(
    image: Image, locked: Sequence[Locked], lock_sha256: str, bottom: str
) -> dict[str, str]:
    """Labels of an image: the standard keys, and the catalog row under ``rollout.``.

    Ray compares its own version and all three numbers of Python's, so both are there in full.
    """
    versions = lock.versions(locked)
    engine = versions[image.engine]
    own = image.framework
    framework, release = (own.name, own.version) if own else ("none", "none")
    if own is None:
        purpose = "for rollout"
    elif own.packaged:
        purpose = f"for rollout and training with {framework} {release}"
    else:
        purpose = f"for rollout, with what {framework} {release} needs"
    return {
        "org.opencontainers.image.title": image.reference,
        "org.opencontainers.image.description": (
            f"{image.backend} {engine} {purpose}, with its own proof"
        ),
        VERSION: immutable_tag(image, locked, lock_sha256),
        "org.opencontainers.image.licenses": "Apache-2.0 AND LicenseRef-contents",
        BACKEND: image.backend,
        "rollout.base": bottom,
        "rollout.cuda": lock.cuda(versions) or "none",
        ENGINE: engine,
        FRAMEWORK: framework,
        FRAMEWORK_VERSION: release,
        LOCK: lock_sha256,
        "rollout.python": base.python_of(image),
        "rollout.ray": versions.get("ray", "none"),
        "rollout.resolved-as-of": image.resolved_as_of.isoformat(),
        TORCH: versions["torch"],
    }

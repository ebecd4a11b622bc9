"""A build on the release image of an engine, in place of the base and of the layers that it has.

Its packages stay as they are, its torch above all: what else the lock has comes beside them, and
images/recipes/beside checks in the build that nothing has moved and that it fits. That image needs
no filled lock: what no public index has is in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from packaging.requirements import Requirement

from images import host
from images.building import context, dockerfile, labels, layering, payload
from images.building.plan import Plan
from images.catalog import RECIPES, Image, shown
from images.locking import lock
from images.locking.lock import Locked
from images.schema import Release
from rollout.problem import Problem

DOCKERFILE = RECIPES / "release.Dockerfile"
# The step, and what checks it; other scripts of steps are in every context.
SCRIPTS = (RECIPES / "additions", RECIPES / "beside")
TAG = "-release"  # behind the tag of what is built so
# Layers of a lock that such an image has itself, whatever it calls what is in them.
_THERE = ("mathlibs", "nvidia", "torch", "toolchain", "engine")
# Libraries of its torch, which lies beside what is added: that is loaded first, and the build
# (images/recipes/beside) has looked for each name that is asked of them.
_LOADED = ("libc10*.so", "libtorch*.so")
# What labels would say of the lock, and is not known of such an image.
_UNKNOWN = (labels.VERSION, "rollout.cuda", "rollout.ray")


def of(image: Image) -> Release:
    """The release image of an image's engine, as the catalog names it.

    Raises:
        Problem: exit code 2 where it names none, 3 where nobody has published a digest.
    """
    found = image.release
    if found is None:
        what = f"{shown(image.path)} names no release image to build on (table [release])"
        raise Problem(f"{what}; leave out --from", 2)
    if not found.digest:
        raise Problem(
            f"{image.reference} cannot be built on {found.image}: {shown(image.path)} has no "
            "digest of it, for none was found in a public file; add 'release.digest' and "
            "'release.source'",
            3,
        )
    return found


def name(image: Image) -> str:
    """What is built so, as a builder calls it."""
    return f"{image.reference}{TAG}"


def address(found: Release) -> str:
    """The release image below a registry, by its digest."""
    return f"{found.image}@{found.digest}"


def candidates(image: Image, locked: Sequence[Locked]) -> list[Locked]:
    """What may have to be added: of a lock all that such an image need not have itself.

    What only its engine asks for is there: the engine runs in it.
    """
    names = {entry.name for entry in locked}
    away = {entry.name for entry in image.elsewhere}
    others = lock.wanted(image.lock.read_text("utf-8"), image.engine)
    return [
        entry
        for entry in locked
        if entry.name not in away
        and (entry.above or entry.name in others)
        and layering.layer_of(entry, image.engine, names, image.sources) not in _THERE
    ]


def recipe_text(image: Image) -> str:
    """The Dockerfile as it is rendered for an image, with its variables and labels.

    Raises:
        Problem: it has no release image that can be named.
    """
    found, locked = of(image), lock.read(image)
    text = dockerfile.above(
        DOCKERFILE.read_text("utf-8"),
        address(found),
        (RECIPES / "base.Dockerfile").read_text("utf-8"),
    )
    told = labels.of_image(image, locked, host.sha256(image.lock), address(found))
    told |= {
        "org.opencontainers.image.title": name(image),
        "org.opencontainers.image.description": (
            f"{found.image} with what it lacks of the lock of {image.reference}; not proved"
        ),
        "rollout.python": image.python,
        labels.TORCH: found.torch,
    }
    kept = {key: value for key, value in told.items() if key not in _UNKNOWN}
    return dockerfile.stamped(text, labels.variables(image, locked), kept)


def asked(image: Image, locked: Sequence[Locked]) -> bytes:
    """What the step reads (release.json in the context)."""
    found = of(image)
    framework = image.framework
    left_out = {**image.left_out, **(framework.left_out if framework else {})}
    overrides = framework.overrides if framework else {}
    entries = {
        entry.name: {
            "version": entry.version,
            "kind": "sources" if entry.name in image.sources else "wheels",
            "text": entry.text,
        }
        for entry in candidates(image, locked)
    }
    said = {
        "image": address(found),
        "python": image.python,
        "torch": found.torch,
        "engine": [image.engine, lock.versions(locked)[image.engine]],
        "candidates": entries,
        "left_out": sorted({*left_out, *(Requirement(line).name for line in overrides)}),
        "otherwise": sorted(found.otherwise),
    }
    return (json.dumps(said, indent=1, sort_keys=True) + "\n").encode()


def last_files(image: Image, locked: Sequence[Locked]) -> dict[str, bytes]:
    """The files of the last layer: what the catalog claims of the lock is not claimed of it."""
    files = payload.files(image, locked)
    facts = json.loads(files["image.json"]) | {"reference": name(image), "expect": {}}
    facts["optional_libraries"] = sorted({*facts["optional_libraries"], *_LOADED})
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    return {**files, "image.json": text.encode()}


def plan(image: Image, registry: str) -> Plan:
    """The plan of an image on the release image of its engine, which this registry has.

    Raises:
        Problem: it has no release image that can be named.
    """
    released, locked = of(image), lock.read(image)
    said, files = asked(image, locked), last_files(image, locked)
    scripts = {script.name: script.read_bytes() for script in SCRIPTS}
    others = [script.read_bytes() for script in context.SCRIPTS]
    arguments = {
        "REGISTRY": registry,
        "ADDITIONS": context.digest(*scripts.values(), *others, said),
        "ENTRYPOINTS": context.arguments({}, "", files)["ENTRYPOINTS"],
    }
    return Plan(
        name(image),
        recipe_text(image),
        candidates(image, locked),
        files,
        lambda _: dict(arguments),
        more={**scripts, "release.json": said},
        released=f"{registry}/{address(released)}",
    )

"""Third station: from a lock to an image.

Pure functions compute the context, the arguments and the labels; :func:`build` runs them. The
builder whose digests count is buildah; docker (BuildKit) builds the same Dockerfile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from packaging.utils import canonicalize_name

from images import catalog, host
from images.building import (
    budget,
    builder,
    builders,
    context,
    dockerfile,
    fetching,
    interpreter,
    labels,
    layering,
    payload,
    release,
    storage,
    variables,
)
from images.building import layers as layers_of
from images.building.buildah import Buildah
from images.building.layers import Record, Verdict, measure
from images.building.plan import Plan
from images.catalog import RECIPES, ROOT, Image, shown
from images.host import leftovers
from images.locking import base, elsewhere, lock, resolution
from images.locking.lock import Locked
from rollout.problem import Problem

BUILD = ROOT / "build"
BASE_DOCKERFILE = RECIPES / "base.Dockerfile"
BASE = "verl-rollout-base"
# One moment for every file of every image: with a moment for each, two images with the same torch
# would have two different torch layers.
TIMESTAMP = base.EPOCH
# Unpacked wheels, their second copy in the builder's cache, and the layers made of them.
DISK_NEEDED = 4 << 30


def recipe_text(image: Image, locked: Sequence[Locked]) -> str:
    """The Dockerfile as it is rendered for an image, with its variables and labels.

    Raises:
        Problem: exit code 2 where it cannot be rendered.
    """
    found = labels.of_image(image, locked, host.sha256(image.lock), base_name(image))
    return dockerfile.stamped(_steps(image, locked), labels.variables(image, locked), found)


def _steps(image: Image, locked: Sequence[Locked]) -> str:
    try:
        return dockerfile.steps(
            image.dockerfile.read_text("utf-8"), layering.layer_names(image, locked)[1:-1]
        )
    except ValueError as error:
        raise Problem(f"{shown(image.dockerfile)}: {error}", 2) from None


def inputs(image: Image) -> str:
    """sha256 of what decides the layers up to the engine and its framework; needs no build.

    The variables that an engine sees are part of it. The labels are not, nor is our own package,
    which is the last layer. What the package asks of an engine has an identity of its own
    (rollout/program.py), so an edit there leaves a build and a proof of the layers below as they
    are.
    """
    locked = lock.read(image)
    texts = layering.layers(locked, image.engine, image.sources)
    code = dockerfile.below(_steps(image, locked))
    values = json.dumps(
        context.below(texts, base_name(image), interpreter.identity(image)), sort_keys=True
    )
    return context.digest(values, dockerfile.stamped(code, labels.variables(image, locked), {}))


def recorded(image: Image) -> Record | None:
    """The record of an image, where it holds for today's inputs; None where none does."""
    found = layers_of.read(image)
    return found if found and found.inputs == inputs(image) else None


def check_disk(folder: Path, needed: int = DISK_NEEDED) -> None:
    """See that a build has room.

    Raises:
        Problem: exit code 3, with what is free, what is needed and where.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        numbers = f"{free / 2**30:.1f} GiB free, about {needed / 2**30:.0f} GiB needed"
        raise Problem(f"no disk space for a build in {folder}: {numbers}; free some", 3)


def base_name(image: Image | None = None) -> str:
    """The name of the base below an image: a digest of its lock, its recipe and its Dockerfile."""
    lock_of = base.lock_of(image)
    return f"{BASE}:{context.digest(base.identity(lock_of), BASE_DOCKERFILE.read_bytes())[:12]}"


def base_needs(uid: int) -> list[str]:
    """What making the base needs of this machine; Ubuntu does not trust Debian's keys by itself."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    needs = ["mmdebstrap", "apt-get", "apt-cache", "dpkg-deb", keyring]
    return needs if uid == 0 else [*needs, "newuidmap"]


def base_image(tool: builder.Builder, image: Image | None = None, *, cache: bool = True) -> str:
    """The base below an image in the builder's storage; made where it is not there yet."""
    name = tool.local + base_name(image)
    if not cache or not tool.inspect(name):
        host.require(*base_needs(os.geteuid()))
        tar = base.tarball(image)
        with leftovers.temporary("context", _contexts()) as place:
            folder = place / "context"
            folder.mkdir()
            context.place(tar, folder / "base.tar")
            # The label makes bases of different inputs different images, even where their files are
            # the same. Without it, layers cached on one base would be taken for the other's, and
            # would carry its name and history.
            text = BASE_DOCKERFILE.read_text("utf-8")
            text = dockerfile.stamped(text, {}, {"rollout.base": base_name(image)})
            (folder / "Dockerfile").write_text(text, encoding="utf-8")
            found = tool.build(builder.Recipe(folder, name, TIMESTAMP, cache=cache))
        if not tool.inspect(found):
            raise Problem(f"{tool.name} finished, but {name} is not in its storage")
    storage.keep_base(tool, name)
    return name


def _contexts() -> Path:
    """Where contexts lie: in the checkout, so that they share its large files."""
    BUILD.mkdir(exist_ok=True)
    return BUILD


def everything(image: Image) -> str:
    """sha256 of all that decides an image, our own package and the labels too; needs no build."""
    locked = lock.read(image)
    texts = layering.layers(locked, image.engine, image.sources)
    files, python = payload.files(image, locked), interpreter.identity(image)
    values = context.arguments(texts, base_name(image), files, python)
    return context.digest(json.dumps(values, sort_keys=True), recipe_text(image, locked))


def current(image: Image, tool: builder.Builder) -> builder.Built:
    """The image of today's inputs in the builder's storage, whatever it is called by now.

    Raises:
        Problem: exit code 3 where it is not there: never built, or something in it has changed.
    """
    built = storage.find(tool, everything(image))
    if not built:
        other = tool.inspect(tool.local + image.reference)
        what = "is here, but built from other inputs than today's" if other else "is not built here"
        raise Problem(
            f"{image.reference} {what}; build it with 'nox -s build -- {image.reference}'", 3
        )
    return built


def _plan(image: Image) -> Plan:
    """The plan of an image on our own base, of its whole lock.

    Raises:
        Problem: exit code 3 where a file of the lock cannot be had.
    """
    locked = lock.read(image)
    elsewhere.refuse(image, locked)
    texts = layering.layers(locked, image.engine, image.sources)
    files, python = payload.files(image, locked), interpreter.identity(image)
    return Plan(
        image.reference,
        recipe_text(image, locked),
        locked,
        files,
        lambda bottom: context.arguments(texts, bottom, files, python),
        texts,
        interpreter=image.interpreter,
    )


def build(
    image: Image,
    tool: builder.Builder,
    *,
    tag: str = "",
    cache: bool = True,
    check: bool = True,
    registry: str = "",
) -> builder.Built:
    """Build one image; on the release image of its engine where a registry of that is named.

    The final tag is given by the builder after the last layer: an interrupted build leaves none.
    """
    plan = release.plan(image, registry) if registry else _plan(image)
    if platform.machine() != "x86_64":
        raise Problem(f"the locks are for x86-64, this machine is {platform.machine()}", 3)
    check_disk(tool.storage(), DISK_NEEDED * tool.copies())
    name = tool.local + (tag or plan.name)
    sources = image.sources & {entry.name for entry in plan.locked}
    settings = host.uv_environment(os.environ)
    wheels = context.own_wheels(plan.locked, settings.get("UV_FIND_LINKS", ""))
    backend = resolution.torch_backend([f"{e.name}=={e.version}" for e in plan.locked], settings)
    if backend:
        settings["UV_TORCH_BACKEND"] = backend
    leftovers.sweep(BUILD)
    leftovers.prune()
    with storage.alone(tool), leftovers.temporary("context", _contexts()) as place:
        tool.sweep()
        if plan.released:
            tool.pull(plan.released)
        bottom = plan.released or base_image(tool, image, cache=cache)
        folder = place / "context"
        told = context.indexes(settings, bool(wheels)) + context.exports(context.clock(os.environ))
        context.prepare(
            folder, plan.recipe, plan.texts, plan.files, wheels, sources, told, plan.more
        )
        here = {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
        look = partial(variables.check, image)
        fetching.fetch(plan.locked, image.python, sources, here, settings, folder / "sources", look)
        if plan.interpreter:
            context.place(interpreter.fetch(plan.interpreter, settings), folder / interpreter.FILE)
        if context.CLOCK in os.environ:
            host.require(str(context.FAKETIME))
            context.place(context.FAKETIME, folder / "tools" / context.FAKETIME.name)
        recipe = builder.Recipe(
            folder, name, TIMESTAMP, plan.arguments(bottom), fetching.cache(), cache=cache
        )
        built = tool.inspect(tool.build(recipe))
        if not built:
            raise Problem(f"{tool.name} finished, but {name} is not in its storage")
        if not plan.released:
            storage.remember(tool, everything(image), built.id)
    host.say(f"{name} is {built.id}")
    # docker's storage gives no layer away, and a release image weighs what its makers put in.
    if check and isinstance(tool, Buildah) and not plan.released:
        budget.check(image, tool, built, layering.layer_names(image, plan.locked))
    return built


def command(image: Image, *options: str) -> list[str]:
    """This station as a command of its own that builds from nothing."""
    return [sys.executable, "-m", "images.building.build", image.reference, "--no-cache", *options]


def record(image: Image, tool: Buildah, built: builder.Built) -> Record:
    """What is recorded of an image that was just built: its layers below our own package.

    Every layer is read once more.

    Raises:
        Problem: a layer holds what none may hold.
    """
    known = budget.remembered() | budget.known()
    names = layering.layer_names(image, lock.read(image))
    measured = measure(tool, built.id, names, known)
    if measured.broken:
        raise Problem(f"{image.reference} is not recorded: {'; '.join(measured.broken)}")
    return Record(inputs(image), tool.version(), measured.layers[:-1])


def verdict_on(image: Image, tool: Buildah, built: builder.Built) -> Verdict:
    """What the record of an image says of one that this machine made of today's inputs."""
    return layers_of.compare(layers_of.read(image), inputs(image), built, tool.version())


def keep(image: Image, tool: Buildah, built: builder.Built) -> None:
    """Record the layers of an image that was just built, unless these inputs are recorded already.

    Raises:
        Problem: others are recorded of the same inputs, by the same builder.
    """
    verdict = verdict_on(image, tool, built)
    if verdict.differs:
        command = f"nox -s reproduce -- {image.reference}"
        raise Problem(f"not kept: {verdict.sentence} ('{command}' says what differs)")
    if not recorded(image):
        layers_of.write(image, record(image, tool, built))


def compare(image: Image, tool: Buildah, built: builder.Built) -> None:
    """Say whether an image that was just built has the recorded layers.

    Raises:
        Problem: it has not, though it was made of the same inputs by the same builder.
    """
    verdict, known = verdict_on(image, tool, built), recorded(image)
    if verdict.differs and known and known.builder == tool.version():
        command = f"nox -s reproduce -- {image.reference}"
        raise Problem(f"{image.reference}: {verdict.sentence} ('{command}' says what differs)")
    host.say(f"{image.reference}: {verdict.sentence}")


def main(arguments: Sequence[str]) -> int:
    """``nox -s build [-- REF … --builder docker --no-cache --tag NAME --record --from HOST]``."""
    parser = argparse.ArgumentParser(prog="nox -s build --", description="Build images.")
    parser.add_argument("refs", nargs="*", metavar="REF", help="default: " + catalog.DEFAULT)
    parser.add_argument("--builder", help="buildah (default) or docker")
    parser.add_argument("--no-cache", action="store_true", help="build every layer anew")
    parser.add_argument("--no-check", action="store_true", help="skip size and hygiene rules")
    parser.add_argument("--tag", default="", help="another name for the result")
    parser.add_argument(
        "--show", action="store_true", help="print the Dockerfile and build nothing"
    )
    parser.add_argument("--record", action="store_true", help="keep what the layers are")
    parser.add_argument(
        "--from",
        dest="registry",
        default="",
        metavar="REGISTRY",
        help="build on the engine's release image in this registry (HOST[/PREFIX])",
    )
    given = parser.parse_args(list(arguments))
    images = catalog.load()
    chosen = [catalog.find(ref, images) for ref in given.refs or [catalog.DEFAULT]]
    if given.show:
        for image in chosen:
            text = release.recipe_text(image) if given.registry else None
            sys.stdout.write(text or recipe_text(image, lock.read(image)))
        return 0
    tool = builders.detect(given.builder)
    if given.record and (given.tag or not isinstance(tool, Buildah)):
        raise Problem("--record needs buildah and the image's own name: leave out --tag", 2)
    if given.record and given.registry:
        raise Problem("--record keeps layers of our own: leave it out, or --from", 2)
    for image in chosen:
        cache, check = not given.no_cache, not given.no_check
        where = given.registry.rstrip("/")
        built = build(image, tool, tag=given.tag, cache=cache, check=check, registry=where)
        if not isinstance(tool, Buildah) or given.registry:
            continue
        if given.record:
            keep(image, tool, built)
        elif check:
            compare(image, tool, built)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

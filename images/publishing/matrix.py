"""Which images a run of CI has to look at: all, the changed ones, or the proved ones.

``nox -s matrix`` reads the catalog, so that no workflow names an image. An image has changed since
a revision if what decides it has: the inputs of its layers and the proof program, as each
revision's own code computes them, and the code and tools that turn inputs into layers. A reworded
sentence has changed nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from images import catalog, host
from images.building import build, context, payload
from images.catalog import ROOT, Image
from images.host import revisions
from images.locking import elsewhere, lock
from images.proving import proofs, standing
from rollout.problem import Problem

# What no digest of inputs holds: how a build is run. The other modules stand in it by what they do.
_MODULES = ("build", "builder", "buildah", "docker", "context")
MAKERS = tuple(f"images/building/{name}.py" for name in _MODULES)
TOOLS = "lockfiles/dev.lock"
INSTALLER = "uv=="  # of all tools the one that writes into images
# Run by the code of another revision, which need not know this module.
_PROGRAM = (
    "import json; from images import catalog; from images.publishing import matrix; "
    "print(json.dumps({i.reference: matrix.decides(i) for i in catalog.load()}))"
)


def say(text: str) -> None:
    """Tell a person something, beside the list that a program reads."""
    print(text, file=sys.stderr, flush=True)


def makers(tree: Path) -> str:
    """A digest of what turns inputs into layers, in a checkout of any revision.

    Raises:
        FileNotFoundError: one of these files is not there, so nothing would be compared.
    """
    parts = [(tree / name).read_bytes() for name in MAKERS]
    text = (tree / TOOLS).read_text(encoding="utf-8")
    pinned = [line.split()[0] for line in text.splitlines() if line.startswith(INSTALLER)]
    return context.digest(*parts, *pinned)


def same_makers(tree: Path) -> bool:
    """Whether another revision turns inputs into layers as this one does.

    Raises:
        Problem: exit code 2 where this checkout lacks one of the files: the list of them is old.
    """
    try:
        today = makers(ROOT)
    except FileNotFoundError as error:
        raise Problem(
            f"{error.filename} is not there; name what builds images now in "
            "images/publishing/matrix.py",
            2,
        ) from None
    try:
        return makers(tree) == today
    except FileNotFoundError:
        return False  # it kept them elsewhere: one build too many costs less than one too few


def decides(image: Image) -> str:
    """A digest of what an image is made of, and of what its proof asks."""
    program = json.dumps(standing.program_of(image), sort_keys=True)
    facts = json.dumps(payload.facts(image, lock.read(image)), sort_keys=True)
    return context.digest(build.inputs(image), facts, program)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The images of today whose inputs are other ones than before, or that are new."""
    return [reference for reference in after if before.get(reference) != after[reference]]


def inputs_at(tree: Path) -> dict[str, str]:
    """The inputs of every image of a checkout, by its own code; empty where that fails.

    Empty means that every image has changed: one build too many costs less than one too few.
    """
    argv = [sys.executable, "-c", _PROGRAM]
    done = host.run(argv, quiet=True, check=False, cwd=tree)  # Python looks there first
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        say(f"the other revision cannot say what its inputs are, so all images count: {last}")
        return {}
    found: dict[str, str] = json.loads(done.stdout)
    return found


def changed_since(revision: str, images: Sequence[Image]) -> list[str]:
    """The references of images that are built from something else than at a revision."""
    with revisions.worktree(revisions.commit(revision)) as tree:
        before = inputs_at(tree)
        if not same_makers(tree):
            say(f"{', '.join((*MAKERS, 'or uv'))} changed, so all images count")
            before = {}
    return changed(before, {image.reference: decides(image) for image in images})


def buildable(images: Sequence[Image]) -> list[Image]:
    """The images that a runner with the public index can build: every file has a sha256."""
    found = []
    for image in images:
        try:
            elsewhere.refuse(image, lock.read(image))
        except Problem as problem:
            if problem.code != 3:
                raise
            say(f"{image.reference} is left out: {problem.sentence}")
        else:
            found.append(image)
    return found


def proved(images: Sequence[Image]) -> list[str]:
    """The references of images that their kept report allows to be published as they are today."""
    found = []
    for image in images:
        why = standing.publishable(proofs.standing_of(image), proofs.today(image))
        if why:
            say(f"{image.reference} is left out: {why}")
        else:
            found.append(image.reference)
    return found


def main(arguments: Sequence[str]) -> int:
    """``nox -s matrix [-- --changed-since REV | --proved] [--json]``."""
    parser = argparse.ArgumentParser(
        prog="nox -s matrix --", description="Name the images of the catalog."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--changed-since", metavar="REV", help="those with other inputs than at REV")
    which.add_argument("--proved", action="store_true", help="those that a kept report proves")
    parser.add_argument("--json", action="store_true", help="as one line, for a matrix of CI")
    given = parser.parse_args(list(arguments))
    images = buildable(catalog.load())
    if given.changed_since is not None:
        references = changed_since(given.changed_since, images)
    elif given.proved:
        references = proved(images)
    else:
        references = [image.reference for image in images]
    if given.json:
        host.say(json.dumps(references))
    else:
        for reference in references:
            host.say(reference)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

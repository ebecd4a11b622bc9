"""A wheel that no index has, compiled in the image that it is for: flash-attn.

It becomes part of no image. Whoever wants it adds it (docs/adding.md), so the layers of all images
stay as they are. The source is locked by its hash, the compiler is the image's own, and the stage
has no network (images/recipes/flash-attn). What took hours is kept by what decides it, and is not
compiled again: ``nox -s wheel -- flash-attn REF``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from images import catalog, host
from images.building import build, builders, context, fetching, isolation, streaming
from images.building.buildah import Buildah
from images.building.builder import Command
from images.catalog import RECIPES, ROOT, Image, shown
from images.host import leftovers
from images.locking import lock, resolution
from images.locking.lock import Locked
from rollout.problem import Problem

NAME = resolution.FLASH
SCRIPT = RECIPES / NAME
OUTPUT = ROOT / "build" / "wheels"
# What of an image's lock is in its bytes: torch and CUDA's headers, the compiler, what drives it.
USED = ("torch", "setuptools", "ninja", "packaging", "psutil")
CUDA = "nvidia-"
# The engines' own kernels for newer GPUs; its package is called flash_attn, too.
OTHER = "flash-attn-4"
PLACE = "/mnt/rollout"


def refusal(image: Image, locked: Sequence[Locked]) -> str:
    """Why it cannot be compiled in an image, as one sentence; empty where it can be."""
    versions = lock.versions(locked)
    cuda, nvcc = lock.cuda(versions), versions.get("nvidia-cuda-nvcc", "")
    compiler = ".".join(nvcc.split(".")[:2])
    if cuda is None:
        return f"{image.reference} has a torch for the CPU, and {NAME} is for GPUs"
    if OTHER in versions:
        return (
            f"{image.reference} has {OTHER} {versions[OTHER]}, whose package is called flash_attn, "
            f"too: Python would take {NAME}'s in its place, and the engine would lose its kernels; "
            "docs/adding.md says how verl trains there"
        )
    if compiler == cuda:
        return ""
    other = f"nvcc of {compiler}, which torch refuses to compile with" if nvcc else "no nvcc"
    lacks = image.framework.lacks if image.framework else {}
    instead = lacks.get(NAME, "docs/adding.md names wheels")
    return f"{image.reference} has torch of CUDA {cuda} and {other}; {instead}"


def wanted() -> list[Locked]:
    """What lockfiles/flash-attn.lock names: a source, and what its setup.py imports."""
    path = resolution.FLASH_LOCK
    return lock.parse(catalog.text(path, f"make it with 'nox -s lock -- {NAME}'"), path)


def inputs(locked: Sequence[Locked]) -> dict[str, str]:
    """Everything that decides the bytes of the wheel, by name."""
    used = [e for e in locked if e.name in USED or e.name.startswith(CUDA)]
    return {
        "script": context.digest(SCRIPT.read_bytes()),
        "base": build.base_name(),
        **{f"{e.name} {e.version}": e.sha256 for e in (*wanted(), *used)},
    }


def kept(found: dict[str, str]) -> Path:
    """Where the wheel of these inputs is kept on this host, with a record of them."""
    key = context.digest(json.dumps(found, sort_keys=True))
    return host.cache() / "wheels" / f"{NAME}-{key[:16]}"


def the_wheel(folder: Path) -> Path | None:
    """The wheel in a folder; None where there is none."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def fetch(folder: Path, python: str) -> None:
    """Lay out what the stage reads: the script, the source, and the tools as a folder."""
    folder.mkdir()
    context.place(SCRIPT, folder / SCRIPT.name)
    settings = host.uv_environment(os.environ)

    def keep(target: Path) -> None:
        shutil.copytree(target, folder / "tools")

    fetching.fetch(wanted(), python, (NAME,), (), settings, folder / "source", keep)


def stage(jobs: int) -> list[str]:
    """The command of the stage, in its container; without a number the script finds one."""
    return [
        *("/opt/rollout/bin/python", "-I", "-B", f"{PLACE}/in/{SCRIPT.name}"),
        *(f"{PLACE}/in", f"{PLACE}/out", *(["--jobs", str(jobs)] if jobs else [])),
    ]


def compile_in(image: Image, tool: Buildah, jobs: int = 0) -> Path:
    """The wheel for an image: the one that is kept, or one that is compiled now.

    Raises:
        Problem: the image is not here, or it cannot be compiled.
    """
    found = inputs(lock.read(image))
    place = kept(found)
    if ready := the_wheel(place):
        host.say(f"{shown(ready)} was compiled before, of the same inputs")
        return ready
    if os.environ.get("CI"):
        why = f"{NAME} takes hours to compile, and is not compiled in CI"
        raise Problem(f"{why}; compile it once elsewhere, and keep {place.parent}", 3)
    built = build.current(image, tool)
    host.say(f"compiling {NAME} in {image.reference}; with two cores that takes hours")
    begun = time.monotonic()
    with leftovers.temporary("wheel", host.scratch()) as folder:
        fetch(folder / "in", image.python)
        (folder / "out").mkdir()
        (folder / "mounts").mkdir()
        with tool.container(built.id) as container:
            volumes = {f"{folder}/in": f"{PLACE}/in:ro", f"{folder}/out": f"{PLACE}/out"}
            command = tool.run_argv(Command(built.id, stage(jobs), "0:0", volumes), container)
            apart = isolation.command(command, os.geteuid(), None, folder / "mounts")
            streaming.run(apart, isolation.environment({**os.environ, "TMPDIR": str(folder)}))
        wheel = the_wheel(folder / "out")
        if not wheel:
            raise Problem(f"the stage of {NAME} ended, and left no wheel")
        about = {"image": image.reference, "layers": list(built.diff_ids), "inputs": found}
        more = {"sha256": host.sha256(wheel), "seconds": round(time.monotonic() - begun)}
        host.write_json(folder / "out" / "wheel.json", {**about, **more})
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (folder / "out").rename(place)
    return place / wheel.name


def lines(image: Image, wheel: Path) -> str:
    """The Dockerfile that adds it, beside which the wheel has to lie."""
    return "\n".join(
        (
            f"FROM {image.reference}",
            "USER 0:0",
            "RUN --mount=type=bind,target=/mnt/context \\",
            f"    pip install --no-index /mnt/context/{wheel.name}",
            "USER 1000:0",
        )
    )


def main(arguments: Sequence[str]) -> int:
    """``nox -s wheel -- flash-attn REF [--jobs N] [--output DIR]``."""
    parser = argparse.ArgumentParser(
        prog="nox -s wheel --", description="Compile a wheel that no index has, in an image."
    )
    parser.add_argument("name", choices=(NAME,))
    parser.add_argument("ref", metavar="REF", help="the image that it is for")
    parser.add_argument("--jobs", type=int, default=0, help="by default by cores and memory")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {shown(OUTPUT)}")
    given = parser.parse_args(list(arguments))
    image = catalog.find(given.ref, catalog.load())
    # Before anything is asked of this machine.
    if why := refusal(image, lock.read(image)):
        raise Problem(why, 3)
    tool = builders.detect("buildah")
    if not isinstance(tool, Buildah):
        raise Problem(f"{NAME} is compiled by buildah alone", 3)
    wheel = compile_in(image, tool, given.jobs)
    given.output.mkdir(parents=True, exist_ok=True)
    target = given.output / wheel.name
    target.unlink(missing_ok=True)
    context.place(wheel, target)
    host.say(f"{shown(target)}: {target.stat().st_size:,} bytes, sha256 {host.sha256(target)}")
    host.say(f"add it with a Dockerfile beside it (docs/adding.md):\n\n{lines(image, target)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

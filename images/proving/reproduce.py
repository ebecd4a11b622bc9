"""The same bytes again: two builds from nothing, compared with each other and with the record.

``nox -s reproduce -- REF`` builds an image twice, with storage, caches and checkout of its own each
time and in other circumstances (:data:`BUILDS`), and says which level holds:

- R1: every input is pinned by its bytes (images/building/pinned.py);
- R2: the files have the same content;
- R3: the layers have the same ``diff_id``;
- R4: the manifest has the same digest, configuration and all.

The exit code is 1 below the level that the image claims, and where the layers are not the recorded
ones. What differs is named: layer, file, and the kind of difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import (
    build,
    builder,
    builders,
    contents,
    context,
    layering,
    layers,
    pinned,
    streaming,
)
from images.building.buildah import Buildah
from images.building.contents import Entry
from images.catalog import ROOT, Image, shown
from images.host import leftovers
from images.locking import lock
from images.proving import proofs
from rollout.problem import Problem

MEANING = {
    "R0": "not every input is pinned",
    "R1": "every input is pinned, the files differ",
    "R2": "the same files, in other layers",
    "R3": "the same layers, another manifest",
    "R4": "the same manifest digest",
}
SCHEMA = "rollout-reproduced/1"
SHOWN = 20  # differences of a layer that are printed; the others are counted


@dataclass(frozen=True)
class Circumstances:
    """What is around a build and must not show in the image."""

    name: str
    checkout: str  # below the working folder
    umask: int
    env: Mapping[str, str]
    trace: str = ""  # a setting of a host that a build gets to see
    reversed_cache: bool = False


BUILDS = (
    Circumstances("first", "one", 0o022, {"TZ": "UTC"}),
    Circumstances(
        "second",
        "two/a place/with another path",
        0o077,
        {
            "TZ": "Asia/Tokyo",
            "LANG": "de_DE.UTF-8",
            "USER": "somebody",
            "HOSTNAME": "elsewhere",
            "PYTHONHASHSEED": "7",
            "UV_CONCURRENT_DOWNLOADS": "1",
            "UV_CONCURRENT_INSTALLS": "1",
            context.CLOCK: "+25h",
        },
        trace="trace-of-the-host.example",
        reversed_cache=True,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One of the two builds: what came out, how long it took, and where its storage is."""

    built: builder.Built
    seconds: float
    storage: Path


# Pure: the level that two builds hold, and what they differ in


def level(first: builder.Built, second: builder.Built, *, same_files: bool) -> str:
    """The level of two builds whose inputs are pinned."""
    if first.manifest == second.manifest:
        return "R4"
    if first.diff_ids == second.diff_ids:
        return "R3"
    return "R2" if same_files else "R1"


def same_files(first: Sequence[Sequence[Entry]], second: Sequence[Sequence[Entry]]) -> bool:
    """Whether what a container sees has the same types and bytes, whatever else differs."""
    seen = [
        {entry.path: (entry.type, entry.content) for layer in image for entry in layer}
        for image in (first, second)
    ]
    return seen[0] == seen[1]


def explained(
    names: Sequence[str], first: Sequence[Sequence[Entry]], second: Sequence[Sequence[Entry]]
) -> list[str]:
    """Lines that name layer, file and kind of difference; the first files of each layer."""
    lines = []
    for name, one, two in zip(names, first, second, strict=True):
        found = contents.differences(one, two)
        if not found:
            continue
        kinds = Counter(kind for difference in found for kind in difference.kinds)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in contents.KINDS if kinds[kind])
        lines.append(f"layer {name}: {len(found)} differ ({counts})")
        lines += [f"  {difference}" for difference in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"  … and {len(found) - SHOWN} more")
    return lines


def config_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs in the configuration of two images, key by key."""
    return [
        f"configuration, {key}: {first.get(key)!r} and {second.get(key)!r}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


# Two builds from nothing


def environment(work: Path, circumstances: Circumstances) -> dict[str, str]:
    """Variables that give a build caches and storage of its own, and its circumstances."""
    own = work / f"{circumstances.name}-own"
    return {
        **os.environ,
        # The tools of this run, from wherever the checkout lies.
        "PYTHONPATH": os.pathsep.join(
            str(Path(part).resolve())
            for part in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if part
        ),
        **circumstances.env,
        # What this host has set stays: it may need that to reach its packages.
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), circumstances.trace])),
        "XDG_CACHE_HOME": str(own / "cache"),
        "UV_CACHE_DIR": str(own / "uv"),
        "TMPDIR": str(own / "tmp"),
        "CONTAINERS_STORAGE_CONF": str(own / "storage.conf"),
    }


def storage_conf(own: Path) -> str:
    """The settings of a container storage that nothing else uses."""
    paths = "".join(f'{key} = "{own / key}"\n' for key in ("graphroot", "runroot"))
    return f'[storage]\ndriver = "overlay"\n{paths}'


def copy_checkout(target: Path) -> None:
    """The checkout at another place: what git has, without what builds leave behind."""
    left = shutil.ignore_patterns(".git", ".nox", "__pycache__", ".*_cache")

    def ignored(folder: str, names: list[str]) -> set[str]:
        top = names if Path(folder) == ROOT else ()
        # The copy must not hold the folder that it lies in: it would hold itself.
        own = {name for name in top if name == "build" or target.is_relative_to(ROOT / name)}
        return left(folder, names) | own

    shutil.copytree(ROOT, target, ignore=ignored)


def turn_around(source: Path, target: Path) -> None:
    """A package cache with the same files, whose folders were filled in the opposite order."""
    for folder, names, files in os.walk(source):
        names.sort(reverse=True)
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for name in sorted((*names, *files), reverse=True):
            path = Path(folder, name)
            if path.is_symlink():
                (here / name).symlink_to(path.readlink())
            elif name in files:
                os.link(path, here / name)


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """This process's own environment for a while: the builder reads its storage from there."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def storage_of(own: Path) -> AbstractContextManager[None]:
    """For a while the builder's storage is the one of a build."""
    return variables({"CONTAINERS_STORAGE_CONF": str(own / "storage.conf")})


def build_once(image: Image, work: Path, circumstances: Circumstances) -> Outcome:
    """Build from nothing in these circumstances.

    Raises:
        Problem: the build fails.
    """
    own = work / f"{circumstances.name}-own"
    (own / "tmp").mkdir(parents=True)
    (own / "storage.conf").write_text(storage_conf(own), encoding="utf-8")
    checkout = work / circumstances.checkout
    copy_checkout(checkout)
    if circumstances.reversed_cache:
        turn_around(work / "first-own" / "uv", own / "uv")
    env = environment(work, circumstances)
    host.say(f"\n{image.reference}: the {circumstances.name} build, from nothing, in {checkout}")
    start = time.perf_counter()
    argv = build.command(image, "--no-check")
    streaming.run(argv, env, checkout, circumstances.umask, station=True)
    seconds = time.perf_counter() - start
    tool = Buildah()
    with storage_of(own):
        built = tool.inspect(tool.local + image.reference)
    if not built:
        raise Problem(f"the {circumstances.name} build left no image in {own}")
    return Outcome(built, seconds, own)


def look(image: Image, outcome: Outcome, folder: Path) -> list[list[Entry]]:
    """What is in each layer of a build."""
    tool = Buildah()
    with storage_of(outcome.storage), tempfile.TemporaryDirectory(dir=folder) as blobs:
        found = tool.blobs(tool.local + image.reference, Path(blobs))
        return [contents.load(blob)[0] for blob in found]


def machine() -> dict[str, Any]:
    """What tells this machine from another without naming it."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "")
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "boot": hashlib.sha256(boot).hexdigest()[:12],
    }


def compared(image: Image, one: Outcome, two: Outcome, work: Path) -> tuple[str, list[str]]:
    """The level that two builds hold, and a line for each thing that they differ in."""
    equal, lines = True, []
    if one.built.diff_ids != two.built.diff_ids:
        first, second = look(image, one, work), look(image, two, work)
        equal = same_files(first, second)
        names = layering.layer_names(image, lock.read(image))
        lines = explained(names, first, second)
        lines += [
            f"layer {name}: the tar itself: encoding"
            for name, a, b, x, y in zip(
                names, one.built.diff_ids, two.built.diff_ids, first, second, strict=True
            )
            if a != b and not contents.differences(x, y)
        ]
    elif one.built.manifest != two.built.manifest:
        first_all, second_all = ({**o.built.config, **o.built.about} for o in (one, two))
        lines = config_differences(first_all, second_all)
    return level(one.built, two.built, same_files=equal), lines


def reproduce(image: Image, work: Path, *, keep: bool) -> int:
    """Build twice, compare with each other and the record, say what holds; the exit code."""
    unpinned = pinned.problems(image)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    one, two = (build_once(image, work, circumstances) for circumstances in BUILDS)
    reached, lines = compared(image, one, two, work)
    reached = "R0" if unpinned else reached
    tool, recorded = Buildah(), layers.read(image)
    inputs = build.inputs(image)
    verdict = layers.compare(recorded, inputs, one.built, tool.version())
    good = reached >= image.reproducible and not verdict.differs
    for line in (*(f"not pinned: {problem}" for problem in unpinned), *lines):
        host.say(line)
    said = f"{reached} ({MEANING[reached]}), claimed is {image.reproducible}; {verdict.sentence}"
    host.say(f"{image.reference}: {said}")
    if verdict.differs or (keep and good):
        record = recorded
        if not recorded or recorded.inputs != inputs or verdict.differs:
            with storage_of(one.storage):
                record = build.record(image, tool, one.built)
        assert record  # noqa: S101 - either of the two
        if recorded and verdict.differs:
            for layer, difference in layers.explain(recorded.layers, record.layers):
                host.say(f"recorded layer {layer.name}: {difference}")
        if keep and good:
            run = {
                "started": started,
                "level": reached,
                "build_seconds": [round(outcome.seconds, 1) for outcome in (one, two)],
                "record": verdict.sentence,
                "manifest": one.built.manifest,
                "machine": machine(),
                "builder": tool.version(),
            }
            if record is not recorded:
                layers.write(image, record)
            remember(image, record, run)
            host.say(f"kept: {shown(layers.path(image))}, {shown(path(image))}")
    return 0 if good else 1


def path(image: Image) -> Path:
    """Where the runs that reproduced an image are kept."""
    return proofs.beside(image, "reproduced")


def remember(image: Image, record: layers.Record, run: dict[str, Any]) -> None:
    """Keep a run beside the others that reproduced the same layers: one for each machine."""
    runs = []
    if path(image).exists():
        data = json.loads(path(image).read_text(encoding="utf-8"))
        if data["inputs"] == record.inputs:
            runs = [r for r in data["runs"] if r["machine"] != run["machine"]]
    data = {
        "schema": SCHEMA,
        "image": image.reference,
        "inputs": record.inputs,
        "runs": [*runs, run],
    }
    host.write_json(path(image), data)


def main(arguments: Sequence[str]) -> int:
    """``nox -s reproduce -- REF [--keep] [--work DIR]``."""
    parser = argparse.ArgumentParser(
        prog="nox -s reproduce --", description="Build twice from nothing, and compare."
    )
    parser.add_argument("ref", metavar="REF")
    parser.add_argument("--keep", action="store_true", help="record the layers in lockfiles/")
    parser.add_argument("--work", type=Path, help="a folder with room for two builds")
    given = parser.parse_args(list(arguments))
    image = catalog.find(given.ref, catalog.load())
    if not isinstance(builders.detect("buildah"), Buildah) or os.geteuid() != 0:
        raise Problem("reproduce needs root: only its builds write files in one order", 3)
    place = (given.work or host.scratch()).resolve()  # the builds run in other folders
    if not place.is_dir():
        raise Problem(f"--work: {place} is not a folder; name one with room for two builds", 2)
    leftovers.sweep(place)
    build.check_disk(place, room(image))
    work = Path(tempfile.mkdtemp(prefix=leftovers.name("reproduce"), dir=place))
    try:
        return reproduce(image, work, keep=given.keep)
    finally:
        leftovers.discard(work)


def room(image: Image) -> int:
    """The bytes that two builds take: files, layers and packages of each at once.

    While buildah commits a layer, a copy of it lies beside the others. So 48 GiB were too few for
    two builds of an SGLang image: four and a half images take 46 GiB, and its largest layer 5 GB.
    """
    recorded = layers.read(image)
    sizes = [layer.bytes for layer in recorded.layers] if recorded else [image.size.compressed * 3]
    return 9 * sum(sizes) // 2 + max(sizes) + build.DISK_NEEDED


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""A lease: a GPU machine for a short while, with no network, that takes files in small parts.

``nox -s lease -- plan [REF ...]`` says which images go into which lease, from their recorded layers
and kept reports. ``nox -s lease -- pack REF ...`` writes them to build/lease, with what runs there
(leased.py): each file of all of them once, in parts, and none that the machine has.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import builders, export, layers
from images.building.buildah import Buildah
from images.catalog import ROOT, Image, shown
from images.proving import checkouts, leased, parcels, proofs, runs, standing
from images.proving.checkouts import Checkout
from rollout import report, smoke
from rollout.faults import FAULTS
from rollout.problem import Problem

FOLDER = ROOT / "build" / "lease"
PART = 60_000_000
# Seen on four leases of a machine with two H200s; both are options.
PART_SECONDS, BUDGET = 4.3, 1800
UNPACK = 100e6  # bytes of files a second, seen there as well
# Of an image that no report tells of: the longest proof and fault that were seen.
PROOF_SECONDS, FAULT_SECONDS = 430.0, 120.0
LIMIT = 900  # seconds that a job may take
# What comes first where all of it could run.
PROOF, AGAIN, REPEATED, FAULT = 0, 1, 2, 3
# The checks that come before the first sleep: after its start such a run reads no memory.
AWAKE = ("refit", "generation", "multi-turn", "partial-rollout")


# what is to be run


def _job(
    name: str,
    argv: Sequence[str],
    gpus: int,
    shares: int,
    after: str = "",
    ends: str = "proved",
    *,
    rank: int = PROOF,
    checkout: Checkout | None = None,
) -> dict[str, Any]:
    trains = ["--framework", leased.CHECKOUT] if checkout else []
    return {
        "name": name,
        "argv": [*argv, *trains],
        "checkout": checkout.file if checkout else "",
        "gpus": gpus,
        "shares": shares,
        "after": after,
        "ends": report.EXIT_CODES[ends],
        "limit": LIMIT,
        "rank": rank,
    }


def jobs(
    image: Image, gpus: int, times: int = 0, checkout: Checkout | None = None
) -> list[dict[str, Any]]:
    """What is run of an image on so many GPUs: its proof, a second start, and every fault.

    With ``times`` its whole smoke test is run so many times more, on each GPU one after another.
    With a checkout of its framework the training that nobody promises, and its faults, run too.

    A check that needs several GPUs and starts an engine of its own is a run of its own: the others
    leave a GPU to other work.
    """
    facts = image.smoke.facts
    needs = smoke.several(facts)
    beyond = list(smoke.skipped(facts, 1))  # what one GPU cannot show
    apart = [name for name in beyond if name in smoke.ALONE]
    wide = 2 if gpus > 1 and beyond != apart else 1
    found = [
        _job("verify", ["verify"], 0, 0),
        _job("smoke", ["smoke"], wide, leased.WHOLE, "verify"),
    ]
    for name in apart if gpus > wide else ():
        only = ["smoke", "--only", name]
        job = _job(f"smoke-{name}", only, needs[name], leased.WHOLE, "smoke", "unproved")
        found.append(job)
    if checkout:
        name, only = f"smoke-{smoke.TRAINING}", ["smoke", "--only", smoke.TRAINING]
        trained = _job(name, only, 1, leased.WHOLE, "smoke", "unproved", checkout=checkout)
        found.append(trained)
        facts = standing.facts_of(image)
    again = ["smoke", "--only", "start"]
    found.append(_job("warm", again, 1, leased.WHOLE, "smoke", "unproved", rank=AGAIN))
    for number in range(1, times + 1):
        name = runs.name(number)
        found.append(_job(name, ["smoke"], wide, leased.WHOLE, "smoke", rank=REPEATED))
    for name in faults(facts, gpus):
        check = looked_for_by(name, facts, gpus)
        own = checkout if check == smoke.TRAINING else None
        argv = ["smoke", "--inject", name, *(["--only", check] if check in smoke.ALONE else [])]
        count, part = needs.get(check, 1), shares(check)
        job = _job(f"fault-{name}", argv, count, part, "smoke", "failed", rank=FAULT, checkout=own)
        found.append(job)
    return found


def looked_for_by(fault: str, facts: Mapping[str, Any], gpus: int) -> str:
    """The check of an image that has to find a fault; empty where none of it does."""
    return FAULTS[fault].found_by(smoke.available(facts, gpus)) or ""


def faults(facts: Mapping[str, Any], gpus: int) -> list[str]:
    """The faults that a check of an image with these facts looks for on so many GPUs."""
    return [name for name in FAULTS if looked_for_by(name, facts, gpus)]


def shares(check: str) -> int:
    """How much of a GPU it takes to let a check find a fault.

    One that comes after a sleep reads how much of the GPU is in use, so nobody else may be on it.
    Three trainings at once are too many for an H200.
    """
    if check == smoke.TRAINING:
        return leased.WHOLE // 2
    return 1 if check in AWAKE else leased.WHOLE


# which images together


@dataclass(frozen=True)
class Cost:
    """What an image adds to a lease: bytes to send in parts, and when it is there and proved."""

    image: Image
    bytes: int
    parts: int
    there: float
    proved: float


def run_seconds(image: Image, gpus: int, times: int = 0) -> float:
    """Seconds that its jobs hold the machine, by its own reports where there are any."""
    kept = proofs.kept_report(image)
    proof = float(kept["seconds"]) if kept else PROOF_SECONDS
    whole = proof * times
    for name in faults(image.smoke.facts, gpus):
        path = proofs.kept_fault(image, name)
        known = path.exists()
        seconds = float(proofs.read(path, shown(path))["seconds"]) if known else FAULT_SECONDS
        check = looked_for_by(name, image.smoke.facts, gpus)
        whole += seconds * shares(check) / leased.WHOLE
    return proof + whole / max(gpus, 1)


def recorded(image: Image) -> layers.Record:
    """The layers of an image.

    Raises:
        Problem: exit code 3 where none are recorded.
    """
    record = layers.read(image)
    if record is None:
        raise Problem(
            f"{image.reference} has no recorded layers, so nobody knows its size; "
            f"run 'nox -s build -- {image.reference} --record'",
            3,
        )
    return record


def new(record: layers.Record, sent: Collection[str]) -> list[layers.Layer]:
    """The layers of an image that no image before it has brought."""
    return [layer for layer in record.layers if layer.diff_id not in sent]


def packed(found: Sequence[layers.Layer]) -> int:
    """Bytes of some layers, compressed."""
    return sum(layer.compressed for layer in found)


def plan(
    images: Sequence[Image],
    *,
    part: int,
    part_seconds: float,
    budget: float,
    gpus: int,
    times: int = 0,
) -> list[list[Cost]]:
    """The leases: in each the images that fit into its seconds, the least to send next.

    While one image is proved the next is sent; the last one is proved when nothing is left to send.
    An image that no lease can hold has one of its own, which its cost shows.
    """
    records = {image.reference: recorded(image) for image in images}
    running = {image.reference: run_seconds(image, gpus, times) for image in images}
    waiting, leases = list(images), []
    while waiting:
        sent: set[str] = set()
        there = proved = 0.0
        found: list[Cost] = []
        while waiting:
            # The first of a lease is the first of those asked for; then what shares most with it.
            costs = [packed(new(records[image.reference], sent)) for image in waiting]
            image = waiting[costs.index(min(costs))] if found else waiting[0]
            added = new(records[image.reference], sent)
            size = packed(added)
            parts = -(-size // part)
            there += parts * part_seconds + sum(layer.bytes for layer in added) / UNPACK
            proved = max(there, proved) + running[image.reference]
            if found and proved > budget:
                break
            found.append(Cost(image, size, parts, there, proved))
            waiting.remove(image)
            sent |= {layer.diff_id for layer in added}
        leases.append(found)
    return leases


def table(leases: Sequence[Sequence[Cost]], images: int) -> str:
    """The plan for a person."""
    lines = []
    for number, found in enumerate(leases, 1):
        lines.append(f"lease {number}")
        for one in found:
            size = f"{layers.megabytes(one.bytes):>9} in {one.parts:>3} parts"
            times = f"there after {one.there:>5.0f} s, proved after {one.proved:>5.0f} s"
            lines.append(f"  {one.image.reference:<36}{size}, {times}")
    lines.append(f"leases: {len(leases)}, images: {images}")
    return "\n".join(lines)


# packing


def tools(folder: Path) -> None:
    """zstd and its libraries: a bare machine has none.

    Raises:
        Problem: exit code 3 where zstd is not here.
    """
    host.require("zstd")
    folder.mkdir(parents=True, exist_ok=True)
    program = shutil.which("zstd") or ""
    said = host.run(["ldd", program], quiet=True).stdout
    libraries = [line.split("=>")[1].split()[0] for line in said.splitlines() if "=> /" in line]
    # The C library goes with the machine's own loader.
    wanted = [path for path in libraries if not Path(path).name.startswith(("libc.", "libpthread"))]
    for path in (program, *wanted):
        shutil.copy2(Path(path).resolve(), folder / Path(path).name)


def pack(
    images: Sequence[Image],
    tool: Buildah,
    folder: Path,
    have: Mapping[str, str],
    options: argparse.Namespace,
) -> int:
    """Write the images in parts, the plan and what runs there. Returns the number of parts."""
    brought = checkouts.chosen([checkouts.parse(text) for text in options.checkout], images)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bundles, sent = [], set[str]()
    files = [checkouts.write(one, folder) for one in dict.fromkeys(brought.values())]
    for image in images:
        parts = parcels.write(
            image, tool, folder, sent, have, part=options.part_bytes, level=options.level
        )
        name = export.stem(image)
        bundles.append(
            {
                "name": name,
                "reference": image.reference,
                "parts": parts,
                "jobs": jobs(image, options.gpus, options.times, brought.get(image.reference)),
            }
        )
        host.say(f"{image.reference}: {len(parts)} parts")
    tools(folder / "tools")
    shutil.copy2(leased.__file__, folder / "leased.py")
    sums = {f"{checkouts.FOLDER}/{file.name}": host.sha256(file) for file in files}
    host.write_json(folder / leased.PLAN, {"bundles": bundles, "checkouts": sums})
    return sum(len(bundle["parts"]) for bundle in bundles)


def often(text: str) -> int:
    """A number of runs, for argparse."""
    if not text.isdecimal() or int(text) > runs.MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at most {runs.MOST}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """What ``nox -s lease --`` takes."""
    top = argparse.ArgumentParser(
        prog="nox -s lease --", description="Prove images on a leased machine."
    )
    top.add_argument("what", choices=("plan", "pack"))
    top.add_argument(
        "refs", nargs="*", metavar="REF", help="default: every image for a GPU that is not proved"
    )
    top.add_argument("--gpus", type=int, default=2, help="of the machine")
    top.add_argument(
        "--times", type=often, default=0, metavar="N", help="run each smoke test so often again"
    )
    top.add_argument(
        "--checkout",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a clone of a framework that is on no index: its training runs too",
    )
    top.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of one lease")
    top.add_argument("--part-bytes", type=int, default=PART, help="how much goes there at once")
    top.add_argument("--part-seconds", type=float, default=PART_SECONDS, help="how long that takes")
    top.add_argument("--level", type=int, default=layers.LEVEL, help="of zstd, 1 to 19")
    top.add_argument(
        "--have", type=Path, metavar="FILE", help="what the machine has: 'leased.py have' there"
    )
    return top


def main(arguments: Sequence[str]) -> int:
    """``nox -s lease -- plan|pack [REF ...]``."""
    given = parser().parse_intermixed_args(list(arguments))
    known = catalog.load()
    images = [catalog.find(ref, known) for ref in given.refs] or unproved(known)
    if given.what == "plan":
        found = plan(
            images,
            part=given.part_bytes,
            part_seconds=given.part_seconds,
            budget=given.budget,
            gpus=given.gpus,
            times=given.times,
        )
        host.say(table(found, len(images)))
        return 0
    tool = builders.detect("buildah")
    assert isinstance(tool, Buildah)  # noqa: S101 - what detect("buildah") gives
    have = parcels.read_have(given.have) if given.have else {}
    count = pack(images, tool, FOLDER, have, given)
    host.say(f"{shown(FOLDER)}: {count} parts of at most {layers.megabytes(given.part_bytes)}")
    first = "tools, checkouts, leased.py" if given.checkout else "tools, leased.py"
    host.say(f"send {first} and plan.json first, into one folder; docs/leases.md goes on")
    return 0


def unproved(images: Sequence[Image]) -> list[Image]:
    """The images for a GPU that are recorded, and not proved as they are today."""
    return [
        image
        for image in images
        if "cuda" in image.expect
        and layers.read(image) is not None
        and not proofs.standing_of(image).good
    ]


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

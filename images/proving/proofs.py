"""The reports of an image: where they lie, how one is kept, and what it is worth today."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from images import host
from images.building import build, layering
from images.building.buildah import Buildah
from images.building.builder import Builder, Built
from images.catalog import ROOT, Image, shown
from images.locking import lock
from images.proving import report_file, standing
from images.proving.standing import Standing, Today
from rollout import report, smoke
from rollout.faults import find
from rollout.problem import Problem

REPORTS = ROOT / "build" / "reports"


# where they lie


def report_path(image: Image) -> Path:
    """Where a run leaves its report."""
    return REPORTS / image.repository / f"{image.tag}.json"


def kept(image: Image) -> Path:
    """Where the last report of an image is kept in the repository."""
    return ROOT / "images" / "proofs" / image.repository / f"{image.tag}.json"


def beside(image: Image, what: str) -> Path:
    """Where something measured is kept beside the report: ``calibration``, ``warm`` and others."""
    return kept(image).with_suffix(f".{what}.json")


def faults_folder(image: Image) -> Path:
    """Where the reports of runs with an injected fault are kept."""
    return kept(image).with_name(f"{image.tag}.faults")


def kept_fault(image: Image, fault: str) -> Path:
    """Where the report of a run with this fault is kept."""
    return faults_folder(image) / f"{fault}.json"


def kept_faults(image: Image, name: str) -> list[Path]:
    """The kept reports of a fault, wherever it was aimed."""
    folder = faults_folder(image)
    return sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}@*.json")])


# what they say


def read(path: Path, named: str) -> dict[str, Any]:
    """A report; ``named`` is what an error calls the file.

    Raises:
        Problem: exit code 2 where that file is no report.
    """
    try:
        return report_file.read(path)
    except ValueError as error:
        raise Problem(f"{named} {error}", 2) from None


def kept_report(image: Image) -> dict[str, Any] | None:
    """The kept report of an image, None where none is kept.

    Raises:
        Problem: exit code 2 where that file is no report.
    """
    path = kept(image)
    return read(path, shown(path)) if path.exists() else None


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report from the reports of ``verify`` and ``smoke``, in this order.

    The verdict is the weakest of theirs: failed before unproved before in part before proved.
    """
    whole = dict(parts[-1])
    whole["started"] = parts[0]["started"]
    whole["seconds"] = sum(part["seconds"] for part in parts)
    whole["checks"] = [check for part in parts for check in part["checks"]]
    whole["skipped"] = {key: why for part in parts for key, why in part["skipped"].items()}
    programs = [part["program"] for part in parts]
    if None not in programs:
        whole["program"] = {key: value for one in programs for key, value in one.items()}
    order = ("failed", "unproved", "in-part", "proved")
    whole["verdict"] = min((part["verdict"] for part in parts), key=order.index)
    return whole


def join(parts: Sequence[Mapping[str, Any]], image: Image) -> dict[str, Any]:
    """One report of ``smoke`` from reports of parts of it (``--only``).

    A check of which several tell counts as the first that did not pass, else as the first. What one
    part had to leave out, for want of a second GPU, and another ran is not skipped. A part in which
    no framework trained names none. One that was asked for a check by name knows one program more.

    Raises:
        ValueError: they are of different runs: not of one model, program or machine.
    """
    whole = dict(max(parts, key=lambda part: len(part["gpus"])))
    trained = [part["framework"] for part in parts if part["framework"]]
    whole["framework"] = trained[0] if trained else None
    programs = [part["program"] for part in parts]
    if None not in programs:
        whole["program"] = {key: value for one in reversed(programs) for key, value in one.items()}
        if any(whole["program"][key] != one[key] for one in programs for key in one):
            raise ValueError("they differ in 'program'")
    elif any(programs):
        raise ValueError("they differ in 'program'")
    for name in ("model", "cycles", "framework", "added", "device", "driver"):
        untold = [None] if name == "framework" else []
        if any(part[name] not in (whole[name], *untold) for part in parts):
            raise ValueError(f"they differ in {name!r}")
    told = sorted(
        (check for part in parts for check in part["checks"]),
        key=lambda check: check["status"] == "passed",
    )
    first = {check["name"]: check for check in reversed(told)}
    promised = smoke.promised(image.smoke.facts)
    others = [name for name in first if name not in promised]
    whole["checks"] = [first[name] for name in (*promised, *others) if name in first]
    ran = {*first, *standing.sent_by(whole, image.smoke.refit)}
    left_out = {name: why for part in parts for name, why in part["skipped"].items()}
    whole["skipped"] = {name: why for name, why in left_out.items() if name not in ran}
    whole["started"] = min(part["started"] for part in parts)
    whole["seconds"] = sum(part["seconds"] for part in parts)
    statuses = [
        report.Check(c["name"], c["status"], 0.0, reason=c["reason"]) for c in first.values()
    ]
    whole["verdict"] = report.verdict(statuses, promised, whole["skipped"])
    return whole


# what they are worth


def today(image: Image, diff_ids: Sequence[str] | None = None) -> Today:
    """An image as it is now, with the layers that were just built or else the recorded ones."""
    locked = lock.read(image)
    versions = lock.versions(locked)
    recorded = build.recorded(image) if diff_ids is None else None
    below = None if diff_ids is None else tuple(diff_ids[:-1])
    return Today(
        reference=image.reference,
        lock_sha256=host.sha256(image.lock),
        engine=(image.backend, versions[image.engine]),
        torch=versions["torch"],
        framework=(image.framework.name, image.framework.named) if image.framework else None,
        layers=recorded.diff_ids if recorded else below,
        checks=standing.promised(image),
        transports=image.smoke.refit,
        program=standing.program_of(image),
        not_shown=image.not_shown,
        above=int("framework" in layering.layer_names(image, locked)),
        brought=image.framework is not None and not image.framework.packaged,
    )


def standing_of(image: Image) -> Standing:
    """What the kept report of an image is worth today."""
    return standing.judge(kept_report(image), today(image))


def standing_of_fault(image: Image, fault: str, now: Today | None = None) -> str:
    """What the kept report of an injected fault is worth today; empty if all."""
    path = kept_fault(image, fault)
    check = find(fault).found_by(smoke.promised(standing.facts_of(image))) or ""
    return standing.of_fault(read(path, shown(path)), now or today(image), check)


def told(image: Image, found: Standing) -> int:
    """Say what a report is worth, as the host computes it; the exit code of that."""
    host.say(f"{image.reference}: {found.word}: {found.sentence}")
    return 0 if found.word in (standing.PROVED, standing.IN_PART) else 3


# how one is kept


def leave(image: Image, data: Mapping[str, Any]) -> None:
    """Write the report of a run.

    Raises:
        Problem: it is no report.
    """
    wrong = report_file.validate(data)
    if wrong:
        raise Problem(f"the report breaks its own schema: {'; '.join(wrong[:3])}")
    host.write_json(report_path(image), data)
    host.say(f"{data['image']}: {data['verdict']}; report in {shown(report_path(image))}")


def keep(image: Image, tool: Builder, built: Built) -> None:
    """Keep the report that a run left, and the layers that it holds for."""
    if not isinstance(tool, Buildah):
        raise Problem("--keep needs buildah: only its layers are recorded", 2)
    build.keep(image, tool, built)
    host.write(kept(image), report_path(image).read_text(encoding="utf-8"))
    beside(image, "warm").unlink(missing_ok=True)  # the second start after another first one
    now = today(image, built.diff_ids)
    for path in sorted(faults_folder(image).glob("*.json")):
        with contextlib.suppress(Problem):  # what cannot be read any more shows nothing
            if standing_of_fault(image, path.stem, now) != standing.STALE:
                continue
        path.unlink()


def keep_faults(image: Image, faults: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the reports of runs with a fault, by the fault's name."""
    for name, data in faults.items():
        host.write_json(kept_fault(image, name), data)

"""Reports that runs of an image left on another machine, taken in with ``--from FOLDER``.

Where the machine that builds has no GPU, the image is exported and run on one that has. The folder
holds what those runs wrote: verify.json and smoke.json, and where they are there
smoke-<any>.json of further parts of the smoke test (``--only``), fault-<name>.json of injected
faults, warm.json of a second start, calibration.json, and repeat-<number>.json of one smoke test
after another (runs.py). Only reports of this image are taken: they name its lock and its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from images import host
from images.building import build
from images.building.builder import Builder
from images.catalog import Image, shown
from images.locking import lock
from images.proving import proofs, repeated, report_file, runs, standing
from images.proving.standing import Today
from rollout import calibrate, report, smoke
from rollout.faults import unseen
from rollout.problem import Problem


def adopt(image: Image, tool: Builder, folder: Path, *, keep: bool, times: int = 0) -> int:
    """Take in the reports that lie in a folder; returns the exit code.

    Everything is checked before anything is written. A folder that holds reports of faults, or of
    repeated runs (of ``times`` that were asked for), and no proof adds these to what is kept.

    Raises:
        Problem: exit code 2 for a report of another image, 1 for a fault that was not found.
    """
    lock.read(image)
    # As in prove: the report of an earlier run must not be taken for this one's.
    proofs.report_path(image).unlink(missing_ok=True)
    proof = [folder / f"{name}.json" for name in ("verify", "smoke")]
    often = runs.inside(folder)
    if times and not often:
        raise Problem(f"--from: {folder} holds no repeat-001.json, of which --times tells", 2)
    if not any(path.exists() for path in proof) and (often or any(folder.glob("fault-*.json"))):
        return _beside(image, tool, folder, keep=keep, times=times)
    built = build.build(image, tool)
    now = proofs.today(image, built.diff_ids)
    verified, smoked = (read_report(path, now) for path in proof)
    whole = proofs.merge([verified, in_parts(smoked, folder, image, now)])
    faults = found_faults(folder, image, now)
    calibrated = calibration(folder / "calibration.json", image, now)
    many = runs.adopted(image, folder, now, times) if often else None
    second = folder / "warm.json"
    again = read_report(second, now) if _there(second) else None
    wrong = report_file.validate(whole)  # a check may be in both
    if wrong:
        raise Problem(f"--from: {folder}: verify.json and smoke.json are no pair: {wrong[0]}", 2)
    found = standing.judge(whole, now)
    if whole["verdict"] in ("proved", "in-part") and not found.good:
        raise Problem(f"--from: {folder} shows no proof of {image.reference}: {found.sentence}", 2)
    cold = standing.no_second_start(again, whole) if again and found.good else ""
    if cold:
        raise Problem(f"--from: {second} shows no second start: it {cold}")
    proofs.leave(image, whole)
    if not found.good:
        return report.exit_code(whole["verdict"])
    code = proofs.told(image, found)
    if keep:
        proofs.keep(image, tool, built)
        proofs.keep_faults(image, faults)
        if calibrated is not None:
            host.write(proofs.beside(image, "calibration"), calibrated)
        if again is not None:
            host.write_json(proofs.beside(image, "warm"), again)
        kept = shown(proofs.kept(image))
        host.say(f"kept as {kept}, with {len(faults)} faults; 'nox -s docs' is next")
    again_code = _take_repeated(image, many, keep=keep)
    return code or again_code


def _beside(image: Image, tool: Builder, folder: Path, *, keep: bool, times: int) -> int:
    """Take in the reports of faults and of repeated runs in a folder without a proof."""
    now = proofs.today(image)
    if now.layers is None:  # no record says which layers are today's
        now = proofs.today(image, build.build(image, tool).diff_ids)
    faults = found_faults(folder, image, now)
    many = runs.adopted(image, folder, now, times) if runs.inside(folder) else None
    if faults:
        host.say(f"{image.reference}: each of {len(faults)} faults was found by its own check")
    if keep and faults:
        proofs.keep_faults(image, faults)
        host.say(f"kept in {shown(proofs.faults_folder(image))}; 'nox -s docs' is next")
    return _take_repeated(image, many, keep=keep)


def _take_repeated(image: Image, data: Mapping[str, Any] | None, *, keep: bool) -> int:
    """Leave the report of repeated runs, keep it where that is asked for; its exit code."""
    if data is None:
        return 0
    host.write_json(repeated.left(image), data)
    host.say(f"{image.reference}: {repeated.told(data)}")
    if keep:
        repeated.keep(image, data)
    return repeated.exit_code(data)


def in_parts(smoked: dict[str, Any], folder: Path, image: Image, now: Today) -> dict[str, Any]:
    """The report smoke.json, with what those of further parts beside it add.

    Raises:
        Problem: exit code 2 for a part of another image, or of another run than smoke.json.
    """
    more = [read_report(path, now) for path in sorted(folder.glob("smoke-*.json"))]
    if not more:
        return smoked
    try:
        return proofs.join([smoked, *more], image)
    except ValueError as error:
        raise Problem(
            f"--from: {folder}: smoke*.json are no parts of one proof: {error}", 2
        ) from None


def _there(path: Path) -> bool:
    """Whether something has this name: a link that leads nowhere too, which no reader takes."""
    return path.exists() or path.is_symlink()


def read_report(path: Path, now: Today) -> dict[str, Any]:
    """A report that another machine wrote, if it is about this image as it is built here.

    Raises:
        Problem: exit code 2 for a file that is no report, or one of another image, lock or layers.
    """
    data = proofs.read(path, f"--from: {path}")
    wrong = standing.foreign(data, now) or standing.outdated(data, now)
    if wrong:
        raise Problem(f"--from: {path} {wrong}", 2)
    return data


def found_faults(folder: Path, image: Image, now: Today) -> dict[str, dict[str, Any]]:
    """The reports of runs with a fault that lie in a folder, by the fault's name.

    Raises:
        Problem: exit code 2 for a fault that nobody knows and for a report of another image, 1 for
            a fault that its own check did not find.
    """
    faults = {}
    for path in sorted(folder.glob("fault-*.json")):
        name = path.stem.removeprefix("fault-")
        try:
            smoke.fault(name, standing.facts_of(image))
        except Problem as problem:
            raise Problem(f"--from: {path}: {problem.sentence}", 2) from None
        faults[name] = read_report(path, now)
        wrong = found_by(faults[name], name, image)
        if wrong:
            raise Problem(f"--from: {path} does not show that {name} is found: {wrong}")
    return faults


def found_by(data: Mapping[str, Any], fault: str, image: Image) -> str:
    """Why the report of a run with a fault shows nothing; empty if its check alone failed."""
    failed = {c["name"]: str(c["reason"]) for c in data["checks"] if c["status"] == "failed"}
    return unseen(fault, failed, smoke.promised(standing.facts_of(image)))


def calibration(path: Path, image: Image, now: Today) -> str | None:
    """The text of a calibration that another machine wrote; None where it wrote none.

    Raises:
        Problem: exit code 2 for a file that is none or of another image, 1 for missed margins.
    """
    if not _there(path):
        return None
    versions = lock.versions(lock.read(image))
    try:
        text = report.content(path)
        data: Any = report.parse_json(text)
        if data["schema"] != calibrate.SCHEMA:
            raise KeyError
        broken = calibrate.margins_hold(data)
        other = standing.no_calibration(data, now, versions)
    except ValueError as error:
        raise Problem(f"--from: {path} {error}", 2) from None
    except (KeyError, TypeError, AttributeError):
        raise Problem(
            f"--from: {path} is no calibration; remake it with rollout.calibrate", 2
        ) from None
    if other:
        raise Problem(f"--from: {path} is of another image: it {other}", 2)
    if broken:
        raise Problem(f"--from: {path}: {broken[0]}")
    return text.decode()

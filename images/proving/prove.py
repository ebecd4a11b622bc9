"""Fourth station: from an image to a proof.

``nox -s prove``: the lock is what its inputs resolve to, the image is built where needed, ``rollout
verify`` and ``rollout smoke`` run inside it, and their checks end as one report in
build/reports/<repository>/<tag>.json.

Where the machine that builds has no GPU, the image is exported, run on one that has, and what those
runs wrote is taken in with ``--from FOLDER``: verify.json and smoke.json, and where they are there
fault-<name>.json of injected faults, warm.json of a second start and calibration.json. Only reports
of this image are: they name its lock and its layers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import build, builder, builders, layering, layers
from images.building.buildah import Buildah
from images.catalog import ROOT, Image, shown
from images.host import leftovers
from images.locking import lock, locks, resolution
from images.proving import standing
from images.proving.standing import Standing, Today
from rollout import calibrate, cli, report, smoke
from rollout.faults import find, unseen
from rollout.problem import Problem

REPORTS = ROOT / "build" / "reports"


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


def report_path(image: Image) -> Path:
    """Where a run leaves its report."""
    return REPORTS / image.repository / f"{image.tag}.json"


def today(image: Image, diff_ids: Sequence[str] | None = None) -> Today:
    """An image as it is now, with the layers that were just built or else the recorded ones."""
    versions = lock.versions(lock.read(image))
    recorded = layers.read(image)
    below: tuple[str, ...] | None = None
    if diff_ids is not None:
        below = tuple(diff_ids[:-1])
    elif recorded and recorded.inputs == build.inputs(image):
        below = recorded.diff_ids
    return Today(
        reference=image.reference,
        lock_sha256=host.sha256(image.lock),
        engine=(image.backend, versions[image.engine]),
        torch=versions["torch"],
        framework=(image.framework.name, image.framework.version) if image.framework else None,
        layers=below,
        checks=standing.promised(image),
        transports=image.smoke.refit,
        program=standing.program_of(image),
        not_shown=image.not_shown,
        above=int("framework" in layering.layer_names(image, lock.read(image))),
    )


def kept_report(image: Image) -> dict[str, Any] | None:
    """The kept report of an image, None where none is kept.

    Raises:
        Problem: exit code 2 where that file is no report.
    """
    path = kept(image)
    return _read(path, shown(path)) if path.exists() else None


def standing_of(image: Image) -> Standing:
    """What the kept report of an image is worth today."""
    return standing.judge(kept_report(image), today(image))


def standing_of_fault(image: Image, fault: str) -> str:
    """What the kept report of an injected fault is worth today; empty if all."""
    path = kept_fault(image, fault)
    check = find(fault).found_by(smoke.promised(image.smoke.facts)) or ""
    return standing.of_fault(_read(path, shown(path)), today(image), check)


def _read(path: Path, named: str) -> dict[str, Any]:
    try:
        return report.read(path)
    except ValueError as error:
        raise Problem(f"{named} {error}", 2) from None


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


def _drift(image: Image) -> None:
    """Whether the lock is what its inputs resolve to; an index that cannot say so is no obstacle.

    Raises:
        Problem: it is not, or its inputs do not resolve at all.
    """
    try:
        difference = locks.drift(image.lock, resolution.resolve(image))
    except resolution.Unanswered as problem:
        host.say(f"not checked: {problem.sentence}; the committed lock is built as it is")
        return
    if difference:
        sys.stdout.write(difference)
        command = f"nox -s lock -- {image.reference}"
        raise Problem(f"{shown(image.lock)} has drifted (diff above); remake it with '{command}'")


def prove(image: Image, tool: builder.Builder, options: Sequence[str], *, keep: bool) -> int:
    """Prove one image; the options go to ``rollout smoke``. Returns the exit code of the proof.

    With ``keep`` the report of a proof and the layers it holds for stay in the repository.
    """
    host.say(f"{image.reference}: is the lock what its inputs resolve to?")
    lock.read(image)
    _drift(image)
    host.say(f"{image.reference}: build")
    built = build.build(image, tool)
    if isinstance(tool, Buildah):
        inputs, version = build.inputs(image), tool.version()
        verdict = layers.compare(layers.read(image), inputs, built, version)
        host.say(f"{image.reference}: {verdict.sentence}")
    env = {"ROLLOUT_LAYERS": ",".join(built.diff_ids)}
    parts: list[dict[str, Any]] = []
    code = 0
    # A report of an earlier run must not be taken for this one's, however this one ends.
    report_path(image).unlink(missing_ok=True)
    with leftovers.temporary("report") as folder:
        user = tool.writer(folder)
        smoking, volumes = smoke_options(options, image)
        for command, extra in (("verify", []), ("smoke", smoking)):
            host.say(f"\n{image.reference}: rollout {command}")
            inside = ["rollout", command, "--report", f"/report/{command}.json", *extra]
            # By its id: another clone may give the name to an image of its own meanwhile.
            places = {str(folder): "/report", **volumes}
            code = tool.run(builder.Command(built.id, inside, user, places, env))
            path = folder / f"{command}.json"
            if not path.exists():
                host.say(f"rollout {command} exited with {code} and left no report")
                return code or 1
            parts.append(_read(path, f"the report of rollout {command}"))
            if code:
                break
    whole = merge(parts)
    _leave(report_path(image), whole)
    found = standing.judge(whole, today(image, built.diff_ids))
    if not code and not options:
        code = _told(image, found)
    if keep and not code:
        _keep(image, tool, built)
        host.say(f"kept as {shown(kept(image))}; 'nox -s docs' renews the README's table")
    return code


def _told(image: Image, found: Standing) -> int:
    """Say what a report is worth, as the host computes it; the exit code of that."""
    host.say(f"{image.reference}: {found.word}: {found.sentence}")
    return 0 if found.word in (standing.PROVED, standing.IN_PART) else 3


def read_report(path: Path, now: Today) -> dict[str, Any]:
    """A report that another machine wrote, if it is about this image as it is built here.

    Raises:
        Problem: exit code 2 for a file that is no report, or one of another image, lock or layers.
    """
    data = _read(path, f"--from: {path}")
    wrong = standing.foreign(data, now) or standing.outdated(data, now)
    if wrong:
        raise Problem(f"--from: {path} {wrong}", 2)
    return data


def found_by(data: Mapping[str, Any], fault: str, image: Image) -> str:
    """Why the report of a run with a fault shows nothing; empty if its check alone failed."""
    failed = {c["name"]: str(c["reason"]) for c in data["checks"] if c["status"] == "failed"}
    return unseen(fault, failed, smoke.promised(image.smoke.facts))


def calibration(path: Path, image: Image, now: Today) -> str | None:
    """The text of a calibration that another machine wrote; None where it wrote none.

    Raises:
        Problem: exit code 2 for a file that is none or of another image, 1 for missed margins.
    """
    if not path.exists() and not path.is_symlink():
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


def warm(path: Path, now: Today) -> dict[str, Any] | None:
    """The report of what should be a second start; None where there is none.

    Raises:
        Problem: exit code 2 for a report of another image.
    """
    return read_report(path, now) if path.exists() or path.is_symlink() else None


def adopt(image: Image, tool: builder.Builder, folder: Path, *, keep: bool) -> int:
    """Take in the reports that runs of this image left on another machine; returns the exit code.

    Everything is checked before anything is written. A folder that holds reports of faults and no
    proof adds these faults to what is kept.

    Raises:
        Problem: exit code 2 for a report of another image, 1 for a fault that was not found.
    """
    lock.read(image)
    report_path(image).unlink(missing_ok=True)  # as in prove: an earlier run's is not this one's
    proof = [folder / f"{name}.json" for name in ("verify", "smoke")]
    if not any(path.exists() for path in proof) and any(folder.glob("fault-*.json")):
        recorded = layers.read(image)
        if recorded and recorded.inputs == build.inputs(image):
            now = today(image)  # the record says which layers are today's: nothing is built for it
        else:
            now = today(image, build.build(image, tool).diff_ids)
        return _add_faults(image, found_faults(folder, image, now), keep=keep)
    built = build.build(image, tool)
    now = today(image, built.diff_ids)
    parts = [read_report(path, now) for path in proof]
    faults = found_faults(folder, image, now)
    calibrated = calibration(folder / "calibration.json", image, now)
    again = warm(folder / "warm.json", now)
    whole = _one(parts, folder)
    found = standing.judge(whole, now)
    if whole["verdict"] in ("proved", "in-part") and not found.good:
        raise Problem(f"--from: {folder} shows no proof of {image.reference}: {found.sentence}", 2)
    wrong = standing.no_second_start(again, whole) if again and found.good else ""
    if wrong:
        raise Problem(f"--from: {folder / 'warm.json'} shows no second start: it {wrong}")
    _leave(report_path(image), whole)
    code = _told(image, found) if found.good else report.exit_code(whole["verdict"])
    if keep and found.good:
        _keep(image, tool, built)
        _keep_faults(image, faults)
        if calibrated is not None:
            host.write(beside(image, "calibration"), calibrated)
        if again is not None:
            host.write(beside(image, "warm"), json.dumps(again, indent=1) + "\n")
        host.say(f"kept as {shown(kept(image))}, with {len(faults)} faults; 'nox -s docs' is next")
    return code


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
            smoke.fault(name, image.smoke.facts)
        except Problem as problem:
            raise Problem(f"--from: {path}: {problem.sentence}", 2) from None
        faults[name] = read_report(path, now)
        wrong = found_by(faults[name], name, image)
        if wrong:
            raise Problem(f"--from: {path} does not show that {name} is found: {wrong}")
    return faults


def _add_faults(image: Image, faults: Mapping[str, Mapping[str, Any]], *, keep: bool) -> int:
    host.say(f"{image.reference}: each of {len(faults)} faults was found by its own check")
    if keep:
        _keep_faults(image, faults)
        host.say(f"kept in {shown(faults_folder(image))}; 'nox -s docs' is next")
    return 0


def _keep_faults(image: Image, faults: Mapping[str, Mapping[str, Any]]) -> None:
    for name, data in faults.items():
        host.write(kept_fault(image, name), json.dumps(data, indent=1) + "\n")


def _one(parts: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The reports of ``verify`` and ``smoke`` as one.

    Raises:
        Problem: exit code 2 where they cannot be the two: a check is in both.
    """
    whole = merge(parts)
    wrong = report.validate(whole)
    if wrong:
        raise Problem(f"--from: {folder}: verify.json and smoke.json are no pair: {wrong[0]}", 2)
    return whole


def _leave(path: Path, data: dict[str, Any]) -> None:
    wrong = report.validate(data)
    if wrong:
        raise Problem(f"the report breaks its own schema: {'; '.join(wrong[:3])}")
    host.write(path, json.dumps(data, indent=1) + "\n")
    host.say(f"{data['image']}: {data['verdict']}; report in {shown(path)}")


def _keep(image: Image, tool: builder.Builder, built: builder.Built) -> None:
    """Keep the report that a run left, and the layers that it holds for."""
    if not isinstance(tool, Buildah):
        raise Problem("--keep needs buildah: only its layers are recorded", 2)
    build.keep(image, tool, built)
    host.write(kept(image), report_path(image).read_text(encoding="utf-8"))
    # Reports of faults and of a second start in other layers say nothing of these.
    beside(image, "warm").unlink(missing_ok=True)
    shutil.rmtree(faults_folder(image), ignore_errors=True)


def smoke_options(options: Sequence[str], image: Image) -> tuple[list[str], dict[str, str]]:
    """Options for ``rollout smoke``, checked before anything is built, and the volumes they need.

    A folder of this host that ``--model`` names is mounted, and named as the container sees it.

    Raises:
        Problem: exit code 2 for what smoke does not know, and for ``--report``, which is ours.
    """
    if any(o == "--report" or o.startswith("--report=") for o in options):
        raise Problem(f"--report is set by prove: the report is {shown(report_path(image))}", 2)
    given = cli.parser().parse_args(["smoke", *options])
    smoke.selected([name for name in given.only.split(",") if name], image.smoke.facts, smoke.ANY)
    smoke.fault(given.inject, image.smoke.facts)
    if given.model is None:
        return list(options), {}
    folder = given.model.resolve()
    if not folder.is_dir():
        raise Problem(f"--model: {folder} is not a folder; name one with config.json in it", 2)
    return [*options, "--model", "/model"], {str(folder): "/model:ro"}


HELP = """\
usage: nox -s prove -- [REF ...] [--keep] [OPTION ...]
       nox -s prove -- REF --from FOLDER [--keep]

  --keep         keep the report, and the layers that it holds for, in the repository
  --from FOLDER  take in what runs of the image on another machine have left there: verify.json,
                 smoke.json and what else there is of them; nothing is run here. A folder with
                 fault-NAME.json alone adds these faults to those that are kept

Every OPTION goes to `rollout smoke` in the image:
"""


def main(arguments: Sequence[str]) -> int:
    """``nox -s prove [-- REF … OPTIONS]``, or ``REF --from FOLDER``.

    ``--keep`` keeps the report, the other options are for smoke.
    """
    images = catalog.load()
    chosen, options = catalog.select(arguments, images)
    if {"-h", "--help"} & set(options):
        host.say(HELP)
        cli.parser().parse_args(["smoke", "--help"])
    keeping = "--keep" in options
    options = [option for option in options if option != "--keep"]
    if "--from" in options:
        if len(options) != 2 or options[0] != "--from" or len(chosen) != 1:
            raise Problem("--from FOLDER takes one REF before it, and --keep alone beside it", 2)
        return adopt(chosen[0], builders.detect(), Path(options[1]), keep=keeping)
    if keeping and options:
        raise Problem("--keep takes no other option: what is kept is the whole proof", 2)
    chosen = chosen or [catalog.find(catalog.DEFAULT, images)]
    for image in chosen:
        smoke_options(options, image)
    tool = builders.detect()
    code = 0
    for image in chosen:
        found = prove(image, tool, options, keep=keeping)
        code = code or found
    return code


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

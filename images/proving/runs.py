"""The whole smoke test many times in a row, each in a fresh container; what each run left.

They are made here, or another machine made them and left ``repeat-001.json`` and so on in a folder,
each with ``repeat-001.end`` beside it where leased.py started it. What they are worth together says
repeated.py.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from images import host
from images.building.builder import Builder, Built, Command
from images.catalog import Image
from images.host import leftovers
from images.proving import proofs, repeated, report_file, standing
from images.proving.repeated import Run
from images.proving.standing import Today
from rollout import report, smoke
from rollout.problem import Problem

MOST = 999  # runs: their numbers have three digits
TOLD = 4000  # bytes at the end of what a run without a report has printed
# The container's shell becomes the smoke test; what that prints lies beside its report.
INSIDE = ("sh", "-c", 'exec "$@" >/report/log 2>&1', "sh", "rollout", "smoke")


# runs on this machine


def here(image: Image, tool: Builder, built: Built, times: int) -> Iterator[Run]:
    """Run the smoke test so many times, one after another, each in a container of its own."""
    env = {"ROLLOUT_LAYERS": ",".join(built.diff_ids)}
    promised = smoke.promised(image.smoke.facts)
    for count in range(1, times + 1):
        with leftovers.temporary("report") as folder:
            user = tool.writer(folder)
            argv = [*INSIDE, "--report", "/report/smoke.json"]
            started, clock = report.now(), time.perf_counter()
            problem = ""
            try:
                code = tool.run(Command(built.id, argv, user, {str(folder): "/report"}, env))
            except Problem as error:  # the next one may begin
                code, problem = error.code, error.sentence
            found = ended(count, code, folder, started, time.perf_counter() - clock, problem)
            if repeated.outcome(found, promised) != repeated.CLEAN:
                _save(folder, repeated.outputs(image), count)
        yield found


def ended(
    count: int, code: int, folder: Path, started: str, seconds: float, problem: str = ""
) -> Run:
    """A run that is over, with what it left in its folder."""
    file = folder / "smoke.json"
    if not file.exists():
        return Run(count, code, started, seconds, said=problem or tail(folder / "log"))
    try:
        data = report_file.read(file)
    except ValueError as error:
        return Run(count, code, started, seconds, spoiled=str(error))
    return Run(count, code, data["started"], data["seconds"], data)


def tail(log: Path) -> str:
    """The end of what a run has printed, if that is a file and no link to another one."""
    if log.is_symlink() or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, 2) - TOLD, 0))
        return file.read().decode("utf-8", "replace").strip()


def _save(folder: Path, target: Path, count: int) -> None:
    """Copy what a run left to where a person can look at it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("smoke.json", "log"):
        with suppress(FileNotFoundError):
            file = target / f"{count:03}{Path(name).suffix or '.log'}"
            shutil.copyfile(folder / name, file, follow_symlinks=False)


def repeat(image: Image, tool: Builder, built: Built, times: int) -> dict[str, Any]:
    """Run the smoke test so many times, and leave the report of all runs so far after each.

    A failure ends that run alone.
    """
    now, promised = proofs.today(image, built.diff_ids), smoke.promised(image.smoke.facts)
    shutil.rmtree(repeated.outputs(image), ignore_errors=True)
    done: list[Run] = []

    def whole() -> dict[str, Any]:
        common = repeated.about(now, done, promised)
        data = repeated.document(common, done, times, promised)
        host.write_json(repeated.left(image), data)
        return data

    data = whole()  # one of an earlier time is not taken for this one, whatever happens
    for run in here(image, tool, built, times):
        done.append(run)
        data = whole()
        word = repeated.outcome(run, promised)
        host.say(f"run {run.number} of {times}: {word} in {run.seconds:.1f} s")
        for failure in repeated.failures(run, promised):
            what = f"{failure['check']}: " if failure["check"] else ""
            host.say(f"    {what}{failure['reason']}")
    return data


# runs on another machine


def name(number: int) -> str:
    """What the report of a run is called on a machine that makes them for others."""
    return f"repeat-{number:03}"


def inside(folder: Path) -> list[int]:
    """The numbers of the runs that left something in a folder: a report, their end or a log.

    Raises:
        Problem: exit code 2 for a name without a number of three digits, which nobody would miss.
    """
    files = [f for kind in ("json", "end", "log", "tail") for f in folder.glob(f"repeat-*.{kind}")]
    for file in files:
        if not re.fullmatch(r"repeat-(?!000)[0-9]{3}", file.stem):
            raise Problem(f"--from: {file} is no run; they are called repeat-001.json and so on", 2)
    return sorted({int(file.stem.removeprefix("repeat-")) for file in files})


def of_folder(folder: Path, now: Today, times: int) -> tuple[list[Run], int]:
    """The runs in a folder, and how many were asked for: ``times``, or as many as there are.

    A run between two others that left nothing at all counts as broken.

    Raises:
        Problem: exit code 2 for a report that is none, or not one of this image's probe.
    """
    numbers = inside(folder)
    if times and numbers[-1] > times:
        raise Problem(f"--from: {folder} holds run {numbers[-1]}, and --times says {times}", 2)
    found = [_of_file(folder / f"{name(n)}.json", n, now) for n in range(1, numbers[-1] + 1)]
    return found, times or len(found)


def _of_file(file: Path, count: int, now: Today) -> Run:
    end = _end(file.with_suffix(".end"))
    code, started, seconds = end.get("exit"), end.get("started"), end.get("seconds", 0.0)
    if not file.exists():
        said = tail(file.with_suffix(".log")) or tail(file.with_suffix(".tail"))
        return Run(count, code, started, seconds, said=said)
    data = proofs.read(file, f"--from: {file}")
    wrong = (
        standing.foreign(data, now)
        or standing.outdated(data, now)
        or standing.unfinished({**data, "checks": []})
    )
    if wrong:
        raise Problem(f"--from: {file} {wrong}", 2)
    return Run(count, code, data["started"], data["seconds"], data)


def _end(file: Path) -> dict[str, Any]:
    """How a run ended, as the machine that started it says (leased.py); empty where none does.

    Raises:
        Problem: exit code 2 for a file of another kind.
    """
    if not file.exists():
        return {}
    try:
        data = report.parse_json(report.content(file))
        if not isinstance(data, dict):
            raise ValueError("is no end of a run")
        if datetime.fromisoformat(data["started"]).tzinfo is None:
            raise ValueError("names no moment in UTC")
        return {
            "exit": int(data["exit"]),
            "started": data["started"],
            "seconds": float(data["seconds"]),
        }
    except (KeyError, TypeError):
        raise Problem(f"--from: {file} is no end of a run", 2) from None
    except ValueError as error:
        raise Problem(f"--from: {file} {error}", 2) from None


def adopted(image: Image, folder: Path, now: Today, times: int) -> dict[str, Any]:
    """The report of the runs in a folder.

    Raises:
        Problem: exit code 2 where they are of different images or machines, or no runs of this one.
    """
    done, asked = of_folder(folder, now, times)
    other = repeated.differing(done)
    if other:
        raise Problem(f"--from: {folder}: repeat-*.json are not of one kind: {other!r} differs", 2)
    promised = smoke.promised(image.smoke.facts)
    return repeated.document(repeated.about(now, done, promised), done, asked, promised)

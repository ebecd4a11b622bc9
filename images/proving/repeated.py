"""The report of the whole smoke test many times: how often it passed, and how near it came to no.

``nox -s prove -- REF --times N`` makes the runs (runs.py). The report says of every run how it
ended, of every check how often it passed and between which values its numbers lay, and of each
number that is held to a limit how near it came. What went wrong is told in full, and only a run in
which everything that the image promises passed is called clean.

Everything here is pure but for what reads and writes files.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from images import host
from images.catalog import Image, shown
from images.proving import limits, proofs, standing
from images.proving.standing import Today
from rollout import report, smoke, verify
from rollout.problem import Problem

SCHEMA = "rollout-repeated/1"
# Clean: all that is promised passed, or was skipped with a reason. Failed: a check said no.
# Unproved: the machine could not begin, or not show all of it. Broken: it ended in another way.
CLEAN, FAILED, UNPROVED, BROKEN = OUTCOMES = ("clean", "failed", "unproved", "broken")
# What all runs of one report have in common: the image, the machine, and what was asked.
COMMON = (
    *("image", "lock_sha256", "layers", "engine", "torch", "cuda", "driver", "gpus"),
    *("model", "cycles", "added", "program"),
)
# The same, but a run that failed early may not know it: what trained, and on which device.
LATE = ("device", "framework", "skipped")


@dataclass(frozen=True)
class Run:
    """One run: when it began, how it ended, and what it left."""

    number: int
    exit: int | None  # None where nobody saw it end
    started: str | None  # None where it left nothing
    seconds: float
    report: Mapping[str, Any] | None = None
    said: str = ""  # the end of what it printed, where it left no report
    spoiled: str = ""  # why what it left is no report


# what runs are worth


def verdict(data: Mapping[str, Any], promised: Sequence[str]) -> str:
    """The verdict of a report's checks, as the host finds it and whatever the report says."""
    checks = [report.Check(**check) for check in data["checks"]]
    return report.verdict(checks, promised, data["skipped"])


def outcome(run: Run, promised: Sequence[str]) -> str:
    """How a run ended."""
    if run.report is None:
        unable = run.exit == report.EXIT_CODES["unproved"] and not run.spoiled
        return UNPROVED if unable else BROKEN
    found = verdict(run.report, promised)
    if found in ("failed", "unproved"):
        return FAILED if found == "failed" else UNPROVED
    return CLEAN if run.exit in (0, None) else BROKEN


def failures(run: Run, promised: Sequence[str]) -> list[dict[str, Any]]:
    """Why a run is not clean, in full: each check that failed, or what else went wrong."""
    word = outcome(run, promised)

    def told(check: str | None, reason: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        head = {"run": run.number, "outcome": word, "check": check}
        return {**head, "reason": reason, "metrics": metrics}

    if word == CLEAN:
        return []
    if run.report is None:
        ended = "nobody saw it end" if run.exit is None else f"it ended with {run.exit}"
        what = f"its report {run.spoiled}" if run.spoiled else "it left no report"
        last = f", having said: {run.said}" if run.said else ""
        return [told(None, f"{ended}, and {what}{last}", {})]
    if word == BROKEN:
        return [told(None, f"every check passed, and it ended with {run.exit}", {})]
    status = "failed" if word == FAILED else "unproved"
    checks = [check for check in run.report["checks"] if check["status"] == status]
    found = [told(check["name"], check["reason"], check["metrics"]) for check in checks]
    names = [check["name"] for check in run.report["checks"]]
    if word == UNPROVED:
        silent = [n for n in promised if n not in (*names, *run.report["skipped"])]
        found += [
            told(name, "it did not run, and the report does not say why", {}) for name in silent
        ]
    return found


def entry(run: Run, promised: Sequence[str]) -> dict[str, Any]:
    """A run as the report lists it."""
    checks = run.report["checks"] if run.report else ()
    return {
        "run": run.number,
        "started": run.started,
        "seconds": run.seconds,
        "exit": run.exit,
        "outcome": outcome(run, promised),
        "checks": {check["name"]: check["status"] for check in checks},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Least, middle and most of some numbers."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: _finite(value) for name, value in found.items()}


def _finite(value: float) -> float | str:
    """A number as JSON has it, which knows no infinity: its name is better than nothing."""
    return value if math.isfinite(value) else str(value)


def number(check: str, metric: str, values: Sequence[float], device: str) -> dict[str, Any]:
    """A number over all runs, with the limit that it is held to and how near it came."""
    limit = limits.of(check, metric, device)
    if limit is None:
        return spread(values)
    side = "at_most" if limit.highest else "at_least"
    used = _finite(limit.used(min(values), max(values)))
    return {**spread(values), side: limit.edge, "room_used": used}


def summaries(runs: Sequence[Run], promised: Sequence[str]) -> list[dict[str, Any]]:
    """Each check over all runs that left a report: statuses, seconds and numbers."""
    reports = [run.report for run in runs if run.report]
    device = "cuda" if any(data["gpus"] for data in reports) else "cpu"
    told: dict[str, list[Mapping[str, Any]]] = {}
    for data in reports:
        for check in data["checks"]:
            told.setdefault(check["name"], []).append(check)
    names = [*(n for n in promised if n in told), *(n for n in told if n not in promised)]
    return [_summary(name, told[name], device) for name in names]


def _summary(name: str, checks: Sequence[Mapping[str, Any]], device: str) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for check in checks:
        for metric, value in limits.numbers(check["metrics"]).items():
            values.setdefault(metric, []).append(value)
    ran = [check["seconds"] for check in checks if check["status"] != "unproved"]
    return {
        "name": name,
        "statuses": dict(Counter(check["status"] for check in checks)),
        "seconds": spread(ran or [0.0]),
        "metrics": {
            metric: number(name, metric, found, device) for metric, found in values.items()
        },
    }


def at_once(runs: Sequence[Run]) -> int:
    """How many of them ran at the same time, at most.

    A moment is told in whole seconds, so an end is counted one second early.
    """
    steps = []
    for run in runs:
        if run.started is None:
            continue
        begun = datetime.fromisoformat(run.started)
        end = begun + timedelta(seconds=max(run.seconds - 1, 0))
        steps += [(begun, 1), (end, -1)]
    count, most = 0, int(bool(steps))
    for _, step in sorted(steps):
        count += step
        most = max(most, count)
    return most


def document(
    about: Mapping[str, Any], runs: Sequence[Run], times: int, promised: Sequence[str]
) -> dict[str, Any]:
    """The report of some runs, of ``times`` that were asked for."""
    counts = Counter(outcome(run, promised) for run in runs)
    return {
        "schema": SCHEMA,
        **about,
        "times": times,
        "finished": len(runs) == times,
        "outcomes": {word: counts[word] for word in OUTCOMES},
        "at_once": at_once(runs),
        "seconds": spread([run.seconds for run in runs] or [0.0]),
        "checks": summaries(runs, promised),
        "failures": [failure for run in runs for failure in failures(run, promised)],
        "runs": [entry(run, promised) for run in runs],
    }


def about(now: Today, runs: Sequence[Run], promised: Sequence[str]) -> dict[str, Any]:
    """What all runs have in common: as a report of theirs has it, or this image where none is."""
    told = sorted(
        (run for run in runs if run.report), key=lambda run: outcome(run, promised) != CLEAN
    )
    if told and told[0].report:
        return {name: told[0].report[name] for name in (*COMMON, *LATE)}
    return dict.fromkeys((*COMMON, *LATE)) | {
        "image": now.reference,
        "lock_sha256": now.lock_sha256,
        "layers": [],
        "engine": dict(zip(("name", "version"), now.engine, strict=True)),
        "torch": now.torch,
        "skipped": {},
        "program": {n: sha for n, sha in now.program.items() if n not in verify.CHECKS},
    }


def differing(runs: Sequence[Run]) -> str:
    """What some runs do not have in common, though runs of one image and machine do; or empty."""
    reports = [run.report for run in runs if run.report]
    return next((n for n in COMMON if any(data[n] != reports[0][n] for data in reports)), "")


def exit_code(data: Mapping[str, Any]) -> int:
    """0 where every run was clean, 1 where a check failed, else 3."""
    counts = data["outcomes"]
    if data["finished"] and counts[CLEAN] == data["times"]:
        return 0
    return report.EXIT_CODES["failed" if counts[FAILED] else "unproved"]


def told(data: Mapping[str, Any]) -> str:
    """The runs of a report in a few words."""
    counts = data["outcomes"]
    others = [f"{counts[word]} {word}" for word in OUTCOMES[1:] if counts[word]]
    left = data["times"] - len(data["runs"])
    others += [f"{left} not run: it was cut off"] if left else []
    return ", ".join([f"{counts[CLEAN]} of {data['times']} runs clean", *others])


def worth(data: Mapping[str, Any], now: Today) -> str:
    """What it is worth for the image of today: stale, by earlier checks, or empty for all of it."""
    if standing.foreign(data, now) or standing.outdated(data, now):
        return standing.STALE
    known, asked = data["program"] or {}, [n for n in now.checks if n not in verify.CHECKS]
    changed = [n for n in asked if n not in data["skipped"] and known.get(n) != now.program[n]]
    if changed or (smoke.TRAINING in asked and standing.regrown(data, now)):
        return standing.EARLIER
    return ""


# files


def path(image: Image) -> Path:
    """Where the report of many runs is kept."""
    return proofs.beside(image, "repeated")


def left(image: Image) -> Path:
    """Where runs leave it, after each of them."""
    return proofs.report_path(image).with_suffix(".repeated.json")


def outputs(image: Image) -> Path:
    """Where the report and the output of each run that was not clean lie."""
    return left(image).with_suffix("")


def read(image: Image) -> dict[str, Any] | None:
    """The kept report of many runs, None where none is kept.

    Raises:
        Problem: exit code 2 where it contradicts itself, or is something else.
    """
    file = path(image)
    if not file.exists():
        return None
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        wrong = contradiction(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        wrong = "is no report of repeated runs"
    if wrong:
        command = f"nox -s prove -- {image.reference} --times N --keep"
        raise Problem(f"{shown(file)} {wrong}; remake it with '{command}'", 2)
    return data


def contradiction(data: Mapping[str, Any]) -> str:
    """Where the parts of such a report do not agree, as a clause; empty if they do."""
    if data["schema"] != SCHEMA:
        return f"is of the schema {report.shown(data['schema'])}, not {SCHEMA}"
    counts = Counter(run["outcome"] for run in data["runs"])
    if {word: counts[word] for word in OUTCOMES} != data["outcomes"]:
        return "counts other outcomes than its runs have"
    if data["finished"] != (len(data["runs"]) == data["times"]):
        return "has not as many runs as it says"
    listed = Counter((n, status) for run in data["runs"] for n, status in run["checks"].items())
    summed = {(c["name"], s): count for c in data["checks"] for s, count in c["statuses"].items()}
    if dict(listed) != summed:
        return "sums up other checks than its runs have"
    wrong = {run["run"] for run in data["runs"] if run["outcome"] != CLEAN}
    if wrong != {failure["run"] for failure in data["failures"]}:
        return "does not tell of each run that was not clean why"
    return ""


def keep(image: Image, data: Mapping[str, Any]) -> None:
    """Keep such a report, whatever it says: runs that failed are not to be hidden by better ones.

    Raises:
        Problem: exit code 3 where no run of it left a report.
    """
    if not data["checks"]:
        raise Problem("not kept: no run left a report, so nothing is shown of the image", 3)
    host.write_json(path(image), data)
    host.say(f"kept as {shown(path(image))}; 'nox -s docs' shows it")

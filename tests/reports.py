"""Reports as honest runs of an image leave them; each test makes of one what it tells of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from images.catalog import Image
from images.proving import proofs, standing
from rollout import report, smoke, verify
from rollout.checks import rate

STARTED = "2026-01-02T03:04:05Z"
Metrics = Mapping[str, Mapping[str, Any]]


def of(
    image: Image,
    diff_ids: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    metrics: Metrics | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A report in which these checks passed, of all that the image promises if none are named."""
    today = proofs.today(image, diff_ids)
    named = today.checks if names is None else names
    measured: dict[str, dict[str, Any]] = {
        "refit": {rate(transport): 50.0 for transport in image.smoke.refit},
        "start": {"start_seconds": 40.0, "cache_files_added": 71},
    }
    for name, values in (metrics or {}).items():
        measured[name] = measured.get(name, {}) | dict(values)
    smoked = set(named) - set(verify.CHECKS)
    cuda = "cuda" in image.expect
    known = today.program
    whole = report.Report(
        image=today.reference,
        lock_sha256=today.lock_sha256,
        layers=list(diff_ids),
        engine=report.Engine(*today.engine),
        torch=today.torch,
        cuda=image.expect.get("cuda"),
        driver="550.54.15" if cuda else None,
        gpus=[report.Gpu("a GPU", 80 << 30)] if cuda and smoked else [],
        device="a GPU" if smoked else None,
        model=f"probe 1b, seed {smoke.SEED}" if smoked else None,
        cycles=smoke.CYCLES if smoked else None,
        framework=None,
        added=[],
        started=STARTED,
        seconds=200.0,
        checks=[report.Check(name, "passed", 10.0, measured.get(name, {})) for name in named],
        skipped={},
        program={name: known[name] for name in known if (name in verify.CHECKS) != bool(smoked)}
        if names is not None
        else dict(known),
        verdict="proved",
    )
    return report.document(whole) | changes


def verified(image: Image, diff_ids: Sequence[str], **changes: Any) -> dict[str, Any]:
    """What ``rollout verify`` leaves in a sound image."""
    return of(image, diff_ids, standing.verified(image), **changes)


def smoked(image: Image, diff_ids: Sequence[str], **changes: Any) -> dict[str, Any]:
    """What ``rollout smoke`` leaves in a sound image, on a machine that has what it needs."""
    return of(image, diff_ids, smoke.promised(image.smoke.facts), **changes)


def alone(image: Image, diff_ids: Sequence[str], missing: Mapping[str, str]) -> dict[str, Any]:
    """The whole report of a machine that cannot show some of it, and says so."""
    found = of(image, diff_ids, skipped=dict(missing), verdict="in-part" if missing else "proved")
    found["checks"] = [check for check in found["checks"] if check["name"] not in missing]
    for check in found["checks"]:
        for name in missing:
            check["metrics"].pop(rate(name), None)
    return found

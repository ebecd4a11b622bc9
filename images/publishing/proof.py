"""The proof by which an image may be published: a report of these very layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from images.building import layers
from images.catalog import Image, shown
from images.proving import prove, standing
from images.proving.standing import Standing
from rollout import report
from rollout.problem import Problem


@dataclass(frozen=True)
class Proof:
    """The report that allows an image to be published, and what the host finds in it."""

    path: Path
    data: bytes  # as they were looked at: the file may be another a minute later
    standing: Standing


def fitting(path: Path, image: Image, diff_ids: Sequence[str]) -> Proof:
    """A report, if it allows an image with these layers to be published.

    Raises:
        ValueError: it does not; the message says why, as a clause.
    """
    try:
        data = report.content(path)
        found = report.parse(data)
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from None
    now = prove.today(image, diff_ids)
    worth = standing.judge(found, now)
    why = standing.publishable(worth, now)
    if why:
        raise ValueError(f"{shown(path)} allows none, {why}")
    # What the provenance says of the inputs has to be true of these layers.
    if prove.today(image).layers != now.layers:
        raise ValueError(f"{shown(layers.path(image))} is not of these inputs and layers")
    return Proof(path, data, worth)


def passing(image: Image, diff_ids: Sequence[str]) -> Proof:
    """The report that proves these layers: that of the last run here, else the kept one.

    Raises:
        Problem: none does; says what is wrong with each, and what to run.
    """
    reasons = []
    for path in (prove.report_path(image), prove.kept(image)):
        if not path.exists() and not path.is_symlink():
            reasons.append(f"there is no {shown(path)}")
            continue
        try:
            return fitting(path, image, diff_ids)
        except ValueError as error:
            reasons.append(str(error))
    raise Problem(
        f"{image.reference} has no passing report: {', and '.join(reasons)}; prove it with "
        f"'nox -s prove -- {image.reference}', or publish it as unproved with --unproved"
    )

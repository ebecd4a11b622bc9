"""Many smoke tests in a row, as the pages tell of them: how many were clean, how near a no was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from images import catalog
from images.catalog import Image, shown
from images.proving import proofs, repeated
from images.telling import markdown

COMMAND = "nox -s prove -- REF --times 50 --keep"
TITLE = "Smoke tests in a row"
SHOWN = 300  # characters of a reason in a table; the report has all of it


def cell(image: Image) -> str:
    """The runs that are kept of an image, in a cell of a table."""
    data = repeated.read(image)
    return "not shown yet" if data is None else counted(image, data)


def counted(image: Image, data: Mapping[str, Any]) -> str:
    """How many runs were clean, and what that is worth today."""
    where = shown(repeated.path(image))
    worth = repeated.worth(data, proofs.today(image))
    return f"[{repeated.told(data)}]({where})" + (f" ({worth})" if worth else "")


def took(data: Mapping[str, Any]) -> str:
    """The seconds of the runs, and whether several ran at once."""
    seconds = data["seconds"]
    found = f"{seconds['median']:.0f} s ({seconds['min']:.0f} to {seconds['max']:.0f})"
    return found + (f", {data['at_once']} at once" if data["at_once"] > 1 else "")


def day(data: Mapping[str, Any]) -> str:
    """The day of the first run."""
    begun = [run["started"] for run in data["runs"] if run["started"]]
    return min(begun)[:10] if begun else ""


def nearest(check: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The number of a check that came nearest to its limit; None where none has a limit."""
    held = [(name, found) for name, found in check["metrics"].items() if "room_used" in found]
    return max(held, key=lambda one: float(one[1]["room_used"]), default=None)


def between(found: Mapping[str, Any]) -> str:
    """A number over all runs beside its limit, and the part of the room that the worst took."""
    least, most = digits(found["min"]), digits(found["max"])
    values = least if least == most else f"{least} to {most}"
    side, edge = ("≤", found["at_most"]) if "at_most" in found else ("≥", found["at_least"])
    return f"{values} {side} {digits(edge)}: {float(found['room_used']):.0%}"


def digits(value: float | str) -> str:
    """A number with as many digits as tell it from its limit."""
    return f"{float(value):.5g}"


def rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each check: how often it passed, its seconds, and its number nearest to a limit."""
    found: list[tuple[str, ...]] = []
    for check in data["checks"]:
        others = [f"{n} {s}" for s, n in check["statuses"].items() if s != "passed"]
        passed = ", ".join([str(check["statuses"].get("passed", 0)), *others])
        seconds = check["seconds"]
        near = nearest(check)
        name, told = (f"`{near[0]}`", between(near[1])) if near else ("", "")
        took = f"{seconds['min']:.1f} · {seconds['median']:.1f} · {seconds['max']:.1f}"
        found.append((f"`{check['name']}`", passed, took, name, told))
    return found


def wrong(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each failure, its reason as far as a cell holds it."""
    return [
        (str(one["run"]), one["outcome"], f"`{one['check']}`" if one["check"] else "", line(one))
        for one in data["failures"]
    ]


def line(failure: Mapping[str, Any]) -> str:
    """The reason of a failure on one line."""
    text = " ".join(str(failure["reason"]).split()).replace("|", "\\|")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def section(image: Image) -> list[str]:
    """The part of an image's page; empty where no such report is kept."""
    data = repeated.read(image)
    if data is None:
        return []
    head = ("check", "passed", "seconds: least · median · most", "nearest to its limit", "")
    parts = [
        f"## {TITLE}",
        f"{counted(image, data)}, on {data['device']}, {day(data)}, each in a fresh container: "
        f"{took(data)}. The last columns have the number of each check that came nearest to where "
        "the check says no, and how much of the room up to there the worst run took; "
        "[docs/proof.md](docs/proof.md#many-times) tells more.",
        markdown.table(head, rows(data)),
    ]
    if data["failures"]:
        parts.append(markdown.table(("run", "", "check", "why"), wrong(data)))
    return parts


def worst(data: Mapping[str, Any]) -> str:
    """The number of all checks that came nearest to its limit."""
    found = [(check["name"], *near) for check in data["checks"] if (near := nearest(check))]
    if not found:
        return ""
    check, name, numbers = max(found, key=lambda one: float(one[2]["room_used"]))
    return f"`{check}`, `{name}`: {between(numbers)}"


def overview(images: Sequence[Image]) -> list[str]:
    """The part of the page of all images' numbers."""
    kept = [(image, data) for image in images if (data := repeated.read(image))]
    if not kept:
        return [f"## {TITLE}", f"None are kept. `{COMMAND}` runs and keeps them."]
    head = ("image", "", "on", "seconds each", "nearest to its limit, and the room taken")
    cells = [
        (
            catalog.short(image, images),
            counted(image, data),
            f"{data['device']}, {day(data)}",
            took(data),
            worst(data),
        )
        for image, data in kept
    ]
    return [
        f"## {TITLE}",
        f"By `{COMMAND}`: the whole smoke test, each time in a fresh container. What failed is "
        "counted, and told in the report.",
        markdown.table(head, cells),
    ]

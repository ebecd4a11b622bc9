"""All images side by side: numbers of reports that stand, and pictures drawn from them."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from images import catalog
from images.building import layers
from images.proving import standing
from images.proving.standing import Standing
from images.telling import numbers, overview, plots, tables
from images.telling.features import Kept
from images.telling.plots import Bar, Chart, Group

IMAGES = catalog.load()
SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own


def lengths(text: str) -> dict[str, list[float]]:
    """The widths of the bars of a picture by their colour, without frame and legend."""
    found: dict[str, list[float]] = {}
    for box in parsed(text).iter(f"{SVG}rect"):
        if box.get("fill") != "white" and box.get("height") != "10.0":
            found.setdefault(str(box.get("fill")), []).append(float(str(box.get("width"))))
    return found


def texts(text: str) -> list[str]:
    return [str(one.text) for one in parsed(text).iter(f"{SVG}text")]


# pictures


def test_a_bar_is_as_long_as_its_number_beside_the_longest() -> None:
    one = Group("one", (Bar((("a", 1.0), ("b", 3.0)), "4 s"),))
    two = Group("two", (Bar((("a", 2.0),), "2 s"),))
    drawn = plots.svg([Chart("Seconds", ("a", "b"), (one, two))])
    a, b = plots.COLOURS[:2]
    assert lengths(drawn) == {a: [plots.ROOM / 4, plots.ROOM / 2], b: [plots.ROOM * 3 / 4]}
    assert {"Seconds", "a", "b", "one", "two", "4 s", "2 s"} == set(texts(drawn))


def test_nothing_to_draw_is_a_picture_too() -> None:
    assert lengths(plots.svg([Chart("Nothing", (), ())])) == {}
    assert lengths(
        plots.svg([Chart("No time", ("a",), (Group("x", (Bar((("a", 0.0),), "0 s"),)),))])
    )


def test_a_name_cannot_break_a_picture() -> None:
    drawn = plots.svg([Chart("a < b & c", ("<k>",), (Group('"<g>"', ()),))])
    assert {"a < b & c", "<k>", '"<g>"'} == set(texts(drawn))


def test_charts_do_not_lie_on_each_other() -> None:
    chart = Chart("one", ("a",), (Group("x", (Bar((("a", 1.0),), "1"),)),))
    root = parsed(plots.svg([chart, chart]))
    assert int(str(root.get("height"))) == 2 * chart.height
    tops = [float(str(one.get("y"))) for one in root.iter(f"{SVG}text") if one.text == "one"]
    assert tops[1] - tops[0] == chart.height


# the page


def test_every_number_of_the_page_of_an_image_is_in_the_table_of_all() -> None:
    found = overview.proved(IMAGES)
    assert found
    table = {row[0]: row[1:] for row in overview.rows(found)}
    for place, (_, kept) in enumerate(found):
        for name, measured, _ in numbers.gpu_rows(kept.report):
            assert table[name][place].startswith(measured), name


def test_a_report_that_is_no_proof_of_today_gives_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tables.kept

    def stale(image: Any) -> Kept | None:
        found = own(image)
        return found and Kept(found.where, found.report, Standing(standing.STALE, "because"))

    monkeypatch.setattr(tables, "kept", stale)
    assert overview.proved(IMAGES) == []
    found = overview.files(IMAGES)
    assert not re.search(r"\d GB/s", found[overview.PAGE])
    assert lengths(found[overview.TIMES]) == {}


def test_every_image_is_a_column_or_named_as_one_without_a_proof() -> None:
    page = overview.files(IMAGES)[overview.PAGE]
    for image in IMAGES:
        assert catalog.short(image, IMAGES) in page


def test_a_size_is_the_sum_of_its_layers_and_says_which_are_shared() -> None:
    drawn = lengths(overview.sizes(IMAGES))
    records = [record for image in IMAGES if (record := layers.read(image))]
    assert sum(map(len, drawn.values())) == sum(len(record.layers) for record in records)
    shared, own = (drawn[colour] for colour in plots.COLOURS[:2])
    base = records[0].layers[0]
    assert len(shared) >= sum(base.diff_id == record.layers[0].diff_id for record in records)
    assert own

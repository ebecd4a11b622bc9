"""Whatever stands in a file, its parser reads it or refuses it in one sentence: never a traceback.

Hypothesis looks for what nobody thought of, in files that were damaged anywhere and in values of
any kind. What it has found once stands beside the test as an example.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from images import catalog
from images.building import layers
from images.catalog import ROOT
from images.locking import apt_sources, base, lock
from images.proving import report_file
from rollout.problem import Problem

from ..conftest import Checkout

LONGEST = 500  # characters of a sentence
# The same in every run, so that what fails for one fails for all; no folder is left behind.
STEADY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What breaks parsers more often than chance finds it.
ODD = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"{", b"]", b'"', b"'", b"\\ud800"),
    *(b"1e999", b"-", b"null", b"nan", b"[" * 2000, b"{'a':" * 2000, b"\xe2\x80\xa8", b"= ", b"#"),
    *(b"9" * 5000, b"0001-01-01", b"\x1b[31m", b"[a]\n[a]\n", b"x" * 70_000),
]
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),  # where, as a part of the whole
        st.integers(0, 60),  # how many bytes go
        st.sampled_from(ODD) | st.binary(max_size=8),  # what comes in their place
        st.booleans(),  # whether what follows is there twice
    ),
    min_size=1,
    max_size=4,
)
Edits = list[tuple[float, int, bytes, bool]]


def damaged(whole: bytes, edits: Edits) -> bytes:
    for where, gone, put, twice in edits:
        at = int(where * len(whole))
        rest = whole[at + gone :]
        whole = whole[:at] + put + (rest[:40] + rest if twice else rest)
    return whole


def one_sentence(action: Callable[[], object]) -> None:
    """Do it, or be told why not: one printable line, and the exit code of bad input."""
    try:
        action()
    except Problem as problem:
        assert problem.sentence.isprintable(), repr(problem.sentence)
        assert len(problem.sentence) < LONGEST, problem.sentence
        assert problem.code == 2


# Reports ------------------------------------------------------------------------------------------

# A report as a run leaves it.
REPORT = next(
    data
    for path in sorted((ROOT / "images/proofs").rglob("transformers-cpu.json"))
    if (data := json.loads(path.read_text()))
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "\ud800", "y" * 70_000, float("nan"), "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def told(sentences: list[str]) -> None:
    for sentence in sentences:
        assert len(sentence) < LONGEST and sentence.isprintable(), repr(sentence[:LONGEST])


@STEADY
@given(EDITS)
def test_a_report_that_was_damaged_anywhere(edits: Edits) -> None:
    try:
        told(report_file.validate(report_file.parse(damaged(json.dumps(REPORT).encode(), edits))))
    except ValueError as error:
        told([str(error)])


@STEADY
@given(st.lists(st.integers(0, 10_000), max_size=5), JSON)
def test_a_report_with_any_value_anywhere(steps: list[int], value: Any) -> None:
    data = copy.deepcopy(REPORT)
    place: Any = data
    key: Any = list(place)[steps[0] % len(place)] if steps else "checks"
    for step in steps[1:]:
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside:
            break
        place, keys = inside, list(inside) if isinstance(inside, dict) else range(len(inside))
        key = keys[step % len(keys)]
    place[key] = value
    told(report_file.validate(data))


@STEADY
@given(JSON)
def test_what_is_no_report_at_all(value: Any) -> None:
    told(report_file.validate(value) if isinstance(value, dict) else [])
    try:
        report_file.parse(json.dumps(value).encode())
    except ValueError as error:
        told([str(error)])


# Catalog files ------------------------------------------------------------------------------------

CATALOG_FILES = sorted((ROOT / "images/catalog").rglob("*.toml"))
VALUES = [
    *('""', "'x'", '"\\u0000"', '"a\\nb"', "0", "-1", "1" + "0" * 400, "1.5", "nan", "inf", "true"),
    *("[]", "[[]]", '["x"]', '["torch", 1]', "{}", "{ x = 1 }", '{ "a b" = "c" }', "1979-05-27"),
    *("0001-01-01", "1979-05-27T07:32:00Z", "07:32:00", '"' + "y" * 70_000 + '"'),
]


@STEADY
@given(st.sampled_from(CATALOG_FILES), EDITS)
def test_a_catalog_file_that_was_damaged_anywhere(
    tmp_path: Path, original: Path, edits: Edits
) -> None:
    path = tmp_path / "verl-rollout" / original.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(original.read_bytes(), edits))
    one_sentence(lambda: catalog.parse(path))


@STEADY
@given(st.sampled_from(CATALOG_FILES), st.integers(0, 1000), st.sampled_from(VALUES))
def test_a_catalog_file_with_any_value_at_any_key(
    tmp_path: Path, original: Path, number: int, value: str
) -> None:
    path = tmp_path / "verl-rollout" / original.name
    path.parent.mkdir(exist_ok=True)
    text = original.read_text(encoding="utf-8")
    keys = list(
        re.finditer(r"^([\w-]+|\"[^\"\n]*\") *= *(\[[^\]]*\]|\".*?\"|[^#\n]*)", text, re.MULTILINE)
    )
    found = keys[number % len(keys)]
    path.write_text(text[: found.start(2)] + value + text[found.end(2) :], encoding="utf-8")
    one_sentence(lambda: catalog.parse(path))


# Locks and records --------------------------------------------------------------------------------


@STEADY
@given(EDITS)
def test_a_lock_that_was_damaged_anywhere(checkout: Checkout, edits: Edits) -> None:
    image = checkout.image()
    whole = image.lock.read_bytes()
    try:
        image.lock.write_bytes(damaged(whole, edits))
        one_sentence(lambda: lock.read(image))
    finally:
        image.lock.write_bytes(whole)


@STEADY
@given(EDITS)
def test_a_record_that_was_damaged_anywhere(checkout: Checkout, edits: Edits) -> None:
    image = checkout.image()
    original = ROOT / "lockfiles/verl-rollout/transformers-cpu.layers"
    layers.path(image).write_bytes(damaged(original.read_bytes(), edits))
    try:
        one_sentence(lambda: layers.read(image))
    finally:
        layers.path(image).unlink()


@STEADY
@given(EDITS)
def test_a_lock_of_the_base_that_was_damaged_anywhere(tmp_path: Path, edits: Edits) -> None:
    path = tmp_path / "base.lock"
    path.write_bytes(damaged(base.LOCK.read_bytes(), edits))
    one_sentence(lambda: base.read(path))


# apt's sources ------------------------------------------------------------------------------------

STANZA = b"Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"
SOURCES = b"# ours\n" + STANZA + b"Signed-By:\n -----BEGIN\n .\n abc\n\n" + STANZA


@STEADY
@given(EDITS)
def test_sources_of_apt_that_were_damaged_anywhere(edits: Edits) -> None:
    text = damaged(SOURCES, edits).decode(errors="replace")
    one_sentence(lambda: apt_sources.host_sources({"/etc/apt/sources.list.d/a.sources": text}))

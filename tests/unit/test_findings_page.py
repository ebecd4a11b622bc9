"""The page of findings shows each of them as it is printed."""

from __future__ import annotations

from images.telling import findings
from rollout.preflight.finding import Known
from rollout.preflight.known import KNOWN


def test_every_finding_has_a_row_with_its_sentence_its_remedy_and_its_cause() -> None:
    rows = [line for line in findings.page().splitlines() if line.startswith("| `")]
    names = [row.split("`")[1] for row in rows]
    assert names == [name for names in KNOWN.values() for name in names]
    assert all(row.count(" | ") == 4 for row in rows)


def test_a_row_says_whether_the_proof_stops_and_shows_signs_as_they_are() -> None:
    found = {
        "cache": {"a": Known("A_B is <x>|y; unset A_B", "It is.", stops=False)},
        "network": {},
    }
    page = findings.page(found)
    assert r"| `a` | warns | A\_B is \<x>\|y | unset A\_B | It is. |" in page
    assert "## Network" not in page
    assert "| stops |" in findings.page({"gpu": {"b": Known("c; d", "e.")}})

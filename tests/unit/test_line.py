"""The line: catalog file, lock, image, proof, registry. A station knows only those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.catalog import ROOT

IMAGES = ROOT / "images"
# From the left to the right. What stands at the top, and host, serve all of them.
STATIONS = ("locking", "building", "proving", "publishing", "telling")
BELOW = ("catalog", "host", "rules", "schema")
MODULES = sorted(path for station in STATIONS for path in (IMAGES / station).glob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The parts of images that a module imports, each by its first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition(".")
            if package == "images":
                yield from [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from [name[1] for name in names if name[0] == "images" and len(name) > 1]


def test_the_top_holds_the_catalog_the_host_and_a_folder_for_each_station() -> None:
    tops = ["__init__.py", "catalog.py", "rules.py", "schema.py"]
    assert [path.name for path in sorted(IMAGES.glob("*.py"))] == tops
    code = {path.parent.name for path in IMAGES.glob("*/*.py")}
    assert code == {"host", *STATIONS}
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_station_imports_only_what_stands_to_its_left(path: Path) -> None:
    own = path.parent.name
    allowed = {*BELOW, *STATIONS[: STATIONS.index(own) + 1]}
    assert set(imported(path)) <= allowed


@pytest.mark.parametrize("path", sorted((IMAGES / "host").glob("*.py")), ids=lambda path: path.stem)
def test_the_host_knows_of_no_station(path: Path) -> None:
    assert set(imported(path)) <= set(BELOW)


@pytest.mark.parametrize(
    ("name", "known"), [("schema", set()), ("rules", {"schema"}), ("catalog", {"rules", "schema"})]
)
def test_the_schema_knows_of_nothing_the_rules_of_it_and_the_catalog_of_both(
    name: str, known: set[str]
) -> None:
    assert set(imported(IMAGES / f"{name}.py")) == known

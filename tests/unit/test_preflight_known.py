"""The table of findings says what the code can find, no more and no less."""

from __future__ import annotations

import ast
from pathlib import Path

from rollout import preflight
from rollout.preflight.known import KNOWN

FOLDER = Path(preflight.__file__).parent


def yielded() -> set[tuple[str, str, bool]]:
    """Kind, name and weight of every finding that the code can give, as they stand in it."""
    found = set()
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if not called or node.func.id != "Finding":  # type: ignore[attr-defined]
                continue
            assert isinstance(node, ast.Call)
            name = node.args[1]
            assert isinstance(name, ast.Constant), f"{path.name}: a name has to be written out"
            kind = node.args[0].value if isinstance(node.args[0], ast.Constant) else path.stem
            stops = {k.arg: ast.literal_eval(k.value) for k in node.keywords}.get("stops", True)
            found.add((str(kind), str(name.value), stops))
    return found


def test_every_finding_of_the_code_is_in_the_table_and_none_else() -> None:
    listed = {(kind, n, known.stops) for kind, names in KNOWN.items() for n, known in names.items()}
    assert listed == yielded()


def test_a_name_stands_for_one_finding() -> None:
    names = [name for names in KNOWN.values() for name in names]
    assert len(names) == len(set(names))


def test_every_kind_is_looked_at() -> None:
    assert {kind.__name__.rpartition(".")[2] for kind in preflight.KINDS} == set(KNOWN)


def test_the_table_speaks_in_sentences() -> None:
    for names in KNOWN.values():
        for name, known in names.items():
            assert ";" in known.example, f"{name}: what is wrong, and what to do"
            assert known.cause.endswith("."), name

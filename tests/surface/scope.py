"""Which names a module or a class binds, and by what, as far as its text says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

PYTHON = (3, 11)  # the release whose branches are read
Body = list[ast.stmt]


@dataclass
class Scope:
    """The names of a body; the last binding of a name counts, as when it runs."""

    names: dict[str, ast.stmt | ast.alias] = field(default_factory=dict)
    typed: dict[str, ast.stmt | ast.alias] = field(default_factory=dict)  # for type checkers alone
    origins: dict[str, ast.ImportFrom] = field(default_factory=dict)
    typed_origins: dict[str, ast.ImportFrom] = field(default_factory=dict)
    starred: list[ast.ImportFrom] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)  # bound differently in a branch not taken here


def scope(body: Body) -> Scope:
    """The names that a body binds."""
    found = Scope()
    _walk(body, found, sure=True)
    return found


def decided(test: ast.expr) -> bool | None:
    """What a condition comes to, where the text says that; None where only a run says it."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = decided(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.Constant):
        return bool(test.value)
    text = ast.unparse(test)
    if text in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "t.TYPE_CHECKING"):
        return False
    if isinstance(test, ast.Compare) and ast.unparse(test.left) == "sys.version_info":
        try:
            other = ast.literal_eval(test.comparators[0])
        except ValueError:
            return None
        operators = {ast.Lt: other > PYTHON, ast.LtE: other > PYTHON}
        operators |= {ast.Gt: other <= PYTHON, ast.GtE: other <= PYTHON}
        return operators.get(type(test.ops[0]))
    return None


def statements(body: Body) -> Iterator[tuple[ast.stmt, bool, bool]]:
    """Each simple statement, whether type checkers alone see it, and whether it surely runs."""
    for node in body:
        if isinstance(node, ast.If):
            known = decided(node.test)
            checking = known is False and "TYPE_CHECKING" in ast.unparse(node.test)
            if known is not False or checking:
                for inner, typed, sure in statements(node.body):
                    yield inner, typed or checking, sure and known is True
            if known is not True:
                for inner, typed, sure in statements(node.orelse):
                    yield inner, typed, sure and known is False
        elif isinstance(node, ast.Try):
            for inner, typed, sure in statements([*node.body, *node.orelse, *node.finalbody]):
                yield inner, typed, sure
            for handler in node.handlers:
                for inner, typed, _ in statements(handler.body):
                    yield inner, typed, False
        elif isinstance(node, (ast.With, ast.For, ast.While)):
            yield from statements(node.body)
        else:
            yield node, False, True


def _walk(body: Body, found: Scope, *, sure: bool) -> None:
    for node, typed, certain in statements(body):
        for name, bound in _bound(node):
            if name == "*":
                found.starred.append(bound)  # type: ignore[arg-type]
                continue
            names = found.typed if typed else found.names
            origins = found.typed_origins if typed else found.origins
            # A branch that may not be taken adds a name, and replaces none.
            if not (certain and sure) and name in names:
                found.unsure.add(name)
                continue
            if not certain:
                found.unsure.add(name)
            names[name] = bound
            origins.pop(name, None)
            if isinstance(node, ast.ImportFrom):
                origins[name] = node


def _bound(node: ast.stmt) -> Iterator[tuple[str, ast.stmt | ast.alias]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        # An overload is what type checkers see; setters and deleters change no name.
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        if not any(m.endswith(("overload", ".setter", ".deleter")) for m in marks):
            yield node.name, node
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], alias
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if alias.name == "*":
                yield "*", node
            else:
                yield alias.asname or alias.name, alias
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id, node
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node

"""Where the tool and Python disagree about an installed engine: every such place, by name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from .fields import fields, made, members, style
from .signatures import Callable, Parameter, function
from .surface import Class, Module, Outside, Surface, Thing

Told = dict[str, Any]


@dataclass
class Agreement:
    """What was compared, and each difference: where, and both sides."""

    compared: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[str, str]] = field(default_factory=list)
    doubted: list[tuple[str, str]] = field(default_factory=list)  # where the tool says so itself

    def hold(self, what: str, where: str, own: object, python: object, doubt: str = "") -> None:
        """Both sides of one thing."""
        if doubt:
            self.doubted.append((where, doubt))
            return
        self.compared[what] += 1
        if own != python:
            self.differences.append((where, f"{what}: {own} is {python}"))


def agreement(surface: Surface, told: dict[str, Told]) -> Agreement:
    """Hold the tool against what :mod:`introspected` wrote."""
    seen = Agreement()
    for name, found in told.items():
        module = surface.module(name)
        if module is None:
            seen.differences.append((name, "module: none is a module"))
            continue
        for own, about in found["here"].items():
            _one(seen, surface, module, own, about)
        for own, where in found["elsewhere"].items():
            _elsewhere(seen, surface, module, own, where)
    return seen


def _written(surface: Surface, module: str) -> bool:
    """Whether a module is in the sources, and is text."""
    found = surface.module(module)
    return found is not None and found.path.endswith(".py")


def _place(found: Thing | Module | Outside | None) -> str:
    if isinstance(found, Thing):
        return f"{found.module.name}:{found.name}"
    return found.name if isinstance(found, Outside) else str(found)


def _elsewhere(seen: Agreement, surface: Surface, module: Module, name: str, where: str) -> None:
    """A name that a module has from another one."""
    home = where.partition(":")[0]
    if not _written(surface, home) or "<locals>" in where:
        return  # of another distribution, compiled, or made by a call
    found = surface.look(module, name)
    if isinstance(found, Outside) and not _written(surface, found.name.rpartition(".")[0]):
        seen.doubted.append((f"{module.name}:{name}", "compiled, or of another distribution"))
        return
    doubt = "bound in several branches" if surface.branches else ""
    if isinstance(found, Thing) and isinstance(found.node, _ASSIGNS):
        doubt = "bound to what an expression makes"
    # A class may say that it is of the package that shows it.
    same = _place(found) == _place(surface.find(where))
    seen.hold("re-exports", f"{module.name}:{name}", where if same else _place(found), where, doubt)


def _shape(found: tuple[Parameter, ...] | None) -> list[list[Any]] | None:
    return (
        None
        if found is None
        else [
            # Python takes this one for none, too.
            [p.name, p.kind, p.default is not None and not p.default.endswith("Parameter.empty")]
            for p in found
        ]
    )


def _callable(seen: Agreement, where: str, own: Callable, python: Told) -> None:
    pair = (own.kind, own.binding if own.kind != "property" else "")
    seen.hold("kinds", where, pair, (python["kind"], python["binding"]), own.doubt)
    if own.kind != "property":
        seen.hold("signatures", where, _shape(own.parameters), python["parameters"], own.doubt)


def _one(seen: Agreement, surface: Surface, module: Module, name: str, about: Told) -> None:
    where = f"{module.name}:{name}"
    found = surface.look(module, name)
    if not re.search(rf"\b(?:class|def) {re.escape(name)}\b", module.source):
        seen.doubted.append((where, "no statement defines it"))
        return
    if not isinstance(found, Thing) or isinstance(found.node, _ASSIGNS):
        doubt = "bound in several branches" if surface.branches else ""
        seen.hold("definitions", where, _place(found), where, doubt)
        return
    is_class = about["kind"] == "class"
    seen.hold("definitions", where, isinstance(found.node, _CLASS), is_class, found.doubt)
    if found.doubt or isinstance(found.node, _CLASS) != is_class:
        return
    if is_class:
        _class(seen, where, surface.kind_of(found), about)
    else:
        _callable(seen, where, function(found), about)


def _class(seen: Agreement, where: str, kind: Class, about: Told) -> None:
    doubt = kind.doubt
    inside = [f"{one.module.name}:{one.thing.name}" for one in kind.own]
    known = kind.module.surface
    mine = [  # where it is defined, for a class may say that it is of the package that shows it
        one if "<" in one else _place(known.find(one) or Outside(one))
        for one in about["mro"]
        if _written(known, one.partition(":")[0])
    ]
    seen.hold("ancestors", where, inside, mine, doubt)
    for name, python in about["own"].items():
        bound = kind.bound(name)
        if bound is None:
            if not _generated(name, style(kind)):
                later = rf"(?m)^\s*{kind.node.name}\.{name} = "
                why = doubt or ("set later" if re.search(later, kind.module.source) else "")
                seen.hold("methods", f"{where}.{name}", "not there", python["kind"], why)
        elif isinstance(bound.node, _FUNCTION):
            own = function(bound, kind)
            if doubt and name.startswith("__"):
                own = replace(own, doubt=doubt)
            _callable(seen, f"{where}.{name}", own, python)
    for name, node in kind.scope.names.items():
        if isinstance(node, _FUNCTION) and name not in about["own"]:
            doubt = function(Thing(kind.module, name, node), kind).doubt
            doubt = doubt or ("bound in several branches" if name in kind.scope.unsure else "")
            seen.hold("methods", f"{where}.{name}", "there", "not there", doubt)
    how = style(kind)
    python_style = about.get("style", "")
    own_style = how if how not in ("enum", "tuple") else ""
    foreign = [n for n in kind.outside if not n.startswith(("builtins.", "typing.", "abc."))]
    why = f"comes from {foreign[0]}" if foreign and not own_style and python_style else ""
    seen.hold("styles", where, own_style, python_style, why)
    if how == about.get("style"):
        names = [f.name for f in fields(kind) if f.stored]
        seen.hold("fields", where, names, about["fields"], doubt)
    if "members" in about:
        seen.hold("members", where, list(members(kind)), about["members"])
    own_made = made(kind)
    if own_made is not None and about["made"] is not None:
        seen.hold("made", where, _shape(own_made), about["made"], doubt)


def _generated(name: str, how: str) -> bool:
    """What data classes, pydantic and enumerations add to a class of their own."""
    return name.startswith("_") or (how == "pydantic" and name == "model_post_init")


_CLASS = ast.ClassDef
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_ASSIGNS = (ast.Assign, ast.AnnAssign, ast.AugAssign)

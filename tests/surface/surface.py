"""Names of an engine, followed to where they are defined: imports, re-exports, classes above."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .scope import Scope, scope, statements
from .sources import Sources

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Outside:
    """A name of another distribution: ``pydantic.BaseModel``."""

    name: str


@dataclass(frozen=True)
class Thing:
    """Something that a module or a class binds, and where."""

    module: Module
    name: str  # within the module, dotted: "LLM.generate"
    node: ast.stmt
    doubt: str = ""  # why a run may find another one


class Module:
    """A module, or a package by its ``__init__``."""

    def __init__(self, surface: Surface, name: str, path: str) -> None:
        self.surface, self.name, self.path = surface, name, path
        self.package = path.endswith("/__init__.py")

    def __repr__(self) -> str:
        return self.name

    @cached_property
    def source(self) -> str:
        """Its text."""
        return self.surface.sources.text(self.path) if self.path.endswith(".py") else ""

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.source)

    @cached_property
    def scope(self) -> Scope:
        """Its names."""
        return scope(self.tree.body)

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that it imports from."""
        if not node.level:
            return node.module or ""
        above = self.name.split(".")[: None if self.package and node.level == 1 else -node.level]
        if self.package and node.level > 1:
            above = self.name.split(".")[: 1 - node.level]
        return ".".join([*above, *([node.module] if node.module else [])])

    @cached_property
    def exported(self) -> list[str] | None:
        """Its ``__all__``, where that is written out."""
        node = self.scope.names.get("__all__")
        try:
            return [str(n) for n in ast.literal_eval(node.value)]  # type: ignore[union-attr]
        except (AttributeError, ValueError, TypeError):
            return None

    @cached_property
    def lazy(self) -> bool:
        """Whether it makes names when they are asked for, which checkers are told beforehand."""
        return "__getattr__" in self.scope.names or "sys.modules[__name__]" in self.source


class Class:
    """A class with those that it comes from."""

    def __init__(self, thing: Thing) -> None:
        assert isinstance(thing.node, ast.ClassDef)
        self.thing, self.node, self.module = thing, thing.node, thing.module

    def __repr__(self) -> str:
        return f"{self.module.name}:{self.thing.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and other.node is self.node

    def __hash__(self) -> int:
        return id(self.node)

    @cached_property
    def scope(self) -> Scope:
        """The names that its body binds; those with two underscores before them are its own."""
        found = scope(self.node.body)
        found.names = {self.mangled(name): node for name, node in found.names.items()}
        return found

    def mangled(self, name: str) -> str:
        """A name as it is within the class."""
        if not name.startswith("__") or name.endswith("__"):
            return name
        return f"_{self.node.name.lstrip('_')}{name}"

    @cached_property
    def bases(self) -> list[Class | Outside]:
        """What it names as its bases."""
        return [self.module.surface.kind(self.module, base) for base in self.node.bases]

    @cached_property
    def mro(self) -> list[Class | Outside]:
        """Itself and all that it comes from, in the order in which names are looked for."""
        lists = [
            *([*(base.mro if isinstance(base, Class) else [base])] for base in self.bases),
            [*self.bases],
        ]
        if self.typed:
            return [self, Outside("builtins.dict")]  # a dictionary is all that is left of it
        return [self, *_merged(lists)]

    @cached_property
    def typed(self) -> bool:
        """Whether it is a dictionary with types."""
        return any(
            base.typed if isinstance(base, Class) else base.name in TYPED for base in self.bases
        )

    @cached_property
    def doubt(self) -> str:
        """The decorator that may make another class of it, its own or one of those above."""
        for kind in self.own:
            if any(isinstance(b, Outside) and b.name.startswith("<") for b in kind.bases):
                return "comes from what a call returns"
            for mark in kind.node.decorator_list:
                called = mark.func if isinstance(mark, ast.Call) else mark
                found = self.module.surface.expression(kind.module, called)
                if isinstance(found, Outside) and found.name not in KEEPING:
                    return f"decorated by {found.name}"
                if isinstance(found, Thing) and CHANGES.search(ast.unparse(found.node)):
                    return f"decorated by {found.module.name}.{found.name}"
        return self.thing.doubt

    @property
    def own(self) -> list[Class]:
        """Those of the order that are in the sources."""
        return [kind for kind in self.mro if isinstance(kind, Class)]

    @property
    def outside(self) -> list[str]:
        """Those of the order that are not."""
        return [kind.name for kind in self.mro if isinstance(kind, Outside)]

    def member(self, name: str) -> Thing | None:
        """What its instances find under a name, in the sources."""
        for kind in self.own:
            found = kind.bound(name)
            if found is not None:
                return found
        return None

    def bound(self, name: str) -> Thing | None:
        """What its own body binds to a name."""
        node = self.scope.names.get(name)
        if node is None:
            return None
        doubt = "bound in several branches" if name in self.scope.unsure else ""
        if isinstance(node, ast.alias):
            return None
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Name):
            other = self.scope.names.get(node.value.id)  # one method under two names
            if isinstance(other, (ast.FunctionDef, ast.AsyncFunctionDef)):
                node = other
        return Thing(self.module, f"{self.thing.name}.{name}", node, doubt)

    @cached_property
    def names(self) -> list[str]:
        """All names that it or one that it comes from binds, in the sources."""
        return sorted(
            {
                name
                for kind in self.own
                for name, node in kind.scope.names.items()
                if not (isinstance(node, ast.AnnAssign) and node.value is None)
            }
        )

    @cached_property
    def assigned(self) -> list[str]:
        """All attributes that a method of it assigns to its instance."""
        found: set[str] = set()
        for kind in self.own:
            for node in ast.walk(kind.node):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id in ("self", "layer")
                ):
                    found.add(node.attr)
        return sorted(found)


# Decorators that hand on the class that they are given, with what is asked for here as it is.
KEEPING = {
    *("dataclasses.dataclass", "pydantic.dataclasses.dataclass", "typing.runtime_checkable"),
    *("typing.final", "typing_extensions.final", "enum.unique", "functools.total_ordering"),
    *("typing_extensions.runtime_checkable", "typing_extensions.dataclass_transform"),
    *("typing.dataclass_transform",),
}
# What a decorator of the sources does that gives a class another shape.
CHANGES = re.compile(r"\bcls\.\w+ = |\bsetattr\(cls|\b_support_torch_compile\(")
TYPED = ("typing.TypedDict", "typing_extensions.TypedDict")


def _merged(lists: list[list[Class | Outside]]) -> Iterator[Class | Outside]:
    """C3, as Python does it; of what cannot be ordered the first comes first."""
    lists = [list(one) for one in lists if one]
    while lists:
        for one in lists:
            if not any(one[0] in other[1:] for other in lists):
                break
        else:
            one = lists[0]
        head = one[0]
        yield head
        lists = [left for left in ([k for k in one if k != head] for one in lists) if left]


class Surface:
    """All modules of a release."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._modules: dict[str, Module] = {}
        self.paths: dict[str, str] = {}
        for path in sorted(sources.paths):
            name = path.partition(".")[0]
            self.paths.setdefault(name.replace("/", ".").removesuffix(".__init__"), path)
        self._classes: dict[ast.stmt, Class] = {}
        self.branches: list[str] = []  # where what was looked for last has another branch

    def module(self, name: str) -> Module | None:
        """A module by its name."""
        if name not in self._modules:
            if name not in self.paths:
                return None
            self._modules[name] = Module(self, name, self.paths[name])
        return self._modules[name]

    def find(self, name: str) -> Thing | Module | Outside | None:
        """What ``module:name.name`` comes to."""
        path, _, inner = name.partition(":")
        found: Thing | Module | Outside | None = self.module(path)
        for part in filter(None, inner.split(".")):
            if isinstance(found, Module):
                found = self.look(found, part)
            elif isinstance(found, Thing) and isinstance(found.node, ast.ClassDef):
                found = self.kind_of(found).member(part)
            else:
                return None
        return found

    def kind_of(self, thing: Thing) -> Class:
        """The class of a definition."""
        if thing.node not in self._classes:
            self._classes[thing.node] = Class(thing)
        return self._classes[thing.node]

    def look(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Thing | Module | Outside | None:
        """What a module has under a name, where it is defined."""
        if (module.name, name) in seen:
            return self.module(f"{module.name}.{name}")  # a package imports its own module
        if not module.path.endswith(".py"):
            return Outside(f"{module.name}.{name}")  # compiled: nothing says what it has
        if not seen:
            self.branches = []
        seen |= {(module.name, name)}
        if name in module.scope.unsure:
            self.branches.append(f"{module.name}:{name}")
        names, origins = module.scope.names, module.scope.origins
        if name not in names and module.lazy and name in module.scope.typed:
            names, origins = module.scope.typed, module.scope.typed_origins
        if name in names:
            return self._followed(module, name, names[name], origins.get(name), seen)
        for node in module.scope.starred:
            other = self.module(module.absolute(node))
            if other is None or (other.exported is None and name.startswith("_")):
                continue
            if other.exported is not None and name not in other.exported:
                continue
            found = self.look(other, name, seen)
            if found is not None:
                return found
        return self.module(f"{module.name}.{name}")

    def _followed(
        self,
        module: Module,
        name: str,
        node: ast.stmt | ast.alias,
        origin: ast.ImportFrom | None,
        seen: frozenset[tuple[str, str]],
    ) -> Thing | Module | Outside | None:
        if isinstance(node, ast.alias):
            path = module.absolute(origin) if origin is not None else ""
            if origin is not None:
                other = self.module(path)
                if other is None:
                    return Outside(f"{path}.{node.name}")
                return self.look(other, node.name, seen)
            whole = node.name if node.asname else node.name.partition(".")[0]
            return self.module(whole) or Outside(whole)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
            node.value, (ast.Name, ast.Attribute)
        ):
            found = self.expression(module, node.value, seen)
            if found is not None and not isinstance(found, Outside):
                return found
        doubt = "bound in several branches" if name in module.scope.unsure else ""
        return Thing(module, name, node, doubt)

    def expression(
        self,
        module: Module,
        node: ast.expr,
        seen: frozenset[tuple[str, str]] = frozenset(),
    ) -> Thing | Module | Outside | None:
        """What a name or a dotted name comes to in a module."""
        if isinstance(node, ast.Name):
            return self.look(module, node.id, seen) or Outside(f"builtins.{node.id}")
        if isinstance(node, ast.Attribute):
            owner = self.expression(module, node.value, seen)
            if isinstance(owner, Module):
                return self.look(owner, node.attr, seen)
            if isinstance(owner, Outside):
                return Outside(f"{owner.name}.{node.attr}")
            if isinstance(owner, Thing) and isinstance(owner.node, ast.ClassDef):
                return self.kind_of(owner).member(node.attr)
        return None

    def kind(self, module: Module, node: ast.expr) -> Class | Outside:
        """A base of a class."""
        if isinstance(node, ast.Subscript):
            return self.kind(module, node.value)
        found = self.expression(module, node)
        if isinstance(found, Thing) and isinstance(found.node, ast.ClassDef):
            return self.kind_of(found)
        return found if isinstance(found, Outside) else Outside(f"<{ast.unparse(node)}>")

    def things(self, modules: Iterable[str]) -> Iterator[tuple[Module, str, Thing]]:
        """Classes and functions where they are defined."""
        for name in modules:
            module = self.module(name)
            if module is None or not module.source:
                continue
            for bound in module.scope.names:
                node = module.scope.names[bound]
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    found = self.look(module, bound)
                    assert isinstance(found, Thing)
                    yield module, bound, found

    def imported(self, name: str) -> list[Module]:
        """A module and all of the sources that it imports, wherever in it."""
        seen: dict[str, Module] = {}
        waiting = [name]
        while waiting:
            module = self.module(waiting.pop())
            if module is None or module.name in seen:
                continue
            seen[module.name] = module
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Import):
                    waiting += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    path = module.absolute(node)
                    waiting += [path, *(f"{path}.{alias.name}" for alias in node.names)]
        return list(seen.values())


def enclosed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body that run."""
    return (node for node, typed, _ in statements(body) if not typed)

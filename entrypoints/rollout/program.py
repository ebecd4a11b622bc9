"""The identity of the proof program: what decides the result of each check, by meaning.

A report says by which program it was made, so that a reader can tell whether today's would ask the
same. Its text is no answer: with that, every reworded sentence would void every proof. So this
reads the sources, follows for each check which functions, classes and constants it stands on, and
digests their syntax. Left out are comments, docstrings, annotations, help texts, and the sentences
of errors and of what is printed. A changed bound, probe, check or transport is another digest, for
exactly the checks that stand on it.

It is computed from the sources that run, at the end of a run in an image as on the host: a number
written down at the build would still be there after somebody had changed the code. The syntax is
walked here and not by ``ast.dump``, whose text differs between versions of Python.

    python -m rollout.program BACKEND CHECK ...     print it, for a person or a test
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "rollout"
HERE = Path(__file__).resolve().parent
# Beside the result of a check: what is said of it, what is injected, what is looked at before.
_OUTSIDE = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        *("calibrate", "cli", "faults", "info", "moe_calibrate", "moe_faults", "preflight"),
        *("fp8_kv_faults", "pressure_faults", "problem", "program", "report"),
    )
)
# Ours, and what it is taken for: they answer alike wherever the other one answers.
_SAME = {f"{PACKAGE}.presence.find_spec": "importlib.util.find_spec"}
# Which checks run is told by the report itself, and a new one is not to change all others.
_CHOICE = frozenset(
    f"{PACKAGE}.smoke.{name}"
    for name in (
        *("available", "promised", "selected", "fault", "skipped", "run", "CHECKS", "ALONE"),
        *("cached", "gpus", "model", "proof", "framed", "several"),
    )
)
_OFFERED = frozenset({"ABILITIES"})  # what a backend could be asked for, which no check looks at
# A dictionary of checks counts with the entry of the check that is looked at.
_REGISTRIES = frozenset({f"{PACKAGE}.checks.CHECKS", f"{PACKAGE}.verify.CHECKS"})
# What every check of the smoke test goes through.
_DRIVEN = (f"{PACKAGE}.smoke._drive", f"{PACKAGE}.smoke._attempt")
# One that makes a probe of its own, and the one that drives a framework, which has its own engine.
_TRAINING = "training"
_FP8_KV = "fp8-kv"
_ROOTS = {
    _FP8_KV: (f"{PACKAGE}.smoke._round", f"{PACKAGE}.smoke._attempt", f"{PACKAGE}.smoke._last"),
    "moe": (f"{PACKAGE}.smoke._mix", f"{PACKAGE}.smoke._attempt", f"{PACKAGE}.smoke._last"),
    _TRAINING: (f"{PACKAGE}.smoke._train", f"{PACKAGE}.smoke._attempt", f"{PACKAGE}.smoke._last"),
}
# Calls whose texts are for people; and names of variables and arguments that hold such texts.
_TELLING = frozenset({"print", "warn", "Finding", "Failed", "Problem", "EngineError"})
_TEXTS = frozenset(
    {
        *("reason", "sentence", "message", "hint", "why", "what", "help", "description"),
        *("epilog", "metavar", "unproved"),
    }
)
_IGNORED = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})
_COMPARED = "_interface"  # of a backend: what `rollout verify` compares, and no engine is driven by
_SHARED = ("reuse", "sleep_levels", "transport")  # settings that are every check's
SENTENCE = ["text"]  # stands for all of them
# What becomes of the texts of an expression: nothing is known, they stand where a sentence may
# stand (one with a blank in it is one), or they are said and nothing else.
_USED, _PERHAPS, _SAID = 0, 1, 2

Form = Any  # nested lists of strings: what json.dumps writes alike in every version of Python


@dataclass
class _Module:
    """A module: its name, what it defines, and what it imports under which name."""

    name: str
    units: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)


def _imports(node: ast.AST, module: str, *, package: bool) -> dict[str, str]:
    """Local name -> dotted name, of one import statement."""
    if isinstance(node, ast.Import):
        # `import a.b` binds `a`.
        pairs = ((a.asname or a.name.partition(".")[0], a.asname, a.name) for a in node.names)
        return {name: full if asname else name for name, asname, full in pairs}
    assert isinstance(node, ast.ImportFrom)  # noqa: S101 - for mypy
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        up = node.level - 1 if package else node.level
        base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
    return {a.asname or a.name: f"{base}.{a.name}" for a in node.names}


def _typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


class Sources:
    """The modules of a package, read from a folder."""

    def __init__(self, root: Path = HERE) -> None:
        self.modules: dict[str, _Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
            package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if package else parts)
            tree = ast.parse(path.read_bytes(), str(path))
            module = self.modules[name] = _Module(name)
            for statement in tree.body:
                self._bind(module, statement, statement, package)
        self._forms: dict[tuple[str, str], tuple[Form, frozenset[str]]] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def _bind(self, module: _Module, node: ast.stmt, unit: ast.stmt, package: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imported |= _imports(node, module.name, package=package)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.units.setdefault(node.name, []).append(unit)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for name in _stored(node):
                module.units.setdefault(name, []).append(unit)
        elif isinstance(node, ast.If | ast.Try | ast.With) and not _typing_only(node):
            for child in ast.walk(node):
                if isinstance(child, ast.stmt) and child is not node:
                    self._bind(module, child, unit, package)

    def find(self, dotted: str) -> str:
        """The definition that a dotted name stands for, through imports; "" for none of ours."""
        for _ in range(20):  # an import of an import; more is a circle
            if dotted in self.modules:
                return dotted
            where, _, name = dotted.rpartition(".")
            module = self.modules.get(where)
            if module is None:
                return ""
            # What stands outside is not followed, wherever in it a definition lies.
            if name in module.units or (where in _OUTSIDE and name in module.imported):
                return dotted
            if name not in module.imported:
                return ""
            dotted = module.imported[name]
        return ""

    def form(self, dotted: str, check: str) -> tuple[Form, frozenset[str]]:
        """The form of a definition, as one check sees it, and what it refers to."""
        key = self._key(dotted, check)
        if key not in self._forms:
            where, _, name = dotted.rpartition(".")
            walk = _Walk(self, self.modules[where])
            forms = []
            for unit in self.modules[where].units[name]:
                chosen = _entry(unit, check) if dotted in _REGISTRIES else unit
                forms.append(walk.node(chosen, frozenset()))
            self._forms[key] = (forms, frozenset(walk.references))
        return self._forms[key]

    @staticmethod
    def _key(dotted: str, check: str) -> tuple[str, str]:
        return dotted, check if dotted in _REGISTRIES else ""

    def _digest(self, dotted: str, check: str) -> str:
        key = self._key(dotted, check)
        if key not in self._digests:
            text = json.dumps(self.form(dotted, check)[0])
            self._digests[key] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[key]

    def whole(self, module: str) -> list[str]:
        """Everything that a module defines."""
        return [f"{module}.{name}" for name in self.modules[module].units]

    def closure(self, roots: Iterable[str], check: str) -> dict[str, str]:
        """Every definition that these stand on, they themselves included: name to sha256."""
        found: dict[str, str] = {}
        waiting = list(roots)
        while waiting:
            dotted = waiting.pop()
            where, _, name = dotted.rpartition(".")
            if dotted in found or dotted in _CHOICE or where in _OUTSIDE or name in _OFFERED:
                continue
            if dotted in self.modules:  # imported as such; what is used of it is named elsewhere
                continue
            found[dotted] = self._digest(dotted, check)
            waiting += self.form(dotted, check)[1]
        return found


def _entry(unit: ast.stmt, check: str) -> ast.stmt:
    """A registry of checks with the entry of one alone."""
    if isinstance(unit, ast.Assign | ast.AnnAssign) and isinstance(unit.value, ast.Dict):
        table = unit.value
        pairs = [
            (key, value)
            for key, value in zip(table.keys, table.values, strict=True)
            if isinstance(key, ast.Constant) and key.value == check
        ]
        chosen = ast.Dict([key for key, _ in pairs], [value for _, value in pairs])
        return ast.Assign([ast.Name("CHECKS", ast.Store())], chosen)
    return ast.Pass()


def _stored(node: ast.AST) -> set[str]:
    """Names that a statement binds, not those of functions inside it."""
    found: set[str] = set()
    waiting: list[ast.AST] = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(item.name)
            continue
        if isinstance(item, ast.Lambda):
            continue
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store | ast.Del):
            found.add(item.id)
        elif isinstance(item, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and item.name:
            found.add(item.name)
        waiting += ast.iter_child_nodes(item)
    return found


_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign


def _locals(node: _Function) -> frozenset[str]:
    """The names that are a function's own."""
    given = node.args
    names = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    names |= {a.arg for a in (given.vararg, given.kwarg) if a}
    body = [node.body] if isinstance(node, ast.Lambda) else node.body
    for statement in body:
        names |= _stored(statement)
    shared = {
        name
        for statement in ast.walk(node)
        if isinstance(statement, ast.Global | ast.Nonlocal)
        for name in statement.names
    }
    return frozenset(names - shared)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


class _Walk:
    """Turns the syntax of one definition into its form, and notes what of ours it refers to."""

    def __init__(self, sources: Sources, module: _Module) -> None:
        self.sources = sources
        self.module = module
        self.imported: dict[str, str] = {}  # by this definition itself
        self.references: set[str] = set()
        self.texts: frozenset[str] = frozenset()  # local names that hold a sentence and no more

    def _resolved(self, name: str) -> tuple[str, bool]:
        """The dotted name that a name stands for, and whether it is ours."""
        dotted = self.imported.get(name) or (
            f"{self.module.name}.{name}"
            if name in self.module.units
            else self.module.imported.get(name, "")
        )
        found = self.sources.find(dotted) if dotted else ""
        if found in _SAME:
            return _SAME[found], False
        return found or dotted or name, bool(found)

    def node(self, node: Any, own: frozenset[str], *, said: int = _USED) -> Form:
        """The form of a node; ``own`` are local names, ``said`` is what becomes of its texts."""
        if isinstance(node, list):
            return self._statements(node, own, said)
        if isinstance(node, ast.Constant):
            return SENTENCE if _sentence([node], said) else _value(node)
        if isinstance(node, ast.JoinedStr):
            return SENTENCE if _sentence(node.values, said) else ["f", *self._pieces(node, own)]
        if isinstance(node, ast.Name):
            loaded = isinstance(node.ctx, ast.Load)
            return self._name(node.id, own) if loaded else ["local", node.id]
        if isinstance(node, ast.Attribute):
            return self._attribute(node, own, said)
        if isinstance(node, ast.Call):
            return self._call(node, own, said)
        if isinstance(node, ast.keyword):
            return ["=", node.arg or "**", self.node(node.value, own, said=said)]
        if isinstance(node, ast.Raise):
            return ["raise", self.node(node.exc, own, said=_SAID) if node.exc else []]
        if isinstance(node, ast.Assert):
            return ["assert", self.node(node.test, own)]
        if isinstance(node, _Assignment):
            return self._assign(node, own)
        if isinstance(node, _Function):
            return self._function(node, own)
        if isinstance(node, ast.ClassDef):
            return self._class(node, own)
        return self._plain(node, own, said)

    def _plain(self, node: ast.AST, own: frozenset[str], said: int) -> Form:
        # A name that a comprehension binds is its own.
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            own |= {name for part in node.generators for name in _stored(part.target)}
        # What is compared or looked up decides, whatever becomes of the result.
        said = _USED if isinstance(node, ast.Compare | ast.Subscript) else said
        form: list[Form] = [type(node).__name__]
        for name in sorted(set(node._fields) - _IGNORED):
            value = getattr(node, name, None)
            if value is None or value == []:  # another version has another set of empty fields
                continue
            is_node = isinstance(value, ast.AST | list)
            form.append([name, self.node(value, own, said=said) if is_node else str(value)])
        return form

    def _statements(self, nodes: Sequence[Any], own: frozenset[str], said: int) -> Form:
        forms = []
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imported |= _imports(node, self.module.name, package=False)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            elif isinstance(node, ast.stmt) and _typing_only(node):
                continue
            elif isinstance(node, ast.AST):
                forms.append(self.node(node, own, said=said))
            else:
                forms.append(None if node is None else str(node))
        return forms

    def _pieces(self, node: ast.JoinedStr, own: frozenset[str]) -> list[Form]:
        # Versions cut the text of an f-string into other pieces.
        pieces: list[Form] = []
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                spec = value.format_spec
                form = self._pieces(spec, own) if isinstance(spec, ast.JoinedStr) else []
                pieces.append(["{", self.node(value.value, own), str(value.conversion), form])
            elif isinstance(value, ast.Constant) and value.value:
                if pieces and isinstance(pieces[-1], str):
                    pieces[-1] += str(value.value)
                else:
                    pieces.append(str(value.value))
        return pieces

    def _name(self, name: str, own: frozenset[str]) -> Form:
        if name in self.texts:
            return SENTENCE
        if name in own and name not in self.imported:
            return ["local", name]
        dotted, ours = self._resolved(name)
        if ours:
            self.references.add(dotted)
        return ["name", dotted]

    def _attribute(self, node: ast.Attribute, own: frozenset[str], said: int) -> Form:
        names = [node.attr]
        value: ast.expr = node.value
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        if isinstance(value, ast.Name) and (value.id not in own or value.id in self.imported):
            dotted, ours = self._resolved(value.id)
            # Of a module of ours it is a definition.
            while ours and dotted in self.sources.modules and names:
                found = self.sources.find(f"{dotted}.{names[0]}")
                if not found:
                    break
                dotted, names = found, names[1:]
            if ours:
                self.references.add(dotted)
                return [".", ["name", dotted], *names]
        return [".", self.node(value, own, said=said), *names]

    def _call(self, node: ast.Call, own: frozenset[str], said: int) -> Form:
        said = _SAID if _called(node) in _TELLING else said
        function = self.node(node.func, own)
        names = self._parameters(function)[: len(node.args)]
        names += [""] * (len(node.args) - len(names))
        arguments = [
            self.node(argument, own, said=max(said, _PERHAPS if name in _TEXTS else _USED))
            for name, argument in zip(names, node.args, strict=True)
        ]
        named = [
            [
                *("=", k.arg or "**"),
                self.node(k.value, own, said=max(said, _PERHAPS if k.arg in _TEXTS else _USED)),
            ]
            for k in node.keywords
        ]
        return ["call", function, arguments, named]

    def _parameters(self, function: Form) -> list[str]:
        """The names of the arguments of a function of ours, as a call has its form."""
        dotted = function[1] if function[0] == "name" else ""
        where, _, name = str(dotted).rpartition(".")
        module = self.sources.modules.get(where)
        units = module.units.get(name, []) if module else []
        if len(units) == 1 and isinstance(units[0], ast.FunctionDef):
            given = units[0].args
            return [argument.arg for argument in (*given.posonlyargs, *given.args)]
        return []

    def _assign(self, node: _Assignment, own: frozenset[str]) -> Form:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id if isinstance(target, ast.Name) else "" for target in targets]
        if all(name in self.texts for name in names):
            return ["let", "", SENTENCE]
        said = _PERHAPS if all(name in _TEXTS for name in names) else _USED
        value = [] if node.value is None else self.node(node.value, own, said=said)
        operator = type(node.op).__name__ if isinstance(node, ast.AugAssign) else ""
        return ["let", operator, [self.node(target, own) for target in targets], value]

    def _function(self, node: _Function, own: frozenset[str]) -> Form:
        before, imported = self.texts, dict(self.imported)
        inside = own | _locals(node)
        if isinstance(node, ast.Lambda):
            parts = [self._arguments(node.args, own), self.node(node.body, inside)]
            self.imported = imported
            return ["lambda", *parts]
        self.texts = before | _sentences(node)
        decorators = [self.node(decorator, own) for decorator in node.decorator_list]
        body = self._statements(node.body, inside, _USED)
        form = ["def", node.name, decorators, self._arguments(node.args, own), body]
        self.texts, self.imported = before, imported
        return form

    def _arguments(self, node: ast.arguments, own: frozenset[str]) -> Form:
        def names(arguments: Sequence[ast.arg | None]) -> list[str]:
            return [argument.arg for argument in arguments if argument]

        return [
            names(node.posonlyargs),
            names(node.args),
            names([node.vararg]),
            names(node.kwonlyargs),
            names([node.kwarg]),
            [self.node(default, own) for default in node.defaults],
            [None if default is None else self.node(default, own) for default in node.kw_defaults],
        ]

    def _class(self, node: ast.ClassDef, own: frozenset[str]) -> Form:
        bases = [self.node(base, own) for base in (*node.bases, *node.keywords)]
        decorators = [self.node(decorator, own) for decorator in node.decorator_list]
        # Names of a class are not seen by its methods.
        stored = frozenset().union(*(_stored(s) for s in node.body)) if node.body else frozenset()
        body = []
        for statement in node.body:
            function = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            body += self._statements([statement], own if function else own | stored, _USED)
        return ["class", node.name, decorators, bases, body]


def _sentence(pieces: Sequence[ast.expr], said: int) -> bool:
    """Whether a text of these pieces is a sentence, where it stands."""
    texts = [p.value for p in pieces if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    if said == _SAID:
        return any(texts) or not all(isinstance(piece, ast.Constant) for piece in pieces)
    return said == _PERHAPS and any(" " in text for text in texts)


def _value(node: ast.Constant) -> Form:
    return [type(node.value).__name__, repr(node.value)]


def _sentences(node: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """The local names of a function that are used for nothing but what an error says."""
    used: dict[str, set[bool]] = {}

    def look(item: ast.AST, said: bool) -> None:
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load):
            used.setdefault(item.id, set()).add(said)
        if isinstance(item, ast.Raise):
            said = True
        elif isinstance(item, ast.Call):
            # Of what is raised, a number that is measured is no sentence.
            said = said or _called(item) in _TELLING
        for child in ast.iter_child_nodes(item):
            look(child, said)

    look(node, False)
    texts: dict[str, bool] = {}
    for item in ast.walk(node):
        if isinstance(item, ast.Assign) and all(isinstance(t, ast.Name) for t in item.targets):
            for target in item.targets:
                name = target.id  # type: ignore[attr-defined]
                texts[name] = texts.get(name, True) and _is_text(item.value)
    assigned_otherwise = _stored_otherwise(node)
    return frozenset(
        name
        for name, text in texts.items()
        if text and used.get(name) == {True} and name not in assigned_otherwise
    )


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is a sentence, put together from texts."""
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.BoolOp):
        return any(_is_text(value) for value in node.values)
    return False


def _stored_otherwise(node: ast.AST) -> set[str]:
    """Names that are bound by something else than a plain assignment."""
    plain = {
        id(target)
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        for target in item.targets
    }
    return {
        item.id
        for item in ast.walk(node)
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store) and id(item) not in plain
    }


def _owned(sources: Sources, folder: str, name: str) -> list[str]:
    """The modules of one backend or framework: its own, and those that begin with its name."""
    stem = f"{PACKAGE}.{folder}.{name.replace('-', '_')}"
    return [m for m in sources.modules if m == stem or m.startswith(f"{stem}_")]


def _started(sources: Sources, check: str, backend: str, framework: str) -> list[str]:
    """The modules that a check of ``rollout verify`` starts in a process of its own."""
    if check == "interface":
        owned = [m for m in _owned(sources, "backends", backend) if m.endswith(_COMPARED)]
        return [f"{PACKAGE}.backends.interface", *owned]
    if check == "framework":
        return [f"{PACKAGE}.frameworks.__main__", *_owned(sources, "frameworks", framework)]
    return []


def _root(sources: Sources, check: str) -> list[str]:
    """The definitions that a check begins with.

    Raises:
        ValueError: none is found.
    """
    name = check.replace("-", "_")
    table = f"{PACKAGE}.checks.CHECKS"
    if sources.find(table):
        references = sources.form(table, check)[1]
        if references:
            return [*references]
    # A module may wrap what it imports under a name of its own.
    for place in (f"smoke.{name}", f"verify._{name}", f"verify.{name}", f"checks.{name}"):
        found = sources.find(f"{PACKAGE}.{place}")
        if found:
            return sources.whole(found) if found in sources.modules else [found]
    if f"{PACKAGE}.{name}" in sources.modules:
        return sources.whole(f"{PACKAGE}.{name}")
    raise ValueError(f"nothing in the sources is the check {check}")


def identity(
    backend: str,
    verified: Iterable[str],
    smoked: Iterable[str],
    settings: Mapping[str, Any] | None = None,
    *,
    framework: str = "",
    sources: Sources | None = None,
) -> dict[str, str]:
    """For each check the sha256 of what decides its result, in this order.

    ``verified`` are checks of ``rollout verify``, ``smoked`` of ``rollout smoke``; ``settings`` is
    what an image's promises say of how the latter run.

    Raises:
        ValueError: the sources do not have such a check.
    """
    sources = sources or Sources()
    found = {}
    for name in verified:
        modules = _started(sources, name, backend, framework)
        owned = [u for m in modules for u in sources.whole(m)]
        found[name] = _digest(sources.closure([*_root(sources, name), *owned], name), {})
    for name in smoked:
        trained = name == _TRAINING
        folder, owner = ("frameworks", framework) if trained else ("backends", backend)
        # What a backend has for one check alone is named after both.
        modules = [*_owned(sources, folder, owner), *_owned(sources, folder, f"{name}_{owner}")]
        modules = [m for m in modules if not m.endswith(_COMPARED)]
        owned = [u for m in modules for u in sources.whole(m)]
        roots = [*_root(sources, name), *_ROOTS.get(name, _DRIVEN), *owned]
        said = {} if trained else _said(settings or {}, name)
        found[name] = _digest(sources.closure(roots, name), said)
    return found


def _digest(forms: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    text = json.dumps([sorted(forms.items()), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def settings(smoke: Mapping[str, Any]) -> dict[str, Any]:
    """Of an image's promises ("smoke" in image.json) those that say how a check runs."""
    found = {
        "reuse": smoke.get("reuse", "turns"),
        "sleep_levels": list(smoke["sleep_levels"]),
        "transport": smoke["refit"][0],
    }
    return found | ({_FP8_KV: smoke[_FP8_KV]} if smoke.get(_FP8_KV) else {})


def _said(settings: Mapping[str, Any], check: str) -> dict[str, Any]:
    """Of these settings those of a check; what one alone is told is named after it."""
    return {name: value for name, value in settings.items() if name in (*_SHARED, check)}


def of_image(
    data: Mapping[str, Any], *, verified: Iterable[str], smoked: Iterable[str] | None = None
) -> dict[str, str]:
    """The identity of the program in an image, from what its image.json says of it.

    Without ``smoked`` of all checks of the smoke test that the image promises.
    """
    from rollout import smoke

    wanted, framework = data["smoke"], data.get("framework")
    name = framework["name"] if isinstance(framework, dict) else ""
    checks = smoke.promised(wanted) if smoked is None else smoked
    return identity(data["backend"], verified, checks, settings(wanted), framework=name)


def main(arguments: Sequence[str]) -> int:
    """Print the identity of some checks of the smoke test."""
    backend, *checks = arguments
    print(json.dumps(identity(backend, (), checks), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What Python itself tells of the modules that are loaded: run in an environment that has them.

    python introspected.py FILE MODULE [MODULE …] [-- PACKAGE …]

imports the modules and writes what is known of everything that the packages (by default those of
the modules) have loaded by then. The standard library alone is used.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "both",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: "named",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def parameters(what: Any) -> list[list[Any]] | None:
    """Name, kind, whether there is a default; None without a signature."""
    try:
        found = inspect.signature(what).parameters.values()
    except (TypeError, ValueError, NameError, AttributeError):
        return None
    return [[p.name, KINDS[p.kind], p.default is not p.empty] for p in found]


def made(kind: type) -> list[list[Any]] | None:
    """How a class is called: what stands nearest, of ``__new__`` and ``__init__``.

    Python 3.11.2, Debian's, looks at any ``__new__`` first, however far above it stands.
    """
    nearest = next(
        (one for one in kind.__mro__ if {"__new__", "__init__"} & vars(one).keys()), kind
    )
    hidden = inspect.isfunction(kind.__new__) and "__new__" not in vars(nearest)
    if not hidden or type(kind).__call__ is not type.__call__ or hasattr(kind, "__signature__"):
        return parameters(kind)
    found = parameters(kind.__init__)
    return found and found[1:]


def function(what: Any) -> dict[str, Any] | None:
    """Kind, binding and parameters of what a class or a module has under a name."""
    binding = {staticmethod: "static", classmethod: "class"}.get(type(what), "")
    if binding:
        what = what.__func__
    if isinstance(what, (property, functools.cached_property)) or (
        type(what).__name__ in ("cached_property", "DynamicClassAttribute")
    ):
        return {"kind": "property", "binding": "", "parameters": None}
    if not (inspect.isfunction(what) or hasattr(what, "__wrapped__")):
        return None
    kind = "coroutine" if inspect.iscoroutinefunction(what) else "function"
    return {"kind": kind, "binding": binding, "parameters": parameters(what)}


def named(what: Any) -> str:
    """Where it says that it was defined."""
    return f"{getattr(what, '__module__', '')}:{getattr(what, '__qualname__', '')}"


def described(kind: type) -> dict[str, Any]:
    """A class."""
    found: dict[str, Any] = {"kind": "class", "mro": [named(one) for one in kind.__mro__]}
    found["own"] = {
        name: about
        for name, what in list(vars(kind).items())
        if (about := function(what)) is not None
    }
    found["names"] = [name for name in dir(kind) if not name.startswith("__")]
    for style, names in (("pydantic", "model_fields"), ("msgspec", "__struct_fields__")):
        if names in dir(kind):
            found["style"], found["fields"] = style, list(getattr(kind, names))
            break
    else:
        if dataclasses.is_dataclass(kind):
            found["style"] = "dataclass"
            found["fields"] = [field.name for field in dataclasses.fields(kind)]
    if isinstance(kind, enum.EnumMeta):
        found["members"] = list(kind.__members__)
    found["made"] = made(kind)
    return found


def told(module: ModuleType) -> dict[str, Any]:
    """Classes, functions and what comes from elsewhere."""
    found: dict[str, Any] = {"here": {}, "elsewhere": {}}
    for name, what in list(vars(module).items()):
        if isinstance(what, type):
            if what.__module__ == module.__name__ and what.__qualname__ == name:
                found["here"][name] = described(what)
            else:
                found["elsewhere"][name] = named(what)
        elif inspect.isfunction(what):
            if what.__module__ == module.__name__ and what.__qualname__ == name:
                found["here"][name] = function(what)
            else:
                found["elsewhere"][name] = named(what)
    return found


def main(arguments: list[str]) -> None:
    """Write the file."""
    target, *rest = arguments
    modules, _, packages = " ".join(rest).partition(" -- ")
    failed = {}
    for name in modules.split():
        try:
            importlib.import_module(name)
        except BaseException as error:  # some exit
            failed[name] = f"{type(error).__name__}: {error}"
    wanted = set(packages.split()) or {name.partition(".")[0] for name in modules.split()}
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] not in wanted or type(module) is not ModuleType:
            continue
        if str(getattr(module, "__file__", "") or "").endswith(".py"):
            try:
                found[name] = told(module)
            except Exception as error:  # a look that a class of its own refuses
                failed[name] = f"{type(error).__name__}: {error}"
    Path(target).write_text(json.dumps({"modules": found, "failed": failed}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

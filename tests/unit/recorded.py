"""An engine generated from a record of its API: it has what the record has, and nothing else."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Play = Callable[..., Any]  # what a function does, given what it was called with by name


def read(path: Path) -> Record:
    """The names of a record, each with what is known of it."""
    found: Record = json.loads(path.read_text(encoding="utf-8"))["names"]
    return found


def _function(name: str, kind: str, signature: str, played: Mapping[str, Play]) -> Any:
    """A function of exactly this signature, that does what is played under its name."""
    code = f"def made{signature}:\n    return _play(dict(locals()))\n"
    if kind == "coroutine":
        code = (
            f"async def made{signature}:\n"
            "    found = _play(dict(locals()))\n"
            "    return await found if _awaits(found) else found\n"
        )

    def play(given: dict[str, Any]) -> Any:
        if name not in played:
            raise AssertionError(f"nobody plays {name}")
        return played[name](**given)

    space: dict[str, Any] = {"_play": play, "_awaits": inspect.isawaitable}
    exec(code, space)  # noqa: S102 - the record is a file of this repository
    made = space["made"]
    made.__name__ = name.rpartition(".")[2].rpartition(":")[2]
    return made


def _fields(name: str, fields: list[str]) -> type:
    """A class that is made with these arguments by name and refuses any other, as pydantic's."""

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807
        unknown = sorted(given.keys() - set(fields))
        if unknown:
            raise ValueError(f"{name} has no field {unknown[0]!r}")
        self.__dict__.update(dict.fromkeys(fields) | given)

    return type(name, (), {"__init__": __init__, "model_fields": dict.fromkeys(fields)})


def modules(record: Record, played: Mapping[str, Play]) -> dict[str, types.ModuleType]:
    """The modules of an engine, to stand in ``sys.modules``."""
    made: dict[str, types.ModuleType] = {}

    def module(path: str) -> types.ModuleType:
        if path not in made:
            made[path] = types.ModuleType(path)
            made[path].__path__ = []  # type: ignore[attr-defined]  # a package, for what lies below
            above, _, last = path.rpartition(".")
            if above:
                setattr(module(above), last, made[path])
        return made[path]

    # A class before its methods.
    for name, about in sorted(record.items()):
        path, _, inner = name.partition(":")
        owner: Any = module(path)
        *outer, last = inner.split(".")
        for part in outer:
            owner = getattr(owner, part)
        kind = about["kind"]
        if kind == "class":  # the reader of sources says more of a class (tests/surface)
            kind = "fields" if "fields" in about else "enum" if "members" in about else kind
        if kind == "class":
            thing: Any = type(last, (), {"__module__": path})
        elif kind == "fields":
            thing = _fields(last, about["fields"])
        elif kind == "enum":
            thing = enum.Enum(last, about["members"])  # type: ignore[misc]
        elif kind == "property":
            thing = property(_function(name, kind, "(self)", played))
        else:
            thing = _function(name, kind, about["signature"], played)
        setattr(owner, last, thing)
    return made

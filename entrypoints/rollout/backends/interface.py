"""What a backend uses of its engine, held against the engine that is installed; no GPU is needed.

    python3 -m rollout.backends.interface BACKEND [PROMISE …]

prints one JSON object: ``looked_at`` (kind of thing to how many of it), ``without`` (what this
version lacks and the backend does without) and ``problems`` (pairs: where, what is wrong). A
process of its own, because engines change the process that imports them. What is compared stands
in the module ``rollout.backends.<backend>_interface``, in its function ``compare``. What serves
nothing but a promise ("fp8", "server") is looked at where the image makes it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from rollout.backends import records


class _Comparing(Protocol):
    def compare(self, seen: Comparison) -> None: ...


def has(backend: str) -> bool:
    """Whether a backend says what it uses of its engine."""
    return bool(backend) and importlib.util.find_spec(_module(backend)) is not None


def _module(backend: str) -> str:
    return f"rollout.backends.{backend.replace('-', '_')}_interface"


class Comparison:
    """Gathers what was looked at and what is missing; looking never raises.

    A thing is named ``module:name.name``. Where one of several names is enough, as after a move,
    the names stand in their order of preference.
    """

    def __init__(self, promised: Iterable[str] = ()) -> None:
        self.promised = frozenset(promised)
        self.looked_at: Counter[str] = Counter()
        self.without: list[str] = []
        self.problems: list[tuple[str, str]] = []

    def wrong(self, where: str, what: str) -> None:
        """Something is not as the backend uses it."""
        if (where, what) not in self.problems:
            self.problems.append((where, what))

    def look(self, kind: str, where: str, holds: bool, what: str) -> bool:
        """Count one thing of a kind; ``what`` is wrong where it does not hold."""
        self.looked_at[kind] += 1
        if not holds:
            self.wrong(where, what)
        return holds

    @contextlib.contextmanager
    def part(self, where: str) -> Iterator[None]:
        """What a part of a comparison raises is a problem of that part, and no end of the rest."""
        try:
            yield
        except BaseException as error:  # parsers and engines exit, and that is a failure as well
            lines = str(error).strip().splitlines() or [""]
            self.wrong(where, f"cannot be looked at: {type(error).__name__}: {lines[0]}")

    def thing(self, *names: str) -> Any:
        """The first of these that is there; none is a problem, and None comes back."""
        failure = ""
        for name in names:
            module, _, path = name.partition(":")
            try:
                found: Any = importlib.import_module(module)
                for part in filter(None, path.split(".")):
                    found = getattr(found, part)
            except BaseException as error:  # some exit
                first = (str(error).strip().splitlines() or [""])[0]
                failure = failure or f"{type(error).__name__}: {first}"
            else:
                self.looked_at["names"] += 1
                return found
        self.look("names", names[0], False, f"is not there: {failure}")
        return None

    def called(self, name: str, *given: str, **options: object) -> None:
        """A callable takes these arguments: ``given`` by position, ``options`` by name."""
        found = self.thing(name)
        if found is None:
            return
        bound: list[Any] = [*given]
        if "." in name.partition(":")[2] and not isinstance(
            inspect.getattr_static(*_owner(name)), (staticmethod, classmethod)
        ):
            bound = ["self", *bound]
        problem = _refused(found, bound, options)
        shown = ", ".join([*given, *(f"{option}=" for option in options)])
        self.look("calls", name, not problem, f"cannot be called with ({shown}): {problem}")

    def assigned(self, name: str, attributes: Iterable[str]) -> None:
        """The class assigns these attributes somewhere, itself or in a class that it comes from."""
        found = self.thing(name)
        if found is None:
            return
        text = "\n".join(
            inspect.getsource(kind)
            for kind in inspect.getmro(found)
            if kind.__module__.partition(".")[0] == found.__module__.partition(".")[0]
        )
        for attribute in attributes:
            there = hasattr(found, attribute) or bool(
                re.search(rf"\b(?:self|layer)\.{attribute}\s*(?::[^=\n]+)?=", text)
            )
            self.look("attributes", name, there, f"has no attribute {attribute!r}")

    def fields(
        self, names: tuple[str, ...], wanted: Iterable[str], dispensable: Iterable[str] = ()
    ) -> None:
        """A data class (or one of pydantic or msgspec) has these fields.

        ``dispensable`` ones may be missing; they are noted.
        """
        found = self.thing(*names)
        if found is None:
            return
        there = records.fields(found)
        for name in wanted:
            if name in dispensable and name not in there:
                self.without.append(name)
                continue
            self.look("fields", names[0], name in there, f"has no field {name!r}")


def _owner(name: str) -> tuple[Any, str]:
    """The class that a dotted name lies in, and the name there."""
    module, _, path = name.partition(":")
    *outer, last = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, last


def _refused(found: Callable[..., Any], given: list[Any], options: dict[str, object]) -> str:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError) as error:
        return f"it has no signature ({error})"
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        return str(error)
    return ""


def compared(backend: str, promised: Iterable[str] = ()) -> dict[str, Any]:
    """What a backend's comparison found, as this module prints it."""
    module: _Comparing = importlib.import_module(_module(backend))
    seen = Comparison(promised)
    with seen.part(backend):
        module.compare(seen)
    return {
        "looked_at": dict(seen.looked_at),
        "without": seen.without,
        "problems": seen.problems,
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        # This module's own class is `__main__`'s here, and the backend's module uses the other.
        outcome = importlib.import_module("rollout.backends.interface").compared(
            sys.argv[1], sys.argv[2:]
        )
    print(json.dumps(outcome, indent=1))

"""An engine made of a record: modules that have what the record has, and nothing else."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
BINDINGS = {"static": "@staticmethod\n", "class": "@classmethod\n", "": ""}
HEAD = """\
from __future__ import annotations
import dataclasses, enum
from types import SimpleNamespace
"""


def write(names: dict[str, Entry], folder: Path) -> None:
    """The modules, below a folder that is to stand in Python's path."""
    modules: dict[str, str] = {}
    for name, about in names.items():
        module, _, inner = name.partition(":")
        modules.setdefault(module, "")
        if not inner:
            modules[module] += _module(about, {n for n in names if n.startswith(f"{module}:")})
    for name, about in names.items():
        module, _, inner = name.partition(":")
        if inner and "." not in inner:
            below = {n: e for n, e in names.items() if n.startswith(f"{name}.")}
            modules[module] += _thing(inner, about, below)
    for module, text in modules.items():
        place = folder.joinpath(*module.split("."))
        for above in [*place.relative_to(folder).parents][:-1]:
            (folder / above).mkdir(parents=True, exist_ok=True)
            (folder / above / "__init__.py").touch()
        if any(other.startswith(f"{module}.") for other in modules):
            place.mkdir(parents=True, exist_ok=True)
            place /= "__init__"
        place.with_suffix(".py").write_text(HEAD + text, encoding="utf-8")


def _module(about: Entry, asked: set[str]) -> str:
    # Before the names that are asked for one by one, which take their place.
    text = "".join(f"{name} = None\n" for name in about.get("has", []) if name.isidentifier())
    own = {name.partition(":")[2] for name in asked}
    for name, methods in about.get("classes", {}).items():
        if name in own:
            continue  # one text for each class, or the wrong one is read
        text += f"class {name}:\n    pass\n" + "".join(
            f"    def {method}(self): ...\n" for method in methods
        )
    words = " ".join(f'"{word}"' for word in about.get("words", []))
    return f"{text}_WORDS = '{words}'\n"


def _function(name: str, about: Entry) -> str:
    if about["kind"] == "property":
        return f"@property\ndef {name}(self): ...\n"
    word = "async def" if about["kind"] == "coroutine" else "def"
    return f"{BINDINGS[about.get('binding', '')]}{word} {name}{about['signature']}: ...\n"


def _thing(name: str, about: Entry, below: dict[str, Entry]) -> str:
    kind = about["kind"]
    if kind == "class":
        return _class(name, about, below)
    if kind == "mapping":
        return f"{name} = dict.fromkeys({about['keys']!r})\n"
    if kind == "application":
        paths = f"[SimpleNamespace(path=path) for path in {about['routes']!r}]"
        return f"{name} = SimpleNamespace(routes={paths})\n"
    if kind in ("function", "coroutine"):
        return _function(name, about)
    return f"{name} = SimpleNamespace()\n"


def _class(name: str, about: Entry, below: dict[str, Entry]) -> str:
    if "members" in about:
        return f"{name} = enum.Enum({name!r}, {about['members']!r})\n"
    style = about.get("style", "")
    text, body = "", ""
    if style == "dataclass":
        text = "@dataclasses.dataclass(init=False)\n"
        body += "".join(f"{field}: object = None\n" for field in about["fields"])
    elif style:
        attribute = {"pydantic": "model_fields", "msgspec": "__struct_fields__"}.get(
            style, "_fields"
        )
        body += f"{attribute} = dict.fromkeys({about['fields']!r})\n"
    own = {n.rpartition(".")[2]: e for n, e in below.items()}
    if "__init__" not in own and "signature" in about:
        inner = about["signature"][1:]
        first = "self, /, " if inner.startswith("self") else "self, "
        body += f"def __init__({first if inner != ')' else 'self'}{inner}: ...\n"
    for attribute in about.get("has", []):
        known = attribute in own or attribute in about.get("fields", [])
        if not known and not attribute.startswith("__"):
            body += f"{attribute} = {about.get('values', {}).get(attribute)!r}\n"
    for attribute, entry in own.items():
        body += _function(attribute, entry) if "signature" in entry else f"{attribute} = None\n"
    given = "".join(f"    self.{attribute} = None\n" for attribute in about.get("assigns", []))
    body += f"def _assigned(self):\n{given or '    pass' + chr(10)}"
    return f"{text}class {name}:\n{textwrap.indent(body, '    ')}"

"""The fields of a class: of pydantic, of msgspec, of a data class, of a named tuple."""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import dataclass, replace

from .signatures import BOTH, NAMED, OTHERS, VARIOUS, Parameter, called, method
from .surface import Class, Module, Outside, Thing, enclosed

MODELS = ("pydantic.BaseModel", "pydantic.main.BaseModel", "pydantic_settings.BaseSettings")
STRUCTS = ("msgspec.Struct",)
TUPLES = ("typing.NamedTuple",)
ENUMS = ("enum.Enum", "enum.IntEnum", "enum.StrEnum", "enum.Flag", "enum.IntFlag")
DATACLASSES = ("dataclasses.dataclass", "pydantic.dataclasses.dataclass")


@dataclass(frozen=True)
class Field:
    """One field: whether the class is made with it, and how."""

    name: str
    default: str | None
    annotation: str
    init: bool = True
    named: bool = False
    stored: bool = True  # an InitVar is not
    alias: str = ""  # by which it is given
    line: int = 0


def style(kind: Class) -> str:
    """What its fields are made by: pydantic, msgspec, dataclass, tuple, enum; or nothing."""
    outside = set(kind.outside)
    for name, those in (("pydantic", MODELS), ("msgspec", STRUCTS), ("tuple", TUPLES)):
        if outside & set(those):
            return name
    if outside & set(ENUMS):
        return "enum"
    return "dataclass" if any(_data(one) is not None for one in kind.own) else ""


def _data(kind: Class) -> dict[str, bool] | None:
    """The options of the decorator that makes it a data class."""
    for mark in kind.node.decorator_list:
        found = kind.module.surface.expression(kind.module, called(mark))
        if _makes(found):
            keywords = mark.keywords if isinstance(mark, ast.Call) else []
            return {
                k.arg: k.value.value
                for k in keywords
                if k.arg and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
            }
    return None


def _makes(found: Thing | Module | Outside | None) -> bool:
    if isinstance(found, Outside):
        return found.name in DATACLASSES
    if isinstance(found, Thing) and isinstance(found.node, ast.FunctionDef):
        marks = [ast.unparse(called(mark)) for mark in found.node.decorator_list]
        if any(mark.endswith("dataclass_transform") for mark in marks):
            return True
        # An overload alone carries the mark.
        return f"def {found.node.name}(" in found.module.source and any(
            isinstance(node, ast.FunctionDef)
            and node.name == found.node.name
            and any("dataclass_transform" in ast.unparse(mark) for mark in node.decorator_list)
            for node in found.module.tree.body
        )
    return False


def fields(kind: Class) -> list[Field]:
    """Its fields in their order."""
    how = style(kind)
    if how in ("", "enum"):
        return []
    found: dict[str, Field] = {}
    for one in reversed(kind.own):
        options = _data(one)
        if how == "dataclass" and options is None:
            continue
        named = bool((options or {}).get("kw_only"))
        if how == "msgspec":
            named = any(
                k.arg == "kw_only" and ast.unparse(k.value) == "True" for k in one.node.keywords
            )
        for node in enclosed(one.node.body):
            if isinstance(node, ast.Assign) and how == "pydantic":
                # A plain value takes the place of a default.
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id in found:
                        before = found[target.id]
                        found[target.id] = Field(
                            target.id, ast.unparse(node.value), before.annotation, line=node.lineno
                        )
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            annotation = ast.unparse(node.annotation).strip("'\"")
            if annotation.split("[")[0].rpartition(".")[2] == "KW_ONLY":
                named = True
                continue
            field = _field(node, annotation, named)
            if annotation.split("[")[0].rpartition(".")[2] == "ClassVar":
                continue
            if how == "pydantic" and (field.name.startswith("_") or field.name == "model_config"):
                continue
            found[one.mangled(field.name)] = replace(field, name=one.mangled(field.name))
    return list(found.values())


def _field(node: ast.AnnAssign, annotation: str, named: bool) -> Field:
    assert isinstance(node.target, ast.Name)
    alias = ""
    init, default = True, ast.unparse(node.value) if node.value is not None else None
    if isinstance(node.value, ast.Call):
        made = ast.unparse(node.value.func).rpartition(".")[2]
        if made.lower() in ("field", "privateattr"):
            given = {k.arg: k.value for k in node.value.keywords}
            if isinstance(given.get("alias"), ast.Constant):
                alias = str(ast.literal_eval(given["alias"]))
                alias = alias if alias.isidentifier() and not keyword.iskeyword(alias) else ""
            if "init" in given:
                init = ast.unparse(given["init"]) != "False"
            if "kw_only" in given:
                named = ast.unparse(given["kw_only"]) == "True"
            first = node.value.args[0] if node.value.args else None
            first = given.get("default", given.get("default_factory", first))
            if first is None or ast.unparse(first) == "...":
                default = None
    stored = annotation.split("[")[0].rpartition(".")[2] != "InitVar"
    return Field(node.target.id, default, annotation, init, named, stored, alias, node.lineno)


def members(kind: Class) -> dict[str, str]:
    """The members of an enumeration, each with its value as it is written."""
    found: dict[str, str] = {}
    for one in reversed(kind.own):
        for node in enclosed(one.node.body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if re.fullmatch(r"__.*|_.*_", name) is None:
                    found[name] = ast.unparse(node.value)
    return found


def made(kind: Class) -> tuple[Parameter, ...] | None:
    """The parameters that a class is made with; None where the sources do not say it."""
    how = style(kind)
    own = ""
    for number, one in enumerate(kind.own):
        own = next((n for n in ("__new__", "__init__") if n in one.scope.names), "")
        if own:
            break
        above = any("__init__" in other.scope.names for other in kind.own[number:])
        protocol = any(isinstance(base, Outside) and base.name in PROTOCOLS for base in one.bases)
        if protocol and not above:
            return (Parameter("args", VARIOUS), Parameter("kwargs", OTHERS))
    order = kind.own
    if how in ("dataclass", "pydantic"):
        # A data class makes its own __init__, but where its body has one or it is told not to.
        for one in order:
            options = _data(one) if how == "dataclass" else {}
            if {"__new__", "__init__"} & one.scope.names.keys():
                own = "__new__" if "__new__" in one.scope.names else "__init__"
                break
            if options is not None and options.get("init", True):
                own = ""
                if how == "dataclass":
                    return _init(one)
    if own:
        found = method(kind, own)
        return found.parameters[1:] if found is not None else None
    if how == "pydantic":
        more = (Parameter("extra_data", OTHERS),) if _open(kind) else ()
        own_fields = (
            Parameter(f.alias or f.name, NAMED, f.default, f.annotation) for f in fields(kind)
        )
        return (*own_fields, *more)
    if how in ("msgspec", "tuple"):
        return _init(kind)
    if how == "enum":
        return None
    outside = [name for name in kind.outside if name not in EMPTY]
    return None if outside else ()


PROTOCOLS = ("typing.Protocol", "typing_extensions.Protocol")
EMPTY = {
    *("builtins.object", "abc.ABC", "typing.Generic", "typing_extensions.Generic"),
    *PROTOCOLS,
}


def _open(kind: Class) -> bool:
    """Whether a class of pydantic takes names that it has no field for."""
    for one in kind.own:
        config = one.scope.names.get("model_config")
        if config is not None and "extra" in ast.unparse(config):
            return bool(re.search(r"extra['\"]?\s*[=:]\s*['\"]allow", ast.unparse(config)))
    return False


def _init(kind: Class) -> tuple[Parameter, ...]:
    """What the made ``__init__`` takes: those by name alone come last."""
    wanted = [f for f in fields(kind) if f.init]
    return tuple(
        Parameter(f.name, NAMED if f.named else BOTH, f.default, f.annotation)
        for f in (*(f for f in wanted if not f.named), *(f for f in wanted if f.named))
    )


__all__ = ["OTHERS", "Field", "fields", "made", "members", "style"]

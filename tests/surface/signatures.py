"""Signatures as Python would tell them, from the text of a definition."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace

from .surface import Class, Function, Module, Outside, Thing

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
POSITIONAL, BOTH, VARIOUS, NAMED, OTHERS = "positional", "both", "*", "named", "**"
PLAIN = {  # decorators of others that change nothing that is asked for here
    *("abc.abstractmethod", "typing.override", "typing_extensions.override", "typing.final"),
    *("functools.lru_cache", "functools.cache", "typing_extensions.deprecated"),
    *("torch.no_grad", "torch.inference_mode", "torch.compiler.disable", "torch._dynamo.disable"),
    *("typing.no_type_check", "contextlib.contextmanager", "contextlib.asynccontextmanager"),
    *("functools.singledispatch", "typing.overload", "warnings.deprecated"),
    *("torch.compiler.allow_in_graph", "torch._dynamo.allow_in_graph", "torch.autocast"),
    *("torch.autograd.grad_mode.no_grad", "torch.fx.wrap", "torch.amp.custom_fwd"),
    *("typing_extensions.final", "torch._disable_dynamo", "torch.cuda.amp.custom_fwd"),
}
# They hand on what is called, not how: what they return is no coroutine function.
MANAGERS = {"contextlib.contextmanager", "contextlib.asynccontextmanager"}
PROPERTIES = {
    *("builtins.property", "functools.cached_property", "abc.abstractproperty"),
    *("enum.property", "types.DynamicClassAttribute"),
}
BINDINGS = {"builtins.staticmethod": "static", "builtins.classmethod": "class"}
# A server's routes, a validator of pydantic, a context of a command line: what they hand back is
# what they were given.
HANDING = ("get", "post", "put", "delete", "head", "options", "websocket", "api_route", "register")


@dataclass(frozen=True)
class Parameter:
    """One parameter; default and annotation as they are written."""

    name: str
    kind: str
    default: str | None = None
    annotation: str | None = None


@dataclass(frozen=True)
class Callable:
    """What is known of a function."""

    parameters: tuple[Parameter, ...]
    kind: str  # function, coroutine, property
    binding: str = ""  # static, class; empty for one that takes its instance
    doubt: str = ""  # why a run may find another one


def parameters(given: ast.arguments) -> tuple[Parameter, ...]:
    """The parameters in their order."""

    def one(arg: ast.arg, kind: str, default: ast.expr | None) -> Parameter:
        text = ast.unparse(default) if default is not None else None
        return Parameter(
            arg.arg, kind, text, ast.unparse(arg.annotation) if arg.annotation else None
        )

    positional = [(a, POSITIONAL) for a in given.posonlyargs] + [(a, BOTH) for a in given.args]
    missing = len(positional) - len(given.defaults)
    defaults: list[ast.expr | None] = [*([None] * missing), *given.defaults]
    found = [one(arg, kind, d) for (arg, kind), d in zip(positional, defaults, strict=True)]
    if given.vararg:
        found.append(one(given.vararg, VARIOUS, None))
    found += [one(a, NAMED, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        found.append(one(given.kwarg, OTHERS, None))
    return tuple(found)


def function(thing: Thing, owner: Class | None = None) -> Callable:
    """What a definition is once its decorators have run."""
    node = thing.node
    assert isinstance(node, _FUNCTIONS)
    generator = isinstance(node, ast.AsyncFunctionDef) and _yields(node)
    coroutine = isinstance(node, ast.AsyncFunctionDef) and not generator
    found = Callable(
        parameters(node.args), "coroutine" if coroutine else "function", doubt=thing.doubt
    )
    if owner is not None and node.name in ("__new__", "__init_subclass__", "__class_getitem__"):
        found = replace(found, binding="static" if node.name == "__new__" else "class")
    if owner is not None:
        own = (replace(p, name=owner.mangled(p.name)) for p in found.parameters)
        found = replace(found, parameters=tuple(own))
    for mark in reversed(node.decorator_list):
        found = _decorated(found, thing.module, mark, owner)
    return found


def _yields(node: ast.AST) -> bool:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.Yield, ast.YieldFrom)):
            return True
        nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
        if not isinstance(inner, nested) and _yields(inner):
            return True
    return False


def called(mark: ast.expr) -> ast.expr:
    """A decorator without the arguments that it is made with."""
    return mark.func if isinstance(mark, ast.Call) else mark


def _decorated(found: Callable, module: Module, mark: ast.expr, owner: Class | None) -> Callable:
    text = ast.unparse(called(mark))
    if text.endswith((".setter", ".getter", ".deleter")):
        return replace(found, kind="property")
    what = module.surface.expression(module, called(mark))
    name = what.name if isinstance(what, Outside) else ""
    if name in PROPERTIES:
        return replace(found, kind="property")
    if name == "functools.wraps" and isinstance(mark, ast.Call):
        other = module.surface.expression(module, mark.args[0])
        if isinstance(other, Thing) and isinstance(other.node, _FUNCTIONS):
            return replace(found, parameters=parameters(other.node.args))
    if name in BINDINGS:
        return replace(found, binding=BINDINGS[name])
    if name in MANAGERS:
        return replace(found, kind="function")
    if name.rpartition(".")[2] == "field_validator" and owner is not None:
        return replace(found, binding="class")  # pydantic adds what is left out
    if name in PLAIN or name.startswith("pydantic."):
        return found
    if name.startswith(("pytest.", "click.")):
        return replace(found, doubt=f"decorated by {name}")
    if isinstance(what, Thing) and isinstance(what.node, _FUNCTIONS):
        return _through(found, what, is_call=isinstance(mark, ast.Call))
    if text.rpartition(".")[2] in HANDING and "." in text:
        return found
    return replace(found, doubt=f"decorated by {text}")


def _through(found: Callable, decorator: Thing, *, is_call: bool) -> Callable:
    """What a decorator of the sources makes of a function."""
    node = decorator.node
    assert isinstance(node, _FUNCTIONS)
    wrappers = [
        inner
        for inner in ast.walk(node)
        if inner is not node
        and isinstance(inner, _FUNCTIONS)
        and any("wraps" in ast.unparse(called(mark)) for mark in inner.decorator_list)
    ]
    if wrappers and "__signature__" not in ast.unparse(node):
        kinds = {isinstance(inner, ast.AsyncFunctionDef) for inner in wrappers}
        if len(kinds) == 1:
            kind = "coroutine" if kinds == {True} and not _yields(wrappers[0]) else "function"
            return replace(found, kind=kind)
        return found  # one wrapper for each kind of function, so the kind stays
    returned = {
        ast.unparse(inner.value)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Return) and inner.value is not None
    }
    given = {arg.arg for arg in node.args.args}
    given |= {
        arg.arg
        for inner in ast.walk(node)
        if isinstance(inner, ast.FunctionDef) and inner is not node
        for arg in inner.args.args[:1]
    }
    made = (
        {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
        if is_call
        else set()
    )
    if returned and returned <= given | made:
        return found
    return replace(found, doubt=f"decorated by {decorator.module.name}.{decorator.name}")


def owner_of(kind: Class, name: str) -> Class:
    """The class of the order whose own body binds a name."""
    return next(one for one in kind.own if name in one.scope.names)


def method(kind: Class, name: str) -> Callable | None:
    """A method as the class has it, its own or one that it comes from."""
    found = kind.member(name)
    if found is None or not isinstance(found.node, _FUNCTIONS):
        return None
    return function(found, owner_of(kind, name))


def written(found: tuple[Parameter, ...]) -> tuple[str, dict[str, str]]:
    """A signature that Python can run, and the defaults that only the engine can."""
    parts, left, named = [], {}, False
    last = max((n for n, p in enumerate(found) if p.kind == POSITIONAL), default=-1)
    for number, one in enumerate(found):
        if one.kind == NAMED and not named:
            parts.append("*")
        named = named or one.kind in (NAMED, VARIOUS)
        prefix = one.kind if one.kind in (VARIOUS, OTHERS) else ""
        text = prefix + one.name + (f": {one.annotation!r}" if one.annotation else "")
        if one.default is not None:
            default = one.default
            try:
                ast.literal_eval(default)
            except (ValueError, SyntaxError):
                left[one.name], default = default, "..."
            text += f" = {default}" if one.annotation else f"={default}"
        parts.append(text)
        if number == last:
            parts.append("/")
    return f"({', '.join(parts)})", left


__all__ = ["BOTH", "NAMED", "OTHERS", "POSITIONAL", "VARIOUS", "Callable", "Function", "Parameter"]

"""The fields of a record of an engine, whatever makes it one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any


def fields(kind: Any) -> set[str]:
    """The names of the fields of a class: of pydantic, of msgspec, a data class, or any other.

    Of any other, the arguments that it is made with.
    """
    for names in ("model_fields", "__struct_fields__"):
        if hasattr(kind, names):
            return set(getattr(kind, names))
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind).parameters)

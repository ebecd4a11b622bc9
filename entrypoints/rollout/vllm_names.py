"""Any vLLM by the names that the backend knows, where it has the same under another one.

Only what an engine lacks is added, so one that has all of them is left as it is. Nothing of it is
imported before it is asked for: how vLLM is set has to be said before its first import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# A module, and where a newer vLLM has what is in it.
_MODULES = {
    "vllm.entrypoints.openai.cli_args": "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.openai.protocol": "vllm.entrypoints.serve.engine.protocol",
}
# A module with a function, and where a vLLM before 0.9 has that one.
_LOADER = "vllm.model_executor.model_loader"
_FUNCTIONS = {
    (f"{_LOADER}.utils", "process_weights_after_loading"): (
        f"{_LOADER}.loader",
        "_process_weights_after_loading",
    ),
}


class _Moved:
    """The last finder of modules: it is asked where no other one has found anything."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        there = name in _MODULES and _lies(_MODULES[name])
        return ModuleSpec(name, self) if there else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return import_module(_MODULES[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """It has run already."""


def adapt() -> None:
    """Give the installed vLLM the names that it lacks."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
    for (module, name), (other, function) in _FUNCTIONS.items():
        if _lies(other) and not hasattr(import_module(module), name):
            setattr(import_module(module), name, getattr(import_module(other), function))


def _lies(module: str) -> bool:
    """Whether a module is there, by its file: to be found otherwise its package is imported."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    folders = (spec and spec.submodule_search_locations) or ()
    return any(Path(folder, *rest).with_suffix(".py").is_file() for folder in folders)

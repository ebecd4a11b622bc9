"""What a backend's comparison asks of its engine, and what it finds: run where an engine is.

    python -m tests.surface.asked BACKEND [PROMISE …]

prints what ``rollout.backends.interface`` prints, with ``asked``: the names, in their order.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from rollout import vllm_names
from rollout.backends import interface


def main(backend: str, promised: list[str]) -> dict[str, Any]:
    """The comparison, with what it asked for."""
    asked: dict[str, None] = {}
    thing = interface.Comparison.thing

    def asking(self: interface.Comparison, *names: str) -> Any:
        asked.update(dict.fromkeys(names))
        return thing(self, *names)

    interface.Comparison.thing = asking  # type: ignore[method-assign]
    module = importlib.import_module(interface._module(backend))
    if hasattr(module, "find_spec"):
        find: Callable[[str], Any] = module.find_spec

        def finding(name: str) -> Any:
            asked[name] = None
            return find(name)

        setattr(module, "find_spec", finding)  # noqa: B010 - not every module has it
    if backend == "vllm":  # what the backend takes in place of a name that an older vLLM lacks
        for (there, _), (other, name) in vllm_names._FUNCTIONS.items():
            asked |= dict.fromkeys((there, f"{other}:{name}"))
    return interface.compared(backend, promised) | {"asked": list(asked)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        told = main(sys.argv[1], sys.argv[2:])
    print(json.dumps(told))

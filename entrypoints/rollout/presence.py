"""Calls that say "not there" where the one that they stand for raises.

Wherever that one answers at all, its answer is theirs. So :mod:`rollout.program` takes the one for
the other: nobody asks anything else by them.
"""

from __future__ import annotations

from importlib import util
from typing import Any


def find_spec(name: str) -> Any:
    """``importlib.util.find_spec``; None also where the package of a module is not there."""
    try:
        return util.find_spec(name)
    except ModuleNotFoundError:
        return None

"""``python3 -m rollout.frameworks NAME ENGINE``: import what a run touches, in this process.

Prints one JSON object: module name to what its import raised, null where it worked. A process of
its own, because engines change the process that imports them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import traceback

from rollout import frameworks


def imported(modules: list[str]) -> dict[str, str | None]:
    """What each import raised, in one line; None where it worked."""
    found: dict[str, str | None] = {}
    for name in modules:
        try:
            importlib.import_module(name)
            found[name] = None
        except BaseException as error:  # some exit, and that is a failure as well
            found[name] = traceback.format_exception_only(error)[-1].strip()
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        outcome = imported(frameworks.create(sys.argv[1], sys.argv[2]).modules())
    print(json.dumps(outcome, indent=1))

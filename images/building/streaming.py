"""A long command: its lines are shown as they come, and the last ones explain a failure."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from images.host import leash
from images.locking import lock
from rollout.problem import Problem

SAID = "error: "  # as host.guarded begins the sentence of a station
# What a failed build prints, and what it means for the person who reads it.
_FAILURES = {
    "no space left on device": "the disk is full; free some space and run it again",
    "failed to fetch": "the package index cannot be reached; check the network and UV_*/PIP_*",
    "error sending request": "the package index does not answer; check the network and UV_*/PIP_*",
    "no solution found": "the index does not have a locked version, or not the locked file of it; "
    "see the lines above for its name",
}


def meaning(output: Sequence[str], code: int) -> str:
    """One sentence for a failed build, from its last lines of output."""
    text = "\n".join(output)
    if mismatch := re.search(r"Hash mismatch for `([^`]+)`", text):
        return lock.other_file(f"the file of {mismatch[1]} has another sha256")
    text = text.lower()
    for sign, sentence in _FAILURES.items():
        if sign in text:
            return sentence
    last = next((line.strip() for line in reversed(output) if line.strip()), "no output")
    return f"the builder exited with {code}: {last}"


def run(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
    *,
    station: bool = False,
) -> None:
    """Run a long command to its end; the sentence and exit code of a station of ours are kept.

    Raises:
        Problem: the command failed.
    """
    tail: deque[str] = deque(maxlen=40)
    options = {"env": None if env is None else dict(env), "cwd": cwd, "umask": umask}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    with leash.leashed(argv, **options, **output) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            tail.append(line.rstrip())
        code = process.wait()
    if code:
        own = [line for line in tail if station and line.startswith(SAID)]
        if own:
            raise Problem(own[-1].removeprefix(SAID), code)
        raise Problem(meaning(list(tail), code))

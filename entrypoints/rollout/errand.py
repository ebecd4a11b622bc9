"""What one node of a fleet is asked: to run ``rollout`` there and to bring its report back.

Ray carries this module to the node by value, so a node of another image runs it too and can be
named. It stands on the standard library alone for that: nothing else of ours may be imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

KILLED = 20.0  # seconds from SIGTERM to SIGKILL: what an engine needs to leave its GPU
TOLD = 20.0  # seconds for `rollout info`, which takes one
SAID = 2000  # characters of what a command printed last
LARGEST = 4 << 20  # bytes of a report, as in report.py
DEVICES = "CUDA_VISIBLE_DEVICES"
_DEATH = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def surroundings(given: Mapping[str, str], proc: Path = Path("/proc")) -> dict[str, str]:
    """The variables with which this node's container was started, and the GPUs that Ray gave.

    A worker's own are not those: Ray adds its job's, and one thread for OpenMP. So they are read
    from the raylet, which is the container's own process. ``given`` are the worker's variables.
    """
    try:
        data = (proc / given.get("RAY_RAYLET_PID", "none") / "environ").read_bytes()
    except OSError:
        return dict(given)
    pairs = [pair.partition("=") for pair in os.fsdecode(data).split("\0") if "=" in pair]
    found = {name: value for name, _, value in pairs}
    # Without a GPU of Ray's this variable is empty, whatever the container has.
    return found | ({DEVICES: given[DEVICES]} if given.get(DEVICES) else {})


def _tied() -> Callable[[], None]:
    """What a child does first: it asks for a SIGTERM when the worker that started it ends.

    A driver that is interrupted has its workers killed. Without this the engine would stay behind
    and hold the GPU.
    """
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_DEATH, signal.SIGTERM, 0, 0, 0)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, or None if it did not end in time and was ended, with all that it started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED)
    with contextlib.suppress(ProcessLookupError):  # also what the leader left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def _info(rollout: str, env: Mapping[str, str]) -> dict[str, Any]:
    """What the image of this node says of itself; empty where it says nothing."""
    argv = [rollout, "info", "--json"]
    try:
        done = subprocess.run(
            argv, env=env, capture_output=True, check=False, timeout=TOLD, stdin=subprocess.DEVNULL
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str | None:
    """A report as it was written; None where there is none that can be one."""
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except OSError:
        return None
    return data.decode("utf-8", "replace") or None


def run(argv: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run ``rollout`` with these arguments on this node, for so many seconds at most.

    Returns JSON values: ``info`` (of ``rollout info``, empty if it said nothing), ``layers`` (the
    value of ROLLOUT_LAYERS, empty if unset), ``code`` (None: it did not end in time; -N: signal N
    ended it), ``report`` (the text of the file, None if there is none), ``said`` (the last it
    printed) and ``seconds`` (wall clock).
    """
    env = surroundings(os.environ)
    begun = time.monotonic()
    rollout = shutil.which("rollout", path=env.get("PATH"))
    if rollout is None:
        said = "rollout: there is no command 'rollout' on this node"
        found = {"info": {}, "layers": "", "code": 2, "report": None, "said": said}
        return {**found, "seconds": 0.0}
    with tempfile.TemporaryDirectory(prefix="rollout-fleet-") as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [rollout, *argv, "--report", str(report)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_tied(),  # prctl alone
            )
            code = _ended(process, seconds)
        said = log.read_bytes()[-4 * SAID :].decode("utf-8", "replace")[-SAID:]
        return {
            "info": _info(rollout, env),
            "layers": env.get("ROLLOUT_LAYERS", ""),
            "code": code,
            "report": _text(report),
            "said": said,
            "seconds": time.monotonic() - begun,
        }

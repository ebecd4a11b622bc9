"""A command that ends when we do, with everything that it started.

A builder starts the steps of a build as its own children. None of them notices when the process
that asked for them is gone: a smoke would hold the GPU for hours, and a build would still tag its
image.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The leader of the group. It reads nothing: the other end of its input is ours alone, and the
# kernel closes it when we end, SIGKILL included.
_WATCH = ["sh", "-c", "trap '' HUP INT QUIT TERM; read nothing; kill -s KILL 0"]
# Seconds for a builder to tidy up after itself.
GRACE = 10.0


@contextmanager
def leashed(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A running command, in a process group of its own; the group is gone at the end.

    It has no input: a terminal stops every group that reads, but for the one in front.

    Raises:
        OSError: the command cannot be started.
    """
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    watch = subprocess.Popen(_WATCH, stdin=subprocess.PIPE, process_group=0, **quiet)
    options.setdefault("stdin", subprocess.DEVNULL)
    process = None
    try:
        process = subprocess.Popen(list(argv), process_group=watch.pid, text=True, **options)
        yield process
    finally:
        _end(watch, process)


def _end(watch: subprocess.Popen[bytes], process: subprocess.Popen[str] | None) -> None:
    try:
        if process and process.poll() is None:
            os.killpg(watch.pid, signal.SIGTERM)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass  # it had its time to tidy up
    finally:
        # The watch is still in the group, so the number still names this group and no other.
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()
        if watch.stdin:
            watch.stdin.close()
        if process:
            process.wait()
            if process.stdout:
                process.stdout.close()


def run(argv: Sequence[str], **options: Any) -> int:
    """Run a command to its end, its output shown as it comes; returns its exit code."""
    with leashed(argv, **options) as process:
        return process.wait()


def ended(variable: str, value: str) -> None:
    """End every process with this variable in its environment, also one that left the group."""
    wanted = f"{variable}={value}".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            with open(f"{entry.path}/environ", "rb") as file:  # noqa: PTH123 - one call a process
                if wanted in file.read().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended, or is somebody else's

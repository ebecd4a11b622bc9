"""Real Ray nodes of the images, each in a process tree of its own, on this machine's loopback."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from images import catalog
from images.locking import lock
from rollout.backends.served import free_port

STARTED = 180.0  # seconds for a node, on a machine that does other things too
SHM = 200 << 20  # bytes; Ray's store of objects asks for 75 MiB at least
DRIVEN = 900.0  # seconds for a command beside a node: `rollout verify` reads gigabytes


def with_ray() -> dict[str, str]:
    """The images that have Ray, and which; without those that nobody can build here."""
    found = {}
    for image in catalog.load():
        locked = lock.read(image)
        versions = {entry.name: entry.version for entry in locked}
        if "ray" in versions and not lock.unlocked(locked):
            found[image.reference] = versions["ray"]
    return found


RAYS = with_ray()


@dataclass
class Node:
    """A Ray node in a container of an image, as an ordinary user and with a /dev/shm of its own."""

    image: str
    root: Path
    folder: Path
    env: dict[str, str]
    _process: subprocess.Popen[bytes] | None = field(default=None)
    _log: IO[bytes] | None = field(default=None)

    def argv(self, *command: str, env: Mapping[str, str]) -> list[str]:
        """A command inside. Its processes see no others, so nobody's Ray is taken for theirs."""
        root = shlex.quote(str(self.root))
        steps = [
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o size={SHM},mode=1777 shm {root}/dev/shm",
            f"mount --bind {shlex.quote(str(self.folder))} {root}/tmp",
        ]
        pairs = [f"{name}={value}" for name, value in {**self.env, **env}.items()]
        chroot = ["chroot", "--userspec=12345:0", "--groups=", str(self.root)]
        # The shell stays as process 1. Were the command that, nothing would end it with its parent:
        # a change of the user takes back what --kill-child has arranged.
        inside = shlex.join([*chroot, "/usr/bin/env", "-i", *pairs, *command])
        script = "; ".join([*steps, f"{inside} || exit $?", "exit 0"])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script]

    def start(self, *how: str, **env: str) -> None:
        """``ray start`` with these arguments, by the image's own entrypoint."""
        ports = [
            f"--{name}-port={free_port()}"
            for name in (
                *("node-manager", "object-manager", "metrics-export", "runtime-env-agent"),
                *("dashboard-agent-listen", "dashboard-agent-grpc"),
            )
        ]
        fixed = [
            *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", "--block"),
            *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
            f"--object-store-memory={80 << 20}",
        ]
        argv = self.argv("rollout", "ray", "start", *how, *ports, *fixed, env=env)
        self._log = (self.folder / "ray-start.log").open("wb")
        self._process = subprocess.Popen(argv, stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        """What it has written so far."""
        return (self.folder / "ray-start.log").read_text(encoding="utf-8", errors="replace")

    def ended(self) -> int | None:
        """Its exit code once it has ended."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether something becomes true before it ends or the time is over."""
        end = time.monotonic() + STARTED
        while time.monotonic() < end:
            if until():
                return True
            if self.ended() is not None:
                return until()
            time.sleep(0.2)
        return False

    def drive(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the image beside this node, as ``docker exec`` would."""
        assert self._process is not None
        (child,) = self._children()
        pairs = [f"{name}={value}" for name, value in self.env.items()]
        argv = [
            *("nsenter", "--target", str(child), "--mount", "--pid"),
            *("chroot", "--userspec=12345:0", "--groups=", str(self.root)),
            *("/usr/bin/env", "-i", *pairs, *command),
        ]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=DRIVEN)

    def _children(self) -> list[int]:
        """Process 1 of this node's namespaces, as the host calls it; with it all others end."""
        assert self._process is not None
        pid = self._process.pid
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        except FileNotFoundError:
            return []
        return [int(word) for word in text.split()]

    def stop(self) -> None:
        """End it with all that it started."""
        if self._process is not None:
            for child in self._children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()


JOINED = "Ray runtime started."


def head(one: Node) -> str:
    """Start the head of a cluster on this node; returns its address."""
    port = free_port()
    one.start("--head", f"--port={port}", "--include-dashboard=false")
    assert one.wait(lambda: JOINED in one.said), one.said
    return f"127.0.0.1:{port}"


def join(one: Node, address: str, **env: str) -> bool:
    """Have this node join a cluster; whether it was let in."""
    one.start(f"--address={address}", **env)
    let_in = one.wait(lambda: JOINED in one.said)
    assert let_in or one.ended() not in (None, 0), one.said
    return let_in

"""Ray nodes of these images form one cluster: two of one image, two of two images.

They are real nodes, each in a process tree of its own, and talk over this machine's loopback. The
default image has no Ray; one that is not built here is skipped with the command that builds it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from images import catalog
from images.building.buildah import Buildah
from images.locking import base, lock
from rollout.backends.served import free_port

pytestmark = pytest.mark.image

LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
STARTED = 180.0  # seconds for a node, on a machine that does other things too
SHM = 200 << 20  # bytes; Ray's store of objects asks for 75 MiB at least
# What Python says of itself, changed before Ray asks: it is the next patch release then.
ANOTHER_PYTHON = """\
import collections, sys
v = sys.version_info
kind = collections.namedtuple("version_info", "major minor micro releaselevel serial")
sys.version_info = kind(v.major, v.minor, v.micro + 1, v.releaselevel, v.serial)
"""
# Asked on the head: the nodes that are there, and what a task on each of them sees.
DRIVER = """\
import json, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def seen():
    return ".".join(map(str, sys.version_info[:3]))

alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
found = [ray.get(seen.options(scheduling_strategy=On(node, soft=False)).remote()) for node in alive]
print("SEEN " + json.dumps(sorted(found)))
"""


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


def reads_the_level(version: str) -> bool:
    """Whether a Ray takes the level from the variable; the one before 2.51 has it fixed."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (2, 51)


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

    def ask(self, address: str) -> list[str]:
        """A driver beside this node asks every node of the cluster for its Python."""
        assert self._process is not None
        (child,) = self._children()
        pairs = [f"{name}={value}" for name, value in self.env.items()]
        argv = [
            *("nsenter", "--target", str(child), "--mount", "--pid"),
            *("chroot", "--userspec=12345:0", "--groups=", str(self.root)),
            *("/usr/bin/env", "-i", *pairs, "rollout", "python3", "-c", DRIVER, address),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=STARTED)
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN "))
        seen: list[str] = json.loads(line.removeprefix("SEEN "))
        return seen

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


@pytest.fixture
def node(tool: Buildah, tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Makes nodes of images that are built here, and removes them."""
    made: list[Node] = []
    containers: list[str] = []

    def make(reference: str) -> Node:
        built = tool.inspect(tool.local + reference)
        if built is None:
            pytest.skip(f"{reference} is not built here: nox -s build -- {reference}")
        name = f"test-{uuid.uuid4().hex[:12]}"
        argv = ["buildah", "from", "--pull-never", "--name", name, tool.local + reference]
        subprocess.run(argv, check=True, capture_output=True)
        containers.append(name)
        mounted = subprocess.run(
            ["buildah", "mount", name], check=True, capture_output=True, text=True
        )
        folder = tmp_path / f"node{len(made)}"
        folder.mkdir()
        folder.chmod(0o1777)
        env = dict(pair.split("=", 1) for pair in built.config["Env"])
        made.append(Node(reference, Path(mounted.stdout.strip()), folder, env))
        return made[-1]

    yield make
    for one in made:
        one.stop()
    for name in containers:
        subprocess.run(["buildah", "rm", name], check=False, capture_output=True)


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


def another_python(one: Node) -> dict[str, str]:
    """Variables with which a node's Python is the next patch release."""
    folder = one.folder / "another-python"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ANOTHER_PYTHON, encoding="utf-8")
    return {"PYTHONPATH": "/tmp/another-python"}


@pytest.mark.parametrize("reference", RAYS)
def test_two_nodes_of_one_image_are_one_cluster(
    node: Callable[[str], Node], reference: str
) -> None:
    first, second = node(reference), node(reference)
    address = head(first)
    assert join(second, address)
    assert first.ask(address) == [base.python("3.11")] * 2


@pytest.mark.parametrize("reference", RAYS)
def test_another_patch_release_of_python_joins_where_the_image_says_so(
    node: Callable[[str], Node], reference: str
) -> None:
    """Control: without the variable Ray turns the same node away."""
    first, strict, second = node(reference), node(reference), node(reference)
    address = head(first)
    assert not join(strict, address, **another_python(strict), **{LEVEL: "patch"})
    assert "Version mismatch" in strict.said, strict.said
    joined = join(second, address, **another_python(second))
    assert joined == (second.env.get(LEVEL) == "minor") == reads_the_level(RAYS[reference])
    if joined:
        assert len(set(first.ask(address))) == 2


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(RAYS, 2)])
def test_nodes_of_two_images_are_one_cluster_where_their_ray_is_the_same(
    node: Callable[[str], Node], one: str, other: str
) -> None:
    # Another Ray ends in many ways, not always in a word about versions: no node is what counts.
    first, second = node(one), node(other)
    address = head(first)
    assert join(second, address) == (RAYS[one] == RAYS[other])
    assert len(first.ask(address)) == 1 + (RAYS[one] == RAYS[other])

"""A built image, and ways to run it: as a container, and sealed off as a strict cluster would.

The image is built first where it is not there yet. What cannot be built here (no root, no Debian)
skips these tests with the sentence that says why.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from images import catalog
from images.building import build, builder, builders
from images.building.buildah import Buildah
from rollout.problem import Problem

from .ray_nodes import Node

Result = subprocess.CompletedProcess[str]
STARTED = "test: the command is started"


@dataclass
class Container:
    """A working container: its file system is writable, and thrown away at the end."""

    name: str
    root: Path
    tool: Buildah

    def run(self, *argv: str, user: str = "") -> Result:
        """Run a command in it, its output kept."""
        return self.execute(builder.Command("", argv, user))

    def execute(self, command: builder.Command) -> Result:
        """Run a command with all its options in it, its output kept.

        A builder that fails before it has started the command ends with 1, as a check that failed
        does. So the command says that it was started; where it did not, nothing of the image was
        tried, and it is run once more.
        """
        started = replace(
            command, argv=("sh", "-c", f'echo {STARTED} >&2; exec "$@"', "sh", *command.argv)
        )
        argv = self.tool.run_argv(started, self.name)
        for _ in range(2):
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if f"{STARTED}\n" in done.stderr:
                done.stderr = done.stderr.replace(f"{STARTED}\n", "", 1)
                return done
            print(f"buildah run did not start {command.argv[0]}: {done.stderr}")
        raise AssertionError(f"buildah run exited with {done.returncode}: {done.stderr}")


@dataclass
class Sealed:
    """How an image runs on a strict cluster: read-only root, no network, a UID of its own."""

    root: Path
    cache: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *argv: str, uid: int = 12345) -> Result:
        """Run a command without HOME, with the cache folder alone to write into."""
        root, cache = shlex.quote(str(self.root)), shlex.quote(str(self.cache))
        steps = [
            # What a container without a network has; a Ray node talks to itself over it.
            "if command -v ip >/dev/null; then ip link set lo up; fi",
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o size=64m shm {root}/dev/shm",  # what container engines give
            f"mount --bind {cache} {root}/var/cache/rollout",
            f"mount -o remount,bind,ro {root}",
        ]
        env = [f"{k}={v}" for k, v in self.env.items() if k != "HOME"]
        chroot = ["chroot", f"--userspec={uid}:0", "--groups=", str(self.root)]
        script = "; ".join(
            [*steps, "exec " + shlex.join([*chroot, "/usr/bin/env", "-i", *env, *argv])]
        )
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-euc", script]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def image() -> catalog.Image:
    """The default image of the catalog."""
    return catalog.find(catalog.DEFAULT, catalog.load())


@pytest.fixture(scope="session")
def tool() -> Buildah:
    """The builder whose digests count."""
    if os.geteuid() != 0:
        pytest.skip("these tests enter images by chroot, which needs root")
    try:
        found = builders.detect("buildah")
    except Problem as problem:
        pytest.skip(problem.sentence)
    assert isinstance(found, Buildah)
    return found


@pytest.fixture(scope="session")
def built(image: catalog.Image, tool: Buildah) -> builder.Built:
    """The default image, built; from the cache where nothing changed."""
    return build.build(image, tool)


@contextmanager
def containers(tool: Buildah, built: builder.Built) -> Iterator[Callable[[], Container]]:
    """Makes working containers of an image, and removes them."""
    made: list[str] = []

    def make() -> Container:
        name = f"test-{uuid.uuid4().hex[:12]}"
        argv = ["buildah", "from", "--pull-never", "--name", name, built.id]
        subprocess.run(argv, check=True, capture_output=True)
        made.append(name)
        mounted = subprocess.run(
            ["buildah", "mount", name], check=True, capture_output=True, text=True
        )
        return Container(name, Path(mounted.stdout.strip()), tool)

    try:
        yield make
    finally:
        for name in made:
            subprocess.run(["buildah", "rm", name], check=False, capture_output=True)


@pytest.fixture
def container(tool: Buildah, built: builder.Built) -> Iterator[Callable[[], Container]]:
    """Makes working containers, and removes them."""
    with containers(tool, built) as make:
        yield make


@pytest.fixture
def sealed(container: Callable[[], Container], built: builder.Built, tmp_path: Path) -> Sealed:
    """The image as a strict cluster runs it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    os.chown(cache, 0, 0)
    env = dict(pair.split("=", 1) for pair in built.config["Env"])
    return Sealed(container().root, cache, env)


def built_here(tool: Buildah, reference: str) -> builder.Built:
    """An image that is built here; the test is skipped where it is not."""
    found = tool.inspect(tool.local + reference)
    if found is None:
        pytest.skip(f"{reference} is not built here: nox -s build -- {reference}")
    return found


@pytest.fixture
def node(tool: Buildah, tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Makes nodes of images that are built here, and removes them."""
    made: list[Node] = []
    containers: list[str] = []

    def make(reference: str) -> Node:
        built = built_here(tool, reference)
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


def lines(result: Result) -> Sequence[str]:
    """Everything that a command printed, by lines."""
    return (result.stdout + result.stderr).splitlines()

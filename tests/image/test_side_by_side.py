"""Builds, proofs and other people's work side by side in one storage, with the real builder.

The storage is one of the test's own, and the images are a shell and little more, so this takes
seconds and nothing else on this machine is touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from images import catalog
from images.building.buildah import Buildah
from images.catalog import ROOT
from images.host import leftovers
from images.proving import reproduce
from images.publishing import oci

from ..layout import read

pytestmark = pytest.mark.image
IMAGE = catalog.find(catalog.DEFAULT, catalog.load())
NAME = f"localhost/{IMAGE.reference}"
PROGRAMS = ("sh", "sleep", "touch", "cat", "setsid")

# A station as it is, but for the files of the images: what is in them takes minutes to make.
PROGRAM = """
import os, sys
from pathlib import Path
from images import host
from images.building import budget, build, export, layers
from images.locking import base, resolution
from images.proving import proofs, prove

build.BUILD = Path(os.environ["CHECKOUT"]) / "build"
base.tarball = lambda _=None: Path(os.environ["TOY"])
build.recipe_text = lambda *_: os.environ["STEPS"]
build.base_needs = lambda _: []
budget.check = lambda *_: None
layers.read = lambda _: None  # the record is of the image that this toy stands for
resolution.resolve = lambda image: image.lock.read_text()
proofs.read = lambda *_: {}  # the toy's verify has no report that says anything
station = {"build": build, "export": export, "prove": prove}[sys.argv[1]]
raise SystemExit(host.guarded(station.main, sys.argv[2:]))
"""
# A smoke that goes on for long, with a child in a group of its own.
ROLLOUT = """#!/bin/sh
case $1 in
    verify) echo '{}' > "$3" ;;
    smoke) setsid sleep 6543 & echo begun > /report/begun; sleep 6544 ;;
esac
"""


class Machine:
    """A machine with one storage, two checkouts and a toy for an image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.cache = folder / "cache"
        for place in (self.temporary, self.cache):
            place.mkdir()
        conf = folder / "storage.conf"
        conf.write_text(reproduce.storage_conf(folder), encoding="utf-8")
        self.env = {
            "CONTAINERS_STORAGE_CONF": str(conf),
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.cache),
            "TOY": str(self.root()),
            "STEPS": "ARG BASE\nFROM ${BASE}\nUSER 0\nRUN touch /one\nRUN touch /two\n",
            "CHECKOUT": str(folder / "one"),
        }
        for name in ("one", "two"):
            (folder / name).mkdir()

    def root(self) -> Path:
        """The tar of a root file system that has a shell."""
        path = self.folder / "toy.tar"
        found = [Path("/bin") / name for name in PROGRAMS]
        linked = subprocess.run(["ldd", *found], capture_output=True, text=True, check=True)
        words = {word for line in linked.stdout.splitlines() for word in line.split()}
        libraries = sorted(Path(word) for word in words if word.startswith("/") and ".so" in word)
        with tarfile.open(path, "w") as tar:
            for file in (*found, *libraries):
                tar.add(file.resolve(), str(file)[1:])
            own = self.folder / "rollout"
            own.write_text(ROLLOUT)
            own.chmod(0o755)
            tar.add(own, "bin/rollout")
        return path

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start one of our stations; it goes on."""
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env={**os.environ, **self.env, "PYTHONPATH": str(ROOT), **env},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def build(self, *options: str, **env: str) -> str:
        """Build the toy to the end; returns its id."""
        process = self.start("build", IMAGE.reference, *options, **env)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return self.inspect(NAME)

    def inspect(self, name: str) -> str:
        """The id of an image; empty where there is none of that name."""
        with reproduce.variables(self.env):
            found = Buildah().inspect(name)
        return found.id if found else ""

    def buildah(self, *arguments: str) -> str:
        """What a person does with buildah in this storage."""
        argv = ["buildah", *arguments]
        done = subprocess.run(
            argv, env={**os.environ, **self.env}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def containers(self) -> list[str]:
        """The names of all containers of the storage."""
        return self.buildah("containers", "--format", "{{.ContainerName}}").split()

    def temporaries(self) -> list[str]:
        """Temporary files and folders that are left."""
        places = (
            self.temporary,
            self.cache / "verl-rollout" / "scratch",
            self.folder / "one/build",
        )
        return [path.name for place in places if place.exists() for path in place.iterdir()]


@pytest.fixture
def machine(tool: Buildah, tmp_path: Path) -> Iterator[Machine]:  # noqa: ARG001
    """As root and with buildah, or these tests are skipped with the reason."""
    yield Machine(tmp_path)
    leftovers.discard(tmp_path)


def processes(*argv: str) -> list[int]:
    """The processes with this command line, in whatever container."""
    wanted, found = "".join(f"{word}\0" for word in argv).encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cmdline").read_bytes() == wanted:
                found.append(int(entry.name))
    return found


def sleepers(seconds: int) -> list[int]:
    """The processes that sleep for so long."""
    return processes("sleep", str(seconds))


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.1)
    return False


SLOW = "ARG BASE\nFROM ${BASE}\nUSER 0\nRUN touch /one\nRUN sleep 5; touch /two\nRUN touch /three\n"


def test_two_clones_that_build_at_once_both_end_well_with_the_same_image(machine: Machine) -> None:
    alone = machine.build("--no-cache", STEPS=SLOW)
    machine.buildah("rmi", "--all", "--force")
    one = machine.start("build", IMAGE.reference, "--no-cache", STEPS=SLOW)
    lock = machine.folder / "graphroot" / "verl-rollout" / "lock"
    assert within(30, lambda: f"-{one.pid}-" in lock.read_text())
    checkout = str(machine.folder / "two")
    two = machine.start("build", IMAGE.reference, "--no-cache", STEPS=SLOW, CHECKOUT=checkout)
    said = [process.communicate()[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), said
    assert [f"{NAME} is {alone}" in text for text in said] == [True, True], said
    assert f"another build (process {one.pid}) is running in this storage" in said[1]
    assert machine.inspect(NAME) == alone
    assert machine.containers() == []


def test_a_users_own_build_on_top_of_ours_is_left_alone(machine: Machine) -> None:
    machine.build()
    theirs = machine.buildah("from", "--pull-never", NAME)
    sign = machine.folder / "sign"
    sign.mkdir()
    os.mkfifo(sign / "go")  # a step that reads it waits until somebody writes
    file = machine.folder / "Dockerfile"
    steps = ("USER 0", "RUN touch /mine", "RUN cat /sign/go", "RUN touch /end")
    file.write_text("\n".join([f"FROM {NAME}", *steps, ""]))
    argv = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers"]
    user = subprocess.Popen(
        [*argv, "-t", "mine:1", "-v", f"{sign}:/sign", "-f", file, machine.folder / "two"],
        env={**os.environ, **machine.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert within(30, lambda: bool(processes("cat", "/sign/go")))
        before = machine.containers()
        machine.build()
        machine.build("--no-cache")
        assert set(before) <= set(machine.containers())
        (sign / "go").write_text("go")
        said, _ = user.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(user.pid, signal.SIGKILL)
    assert user.returncode == 0, said
    assert machine.inspect("localhost/mine:1")
    assert machine.containers() == [theirs]


def test_a_build_that_is_killed_goes_on_nowhere_and_the_next_one_clears_up(
    machine: Machine,
) -> None:
    slow = SLOW.replace("sleep 5", "sleep 6542")
    process = machine.start("build", IMAGE.reference, STEPS=slow)
    assert within(20, lambda: bool(sleepers(6542)))
    process.kill()
    process.communicate()
    assert within(5, lambda: not sleepers(6542)), "the builder went on without whoever asked for it"
    assert machine.inspect(NAME) == ""
    assert machine.containers() != [], "else there is nothing to clear up"
    assert machine.temporaries() != []
    machine.build()
    assert machine.containers() == []
    assert [name for name in machine.temporaries() if name.startswith("rollout-")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_proof_that_is_ended_leaves_no_smoke_no_container_and_no_folder(
    machine: Machine, number: signal.Signals
) -> None:
    process = machine.start("prove", IMAGE.reference)
    try:
        assert within(30, lambda: bool(sleepers(6544) and sleepers(6543)))
        process.send_signal(number)
        said, _ = process.communicate()
        assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), said
        assert within(5, lambda: not sleepers(6544)), "the smoke went on"
        if number == signal.SIGKILL:  # what no handler can do is done by the next start
            assert machine.containers() != []
            machine.build()
    finally:
        for pid in (*sleepers(6543), *sleepers(6544)):
            os.kill(pid, signal.SIGKILL)
    assert machine.containers() == []
    assert machine.temporaries() == []


def test_an_export_is_of_todays_image_whoever_has_its_name(machine: Machine) -> None:
    ours = machine.build()
    machine.start("build", IMAGE.reference, STEPS=SLOW).communicate()
    assert machine.inspect(NAME) != ours, "another checkout has built an image of its own"
    process = machine.start("export", IMAGE.reference, "--format", "oci", "--output", "out")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    (archive,) = (machine.folder / "out").iterdir()
    with tarfile.open(archive) as tar:
        # Python 3.11.2, which is Debian 12's, has no filter yet; the archive is our own.
        tar.extractall(machine.folder / "layout")  # noqa: S202
    data, _ = read(machine.folder / "layout")
    assert oci.parse(data).config.digest == f"sha256:{ours}"
    changed = machine.env["STEPS"] + "RUN touch /three\n"
    stale = machine.start("export", IMAGE.reference, "--format", "oci", STEPS=changed)
    said, _ = stale.communicate()
    assert stale.returncode == 3, said
    assert f"build it with 'nox -s build -- {IMAGE.reference}'" in said

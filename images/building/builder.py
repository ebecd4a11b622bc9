"""The builders: buildah (the one whose digests count) and docker, behind one small interface.

Methods ending in ``_argv`` are pure; the others run them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from images import host
from images.building import isolation
from images.host import leash, leftovers, owner
from rollout.problem import Problem

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
        what = f"the file of {mismatch[1]} has another sha256 than the lock"
        return f"{what}; restore the lock, or remake it if you trust the new file"
    text = text.lower()
    for sign, sentence in _FAILURES.items():
        if sign in text:
            return sentence
    last = next((line.strip() for line in reversed(output) if line.strip()), "no output")
    return f"the builder exited with {code}: {last}"


def stream(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
) -> None:
    """Run a long command, show its lines as they come, and keep the last ones to explain a failure.

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
        raise Problem(meaning(list(tail), code))


@dataclass(frozen=True)
class Recipe:
    """What a builder needs to know to build: a context, and everything that is not in it."""

    context: Path
    name: str
    timestamp: int  # of every file and of the image itself, in seconds since 1970
    arguments: Mapping[str, str] = field(default_factory=dict)
    fetched: Path | None = None  # uv's cache, which steps mount; they have no network
    cache: bool = True


@dataclass(frozen=True)
class Command:
    """Something to run in a fresh container of an image."""

    image: str
    argv: Sequence[str]
    user: str = ""
    volumes: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """An image in a builder's storage, ``id`` is what that calls it by."""

    id: str
    config: Mapping[str, Any]
    diff_ids: tuple[str, ...]
    manifest: str = ""  # its digest; empty where a storage keeps none
    about: Mapping[str, Any] = field(default_factory=dict)  # what a manifest holds beside these


class Builder(ABC):
    """What a builder can do. ``local`` is the prefix of images in its own storage."""

    name: ClassVar[str]
    local: ClassVar[str] = ""

    @abstractmethod
    def storage(self) -> Path:
        """The folder that holds its images."""

    def copies(self) -> int:
        """How many times the room of an image its storage takes."""
        return 1

    @abstractmethod
    def own(self) -> Path:
        """The folder for what we keep of this storage."""

    @abstractmethod
    def inspect(self, name: str) -> Built | None:
        """An image of its storage by name or id, None where there is none."""

    @abstractmethod
    def run(self, command: Command) -> int:
        """Run a command in a fresh container, and remove the container; returns its exit code."""

    @abstractmethod
    def writer(self, folder: Path) -> str:
        """The user of a container that has to write into a folder of this host, made so it can."""

    @abstractmethod
    def build(self, recipe: Recipe) -> str:
        """Build a recipe, showing progress; returns what :meth:`inspect` finds the result by."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what our own killed runs have left in the storage."""

    @abstractmethod
    def tags(self, repository: str) -> list[str]:
        """The tags that images of this name have in the storage."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """Take a name from its image, and the image away where it has no other; false if in use."""


def _pairs(flag: str, values: Mapping[str, str]) -> list[str]:
    return [part for key, value in sorted(values.items()) for part in (flag, f"{key}={value}")]


def _common(recipe: Recipe) -> list[str]:
    """What buildah and docker call by the same names."""
    fetched = ["--build-context", f"fetched={recipe.fetched}"] if recipe.fetched else []
    return [
        *([] if recipe.cache else ["--no-cache"]),
        *_pairs("--build-arg", recipe.arguments),
        *fetched,
        *("--tag", recipe.name, "--file", str(recipe.context / "Dockerfile"), str(recipe.context)),
    ]


def _run_options(command: Command) -> list[str]:
    return [
        *(["--user", command.user] if command.user else []),
        *(p for s, t in sorted(command.volumes.items()) for p in ("--volume", f"{s}:{t}")),
        *_pairs("--env", command.env),
    ]


_NAME = "rollout-container-"
# Under this variable what runs in one of our containers has the container's name.
CONTAINER = "ROLLOUT_CONTAINER"
# buildah says of every container which file of mounts it was made with. A build's containers have
# names of buildah's own, so this is where their owner stands; there is no such file.
_MARK = "/nonexistent/rollout-build-"


class Buildah(Builder):
    """buildah: no daemon, no registry, and a timestamp of our choice on every file."""

    name = "buildah"
    local = "localhost/"

    def _store(self) -> Mapping[str, Any]:
        said = host.run(["buildah", "info"], quiet=True).stdout
        found: Mapping[str, Any] = json.loads(said)["store"]
        return found

    def storage(self) -> Path:
        return Path(self._store()["GraphRoot"])

    def copies(self) -> int:
        # Of each layer a copy of all below it, and while it is made another one.
        return 3 if self._store()["GraphDriverName"] == "vfs" else 1

    def own(self) -> Path:
        return self.storage() / "verl-rollout"

    def build(self, recipe: Recipe) -> str:
        # What buildah works on lies below TMPDIR: what a killed one leaves there is found.
        own = leftovers.buildah()
        own.mkdir(parents=True, exist_ok=True)
        with leftovers.temporary("id", host.scratch()) as folder:
            file, place = folder / "id", folder / "fetched"
            place.mkdir()
            seen = replace(recipe, fetched=recipe.fetched and isolation.view(place))
            argv = self.build_argv(seen, file)
            env = isolation.environment({"TMPDIR": str(own), **os.environ})
            stream(isolation.command(argv, os.geteuid(), recipe.fetched, place), env)
            return file.read_text(encoding="utf-8").strip().removeprefix("sha256:")

    def build_argv(self, recipe: Recipe, file: Path) -> list[str]:
        """The command that builds a recipe, tags the result, and writes its id into a file."""
        return [
            *("buildah", "--default-mounts-file", f"{_MARK}{owner.this()}", "bud"),
            # chroot: the isolation that needs no OCI runtime and works inside a container too. Its
            # network and processes are those of buildah itself, which is kept apart (isolation.py).
            *("--isolation", "chroot", "--format", "oci", "--network", "host"),
            # A proxy's address may hold a password, and without a network nobody needs it.
            "--http-proxy=false",
            # The identity label would put the version of buildah into every image.
            *("--layers", "--timestamp", str(recipe.timestamp), "--identity-label=false"),
            *("--iidfile", str(file), *_common(recipe)),
        ]

    def inspect(self, name: str) -> Built | None:
        done = host.run(["buildah", "inspect", "--type", "image", name], quiet=True, check=False)
        if done.returncode:
            return None
        data = json.loads(done.stdout)
        image = data["OCIv1"]
        about = {key: image.get(key) for key in ("created", "architecture", "os", "history")}
        about["annotations"] = data.get("ImageAnnotations")
        layers = tuple(image["rootfs"]["diff_ids"])
        return Built(data["FromImageID"], image["config"], layers, data["FromImageDigest"], about)

    def version(self) -> str:
        """Name and release: another one may write another manifest of the same layers.

        Without root it may write other layers of the same files, so that is told apart too.
        """
        release = " ".join(host.run(["buildah", "--version"], quiet=True).stdout.split()[::2][:2])
        return release if os.geteuid() == 0 else f"{release} without root"

    def blobs(self, name: str, folder: Path) -> list[Path]:
        """The uncompressed layers of an image, from the lowest up: files named by their sha256."""
        target = folder / "image"
        argv = ["buildah", "push", "--quiet", "--disable-compression", name, f"dir:{target}"]
        host.run(argv, quiet=True)
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        return [target / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A working container of an image; removed at the end, whatever happened."""
        name = f"{leftovers.name('container')}{uuid.uuid4().hex[:8]}"
        try:
            # In here: what a signal interrupts may be there already.
            host.run(["buildah", "from", "--pull-never", "--name", name, image], quiet=True)
            yield name
        finally:
            self._remove_container(name, name)

    def _remove_container(self, name: str, reference: str) -> None:
        leash.ended(CONTAINER, name)
        host.run(["buildah", "rm", reference], quiet=True, check=False)

    def writer(self, folder: Path) -> str:
        if os.geteuid() != 0:
            return "0:0"  # without root, this host's user is root inside, and only there
        os.chown(folder, 1000, 0)
        return "1000:0"

    def sweep(self) -> None:
        listed = host.run(["buildah", "containers", "--json"], quiet=True).stdout
        for entry in json.loads(listed) or []:
            whose = self.owner_of(entry)
            if whose and owner.dead(whose):
                self._remove_container(entry["containername"], entry["id"])

    def owner_of(self, container: Mapping[str, str]) -> owner.Owner | None:
        """Whose an entry of ``buildah containers --json`` is; None for what is not ours.

        Other people build on this machine too, on our images among others.
        """
        name = container["containername"]
        if name.startswith(_NAME):
            return owner.parse(name)
        if not re.search(r"working-container(-\d+)?$", name):
            return None
        argv = ["buildah", "inspect", "--type", "container", container["id"]]
        done = host.run(argv, quiet=True, check=False)
        if done.returncode:
            return None  # gone in between
        mark = str(json.loads(done.stdout).get("DefaultMountsFilePath", ""))
        return owner.parse(mark) if mark.startswith(_MARK) else None

    def tags(self, repository: str) -> list[str]:
        argv = ["buildah", "images", "--format", "{{.Tag}}", "--filter", f"reference={repository}"]
        return host.run(argv, quiet=True).stdout.split()

    def remove(self, name: str) -> bool:
        return host.run(["buildah", "rmi", name], quiet=True, check=False).returncode == 0

    def run_argv(self, command: Command, container: str) -> list[str]:
        """The command that runs something in a working container."""
        options = _run_options(command)
        return ["buildah", "run", "--isolation", "chroot", *options, container, "--", *command.argv]

    def run(self, command: Command) -> int:
        # buildah lays out each run below TMPDIR, and leaves that behind where it is killed.
        with leftovers.temporary("run") as folder, self.container(command.image) as container:
            inside = replace(command, env={**command.env, CONTAINER: container})
            env = {**os.environ, "TMPDIR": str(folder)}
            return leash.run(self.run_argv(inside, container), env=env)


@cache
def _say_classic() -> None:
    """Said once, not for base and image each."""
    host.say(
        "docker's classic image store keeps the time of each file: the image will have the same "
        "files as another build's, and another digest; its containerd image store gives the same "
        "digest"
    )


class Docker(Builder):
    """docker with BuildKit: the same Dockerfile, for people who have it already."""

    name = "docker"

    def storage(self) -> Path:
        info = host.run(["docker", "info", "--format", "{{.DockerRootDir}}"], quiet=True)
        return Path(info.stdout.strip())

    def own(self) -> Path:
        return host.cache() / "docker"  # its storage is the engine's, not its users'

    def build_argv(self, recipe: Recipe) -> list[str]:
        """The command that builds a recipe and tags the result."""
        return [*self._build(recipe), "--output", "type=docker", *_common(recipe)]

    def archive_argv(self, recipe: Recipe, archive: Path) -> list[str]:
        """The command that builds into an archive, which is where BuildKit rewrites times."""
        output = f"type=docker,rewrite-timestamp=true,dest={archive}"
        return [*self._build(recipe), "--output", output, *_common(recipe)]

    def _build(self, recipe: Recipe) -> list[str]:
        return [
            # Not `docker buildx build`: that takes whichever builder a person has chosen, and one
            # in a container of its own does not see this storage.
            *("docker", "build", "--network", "none", "--provenance=false", "--progress", "plain"),
            *("--build-arg", f"SOURCE_DATE_EPOCH={recipe.timestamp}"),
            # The base is an argument without a default on purpose: it is named by a digest.
            *("--build-arg", "BUILDKIT_DOCKERFILE_CHECK=skip=InvalidDefaultArgInFrom"),
        ]

    def containerd(self) -> bool:
        """Whether its images are in containerd's store; docker's classic one gives no archive."""
        argv = ["docker", "info", "--format", "{{json .DriverStatus}}"]
        return "io.containerd.snapshotter" in host.run(argv, quiet=True).stdout

    def build(self, recipe: Recipe) -> str:
        if not self.containerd():
            _say_classic()
            stream(self.build_argv(recipe))
            return recipe.name
        with leftovers.temporary("docker", host.scratch()) as folder:
            archive = folder / "image.tar"
            stream(self.archive_argv(recipe, archive))
            host.run(["docker", "load", "--quiet", "--input", str(archive)], quiet=True)
        return recipe.name

    def inspect(self, name: str) -> Built | None:
        done = host.run(["docker", "image", "inspect", name], quiet=True, check=False)
        if done.returncode:
            return None
        data = json.loads(done.stdout)[0]
        layers, found = tuple(data["RootFS"]["Layers"]), str(data["Id"])
        # containerd's store calls an image by its manifest, the classic one by its configuration.
        manifest = found if self.containerd() else ""
        return Built(found.removeprefix("sha256:"), data["Config"], layers, manifest)

    def writer(self, folder: Path) -> str:
        return f"{folder.stat().st_uid}:0"

    def sweep(self) -> None:
        """Remove the containers of killed runs; what builds leave the engine removes by itself."""
        argv = ["docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name={_NAME}"]
        for name in host.run(argv, quiet=True).stdout.split():
            whose = owner.parse(name)
            if whose and owner.dead(whose):
                self._remove_container(name)

    def _remove_container(self, name: str) -> None:
        host.run(["docker", "rm", "--force", name], quiet=True, check=False)

    def tags(self, repository: str) -> list[str]:
        argv = ["docker", "image", "ls", "--format", "{{.Tag}}", repository]
        return host.run(argv, quiet=True).stdout.split()

    def remove(self, name: str) -> bool:
        return host.run(["docker", "image", "rm", name], quiet=True, check=False).returncode == 0

    def run_argv(self, command: Command, container: str) -> list[str]:
        """The command that runs something in a fresh container."""
        entry, *rest = command.argv
        options = ["--name", container, "--entrypoint", entry, *_run_options(command)]
        return ["docker", "run", "--rm", *options, command.image, *rest]

    def run(self, command: Command) -> int:
        name = f"{leftovers.name('container')}{uuid.uuid4().hex[:8]}"
        try:
            return leash.run(self.run_argv(command, name))
        finally:
            self._remove_container(name)  # the engine's, so it does not end with its client


BUILDERS = {"buildah": Buildah, "docker": Docker}


def detect(wanted: str | None = None) -> Builder:
    """The builder asked for, else buildah, installed where that is possible.

    Raises:
        Problem: exit code 2 for an unknown name or a wrong TMPDIR, 3 where the builder cannot be
            had here.
    """
    if wanted and wanted not in BUILDERS:
        raise Problem(f"unknown builder {wanted!r}; known are {', '.join(BUILDERS)}", 2)
    folder = os.environ.get("TMPDIR")
    if folder and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise Problem(f"TMPDIR is {folder}, no folder that can be written; make it, or unset it", 2)
    choice = wanted or "buildah"
    if choice == "docker":
        if not shutil.which("docker"):
            raise Problem("docker is not installed; install it, or leave out --builder docker", 3)
        if host.run(["docker", "version"], quiet=True, check=False).returncode:
            raise Problem("no docker engine answers; start it, or leave out --builder docker", 3)
        if host.run(["docker", "buildx", "version"], quiet=True, check=False).returncode:
            raise Problem("docker has no buildx; install it, or leave out --builder docker", 3)
    else:
        host.require("buildah")
    return BUILDERS[choice]()

"""What a builder is: what it is given, what it can do, and what it gives back.

buildah.py and docker.py are the two that there are. Methods ending in ``_argv`` are pure; the
others run them.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from images import host
from images.host import leftovers
from rollout.problem import Problem


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
    def require(self) -> None:
        """See that it can be had here; installed where that is possible.

        Raises:
            Problem: exit code 3, with what is missing.
        """

    @abstractmethod
    def storage(self) -> Path:
        """The folder that holds its images."""

    def copies(self) -> int:
        """How many times the size of an image its storage takes."""
        return 1

    @abstractmethod
    def own(self) -> Path:
        """The folder for what we keep of this storage."""

    @abstractmethod
    def pull_argv(self, image: str) -> list[str]:
        """The command that brings an image of a registry into its storage."""

    def pull(self, image: str) -> None:
        """Bring an image of a registry, named by its digest, with this user's credentials for it.

        Raises:
            Problem: exit code 3, with what the builder said.
        """
        if self.inspect(image):
            return
        done = host.run(self.pull_argv(image), quiet=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            what = f"{image} cannot be pulled by {self.name}: {said}"
            raise Problem(f"{what}; check the registry behind --from, and log in to it", 3)

    @abstractmethod
    def inspect(self, name: str) -> Built | None:
        """An image of its storage by name or id, None where there is none."""

    @abstractmethod
    def run(self, command: Command) -> int:
        """Run a command in a fresh container, and remove the container; returns its exit code."""

    @abstractmethod
    def writer(self, folder: Path) -> str:
        """The user of a container that writes into a folder of this host; may get the folder."""

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
        """Remove a name, and its image where that was the last name; false if it is in use."""


def _pairs(flag: str, values: Mapping[str, str]) -> list[str]:
    return [part for key, value in sorted(values.items()) for part in (flag, f"{key}={value}")]


def build_options(recipe: Recipe) -> list[str]:
    """The options of a build that buildah and docker call by the same names."""
    fetched = ["--build-context", f"fetched={recipe.fetched}"] if recipe.fetched else []
    return [
        *([] if recipe.cache else ["--no-cache"]),
        *_pairs("--build-arg", recipe.arguments),
        *fetched,
        *("--tag", recipe.name, "--file", str(recipe.context / "Dockerfile"), str(recipe.context)),
    ]


def run_options(command: Command) -> list[str]:
    """The options of a run that both call by the same names."""
    return [
        *(["--user", command.user] if command.user else []),
        *(p for s, t in sorted(command.volumes.items()) for p in ("--volume", f"{s}:{t}")),
        *_pairs("--env", command.env),
    ]


CONTAINERS = "rollout-container-"  # how the names of all our containers begin


def container_name() -> str:
    """A name for a container of this process."""
    return f"{leftovers.name('container')}{uuid.uuid4().hex[:8]}"

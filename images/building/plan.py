"""What one image is built from: its lock on our base, or additions on a release image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from images.locking.lock import Locked
from images.schema import Interpreter


@dataclass(frozen=True)
class Plan:
    """All that decides a build, before anything is fetched.

    ``arguments`` are those of the builder, by what it is built on: the name of a base, or
    ``released``, an image of a registry.
    """

    name: str
    recipe: str  # the Dockerfile
    locked: Sequence[Locked]  # what is fetched
    files: Mapping[str, bytes]  # of the last layer
    arguments: Callable[[str], dict[str, str]]
    texts: Mapping[str, str] = field(default_factory=dict)  # of the layers of the lock
    more: Mapping[str, bytes] = field(default_factory=dict)  # files that its steps read beside
    interpreter: Interpreter | None = None
    released: str = ""

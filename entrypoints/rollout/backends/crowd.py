"""An engine that has many sampled requests at once, each with a name that it is answered under."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rollout.backends import Completion, Engine

LEAKED = "leaked-blocks"  # the fault that is made in the engine; others are made at its protocol
PATIENCE = 120.0  # seconds without a word, after which what still runs counts as hung
SHARED = "/dev/shm/"  # noqa: S108 - looked at


@dataclass(frozen=True)
class Asked:
    """A request: so many tokens behind a prompt, sampled at temperature 1."""

    name: str
    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Said:
    """What an engine says of one request: the tokens that are new, with their log-probabilities."""

    name: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool  # it has all its tokens now


@dataclass(frozen=True)
class Usage:
    """What an engine holds, by its own account and by that of the operating system."""

    requests: int  # that it works at or lets wait
    blocks: int  # of its KV cache, in use by requests
    memory: int  # bytes, as `Engine.memory` has it
    files: int  # open in its processes
    shared: int  # bytes of shared memory that they have mapped


class Crowd(Engine, Protocol):
    """An engine that is asked for many answers at once, and interrupted.

    A fault is made in it before it starts: some are made of what it is started with.
    """

    crowd: int  # requests that a check asks for at once
    slots: int  # of them it computes at a time; the others wait
    answers: tuple[int, int]  # tokens of the shortest and of the longest answer

    def submit(self, asked: Sequence[Asked]) -> None:
        """Ask for all of these at once. They are worked at from now on, or wait."""

    def listen(self) -> list[Said]:
        """What is new, once something is; empty where the engine has nothing more to answer."""

    def abort(self, names: Sequence[str]) -> list[Said]:
        """End these requests, as a trainer does for its own; what still came of them.

        It says nothing of them later, and holds nothing for them.
        """

    def usage(self) -> Usage:
        """What it holds at this moment."""

    def plain(self, asked: Sequence[Asked]) -> list[Completion]:
        """The same by the engine's own call for a batch, which nobody interrupts."""


def files(processes: Iterable[int]) -> int:
    """How many files these processes have open."""
    return sum(1 for process in processes for _ in Path(f"/proc/{process}/fd").iterdir())


def shared(processes: Iterable[int]) -> int:
    """Bytes of shared memory that these processes have mapped, each piece once.

    What others have in the same folder is theirs: a machine may run several engines.
    """
    pieces = {}
    for process in processes:
        for line in Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines():
            place, _, offset, device, inode, *name = line.split(maxsplit=5)
            if name and name[0].startswith(SHARED):
                begin, end = (int(bound, 16) for bound in place.split("-"))
                pieces[device, inode, offset] = end - begin
    return sum(pieces.values())

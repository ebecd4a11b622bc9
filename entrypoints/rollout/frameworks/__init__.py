"""Training frameworks behind one small protocol.

An adapter knows how its framework is started and where its numbers stand. It knows nothing of
checks, and checks know no framework by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LOST = "lost"  # one tensor is left out of a refit
STALE = "stale"  # a refit sends the weights of the first one again


class FrameworkError(RuntimeError):
    """A framework could not do what it was asked to do."""


@dataclass(frozen=True)
class Tampering:
    """What happens to the refits of a run: the kind, and the refit from which on (1 is the first).

    The rollout of step n has the weights of refit n.
    """

    kind: str
    since: int


@dataclass(frozen=True)
class Step:
    """A step of training, in the framework's own numbers."""

    number: int
    reward: float
    divergence: float  # mean |p(trainer) - p(engine)| of the tokens that the engine sampled
    seconds: float


@dataclass(frozen=True)
class Refit:
    """A refit as the framework's own sender made it."""

    number: int
    tensors: int
    bytes: int
    left_out: str  # the tensor that was kept back; empty where none was


class Framework(Protocol):
    """A training framework in processes of its own, its rollout engine among them."""

    name: str
    version: str  # of what runs, once it does
    path: str  # of the package that runs, once it does
    sender: str  # what sends the weights, once it has

    def start(self, steps: int, tampering: Tampering | None, gpu_bytes: int) -> None:
        """Begin a run of so many steps on the first GPU, which has so many bytes.

        Model, tokenizer, data and reward are made on the spot, in a temporary folder.
        """

    def steps(self, deadline: float) -> Iterator[Step]:
        """The steps as they end; ``deadline`` is a moment of :func:`time.monotonic`.

        Raises:
            FrameworkError: it ended too early, or the deadline passed.
            Problem: exit code 3 where this machine has too little memory for it.
        """

    def refits(self) -> list[Refit]:
        """The refits made up to now; none once it is stopped, for then its files are gone."""

    def stop(self) -> None:
        """End it with all that it started, and leave no file; harmless when called twice."""

    def modules(self) -> list[str]:
        """The modules that a run touches, to be imported where there is no GPU."""


def trainer(name: str) -> str:
    """The name by which :func:`create` makes what trains with a framework.

    That is the framework's own, or that of an adapter for the check ``training`` alone
    (``training_<name>``): one that has what a checkout of the framework needs of an image, and how
    it is started in another module.
    """
    alone = f"training_{name.replace('-', '_')}"
    return alone if importlib.util.find_spec(f"{__name__}.{alone}") else name


def trains(name: str) -> bool:
    """Whether an adapter of a framework can start a training."""
    module = importlib.import_module(f"{__name__}.{trainer(name).replace('-', '_')}")
    return hasattr(module.Framework, "start")


def create(name: str, engine: str, checkout: Path | None = None) -> Framework:
    """The adapter of a framework: module ``rollout.frameworks.<name>``, class ``Framework``.

    ``engine`` is the rollout engine beside it, ``checkout`` a folder of the user's whose package
    goes before the installed one.

    Raises:
        Problem: exit code 2 where the framework is neither there nor installed.
    """
    module = importlib.import_module(f"rollout.frameworks.{name.replace('-', '_')}")
    framework: Framework = module.Framework(engine, checkout)
    return framework

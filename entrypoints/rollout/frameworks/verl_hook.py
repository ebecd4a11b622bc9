"""Runs inside verl's workers: counts the refits of its own sender, and tampers with them if told.

verl imports it by its own setting ``actor_rollout_ref.model.external_lib``, in each process that
reads a model's configuration. What it does stands in the environment; nothing there, it does
nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

LOG = "ROLLOUT_VERL_REFITS"  # the file that is told of every refit
KIND = "ROLLOUT_VERL_TAMPERING"  # "lost" or "stale"
SINCE = "ROLLOUT_VERL_SINCE"  # the refit from which on
TENSOR = "ROLLOUT_VERL_TENSOR"  # the tensor that is left out
ENGINE = "ROLLOUT_VERL_ENGINE"

# Until 0.5 the weights passed through one of these; the method takes them as a dictionary.
MANAGERS = {
    "vllm": ("verl.workers.sharding_manager.fsdp_vllm", "FSDPVLLMShardingManager", "update_params"),
    "sglang": (
        "verl.workers.sharding_manager.fsdp_sglang",
        "FSDPSGLangShardingManager",
        "update_weights",
    ),
}
_MARK = "_rollout_counts"


class Refits:
    """The refits of this process: what each sends is what :meth:`sent` makes of the weights."""

    def __init__(self, environ: Mapping[str, str], sender: str) -> None:
        self.log = environ[LOG]
        self.kind = environ.get(KIND, "")
        self.since = int(environ.get(SINCE) or 0)
        self.tensor = environ.get(TENSOR, "")
        self.sender = sender
        self.number = 0
        self._first: dict[str, Any] = {}

    def sent(self, weights: Any) -> Any:
        """The weights of one refit as they are to be sent: of the kind that they were given in."""
        self.number += 1
        number = self.number
        if isinstance(weights, Mapping):
            return dict(self._stream(number, iter(weights.items())))
        if hasattr(weights, "__aiter__"):
            return self._async_stream(number, weights)
        return self._stream(number, iter(weights))

    def _tampered(self, number: int, kind: str) -> bool:
        return self.kind == kind and number >= self.since

    def _stream(self, number: int, weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        count = _Count(self, number)
        for name, tensor in weights:
            if (kept := count.passed(name, tensor)) is not None:
                yield name, kept
        count.end()

    async def _async_stream(
        self, number: int, weights: AsyncIterator[tuple[str, Any]]
    ) -> AsyncIterator[tuple[str, Any]]:
        count = _Count(self, number)
        async for name, tensor in weights:
            if (kept := count.passed(name, tensor)) is not None:
                yield name, kept
        count.end()

    def one(self, number: int, name: str, tensor: Any) -> Any:
        """The tensor to send under this name; None where it is left out."""
        if self._tampered(number, "lost") and name == self.tensor:
            return None
        if self.kind == "stale":
            if number == 1:
                self._first[name] = tensor.detach().clone()
            elif number >= self.since:
                return self._first[name]
        return tensor

    def write(self, **record: Any) -> None:
        verl = sys.modules.get("verl")
        record |= {
            "sender": self.sender,
            "version": getattr(verl, "__version__", ""),
            "path": getattr(verl, "__file__", ""),
        }
        with open(self.log, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(record) + "\n")


class _Count:
    """What passes in one refit."""

    def __init__(self, refits: Refits, number: int) -> None:
        self._refits = refits
        self._number = number
        self._tensors = self._bytes = 0
        self._left_out = ""

    def passed(self, name: str, tensor: Any) -> Any:
        kept = self._refits.one(self._number, name, tensor)
        if kept is None:
            self._left_out = name
        else:
            self._tensors += 1
            self._bytes += kept.numel() * kept.element_size()
        return kept

    def end(self) -> None:
        self._refits.write(
            number=self._number,
            tensors=self._tensors,
            bytes=self._bytes,
            left_out=self._left_out,
        )


def wrap(cls: type, method: str, environ: Mapping[str, str]) -> None:
    """Have a class's method get its first argument, the weights, by way of :class:`Refits`."""
    original: Callable[..., Any] = getattr(cls, method)
    if getattr(original, _MARK, False):
        return
    refits = Refits(environ, f"{cls.__module__}.{cls.__qualname__}.{method}")

    @functools.wraps(original)
    def counted(self: Any, weights: Any, *arguments: Any, **named: Any) -> Any:
        return original(self, refits.sent(weights), *arguments, **named)

    setattr(counted, _MARK, True)
    setattr(cls, method, counted)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there either
        return False


def install(environ: Mapping[str, str]) -> None:
    """Put the counter in front of the sender, whichever this release has."""
    module, cls, method = MANAGERS[environ[ENGINE]]
    if _exists(module):
        wrap(getattr(importlib.import_module(module), cls), method, environ)
        return
    # Since then a rollout sends them itself. Which class that is, the first one made tells.
    base = importlib.import_module("verl.workers.rollout.base").BaseRollout
    made = base.__init__
    if getattr(made, _MARK, False):
        return

    @functools.wraps(made)
    def watched(self: Any, *arguments: Any, **named: Any) -> None:
        if hasattr(type(self), "update_weights"):
            wrap(type(self), "update_weights", environ)
        made(self, *arguments, **named)

    setattr(watched, _MARK, True)
    base.__init__ = watched


if os.environ.get(LOG):
    install(os.environ)

"""An engine in a process of its own that is asked over a pipe: one message, one answer."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from rollout.backends import EngineError
from rollout.transport import TIMEOUT, TransportError, answer, deliver


class Piped(abc.ABC):
    """The asking side; the process at the other end of the pipe is the backend's own."""

    patience = TIMEOUT  # seconds without an answer after which the process counts as hung

    def __init__(self) -> None:
        self._pipe: Connection | None = None

    def _connection(self) -> Connection:
        if self._pipe is None:
            raise EngineError("the engine is not started")
        return self._pipe

    def _answer(self) -> Any:
        try:
            return answer(self._connection(), self.patience)
        except TransportError as error:
            raise EngineError(str(error)) from None

    def _ask(self, method: str, *arguments: object) -> None:
        """Send a message whose answer is waited for later."""
        try:
            deliver((method, arguments), self._connection())
        except TransportError as error:
            raise EngineError(str(error)) from None

    @contextlib.contextmanager
    def _meanwhile(self, method: str, *arguments: object) -> Iterator[None]:
        """Send a message, do something, and then wait for the answer.

        Where that something fails, the answer is still to come, if ever, and would be taken for
        that of the next message: the engine is stopped.
        """
        self._ask(method, *arguments)
        try:
            yield
        except BaseException:
            self.stop()
            raise
        self._answer()

    @abc.abstractmethod
    def stop(self) -> None:
        """End the process; the backend says how."""

    def _call(self, method: str, *arguments: object) -> Any:
        self._ask(method, *arguments)
        return self._answer()

"""An engine over a pipe: every answer belongs to the message that it is taken for."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest

from rollout.backends import EngineError
from rollout.backends.piped import Piped
from rollout.transport import answer, deliver


class Engine(Piped):
    """Its other end is the other end of the pipe; ``stopped`` counts how often it was ended."""

    def __init__(self) -> None:
        super().__init__()
        self._pipe, self.other = Pipe()
        self.stopped = 0

    def stop(self) -> None:
        self.stopped += 1
        self._pipe = None


def test_what_is_done_meanwhile_is_done_before_the_answer_is_waited_for() -> None:
    engine, done = Engine(), []
    with engine._meanwhile("join", 1):
        assert answer(engine.other, 1) == ("join", (1,))
        done.append("joined")
        deliver(None, engine.other)
    assert done == ["joined"]
    assert engine.stopped == 0


def test_an_engine_whose_answer_nobody_waited_for_is_stopped() -> None:
    """Its answer would be taken for that of the next message."""
    engine = Engine()
    with pytest.raises(RuntimeError, match="the broadcast failed"), engine._meanwhile("take", 1):
        raise RuntimeError("the broadcast failed")
    assert engine.stopped == 1
    with pytest.raises(EngineError, match="not started"):
        engine._call("flush")

"""The start of an SGLang that is set otherwise, for one check alone.

It is written again here, and not in sglang.py, so that the proofs of all other checks stand.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout.backends import EngineError, sglang
from rollout.backends.served import free_port, last_error, log_file


class Engine(sglang.Engine):
    """The trainer's side of such an engine (see :class:`rollout.backends.Engine`)."""

    def begin(
        self,
        model: Path,
        options: dict[str, Any],
        drive: Callable[..., None],
        *,
        gpus: int = 1,
        how: str = "",
    ) -> None:
        """Start it with these arguments of ServerArgs; ``drive`` is the main loop of its driver.

        Raises:
            EngineError: it does not start (``how`` goes on behind that), with its own last words.
        """
        options = options | {"nccl_port": free_port()}
        self._model, self._gpus, self._log = model, gpus, log_file()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = (theirs, options, str(self._log), os.getpid())
        self._process = context.Process(target=drive, args=given)
        try:
            self._process.start()
            theirs.close()
            facts = self._answer()
        except (EngineError, OSError) as error:
            why = last_error(self._log) or error
            self.stop()
            raise EngineError(f"SGLang did not start{how}: {why}") from None
        self._held, self.levels = facts["held"], tuple(facts["levels"])
        self.witness, self.insisting = facts["witness"], facts["insisting"]

"""vLLM's own scheduler, which makes the fault of our leaking one from when it is told to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rollout.backends.pressure_vllm_scheduler import leaking

TOLD = Path(tempfile.gettempdir(), "leaking")  # of this run alone


def __getattr__(name: str) -> Any:
    """``Told``, made when vLLM asks for it, of the one that works ahead: it takes no other."""
    if name != "Told":
        raise AttributeError(name)
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    leaky = leaking(AsyncScheduler)

    class Told(leaky):  # type: ignore[misc]
        def finish_requests(self, *given: Any) -> Any:
            kind = leaky if TOLD.exists() else AsyncScheduler
            return kind.finish_requests(self, *given)

    return Told

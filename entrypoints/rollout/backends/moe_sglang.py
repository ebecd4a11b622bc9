"""SGLang with a mixture of experts: started as for a dense model, with another scheduler process.

SGLang's ``load_weights`` finds the place of each expert in the fused parameters by its name. What
its processes do differently from the dense check stands in the second half, which runs there.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout import experts
from rollout.backends import EngineError, apart_sglang, sglang, sglang_worker


class Engine(apart_sglang.Engine):
    """The trainer's side of SGLang (see :class:`rollout.backends.Engine`)."""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8:
            raise EngineError("this backend starts SGLang in bfloat16 only")
        options = sglang.arguments(model, dummy=dummy, level=level, gpus=gpus)
        self.begin(model, options, drive, gpus=gpus)


def drive(connection: Connection, options: dict[str, Any], log: str, parent: int) -> None:
    """The driver's main loop, in a process of its own that starts our scheduler."""
    sglang_worker.schedule = schedule
    sglang_worker.drive(connection, options, log, parent)


_SCHEDULE = sglang_worker.schedule


def schedule(*arguments: Any, **options: Any) -> None:
    """SGLang's scheduler process, with methods that know experts."""
    sglang_worker.Extension.smoke_digests = _digests  # type: ignore[method-assign]
    _SCHEDULE(*arguments, **options)


def _digests(self: Any, given: dict[str, str] | None = None, *, path: str = "") -> None:
    """sha256 of each weight's bytes by its Hugging Face name; ``self`` is SGLang's scheduler."""
    sglang_worker._reply(given, path, experts.digests(sglang_worker._runner(self).model))

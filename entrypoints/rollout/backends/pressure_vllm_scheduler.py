"""A fault in vLLM: a scheduler that keeps a block of the KV cache for each request that is aborted.

vLLM takes a scheduler by its name (``scheduler_cls``), in the process that has it.
"""

from __future__ import annotations

from typing import Any


def leaking(scheduler: Any) -> Any:
    """A scheduler of vLLM with the fault, made of one of its own."""

    class Leaking(scheduler):  # type: ignore[misc]
        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
            found = super().finish_requests(request_ids, finished_status)
            if isinstance(request_ids, list):  # none is named where all are ended
                self.kv_cache_manager.block_pool.get_new_blocks(len(request_ids))
            return found

    return Leaking


def __getattr__(name: str) -> Any:
    """``Scheduler``, made when vLLM asks for it: here nothing of vLLM is imported before."""
    if name != "Scheduler":
        raise AttributeError(name)
    from vllm.v1.core.sched.scheduler import Scheduler

    return leaking(Scheduler)

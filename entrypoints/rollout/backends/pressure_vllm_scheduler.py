"""A fault in vLLM: a scheduler that keeps a block of the KV cache for each request that is aborted.

vLLM takes a scheduler by its name (``scheduler_cls``), in the process that has it.
"""

from __future__ import annotations

from typing import Any


def leaking(scheduler: Any) -> Any:
    """A scheduler of vLLM with the fault, made of one of its own."""

    class Leaking(scheduler):  # type: ignore[misc]
        def finish_requests(self, request_ids: Any, *given: Any) -> Any:
            names = [request_ids] if isinstance(request_ids, str) else list(request_ids or ())
            found = super().finish_requests(names, *given)
            self.kv_cache_manager.block_pool.get_new_blocks(len(names))
            return found

    return Leaking


def __getattr__(name: str) -> Any:
    """``Scheduler``, made when vLLM asks for it: here nothing of vLLM is imported before."""
    if name != "Scheduler":
        raise AttributeError(name)
    from vllm.v1.core.sched.scheduler import Scheduler

    return leaking(Scheduler)

"""What is asked of the real vLLM, as both sides of the tests know it."""

from __future__ import annotations

# The checks that need no sleep, in the order of the proof.
OFFLINE = ("refit", "generation", "multi-turn", "partial-rollout", "refits")
# Each is made on the running engine.
INJECTED = (
    *("dropped-tensor", "flipped-byte", "swapped-tensors", "wrong-dtype", "partial-bucket"),
    *("refit-skipped", "stale-cache", "oracle-of-other-weights", "cold-turns", "lost-token"),
)
# Where vLLM 0.32 has a module that the backend knows by two other names. No image has this release.
MOVED = {"vllm.entrypoints.openai.cli_args": "vllm.entrypoints.launchers.cli_args"}
# The requests of the check of many at once, and how many of them are worked at.
CROWD, SLOTS = 64, 12
# What fakes of the unit tests play.
CALLED = (
    *(f"vllm:LLM.{name}" for name in ("generate", "collective_rpc", "sleep", "wake_up")),
    "vllm:LLM.reset_prefix_cache",
    *(
        f"vllm.v1.engine.llm_engine:LLMEngine.{name}"
        for name in ("add_request", "has_unfinished_requests", "step", "abort_request")
    ),
)

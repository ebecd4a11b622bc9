"""What :mod:`rollout.backends.tensorrt_llm` and its worker extension use of TensorRT-LLM.

Compared with the installed engine by ``rollout verify``. Without it, a test compares it with a
record of the engine's published sources (tests/unit/tensorrt_llm.api.json).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.backends import records, tensorrt_llm
from rollout.backends.interface import Comparison
from rollout.backends.tensorrt_llm_worker import Methods

MODEL = Path("model")
LLM = "tensorrt_llm:AsyncLLM"
ARGUMENTS = "tensorrt_llm.llmapi.llm_args"
TAGS = (f"{ARGUMENTS}:ExecutorMemoryType", "tensorrt_llm._torch.virtual_memory:ExecutorMemoryType")
OUTPUT = "tensorrt_llm.executor.result:GenerationResult"
WORKER = "tensorrt_llm.executor.ray_gpu_worker:RayGPUWorker"


def compare(seen: Comparison) -> None:
    """Look at everything."""
    for part in (arguments, engine, sleeping, answers, worker):
        with seen.part(part.__name__):
            part(seen)


def arguments(seen: Comparison) -> None:
    """What it is started with."""
    options = tensorrt_llm.arguments(MODEL, dummy=True, fp8=True)
    wanted = sorted([*options, "kv_cache_config"])
    seen.fields((f"{ARGUMENTS}:TorchLlmArgs",), wanted)
    cache = ["enable_block_reuse", "free_gpu_memory_fraction", "max_tokens"]
    seen.fields(("tensorrt_llm.llmapi:KvCacheConfig",), cache)
    seen.fields(("tensorrt_llm:SamplingParams",), sorted(tensorrt_llm.greedy(1)))
    seen.called(f"{LLM}.__init__", **options)


def engine(seen: Comparison) -> None:
    """The calls on the trainer's side."""
    seen.called(f"{LLM}.__await__")
    seen.called(f"{LLM}.collective_rpc", "method", args=())
    seen.called(f"{LLM}.release", "tags")
    seen.called(f"{LLM}.resume", "tags")
    seen.called(f"{LLM}.update_weights", "weights")
    seen.called(f"{LLM}.shutdown")
    parameters = {"inputs": [1], "sampling_params": None, "streaming": True}
    seen.called(f"{LLM}.generate_async", **parameters)


def sleeping(seen: Comparison) -> None:
    """One of the two ways to sleep, and the tags of its memory."""
    kind = seen.thing(f"{ARGUMENTS}:TorchLlmArgs")
    fields = records.fields(kind) if kind is not None else set()
    ways = {"enable_sleep", "sleep_config"} & fields
    seen.look("fields", f"{ARGUMENTS}:TorchLlmArgs", bool(ways), "has no way to sleep")
    if "sleep_config" in ways:
        seen.called(f"{ARGUMENTS}:SleepConfig", restore_modes={})
    else:
        seen.without.append("sleep_config")
    types: Any = seen.thing(*TAGS)
    values = {str(member.value) for member in types or ()}
    for tag in ("model", "kv_cache"):
        seen.look("tags", TAGS[-1], tag in values, f"has no tag {tag!r}")


def answers(seen: Comparison) -> None:
    """What answers are read for, and how one is stopped."""
    seen.fields(("tensorrt_llm.executor.result:CompletionOutput",), ["token_ids", "logprobs"])
    seen.fields(("tensorrt_llm.executor.result:Logprob",), ["logprob"])
    for name in ("__await__", "__aiter__", "__anext__", "abort"):
        seen.called(f"{OUTPUT}.{name}")
    seen.thing(f"{OUTPUT}.finished")
    if not hasattr(seen.thing(OUTPUT), "cached_tokens"):
        seen.without.append("cached_tokens")


def worker(seen: Comparison) -> None:
    """The worker that our extension becomes a part of, and its own extension, which refits."""
    kind = seen.thing(WORKER)
    for name in dir(Methods):
        if not name.startswith("__"):
            what = f"has {name!r} itself, and refuses an extension that has it"
            seen.look("names", WORKER, not hasattr(kind, name), what)
    seen.called("tensorrt_llm.llmapi.rlhf_utils:WorkerExtension.update_weights", "handles")
    seen.called("tensorrt_llm._torch.utils:get_device_uuid", "number")

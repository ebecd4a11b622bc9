"""TensorRT-LLM: its PyTorch backend in workers of Ray, driven through the calls that verl makes.

Written from its published sources and from verl 0.7.1, and run against an engine that is made of a
record of them (tests/unit/test_tensorrt_llm.py). It has not run with the engine itself.

What sleep and wake are called differs between versions, and the installed one is asked
(:func:`sleeping`, :func:`memory_tags`). With ``enable_sleep`` the weights go to main memory, so
there is level 1 alone; with ``SleepConfig`` they go there or nowhere, as it is started for.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import os
import pickle
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rollout.backends import KV_CACHE, WEIGHTS, Abilities, Completion, EngineError, gpu, records

if TYPE_CHECKING:
    import torch

ABILITIES = Abilities(transports=("cuda-ipc",), levels=(1, 2), fp8=True)
KV_BYTES = 4 << 30
LONGEST = 512  # tokens of prompt and completion
REQUESTS = 16  # at once
TIMEOUT = 600.0  # seconds without an answer after which the engine counts as hung
EXTENSION = "rollout.backends.tensorrt_llm_worker.Extension"
ARGUMENTS = "tensorrt_llm.llmapi.llm_args"
# As verl: blocks of a checkpoint that is fp8 already. Weights come quantised, so it starts on dummy
# ones.
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
# Variables of its workers: a Ray of its own, beside whatever Ray a trainer has.
SETTINGS = {"TLLM_RAY_FORCE_LOCAL_CLUSTER": "1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
NO_END = -1  # the end token of a request that is to have all of its tokens


def per_token(config: Mapping[str, Any]) -> int:
    """Bytes of the KV cache that one token takes, in bfloat16."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    own = config.get("num_key_value_heads") or heads
    return int(2 * 2 * config["num_hidden_layers"] * own * size)


def arguments(model: Path, *, dummy: bool, fp8: bool, gpus: int = 1) -> dict[str, Any]:
    """What TensorRT-LLM is started with, but for its KV cache and how it sleeps."""
    options: dict[str, Any] = {
        "model": str(model),
        "backend": "pytorch",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,  # tokens go in and tokens come out, as in a trainer
        "load_format": "dummy" if dummy else "auto",
        "max_seq_len": LONGEST,
        "max_batch_size": REQUESTS,
        "max_num_tokens": 4 * LONGEST,
        "tensor_parallel_size": gpus,
        "sampler_type": "TRTLLMSampler",
        "ray_worker_extension_cls": EXTENSION,
    }
    if fp8:
        options["model_kwargs"] = {"quantization_config": dict(FP8)}
    return options


def cache(model: Path) -> dict[str, Any]:
    """What its KV cache is made with: so many tokens as fit into ``KV_BYTES``."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    # The smaller of both counts; the share only has to be larger.
    tokens = KV_BYTES // per_token(config)
    return {"enable_block_reuse": True, "max_tokens": tokens, "free_gpu_memory_fraction": 0.8}


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if the installed TensorRT-LLM has all of them.

    Raises:
        EngineError: it lacks one.
    """
    from tensorrt_llm.llmapi import llm_args

    fields = records.fields(llm_args.TorchLlmArgs)
    lacking = sorted(options.keys() - fields)
    if lacking:
        raise EngineError(f"this TensorRT-LLM has no argument {lacking[0]!r}")
    return dict(options)


def sleeping(level: int) -> dict[str, Any]:
    """The arguments that let it sleep to this level.

    Raises:
        EngineError: it cannot.
    """
    from tensorrt_llm.llmapi import llm_args

    fields = records.fields(llm_args.TorchLlmArgs)
    if "sleep_config" in fields:
        types = llm_args.ExecutorMemoryType
        weights = "NONE" if level == 2 else "PINNED"
        modes = {types.MODEL_WEIGHTS_MAIN: weights, types.KV_CACHE: "NONE"}
        return {"sleep_config": llm_args.SleepConfig(restore_modes=modes)}
    if "enable_sleep" not in fields:
        raise EngineError("this TensorRT-LLM cannot sleep")
    if level != 1:
        what = "keeps the weights in main memory when it sleeps (enable_sleep has no other way)"
        raise EngineError(f"this TensorRT-LLM {what}: it has level 1 alone")
    return {"enable_sleep": True}


def memory_tags() -> dict[str, list[str]]:
    """What it calls the memory of weights and all that goes with them, and of the KV cache."""
    from tensorrt_llm.llmapi import llm_args

    types: Any = getattr(llm_args, "ExecutorMemoryType", None)
    if types is None:
        from tensorrt_llm._torch import virtual_memory

        types = virtual_memory.ExecutorMemoryType
    every = [str(member.value) for member in types]
    # Some is taken and given back while it starts, and is under no tag later.
    rest = [tag for tag in every if tag != KV_CACHE and not tag.startswith("_")]
    return {WEIGHTS: rest, KV_CACHE: [KV_CACHE]}


def greedy(tokens: int) -> dict[str, Any]:
    """Sampling parameters of so many likeliest tokens."""
    return {
        "max_tokens": tokens,
        "top_k": 1,
        "logprobs": 1,  # of the token taken
        "end_id": NO_END,
        "pad_id": NO_END,
        "ignore_eos": True,
        "detokenize": False,
    }


def completion(output: Any) -> Completion:
    """One of its answers, finished or not."""
    first = output.outputs[0]
    ids = tuple(first.token_ids)
    steps = (first.logprobs or [])[: len(ids)]
    values = tuple(
        (step[token] if token in step else next(iter(step.values()))).logprob
        for step, token in zip(steps, ids, strict=True)
    )
    return Completion(ids, values, int(getattr(output, "cached_tokens", 0) or 0))


class Engine:
    """The trainer's side of TensorRT-LLM (see :class:`rollout.backends.Engine`)."""

    transports: tuple[str, ...] = ABILITIES.transports
    levels: tuple[int, ...] = ()
    kv_bytes = KV_BYTES
    cache_block = 32  # its default, tokens_per_block
    mlp_bias = False
    witness = False
    insisting: Mapping[str, str] = MappingProxyType({})

    def __init__(self) -> None:
        self.device, self._device = gpu.first()
        self._llm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tags: dict[str, list[str]] = {}
        self._uuid = ""
        self._weights = 0
        self._fp8 = False
        self._fault = ""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if gpus > 1:
            raise EngineError("this backend starts TensorRT-LLM on one GPU only")
        if fp8 and not dummy:
            raise EngineError("TensorRT-LLM takes fp8 weights in a refit alone: start it on dummy")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from tensorrt_llm import AsyncLLM
        from tensorrt_llm.llmapi import KvCacheConfig

        options = known({**arguments(model, dummy=dummy, fp8=fp8), **sleeping(level)})
        options["kv_cache_config"] = KvCacheConfig(**cache(model))
        self._tags, self._fp8 = memory_tags(), fp8
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def begin() -> Any:
            # Its queues belong to the loop that it is made in.
            return await AsyncLLM(**options)

        try:
            self._llm = self._run(begin)
        except Exception as error:
            self.stop()
            raise EngineError(f"TensorRT-LLM did not start: {error}") from error
        self.levels = (level,)
        self._weights = int(self._rpc("smoke_held"))
        self._uuid = self._same_gpu()

    def _same_gpu(self) -> str:
        """The GPU of the engine as it calls it, if it is the trainer's too."""
        import torch

        found = str(self._rpc("smoke_uuid"))
        own = str(torch.cuda.get_device_properties(self._device).uuid)
        if found.removeprefix("GPU-") != own.removeprefix("GPU-"):
            raise EngineError(f"the engine works on the GPU {found}, the trainer on {own}")
        return found

    def _run(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self._loop is None:
            raise EngineError("the engine is not started")
        future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            return future.result(TIMEOUT)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise EngineError(f"the engine did not answer for {TIMEOUT:.0f} s") from None

    def _call(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self._llm is None:
            raise EngineError("the engine is not started")
        try:
            return self._run(call)
        except EngineError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise EngineError(f"{type(error).__name__}: {lines[-1]}") from error

    def _rpc(self, method: str, *given: object) -> Any:
        """Call the worker extension; the answer of the first worker."""
        answers = self._call(lambda: self._llm.collective_rpc(method, args=given))
        return answers[0]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        async def run() -> list[Completion]:
            outputs = self._asked(prompts, tokens, streaming=False)
            return [completion(await output) for output in outputs]

        found: list[Completion] = self._call(run)
        return found

    def _asked(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, streaming: bool
    ) -> list[Any]:
        from tensorrt_llm import SamplingParams

        return [
            self._llm.generate_async(
                inputs=list(prompt),
                sampling_params=SamplingParams(**greedy(tokens)),
                streaming=streaming,
            )
            for prompt in prompts
        ]

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        async def run() -> list[Completion]:
            outputs = self._asked(prompts, tokens, streaming=True)
            latest: dict[int, Completion] = {}
            ready = asyncio.Event()

            async def follow(number: int, output: Any) -> None:
                async for step in output:
                    if not ready.is_set():
                        latest[number] = completion(step)
                    if len(latest) == len(outputs) and all(
                        len(answer.tokens) >= after for answer in latest.values()
                    ):
                        ready.set()

            tasks = [asyncio.create_task(follow(n, output)) for n, output in enumerate(outputs)]
            ended = asyncio.gather(*tasks)
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            for output in outputs:
                if not output.finished:
                    output.abort()
            await ended
            return [latest[number] for number in range(len(outputs))]

        found: list[Completion] = self._call(run)
        return found

    def sleep(self, level: int) -> None:
        if level not in self.levels:
            raise EngineError(f"it was not started for level {level}")
        tags = [*self._tags[WEIGHTS], *self._tags[KV_CACHE]]
        self._call(lambda: self._llm.release(tags))

    def wake(self, tags: Sequence[str]) -> None:
        wanted = [name for tag in tags for name in self._tags[tag]]
        self._call(lambda: self._llm.resume(wanted))
        if KV_CACHE in tags and self._fault == "leak-per-cycle":
            self._rpc("smoke_leak")

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        from rollout.backends.tensorrt_llm_weights import quantised
        from rollout.cuda_ipc import BUCKET_BYTES, plan

        sent = 0
        for bucket in plan(quantised(tensors) if self._fp8 else tensors, BUCKET_BYTES):
            # Copies of its own: the trainer's tensors change while the engine still reads.
            kept = [(name, self._copy(tensor)) for name, tensor, _ in bucket]
            sent += sum(tensor.numel() * tensor.element_size() for _, tensor in kept)
            handles = {self._uuid: _handles(kept)}
            self._call(lambda given=handles: self._llm.update_weights(given))  # type: ignore[misc]
            del kept
        # Without it nothing that is made of weights at loading is made again.
        self._call(lambda: self._llm.update_weights(None))
        gpu.collect()
        return sent

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        copy = tensor.detach().to(self._device, copy=True).contiguous()
        torch.cuda.synchronize(self._device)  # a handle says nothing of writes on their way
        return copy

    def reset_prefix_cache(self) -> None:
        self._rpc("smoke_reset_prefix_cache")

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._rpc("smoke_digests")
        return found

    def remember(self) -> None:
        raise EngineError("TensorRT-LLM has no weights checker of its own")

    def unchanged(self) -> bool:
        raise EngineError("TensorRT-LLM has no weights checker of its own")

    def held(self) -> int:
        return self._weights + KV_BYTES

    def memory(self) -> int:
        return gpu.used(self._device)

    def inject(self, fault: str) -> None:
        self._fault = fault

    def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(Exception):  # what is broken ends with Ray
                llm.shutdown()
            with contextlib.suppress(Exception):
                import ray

                ray.shutdown()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)


def _handles(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Handles of tensors in the form that its worker extension reads."""
    from torch.multiprocessing.reductions import reduce_tensor

    pairs = [(name, reduce_tensor(tensor)) for name, tensor in tensors]
    return base64.b64encode(pickle.dumps(pairs)).decode("ascii")

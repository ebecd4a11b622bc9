"""vLLM: the engine in a process of its own, driven through the public calls that verl makes.

No version is known here by its number. What an installed vLLM lacks is asked of itself
(:func:`known`, :meth:`Server.start`); what all have to have is compared without a GPU, in
:mod:`rollout.backends.vllm_interface`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rollout.backends import KV_CACHE, WEIGHTS, Abilities, Completion, EngineError, gpu
from rollout.backends.served import Remote, discard, flags, interrupted, log_file
from rollout.backends.served import Server as Http
from rollout.transport import TransportError

if TYPE_CHECKING:
    import torch

ABILITIES = Abilities(
    ("cuda-ipc",),
    fp8=True,
    lora=True,
    server=True,
    long=True,
    moe=True,
    pressure=True,
    disaggregated=True,
    fp8_kv=True,
)
KV_BYTES = 4 << 30
LONGEST = 512  # tokens of prompt and completion
REQUESTS = 16  # at once: vLLM captures CUDA graphs for batches of up to twice as many
TIMEOUT = 600.0  # seconds without an answer after which the engine counts as hung
# verl's rollout.quantization=fp8: blocks of a checkpoint that is fp8 already, quantised on the way.
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
# Arguments that older versions lack, and nothing is proved less without them: a share of the memory
# is the KV cache's size then, and a progress bar is drawn.
DISPENSABLE = frozenset({"kv_cache_memory_bytes", "use_tqdm_on_load"})
# What the engine's own server is started with besides, and cannot take: its OpenAI endpoint puts
# token ids into words even where nobody asks for words, and the model is no option.
NOT_SERVED = ("model", "skip_tokenizer_init")
DEVELOPMENT = "VLLM_SERVER_DEV_MODE"  # offers what trainers call: sleep, refit, cache
PATHS = (
    "/health",
    "/v1/models",
    "/v1/completions",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
)
PAUSING = ("/pause", "/resume")  # older servers have neither


def arguments(model: Path, total: int, *, dummy: bool, fp8: bool) -> dict[str, Any]:
    """What vLLM is started with on a device of ``total`` bytes.

    As verl starts it: sleep mode, prefix caching, CUDA graphs; no option that hides a fault.
    """
    options: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,  # tokens go in and tokens come out, as in a trainer
        "dtype": "bfloat16",
        "load_format": "dummy" if dummy else "auto",
        "enable_sleep_mode": True,
        "enable_prefix_caching": True,
        "worker_extension_cls": "rollout.backends.vllm_extension.Extension",
        # A share of the whole device is what old versions understand; it only has to be free here.
        "gpu_memory_utilization": round(min(0.9, 3 * KV_BYTES / total), 3),
        "kv_cache_memory_bytes": KV_BYTES,
        "max_model_len": LONGEST,
        "max_num_batched_tokens": 4 * LONGEST,
        "max_num_seqs": REQUESTS,
        "seed": 0,
        "use_tqdm_on_load": False,  # nor while it captures graphs
    }
    if fp8:
        options |= {"quantization": "fp8", "hf_overrides": {"quantization_config": dict(FP8)}}
    return options


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the installed vLLM has; the others can be done without.

    Raises:
        EngineError: it lacks one that cannot.
    """
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    lacking = sorted(options.keys() - fields - DISPENSABLE)
    if lacking:
        raise EngineError(f"this vLLM has no argument {lacking[0]!r}")
    return {name: value for name, value in options.items() if name in fields}


class Engine:
    """The trainer's side of vLLM (see :class:`rollout.backends.Engine`)."""

    transports: tuple[str, ...] = ABILITIES.transports
    levels: tuple[int, ...] = ABILITIES.levels  # whatever it was started for
    kv_bytes = KV_BYTES
    cache_block = 16  # until it has started, and says so itself
    mlp_bias = True
    witness = False
    insisting: Mapping[str, str] = MappingProxyType({})

    def __init__(self) -> None:
        self.device, self._device = gpu.first()
        self._llm: Any = None
        self._process = 0
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None]
        self._held = 0
        self._level = 0
        self._fault = ""
        self._numbers = itertools.count()

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if gpus > 1:
            raise EngineError("this backend starts vLLM on one GPU only")

        # The terminal is the proof's table; vLLM's and torch's own lines are for whoever asks.
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        try:
            self._llm = LLM(**known(arguments(model, total, dummy=dummy, fp8=fp8)))
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self._follow()

    def _follow(self) -> None:
        """Begin to make calls, one after another, and learn of the engine's process."""
        self._calls = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._calls,), daemon=True).start()
        self._process = int(self._rpc("smoke_follow"))
        self._held = int(self._rpc("smoke_held"))
        self.cache_block = int(self._rpc("smoke_block"))

    def _submit(self, call: Callable[[], Any]) -> queue.SimpleQueue[Any]:
        if self._llm is None:
            raise EngineError("the engine is not started")
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((call, answer))
        return answer

    def _alive(self) -> None:
        """Raise where the engine's process is gone: vLLM would wait for its answer for ever."""
        if self._process and not _running(self._process):
            raise EngineError("the engine process ended")

    def _result(self, answer: queue.SimpleQueue[Any], timeout: float = TIMEOUT) -> Any:
        waited = 0.0
        while True:
            try:
                result = answer.get(timeout=0.5)
                break
            except queue.Empty:
                self._alive()
                waited += 0.5
                if waited > timeout:
                    raise EngineError(f"the engine did not answer for {timeout:.0f} s") from None
        if isinstance(result, BaseException):
            message = str(result).strip().splitlines() or [""]
            raise EngineError(f"{type(result).__name__}: {message[-1]}") from result
        return result

    def _call(self, call: Callable[[], Any]) -> Any:
        return self._result(self._submit(call))

    def _rpc(self, method: str, *args: object) -> Any:
        """Call the worker extension; the answer of the first worker."""
        return self._call(lambda: self._llm.collective_rpc(method, args=args)[0])

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        if self._llm is None:
            raise EngineError("the engine is not started")
        from vllm import SamplingParams

        parameters = SamplingParams(**greedy(tokens))
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._call(lambda: self._llm.generate(asked, parameters, use_tqdm=False))
        return [completion(output) for output in outputs]

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        if self._llm is None:
            raise EngineError("the engine is not started")
        from vllm import SamplingParams

        def run() -> list[Completion]:
            engine = self._llm.llm_engine
            names = [f"interrupted-{next(self._numbers)}" for _ in prompts]
            for name, prompt in zip(names, prompts, strict=True):
                asked = {"prompt_token_ids": list(prompt)}
                engine.add_request(name, asked, SamplingParams(**greedy(tokens)))
            latest: dict[str, Completion] = {}
            while engine.has_unfinished_requests():
                latest |= {output.request_id: completion(output) for output in engine.step()}
                if len(latest) == len(names) and all(
                    len(answer.tokens) >= after for answer in latest.values()
                ):
                    engine.abort_request(names)
                    break
            return [latest[name] for name in names]

        found: list[Completion] = self._call(run)
        return found

    def sleep(self, level: int) -> None:
        self._call(lambda: self._llm.sleep(level=level))
        self._level = level

    def wake(self, tags: Sequence[str]) -> None:
        self._call(lambda: self._llm.wake_up(tags=list(tags)))
        if WEIGHTS in tags and self._level == 2 and self._fault == "lost-buffer":
            self._rpc("smoke_lose_buffers")
        if KV_CACHE in tags and self._fault == "leak-per-cycle":
            self._rpc("smoke_leak")

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        from rollout.cuda_ipc import send

        with tempfile.TemporaryDirectory(prefix="rollout-refit-") as folder:
            address = f"ipc://{folder}/weights.sock"
            answer = self._submit(lambda: self._llm.collective_rpc("smoke_refit", args=(address,)))

            ended = 0

            def alive() -> None:
                nonlocal ended
                self._alive()
                if not answer.empty():
                    # Its last word may be on its way still; an end without one is an error.
                    ended += 1
                    if ended > 1:
                        self._result(answer)
                        raise EngineError("the engine ended the refit before its last weights")

            try:
                sent = send(tensors, address, self._device, alive)
            except TransportError as error:
                raise EngineError(str(error)) from None
            self._result(answer)
        return sent

    def reset_prefix_cache(self) -> None:
        if self._call(lambda: self._llm.reset_prefix_cache()) is False:
            raise EngineError("vLLM refused to reset its prefix cache: requests hold blocks of it")

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._rpc("smoke_digests")
        return found

    def remember(self) -> None:
        raise EngineError("vLLM is asked for no weights checker of its own")

    def unchanged(self) -> bool:
        raise EngineError("vLLM is asked for no weights checker of its own")

    def held(self) -> int:
        return self._held

    def memory(self) -> int:
        return gpu.used(self._device)

    def inject(self, fault: str) -> None:
        self._fault = fault

    def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            self._calls.put(None)
            with contextlib.suppress(Exception):  # what is broken is killed below
                llm.llm_engine.engine_core.shutdown()
        if self._process and _running(self._process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, 9)
        self._process = 0
        # Interrupted while it starts, vLLM gives nothing to shut down, and its process holds the
        # GPU.
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


def greedy(tokens: int) -> dict[str, Any]:
    """Sampling parameters of so many likeliest tokens."""
    return {
        "temperature": 0.0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": 0,  # of the token taken alone
        "detokenize": False,
    }


def completion(output: Any) -> Completion:
    """One of vLLM's answers, finished or not."""
    first = output.outputs[0]
    ids = tuple(first.token_ids)
    values = tuple(step[token].logprob for step, token in zip(first.logprobs, ids, strict=True))
    return Completion(ids, values, output.num_cached_tokens or 0)


def _work(calls: queue.SimpleQueue[Any]) -> None:
    """Make calls one after another; a thread of its own, so that one that hangs can be left."""
    while (item := calls.get()) is not None:
        call, answer = item
        try:
            answer.put(call())
        except BaseException as error:  # given to whoever waits for it
            answer.put(error)


def _running(process: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2]
    except OSError:
        return False
    return state.split()[0] != "Z"


def served(model: Path, options: Mapping[str, Any]) -> list[str]:
    """The arguments of the command that starts vLLM's server with these options."""
    kept = {name: value for name, value in options.items() if name not in NOT_SERVED}
    return [str(model), *flags(kept)]


def asked(prompt: object, tokens: int, *, stream: bool = False) -> dict[str, Any]:
    """What a trainer asks of the OpenAI endpoint: so many likeliest tokens, by their ids.

    A server that does not know ``return_token_ids`` overlooks it, and answers without tokens.
    """
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        **({"stream": True} if stream else {}),
    }


class Calls:
    """vLLM's server, with the methods of its ``LLM`` that a trainer calls."""

    def __init__(self, server: Http) -> None:
        self.server = server

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """Answers that are no list or dict come as text."""
        asked = {"method": method, "args": list(args)}
        return self.server.call("/collective_rpc", asked)["results"]

    def sleep(self, level: int) -> None:
        self.server.call(f"/sleep?level={level}", {})

    def wake_up(self, tags: Sequence[str]) -> None:
        self.server.call("/wake_up?" + "&".join(f"tags={tag}" for tag in tags), {})

    def reset_prefix_cache(self) -> None:
        self.server.call("/reset_prefix_cache", {})


class Server(Remote, Engine):
    """vLLM's own server, driven over HTTP; it offers sleep and refit in its development mode."""

    resuming = "/resume"

    def __init__(self) -> None:
        super().__init__()
        self._log = Path()

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM's server in bfloat16 and on one GPU only")
        total = torch.cuda.mem_get_info(self._device)[1]
        options = known(arguments(model, total, dummy=dummy, fp8=False))
        self._log = log_file()
        try:
            self._server = Http(served(model, options), self._log, {DEVELOPMENT: "1"})
            self._server.wait("/health")
            self.pauses = all(self._server.offers(path) for path in PAUSING)
            self._llm = Calls(self._server)
            self._follow()
        except (EngineError, OSError) as error:
            self.stop()
            raise EngineError(f"vLLM's server did not start: {error}") from None

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        body = asked([list(prompt) for prompt in prompts], tokens)
        choices = self._http().call("/v1/completions", body)["choices"]
        return [chosen(choice) for choice in sorted(choices, key=lambda c: int(c["index"]))]

    def about(self) -> dict[str, Any]:
        (found,) = self._http().call("/v1/models")["data"]
        return {"model": found["root"]}

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        over = threading.Event()
        # It ends a request when whoever asked hangs up.
        return self._stopped(prompts, tokens, after, over.set, over)

    def halt(self, prompts: Sequence[Sequence[int]], tokens: int, after: int) -> list[Completion]:
        server = self._http()
        # Nobody hangs up: the pause itself has to end what runs.
        stop = threading.Event()
        return self._stopped(prompts, tokens, after, lambda: server.call("/pause", {}), stop)

    def _stopped(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        after: int,
        stop: Callable[[], object],
        over: threading.Event,
    ) -> list[Completion]:
        """Answers of so many tokens, stopped half-way; nobody reads on once it is ``over``."""
        server = self._http()

        def stream(prompt: Sequence[int]) -> Iterator[Completion]:
            body = asked(list(prompt), tokens, stream=True)
            whole = Completion((), ())
            for event in server.events("/v1/completions", body):
                part = chosen(event["choices"][0])
                whole = Completion(whole.tokens + part.tokens, whole.logprobs + part.logprobs)
                yield whole
                if over.is_set():
                    return  # and hang up

        return interrupted([stream(prompt) for prompt in prompts], after, stop)

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()
        discard(self._log)
        super().stop()


def chosen(choice: Mapping[str, Any]) -> Completion:
    """One of the answers of an OpenAI completion, or a part of it."""
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return Completion(tuple(choice.get("token_ids") or ()), tuple(logprobs))

"""SGLang: the engine in a process of its own, driven through the public calls that verl makes.

What differs between its versions is found out from the version itself (``sglang_worker``): options
and methods that it has not are not used, and what then cannot be done is not offered.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import cuda_ipc
from rollout.backends import KV_CACHE, WEIGHTS, Abilities, Completion, EngineError, gpu, records
from rollout.backends.piped import Piped
from rollout.backends.served import (
    STOPPING,
    Remote,
    discard,
    flags,
    free_port,
    interrupted,
    last_error,
    log_file,
)
from rollout.backends.served import Server as Http
from rollout.backends.sglang_worker import IDLE, completion, drive, greedy, known
from rollout.transport import TransportError, deliver

if TYPE_CHECKING:
    import torch

KV_BYTES = 4 << 30
LONGEST = 512  # tokens of prompt and completion
REQUESTS = 16  # at once, and the largest batch that a CUDA graph is captured for
TIMEOUT = 600.0  # seconds without an answer after which the engine counts as hung
FLATTENED = "cuda-ipc-flattened"
# A session of updates, in newer versions: weights that come outside of one are refused.
BEGIN, END = "/begin_weight_update", "/end_weight_update"
ABILITIES = Abilities(
    ("cuda-ipc", FLATTENED, "nccl", "disk"),
    lora=True,
    server=True,
    tensor_parallel=True,
    long=True,
    moe=True,
    pressure=True,
)


def arguments(model: Path, *, dummy: bool, level: int, gpus: int) -> dict[str, Any]:
    """What SGLang is started with, by the names of its ``ServerArgs``.

    As verl starts it: memory saver, CUDA graphs, radix cache; no option that hides a fault.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    # Keys and values, two bytes each; every GPU holds its share of the heads.
    token = 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head
    return {
        "model_path": str(model),
        "skip_tokenizer_init": True,  # tokens go in and tokens come out, as in a trainer
        "dtype": "bfloat16",
        "load_format": "dummy" if dummy else "auto",
        "enable_memory_saver": True,
        # Without it released weights are gone, and waking gives memory with anything in it.
        "enable_weights_cpu_backup": level == 1,
        "mem_fraction_static": 0.8,  # of what is free; max_total_tokens says how much is taken
        "max_total_tokens": KV_BYTES * gpus // token,
        "context_length": LONGEST,
        "chunked_prefill_size": LONGEST,  # SGLang captures graphs of so many tokens in one request
        "max_running_requests": REQUESTS,
        "cuda_graph_max_bs": REQUESTS,
        "random_seed": 0,
        "tp_size": gpus,
        "log_level": "error",
    }


class Engine(Piped):
    """The trainer's side of SGLang (see :class:`rollout.backends.Engine`)."""

    transports: tuple[str, ...] = ABILITIES.transports
    kv_bytes = KV_BYTES
    cache_block = 1  # its radix cache shares single tokens
    patience = TIMEOUT
    mlp_bias = False  # models/llama.py hard-codes bias=False there and skips such tensors

    def __init__(self) -> None:
        super().__init__()
        self.device, self._device = gpu.first()
        self.levels: tuple[int, ...] = ()
        self.witness = False
        self.insisting: Mapping[str, str] = {}
        self._process: Any = None
        self._model = Path()
        self._gpus = 1
        self._held = 0
        self._level = 0
        self._fault = ""
        self._log = Path()
        self._asleep: set[str] = set()

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8:
            raise EngineError("this backend starts SGLang in bfloat16 only")
        # Before 0.5.12 SGLang takes one at random; two that start at once could take the same.
        options = arguments(model, dummy=dummy, level=level, gpus=gpus) | {"nccl_port": free_port()}
        self._model, self._gpus, self._log = model, gpus, log_file()
        # spawn: CUDA cannot be forked. No daemon: those may have no children, and SGLang has.
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
            raise EngineError(f"SGLang did not start: {why}") from None
        self._held = facts["held"]
        self.levels = tuple(facts["levels"])
        self.witness, self.insisting = facts["witness"], facts["insisting"]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        return _completions(self._call("generate", [list(p) for p in prompts], tokens))

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        asked = [list(prompt) for prompt in prompts]
        return _completions(self._call("interrupt", asked, tokens, after))

    def sleep(self, level: int) -> None:
        self._call("sleep", level)
        self._level = level

    def wake(self, tags: Sequence[str]) -> None:
        self._call("wake", tuple(tags))
        if WEIGHTS in tags and self._level == 2 and self._fault == "lost-buffer":
            self._call("rpc", "smoke_lose_buffers")
        if KV_CACHE in tags and self._fault == "leak-per-cycle":
            self._call("rpc", "smoke_leak")

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        transport = transport or self.transports[0]
        if transport == "disk":
            return self._from_disk(tensors)
        # A session that failed is left open: what it has sent so far is no set of weights.
        self._begin()
        if transport == "nccl":
            sent = self._from_group(tensors)
        else:
            sent = self._from_handles(tensors, flattened=transport == FLATTENED)
        self._end()
        return sent

    def _begin(self) -> None:
        self._call("begin")

    def _end(self) -> None:
        self._call("end")

    def _from_handles(self, tensors: Iterable[tuple[str, torch.Tensor]], *, flattened: bool) -> int:
        """From the memory of this process on the same GPU, by handles of CUDA IPC."""
        sent = 0
        for bucket in buckets(tensors):
            there = [(name, tensor.detach().to(self._device)) for name, tensor in bucket]
            sent += sum(tensor.numel() * tensor.element_size() for _, tensor in there)
            self._synchronize()  # a handle says nothing of writes that are still on their way
            self._send(there, flattened=flattened)
            del there
        gpu.collect()
        return sent

    def _send(self, tensors: list[tuple[str, torch.Tensor]], *, flattened: bool) -> None:
        """One bucket, as handles; what they stand for lives until SGLang has answered."""
        given: object = flatten(tensors) if flattened else tensors
        load_format = "flattened_bucket" if flattened else None
        # Once for each rank: a handle counts who opens it, and is given up by the last.
        self._update([serialize(given) for _ in range(self._gpus)], load_format)

    def _update(self, serialized: list[bytes], load_format: str | None) -> None:
        self._call("from_tensors", serialized, load_format)

    def _from_disk(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        with tempfile.TemporaryDirectory(prefix="rollout-refit-") as folder:
            sent = write(tensors, self._model, Path(folder))
            self._load(folder)
            # SGLang remembers where its weights come from, and this folder goes.
        return sent

    def _load(self, folder: str) -> None:
        self._call("from_disk", folder)

    def _from_group(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """From another GPU by NCCL, as from a trainer that has GPUs of its own."""
        import torch
        from sglang.srt.utils import init_custom_process_group

        last = torch.cuda.device_count() - 1
        if last < self._gpus:
            raise EngineError("a refit by NCCL needs a GPU that the engine does not use")
        device = torch.device("cuda", last)
        name, port = f"rollout-{uuid.uuid4().hex[:8]}", free_port()
        sent = 0
        with torch.cuda.device(device):
            with self._meanwhile("join_group", "127.0.0.1", port, self._gpus + 1, name):
                group = init_custom_process_group(
                    backend="nccl",
                    init_method=f"tcp://127.0.0.1:{port}",
                    world_size=self._gpus + 1,
                    rank=0,
                    group_name=name,
                )
            try:
                for bucket in buckets(tensors):
                    there = [(n, t.detach().to(device).contiguous()) for n, t in bucket]
                    said = [
                        (n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in there
                    ]
                    with self._meanwhile("from_group", said, name):
                        for _, tensor in there:
                            torch.distributed.broadcast(tensor, src=0, group=group)
                            sent += tensor.numel() * tensor.element_size()
                        torch.cuda.synchronize(device)
            finally:
                if self._pipe is None:  # stopped, since it no longer answers in step
                    torch.distributed.destroy_process_group(group)
                else:
                    with self._meanwhile("leave_group", name):
                        torch.distributed.destroy_process_group(group)
        return sent

    def _synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)

    def reset_prefix_cache(self) -> None:
        self._call("flush")

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._call("rpc", "smoke_digests")
        return found

    def remember(self) -> None:
        success, message = self._call("check", "snapshot")
        if not success:
            raise EngineError(f"SGLang's weights checker took no snapshot: {message}")

    def unchanged(self) -> bool:
        return bool(self._call("check", "compare")[0])

    def held(self) -> int:
        return self._held

    def memory(self) -> int:
        return gpu.used(self._device)

    def inject(self, fault: str) -> None:
        self._fault = fault

    def stop(self) -> None:
        pipe, self._pipe = self._pipe, None
        process, self._process = self._process, None
        if process is None:
            return
        if pipe is not None:
            with contextlib.suppress(OSError, EOFError, TransportError):
                deliver(("stop", ()), pipe)
                pipe.poll(STOPPING)  # it waits for its children, which give the GPU back
            pipe.close()
        if process.pid is not None:
            process.join(5)
            process.kill()  # its children die with it
            process.join()
        discard(self._log)


def _completions(found: Iterable[Any]) -> list[Completion]:
    return [Completion(tuple(tokens), tuple(values), cached) for tokens, values, cached in found]


def buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], size: int = cuda_ipc.BUCKET_BYTES
) -> Iterable[list[tuple[str, torch.Tensor]]]:
    """Tensors in groups of at most ``size`` bytes, and those that are larger alone."""
    for bucket in cuda_ipc.plan(tensors, size):
        if bucket:
            yield [(name, tensor) for name, tensor, _ in bucket]


def serialize(given: object) -> bytes:
    """As SGLang's ``MultiprocessingSerializer``: tensors become handles that its processes open."""
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401 - teaches the pickler about tensors

    stream = io.BytesIO()
    ForkingPickler(stream).dump(given)
    return stream.getvalue()


def flatten(tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """One tensor of all bytes, and where each tensor lies in it, in SGLang's own types."""
    try:
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
    except ImportError:
        from sglang.srt.model_executor.model_runner import FlattenedTensorBucket
    bucket = FlattenedTensorBucket(named_tensors=tensors)
    return {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }


def write(tensors: Iterable[tuple[str, torch.Tensor]], model: Path, folder: Path) -> int:
    """A checkpoint of these tensors in a folder, with the model's config; returns their bytes."""
    from safetensors.torch import save_file

    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    save_file(here, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return sum(tensor.numel() * tensor.element_size() for tensor in here.values())


class Server(Remote, Engine):
    """SGLang's own server, driven over HTTP as verl, NeMo-RL, slime and AReaL do."""

    transports: tuple[str, ...] = ("cuda-ipc", FLATTENED, "disk")
    resuming = "/continue_generation"

    def __init__(self) -> None:
        super().__init__()
        self._tags = True
        self._sessions = False
        self._info = ""

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8:
            raise EngineError("this backend starts SGLang in bfloat16 only")
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput
        from sglang.srt.server_args import ServerArgs

        self._tags = "tags" in records.fields(ReleaseMemoryOccupationReqInput)
        options = arguments(model, dummy=dummy, level=level, gpus=gpus) | {"nccl_port": free_port()}
        given = known(options, ServerArgs)
        self._model, self._gpus, self._log = model, gpus, log_file()
        self._asleep = set()
        try:
            self._server = Http(flags(given), self._log, {})
            self._server.wait("/health")
            self._server.wait("/health_generate")
            self.pauses = self._server.offers("/pause_generation")
            self._sessions = self._server.offers(BEGIN)
            # The first is the newer name, and the one that slime asks for first.
            names = ("/server_info", "/get_server_info")
            self._info = next((name for name in names if self._server.offers(name)), names[0])
        except (EngineError, OSError) as error:
            self.stop()
            raise EngineError(f"SGLang's server did not start: {error}") from None
        self.levels = (1,) if given.get("enable_weights_cpu_backup") else (2,)
        self._held = KV_BYTES * gpus

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        asked = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": greedy(tokens),
            "return_logprob": True,
        }
        return _completions(completion(output) for output in self._http().call("/generate", asked))

    def about(self) -> dict[str, Any]:
        found = self._http().call(self._info)
        return {"model": found["model_path"], "gpus": found["tp_size"] * found.get("pp_size", 1)}

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        server = self._http()

        def abort(names: Sequence[str]) -> None:
            for name in names:
                server.call("/abort_request", {"rid": name})

        return self._stopped(prompts, tokens, after, abort)

    def halt(self, prompts: Sequence[Sequence[int]], tokens: int, after: int) -> list[Completion]:
        server = self._http()

        def pause(_: Sequence[str]) -> None:
            server.call("/pause_generation", {})

        return self._stopped(prompts, tokens, after, pause)

    def _stopped(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        after: int,
        stop: Callable[[Sequence[str]], None],
    ) -> list[Completion]:
        """Answers of so many tokens, stopped half-way; ``stop`` is given the requests' names."""
        server = self._http()
        names = [uuid.uuid4().hex for _ in prompts]

        def stream(name: str, prompt: Sequence[int]) -> Iterator[Completion]:
            asked = {
                "input_ids": list(prompt),
                "sampling_params": greedy(tokens),
                "return_logprob": True,
                "stream": True,
                "rid": name,
            }
            for output in server.events("/generate", asked):
                yield _completions([completion(output)])[0]

        return interrupted(
            [stream(name, prompt) for name, prompt in zip(names, prompts, strict=True)],
            after,
            lambda: stop(names),
        )

    def reset_prefix_cache(self) -> None:
        end = time.monotonic() + IDLE
        while True:  # it refuses while it is busy, and is so a little longer than its answers take
            try:
                self._http().call("/flush_cache", {})
            except EngineError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            else:
                return

    def sleep(self, level: int) -> None:
        if level not in self.levels:
            raise EngineError(f"the server was not started for sleep of level {level}")
        self.reset_prefix_cache()  # it must be idle; a scheduler that is not would end itself
        self._http().call("/release_memory_occupation", self._tagged((KV_CACHE, WEIGHTS)))
        self._asleep = {KV_CACHE, WEIGHTS}

    def wake(self, tags: Sequence[str]) -> None:
        wanted = [tag for tag in tags if tag in self._asleep]
        if not wanted:  # one that is awake would end the scheduler
            return
        self._http().call("/resume_memory_occupation", self._tagged(wanted))
        self._asleep = self._asleep - set(wanted) if self._tags else set()

    def _tagged(self, tags: Sequence[str]) -> dict[str, list[str]]:
        return {"tags": list(tags)} if self._tags else {}

    def _update(self, serialized: list[bytes], load_format: str | None) -> None:
        asked = {
            "serialized_named_tensors": [base64.b64encode(one).decode() for one in serialized],
            "load_format": load_format,
            "flush_cache": False,
        }
        self._asked_for("/update_weights_from_tensor", asked)

    def _begin(self) -> None:
        if self._sessions:
            self._asked_for(BEGIN, {"selector": "all"})

    def _end(self) -> None:
        if self._sessions:
            self._asked_for(END, {})

    def _asked_for(self, path: str, asked: dict[str, Any]) -> None:
        found = self._http().call(path, asked)
        if not found["success"]:
            raise EngineError(f"SGLang refused the weights: {found['message']}")

    def _load(self, folder: str) -> None:
        self.reset_prefix_cache()  # it empties it itself, and a scheduler that cannot ends itself
        # A server that was started on dummy weights would load dummy weights, were it not told.
        asked = {"model_path": folder, "load_format": "auto"}
        self._asked_for("/update_weights_from_disk", asked)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        if transport == "nccl":
            raise EngineError("this backend sends weights to SGLang's server by no NCCL")
        sent = super().refit(tensors, transport)
        self._held = KV_BYTES * self._gpus + sent
        return sent

    def digests(self) -> dict[str, str]:
        raise EngineError("SGLang's server gives no digests of what it holds")

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()
        discard(self._log)

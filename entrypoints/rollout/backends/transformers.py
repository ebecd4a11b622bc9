"""The reference engine: transformers on the CPU, in a process of its own.

It is small, but nothing in it is pretended: a pool of key-value blocks with a prefix cache,
decoding in batches, weights and pool in anonymous memory that ``madvise`` really gives back to the
system, and weights received over shared memory from another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import multiprocessing
import os
import platform
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from rollout.backends import KV_CACHE, WEIGHTS, Abilities, Completion, EngineError
from rollout.backends.piped import Piped
from rollout.transport import TransportError, as_bytes, receive, send

if TYPE_CHECKING:
    import torch

ABILITIES = Abilities(
    ("shared-memory",), lora=True, long=True, moe=True, pressure=True, fp8_kv=True
)
BLOCK_TOKENS = 16
KV_POOL_BYTES = 128 << 20
LEAK_BYTES = 24 << 20
# Parameters below which a second thread costs more than it gives (measured: 14 times slower on two
# busy cores, because the threads of a tiny product wait for each other in a loop).
SMALL = 50_000_000


class Engine(Piped):
    """The trainer's side of the reference engine (see :class:`rollout.backends.Engine`)."""

    transports: tuple[str, ...] = ABILITIES.transports
    levels: tuple[int, ...] = ABILITIES.levels
    kv_bytes = KV_POOL_BYTES
    cache_block = BLOCK_TOKENS
    mlp_bias = True
    witness = True
    insisting: Mapping[str, str] = MappingProxyType({})

    def __init__(self) -> None:
        self.device = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
        super().__init__()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._held = 0

    @property
    def serve(self) -> Callable[..., None]:
        """The main loop of the engine's own process."""
        return _serve

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        if fp8 or gpus > 1:
            raise EngineError("the reference engine has no weights in fp8 and no GPUs")
        # spawn: a fork would share the parent's memory, and then neither side's could be counted.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, str(model), dummy, os.getpid())
        self._process = context.Process(target=self.serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._held = self._answer()

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        found = self._call("generate", [list(p) for p in prompts], tokens)
        return [Completion(*answer) for answer in found]

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        # The engine tells every token of its batch, and goes on when it is told to.
        found = self._call("interrupt", [list(p) for p in prompts], tokens)
        while isinstance(found, int):
            found = self._call("go on" if found < after else "stop here")
        return [Completion(*answer) for answer in found]

    def sleep(self, level: int) -> None:
        self._call("sleep", level)

    def wake(self, tags: Sequence[str]) -> None:
        self._call("wake", tuple(tags))

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        self._ask("refit")
        try:
            sent = send(tensors, self._connection())
        except TransportError as error:
            raise EngineError(str(error)) from None
        self._answer()
        return sent

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache")

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._call("digests")
        return found

    def remember(self) -> None:
        self._call("remember")

    def unchanged(self) -> bool:
        return bool(self._call("unchanged"))

    def held(self) -> int:
        return self._held

    def memory(self) -> int:
        if self._process is None or not self._process.is_alive():
            return 0
        # smaps_rollup is exact; the counters of statm are gathered lazily per processor.
        text = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text(encoding="ascii")
        rss = next(line for line in text.splitlines() if line.startswith("Rss:"))
        return int(rss.split()[1]) * 1024

    def inject(self, fault: str) -> None:
        self._call("inject", fault)

    def stop(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(("stop", ()))
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.join(1)  # what is still busy then is not waited for
            self._process.kill()
            self._process.join()
            self._process = None


def _processor() -> str:
    """The name of the processor as the kernel has it."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


class Region:
    """Anonymous memory whose pages can be given back while its addresses stay.

    vLLM's allocator does the same on a GPU: tensors that look into it stay valid, their content
    does not.
    """

    def __init__(self, size: int) -> None:
        import torch

        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Private: shared anonymous memory would survive MADV_DONTNEED.
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._used = 0

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape, dtype and content inside the region."""
        size = tensor.numel() * tensor.element_size()
        place = self.bytes[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        place.copy_(as_bytes(tensor))
        return place.view(tensor.dtype).reshape(tensor.shape)

    def touch(self) -> None:
        """Make every page resident, zeroed where it was given back."""
        pages = self.bytes[:: mmap.PAGESIZE]
        pages.copy_(pages.clone())

    def release(self) -> None:
        """Give the pages back to the operating system; they read as zeros from now on."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Worker:
    """The engine's own process: model, memory, and the requests it answers."""

    def __init__(self, model: Path, dummy: bool) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(model)
        torch.manual_seed(0)
        if dummy:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.model.eval()
        held = [*self.model.parameters(), *self.model.buffers()]
        if sum(t.numel() for t in held) < SMALL:
            torch.set_num_threads(1)
        self.weights = Region(sum(t.numel() * t.element_size() + 64 for t in held))
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = self.weights.take(parameter.data)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.weights.take(buffer)
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2, heads, BLOCK_TOKENS, config.head_dim)
        elements = shape[0] * shape[1] * shape[2] * shape[3] * shape[4]
        count = max(KV_POOL_BYTES // (2 * elements), 64)
        self.pool = Region(2 * elements * count)
        self.pool.touch()
        self.blocks = self.pool.bytes[: 2 * elements * count].view(torch.bfloat16)
        self.blocks = self.blocks.reshape(count, *shape)
        self.cached: dict[tuple[int, ...], int] = {}
        self.backup: IO[bytes] | None = None
        self.saved: dict[str, torch.Tensor] = {}
        self.asleep: set[str] = set()
        self.noted: dict[str, str] = {}
        self.faults: set[str] = set()
        self.leaks: list[bytearray] = []

    def held(self) -> int:
        return self.weights.size + self.pool.size

    # Generation: prefill one by one through the prefix cache, then decode all together.

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int,
        enough: Callable[[int], bool] = lambda _: False,
    ) -> list[tuple[Any, Any, int]]:
        """Tokens, log-probabilities and cached tokens of the prompt, for each prompt.

        ``enough`` is asked after every token, with how many there are; True ends all answers.
        """
        import torch

        if self.asleep:
            raise EngineError(f"asleep: {', '.join(sorted(self.asleep))} not woken")
        with torch.inference_mode():
            caches, rows, cached = [], [], []
            for prompt in prompts:
                cache, logits, known = self._prefill(prompt)
                caches.append(cache)
                rows.append(logits)
                cached.append(known)
            found = self._decode(prompts, caches, torch.stack(rows), tokens, enough)
        return [(*answer, known) for answer, known in zip(found, cached, strict=True)]

    def interrupt(
        self, prompts: list[list[int]], tokens: int, connection: Connection
    ) -> list[tuple[Any, Any, int]]:
        """Generate, and tell the other side of every token; it says whether to go on."""

        def told(count: int) -> bool:
            connection.send(count)
            return bool(connection.recv()[0] == "stop here")

        return self.generate(prompts, tokens, told)

    def _prefill(self, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys and values (layer, 2, head, token, dim), last logits, and tokens from the cache."""
        import torch
        from transformers import DynamicCache

        ends = range(BLOCK_TOKENS, len(prompt), BLOCK_TOKENS)
        known = []
        for end in ends:
            block = self.cached.get(tuple(prompt[:end]))
            if block is None:
                break
            known.append(self.blocks[block])
        cache = DynamicCache()
        if known:
            past = torch.cat(known, dim=3)
            for layer, (keys, values) in enumerate(past):
                cache.update(keys[None], values[None], layer)
        start = len(known) * BLOCK_TOKENS
        output = self.model(
            input_ids=torch.tensor([prompt[start:]]), past_key_values=cache, use_cache=True
        )
        state = torch.stack([torch.stack([la.keys[0], la.values[0]]) for la in cache.layers])
        self._remember_all(prompt, state)
        return state, output.logits[0, -1], start

    def _remember_all(self, tokens: list[int], state: torch.Tensor) -> None:
        """Keep the whole blocks of what was computed (layer, 2, head, token, dim)."""
        for end in range(BLOCK_TOKENS, state.shape[3] + 1, BLOCK_TOKENS):
            self._remember(tuple(tokens[:end]), state[:, :, :, end - BLOCK_TOKENS : end])

    def _remember(self, prefix: tuple[int, ...], state: torch.Tensor) -> None:
        if prefix in self.cached:
            return
        if len(self.cached) >= len(self.blocks):
            oldest = next(iter(self.cached))
            block = self.cached.pop(oldest)
        else:
            block = len(self.cached)
        self.blocks[block].copy_(state)
        self.cached[prefix] = block

    def _decode(
        self,
        prompts: list[list[int]],
        states: list[torch.Tensor],
        logits: torch.Tensor,
        tokens: int,
        enough: Callable[[int], bool],
    ) -> list[tuple[Any, Any]]:
        import torch
        from transformers import DynamicCache

        longest = max(s.shape[3] for s in states)
        padded = [torch.nn.functional.pad(s, (0, 0, longest - s.shape[3], 0)) for s in states]
        batch = torch.stack(padded, dim=2)  # (layer, 2, request, head, token, dim)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(batch):
            cache.update(keys, values, layer)
        mask = torch.zeros(len(states), longest + tokens, dtype=torch.long)
        for row, state in enumerate(states):
            mask[row, longest - state.shape[3] :] = 1
        positions = torch.tensor([[s.shape[3]] for s in states])
        chosen, scores = [], []
        for step in range(tokens):
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            best = logprobs.argmax(dim=-1, keepdim=True)
            chosen.append(best)
            scores.append(logprobs.gather(-1, best))
            if enough(step + 1) or step + 1 == tokens:
                break
            logits = self.model(
                input_ids=best,
                attention_mask=mask[:, : longest + step + 1],
                position_ids=positions + step,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        ids, values = torch.cat(chosen, dim=1).tolist(), torch.cat(scores, dim=1).tolist()
        # The next turn of a conversation begins with this answer. Its last token was not computed.
        held = torch.stack([torch.stack([la.keys, la.values]) for la in cache.layers])
        for row, (prompt, chosen_ids) in enumerate(zip(prompts, ids, strict=True)):
            self._remember_all(prompt + chosen_ids, held[:, :, row, :, longest - len(prompt) :])
        return [(tuple(i), tuple(v)) for i, v in zip(ids, values, strict=True)]

    # Sleep and wake.

    def sleep(self, level: int) -> None:
        if self.asleep:
            raise EngineError("already asleep")
        # What is neither a parameter nor in a checkpoint comes back from nowhere else.
        self.saved = {n: b.clone() for n, b in self.model.named_buffers()}
        if level == 1:
            # On disk, where an offload frees memory; without a name, so nothing outlives a crash.
            self.backup = tempfile.TemporaryFile()  # noqa: SIM115 - open until waking
            self.backup.write(memoryview(self.weights.bytes.numpy()))
            self.backup.flush()  # a full disk has to be found before the pages are given back
        self.reset_prefix_cache()
        self.weights.release()
        self.pool.release()
        self.asleep = {WEIGHTS, KV_CACHE}

    def wake(self, tags: tuple[str, ...]) -> None:
        if WEIGHTS in tags and WEIGHTS in self.asleep:
            if self.backup is not None:
                self.backup.seek(0)
                self.backup.readinto(memoryview(self.weights.bytes.numpy()))  # type: ignore[attr-defined]
                self.backup.close()
                self.backup = None
            self.weights.touch()
            if "lost-buffer" not in self.faults:
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(self.saved[name])
        if KV_CACHE in tags and KV_CACHE in self.asleep:
            self.pool.touch()
        self.asleep -= set(tags)
        if "leak-per-cycle" in self.faults and not self.asleep:
            self.leaks.append(bytearray(b"x" * LEAK_BYTES))

    # Refit.

    def refit(self, connection: Connection) -> None:
        import torch

        if WEIGHTS in self.asleep:
            raise EngineError("asleep: wake the weights before a refit")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in receive(connection):
                if name not in parameters:
                    raise EngineError(f"unknown tensor {name!r}")
                if parameters[name].shape != tensor.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(parameters[name].shape)}"
                    raise EngineError(f"tensor {name!r} has shape {shapes}")
                parameters[name].copy_(tensor)
                del tensor  # a view of the bucket, which is unmapped at the end

    def reset_prefix_cache(self) -> None:
        self.cached.clear()

    def digests(self) -> dict[str, str]:
        return {
            name: hashlib.sha256(memoryview(as_bytes(tensor).numpy())).hexdigest()
            for name, tensor in self.model.named_parameters()
        }

    def remember(self) -> None:
        self.noted = self.digests()

    def unchanged(self) -> bool:
        return self.digests() == self.noted

    def inject(self, fault: str) -> None:
        self.faults.add(fault)


def _serve(connection: Connection, model: str, dummy: bool, parent: int) -> None:
    """The engine's main loop: one message, one answer; an exception is an answer too."""
    # The terminal's Ctrl-C goes to both processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the trainer
    if os.getppid() != parent:
        return
    try:
        worker = Worker(Path(model), dummy)
        connection.send(worker.held())
        while True:
            method, arguments = connection.recv()
            if method == "stop":
                break
            try:
                call = getattr(worker, method)
                if method in ("refit", "interrupt"):  # these talk while they work
                    arguments = (*arguments, connection)
                result: object = call(*arguments)
            except Exception as error:
                result = EngineError(f"{error}")
                if not isinstance(error, EngineError):
                    traceback.print_exc()
            connection.send(result)
    except (EOFError, BrokenPipeError):
        pass  # the trainer ended
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(EngineError(f"{type(error).__name__}: {error}"))

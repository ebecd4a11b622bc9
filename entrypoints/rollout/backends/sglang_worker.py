"""What runs in SGLang's processes: the one that drives the engine, and the scheduler on the GPU.

The driver is a process of its own, because SGLang takes a whole one for itself: a failing scheduler
has it kill its process with all its children, and shutting down kills all children too. It calls
SGLang's own engine, whose coroutines it awaits directly where the engine has no method for them.

The scheduler is SGLang's, with the methods of :class:`Extension` added; ``collective_rpc`` calls
them by name and gives nothing back, so an answer goes through a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout import placement
from rollout.backends import records

LEAK_BYTES = 256 << 20
IDLE = 30.0  # seconds within which the scheduler has to have finished what it was asked for
ABORTED = 10.0  # seconds within which an aborted request has to end
# Balanced or not: the older name is read with its own meaning by older versions alone. From 0.5.10
# on its value is copied to the newer name, so that "disable" switches the check on.
BALANCE = ("SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "0")
NEWER_BALANCE = ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "1")
# Options that newer versions have under another name.
RENAMED = {"cuda_graph_max_bs": "cuda_graph_max_bs_decode"}
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Extension:
    """Methods of the scheduler process; ``self`` is SGLang's scheduler.

    Each takes the path of a file for its answer, as SGLang calls it: named from 0.5 on, and before
    that in a dictionary.
    """

    tp_worker: Any

    def smoke_held(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """Bytes of weights and KV cache in the memory that sleeping gives back."""
        runner = _runner(self)
        tensors = [*runner.model.parameters(), *runner.model.buffers()]
        pool = runner.token_to_kv_pool
        tensors += [*pool.k_buffer, *pool.v_buffer]
        _reply(given, path, sum(t.numel() * t.element_size() for t in tensors))

    def smoke_digests(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """sha256 of each weight's bytes by its Hugging Face name."""
        _reply(given, path, placement.digests(_runner(self).model))

    def smoke_leak(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: keep some memory outside the pool."""
        import torch

        kept = self.__dict__.setdefault("smoke_leaks", [])
        kept.append(torch.ones(LEAK_BYTES, dtype=torch.uint8, device="cuda"))
        _reply(given, path, None)

    def smoke_lose_buffers(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: buffers as new memory has them, had SGLang not saved them before sleeping."""
        for buffer in _runner(self).model.buffers():
            buffer.zero_()
        _reply(given, path, None)


def _runner(scheduler: Any) -> Any:
    worker = scheduler.tp_worker
    return getattr(worker, "worker", worker).model_runner  # 0.4.6 wraps the one in the other


def _rank() -> int:
    """This process among those of the engine.

    The scheduler of 0.5.23 does not know it any more; torch does, whatever the version.
    """
    import torch

    return int(torch.distributed.get_rank())


def _reply(given: dict[str, str] | None, path: str, answer: object) -> None:
    if _rank() == 0:
        Path((given or {"path": path})["path"]).write_text(json.dumps(answer), encoding="utf-8")


def schedule(*arguments: Any, **options: Any) -> None:
    """SGLang's scheduler process, with our methods."""
    die_with_parent()
    from sglang.srt.managers import scheduler

    for name in vars(Extension):
        if name.startswith("smoke_"):
            if hasattr(scheduler.Scheduler, name):
                raise RuntimeError(f"SGLang's scheduler has a method {name!r} of its own")
            setattr(scheduler.Scheduler, name, getattr(Extension, name))
    scheduler.run_scheduler_process(*arguments, **options)


def known(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that this version has, ``kind`` being its ``ServerArgs``, by its own names."""
    there = records.fields(kind)
    names = {name: name if name in there else RENAMED.get(name, name) for name in options}
    return {names[name]: value for name, value in options.items() if names[name] in there}


def _start(options: dict[str, Any]) -> tuple[Any, bool]:
    """SGLang's engine with our scheduler process, and whether it keeps a copy of its weights."""
    from sglang.srt.entrypoints import engine as module
    from sglang.srt.server_args import ServerArgs

    given = known(options, ServerArgs)  # `Driver.facts` says what can be done without the others
    kind: Any = module.Engine
    if hasattr(kind, "run_scheduler_process_func"):
        kind = type("Engine", (kind,), {"run_scheduler_process_func": staticmethod(schedule)})
    else:
        vars(module)["run_scheduler_process"] = schedule
    return kind(**given), bool(given.get("enable_weights_cpu_backup"))


class Driver:
    """The engine's own process; its methods are called by name from the trainer's side."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.engine, self.backup = _start(options)
        self.manager = self.engine.tokenizer_manager
        self.tags = bool(inspect.signature(self.engine.release_memory_occupation).parameters)
        self.asleep: set[str] = set()

    def facts(self) -> dict[str, Any]:
        """What this version and these options make possible."""
        try:
            from sglang.srt.environ import envs

            newer = hasattr(envs, NEWER_BALANCE[0])
        except ImportError:
            newer = False
        return {
            "held": self.rpc("smoke_held"),
            "levels": (1,) if self.backup else (2,),
            "witness": hasattr(self.manager, "check_weights"),
            "insisting": dict([NEWER_BALANCE if newer else BALANCE]),
        }

    def rpc(self, method: str) -> Any:
        """Call a method of :class:`Extension` in the scheduler."""
        with tempfile.TemporaryDirectory(prefix="rollout-answer-") as folder:
            path = Path(folder) / "answer.json"
            self.engine.collective_rpc(method, path=str(path))
            return json.loads(path.read_text(encoding="utf-8"))

    def await_(self, coroutine: Any) -> Any:
        loop = getattr(self.engine, "loop", None) or asyncio.get_event_loop()
        return loop.run_until_complete(coroutine)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[Any]:
        found = self.engine.generate(
            input_ids=prompts, sampling_params=greedy(tokens), return_logprob=True
        )
        return [completion(output) for output in found]

    def interrupt(self, prompts: list[list[int]], tokens: int, after: int) -> list[Any]:
        return self.await_(self._interrupt(prompts, tokens, after))  # type: ignore[no-any-return]

    async def _interrupt(self, prompts: list[list[int]], tokens: int, after: int) -> list[Any]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        names = [uuid.uuid4().hex for _ in prompts]
        latest: list[Any] = [None] * len(prompts)
        enough = asyncio.Event()

        async def follow(number: int) -> None:
            asked = GenerateReqInput(
                input_ids=prompts[number],
                sampling_params=greedy(tokens),
                return_logprob=True,
                stream=True,
                rid=names[number],
            )
            async for output in self.manager.generate_request(asked, None):
                latest[number] = completion(output)
                if all(answer and len(answer[0]) >= after for answer in latest):
                    enough.set()

        tasks = [asyncio.create_task(follow(number)) for number in range(len(prompts))]
        waiting = asyncio.create_task(enough.wait())
        # Whichever ends early, by an error or with all its tokens, ends the wait too.
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        for name in names:
            self.manager.abort_request(name)
        done, late = await asyncio.wait(tasks, timeout=ABORTED)
        for task in late:  # 0.4.6 forgets an aborted request, and whoever waits for it
            task.cancel()
        for task in done:
            task.result()
        if not all(answer and len(answer[0]) >= after for answer in latest):
            raise RuntimeError(f"SGLang ended an answer before it had {after} tokens")
        return latest

    def flush(self) -> None:
        """Empty the prefix cache. SGLang refuses while it is busy, and is so a little longer than
        its answers take."""
        end = time.monotonic() + IDLE
        while not getattr(self.engine.flush_cache(), "success", True):
            if time.monotonic() > end:
                raise RuntimeError(f"SGLang did not empty its prefix cache for {IDLE:.0f} s")
            time.sleep(0.01)

    def sleep(self, level: int) -> None:
        if (level == 1) != self.backup:
            kept = "with" if self.backup else "without"
            raise RuntimeError(f"started {kept} a copy of the weights, it has no level {level}")
        self.flush()  # it must be idle; a scheduler that is not would end itself
        tags = ["kv_cache", "weights"]
        if self.tags:
            self.engine.release_memory_occupation(tags=tags)
        else:
            self.engine.release_memory_occupation()
        self.asleep = set(tags)

    def wake(self, tags: Sequence[str]) -> None:
        wanted = [tag for tag in tags if tag in self.asleep]
        if not wanted:
            return
        if self.tags:
            self.engine.resume_memory_occupation(tags=wanted)
            self.asleep -= set(wanted)
        else:  # one that knows no tags wakes as a whole
            self.engine.resume_memory_occupation()
            self.asleep = set()

    def begin(self) -> None:
        """Open a session of updates, where this version wants one: it refuses weights outside."""
        if hasattr(self.engine, "begin_weight_update"):
            _succeeded(self.engine.begin_weight_update())

    def end(self) -> None:
        """Close what :meth:`begin` opened."""
        if hasattr(self.engine, "end_weight_update"):
            _succeeded(self.engine.end_weight_update())

    def from_tensors(self, serialized: list[Any], load_format: str | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        asked = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=serialized, load_format=load_format, flush_cache=False
        )
        _succeeded(self.await_(self.manager.update_weights_from_tensor(asked, None)))

    def from_disk(self, folder: str) -> None:
        self.flush()  # it empties the cache itself, and a scheduler that cannot ends itself
        _succeeded(self.engine.update_weights_from_disk(folder, load_format="auto"))

    def join_group(self, address: str, port: int, size: int, name: str) -> None:
        _succeeded(
            self.engine.init_weights_update_group(
                master_address=address,
                master_port=port,
                rank_offset=1,
                world_size=size,
                group_name=name,
                backend="nccl",
            )
        )

    def leave_group(self, name: str) -> None:
        if hasattr(self.engine, "destroy_weights_update_group"):
            _succeeded(self.engine.destroy_weights_update_group(name))

    def from_group(self, tensors: list[tuple[str, str, list[int]]], group: str) -> None:
        """Take tensors (name, dtype, shape) that the trainer broadcasts in this order."""
        update = self.engine.update_weights_from_distributed
        if "names" in inspect.signature(update).parameters:
            names, dtypes, shapes = (list(column) for column in zip(*tensors, strict=True))
            _succeeded(update(names, dtypes, shapes, group_name=group, flush_cache=False))
            return
        # 0.4.6 takes them one by one, and empties the cache after each: see from_disk.
        self.flush()
        for name, dtype, shape in tensors:
            _succeeded(update(name, dtype, shape))

    def check(self, action: str) -> tuple[bool, str]:
        """SGLang's own weights checker: snapshot, or compare with the snapshot."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        found = self.await_(self.manager.check_weights(CheckWeightsReqInput(action=action), None))
        return bool(found[0]), str(found[1])

    def stop(self) -> None:
        self.engine.shutdown()


def greedy(tokens: int) -> dict[str, Any]:
    """Sampling parameters of so many likeliest tokens."""
    return {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}


def completion(output: dict[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...], int]:
    """Tokens, log-probabilities and cached tokens of the prompt, of one of SGLang's answers."""
    meta = output["meta_info"]
    chosen = meta["output_token_logprobs"]
    tokens = tuple(token for _, token, *_ in chosen)
    return tokens, tuple(value for value, *_ in chosen), int(meta.get("cached_tokens") or 0)


def _succeeded(found: Any) -> None:
    """Raise where SGLang says that it did not do it; nothing else would."""
    success, message = found[0], found[1]
    if not success:
        raise RuntimeError(f"SGLang refused the weights: {message}")


def drive(connection: Connection, options: dict[str, Any], log: str, parent: int) -> None:
    """The driver's main loop: one message, one answer; an exception is an answer too."""
    die_with_parent()
    if os.getppid() != parent:
        return
    # The terminal's Ctrl-C goes to every process; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The terminal is the proof's table; what SGLang writes is kept for whoever asks why.
    with Path(log).open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        driver = Driver(options)
        connection.send(driver.facts())
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(_told(error))
        raise
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = connection.recv()
            call: Callable[..., Any] = getattr(driver, method)
            try:
                result = call(*arguments)
            except Exception as error:
                result = _told(error)
            connection.send(result)
            if method == "stop":
                break


def _told(error: Exception) -> RuntimeError:
    """An exception that every process can read: SGLang's own types stay in theirs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RuntimeError(lines[-1])

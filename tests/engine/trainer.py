"""The trainer's side of a real vLLM on a CPU: our backend, with a stand-in for what needs a GPU.

    python -m tests.engine.trainer offline|served|pressed|rounded FILE

runs the checks of the proof on one engine, on one server, or on one engine under pressure, and
writes what they said as JSON. It runs where vLLM is (:mod:`tests.engine.environment`), without
pytest and the tools of this project.

What is another than on a GPU, and all of it:

- the device is the CPU. It has no name, no free memory and no CUDA IPC to ask for. A handle of
  shared memory goes the way of a CUDA IPC handle, through the same messages and buckets. Buckets
  are small: the tiny probe fills several, and its largest tensors have handles of their own;
- memory in use is that of the engine's processes. In it are kernels that are made for a new number
  of tokens, of some MB and at any time. So it may grow by as much as on a GPU, where they are not;
- the KV cache is as small as its requests allow;
- sleep mode is not asked for, since this vLLM refuses it: :func:`asleep` shows the sentence;
- blocks have 32 tokens, since the CPU's kernels take multiples of 32 alone, and 128 of their own
  accord, which is more than a prompt of the probe has;
- ``enforce_eager``, since compiling would take longer than all checks;
- the worker's part is in :mod:`tests.engine.worker`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollout import checks, cuda_ipc, faults, oracle, probe, smoke, vllm_names
from rollout.backends import KV_CACHE, WEIGHTS, Completion, EngineError, gpu, interface, vllm
from rollout.faults import Faulty

from .asked import CALLED, INJECTED, MOVED, OFFLINE

KV_BYTES = 8 << 20  # 16 requests of 512 tokens
BUCKET = 700 << 10  # less than a projection of the MLP, more than any other tensor
BLOCK = 32
PACE = 0.1  # seconds
OURS = "tests.engine.worker.Extension"


def descendants(process: int) -> list[int]:
    """The processes that came of one, itself left out."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [process]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def used(_: object = None) -> int:
    """Bytes of memory that the engine's processes have."""
    total = 0
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(text.partition("Rss:")[2].split()[0]) << 10
    return total


_arguments = vllm.arguments


def arguments(*given: Any, **named: Any) -> dict[str, Any]:
    """The backend's own, with what the CPU refuses or wants otherwise."""
    return instead(_arguments(*given, **named))


def instead(own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a backend, with what the CPU refuses or wants otherwise."""
    return own | {
        "enable_sleep_mode": False,
        "worker_extension_cls": OURS,
        "block_size": BLOCK,
        "enforce_eager": True,
    }


def stand_in() -> None:
    """Put the CPU where the backend looks for a GPU."""
    gpu.first = lambda: ("this CPU", torch.device("cpu"))
    gpu.used = used
    torch.cuda.mem_get_info = lambda *_: (1 << 30, 1 << 30)
    # By name: by descriptor a process that was not forked from this one could not open it.
    torch.multiprocessing.set_sharing_strategy("file_system")
    cuda_ipc.send = partial(cuda_ipc.send, size=BUCKET)
    vllm.arguments = arguments
    vllm.KV_BYTES = vllm.Engine.kv_bytes = KV_BYTES
    checks.GROWTH_CPU = checks.GROWTH
    torch.set_num_threads(1)  # as in the engine's process: for a tiny model more is slower


def made(engine: vllm.Engine, folder: Path, serve: Callable[[], Any] | None = None) -> checks.Trial:
    """What the checks work on, as ``rollout smoke`` makes it for an image of the CPU."""
    config = probe.config("tiny", mlp_bias=engine.mlp_bias)
    weights = probe.weights(config, smoke.SEED)
    others = probe.weights(config, smoke.OTHER_SEED)
    probe.save(folder, config, {})
    return checks.Trial(
        engine=engine,
        model=folder,
        weights=weights,
        others=others,
        oracle=oracle.Oracle(config, weights),
        other_oracle=oracle.Oracle(config, others),
        prompts=probe.prompts(config, smoke.SEED, smoke.PROMPTS),
        cycles=smoke.CYCLES,
        bound=oracle.BOUND_BF16,
        sleep_levels=(1,),
        transports=engine.transports,
        serve=serve,
    )


def buckets(trial: checks.Trial) -> list[int]:
    """How many tensors are in each bucket of a refit; 0 for one that has a handle of its own."""
    planned = cuda_ipc.plan(trial.weights.items(), BUCKET)
    return [sum(offset is not None for *_, offset in bucket) for bucket in planned]


def outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """What a check said: its metrics, the reason of its failure, its seconds."""
    begun = time.perf_counter()
    metrics, reason = {}, ""
    try:
        metrics = action()
    except checks.Failed as failed:
        metrics, reason = failed.metrics, failed.reason
    except Exception as error:  # told as the reason, and no end of the rest
        reason = f"{type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - begun, 1)
    return {"metrics": metrics, "reason": reason, "seconds": seconds}


def compared() -> dict[str, Any]:
    """The check ``interface`` as an image runs it, before anything is put in place of anything.

    Once as it is, and once with the module that has moved in this release.
    """
    as_it_is = interface.compared("vllm", ("fp8", "server"))
    vllm_names._MODULES.update(MOVED)
    return {"as it is": as_it_is, "with the moved": interface.compared("vllm", ("fp8", "server"))}


def signatures() -> dict[str, list[tuple[str, str, bool]]]:
    """Of each callable of vLLM its parameters: name, kind, and whether it can be left out."""
    seen, found = interface.Comparison(), {}
    for name in CALLED:
        parameters = inspect.signature(seen.thing(name)).parameters.values()
        found[name] = [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]
    return found


def asleep(folder: Path) -> str:
    """What this vLLM says where sleep mode is asked for, as every GPU image does."""
    engine = vllm.Engine()
    own = vllm.arguments
    vllm.arguments = lambda *given, **named: own(*given, **named) | {"enable_sleep_mode": True}
    try:
        engine.start(folder, dummy=True)
    except EngineError as error:
        return str(error)
    else:
        return ""
    finally:
        engine.stop()
        vllm.arguments = own


def injected(trial: checks.Trial, fault: str) -> dict[str, Any]:
    """A fault on the running engine. Where a refit has to find it, the engine has other weights."""
    check = faults.FAULTS[fault].check
    trial.refit(trial.weights if check != "refit" else trial.others)
    broken = copy.copy(trial)
    broken.engine, broken.fault = Faulty(trial.engine, fault), fault
    found = outcome(lambda: checks.CHECKS[check](broken))
    failed = {check: found["reason"]} if found["reason"] else {}
    return {**found, "unseen": faults.unseen(fault, failed, [check])}


class Leaking(Faulty):
    """Keeps some memory in each refit; the fault of this kind is made in a sleep."""

    def refit(self, tensors: Any, transport: str = "") -> int:
        sent = super().refit(tensors, transport)
        self._engine._rpc("smoke_leak")
        return sent


def filled(engine: vllm.Engine) -> dict[str, Any]:
    """As many requests as it takes at once, each as long as it can be, from an empty cache.

    Its cache is in memory then, all of it; else a check that watches memory would see it grow.
    """
    engine.reset_prefix_cache()
    length = vllm.LONGEST - 1
    # The first block of each is another one, or they would share the rest.
    prompts = [[4 + first, *range(5, 4 + length)] for first in range(vllm.REQUESTS)]
    tokens = [len(answer.tokens) for answer in engine.generate(prompts, 1)]
    engine.reset_prefix_cache()
    return {"tokens": tokens}


def killed(engine: vllm.Engine) -> dict[str, Any]:
    """An engine whose worker is killed: what the next call says, and what stopping leaves."""
    begun = time.perf_counter()
    os.kill(engine._process, 9)
    reason = ""
    try:
        engine.generate([[5, 6, 7]], 4)
    except EngineError as error:
        reason = str(error)
    seconds = time.perf_counter() - begun
    engine.stop()
    return {"reason": reason, "seconds": seconds, "left": left()}


def left(patience: float = 10.0) -> list[str]:
    """The commands of what still runs, once it had time to end.

    Python's tracker of shared memory and torch's manager of it are ours, and end with us.
    """
    end = time.monotonic() + patience
    while True:
        found = []
        for process in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                found.append(command.replace(b"\0", b" ").decode().strip())
        found = [c for c in found if "resource_tracker" not in c and "torch_shm_manager" not in c]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def offline(folder: Path) -> Iterator[tuple[str, Any]]:
    """One engine: every check that needs no sleep, then the faults."""
    yield "interface", compared()
    yield "signatures", signatures()
    stand_in()
    engine = vllm.Engine()
    trial = made(engine, folder)
    yield "asleep", asleep(folder)
    try:
        yield "start", outcome(lambda: smoke.start(trial, dummy=True))
        yield "block", engine.cache_block
        yield "buckets", buckets(trial)
        yield "filled", filled(engine)
        for name in OFFLINE:
            yield name, outcome(lambda name=name: checks.CHECKS[name](trial))
        for fault in INJECTED:
            yield fault, injected(trial, fault)
        leaking = copy.copy(trial)
        leaking.engine = Leaking(engine, "leak-per-cycle")
        yield "leak", outcome(lambda: checks.refits(leaking))
        yield "killed", killed(engine)
    finally:
        engine.stop()


class Kept(vllm.Server):
    """A server that runs on when a check has done with it, so that the next one starts none.

    While its requests are to be stopped, each step takes longer. The tiny probe would have answered
    them all, before a busy machine lets anybody say stop.
    """

    def halt(self, *given: Any) -> list[Completion]:
        with self._paced():
            return super().halt(*given)

    def interrupt(self, *given: Any) -> list[Completion]:
        with self._paced():
            return super().interrupt(*given)

    @contextlib.contextmanager
    def _paced(self) -> Iterator[None]:
        self._rpc("smoke_pace", PACE)
        yield
        self._rpc("smoke_pace", 0.0)

    def start(self, model: Path, **options: Any) -> None:
        if self._server is None:
            super().start(model, **options)

    def stop(self) -> None:
        """It ends by :meth:`end`, or where it did not start."""
        if self._llm is None:
            self.end()

    def end(self) -> None:
        super().stop()


def served(folder: Path) -> Iterator[tuple[str, Any]]:
    """One server: the check of it, up to its sleep; then the fault that this check finds."""
    stand_in()
    server = Kept()
    trial = made(vllm.Engine(), folder, lambda: server)
    try:
        yield "server", outcome(lambda: checks.server(trial))
        yield "endpoints", server.endpoints()
        server.wake((WEIGHTS, KV_CACHE))
        trial.engine = server
        trial.refit(trial.others)
        trial.serve = lambda: Faulty(server, "deaf-server", served=True)
        found = outcome(lambda: checks.server(trial))
        failed = {"server": found["reason"]}
        yield "deaf-server", {**found, "unseen": faults.unseen("deaf-server", failed, ["server"])}
    finally:
        server.end()
    yield "left", left()


def main(which: str, file: str) -> None:
    """Write what was found, also where it breaks off."""
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    try:
        from .pressed import pressed
        from .rounded import rounded

        runs = {"offline": offline, "served": served, "pressed": pressed}
        runs["rounded"] = rounded
        with tempfile.TemporaryDirectory(prefix="rollout-probe-") as folder:
            for name, value in runs[which](Path(folder)):
                found[name] = value
                print(f"{time.perf_counter() - begun:6.1f} {name}", flush=True)
    finally:
        Path(file).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The proof: start an engine, run the checks, print them as they finish, write the report."""

from __future__ import annotations

import difflib
import gc
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout import preflight, report
from rollout.disaggregated import GPUS
from rollout.faults import AIMED, FAULTS, aimed, find
from rollout.problem import Problem

CHECKS = (
    "start",
    "refit",
    "generation",
    "multi-turn",
    "partial-rollout",
    "sleep-1",
    "sleep-2",
    "cycle",
    "refits",
    "long",
    "pressure",
    "fp8",
    "lora",
    "server",
    "tensor-parallel",
    "disaggregated",
    "fp8-kv",
    "moe",
    "training",
)
# Beside those of a level: checks that put an engine to sleep.
SLEEPS = {"cycle", "fp8", "lora", "server", "fp8-kv", "moe"}
ANY = 1 << 10  # GPUs: what is asked for is judged apart from what this machine has
# Checks that start an engine of their own.
TRAINING = "training"
MOE = "moe"
FP8_KV = "fp8-kv"
DISAGGREGATED = "disaggregated"
ALONE = {"long", "pressure", "fp8", "lora", "server", DISAGGREGATED, FP8_KV, MOE, TRAINING}
SEED, OTHER_SEED = 20260708, 20260709
PROMPTS = 8
# Eight bits round so coarsely that the probe, made to show every lost tensor in sixteen, exceeds
# the bound of fp8 on correct software (1.09 with weights and activations rounded in blocks of 128).
# With a quarter of its lm_head, exact in bfloat16, log-probabilities differ by a quarter as much.
CALM = 0.25
FULL = "No space left on device"
# What torch and the engines say where memory is short: of the machine, and of no image.
SHORT = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache|Free memory on device"
    r"|Not enough memory|Cannot allocate memory",
    re.IGNORECASE,
)
SAID = 300  # characters of what an engine says, in a sentence
CYCLES = 4


@dataclass(frozen=True)
class Options:
    """What ``rollout smoke`` was asked for."""

    only: tuple[str, ...] = ()
    model: Path | None = None
    cycles: int = CYCLES
    inject: str | None = None
    framework: Path | None = None  # a checkout that goes before the image's own framework


def promised(wanted: Mapping[str, Any]) -> list[str]:
    """The checks that an image promises, wherever it runs; ``wanted`` as in :func:`available`."""
    return available(wanted, ANY)


def available(wanted: Mapping[str, Any], gpus: int = 1) -> list[str]:
    """The checks of an image on so many GPUs; ``wanted`` is "smoke" in its image.json."""
    left_out = {f"sleep-{level}" for level in (1, 2) if level not in wanted["sleep_levels"]}
    asked = ("long", "pressure", "fp8", "lora", "server", DISAGGREGATED, FP8_KV, MOE, TRAINING)
    left_out |= {name for name in asked if not wanted.get(name)}
    left_out |= {"refits"} if wanted["sleep_levels"] else SLEEPS
    left_out |= {name for name, count in several(wanted).items() if gpus < count}
    return [name for name in CHECKS if name not in left_out]


def several(wanted: Mapping[str, Any]) -> dict[str, int]:
    """The checks that need more than one GPU, each with how many; ``wanted`` as in available."""
    return {
        "tensor-parallel": wanted.get("tensor_parallel", ANY + 1),
        DISAGGREGATED: GPUS,
    }


def selected(only: Sequence[str], wanted: Mapping[str, Any], gpus: int = 1) -> list[str]:
    """The checks to run, in their order: of what an image has (``available``) those asked for.

    Raises:
        Problem: exit code 2 for a check that does not exist, with the nearest one that does.
    """
    known = available(wanted, gpus)
    for name in only:
        if name not in known:
            raise Problem(f"--only: no check {name!r} in this image; {_nearest(name, known)}", 2)
    begun = [] if only and set(only) <= ALONE else ["start"]
    return [name for name in known if not only or name in (*only, *begun)]


def fault(name: str | None, wanted: Mapping[str, Any]) -> str | None:
    """The fault to inject, checked; ``wanted`` is "smoke" in the image.json.

    Raises:
        Problem: exit code 2 for one that does not exist, or that no check of this image looks for.
    """
    if name is None:
        return None
    plain, transport = aimed(name)
    if plain not in FAULTS:
        raise Problem(f"--inject: no fault {plain!r}; {_nearest(plain, FAULTS)}", 2)
    check = FAULTS[plain].check
    if FAULTS[plain].found_by(available(wanted, ANY)) is None:
        raise Problem(f"--inject: {plain} is found by {check}, which this image has not", 2)
    if name == plain:
        return name
    if plain not in AIMED:
        one = ", ".join(AIMED)
        raise Problem(f"--inject: {plain} is made in no transport; aim one of {one}", 2)
    if transport not in wanted["refit"]:
        hint = _nearest(transport, wanted["refit"])
        raise Problem(f"--inject: this image promises no refit by {transport!r}; {hint}", 2)
    return name


def _nearest(given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def framed(checkout: Path, data: Mapping[str, Any]) -> None:
    """Look at a checkout that is to be trained with, before anything takes time.

    Raises:
        Problem: exit code 2 where the image's checks use no framework, or it is none of that one.
    """
    from rollout import frameworks

    if not data.get("framework") or TRAINING not in available(data["smoke"], ANY):
        raise Problem("--framework: this image has no check that trains; take one that has", 2)
    frameworks.create(frameworks.trainer(data["framework"]["name"]), data["backend"], checkout)


def tried(data: dict[str, Any], options: Options) -> dict[str, Any]:
    """image.json, and among its promises what is to be tried though no image promises it.

    The check ``fp8-kv`` of a backend that has it, for whoever asks for it by name. And the check
    ``training`` where a checkout is named.
    No image promises it of a framework that comes as a checkout alone. Who names one, and asks for
    this check, gets it where an adapter can start that framework.
    """
    from rollout import fp8_kv, frameworks
    from rollout.backends import abilities

    wanted = data["smoke"]
    if FP8_KV in options.only and FP8_KV not in wanted:
        can = abilities(data["backend"])
        if can is not None and can.fp8_kv:
            data = data | {"smoke": wanted | {FP8_KV: fp8_kv.PUT_BACK}}
    framework = data.get("framework")
    if options.framework is None or TRAINING not in options.only or not framework:
        return data
    can_train = frameworks.trains(framework["name"])
    return data | {"smoke": data["smoke"] | {TRAINING: True}} if can_train else data


@contextmanager
def _model_folder(given: Path | None) -> Iterator[Path]:
    """The model's folder: the user's, or a temporary one that the probe is written to."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="rollout-probe-") as folder:
        yield Path(folder)


def skipped(wanted: Mapping[str, Any], gpus: int) -> dict[str, str]:
    """What an image promises and so many GPUs cannot show: checks and transports, with the reason.

    The report names all of it, so that nobody takes a promise for shown because nothing failed.
    """
    there = "one GPU is visible" if gpus == 1 else f"{gpus} GPUs are visible"
    lacking = [name for name in promised(wanted) if name not in available(wanted, gpus)]
    needs = several(wanted)
    found = {name: f"it needs {needs[name]} GPUs; {there}" for name in lacking}
    sent = transports(wanted["refit"], gpus)
    why = f"it needs a second GPU, for NCCL refuses two processes on one; {there}"
    return found | {transport: why for transport in wanted["refit"] if transport not in sent}


def transports(wanted: Sequence[str], gpus: int) -> list[str]:
    """How weights are sent on so many GPUs: NCCL refuses two processes on one."""
    return [transport for transport in wanted if transport != "nccl" or gpus > 1]


def sending(wanted: Mapping[str, Any], gpus: int) -> list[str]:
    """The promised transports that so many GPUs can show, of which the first serves all checks.

    Raises:
        Problem: exit code 3 where there are none. By a transport that nobody promised it would be
            shown that weights arrive, and not that they do as they will in training.
    """
    found = transports(wanted["refit"], gpus)
    if not found:
        way = " and ".join(wanted["refit"])
        why = skipped(wanted, gpus)[wanted["refit"][0]]
        raise Problem(f"the refit of this image goes by {way} alone: {why}", 3)
    return found


def visible_gpus(facts: Mapping[str, Any]) -> int:
    """GPUs that this process may use; 0 in an image without CUDA."""
    if not facts["cuda"]:
        return 0
    import torch

    return int(torch.cuda.device_count())


def gpus(facts: Mapping[str, Any]) -> list[report.Gpu]:
    """The GPUs that this process may use, by name and memory; none in an image without CUDA."""
    if not visible_gpus(facts):
        return []
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [report.Gpu(str(one.name), int(one.total_memory)) for one in found]


def model(facts: Mapping[str, Any], options: Options) -> str:
    """What the checks run on, as a report names it: the probe, or a folder of the user's."""
    size = "1b" if facts["cuda"] else "tiny"
    return f"probe {size}, seed {SEED}" if options.model is None else str(options.model)


def _trial(facts: dict[str, Any], options: Options, folder: Path, *, dummy: bool, gpus: int) -> Any:
    """Weights, prompts, oracles, and an engine that is not started yet."""
    import torch

    from rollout import backends, checks, oracle, probe
    from rollout.faults import Faulty

    engine = backends.create(facts["backend"])
    unknown = set(facts["smoke"]["refit"]) - set(engine.transports)
    if unknown:
        known = ", ".join(engine.transports)
        raise Problem(f"this backend refits over {known}, not over {', '.join(sorted(unknown))}", 2)
    if options.inject:
        engine = Faulty(engine, options.inject)

    def serve() -> Any:
        served = backends.create(facts["backend"], served=True)
        return Faulty(served, options.inject, served=True) if options.inject else served

    if options.model is None:
        size = "1b" if facts["cuda"] else "tiny"
        config, given = probe.config(size, mlp_bias=engine.mlp_bias), None
    else:
        config, given = probe.load(folder)
    with ThreadPoolExecutor() as pool:  # each set takes seconds, and none waits for the other
        others = pool.submit(probe.weights, config, OTHER_SEED)
        weights = given or probe.weights(config, SEED)
    if options.model is None:
        try:
            # An engine that starts on dummy weights reads none.
            probe.save(folder, config, {} if dummy else weights)
        except Exception as error:  # safetensors has an exception of its own for it
            if FULL not in str(error):
                raise
            raise Problem(f"no disk space in {folder} for the probe; free some", 3) from None
        if not facts["cuda"]:
            torch.set_num_threads(1)  # as in the engine's process: for a tiny model more is slower
    device = "cuda" if facts["cuda"] else "cpu"
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    strange = {name: tensor.to(device) for name, tensor in others.result().items()}
    return checks.Trial(
        engine=engine,
        model=folder,
        weights=weights,
        others=strange,
        oracle=oracle.Oracle(config, weights, device),
        other_oracle=oracle.Oracle(config, strange, device),
        prompts=probe.prompts(config, SEED, PROMPTS),
        cycles=options.cycles,
        bound=oracle.BOUND_BF16,
        sleep_levels=facts["smoke"]["sleep_levels"],
        transports=sending(facts["smoke"], gpus),
        serve=serve,
        fault=options.inject,
        reuse=facts["smoke"].get("reuse", "turns"),
        device=device,
        calm=CALM if options.model is None else 1.0,
    )


def _attempt(name: str, action: Callable[[], dict[str, Any]]) -> report.Check:
    """Run one check; whatever it raises becomes the reason of its failure."""
    from rollout.backends import EngineError
    from rollout.checks import Failed

    start = time.perf_counter()
    metrics: dict[str, Any] = {}
    reason = None
    try:
        metrics = action()
    except Failed as failed:
        metrics, reason = failed.metrics, failed.reason
    except EngineError as error:
        reason = f"the engine reports: {error}"
    except Problem:
        raise
    except Exception as error:  # a check that breaks has not passed
        reason = f"{type(error).__name__}: {error}"
    if reason and FULL in reason:
        raise Problem(f"no disk space in {tempfile.gettempdir()} during {name}; free some", 3)
    if reason and SHORT.search(reason):
        raise short(name, reason)
    status = "failed" if reason else "passed"
    return report.Check(name, status, time.perf_counter() - start, metrics, reason)


def short(doing: str, reason: str) -> Problem:
    """That memory is short here, with what to do: another machine may prove the image."""
    why = " ".join(reason.split())[:SAID]
    what = "stop what else runs on the GPU, or take a larger one by CUDA_VISIBLE_DEVICES"
    return Problem(f"too little memory during {doing}: {why}; {what}", 3)


def _last(name: str, action: Callable[[], dict[str, Any]]) -> report.Check:
    """Run the last check: what the others have proved is not lost where this one cannot be."""
    begun = time.perf_counter()
    try:
        return _attempt(name, action)
    except Problem as problem:
        if problem.code != report.EXIT_CODES["unproved"]:
            raise
        return report.Check(name, "unproved", time.perf_counter() - begun, {}, problem.sentence)


def proof(
    facts: dict[str, Any], options: Options, show: Callable[[report.Check], None]
) -> tuple[list[report.Check], str | None]:
    """Run the checks; returns them and the engine's device.

    After the first failure the others are not run: an engine in an unknown state proves nothing.
    """
    gpus = visible_gpus(facts)
    lacking = set(options.only) - set(available(facts["smoke"], gpus))
    if lacking:
        needed = max(several(facts["smoke"])[name] for name in lacking)
        raise Problem(f"{', '.join(sorted(lacking))} needs {needed} GPUs; {gpus} are visible", 3)
    sent, transport = sending(facts["smoke"], gpus), aimed(options.inject or "")[1]
    if transport not in ("", *sent):
        why = skipped(facts["smoke"], gpus)[transport]
        raise Problem(f"--inject: {transport} is not tried here: {why}", 3)
    names = selected(options.only, facts["smoke"], gpus)
    done: list[report.Check] = []

    def attempt(name: str, action: Callable[[], dict[str, Any]]) -> None:
        broken = next((c.name for c in done if c.status == "failed"), None)
        if broken:
            check = report.Check(name, "unproved", 0.0, {}, f"not run: {broken} failed before it")
        elif name in (FP8_KV, MOE, TRAINING):
            check = _last(name, action)
        else:
            check = _attempt(name, action)
        done.append(check)
        show(check)

    device = None
    if not facts["smoke"]["sleep_levels"]:
        # No check lets it sleep. A backend is told a level at the start; this one drops nothing.
        facts = facts | {"smoke": facts["smoke"] | {"sleep_levels": [1]}}
    driven = [name for name in names if name not in (FP8_KV, MOE, TRAINING)]
    if driven:
        device = _drive(facts, options, driven, gpus, attempt)
    if FP8_KV in names:
        rounded_on = _round(facts, options, gpus, attempt)
        device = device or rounded_on
    if MOE in names:
        mixed_on = _mix(facts, options, gpus, attempt)
        device = device or mixed_on
    if TRAINING in names:
        from rollout import frameworks

        # A framework starts its own engine: ours has ended, and what it was judged by is gone.
        framework = facts["framework"]
        adapter = framework | {"name": frameworks.trainer(framework["name"])}
        trained_on = _train(facts | {"framework": adapter}, options, attempt)
        device = device or trained_on
    return done, device


def _drive(
    facts: dict[str, Any],
    options: Options,
    names: Sequence[str],
    gpus: int,
    attempt: Callable[[str, Callable[[], dict[str, Any]]], None],
) -> str:
    """The checks that drive an engine through its protocol; returns its device."""
    from rollout.checks import CHECKS as FUNCTIONS

    dummy = "refit" in names or "start" not in names  # a refit follows that fills the engine
    with _model_folder(options.model) as folder:
        try:
            trial = _trial(facts, options, folder, dummy=dummy, gpus=gpus)
        except RuntimeError as error:  # as which torch says that memory is short
            if not SHORT.search(str(error)):
                raise
            raise short("the preparation", str(error)) from None
        try:
            for name in names:
                if name == "start":
                    attempt(name, lambda: start(trial, dummy=dummy))
                else:
                    attempt(name, lambda name=name: FUNCTIONS[name](trial))  # type: ignore[misc]
        finally:
            trial.engine.stop()
        device: str = trial.engine.device
        return device


def _round(
    facts: dict[str, Any],
    options: Options,
    gpus: int,
    attempt: Callable[[str, Callable[[], dict[str, Any]]], None],
) -> str | None:
    """The check of a KV cache in 8 bits; returns the device of its engine, None if it had none."""
    from rollout import fp8_kv

    devices: list[str] = []

    def rounded() -> dict[str, Any]:
        release_gpu()
        with fp8_kv.prepared(facts, sending(facts["smoke"], gpus), options.inject) as trial:
            devices.append(trial.engine.device)
            return fp8_kv.check(trial, facts["smoke"][FP8_KV])

    attempt(FP8_KV, rounded)
    return devices[0] if devices else None


def _mix(
    facts: dict[str, Any],
    options: Options,
    gpus: int,
    attempt: Callable[[str, Callable[[], dict[str, Any]]], None],
) -> str | None:
    """The check of a mixture of experts; returns the device of its engine, None if it had none."""
    from rollout import moe

    devices: list[str] = []

    def mixed() -> dict[str, Any]:
        release_gpu()
        with moe.prepared(facts, sending(facts["smoke"], gpus), options.inject) as trial:
            devices.append(trial.engine.device)
            return moe.moe(trial)

    attempt(MOE, mixed)
    return devices[0] if devices else None


def _train(
    facts: dict[str, Any],
    options: Options,
    attempt: Callable[[str, Callable[[], dict[str, Any]]], None],
) -> str | None:
    """The check of a framework's own trainer; returns the GPU that it ran on, None if on none."""
    from rollout import frameworks, gauge, training

    names: list[str] = []

    def trained() -> dict[str, Any]:
        release_gpu()
        gpu = gauge.first()
        names.append(gpu.name)
        name = facts["framework"]["name"]
        framework = frameworks.create(name, facts["backend"], options.framework)
        return training.training(training.Run(framework, gpu.used, gpu.total, options.inject))

    attempt(TRAINING, trained)
    return names[0] if names else None


def release_gpu() -> None:
    """Give back what this process still holds of a GPU, if it ever used one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def start(trial: Any, *, dummy: bool) -> dict[str, Any]:
    """Start the engine: it answers, and has taken what weights and KV cache need.

    Control: before, it must refuse to answer, and have taken nothing.
    """
    from rollout.backends import EngineError
    from rollout.checks import FREED, Failed, size_of

    try:
        trial.engine.generate(trial.prompts[:1], 1)
    except EngineError:
        pass
    else:
        raise Failed("control: an engine that was not started answers", {})
    before, empty = cached(), trial.engine.memory()
    given = FREED * (size_of(trial.weights) + trial.engine.kv_bytes)
    if trial.engine.memory() - empty >= given:
        raise Failed("control: memory counts as taken before the engine was started", {})
    clock = time.perf_counter()
    level = min(trial.sleep_levels)
    trial.engine.start(trial.model, dummy=dummy, level=level)
    seconds = time.perf_counter() - clock
    taken = trial.engine.memory() - empty
    if taken < given:
        what = f"{taken >> 20} MiB, where weights and KV cache need {int(given) >> 20} MiB"
        raise Failed(f"started, the engine has taken {what}", {"taken_bytes": taken})
    completion = trial.engine.generate(trial.prompts[:1], 1)
    if len(completion) != 1 or len(completion[0].tokens) != 1:
        raise Failed("asked for one token of one prompt, the engine gave something else", {})
    return {
        "start_seconds": seconds,
        "held_bytes": trial.engine.held(),
        "taken_bytes": taken,
        "cache_files_added": len(cached() - before),
    }


def cached(cache: Path = Path(preflight.CACHE)) -> set[str]:
    """What is stored for later starts: the files of the cache, less the proof's temporary ones."""
    return {
        str(Path(folder, name))
        for folder, _, names in os.walk(cache)
        for name in names
        if not str(Path(folder, name).relative_to(cache)).startswith("rollout-")
    }


def run(
    data: dict[str, Any],
    options: Options,
    show: Callable[[report.Check], None],
    given: Mapping[str, str],
) -> tuple[list[report.Check], str | None]:
    """``rollout smoke``: the checks as they ended, and the device they ran on.

    ``given`` are the variables as the job set them: what was replaced in this process is wrong.

    Raises:
        Problem: exit code 2 for wrong usage, 3 where this machine cannot prove anything.
    """
    selected(options.only, data["smoke"], ANY)
    fault(options.inject, data["smoke"])
    if options.framework is not None:
        framed(options.framework, data)
    for finding in preflight.look(preflight.Host(Path("/"), given, data["cuda"])):
        if finding.stops:  # these come first
            raise Problem(finding.sentence, 3)
        print(f"rollout: warning: {finding.sentence}", file=sys.stderr, flush=True)
    # Nothing is downloaded: a look-up in a hub is a bug, and is to fail at once.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    if options.inject:
        print(f"injecting {options.inject}: {find(options.inject).what}", flush=True)
    checks, device = proof(data, options, show)
    if options.inject and not any(check.status == "failed" for check in checks):
        reason = f"{options.inject} was injected, and no check found it"
        checks.append(report.Check("inject", "failed", 0.0, {}, reason))
        show(checks[-1])
    return checks, device

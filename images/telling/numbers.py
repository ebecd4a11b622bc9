"""The numbers of reports and measurements as rows, each beside what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from images.schema import TRANSPORTS
from images.telling import markdown
from rollout import verify
from rollout.checks import FREED, GROWTH, rate
from rollout.cuda_ipc import BUCKET_BYTES
from rollout.oracle import BOUND_BF16, BOUND_FP8
from rollout.smoke import CALM

Row = tuple[str, str, str]  # what, measured, beside what
Metrics = Mapping[str, Any]
DIVERGENCE = "mean exp(\\|Δ log-probability\\|)"


def gpu_rows(data: Mapping[str, Any], again: Mapping[str, Any] | None = None) -> list[Row]:
    """The numbers of a report as rows, of whatever checks its image has.

    ``again`` is the report of a second start, with the cache that the first one filled.
    """
    found: dict[str, Metrics] = {check["name"]: check["metrics"] for check in data["checks"]}
    rows = start_rows(data, found)
    if again:
        rows[2:2] = warm_rows(data, again)
    if "sleep-1" in found:
        rows += sleep_rows(found["sleep-1"])
    if "sleep-2" in found:
        rows += discard_rows(found["sleep-2"], alone="sleep-1" not in found)
    rows += refit_rows(found["refit"])
    if "cycle" in found:
        took = f"{found['cycle']['turn_seconds'] * 1e3:.0f} ms"
        rows.append(("sleep, wake, refit, wake (a turn of the loop)", took, ""))
    if "refits" in found:
        turn = found["refits"]
        took = f"{turn['refit_seconds'] * 1e3:.0f} ms"
        what = f"refit while awake, each of {turn['refits']} in turn"
        rows.append((what, took, f"growth: {turn['growth_bytes']} bytes"))
    judged = found["generation"]
    rows += [
        (
            f"{DIVERGENCE}, bf16",
            f"{judged['divergence']:.4f}",
            f"≤ {BOUND_BF16}; other weights: {judged['control_divergence']:.1f}",
        ),
    ]
    if "long" in found:
        rows += long_rows(found["long"])
    if "pressure" in found:
        rows += pressure_rows(found["pressure"])
    if "fp8" in found:
        eight = found["fp8"]
        rows.append(
            (
                f"the same in fp8, logits times {CALM} (as they are, the bound is no bound)",
                f"{eight['divergence']:.4f}",
                f"≤ {BOUND_FP8}; other weights: {eight['stranger_divergence']:.2f}",
            )
        )
    if "server" in found:
        rows += server_rows(found["server"])
    if "tensor-parallel" in found:
        rows += parallel_rows(found["tensor-parallel"])
    if "disaggregated" in found:
        rows += disaggregated_rows(found["disaggregated"])
    return rows


def start_rows(data: Mapping[str, Any], found: Mapping[str, Metrics]) -> list[Row]:
    """The start of the engine, and what the whole smoke test took, less ``verify``."""
    seconds = {check["name"]: check["seconds"] for check in data["checks"]}
    starts, rest = divided(data)
    return [
        (
            "start on dummy weights, CUDA graphs included",
            f"{found['start']['start_seconds']:.1f} s",
            "",
        ),
        (
            "… and the first answer, with what is compiled for it",
            f"{seconds['start']:.1f} s",
            added(found["start"]),
        ),
        (
            "the whole smoke test: engine starts, and the rest",
            f"{starts:.1f} s + {rest:.1f} s",
            "aim for the rest: ≤ 60 s",
        ),
    ]


def divided(data: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a smoke test, less ``verify``: what all starts of engines took, and the rest."""
    verified = sum(c["seconds"] for c in data["checks"] if c["name"] in verify.CHECKS)
    # Several checks start an engine of their own, and one starts two.
    starts = sum(
        value
        for check in data["checks"]
        for name, value in check["metrics"].items()
        if name.endswith("start_seconds")
    )
    return starts, data["seconds"] - verified - starts


def added(start: Metrics) -> str:
    """What a start leaves in the cache for those after it."""
    return f"files added to the cache: {start['cache_files_added']}"


def warm_rows(data: Mapping[str, Any], again: Mapping[str, Any]) -> list[Row]:
    """A second start, which compiles nothing where the cache of the first serves."""
    first, second = (
        next(check for check in one["checks"] if check["name"] == "start") for one in (data, again)
    )
    metrics = second["metrics"]
    return [
        (
            "start again, with the cache that the first one filled",
            f"{metrics['start_seconds']:.1f} s",
            added(metrics),
        ),
        (
            "… and the first answer",
            f"{second['seconds']:.1f} s",
            f"compiled only once: {first['seconds'] - second['seconds']:.1f} s",
        ),
    ]


def freed_row(level: int, metrics: Metrics) -> Row:
    """What a sleep gives back."""
    return (
        f"sleep {level} frees, of weights and KV cache",
        f"{metrics['freed_fraction']:.1%} of {metrics['held_bytes'] / 1e9:.2f} GB",
        f"≥ {FREED:.0%}, by the driver's count",
    )


def sleep_rows(sleep: Metrics) -> list[Row]:
    """Level 1: the weights go to main memory and come back."""
    return [
        freed_row(1, sleep),
        (
            "sleep 1, weights to main memory",
            f"{sleep['sleep_gb_per_s']:.0f} GB/s",
            f"a pinned copy: {sleep['to_host_gb_per_s']:.0f} GB/s",
        ),
        (
            "the first of them, which pins the memory",
            f"{sleep['first_sleep_seconds']:.2f} s",
            f"the best: {sleep['sleep_seconds']:.3f} s",
        ),
        (
            "wake, weights from main memory",
            f"{sleep['wake_gb_per_s']:.0f} GB/s",
            f"a pinned copy: {sleep['from_host_gb_per_s']:.0f} GB/s",
        ),
        (
            f"growth in each of {sleep['cycles']} cycles",
            f"{sleep['growth_bytes']} bytes",
            f"≤ {GROWTH >> 20} MiB",
        ),
    ]


def discard_rows(two: Metrics, *, alone: bool) -> list[Row]:
    """Level 2: the weights are gone. What it frees is said where it is the only level."""
    rows = [("sleep 2", f"{two['sleep_seconds'] * 1e3:.0f} ms", "")]
    return [freed_row(2, two), *rows] if alone else rows


# What is timed by each transport of a refit.
REFITS = {
    "shared-memory": "refit through shared memory",
    "cuda-ipc": f"refit over CUDA IPC, {BUCKET_BYTES >> 20} MiB buckets",
    "cuda-ipc-flattened": "… each bucket flattened into one tensor",
    "nccl": "refit by NCCL from another GPU, its group made anew",
    "disk": "refit by a checkpoint on disk, written and read",
}


def refit_rows(refit: Metrics) -> list[Row]:
    """The refit of an image on a GPU by each transport that ran, beside the yardstick of them."""
    rows = []
    beside = f"a copy on the device: {refit['copy_gb_per_s']:.0f} GB/s"
    for transport in TRANSPORTS:
        if rate(transport) in refit:
            rows.append((REFITS[transport], f"{refit[rate(transport)]:.3g} GB/s", beside))
            beside = ""
    return rows


def long_rows(long: Metrics) -> list[Row]:
    """Long sequences, on an engine that preempts."""
    crowd = f"{long['crowd_tokens']:,} tokens in a KV cache of {long['cache_tokens']:,}"
    return [
        (
            f"{DIVERGENCE} up to {long['positions']:,} positions, the worst request",
            f"{long['worst_request']:.4f}",
            f"≤ {BOUND_BF16}",
        ),
        (f"preemptions: {crowd}", str(long["preemptions"]), ""),
    ]


def pressure_rows(crowd: Metrics) -> list[Row]:
    """Many sampled requests at once, of which half are aborted while weights are replaced."""
    plain = f"one plain call for as many: {crowd['plain_tokens_per_s']:,.0f} tokens/s"
    asked = f"{crowd['requests']} sampled requests at once, {crowd['aborted']} aborted"
    return [
        (
            f"{DIVERGENCE}, {asked}, the worst request",
            f"{crowd['worst_request']:.4f}",
            f"≤ {BOUND_BF16}; under another's name: {crowd['crossed_divergence']:.2f}",
        ),
        ("… their tokens, less the refit", f"{crowd['tokens_per_s']:,.0f} tokens/s", plain),
        ("… growth from round to round", f"{crowd['growth_bytes']} bytes", ""),
    ]


def server_rows(server: Metrics) -> list[Row]:
    """The engine's own server."""
    return [
        ("start of the engine's own server, dummy weights", f"{server['start_seconds']:.1f} s", ""),
        ("… refitted in the middle of rollouts", f"{server['refit_gb_per_s']:.3g} GB/s", ""),
        (
            f"{DIVERGENCE} of these rollouts",
            f"{server['other_divergence']:.4f}",
            f"≤ {BOUND_BF16}; other weights: {server['stranger_divergence']:.1f}",
        ),
    ]


def parallel_rows(two: Metrics) -> list[Row]:
    """Two GPUs, one of which has less to give."""
    free = " and ".join(f"{size / 1e9:.0f}" for size in two["free_bytes"])
    refused = "told to insist on balance, it refused" if two.get("refused") else ""
    return [
        (
            f"start on two GPUs with {free} GB free, dummy weights",
            f"{two['start_seconds']:.1f} s",
            refused,
        ),
        (f"{DIVERGENCE} on both, bf16", f"{two['divergence']:.4f}", f"≤ {BOUND_BF16}"),
    ]


def disaggregated_rows(found: Metrics) -> list[Row]:
    """A trainer on a GPU of its own, and an engine on two."""
    ways = {"nccl": "refit by NCCL, one group for all of them", "disk": REFITS["disk"]}
    rows: list[Row] = [
        (f"a trainer elsewhere: {what}", f"{found[rate(way)]:.3g} GB/s", "")
        for way, what in ways.items()
    ]
    value = f"{found['divided_divergence']:.4f}"
    return [*rows, (f"{DIVERGENCE}, its engine on two GPUs", value, f"≤ {BOUND_BF16}")]


def calibration_rows(data: Mapping[str, Any]) -> list[Row]:
    """The probe on that device, from ``rollout.calibrate``."""
    noise, loss = data["noise"], data["loss"]
    return [
        (
            f"bf16's noise (transformers, that device) in {noise['repeats']} repeats, at most",
            f"{noise['max']:.4f}",
            f"≤ {BOUND_BF16}",
        ),
        (
            f"loss of any one of {len(loss['tensors'])} tensors, at least",
            f"{loss['min']:.3f}",
            f"{data['ratio']:.1f} times what the bound allows; aim: ≥ 10",
        ),
    ]


def of_machine(data: Mapping[str, Any]) -> str:
    """The measured numbers of an image as a table, each beside what it should be."""
    rows = [
        (
            "`prove` from a fresh clone, warm caches (packages, base tar)",
            "prove_first_seconds",
            "{:.0f} s",
            "≤ 360 s",
        ),
        ("`prove` again, nothing changed", "prove_again_seconds", "{:.0f} s", "≤ 90 s"),
        ("`rollout info` in the container", "info_seconds", "{:.2f} s", "< 0.5 s"),
        (
            "`rollout verify`, its file check ÷ plain sha256sum (speed)",
            "verify_speed",
            "{:.2f}",
            "≥ 0.8",
        ),
        ("`rollout verify`, everything", "verify_seconds", "{:.1f} s", ""),
        ("cold build without the base", "cold_build_seconds", "{:.0f} s", ""),
        ("… ÷ bare `uv pip install --compile-bytecode`", "build_ratio_compiled", "{:.2f}", "≤ 1.3"),
        ("… in the worst of five pairs", "build_ratio_compiled_worst", "{:.2f}", ""),
        ("… its steps alone ÷ the same", "steps_ratio_compiled", "{:.2f}", "≤ 1.3"),
        ("… ÷ bare `uv pip install`", "build_ratio", "{:.2f}", ""),
    ]
    found = [(what, form.format(data[key]), aim) for what, key, form, aim in rows if key in data]
    told = f"On {data['machine']}, {data['measured']}, by `nox -s measure`:"
    return f"{told}\n\n{markdown.table(('what', 'measured', 'aim'), found)}"

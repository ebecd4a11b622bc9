"""The generated parts of the README, and lockfiles/SIZES.md: what reports and records say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import build, layers, sizes
from images.catalog import ROOT, TRANSPORTS, Image, shown
from images.locking import base, lock
from images.proving import measure, prove, reproduce
from images.proving import standing as rule
from images.telling import features, releases
from rollout import report, smoke, verify
from rollout.checks import FREED, GROWTH, rate
from rollout.cuda_ipc import BUCKET_BYTES
from rollout.faults import FAULTS, aimed
from rollout.oracle import BOUND_BF16, BOUND_FP8
from rollout.problem import Problem
from rollout.smoke import CALM

README = ROOT / "README.md"
FRAMEWORKS = ROOT / "docs" / "frameworks.md"


def kept(image: Image) -> features.Kept | None:
    """The kept report of an image, None where none is kept."""
    data = prove.kept_report(image)
    if data is None:
        return None
    where = str(prove.kept(image).relative_to(ROOT))
    return features.Kept(where, data, prove.standing_of(image))


def standing(image: Image) -> str:
    """What the kept report of an image is worth today."""
    found = kept(image)
    if found is None:
        return rule.UNPROVED
    data, worth = found.report, found.standing
    where = f"[{worth.word}]({found.where}) on {data['device']}, {data['started'][:10]}"
    if not worth.good:
        return f"{where}: {worth.sentence}"
    missing = ", ".join(worth.missing)
    return where + (f"; not shown: {missing}" if missing else "")


def reproduced(image: Image) -> str:
    """The level that builds of these inputs reached, and on how many machines."""
    path = reproduce.path(image)
    if not path.exists():
        return "not shown yet"
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["inputs"] != build.inputs(image):
        return f"stale: [{data['runs'][-1]['level']}]({path.relative_to(ROOT)}), of other inputs"
    lowest = min(run["level"] for run in data["runs"])
    count = len(data["runs"])
    return f"[{lowest}]({path.relative_to(ROOT)})" + (f" on {count} machines" if count > 1 else "")


def pull(image: Image) -> str:
    """What a node without any of its layers fetches, as recorded for today's inputs."""
    record = layers.read(image)
    if record is None or record.inputs != build.inputs(image):
        return "not recorded yet"
    return sizes.megabytes(sum(layer.compressed for layer in record.layers))


def row(image: Image, versions: Mapping[str, str]) -> str:
    """The table row of an image."""
    cells = [
        f"`{image.reference}`",
        releases.of(image.framework),
        f"{image.backend} {versions[image.engine]}",
        versions["torch"].split("+")[0],
        lock.cuda(versions) or "none (CPU)",
        base.python(image.python),
        versions.get("ray", "none"),
        str(image.resolved_as_of),
        pull(image),
        reproduced(image),
        standing(image),
    ]
    return "| " + " | ".join(cells) + " |"


def table(images: Sequence[Image]) -> str:
    """The table of all images."""
    head = (
        *("image", "for", "engine", "torch", "CUDA", "Python", "Ray", "resolved as of"),
        *("to pull", "same bytes", "proof"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for image in images:
        lines.append(row(image, {e.name: e.version for e in lock.read(image)}))
    return "\n".join(lines)


def fault_table(images: Sequence[Image]) -> str:
    """The faults that can be injected, the check that finds each, and where that was shown.

    On the CPU every run of the tests shows it, where the default image has the check; of a GPU
    image the report of the run is kept.
    """
    default = next((image for image in images if image.reference == catalog.DEFAULT), None)
    on_cpu = smoke.available(default.smoke.facts) if default else smoke.CHECKS
    lines = ["| fault | what happens | found by | shown on |", "| --- | --- | --- | --- |"]
    for name, fault in FAULTS.items():
        shown_on = ["CPU (tests)"] if fault.found_by(on_cpu) else []
        for image in images:
            for path in prove.kept_faults(image, name):
                transport = aimed(path.stem)[1]
                worth = prove.standing_of_fault(image, path.stem)
                by = f" by {transport}" if transport else ""
                link = f"[{image.tag}{by}]({path.relative_to(ROOT)})"
                shown_on.append(f"{link} ({worth})" if worth else link)
        checks = [check for check in (fault.check, fault.otherwise) if check]
        lines.append(
            f"| `{name}` | {fault.what} | {' or '.join(f'`{check}`' for check in checks)} | "
            f"{', '.join(shown_on) or 'not shown yet'} |"
        )
    return "\n".join(lines)


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
    turn, judged = found["cycle"], found["generation"]
    rows += [
        (
            "sleep, wake, refit, wake (a turn of the loop)",
            f"{turn['turn_seconds'] * 1e3:.0f} ms",
            "",
        ),
        (
            f"{DIVERGENCE}, bf16",
            f"{judged['divergence']:.4f}",
            f"≤ {BOUND_BF16}; other weights: {judged['control_divergence']:.1f}",
        ),
    ]
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
    return rows


def start_rows(data: Mapping[str, Any], found: Mapping[str, Metrics]) -> list[Row]:
    """The start of the engine, and what the whole smoke test took, less ``verify``."""
    seconds = {check["name"]: check["seconds"] for check in data["checks"]}
    verified = sum(value for name, value in seconds.items() if name in verify.CHECKS)
    # Several checks start an engine of their own.
    starts = sum(metrics.get("start_seconds", 0.0) for metrics in found.values())
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
            f"{starts:.1f} s + {data['seconds'] - verified - starts:.1f} s",
            "aim for the rest: ≤ 60 s",
        ),
    ]


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


def server_rows(server: Metrics) -> list[Row]:
    """The engine's own server."""
    return [
        ("start of the engine's own server, dummy weights", f"{server['start_seconds']:.1f} s", ""),
        (
            "… refitted in the middle of rollouts",
            f"{server['refit_gb_per_s']:.3g} GB/s",
            "",
        ),
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


def gpu_numbers(images: Sequence[Image]) -> str:
    """A table for each image with a kept proof on a GPU."""
    parts = []
    for image in images:
        found = kept(image)
        versions = {entry.name: entry.version for entry in lock.read(image)}
        if found is None or not lock.cuda(versions):
            continue
        data = found.report
        second = warm_report(image, data)
        rows = gpu_rows(data, second)
        sources = [f"[its report]({found.where})"]
        size = measure.path(image)
        measured = {}
        if size.exists():
            sources.append(f"[sizes measured at the build]({size.relative_to(ROOT)})")
            measured = json.loads(size.read_text(encoding="utf-8"))
        rows += size_rows(image, measured)
        if second:
            sources.append(f"[a second start]({prove.beside(image, 'warm').relative_to(ROOT)})")
        calibrated = prove.beside(image, "calibration")
        if calibrated.exists():
            measured_by = json.loads(calibrated.read_text(encoding="utf-8"))
            if not rule.no_calibration(measured_by, prove.today(image), versions):
                sources.append(f"[the probe's calibration]({calibrated.relative_to(ROOT)})")
                rows += calibration_rows(measured_by)
        worth = found.standing
        stale = "" if worth.word == rule.PROVED else f" ({worth.word}: {worth.sentence})"
        lines = [
            f"`{image.reference}` on {data['device']}, driver {data['driver']}, "
            f"{data['started'][:10]}{stale}, from {', '.join(sources)}:",
            "",
            "| what | measured | bound, aim or yardstick |",
            "| --- | --- | --- |",
            *(f"| {what} | {value} | {beside} |" for what, value, beside in rows),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No image is proved on a GPU yet."


def warm_report(image: Image, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kept report of a second start of what the kept proof is of; None where there is none."""
    path = prove.beside(image, "warm")
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return None if rule.no_second_start(found, data) else found


def size_rows(image: Image, data: Mapping[str, Any]) -> list[Row]:
    """The size of an image: its export as ``nox -s measure`` has it, its layers as recorded."""
    rows = []
    if "export_bytes" in data:
        size = sizes.megabytes(data["export_bytes"])
        rows.append(("all files in one zstd stream (`export`)", size, ""))
    record = layers.read(image)
    if record:
        packed = [layer.compressed for layer in record.layers]
        budget = (image.size.compressed, image.size.largest_layer)
        limits = [f"budget: ≤ {sizes.megabytes(limit)}" for limit in budget]
        rows.append(("layers, zstd -10", sizes.megabytes(sum(packed)), limits[0]))
        rows.append(("the largest of them", sizes.megabytes(max(packed)), limits[1]))
    return rows


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


def numbers(data: Mapping[str, Any]) -> str:
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
        ("… its steps alone ÷ the same", "steps_ratio_compiled", "{:.2f}", "≤ 1.3"),
        ("… ÷ bare `uv pip install`", "build_ratio", "{:.2f}", "≤ 1.3"),
    ]
    lines = [
        f"On {data['machine']}, {data['measured']}, by `nox -s measure`:",
        "",
        "| what | measured | aim |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {what} | {form.format(data[key])} | {aim} |"
        for what, key, form, aim in rows
        if key in data
    ]
    return "\n".join(lines)


def measured(image: Image) -> str:
    """The numbers kept for an image, or the command that measures them."""
    path = measure.path(image)
    if not path.exists():
        return "Nothing kept yet; `nox -s measure` measures."
    return numbers(json.loads(path.read_text(encoding="utf-8")))


def terminal(data: Mapping[str, Any], found: rule.Standing) -> str:
    """What a run with this report printed at its end, and what the host makes of it."""
    checks = [report.Check(**check) for check in data["checks"]]
    verified = [check for check in checks if check.name in verify.CHECKS]
    smoked = [check for check in checks if check.name not in verify.CHECKS]
    rows: list[str] = []
    for command, part in (("verify", verified), ("smoke", smoked)):
        rows += [f"{data['image']}: rollout {command}", report.header(), *map(report.row, part)]
        rows += [f"{data['image']}: {report.verdict(part)} in …", ""]
    rows.append(f"{data['image']}: {data['verdict']}; report in build/reports/…")
    rows.append(f"{data['image']}: {found.word}: {found.sentence}")
    return "\n".join(["```text", *rows, "```"])


def printed(image: Image) -> str:
    """What the last kept proof of an image printed."""
    found = kept(image)
    return terminal(found.report, found.standing) if found else "No proof is kept yet."


def renewed(text: str, name: str, generated: str, page: str = "README.md") -> str:
    """A page with one generated part replaced.

    Raises:
        Problem: the markers of that part are missing.
    """
    begin, end = f"<!-- {name}: generated by 'nox -s docs' -->", f"<!-- /{name} -->"
    before, began, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not began or not ended:
        raise Problem(f"{page} has lost its markers; put {begin} and {end} back", 2)
    return f"{before}{begin}\n{generated}\n{end}{after}"


def fresh(text: str, images: Sequence[Image]) -> str:
    """A README with all its generated parts renewed."""
    default = catalog.find(catalog.DEFAULT, images)
    parts = {
        "printed": printed(default),
        "images": table(images),
        "features": features.table([(image, kept(image)) for image in images]),
        "faults": fault_table(images),
        "measured": measured(default),
        "gpu": gpu_numbers(images),
        "layers": sizes.layer_table(images),
    }
    for name, generated in parts.items():
        text = renewed(text, name, generated)
    return text


def main(arguments: Sequence[str]) -> int:
    """``nox -s docs [-- --check]``."""
    parser = argparse.ArgumentParser(prog="nox -s docs --", description="Renew the README.")
    parser.add_argument("--check", action="store_true", help="fail where the README is not fresh")
    given = parser.parse_args(list(arguments))
    images = catalog.load()
    pages = {
        README: fresh(README.read_text(encoding="utf-8"), images),
        FRAMEWORKS: renewed(
            _read(FRAMEWORKS), "frameworks", releases.table(images), shown(FRAMEWORKS)
        ),
        sizes.PAGE: sizes.page(images),
    }
    stale = [path for path, text in pages.items() if _read(path) != text]
    if given.check:
        for path in stale:
            sys.stdout.write(lock.drift(path, pages[path]))
        if stale:
            names = ", ".join(shown(path) for path in stale)
            raise Problem(f"not fresh (diff above): {names}; run 'nox -s docs'")
        return 0
    for path in stale:
        host.write(path, pages[path])
        host.say(f"{shown(path)} renewed")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

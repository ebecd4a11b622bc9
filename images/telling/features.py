"""Which engine has what: one column for each image, every number from its kept report.

Nothing is claimed here. The catalog file says what an image promises, the report what a run showed;
a cell is what both say together. ``nox -s docs`` puts the table into docs/proof.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from images import catalog
from images.building.layers import megabytes
from images.catalog import Image
from images.proving import standing
from images.proving.standing import Standing
from images.schema import Smoke
from images.telling import markdown
from rollout.checks import rate
from rollout.disaggregated import BESIDE
from rollout.oracle import BOUND_BF16, BOUND_FP8

Metrics = Mapping[str, Any]
NOT_SHOWN = "not shown"  # promised, and no report shows it
STALE = "stale"  # shown by a report that is no proof of the image of today
NOT_CLAIMED = "—"


@dataclass(frozen=True)
class Kept:
    """The kept report of an image, and what it is worth for the image as it is now."""

    where: str  # its path in the repository
    report: Mapping[str, Any]
    standing: Standing


@dataclass(frozen=True)
class Feature:
    """A row: what it is called, the check that shows it, who promises it, and what is telling."""

    name: str
    check: str
    claimed: Callable[[Smoke], bool]
    # From the metrics of that check; a KeyError means that the report does not have it.
    telling: Callable[[Metrics, Smoke], str]


def metrics(report: Mapping[str, Any], check: str) -> Metrics | None:
    """What a check of a report measured; None where it did not run or did not pass."""
    for entry in report.get("checks", ()):
        if entry["name"] == check and entry.get("status") == "passed":
            found: Metrics = entry["metrics"]
            return found
    return None


def freed(found: Metrics, _: Smoke) -> str:
    """How much of what the engine held a sleep gives back."""
    return f"{found['freed_fraction']:.1%} of {megabytes(found['held_bytes'])} freed"


def transport(name: str) -> tuple[Callable[[Smoke], bool], Callable[[Metrics, Smoke], str]]:
    """Who promises a transport, and how fast weights arrive by it."""

    def telling(found: Metrics, _: Smoke) -> str:
        return f"{found[rate(name)]:.3g} GB/s"

    return (lambda smoke: name in smoke.refit), telling


def within(value: float, bound: float) -> str:
    """A mean exp(|Δ log-probability|) beside what it may be."""
    return f"{value:.4f} ≤ {bound}"


def continued(found: Metrics, _: Smoke) -> str:
    """How many interrupted rollouts ended token for token as the uninterrupted ones."""
    equal, count = found["equal"], len(found["kept_tokens"])
    rest = "" if equal == count else ", the others part at a tie"
    return f"{equal} of {count} equal{rest}"


def in_the_middle(found: Metrics, _: Smoke) -> str:
    """How many rollouts went on with other weights, and how far all of it is from the oracles."""
    count, value = len(found["kept_tokens"]), found["other_divergence"]
    return f"{count} rollouts: {within(value, BOUND_BF16)}"


def two_gpus(found: Metrics, _: Smoke) -> str:
    """How unequal the GPUs were, and what came out; whether it refuses them where told to."""
    free = " and ".join(f"{size / 1e9:.0f}" for size in found["free_bytes"])
    refused = "; refused when told to insist" if found.get("refused") else ""
    return f"{free} GB free: {within(found['divergence'], BOUND_BF16)}{refused}"


def far(found: Metrics, _: Smoke) -> str:
    """How many positions there were, how often a request was preempted, and what came out."""
    far, often = f"{found['positions']:,} positions", f"{found['preemptions']} preemptions"
    return f"{far}, {often}: {within(found['worst_request'], BOUND_BF16)}"


def at_once(found: Metrics, _: Smoke) -> str:
    """How many requests there were, how many of them were aborted, and what came out."""
    what = f"{found['requests']} requests, {found['aborted']} aborted"
    return f"{what}: {within(found['worst_request'], BOUND_BF16)}"


def by_nccl_and_disk(found: Metrics, _: Smoke) -> str:
    """How fast weights came by each way, and how far the answers of two GPUs were."""
    speeds = ", ".join(f"{found[rate(way)]:.3g} GB/s by {way}" for way in BESIDE)
    return f"{speeds}; on two GPUs {within(found['divided_divergence'], BOUND_BF16)}"


def adapters(found: Metrics, smoke: Smoke) -> str:
    """How far answers with an adapter are from the oracle's, and what a deep sleep does to it."""
    after = f"; after level 2 {found['after_level_2']}" if 2 in smoke.sleep_levels else ""
    return f"{within(found['divergence'], BOUND_BF16)}{after}"


def every(_: Smoke) -> bool:
    """A check that every image has."""
    return True


FEATURES = (
    Feature("sleep, weights kept (level 1)", "sleep-1", lambda s: 1 in s.sleep_levels, freed),
    Feature("sleep, weights dropped (level 2)", "sleep-2", lambda s: 2 in s.sleep_levels, freed),
    Feature(
        "no sleep: refits in turn",
        "refits",
        lambda smoke: not smoke.sleep_levels,
        lambda found, _: f"{found['refits']} refits, {within(found['divergence'], BOUND_BF16)}",
    ),
    Feature("refit through shared memory", "refit", *transport("shared-memory")),
    Feature("refit over CUDA IPC", "refit", *transport("cuda-ipc")),
    Feature("… in flattened buckets", "refit", *transport("cuda-ipc-flattened")),
    Feature("refit by NCCL, from another GPU", "refit", *transport("nccl")),
    Feature("refit from disk", "refit", *transport("disk")),
    Feature(
        "weights in fp8, refitted from bf16",
        "fp8",
        lambda smoke: smoke.fp8,
        lambda found, _: within(found["divergence"], BOUND_FP8),
    ),
    Feature("adapters (LoRA), replaced and kept in sleep", "lora", lambda s: s.lora, adapters),
    Feature(
        "a trainer on a GPU of its own, and an engine on two",
        "disaggregated",
        lambda smoke: smoke.disaggregated,
        by_nccl_and_disk,
    ),
    Feature(
        "mixture of experts, refitted by the names of experts",
        "moe",
        lambda smoke: smoke.moe,
        lambda found, _: f"{found['experts']} experts: {within(found['divergence'], BOUND_BF16)}",
    ),
    Feature(
        "prefix reuse over turns with a tool call",
        "multi-turn",
        every,
        # An engine may have computed the last token of an answer too, which nothing asks of it.
        lambda found, _: (
            f"{min(found['reused_tokens'], found['of_tokens'])} of {found['of_tokens']} tokens"
            + (", prompts alone" if found.get("reuse") == "prompts" else "")
        ),
    ),
    Feature("partial rollout, continued", "partial-rollout", every, continued),
    Feature("positions in the thousands, preempted", "long", lambda smoke: smoke.long, far),
    Feature(
        "many sampled requests at once, weights replaced meanwhile",
        "pressure",
        lambda smoke: smoke.pressure,
        at_once,
    ),
    Feature(
        "new weights in the middle of rollouts, over HTTP",
        "server",
        lambda smoke: smoke.server,
        in_the_middle,
    ),
    Feature(
        "second witness of a refit",
        "refit",
        lambda _: False,  # an engine has one or has none: no catalog file says it, its report does
        lambda found, _: f"{found['witness']} agrees on {found['tensors']} tensors",
    ),
    Feature(
        "two GPUs with unequal free memory",
        "tensor-parallel",
        lambda smoke: smoke.tensor_parallel == 2,
        two_gpus,
    ),
    Feature(
        "training by the framework itself",
        "training",
        lambda smoke: smoke.training,
        lambda found, _: (
            f"{found['framework']}: reward {found['reward_first']:.2f} to "
            f"{found['reward_last']:.2f}, {found['divergence']:.5f} ≤ {found['bound']}"
        ),
    ),
)


def shown(feature: Feature, smoke: Smoke, report: Mapping[str, Any]) -> str:
    """What a report shows of a feature; empty where it shows nothing of it."""
    found = metrics(report, feature.check)
    if found is None:
        return ""
    try:
        return feature.telling(found, smoke)
    except KeyError:  # of an older entrypoint, or of a machine with too few GPUs
        return ""


def cell(feature: Feature, smoke: Smoke, kept: Kept | None) -> str:
    """What the table says of one feature of one image."""
    found = shown(feature, smoke, kept.report) if kept else ""
    if kept and found:
        if not kept.standing.good:
            return STALE
        earlier = feature.check in kept.standing.outgrown
        return f"{found}; {standing.EARLIER}" if earlier else found
    return NOT_SHOWN if feature.claimed(smoke) else NOT_CLAIMED


def head(name: str, kept: Kept | None) -> str:
    """What stands over a column: the image, its report, and whether that is by other checks."""
    if kept is None:
        return name
    earlier = kept.standing.word == standing.EARLIER
    return f"[{name}]({kept.where})" + (f", {standing.EARLIER}" if earlier else "")


def table(columns: Sequence[tuple[Image, Kept | None]]) -> str:
    """The table: a row for each feature, a column for each image and its kept report."""
    images = [image for image, _ in columns]
    heads = [head(catalog.short(image, images), kept) for image, kept in columns]
    rows = [
        [feature.name, *(cell(feature, image.smoke, kept) for image, kept in columns)]
        for feature in FEATURES
    ]
    return markdown.table(["", *heads], rows)

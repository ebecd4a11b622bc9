"""The table of features says what reports show, and no more; the numbers fit every engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from images import catalog, host
from images.building import build, layers
from images.building.contents import Summary
from images.catalog import Image
from images.locking import lock
from images.proving import proofs, standing
from images.proving.standing import Standing
from images.schema import Smoke
from images.telling import docs, features, numbers, pages, tables
from images.telling.features import NOT_CLAIMED, NOT_SHOWN, STALE, Kept
from rollout.faults import FAULTS

from .. import reports
from ..conftest import VERSIONS, Checkout, sha256

EVERYTHING = Smoke(
    sleep_levels=(1, 2),
    refit=("cuda-ipc", "cuda-ipc-flattened", "nccl", "disk"),
    fp8=True,
    lora=True,
    server=True,
    long=True,
    tensor_parallel=2,
    training=True,
    moe=True,
    pressure=True,
    disaggregated=True,
)
# The keys of a catalog file that promises a little more than that.
SGLANG = {
    "backend": '"sglang"',
    "requirements": '["sglang"]',
    "smoke": '{ sleep-levels = [2], refit = ["cuda-ipc", "disk"], server = true }',
}
LITTLE = Smoke(sleep_levels=(2,), refit=("cuda-ipc",))

CHECKS: dict[str, dict[str, Any]] = {
    "files": {},
    "start": {"start_seconds": 20.0, "cache_files_added": 58},
    "refit": {
        "tensors": 35,
        "cuda_ipc_gb_per_s": 80.0,
        "copy_gb_per_s": 1900.0,
        "witness": "the engine's own checker",
        "cuda_ipc_flattened_gb_per_s": 160.4,
        "nccl_gb_per_s": 9.87,
        "disk_gb_per_s": 0.512,
    },
    "generation": {"divergence": 1.0116, "control_divergence": 215.6},
    "multi-turn": {"turns": 3, "reused_tokens": 150, "of_tokens": 150},
    "partial-rollout": {"equal": 6, "kept_tokens": [16, 17, 16, 16, 18, 16, 16, 16]},
    "sleep-1": {
        "freed_fraction": 1.0,
        "held_bytes": 6_200_000_000,
        "cycles": 4,
        "growth_bytes": 0,
        "sleep_gb_per_s": 43.0,
        "first_sleep_seconds": 0.6,
        "sleep_seconds": 0.04,
        "wake_gb_per_s": 38.0,
        "to_host_gb_per_s": 55.0,
        "from_host_gb_per_s": 55.4,
    },
    "sleep-2": {"freed_fraction": 0.9912, "held_bytes": 6_200_000_000, "sleep_seconds": 0.012},
    "cycle": {"turn_seconds": 0.044},
    "long": {
        "positions": 16384,
        "chunk": 2048,
        "preemptions": 7,
        "worst_request": 1.0194,
        "start_seconds": 27.0,
        "long_seconds": 2.5,
        "crowd_seconds": 3.5,
        "crowd_tokens": 25_600,
        "cache_tokens": 20_464,
    },
    "pressure": {
        "requests": 512,
        "aborted": 256,
        "worst_request": 1.0201,
        "crossed_divergence": 1.71,
        "tokens_per_s": 20_400.4,
        "plain_tokens_per_s": 31_000.0,
        "growth_bytes": 0,
        "start_seconds": 20.0,
    },
    "fp8": {"start_seconds": 16.0, "divergence": 1.0269, "stranger_divergence": 3.77},
    "lora": {"divergence": 1.0086, "after_level_2": "refused"},
    "server": {
        "start_seconds": 30.0,
        "refit_gb_per_s": 12.5,
        "kept_tokens": [16] * 8,
        "other_divergence": 1.0123,
        "stranger_divergence": 4.2,
    },
    "moe": {"experts": 16, "divergence": 1.0162},
    "disaggregated": {
        "nccl_gb_per_s": 31.4,
        "disk_gb_per_s": 0.77,
        "divided_divergence": 1.0141,
    },
    "tensor-parallel": {
        "gpus": 2,
        "free_bytes": [140_000_000_000, 98_000_000_000],
        "start_seconds": 25.0,
        "divergence": 1.0131,
        "refused": True,
    },
    "training": {
        "framework": "verl 0.7.1",
        "reward_first": 0.2,
        "reward_last": 0.81,
        "divergence": 0.0003,
        "bound": 0.003,
    },
}


def report(*names: str) -> dict[str, Any]:
    """A report with these checks passed, ten seconds each."""
    checks = [
        {"name": n, "status": "passed", "seconds": 10.0, "metrics": CHECKS[n]}
        for n in names or CHECKS
    ]
    return {"checks": checks, "seconds": 200.0}


def column(smoke: Smoke, kept: Kept | None) -> dict[str, str]:
    """The cells of one image by the names of the features."""
    return {f.name: features.cell(f, smoke, kept) for f in features.FEATURES}


def of(data: dict[str, Any], word: str = standing.PROVED) -> Kept:
    return Kept("proofs/x.json", data, Standing(word, "because"))


def test_a_cell_is_what_the_report_shows_with_its_telling_number() -> None:
    assert column(EVERYTHING, of(report())) == {
        "sleep, weights kept (level 1)": "100.0% of 6.20 GB freed",
        "sleep, weights dropped (level 2)": "99.1% of 6.20 GB freed",
        "no sleep: refits in turn": NOT_CLAIMED,
        "refit through shared memory": NOT_CLAIMED,
        "refit over CUDA IPC": "80 GB/s",
        "… in flattened buckets": "160 GB/s",
        "refit by NCCL, from another GPU": "9.87 GB/s",
        "refit from disk": "0.512 GB/s",
        "weights in fp8, refitted from bf16": "1.0269 ≤ 1.08",
        "adapters (LoRA), replaced and kept in sleep": "1.0086 ≤ 1.043; after level 2 refused",
        "mixture of experts, refitted by the names of experts": "16 experts: 1.0162 ≤ 1.043",
        "a trainer on a GPU of its own, and an engine on two": (
            "31.4 GB/s by nccl, 0.77 GB/s by disk; on two GPUs 1.0141 ≤ 1.043"
        ),
        "prefix reuse over turns with a tool call": "150 of 150 tokens",
        "partial rollout, continued": "6 of 8 equal, the others part at a tie",
        "positions in the thousands, preempted": "16,384 positions, 7 preemptions: 1.0194 ≤ 1.043",
        "many sampled requests at once, weights replaced meanwhile": (
            "512 requests, 256 aborted: 1.0201 ≤ 1.043"
        ),
        "new weights in the middle of rollouts, over HTTP": "8 rollouts: 1.0123 ≤ 1.043",
        "second witness of a refit": "the engine's own checker agrees on 35 tensors",
        "two GPUs with unequal free memory": (
            "140 and 98 GB free: 1.0131 ≤ 1.043; refused when told to insist"
        ),
        "training by the framework itself": ("verl 0.7.1: reward 0.20 to 0.81, 0.00030 ≤ 0.003"),
    }


def test_an_engine_that_never_sleeps_is_shown_by_its_refits() -> None:
    data = report("refit")
    measured = {"refits": 6, "divergence": 1.0123}
    data["checks"].append({"name": "refits", "status": "passed", "metrics": measured})
    found = column(Smoke(sleep_levels=(), refit=("cuda-ipc",)), of(data))
    assert found["no sleep: refits in turn"] == "6 refits, 1.0123 ≤ 1.043"
    assert found["sleep, weights kept (level 1)"] == NOT_CLAIMED


def test_a_release_that_forgets_its_answers_is_shown_as_such() -> None:
    data = report("multi-turn")
    data["checks"][0]["metrics"] |= {"reused_tokens": 120, "reuse": "prompts"}
    found = column(EVERYTHING, of(data))["prefix reuse over turns with a tool call"]
    assert found == "120 of 150 tokens, prompts alone"


def test_without_a_report_what_is_promised_is_not_shown_and_the_rest_is_not_claimed() -> None:
    found = column(EVERYTHING, None)
    unclaimed = {name for name, cell in found.items() if cell == NOT_CLAIMED}
    # Whether an engine has a checker of its own, its report alone says.
    awake = "no sleep: refits in turn"
    assert unclaimed == {awake, "refit through shared memory", "second witness of a refit"}
    assert set(found.values()) == {NOT_SHOWN, NOT_CLAIMED}
    little = column(LITTLE, None)
    assert {name for name, cell in little.items() if cell == NOT_SHOWN} == {
        "sleep, weights dropped (level 2)",
        "refit over CUDA IPC",
        "prefix reuse over turns with a tool call",
        "partial rollout, continued",
    }


def test_a_stale_report_shows_nothing_and_is_called_stale() -> None:
    found = column(EVERYTHING, of(report("refit", "sleep-1"), standing.STALE))
    assert {name for name, cell in found.items() if cell == STALE} == {
        "sleep, weights kept (level 1)",
        "refit over CUDA IPC",
        "… in flattened buckets",
        "refit by NCCL, from another GPU",
        "refit from disk",
        "second witness of a refit",
    }
    # What it never had is not stale.
    assert found["prefix reuse over turns with a tool call"] == NOT_SHOWN
    assert not [cell for cell in found.values() if "GB" in cell]


def test_a_check_that_did_not_pass_shows_nothing() -> None:
    data = report("multi-turn")
    data["checks"][0]["status"] = "unproved"
    assert column(EVERYTHING, of(data))["prefix reuse over turns with a tool call"] == NOT_SHOWN


def test_a_transport_that_one_gpu_cannot_show_is_not_shown() -> None:
    data = report("refit")
    less = {k: v for k, v in CHECKS["refit"].items() if k != "nccl_gb_per_s"}
    data["checks"][0]["metrics"] = less
    found = column(EVERYTHING, of(data))
    assert found["refit by NCCL, from another GPU"] == NOT_SHOWN
    assert found["refit from disk"] == "0.512 GB/s"


def test_what_came_another_way_is_not_shown_as_what_was_promised() -> None:
    """Each transport has a metric of its name: no first one stands for whatever ran."""
    nccl = Smoke(sleep_levels=(2,), refit=("nccl",))
    data = report("refit")
    data["checks"][0]["metrics"] = {"cuda_ipc_gb_per_s": 80.0}
    assert column(nccl, of(data))["refit by NCCL, from another GPU"] == NOT_SHOWN


def test_a_proof_by_earlier_checks_shows_its_numbers_and_says_what_it_is(
    checkout: Checkout,
) -> None:
    kept = of(report(), standing.EARLIER)
    assert column(EVERYTHING, kept)["refit from disk"] == "0.512 GB/s"
    first = features.table([(checkout.image(), kept)]).splitlines()[0]
    assert first == "| | [vllm-0.12](proofs/x.json), by earlier checks |"


def test_rollouts_that_are_all_equal_part_nowhere() -> None:
    found = {"equal": 8, "kept_tokens": [16] * 8}
    assert features.continued(found, EVERYTHING) == "8 of 8 equal"


def test_an_engine_that_insists_on_nothing_has_refused_nothing() -> None:
    found = {k: v for k, v in CHECKS["tensor-parallel"].items() if k != "refused"}
    assert features.two_gpus(found, EVERYTHING) == "140 and 98 GB free: 1.0131 ≤ 1.043"


def test_the_table_has_a_column_for_each_image(checkout: Checkout) -> None:
    bare = checkout.image()
    other = checkout.image(SGLANG, tag="other")
    lines = features.table([(bare, None), (other, of(report("sleep-2")))]).splitlines()
    assert lines[0] == "| | vllm-0.12 | [other](proofs/x.json) |"
    assert len(lines) == 2 + len(features.FEATURES)
    assert {line.count("|") for line in lines} == {4}
    assert "| sleep, weights kept (level 1) | not shown | — |" in lines
    assert "| sleep, weights dropped (level 2) | not shown | 99.1% of 6.20 GB freed |" in lines
    assert "| refit from disk | — | not shown |" in lines


def test_without_an_image_there_is_a_table_all_the_same() -> None:
    assert len(features.table([]).splitlines()) == 2 + len(features.FEATURES)


# kept reports of an image

DIFF_IDS = tuple(f"sha256:{sha256(name)}" for name in ("base", "ours"))


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image of level 2 alone, on a GPU, with a kept report of its layers."""
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    found = checkout.image(SGLANG, tag="sglang-x", versions=VERSIONS | {"sglang": "1"})
    names = [name for name in standing.promised(found) if name in CHECKS or name == "files"]
    data = reports.of(found, DIFF_IDS, metrics={name: CHECKS[name] for name in names})
    for check in data["checks"]:
        if check["name"] == "refit":
            check["metrics"].pop("nccl_gb_per_s")
    host.write(proofs.kept(found), json.dumps(data))
    nothing = Summary({}, "owner", "mtime", "xattr", "order")
    built = tuple(layers.Layer("base", diff_id, 2, 1, nothing) for diff_id in DIFF_IDS[:-1])
    record = layers.Record(build.inputs(found), "buildah 1.28.2", built)
    layers.write(found, record)
    return found


def test_a_kept_report_is_of_today_until_the_inputs_change(image: Image) -> None:
    found = tables.kept(image)
    assert found is not None
    assert found.standing.word == standing.PROVED
    assert found.where == "images/proofs/verl-rollout/sglang-x.json"
    text = image.dockerfile.read_text()
    image.dockerfile.write_text(text.replace("1000:0", "1001:0"))
    aged = tables.kept(image)
    assert aged is not None
    assert aged.standing.word == standing.STALE
    assert "| refit from disk | stale |" in features.table([(image, aged)])


def test_an_image_without_a_report_or_a_record_keeps_nothing(image: Image) -> None:
    layers.path(image).unlink()
    found = tables.kept(image)
    assert found is not None
    assert found.standing.word == standing.STALE
    proofs.kept(image).unlink()
    assert tables.kept(image) is None
    assert tables.standing(image) == "locked, not built here, not proved"


def test_an_image_that_was_built_and_has_no_report_is_not_proved_yet(image: Image) -> None:
    proofs.kept(image).unlink()
    assert tables.standing(image) == "not proved yet"


def test_the_page_of_proofs_has_the_table(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "DEFAULT", image.reference)
    monkeypatch.setattr(docs, "printed", lambda _: "printed last")
    found = docs.sections([image])["docs/proof.md"]["features"]
    assert found == features.table([(image, tables.kept(image))])
    assert "| refit from disk | 0.512 GB/s |" in found


# the numbers of a GPU


def rows(*names: str) -> dict[str, tuple[str, str]]:
    return {what: (value, beside) for what, value, beside in numbers.gpu_rows(report(*names))}


def test_the_speed_of_many_requests_stands_beside_one_plain_call_for_as_many() -> None:
    found = next(row for row in numbers.gpu_rows(report()) if row[0].startswith("… their tokens"))
    assert found[1:] == ("20,400 tokens/s", "one plain call for as many: 31,000 tokens/s")


def test_every_engine_start_that_is_timed_is_counted() -> None:
    # 20 + 27 + 20 + 16 + 30 + 25 of 200 s, 10 of which verify's one check took.
    whole = rows()["the whole smoke test: engine starts, and the rest"]
    assert whole[0] == "138.0 s + 52.0 s"


def test_an_image_of_level_2_alone_has_the_numbers_of_that() -> None:
    found = rows(*[name for name in CHECKS if name != "sleep-1"])
    assert not [what for what in found if "sleep 1" in what or "cycles" in what]
    assert found["sleep 2 frees, of weights and KV cache"] == (
        "99.1% of 6.20 GB",
        "≥ 90%, by the driver's count",
    )
    assert found["sleep 2"] == ("12 ms", "")


def test_an_image_of_level_1_alone_has_the_numbers_of_that() -> None:
    found = rows(*[name for name in CHECKS if name != "sleep-2"])
    assert not [what for what in found if "sleep 2" in what]
    assert found["sleep 1 frees, of weights and KV cache"][0] == "100.0% of 6.20 GB"


def test_each_transport_has_its_speed() -> None:
    found = [(what, value) for what, value, _ in numbers.gpu_rows(report()) if "GB/s" in value]
    assert found[3:] == [
        ("… each bucket flattened into one tensor", "160 GB/s"),
        ("refit by NCCL from another GPU, its group made anew", "9.87 GB/s"),
        ("refit by a checkpoint on disk, written and read", "0.512 GB/s"),
        ("… refitted in the middle of rollouts", "12.5 GB/s"),
        ("a trainer elsewhere: refit by NCCL, one group for all of them", "31.4 GB/s"),
        ("a trainer elsewhere: refit by a checkpoint on disk, written and read", "0.77 GB/s"),
    ]
    assert found[2] == ("refit over CUDA IPC, 256 MiB buckets", "80 GB/s")


def test_server_and_two_gpus_have_rows_of_their_own() -> None:
    found = rows()
    assert found["start of the engine's own server, dummy weights"] == ("30.0 s", "")
    assert found["start on two GPUs with 140 and 98 GB free, dummy weights"] == (
        "25.0 s",
        "told to insist on balance, it refused",
    )
    assert found["mean exp(\\|Δ log-probability\\|) on both, bf16"] == ("1.0131", "≤ 1.043")


def test_long_sequences_have_rows_of_their_own() -> None:
    found = rows()
    assert found["mean exp(\\|Δ log-probability\\|) up to 16,384 positions, the worst request"] == (
        "1.0194",
        "≤ 1.043",
    )
    assert found["preemptions: 25,600 tokens in a KV cache of 20,464"] == ("7", "")


def test_no_row_names_an_engine() -> None:
    text = (
        str(numbers.gpu_rows(report())).lower()
        + str(list(column(EVERYTHING, of(report())))).lower()
    )
    assert not [name for name in ("vllm", "sglang", "tensorrt") if name in text]


def test_the_numbers_of_a_stale_report_say_so(image: Image, checkout: Checkout) -> None:
    other = checkout.image(SGLANG, tag="other", versions=VERSIONS | {"sglang": "1"})
    text = proofs.kept(image).read_text(encoding="utf-8")
    host.write(proofs.kept(other), text)  # of other layers than its own
    first, second = (
        pages.measured(each, {entry.name: entry.version for entry in lock.read(each)})
        for each in (image, other)
    )
    driver = "driver 550.54.15"
    assert first.startswith(f"On a GPU, {driver}, 2026-01-02, from [its")
    assert second.startswith(f"On a GPU, {driver}, 2026-01-02 (not proved yet: its report is of ")
    assert "vLLM" not in first + second


# faults


def test_a_fault_is_shown_on_the_cpu_where_its_image_has_the_check(
    image: Image, checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = checkout.image(tag="transformers-cpu")  # without a server
    monkeypatch.setattr(catalog, "DEFAULT", default.reference)

    def lines() -> dict[str, str]:
        return dict(zip(FAULTS, tables.fault_table([default, image]).splitlines()[2:], strict=True))

    assert lines()["flipped-byte"].endswith("| `refit` | CPU (tests) |")
    assert lines()["deaf-server"].endswith("| `server` | not shown yet |")
    data = reports.of(image, DIFF_IDS)
    host.write(proofs.kept_fault(image, "deaf-server"), json.dumps(data))
    link = "[sglang-x](images/proofs/verl-rollout/sglang-x.faults/deaf-server.json)"
    assert lines()["deaf-server"].endswith(f"| `server` | {link} |")
    for changes, word in (({"program": None}, "by earlier checks"), ({"layers": []}, "stale")):
        host.write(proofs.kept_fault(image, "deaf-server"), json.dumps(data | changes))
        assert lines()["deaf-server"].endswith(f"| `server` | {link} ({word}) |")

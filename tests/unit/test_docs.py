"""What tables and pages promise: they are of today, and an old proof is not shown as one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from images import catalog, host
from images.building import build, layers
from images.building.contents import Summary
from images.catalog import Image
from images.locking import base
from images.proving import proofs, reproduce
from images.telling import docs, numbers, overview, pages, sizes, tables
from rollout.faults import FAULTS
from rollout.problem import Problem

from .. import reports
from ..conftest import VERSIONS, Checkout, sha256

DIFF_IDS = tuple(f"sha256:{sha256(name)}" for name in ("base", "engine", "ours"))
PROVED = "[proved](images/proofs/verl-rollout/vllm-0.12.json) on a GPU, 2026-01-02"


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image with a fresh proof."""
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    found = checkout.image()
    keep(found)
    nothing = Summary({}, "owner", "mtime", "xattr", "order")
    built = tuple(layers.Layer("base", diff_id, 2, 1, nothing) for diff_id in DIFF_IDS[:-1])
    record = layers.Record(build.inputs(found), "buildah 1.28.2", built)
    layers.write(found, record)
    return found


def keep(image: Image, **changes: Any) -> None:
    """Keep a report of the image as it is now."""
    host.write(proofs.kept(image), json.dumps(reports.of(image, DIFF_IDS) | changes))


def test_a_fresh_proof_is_shown_with_device_and_day(image: Image) -> None:
    assert tables.standing(image) == PROVED


def reproduced(image: Image, *levels: str, inputs: str = "") -> None:
    """Keep runs that reproduced the image, on a machine each."""
    data = {"inputs": inputs or build.inputs(image), "runs": [{"level": x} for x in levels]}
    host.write(reproduce.path(image), json.dumps(data))


REPRODUCED = "images/proofs/verl-rollout/vllm-0.12.reproduced.json"


def test_the_level_shown_is_the_lowest_of_all_machines(image: Image) -> None:
    assert tables.reproduced(image) == "not shown yet"
    reproduced(image, "R4")
    assert tables.reproduced(image) == f"[R4]({REPRODUCED})"
    reproduced(image, "R4", "R3")
    assert tables.reproduced(image) == f"[R3]({REPRODUCED}) on 2 machines"


def test_a_level_of_other_inputs_is_stale(image: Image) -> None:
    reproduced(image, "R4", inputs="others")
    assert tables.reproduced(image) == f"stale: [R4]({REPRODUCED}), of other inputs"


def test_an_image_without_a_report_is_not_proved_yet(image: Image) -> None:
    proofs.kept(image).unlink()
    assert tables.standing(image) == "not proved yet"


def stale_by_lock(image: Image) -> None:
    keep(image, lock_sha256="0" * 64)


def stale_by_layers(image: Image) -> None:
    keep(image, layers=[DIFF_IDS[0], DIFF_IDS[2], DIFF_IDS[2]])


def stale_by_inputs(image: Image) -> None:
    image.dockerfile.write_text(image.dockerfile.read_text() + "\nUSER 1000:0\n")


def stale_by_nothing_to_compare_with(image: Image) -> None:
    layers.path(image).unlink()


@pytest.mark.parametrize(
    ("age", "why"),
    [
        (stale_by_lock, "its report is of another lock"),
        (stale_by_layers, "its report is of other layers"),
        (stale_by_inputs, "its report is of layers that are not recorded for today's inputs"),
        (
            stale_by_nothing_to_compare_with,
            "its report is of layers that are not recorded for today's inputs",
        ),
    ],
    ids=lambda age: getattr(age, "__name__", ""),
)
def test_a_proof_of_another_lock_or_other_layers_is_stale(image: Image, age: Any, why: str) -> None:
    age(image)
    assert tables.standing(image) == f"{PROVED.replace('proved]', 'stale]')}: {why}"


def test_what_a_proof_does_not_show_is_in_the_table(image: Image) -> None:
    data = reports.of(image, DIFF_IDS)
    data["checks"] = [check for check in data["checks"] if check["name"] != "sleep-2"]
    host.write(
        proofs.kept(image),
        json.dumps(data | {"skipped": {"sleep-2": "no room"}, "verdict": "in-part"}),
    )
    assert tables.standing(image) == PROVED.replace("proved]", "in part]") + "; not shown: sleep-2"


def test_a_proof_by_earlier_checks_is_called_that(image: Image) -> None:
    keep(image, program=None)
    assert tables.standing(image) == PROVED.replace("proved]", "by earlier checks]")


def test_a_kept_report_that_nobody_could_have_written_is_one_sentence(image: Image) -> None:
    host.write(proofs.kept(image), '{"device": "\\ud800"}')
    with pytest.raises(Problem) as caught:
        tables.standing(image)
    assert caught.value.code == 2
    assert caught.value.sentence == (
        "images/proofs/verl-rollout/vllm-0.12.json holds half a character (a lone surrogate)"
    )


def test_a_row_says_what_the_lock_says(image: Image) -> None:
    assert tables.row(image, VERSIONS | {"torch": "2.9.0+cu128"}) == [
        "[`verl-rollout:vllm-0.12`](docs/images/verl-rollout/vllm-0.12.md)",
        "verl 0.7.1",
        "vllm 0.12.0",
        "12.8, driver ≥ 525.60.13",
        f"{base.python('3.11')}, Ray {VERSIONS['ray']}",
        tables.pull(image),
        PROVED,
        "`nox -s build -- verl-rollout:vllm-0.12`",
    ]
    without = tables.row(image, {"vllm": "0.12.0", "torch": "2.9.0+cpu"})
    assert without[3:5] == ["none (CPU)", base.python("3.11")]


def test_to_pull_is_the_sum_of_the_layers_recorded_for_todays_inputs(image: Image) -> None:
    found = layers.read(image)
    assert found is not None
    sized = [replace(layer, compressed=750_000_000) for layer in found.layers]
    layers.write(image, replace(found, layers=tuple(sized)))
    assert tables.pull(image) == "1.50 GB"
    layers.write(image, replace(found, inputs="others"))
    assert tables.pull(image) == "not recorded yet"
    layers.path(image).unlink()
    assert tables.pull(image) == "not recorded yet"


def test_the_table_has_a_row_for_each_image(checkout: Checkout, image: Image) -> None:
    lines = tables.table([image, checkout.image(tag="other")]).splitlines()
    assert len(lines) == 4
    assert "`verl-rollout:other`" in lines[3]
    assert {line.count("|") for line in lines} == {9}


# the README around it


def marked(name: str, text: str) -> str:
    return f"<!-- {name}: generated by 'nox -s docs' -->\n{text}\n<!-- /{name} -->\n"


README = f"before\n{marked('images', 'old')}between\n{marked('faults', 'old')}after\n"


def test_only_what_stands_between_its_markers_is_renewed() -> None:
    found = docs.renewed(README, "images", "new", "README.md")
    assert found == README.replace(marked("images", "old"), marked("images", "new"))
    assert docs.renewed(found, "images", "new", "README.md") == found


@pytest.mark.parametrize(
    "text",
    [
        README.replace("<!-- images: generated", "<!-- images:"),
        README.replace("<!-- /images -->", ""),
        "<!-- /images -->\n<!-- images: generated by 'nox -s docs' -->\n",
    ],
    ids=["no beginning", "no end", "end before beginning"],
)
def test_lost_markers_are_said_with_what_to_do(text: str) -> None:
    with pytest.raises(Problem) as caught:
        docs.renewed(text, "images", "new", "README.md")
    assert caught.value.code == 2
    markers = "<!-- images: generated by 'nox -s docs' --> and <!-- /images -->"
    assert caught.value.sentence == f"README.md has lost its markers; put {markers} back"


def test_the_faults_are_those_that_can_be_injected() -> None:
    lines = tables.fault_table([]).splitlines()[2:]
    assert len(lines) == len(FAULTS)
    for line, (name, fault) in zip(lines, FAULTS.items(), strict=True):
        found = f"`{fault.check}`" + (f" or `{fault.otherwise}`" if fault.otherwise else "")
        assert line == f"| `{name}` | {fault.what} | {found} | CPU (tests) |"


def test_a_fault_found_on_a_gpu_links_to_the_report_of_that_run(image: Image) -> None:
    host.write(proofs.kept_fault(image, "lost-buffer"), json.dumps(reports.of(image, DIFF_IDS)))
    lines = tables.fault_table([image]).splitlines()
    link = "[vllm-0.12](images/proofs/verl-rollout/vllm-0.12.faults/lost-buffer.json)"
    assert [line.endswith(f"| CPU (tests), {link} |") for line in lines].count(True) == 1
    assert [link in line for line in lines].count(True) == 1
    aimed = "flipped-byte@cuda-ipc"
    host.write(proofs.kept_fault(image, aimed), json.dumps(reports.of(image, DIFF_IDS)))
    link = f"[vllm-0.12 by cuda-ipc](images/proofs/verl-rollout/vllm-0.12.faults/{aimed}.json)"
    (line,) = [line for line in tables.fault_table([image]).splitlines() if link in line]
    assert line.startswith("| `flipped-byte` |")


CHECKS: dict[str, dict[str, float]] = {
    "files": {},
    "start": {"start_seconds": 40.0, "cache_files_added": 71},
    "refit": {"cuda_ipc_gb_per_s": 70.0, "copy_gb_per_s": 1900.0},
    "generation": {"divergence": 1.0116, "control_divergence": 215.6},
    "sleep-1": {
        "freed_fraction": 1.0,
        "held_bytes": 6e9,
        "cycles": 4,
        "growth_bytes": 0,
        "sleep_gb_per_s": 43.0,
        "first_sleep_seconds": 0.6,
        "sleep_seconds": 0.04,
        "wake_gb_per_s": 38.0,
        "to_host_gb_per_s": 55.0,
        "from_host_gb_per_s": 55.4,
    },
    "sleep-2": {"sleep_seconds": 0.012},
    "cycle": {"turn_seconds": 0.044},
    "fp8": {"start_seconds": 16.0, "divergence": 1.0269, "stranger_divergence": 3.77},
}


def gpu_report(*names: str) -> dict[str, Any]:
    """A report with these checks, ten seconds each."""
    checks = [{"name": n, "seconds": 10.0, "metrics": CHECKS[n]} for n in names]
    return {"checks": checks, "seconds": 100.0}


def test_the_numbers_of_a_gpu_are_those_of_its_report() -> None:
    rows = {what: (value, beside) for what, value, beside in numbers.gpu_rows(gpu_report(*CHECKS))}
    # 100 s, less 10 of verify's one check and the two starts.
    whole = rows["the whole smoke test: engine starts, and the rest"]
    assert whole[0] == "56.0 s + 34.0 s"
    assert rows["refit over CUDA IPC, 256 MiB buckets"] == (
        "70 GB/s",
        "a copy on the device: 1900 GB/s",
    )
    first = rows["… and the first answer, with what is compiled for it"]
    assert first == ("10.0 s", "files added to the cache: 71")
    assert [v for what, (v, _) in rows.items() if "fp8" in what] == ["1.0269"]


def test_an_image_whose_engine_never_sleeps_has_the_numbers_of_its_refits() -> None:
    report = gpu_report(*[name for name in CHECKS if name not in ("cycle", "sleep-1", "sleep-2")])
    measured = {"refits": 6, "refit_seconds": 0.0273, "growth_bytes": 0}
    report["checks"].append({"name": "refits", "seconds": 10.0, "metrics": measured})
    rows = {what: (value, beside) for what, value, beside in numbers.gpu_rows(report)}
    assert rows["refit while awake, each of 6 in turn"] == ("27 ms", "growth: 0 bytes")
    assert not [what for what in rows if "sleep" in what]


def test_a_trainer_elsewhere_has_its_rates_and_two_starts() -> None:
    report = gpu_report("start", "refit", "generation")
    before = numbers.divided(report)
    measured = {"nccl_gb_per_s": 31.41, "disk_gb_per_s": 0.771, "divided_divergence": 1.0141}
    starts = {"start_seconds": 4.0, "divided_start_seconds": 5.0}
    report["checks"].append(
        {"name": "disaggregated", "seconds": 10.0, "metrics": measured | starts}
    )
    after = numbers.divided(report)
    assert (round(after[0] - before[0], 6), round(before[1] - after[1], 6)) == (9.0, 9.0)
    assert [value for _, value, _ in numbers.gpu_rows(report)[-3:]] == [
        *("31.4 GB/s", "0.771 GB/s", "1.0141")
    ]


def test_a_second_start_stands_beside_the_first() -> None:
    def started(seconds: float, files: int) -> dict[str, Any]:
        metrics = CHECKS["start"] | {"start_seconds": seconds, "cache_files_added": files}
        start = {"name": "start", "seconds": seconds + 10, "metrics": metrics}
        return {"checks": [start, *gpu_report("refit", "generation", "cycle")["checks"]]}

    first, second = started(50.0, 300) | {"seconds": 100.0}, started(20.0, 2)
    rows = numbers.gpu_rows(first, second)
    assert rows[2] == (
        *("start again, with the cache that the first one filled", "20.0 s"),
        "files added to the cache: 2",
    )
    assert rows[3] == ("… and the first answer", "30.0 s", "compiled only once: 30.0 s")
    assert [*rows[:2], *rows[4:]] == numbers.gpu_rows(first)


def test_a_second_start_of_other_layers_is_not_shown(image: Image) -> None:
    first = reports.of(image, DIFF_IDS)
    metrics = {"start": {"cache_files_added": 2}}
    second = reports.of(image, DIFF_IDS, ["start"], metrics=metrics, started="2026-01-03T00:00:00Z")
    host.write(proofs.beside(image, "warm"), json.dumps(second))
    assert pages.warm_report(image, first) == second
    assert pages.warm_report(image, first | {"layers": ["sha256:b"]}) is None
    proofs.beside(image, "warm").unlink()
    assert pages.warm_report(image, first) is None


def test_an_image_without_fp8_has_no_row_of_it() -> None:
    rows = numbers.gpu_rows(gpu_report(*[name for name in CHECKS if name != "fp8"]))
    assert not [what for what, _, _ in rows if "fp8" in what]


def test_without_a_proof_on_a_gpu_there_are_no_numbers(image: Image) -> None:
    proofs.kept(image).unlink()
    assert "No proof of it on a GPU is kept." in pages.page(image)


def test_the_page_of_an_image_gathers_what_is_known_of_it(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "measured", lambda *_: "gpu last")
    host.write(proofs.kept_fault(image, "lost-buffer"), json.dumps(reports.of(image, DIFF_IDS)))
    text = pages.page(image)
    assert text.startswith("<!-- GENERATED by 'nox -s docs'; do not edit. -->\n\n# verl-rollout:")
    assert f"| proof | {PROVED}" in text
    assert "| CUDA | 12.8, driver ≥ 525.60.13 |" in text
    link = "[found](images/proofs/verl-rollout/vllm-0.12.faults/lost-buffer.json)"
    assert f"| `lost-buffer` | {link}" in text
    assert "| base | `" in text
    assert "[docs/engines/vllm.md](docs/engines/vllm.md)" in text


PARTS = {
    "README.md": ("printed", "images"),
    "docs/frameworks.md": ("frameworks",),
    "docs/proof.md": ("features", "faults"),
    "docs/reproducing.md": ("layers", "measured"),
    "docs/new-image.md": ("keys", "fragments"),
}


@pytest.fixture
def written(checkout: Checkout, image: Image, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pages in need of renewal, and a catalog whose default is the image."""
    monkeypatch.setattr(catalog, "DEFAULT", image.reference)
    monkeypatch.setattr(sizes, "PAGE", checkout.root / "lockfiles/SIZES.md")
    monkeypatch.setattr(docs, "printed", lambda _: "printed last")
    monkeypatch.setattr(docs, "measured", lambda _: "measured last")
    monkeypatch.setattr(pages, "measured", lambda *_: "gpu last")
    monkeypatch.setattr(overview, "cells", lambda *_: {"a number": "measured last"})
    monkeypatch.setattr(overview, "seconds", lambda *_: ())
    monkeypatch.setattr(overview, "refits", lambda *_: ())
    texts = {page: "".join(marked(name, "old") for name in names) for page, names in PARTS.items()}
    for page, text in texts.items():
        host.write(checkout.root / page, text)
    return texts


def test_stale_pages_fail_the_check_and_stay(
    checkout: Checkout, written: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Problem, match=r"^not fresh .*README.md.* run 'nox -s docs'") as caught:
        docs.main(["--check"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "\n-old\n" in out
    assert "\n+| [`verl-rollout:vllm-0.12`](docs/images/verl-rollout/vllm-0.12.md) |" in out
    assert {page: (checkout.root / page).read_text() for page in written} == written
    assert not (checkout.root / "docs/images").exists()


@pytest.mark.usefixtures("written")
def test_renewed_pages_pass_the_check(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(page: str) -> str:
        return (checkout.root / page).read_text(encoding="utf-8")

    own = "docs/images/verl-rollout/vllm-0.12.md"
    assert docs.main([]) == 0
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == {
        *PARTS,
        own,
        "lockfiles/SIZES.md",
        "docs/findings.md",
        *(overview.PAGE, overview.SIZES, overview.TIMES),
        docs.SCHEMA,
    }
    assert "| verl 0.7.1 | `verl-rollout:vllm-0.12` |" in read("docs/frameworks.md")
    assert docs.main(["--check"]) == 0
    assert docs.main([]) == 0
    assert capsys.readouterr().out == ""
    assert "printed last" in read("README.md")
    assert PROVED in read("README.md")
    assert "`flipped-byte`" in read("docs/proof.md")
    assert "measured last" in read("docs/reproducing.md")
    assert "gpu last" in read(own)
    assert "| a number | measured last |" in read(overview.PAGE)
    assert "| `smoke.fp8` | true or false | no |" in read("docs/new-image.md")


@pytest.mark.usefixtures("written")
def test_links_lead_from_the_page_that_they_stand_on(checkout: Checkout) -> None:
    docs.main([])
    own = checkout.root / "docs/images/verl-rollout/vllm-0.12.md"
    assert "](../../../images/proofs/verl-rollout/vllm-0.12.json)" in own.read_text()
    assert "](../../../docs/proof.md)" in own.read_text()
    assert "](images/proofs/" in (checkout.root / "README.md").read_text()


@pytest.mark.usefixtures("written")
def test_the_page_of_an_image_that_is_gone_is_no_page(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    docs.main([])
    host.write(checkout.root / "docs/images/verl-rollout/gone.md", "old")
    with pytest.raises(Problem, match=r"not fresh .*docs/images/verl-rollout/gone.md"):
        docs.main(["--check"])
    assert docs.main([]) == 0
    assert "gone.md removed: its image is gone" in capsys.readouterr().out
    assert docs.main(["--check"]) == 0

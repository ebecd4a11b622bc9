"""What the README's table promises: it is of today, and an old proof is not shown as one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from images import catalog, host
from images.building import build, layers, sizes
from images.building.contents import Summary
from images.catalog import Image
from images.locking import base
from images.proving import prove, reproduce
from images.telling import docs
from rollout.faults import FAULTS
from rollout.problem import Problem

from .. import reports
from ..conftest import VERSIONS, Checkout, sha256

DIFF_IDS = tuple(f"sha256:{sha256(name)}" for name in ("base", "engine", "ours"))
PROVED = "[proved](images/proofs/verl-rollout/vllm-0.12.json) on a GPU, 2026-01-02"


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image with a fresh proof."""
    monkeypatch.setattr(build, "base_name", lambda: "base:1")
    found = checkout.image()
    keep(found)
    nothing = Summary({}, "owner", "mtime", "xattr", "order")
    built = tuple(layers.Layer("base", diff_id, 2, 1, nothing) for diff_id in DIFF_IDS[:-1])
    record = layers.Record(build.inputs(found), "buildah 1.28.2", built)
    layers.write(found, record)
    return found


def keep(image: Image, **changes: Any) -> None:
    """Keep a report of the image as it is now."""
    host.write(prove.kept(image), json.dumps(reports.of(image, DIFF_IDS) | changes))


def test_a_fresh_proof_is_shown_with_device_and_day(image: Image) -> None:
    assert docs.standing(image) == PROVED


def reproduced(image: Image, *levels: str, inputs: str = "") -> None:
    """Keep runs that reproduced the image, on a machine each."""
    data = {"inputs": inputs or build.inputs(image), "runs": [{"level": x} for x in levels]}
    host.write(reproduce.path(image), json.dumps(data))


REPRODUCED = "images/proofs/verl-rollout/vllm-0.12.reproduced.json"


def test_the_level_shown_is_the_lowest_of_all_machines(image: Image) -> None:
    assert docs.reproduced(image) == "not shown yet"
    reproduced(image, "R4")
    assert docs.reproduced(image) == f"[R4]({REPRODUCED})"
    reproduced(image, "R4", "R3")
    assert docs.reproduced(image) == f"[R3]({REPRODUCED}) on 2 machines"


def test_a_level_of_other_inputs_is_stale(image: Image) -> None:
    reproduced(image, "R4", inputs="others")
    assert docs.reproduced(image) == f"stale: [R4]({REPRODUCED}), of other inputs"


def test_an_image_without_a_report_is_not_proved_yet(image: Image) -> None:
    prove.kept(image).unlink()
    assert docs.standing(image) == "not proved yet"


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
    assert docs.standing(image) == f"{PROVED.replace('proved]', 'stale]')}: {why}"


def test_what_a_proof_does_not_show_is_in_the_table(image: Image) -> None:
    data = reports.of(image, DIFF_IDS)
    data["checks"] = [check for check in data["checks"] if check["name"] != "sleep-2"]
    host.write(
        prove.kept(image),
        json.dumps(data | {"skipped": {"sleep-2": "no room"}, "verdict": "in-part"}),
    )
    assert docs.standing(image) == PROVED.replace("proved]", "in part]") + "; not shown: sleep-2"


def test_a_proof_by_earlier_checks_is_called_that(image: Image) -> None:
    keep(image, program=None)
    assert docs.standing(image) == PROVED.replace("proved]", "by earlier checks]")


def test_a_kept_report_that_nobody_could_have_written_is_one_sentence(image: Image) -> None:
    host.write(prove.kept(image), '{"device": "\\ud800"}')
    with pytest.raises(Problem) as caught:
        docs.standing(image)
    assert caught.value.code == 2
    assert caught.value.sentence == (
        "images/proofs/verl-rollout/vllm-0.12.json holds half a character (a lone surrogate)"
    )


def test_a_row_says_what_the_lock_says(image: Image) -> None:
    assert docs.row(image, VERSIONS | {"torch": "2.9.0+cu128"}) == (
        "| `verl-rollout:vllm-0.12` | verl 0.7.1 | vllm 0.12.0 | 2.9.0 | 12.8 | "
        f"{base.python('3.11')} | {VERSIONS['ray']} | 2025-12-20 | "
        f"{docs.pull(image)} | not shown yet | {PROVED} |"
    )
    without = docs.row(image, {"vllm": "0.12.0", "torch": "2.9.0+cpu"})
    assert "| none (CPU) |" in without and "| none |" in without


def test_to_pull_is_the_sum_of_the_layers_recorded_for_todays_inputs(image: Image) -> None:
    found = layers.read(image)
    assert found is not None
    sized = [replace(layer, compressed=750_000_000) for layer in found.layers]
    layers.write(image, replace(found, layers=tuple(sized)))
    assert docs.pull(image) == "1.50 GB"
    layers.write(image, replace(found, inputs="others"))
    assert docs.pull(image) == "not recorded yet"
    layers.path(image).unlink()
    assert docs.pull(image) == "not recorded yet"


def test_the_table_has_a_row_for_each_image(checkout: Checkout, image: Image) -> None:
    lines = docs.table([image, checkout.image(tag="other")]).splitlines()
    assert len(lines) == 4
    assert "`verl-rollout:other`" in lines[3]
    assert {line.count("|") for line in lines} == {12}


# the README around it


def marked(name: str, text: str) -> str:
    return f"<!-- {name}: generated by 'nox -s docs' -->\n{text}\n<!-- /{name} -->\n"


README = f"before\n{marked('images', 'old')}between\n{marked('faults', 'old')}after\n"


def test_only_what_stands_between_its_markers_is_renewed() -> None:
    found = docs.renewed(README, "images", "new")
    assert found == README.replace(marked("images", "old"), marked("images", "new"))
    assert docs.renewed(found, "images", "new") == found


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
        docs.renewed(text, "images", "new")
    assert caught.value.code == 2
    markers = "<!-- images: generated by 'nox -s docs' --> and <!-- /images -->"
    assert caught.value.sentence == f"README.md has lost its markers; put {markers} back"


def test_the_faults_are_those_that_can_be_injected() -> None:
    lines = docs.fault_table([]).splitlines()[2:]
    assert len(lines) == len(FAULTS)
    for line, (name, fault) in zip(lines, FAULTS.items(), strict=True):
        found = f"`{fault.check}`" + (f" or `{fault.otherwise}`" if fault.otherwise else "")
        assert line == f"| `{name}` | {fault.what} | {found} | CPU (tests) |"


def test_a_fault_found_on_a_gpu_links_to_the_report_of_that_run(image: Image) -> None:
    host.write(prove.kept_fault(image, "lost-buffer"), json.dumps(reports.of(image, DIFF_IDS)))
    lines = docs.fault_table([image]).splitlines()
    link = "[vllm-0.12](images/proofs/verl-rollout/vllm-0.12.faults/lost-buffer.json)"
    assert [line.endswith(f"| CPU (tests), {link} |") for line in lines].count(True) == 1
    assert [link in line for line in lines].count(True) == 1
    aimed = "flipped-byte@cuda-ipc"
    host.write(prove.kept_fault(image, aimed), json.dumps(reports.of(image, DIFF_IDS)))
    link = f"[vllm-0.12 by cuda-ipc](images/proofs/verl-rollout/vllm-0.12.faults/{aimed}.json)"
    (line,) = [line for line in docs.fault_table([image]).splitlines() if link in line]
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
    rows = {what: (value, beside) for what, value, beside in docs.gpu_rows(gpu_report(*CHECKS))}
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


def test_a_second_start_stands_beside_the_first() -> None:
    def started(seconds: float, files: int) -> dict[str, Any]:
        metrics = CHECKS["start"] | {"start_seconds": seconds, "cache_files_added": files}
        start = {"name": "start", "seconds": seconds + 10, "metrics": metrics}
        return {"checks": [start, *gpu_report("refit", "generation", "cycle")["checks"]]}

    first, second = started(50.0, 300) | {"seconds": 100.0}, started(20.0, 2)
    rows = docs.gpu_rows(first, second)
    assert rows[2] == (
        *("start again, with the cache that the first one filled", "20.0 s"),
        "files added to the cache: 2",
    )
    assert rows[3] == ("… and the first answer", "30.0 s", "compiled only once: 30.0 s")
    assert [*rows[:2], *rows[4:]] == docs.gpu_rows(first)


def test_a_second_start_of_other_layers_is_not_shown(image: Image) -> None:
    first = reports.of(image, DIFF_IDS)
    metrics = {"start": {"cache_files_added": 2}}
    second = reports.of(image, DIFF_IDS, ["start"], metrics=metrics, started="2026-01-03T00:00:00Z")
    host.write(prove.beside(image, "warm"), json.dumps(second))
    assert docs.warm_report(image, first) == second
    assert docs.warm_report(image, first | {"layers": ["sha256:b"]}) is None
    prove.beside(image, "warm").unlink()
    assert docs.warm_report(image, first) is None


def test_an_image_without_fp8_has_no_row_of_it() -> None:
    rows = docs.gpu_rows(gpu_report(*[name for name in CHECKS if name != "fp8"]))
    assert not [what for what, _, _ in rows if "fp8" in what]


def test_without_a_proof_on_a_gpu_there_are_no_numbers(image: Image) -> None:
    prove.kept(image).unlink()
    assert docs.gpu_numbers([image]) == "No image is proved on a GPU yet."


@pytest.fixture
def readme(image: Image, monkeypatch: pytest.MonkeyPatch) -> str:
    """A README in need of renewal, and a catalog whose default is the image."""
    monkeypatch.setattr(catalog, "DEFAULT", image.reference)
    monkeypatch.setattr(sizes, "PAGE", docs.README.with_name("SIZES.md"))
    monkeypatch.setattr(docs, "printed", lambda _: "printed last")
    monkeypatch.setattr(docs, "measured", lambda _: "measured last")
    monkeypatch.setattr(docs, "gpu_numbers", lambda _: "gpu last")
    names = ("printed", "images", "features", "faults", "measured", "gpu", "layers")
    text = "".join(marked(name, "old") for name in names)
    docs.README.write_text(text)
    docs.FRAMEWORKS.write_text(marked("frameworks", "old"))
    return text


def test_a_stale_readme_fails_the_check_and_stays(
    readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Problem, match=r"^not fresh .*README.md.* run 'nox -s docs'") as caught:
        docs.main(["--check"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "\n-old\n" in out
    assert "\n+| `verl-rollout:vllm-0.12` |" in out
    assert docs.README.read_text() == readme


@pytest.mark.usefixtures("readme")
def test_a_renewed_readme_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main([]) == 0
    said = capsys.readouterr().out
    assert said == "README.md renewed\nframeworks.md renewed\nSIZES.md renewed\n"
    assert "| verl 0.7.1 | `verl-rollout:vllm-0.12` |" in docs.FRAMEWORKS.read_text()
    assert docs.main(["--check"]) == 0
    assert docs.main([]) == 0
    assert capsys.readouterr().out == ""
    text = docs.README.read_text()
    for part in ("printed last", PROVED, "`flipped-byte`", "measured last", "gpu last"):
        assert part in text

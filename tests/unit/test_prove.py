"""What a proof promises: one report of this run, no better than its weakest part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from images import catalog, host
from images.building import build, builders, layers
from images.building.buildah import Buildah
from images.building.builder import Built, Command
from images.building.contents import Summary
from images.building.docker import Docker
from images.catalog import Image
from images.locking import resolution
from images.proving import adoption, proofs, prove, report_file, standing
from rollout import report
from rollout.faults import FAULTS
from rollout.problem import Problem

from .. import reports
from ..conftest import VERSIONS, Checkout, sha256

LAYERS = tuple(f"sha256:{sha256(name)}" for name in ("base", "top", "ours"))
BUILT = Built("0" * 64, {}, LAYERS, "sha256:manifest")
BUILDAH = "buildah 1.28.2"
NO_FILES = Summary({}, "owner", "mtime", "xattr", "order")
RECORD = layers.Record(
    *("inputs", BUILDAH),
    tuple(layers.Layer(name, d, 2, 1, NO_FILES) for name, d in zip(("base", "top"), LAYERS)),  # noqa: B905
)


def part(verdict: str, *names: str, **changes: Any) -> dict[str, Any]:
    """A report as ``rollout verify`` or ``rollout smoke`` leaves it."""
    status = {"proved": "passed", "in-part": "passed"}.get(verdict, verdict)
    reason = None if status == "passed" else "because"
    skipped = {"nccl": "one GPU"} if verdict == "in-part" else {}
    whole = report.Report(
        image="verl-rollout:vllm-0.12",
        lock_sha256=sha256("lock"),
        layers=list(LAYERS),
        engine=report.Engine("vllm", "0.12.0"),
        torch="2.9.0",
        cuda="12.8",
        driver="550.54.15",
        gpus=[],
        device="a GPU",
        model=None,
        cycles=None,
        framework=None,
        added=[],
        started=reports.STARTED,
        seconds=2.5,
        checks=[report.Check(name, status, 1.0, {}, reason) for name in names],
        skipped=skipped,
        program={name: sha256(name) for name in names},
        verdict=verdict,
    )
    return report.document(whole) | changes


VERDICTS = ("failed", "unproved", "in-part", "proved")  # from weak to strong


@pytest.mark.parametrize("one", VERDICTS)
@pytest.mark.parametrize("two", VERDICTS)
def test_two_reports_are_worth_what_the_weaker_is(one: str, two: str) -> None:
    merged = proofs.merge([part(one, "files"), part(two, "start")])
    assert merged["verdict"] == min(one, two, key=VERDICTS.index)
    assert merged["skipped"] == ({"nccl": "one GPU"} if "in-part" in (one, two) else {})
    assert report_file.validate(merged) == []


def test_two_reports_become_one_with_all_checks_in_order() -> None:
    verify = part("proved", "files", "imports", device=None, started="2026-01-01T00:00:00Z")
    merged = proofs.merge([verify, part("proved", "start", "refit")])
    assert [check["name"] for check in merged["checks"]] == ["files", "imports", "start", "refit"]
    assert merged["started"] == "2026-01-01T00:00:00Z"
    assert merged["seconds"] == 5.0
    assert merged["device"] == "a GPU"
    assert list(merged["program"]) == ["files", "imports", "start", "refit"]
    assert report_file.validate(merged) == []
    assert proofs.merge([verify | {"program": None}, part("proved", "start")])["program"] == {
        "start": sha256("start")
    }


def test_reports_lie_where_the_readme_says(checkout: Checkout) -> None:
    image = checkout.image()
    here = checkout.root
    assert proofs.report_path(image) == here / "build/reports/verl-rollout/vllm-0.12.json"
    assert proofs.kept(image) == here / "images/proofs/verl-rollout/vllm-0.12.json"


# a whole proof, in a container that is none

Outcome = tuple[int, dict[str, Any] | None]  # exit code, report


class Runs:
    """Leaves the reports that it was given where ``--report`` says."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.ran: list[Command] = []

    def writer(self, folder: Path) -> str:  # noqa: ARG002 - the builder's signature
        return "1234:0"

    def run(self, command: Command) -> int:
        self.ran.append(command)
        code, left = self.outcomes[command.argv[1]]
        inside = Path(command.argv[command.argv.index("--report") + 1])
        outside = next(h for h, i in command.volumes.items() if i == str(inside.parent))
        if left is not None:
            Path(outside, inside.name).write_text(json.dumps(left))
        return code


class Fake(Runs, Buildah):
    """The builder whose layers are recorded."""

    def version(self) -> str:
        return BUILDAH


class FakeDocker(Runs, Docker):
    """The other builder."""


def sound(image: Image) -> dict[str, Outcome]:
    """What the commands of a sound image end with."""
    return {
        "verify": (0, reports.verified(image, LAYERS)),
        "smoke": (0, reports.smoked(image, LAYERS)),
    }


CALIBRATION = json.loads(
    (
        Path(__file__).parents[2] / "images/proofs/verl-rollout/transformers-cpu.calibration.json"
    ).read_text(encoding="utf-8")
)


OF_IMAGE = CALIBRATION | {"device": "cuda", "torch": "2.9.0+cu128", "transformers": "4.57.3"}


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image that is built already, from a lock that has not drifted."""
    found = checkout.image(versions={**VERSIONS, "transformers": "4.57.3"})
    text = found.lock.read_text()
    monkeypatch.setattr(resolution, "resolve", lambda _: text)
    monkeypatch.setattr(build, "inputs", lambda _: "inputs")
    monkeypatch.setattr(build, "build", lambda *_: BUILT)
    monkeypatch.setattr(build, "record", lambda *_: RECORD)
    return found


def left(image: Image) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(proofs.report_path(image).read_text())
    assert report_file.validate(data) == []
    return data


def test_a_sound_image_leaves_one_report_of_both_commands(image: Image) -> None:
    tool = Fake(**sound(image))
    assert prove.prove(image, tool, ["--cycles", "5"], keep=False) == 0
    assert left(image)["verdict"] == "proved"
    assert [check["name"] for check in left(image)["checks"]] == list(standing.promised(image))
    verify, smoke = tool.ran
    assert list(verify.argv) == ["rollout", "verify", "--report", "/report/verify.json"]
    assert list(smoke.argv)[1:] == ["smoke", "--report", "/report/smoke.json", "--cycles", "5"]
    assert verify.image == smoke.image == BUILT.id, "another clone may give the name away"
    assert (verify.user, smoke.user) == ("1234:0", "1234:0")
    assert smoke.env == {"ROLLOUT_LAYERS": ",".join(LAYERS)}
    assert not proofs.kept(image).exists()


def test_what_verify_finds_ends_the_proof(image: Image) -> None:
    tool = Fake(verify=(1, part("failed", "files")))
    assert prove.prove(image, tool, [], keep=True) == 1
    assert [command.argv[1] for command in tool.ran] == ["verify"]
    assert left(image)["verdict"] == "failed"
    assert not proofs.kept(image).exists()


@pytest.mark.parametrize(("code", "ends"), [(0, 3), (1, 3), (2, 2), (3, 3), (137, 137)])
def test_a_smoke_that_left_no_report_is_neither_proved_nor_a_check_that_failed(
    image: Image, code: int, ends: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # Never started, no GPU, wrong usage, killed for memory: verify alone proves no image.
    tool = Fake(verify=sound(image)["verify"], smoke=(code, None))
    assert prove.prove(image, tool, [], keep=True) == ends
    assert ": proved;" not in capsys.readouterr().out
    if proofs.report_path(image).exists():
        assert left(image)["verdict"] != "proved"


def test_a_report_of_an_earlier_run_is_not_left_as_this_ones(image: Image) -> None:
    assert prove.prove(image, Fake(**sound(image)), [], keep=False) == 0
    assert prove.prove(image, Fake(verify=(137, None)), [], keep=False) == 137
    assert not proofs.report_path(image).exists() or left(image)["verdict"] != "proved"


@pytest.mark.parametrize("verdict", ["failed", "unproved"])
def test_what_is_not_proved_is_not_kept(image: Image, verdict: str) -> None:
    code = report.exit_code(verdict)
    tool = Fake(verify=sound(image)["verify"], smoke=(code, part(verdict, "start")))
    assert prove.prove(image, tool, [], keep=True) == code
    assert left(image)["verdict"] == verdict
    assert not proofs.kept(image).exists()
    assert layers.read(image) is None


def test_a_proof_is_kept_with_the_layers_it_holds_for(image: Image) -> None:
    assert prove.prove(image, Fake(**sound(image)), [], keep=True) == 0
    assert json.loads(proofs.kept(image).read_text()) == left(image)
    assert layers.read(image) == RECORD


def test_a_record_that_is_current_is_left_as_it_is(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers.write(image, replace(RECORD, builder="buildah 1.39.3"))
    before = layers.path(image).read_bytes()
    monkeypatch.delattr(build, "record")  # every layer would be read once more
    assert prove.prove(image, Fake(**sound(image)), [], keep=True) == 0
    assert layers.path(image).read_bytes() == before
    assert proofs.kept(image).exists()


def test_a_record_of_other_inputs_is_replaced_with_the_proof(image: Image) -> None:
    old = replace(RECORD, inputs="others")
    layers.write(image, old)
    assert prove.prove(image, Fake(**sound(image)), [], keep=False) == 0
    assert layers.read(image) == old
    assert prove.prove(image, Fake(**sound(image)), [], keep=True) == 0
    assert layers.read(image) == RECORD


def test_a_build_that_is_not_the_recorded_one_is_not_kept(image: Image) -> None:
    old = replace(RECORD, layers=(RECORD.layers[0], replace(RECORD.layers[1], diff_id="sha256:x")))
    layers.write(image, old)
    with pytest.raises(Problem, match=r"not kept: .* is a bug \('nox -s reproduce -- verl-"):
        prove.prove(image, Fake(**sound(image)), [], keep=True)
    assert layers.read(image) == old
    assert not proofs.kept(image).exists()


def test_what_the_image_calls_proved_and_the_catalog_does_not_is_not_kept(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image says what it ran, and the host whether that is what was promised."""
    short = reports.of(image, LAYERS, ["start", "refit"])
    tool = Fake(verify=sound(image)["verify"], smoke=(0, short))
    assert prove.prove(image, tool, [], keep=True) == 3
    said = "verl-rollout:vllm-0.12: not proved yet: its report lacks generation, multi-turn, "
    assert said in capsys.readouterr().out
    assert nothing_is_kept(image)


def test_an_image_that_breaks_a_rule_for_layers_is_not_kept(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> layers.Record:
        raise Problem("verl-rollout:vllm-0.12 is not recorded: logs")

    monkeypatch.setattr(build, "record", broken)
    with pytest.raises(Problem, match="is not recorded: logs"):
        prove.prove(image, Fake(**sound(image)), [], keep=True)
    assert nothing_is_kept(image)


def test_what_docker_built_is_proved_and_not_kept(image: Image) -> None:
    assert prove.prove(image, FakeDocker(**sound(image)), [], keep=False) == 0
    with pytest.raises(Problem, match="--keep needs buildah: only its layers are rec") as caught:
        prove.prove(image, FakeDocker(**sound(image)), [], keep=True)
    assert caught.value.code == 2
    assert left(image)["verdict"] == "proved"
    assert nothing_is_kept(image)


@pytest.mark.parametrize(
    ("old", "sentence"),
    [
        (None, "no layers are recorded for this image"),
        (RECORD, "the layers are the recorded ones, byte for byte"),
        (
            replace(RECORD, layers=RECORD.layers[:1]),
            "NOT the recorded layers: the number of layers differs, from the same inputs; "
            "that is a bug",
        ),
    ],
    ids=["none", "same", "a layer more"],
)
def test_a_proof_says_whether_the_layers_are_the_recorded_ones(
    image: Image,
    old: layers.Record | None,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if old:
        layers.write(image, old)
    assert prove.prove(image, Fake(**sound(image)), [], keep=False) == 0
    assert f"verl-rollout:vllm-0.12: {sentence}\n" in capsys.readouterr().out


def test_a_report_that_breaks_its_schema_is_no_report(image: Image) -> None:
    smoke = part("proved", "start", device=7)
    with pytest.raises(Problem, match="the report of rollout smoke is no report: device: 7"):
        prove.prove(image, Fake(verify=sound(image)["verify"], smoke=(0, smoke)), [], keep=True)
    assert not proofs.report_path(image).exists()
    assert not proofs.kept(image).exists()


def test_an_index_that_cannot_answer_is_said_and_the_committed_lock_is_proved(
    image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(_: Image) -> str:
        raise resolution.Unanswered(
            "it cannot be resolved: the package index gives no upload time of x"
        )

    monkeypatch.setattr(resolution, "resolve", resolve)
    assert prove.prove(image, Fake(**sound(image)), [], keep=False) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "not checked: it cannot be resolved: the package index gives no upload time of x; "
        "the committed lock is built as it is"
    )


def test_a_drifted_lock_is_found_before_anything_is_built(
    image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resolution, "resolve", lambda _: "ray==2.53.0\n")
    monkeypatch.delattr(build, "build")
    with pytest.raises(Problem) as caught:
        prove.prove(image, Fake(), [], keep=False)
    assert caught.value.code == 1
    command = "nox -s lock -- verl-rollout:vllm-0.12"
    assert f"has drifted (diff above); remake it with '{command}'" in caught.value.sentence
    assert "\n+ray==2.53.0\n" in capsys.readouterr().out


# reports of runs on another machine


def about(image: Image, verdict: str, *names: str, **changes: Any) -> dict[str, Any]:
    """A report of this very image."""
    return part(verdict, *names, **{"lock_sha256": host.sha256(image.lock), **changes})


def warm(image: Image, **changes: Any) -> dict[str, Any]:
    """The report of a second start."""
    metrics = {"start": {"cache_files_added": 2}}
    found = reports.of(image, LAYERS, ["start"], metrics=metrics, started="2026-01-02T05:00:00Z")
    return found | {"verdict": "unproved"} | changes


def of_fault(image: Image, fault: str, *failed: str, reason: str = "") -> dict[str, Any]:
    """A report of a run with a fault, in which these checks failed; if none is named, its own."""
    said = reason or FAULTS[fault].reason
    names = failed or (FAULTS[fault].check,)
    checks = [report.Check(name, "failed", 1.0, {}, f"here: {said}, as seen") for name in names]
    whole = about(image, "failed", *names)
    whole["checks"] = about(image, "proved", "start")["checks"] + [vars(c) for c in checks]
    assert report_file.validate(whole) == []
    return whole


@pytest.fixture
def folder(image: Image, tmp_path: Path) -> Path:
    """What a sound image leaves on a machine with a GPU: reports, two of faults, a calibration."""
    found = tmp_path / "from-gpu"
    found.mkdir()
    left_behind = {
        "verify": reports.verified(image, LAYERS),
        "smoke": reports.smoked(image, LAYERS),
        "warm": warm(image),
        "fault-flipped-byte": of_fault(image, "flipped-byte"),
        "fault-lost-buffer": of_fault(image, "lost-buffer"),
        "calibration": OF_IMAGE,
    }
    for name, data in left_behind.items():
        (found / f"{name}.json").write_text(json.dumps(data))
    return found


def put(folder: Path, name: str, data: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


def nothing_is_kept(image: Image) -> bool:
    return not proofs.kept(image).parent.exists() and layers.read(image) is None


def test_faults_alone_are_added_to_what_is_kept_and_need_no_build(
    image: Image,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("the layers are recorded"))
    whole, warm_start = proofs.kept(image).read_bytes(), proofs.beside(image, "warm").read_bytes()
    for name in ("verify", "smoke", "warm", "calibration", "fault-lost-buffer"):
        (folder / f"{name}.json").unlink()
    put(folder, "fault-flipped-byte", of_fault(image, "flipped-byte") | {"seconds": 5.0})
    put(folder, "fault-dropped-tensor", of_fault(image, "dropped-tensor"))
    before = json.loads(proofs.kept_fault(image, "flipped-byte").read_text())
    assert adoption.adopt(image, Fake(), folder, keep=False) == 0
    assert json.loads(proofs.kept_fault(image, "flipped-byte").read_text()) == before
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    kept = sorted(path.stem for path in proofs.faults_folder(image).iterdir())
    assert kept == ["dropped-tensor", "flipped-byte", "lost-buffer"]
    assert json.loads(proofs.kept_fault(image, "flipped-byte").read_text())["seconds"] == 5.0
    assert proofs.kept(image).read_bytes() == whole
    assert proofs.beside(image, "warm").read_bytes() == warm_start
    assert "each of 2 faults was found by its own check" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["verify", "smoke"])
def test_half_a_proof_with_faults_is_no_folder_of_faults(
    image: Image, folder: Path, there: str
) -> None:
    other = {"verify": "smoke", "smoke": "verify"}[there]
    (folder / f"{other}.json").unlink()
    with pytest.raises(Problem, match=f"{other}.json"):
        adoption.adopt(image, Fake(), folder, keep=True)
    assert nothing_is_kept(image)


def test_a_fault_alone_that_was_not_found_is_refused(image: Image, folder: Path) -> None:
    for name in ("verify", "smoke"):
        (folder / f"{name}.json").unlink()
    put(folder, "fault-flipped-byte", of_fault(image, "flipped-byte", "generation"))
    with pytest.raises(Problem, match="does not show that flipped-byte is found") as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.code == 1
    assert nothing_is_kept(image)


def test_reports_of_another_machine_become_one_and_are_left(image: Image, folder: Path) -> None:
    assert adoption.adopt(image, Fake(), folder, keep=False) == 0
    assert left(image)["verdict"] == "proved"
    assert [check["name"] for check in left(image)["checks"]] == list(standing.promised(image))
    assert nothing_is_kept(image)


def test_they_are_kept_with_their_layers_faults_and_calibration(image: Image, folder: Path) -> None:
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    assert json.loads(proofs.kept(image).read_text()) == left(image)
    assert layers.read(image) == RECORD
    faults = proofs.kept(image).parent / "vllm-0.12.faults"
    assert sorted(path.name for path in faults.iterdir()) == [
        "flipped-byte.json",
        "lost-buffer.json",
    ]
    kept = json.loads(proofs.kept_fault(image, "lost-buffer").read_text())
    assert kept == of_fault(image, "lost-buffer")
    calibration = proofs.kept(image).parent / "vllm-0.12.calibration.json"
    assert json.loads(calibration.read_text()) == OF_IMAGE
    assert json.loads(proofs.beside(image, "warm").read_text())["verdict"] == "unproved"


def test_a_second_start_that_failed_or_is_of_another_image_keeps_nothing(
    image: Image, folder: Path
) -> None:
    put(folder, "warm", about(image, "failed", "start", started="2026-01-02T05:00:00Z"))
    with pytest.raises(Problem, match="shows no start that passed"):
        adoption.adopt(image, Fake(), folder, keep=True)
    put(folder, "warm", warm(image, lock_sha256="0" * 64))
    with pytest.raises(Problem, match="is of another lock"):
        adoption.adopt(image, Fake(), folder, keep=True)
    assert nothing_is_kept(image)


def test_the_first_start_is_not_taken_for_the_second(image: Image, folder: Path) -> None:
    put(folder, "warm", json.loads((folder / "smoke.json").read_text()))
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.sentence == (
        f"--from: {folder}/warm.json shows no second start: it is of the first start itself"
    )
    assert nothing_is_kept(image)


def test_a_proof_kept_anew_drops_the_second_start_of_the_last_one(
    image: Image, folder: Path
) -> None:
    adoption.adopt(image, Fake(), folder, keep=True)
    (folder / "warm.json").unlink()
    adoption.adopt(image, Fake(), folder, keep=True)
    assert not proofs.beside(image, "warm").exists()


def test_a_proof_kept_anew_drops_the_faults_of_other_layers_and_of_no_others(
    image: Image, folder: Path
) -> None:
    """A fault that was found in these layers is found in them whatever else runs there."""
    adoption.adopt(image, Fake(), folder, keep=True)
    other = of_fault(image, "dropped-tensor")
    other["layers"] = [f"sha256:{'9' * 64}", *other["layers"][1:]]
    proofs.keep_faults(image, {"dropped-tensor": other})
    (folder / "fault-lost-buffer.json").unlink()
    adoption.adopt(image, Fake(), folder, keep=True)
    kept = sorted(path.stem for path in proofs.faults_folder(image).iterdir())
    assert kept == ["flipped-byte", "lost-buffer"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("no JSON", 2, "is not JSON"),
        (b"\xff\xfe", 2, "is not UTF-8"),
        (json.dumps(CALIBRATION), 2, "is of another image: it was measured on cpu"),
        ('{"schema": "rollout-report/1"}', 2, "is no calibration"),
        (json.dumps({"schema": "rollout-calibration/1"}), 2, "is no calibration"),
        (json.dumps(OF_IMAGE | {"noise": {**CALIBRATION["noise"], "max": 1.04}}), 1, "1.0400"),
    ],
    ids=["text", "bytes", "another image's", "a report", "empty", "too noisy"],
)
def test_a_calibration_that_is_none_or_misses_its_margins_keeps_nothing(
    image: Image, folder: Path, text: str | bytes, code: int, said: str
) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "calibration.json").write_bytes(data)
    with pytest.raises(Problem, match=said) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.code == code
    assert nothing_is_kept(image)


def test_reports_of_faults_in_earlier_layers_do_not_stay(image: Image, folder: Path) -> None:
    old = proofs.kept_fault(image, "stale-cache")
    host.write(old, "{}")
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    assert not old.exists()


def test_a_proof_without_faults_or_calibration_is_kept_too(image: Image, folder: Path) -> None:
    for path in [*folder.glob("fault-*"), folder / "calibration.json", folder / "warm.json"]:
        path.unlink()
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    assert [path.name for path in proofs.kept(image).parent.iterdir()] == ["vllm-0.12.json"]


@pytest.mark.parametrize("name", ["verify", "smoke", "fault-flipped-byte"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image", "verl-rollout:sglang-0.5", "is of verl-rollout:sglang-0.5, not of verl-"),
        ("lock_sha256", sha256("other"), "is of another lock"),
        ("layers", [LAYERS[0], LAYERS[2]], "is of other layers"),
        ("layers", [*reversed(LAYERS)], "is of other layers"),
        ("layers", [], "is of other layers"),
        (
            "engine",
            {"name": "vllm", "version": "0.13.0"},
            "has the engine vllm 0.13.0, and the lock vllm 0.12.0",
        ),
        ("torch", "2.8.0", "has torch 2.8.0, and the lock 2.9.0"),
        ("device", 7, "is no report: device: 7 is not"),
        ("schema", "rollout-report/1", "is no report: schema: 'rollout-report/1' is not"),
    ],
    ids=[
        *("other image", "other lock", "fewer layers", "other order", "layers unknown"),
        *("other version", "other torch", "broken schema", "earlier schema"),
    ],
)
def test_a_report_of_anything_else_is_refused(
    image: Image, folder: Path, name: str, key: str, value: object, said: str
) -> None:
    put(folder, name, json.loads((folder / f"{name}.json").read_text()) | {key: value})
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.code == 2
    assert f"--from: {folder}/{name}.json " in caught.value.sentence
    assert said in caught.value.sentence
    assert nothing_is_kept(image)
    assert not proofs.report_path(image).exists()


@pytest.mark.parametrize("name", ["verify", "smoke", "fault-flipped-byte"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON (Expecting value, line 1)"),
        (
            b'{"schema": "rollout-rep',
            "is not JSON (Unterminated string starting at, line 1)",
        ),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[]", "is no report: report: not an object"),
        (b"[" * 900 + b"]" * 900, "is nested too deeply"),
        (b'{"seconds": NaN}', "holds NaN, which is no JSON"),
        (b'{"seconds": 1' + b"0" * 400 + b"}", "holds a number of more than 64 bits"),
    ],
    ids=["empty", "cut short", "no text", "a list", "deep", "NaN", "huge"],
)
def test_a_file_that_is_no_report_is_refused(
    image: Image, folder: Path, name: str, content: bytes, said: str
) -> None:
    (folder / f"{name}.json").write_bytes(content)
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert (caught.value.code, caught.value.sentence) == (2, f"--from: {folder}/{name}.json {said}")
    assert nothing_is_kept(image)


@pytest.mark.parametrize("name", ["verify", "smoke", "warm", "calibration", "fault-flipped-byte"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("link", "is a link; put the file itself there"), ("pipe", "is no plain file")],
)
def test_what_is_no_file_of_the_folder_is_refused_and_not_waited_for(
    image: Image, folder: Path, tmp_path: Path, name: str, kind: str, said: str
) -> None:
    path = folder / f"{name}.json"
    path.rename(tmp_path / "elsewhere.json")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere.json")
    else:
        os.mkfifo(path)
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert (caught.value.code, caught.value.sentence) == (2, f"--from: {path} {said}")
    assert nothing_is_kept(image)
    assert not proofs.report_path(image).exists()


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("verify", "files, distributions, libraries, compilers, imports and 2 more"),
        ("smoke", "start, refit, generation, multi-turn, partial-rollout and 4 more"),
    ],
)
def test_a_report_with_one_check_called_anything_is_refused_with_what_it_lacks(
    image: Image, folder: Path, name: str, lacks: str
) -> None:
    data = json.loads((folder / f"{name}.json").read_text())
    put(folder, name, data | {"checks": [data["checks"][0] | {"name": "anything"}]})
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert (caught.value.code, caught.value.sentence) == (
        2,
        f"--from: {folder} shows no proof of verl-rollout:vllm-0.12: its report lacks {lacks}, "
        "and does not say why",
    )
    assert nothing_is_kept(image)
    assert not proofs.report_path(image).exists()


def test_a_report_of_our_own_package_as_it_was_before_a_sentence_was_reworded_is_taken(
    image: Image, folder: Path
) -> None:
    for name in ("verify", "smoke"):
        data = json.loads((folder / f"{name}.json").read_text())
        put(folder, name, data | {"layers": [*LAYERS[:-1], f"sha256:{sha256('reworded')}"]})
    (folder / "warm.json").unlink()
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    assert proofs.kept(image).exists()


def test_a_report_by_earlier_checks_is_kept_and_not_called_a_proof(
    image: Image, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((folder / "smoke.json").read_text())
    put(folder, "smoke", data | {"program": data["program"] | {"refit": sha256("other")}})
    assert adoption.adopt(image, Fake(), folder, keep=True) == 3
    said = "by earlier checks: by the checks of 2026-01-02; changed since: refit"
    assert f"verl-rollout:vllm-0.12: {said}\n" in capsys.readouterr().out
    assert proofs.kept(image).exists()


@pytest.mark.parametrize("name", ["verify", "smoke"])
def test_verify_and_smoke_are_both_asked_for(image: Image, folder: Path, name: str) -> None:
    (folder / f"{name}.json").unlink()
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    said = f"--from: {folder}/{name}.json cannot be read (No such file or directory)"
    assert (caught.value.code, caught.value.sentence) == (2, said)
    assert nothing_is_kept(image)


def parted(folder: Path, name: str, gpus: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """The smoke test of a folder as two runs left it: all but one check, and that check alone."""
    whole = json.loads((folder / "smoke.json").read_text())
    rest = [check for check in whole["checks"] if check["name"] != name]
    alone = [check for check in whole["checks"] if check["name"] == name]
    first = whole | {"checks": rest, "verdict": "unproved"}
    second = whole | {"checks": alone, "verdict": "unproved", "gpus": whole["gpus"] * gpus}
    put(folder, "smoke", first)
    put(folder, "smoke-alone", second)
    return first, second


def test_a_smoke_test_in_two_parts_is_one_proof(image: Image, folder: Path) -> None:
    whole = json.loads((folder / "smoke.json").read_text())
    parted(folder, "sleep-2")
    assert adoption.adopt(image, Fake(), folder, keep=True) == 0
    kept = json.loads(proofs.kept(image).read_text())
    assert kept["verdict"] == "proved"
    names = [check["name"] for check in kept["checks"]]
    assert names[-len(whole["checks"]) :] == [check["name"] for check in whole["checks"]]


def test_a_part_that_is_missing_leaves_the_whole_unproved(image: Image, folder: Path) -> None:
    parted(folder, "sleep-2")
    (folder / "smoke-alone.json").unlink()
    assert adoption.adopt(image, Fake(), folder, keep=True) == 3
    assert nothing_is_kept(image)


def test_a_check_that_failed_in_one_part_is_not_mended_by_another(
    image: Image, folder: Path
) -> None:
    first, second = parted(folder, "sleep-2")
    failed = second["checks"][0] | {"status": "failed", "reason": "it freed nothing"}
    for checks in ([*first["checks"], failed], [failed, *first["checks"]]):
        put(folder, "smoke", first | {"checks": checks, "verdict": "failed"})
        assert adoption.adopt(image, Fake(), folder, keep=True) == 1
        assert nothing_is_kept(image)


@pytest.mark.parametrize(
    ("name", "other"), [("model", "probe of another seed"), ("driver", "1.2"), ("cycles", 5)]
)
def test_parts_of_different_runs_are_refused(
    image: Image, folder: Path, name: str, other: object
) -> None:
    _, second = parted(folder, "sleep-2")
    put(folder, "smoke-alone", second | {name: other})
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    said = f"--from: {folder}: smoke*.json are no parts of one proof: they differ in {name!r}"
    assert (caught.value.code, caught.value.sentence) == (2, said)
    assert nothing_is_kept(image)


def test_what_one_part_ran_another_did_not_have_to_skip(image: Image, folder: Path) -> None:
    first, second = parted(folder, "sleep-2", gpus=2)
    put(folder, "smoke", first | {"skipped": {"sleep-2": "it needs 2 GPUs; one GPU is visible"}})
    whole = proofs.join([first, second], image)
    assert (whole["skipped"], whole["verdict"]) == ({}, "proved")
    assert whole["gpus"] == second["gpus"]
    both = [first | {"skipped": {"nccl": "no second GPU"}}, second]
    joined = proofs.join(both, image)
    assert (joined["skipped"], joined["verdict"]) == ({"nccl": "no second GPU"}, "in-part")


def test_a_part_that_was_asked_for_by_name_knows_a_program_more(image: Image, folder: Path) -> None:
    """ROLL trains from a checkout: its run knows the program of `training`, and no other does."""
    first, second = parted(folder, "sleep-2")
    second["program"] = second["program"] | {"training": sha256("training")}
    joined = proofs.join([first, second], image)
    assert joined["program"] == first["program"] | {"training": sha256("training")}
    changed = second | {"program": second["program"] | {"start": sha256("another")}}
    for told in (changed, second | {"program": None}):
        with pytest.raises(ValueError, match="they differ in 'program'"):
            proofs.join([first, told], image)


VERL = {"name": "verl", "version": "0.9.1", "path": "/opt/verl"}


@pytest.mark.parametrize("told", [(VERL, None), (None, VERL)])
def test_a_part_in_which_no_framework_trained_need_not_name_it(
    image: Image, folder: Path, told: tuple[dict[str, str] | None, ...]
) -> None:
    """Of a proof on two GPUs, `training` may have had one of its own meanwhile."""
    parts = parted(folder, "sleep-2", gpus=2)
    joined = proofs.join([p | {"framework": f} for p, f in zip(parts, told, strict=True)], image)
    assert joined["framework"] == VERL
    others = [p | {"framework": VERL | {"version": v}} for p, v in zip(parts, "12", strict=True)]
    with pytest.raises(ValueError, match="they differ in 'framework'"):
        proofs.join(others, image)


def test_one_report_twice_is_not_taken_for_both(image: Image, folder: Path) -> None:
    put(folder, "smoke", json.loads((folder / "verify.json").read_text()))
    with pytest.raises(Problem, match="checks: files is there 2 times"):
        adoption.adopt(image, Fake(), folder, keep=True)
    assert nothing_is_kept(image)


def test_a_fault_that_nobody_knows_is_refused_with_the_nearest(image: Image, folder: Path) -> None:
    put(folder, "fault-flipped-bite", of_fault(image, "flipped-byte"))
    with pytest.raises(Problem, match="did you mean 'flipped-byte'") as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.code == 2
    assert nothing_is_kept(image)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_by_its_check_and_reason(image: Image, fault: str) -> None:
    own = ("lora", "long", "pressure", "moe", "server", "disaggregated", "training")
    asked = dict.fromkeys(own, True)
    smoke = structs.replace(image.smoke, sleep_levels=(1, 2), fp8_kv="kept", **asked)
    everything = structs.replace(image, smoke=smoke)
    assert adoption.found_by(of_fault(image, fault), fault, everything) == ""


def test_an_image_without_a_check_finds_its_fault_by_another(image: Image) -> None:
    fault, deep = (
        "sleep-frees-nothing",
        structs.replace(image, smoke=structs.replace(image.smoke, sleep_levels=(2,))),
    )
    assert adoption.found_by(of_fault(image, fault, "sleep-2"), fault, deep) == ""
    assert (
        adoption.found_by(of_fault(image, fault, "sleep-1"), fault, deep) == "failed were sleep-1"
    )


OTHER = "CUDA error: out of memory"


@pytest.mark.parametrize(
    ("failed", "reason", "said"),
    [
        (["generation"], "", "failed were generation"),
        (["refit", "generation"], "", "failed were refit, generation"),
        ([], OTHER, f"refit failed because here: {OTHER}, as seen"),
    ],
    ids=["another check", "another too", "another reason"],
)
def test_a_fault_that_its_check_did_not_find_is_refused(
    image: Image, folder: Path, failed: list[str], reason: str, said: str
) -> None:
    put(folder, "fault-flipped-byte", of_fault(image, "flipped-byte", *failed, reason=reason))
    with pytest.raises(Problem) as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    wrong = f"{folder}/fault-flipped-byte.json does not show that flipped-byte is found: {said}"
    assert (caught.value.code, caught.value.sentence) == (1, f"--from: {wrong}")
    assert nothing_is_kept(image)
    assert not proofs.report_path(image).exists()


@pytest.mark.parametrize("verdict", ["proved", "unproved"])
def test_a_fault_that_no_check_found_is_refused(image: Image, folder: Path, verdict: str) -> None:
    put(folder, "fault-flipped-byte", about(image, verdict, "start", "refit"))
    with pytest.raises(Problem, match="flipped-byte is found: failed were no checks") as caught:
        adoption.adopt(image, Fake(), folder, keep=True)
    assert caught.value.code == 1
    assert nothing_is_kept(image)


@pytest.mark.parametrize("name", ["verify", "smoke"])
@pytest.mark.parametrize("verdict", ["failed", "unproved"])
def test_what_another_machine_did_not_prove_is_left_and_not_kept(
    image: Image, folder: Path, name: str, verdict: str
) -> None:
    put(folder, name, about(image, verdict, f"{name} of it"))
    assert adoption.adopt(image, Fake(), folder, keep=True) == report.exit_code(verdict)
    assert left(image)["verdict"] == verdict
    assert nothing_is_kept(image)


# the session's arguments

Call = tuple[str, list[str], bool]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], list[Call]]:
    """Makes proofs end with the given exit codes; the list fills with what they were asked for."""

    def codes(values: Sequence[int]) -> list[Call]:
        made: list[Call] = []
        rest = list(values)

        def proved(image: Image, _: object, options: list[str], *, keep: bool) -> int:
            made.append((image.tag, options, keep))
            return rest.pop(0)

        monkeypatch.setattr(builders, "detect", lambda: None)
        monkeypatch.setattr(prove, "prove", proved)
        return made

    return codes


def test_options_behind_the_reference_go_to_smoke(
    checkout: Checkout, calls: Callable[[Sequence[int]], list[Call]]
) -> None:
    checkout.image()
    made = calls([0, 0])
    assert prove.main(["vllm-0.12", "--inject", "flipped-byte"]) == 0
    assert prove.main(["vllm-0.12", "--keep"]) == 0
    assert made == [("vllm-0.12", ["--inject", "flipped-byte"], False), ("vllm-0.12", [], True)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--inject", "flipped-byte", "--keep"], "--keep takes no other option"),
        (["--report", "x.json"], "--report is set by prove"),
        (["--only", "generatoin"], "did you mean 'generation'?"),
        (["--inject", "flipped-bite"], "did you mean 'flipped-byte'?"),
        (["--inject", "deaf-server"], "is found by server, which this image has not"),
        (["--model", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_built(
    checkout: Checkout,
    calls: Callable[[Sequence[int]], list[Call]],
    options: list[str],
    sentence: str,
) -> None:
    checkout.image()
    made = calls([0])
    with pytest.raises(Problem) as caught:
        prove.main(["vllm-0.12", *options])
    assert (made, caught.value.code) == ([], 2)
    assert sentence in caught.value.sentence


def test_a_model_of_the_host_is_mounted(image: Image, tmp_path: Path) -> None:
    options, volumes = prove.smoke_options(["--model", str(tmp_path)], image)
    assert options[-2:] == ["--model", "/model"]
    assert volumes == {str(tmp_path): "/model:ro"}


def test_what_is_asked_for_is_judged_apart_from_what_this_machine_has(checkout: Checkout) -> None:
    table = '{ sleep-levels = [1], refit = ["disk"], server = true, tensor-parallel = 2 }'
    changes = {"smoke": table, "backend": '"sglang"', "requirements": '["sglang"]'}
    image = catalog.parse(checkout.file(changes))
    asked = ["--only", "server,tensor-parallel"]
    assert prove.smoke_options(asked, image) == (asked, {})
    plain = catalog.parse(checkout.file())
    for name in ("server", "tensor-parallel"):
        with pytest.raises(Problem, match=f"no check '{name}' in this image") as caught:
            prove.smoke_options(["--only", name], plain)
        assert caught.value.code == 2


def test_one_image_that_fails_fails_the_session_and_the_others_run(
    checkout: Checkout, calls: Callable[[Sequence[int]], list[Call]]
) -> None:
    for tag in ("a", "b", "c"):
        checkout.image(tag=tag)
    made = calls([0, 3, 0])
    assert prove.main(["a", "b", "c"]) == 3
    assert [tag for tag, _, _ in made] == ["a", "b", "c"]


def test_the_default_is_what_any_machine_can_prove(
    calls: Callable[[Sequence[int]], list[Call]],
) -> None:
    made = calls([0])
    assert prove.main([]) == 0
    assert [tag for tag, _, _ in made] == ["transformers-cpu"]


@pytest.mark.parametrize("keep", [[], ["--keep"]], ids=["left", "kept"])
def test_from_takes_the_reports_of_a_folder_and_runs_nothing(
    image: Image, folder: Path, monkeypatch: pytest.MonkeyPatch, keep: list[str]
) -> None:
    tool = Fake()
    monkeypatch.setattr(builders, "detect", lambda: tool)
    assert prove.main(["vllm-0.12", "--from", str(folder), *keep]) == 0
    assert left(image)["verdict"] == "proved"
    assert proofs.kept(image).exists() == bool(keep)
    assert tool.ran == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "--from"],
        ["a", "--keep", "--from"],
        ["a", "b", "--from", "{folder}"],
        ["a", "--from", "{folder}", "--cycles", "5"],
        ["a", "--inject", "flipped-byte", "--from", "{folder}"],
        ["a", "--from", "{folder}", "{folder}"],
        ["a", "--inject", "--from"],
    ],
    ids=[
        *("no folder", "nor with keep", "two images", "cycles", "a fault", "two folders"),
        "two options",
    ],
)
def test_from_takes_one_image_one_folder_and_nothing_else(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    for tag in ("a", "b"):
        checkout.image(tag=tag)
    monkeypatch.delattr(builders, "detect")  # nothing is built
    with pytest.raises(Problem, match="--from FOLDER takes one REF before it") as caught:
        prove.main([argument.format(folder=tmp_path) for argument in arguments])
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["vllm-0.12", "--help"]])
@pytest.mark.usefixtures("image")
def test_help_names_the_options_of_the_session_and_of_the_smoke(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        prove.main(arguments)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in ("--keep", "--from FOLDER", "--only", "--inject"):
        assert option in said

"""Many smoke tests in a row: one report, in which no failure is hidden and no silence is clean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.building import build, builders, layers
from images.building.buildah import Buildah
from images.building.builder import Built, Command
from images.building.contents import Summary
from images.building.docker import Docker
from images.catalog import Image
from images.locking import resolution
from images.proving import adoption, proofs, prove, repeated, runs, standing
from images.proving.repeated import Run
from images.telling import overview, pages, repeats
from rollout import smoke
from rollout.oracle import BOUND_BF16
from rollout.problem import Problem

from .. import reports
from ..conftest import Checkout, sha256

LAYERS = tuple(f"sha256:{sha256(name)}" for name in ("base", "top", "ours"))
BUILT = Built("0" * 64, {}, LAYERS, "sha256:manifest")
NOTHING = Summary({}, "owner", "mtime", "xattr", "order")
BELOW = tuple(layers.Layer(d[7:], d, 2, 1, NOTHING) for d in LAYERS[:-1])


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image that is built and recorded already, from a lock that has not drifted."""
    found = checkout.image()
    text = found.lock.read_text()
    monkeypatch.setattr(resolution, "resolve", lambda _: text)
    monkeypatch.setattr(build, "build", lambda *_: BUILT)
    monkeypatch.setattr(build, "base_name", lambda _: "base:1")
    layers.write(found, layers.Record(build.inputs(found), "buildah 1.28.2", BELOW))
    return found


Report = dict[str, Any]
# What a run does: its exit code, its report, and what it prints.
Ends = tuple[int, Report | None, str] | BaseException


class Fake(Buildah):
    """Ends each smoke test as it was told; ``verify`` passes."""

    def __init__(self, *ends: Ends, verified: int = 0) -> None:
        self.ends, self.verified = list(ends), verified
        self.ran: list[Command] = []
        self.seen: Callable[[], None] = lambda: None

    def version(self) -> str:
        return "buildah 1.28.2"

    def writer(self, folder: Path) -> str:  # noqa: ARG002 - the builder's signature
        return "1234:0"

    def run(self, command: Command) -> int:
        self.ran.append(command)
        if command.argv[1] == "verify":
            return self.verified
        self.seen()
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        code, data, said = end
        (folder,) = command.volumes
        Path(folder, "log").write_text(said)
        if data is not None:
            Path(folder, "smoke.json").write_text(json.dumps(data))
        return code


DIVERGENCE = "the output is not that of these weights"


def clean(image: Image, divergence: float = 1.01, **changes: Any) -> Report:
    """The report of a run in which all passed."""
    metrics = {"refit": {"divergence": divergence, "control_divergence": 9.0, "tensors": 35}}
    return reports.smoked(image, LAYERS, metrics=metrics) | changes


def failed(image: Image, name: str = "generation", reason: str = DIVERGENCE) -> Report:
    """The report of a run in which one check failed, and those after it were not run."""
    data = clean(image)
    names = [check["name"] for check in data["checks"]]
    for check in data["checks"][names.index(name) :]:
        why = reason if check["name"] == name else f"not run: {name} failed before it"
        status = "failed" if check["name"] == name else "unproved"
        metrics = {"divergence": 1.2} if check["name"] == name else {}
        check |= {"status": status, "reason": why, "metrics": metrics}
    return data | {"verdict": "failed"}


def good(image: Image, **changes: Any) -> Ends:
    return 0, clean(image, **changes), ""


def left(image: Image) -> Report:
    data: Report = json.loads(repeated.left(image).read_text())
    assert repeated.contradiction(data) == ""
    return data


def outcomes(data: Report) -> dict[str, int]:
    return {word: count for word, count in data["outcomes"].items() if count}


# runs on this machine


def test_the_whole_smoke_test_runs_so_often_each_in_a_container_of_its_own(image: Image) -> None:
    tool = Fake(good(image), good(image), good(image))
    assert prove.repeat(image, tool, 3, keep=False) == 0
    assert tool.ran[0].argv[1] == "verify"
    smoked = tool.ran[1:]
    assert len({str(command.volumes) for command in smoked}) == 3
    for command in smoked:
        assert list(command.argv)[-4:] == ["rollout", "smoke", "--report", "/report/smoke.json"]
        assert (command.image, command.user) == (BUILT.id, "1234:0")
        assert command.env == {"ROLLOUT_LAYERS": ",".join(LAYERS)}
    data = left(image)
    assert (data["times"], data["finished"], outcomes(data)) == (3, True, {"clean": 3})
    assert (data["image"], data["layers"]) == (image.reference, list(LAYERS))
    assert (data["device"], data["driver"]) == ("a GPU", "550.54.15")
    names = smoke.promised(image.smoke.facts)
    assert [check["name"] for check in data["checks"]] == names
    assert list(data["program"]) == names
    assert [run["checks"] for run in data["runs"]] == [dict.fromkeys(names, "passed")] * 3
    assert [(run["run"], run["exit"], run["seconds"]) for run in data["runs"]] == [
        *((1, 0, 200.0), (2, 0, 200.0), (3, 0, 200.0))
    ]
    assert data["failures"] == []
    assert not repeated.path(image).exists()


def test_it_goes_on_after_a_failure_which_is_told_in_full(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "first line\n" + "x" * 5000
    tool = Fake(good(image), (1, failed(image, reason=reason), "all of it"), good(image))
    assert prove.repeat(image, tool, 3, keep=False) == 1
    data = left(image)
    assert outcomes(data) == {"clean": 2, "failed": 1}
    (failure,) = data["failures"]
    assert (failure["run"], failure["check"], failure["reason"]) == (2, "generation", reason)
    assert failure["metrics"] == {"divergence": 1.2}
    assert data["runs"][1]["checks"]["generation"] == "failed"
    assert data["runs"][1]["checks"]["cycle"] == "unproved"
    statuses = {check["name"]: check["statuses"] for check in data["checks"]}
    assert statuses["refit"] == {"passed": 3}
    assert statuses["generation"] == {"passed": 2, "failed": 1}
    said = capsys.readouterr().out
    assert "run 2 of 3: failed in 200.0 s\n    generation: first line\n" in said
    assert "2 of 3 runs clean, 1 failed; report in build/reports/" in said
    folder = repeated.outputs(image)
    assert sorted(path.name for path in folder.iterdir()) == ["002.json", "002.log"]
    assert (folder / "002.log").read_text() == "all of it"


def part(image: Image, left_out: str) -> Report:
    """A report that calls itself proved, though a promised check is not in it."""
    data = clean(image)
    return data | {"checks": [one for one in data["checks"] if one["name"] != left_out]}


@pytest.mark.parametrize(
    ("end", "word", "code", "why"),
    [
        (
            lambda _: (3, None, "rollout: no GPU"),
            "unproved",
            3,
            "ended with 3, and it left no report.* no GPU",
        ),
        (lambda i: (3, failed(i) | {"verdict": "x"}, ""), "broken", 3, "its report is no report"),
        (lambda _: (137, None, ""), "broken", 3, "it ended with 137, and it left no report$"),
        (lambda _: (0, None, ""), "broken", 3, "it ended with 0, and it left no report$"),
        (lambda i: (0, part(i, "cycle"), ""), "unproved", 3, "does not say why"),
        (lambda i: (137, clean(i), ""), "broken", 3, "every check passed, and it ended with 137"),
        (lambda _: Problem("no container", 1), "broken", 3, "no container"),
        (lambda i: (0, failed(i), ""), "failed", 1, DIVERGENCE),
    ],
    ids=["no GPU", "no report", "killed", "silent", "a part", "late", "no container", "a lie"],
)
def test_nothing_but_a_whole_proof_is_clean(
    image: Image, end: Callable[[Image], Ends], word: str, code: int, why: str
) -> None:
    assert prove.repeat(image, Fake(good(image), end(image), good(image)), 3, keep=False) == code
    data = left(image)
    assert outcomes(data) == {"clean": 2, word: 1}
    assert data["runs"][1]["outcome"] == word
    (failure,) = data["failures"]
    assert (failure["run"], failure["outcome"]) == (2, word)
    assert re.search(why, failure["reason"])


def test_what_a_machine_cannot_show_is_skipped_and_not_an_alarm(image: Image) -> None:
    data = part(image, "cycle") | {"skipped": {"cycle": "no room"}, "verdict": "in-part"}
    assert prove.repeat(image, Fake((0, data, "")), 1, keep=False) == 0
    assert left(image)["skipped"] == {"cycle": "no room"}


def test_a_run_that_is_cut_off_leaves_what_there_was_and_says_so(image: Image) -> None:
    prove.repeat(image, Fake(good(image)), 1, keep=False)
    with pytest.raises(SystemExit):
        prove.repeat(image, Fake(SystemExit(143)), 3, keep=True)
    data = left(image)
    assert (data["finished"], data["runs"], data["times"]) == (False, [], 3)
    tool = Fake(good(image), good(image), SystemExit(143))
    with pytest.raises(SystemExit):
        prove.repeat(image, tool, 3, keep=True)
    data = left(image)
    assert (data["finished"], len(data["runs"])) == (False, 2)
    assert repeated.told(data) == "2 of 3 runs clean, 1 not run: it was cut off"
    assert repeated.exit_code(data) == 3, "two clean runs are not three"
    assert not repeated.path(image).exists()


def test_the_report_is_there_after_each_run(image: Image) -> None:
    found = []
    tool = Fake(good(image), good(image))
    tool.seen = lambda: found.append(len(left(image)["runs"]))
    prove.repeat(image, tool, 2, keep=False)
    assert [*found, len(left(image)["runs"])] == [0, 1, 2]


def test_an_image_whose_files_are_wrong_is_not_run_at_all(image: Image) -> None:
    tool = Fake(verified=1)
    assert prove.repeat(image, tool, 3, keep=True) == 1
    assert len(tool.ran) == 1
    assert not repeated.path(image).exists()


# keeping


def test_what_failed_is_kept_as_what_was_clean_is(image: Image) -> None:
    assert prove.repeat(image, Fake(good(image), (1, failed(image), "")), 2, keep=True) == 1
    kept = repeated.read(image)
    assert kept == left(image)
    assert repeated.path(image).name == "vllm-0.12.repeated.json"
    assert prove.repeat(image, Fake(good(image)), 1, keep=True) == 0
    kept = repeated.read(image)
    assert kept is not None
    assert outcomes(kept) == {"clean": 1}


def test_runs_of_which_none_left_a_report_are_not_kept(image: Image) -> None:
    with pytest.raises(Problem, match="not kept: no run left a report") as caught:
        prove.repeat(image, Fake((3, None, "no GPU"), (3, None, "no GPU")), 2, keep=True)
    assert caught.value.code == 3
    assert not repeated.path(image).exists()


def test_what_docker_built_is_refused_before_an_hour_of_runs(image: Image) -> None:
    with pytest.raises(Problem, match="--keep needs buildah"):
        prove.repeat(image, Docker(), 3, keep=True)
    assert not repeated.left(image).exists()


@pytest.mark.parametrize(
    ("change", "worth"),
    [
        ({}, ""),
        ({"lock_sha256": "0" * 64}, "stale"),
        ({"layers": [LAYERS[0], LAYERS[0], LAYERS[2]]}, "stale"),
        ({"layers": [*LAYERS[:2], LAYERS[0]]}, ""),
        ({"image": "verl-rollout:other"}, "stale"),
        ({"program": {}}, "by earlier checks"),
    ],
    ids=["today", "lock", "layers", "our package", "image", "program"],
)
def test_of_other_layers_or_checks_it_is_called_that(
    image: Image, change: Report, worth: str
) -> None:
    prove.repeat(image, Fake(good(image)), 1, keep=True)
    data = left(image) | change
    assert repeated.worth(data, proofs.today(image)) == worth
    host.write_json(repeated.path(image), data)
    link = "[1 of 1 runs clean](images/proofs/verl-rollout/vllm-0.12.repeated.json)"
    assert repeats.cell(image) == link + (f" ({worth})" if worth else "")


def _drop_failure(data: Report) -> None:
    data["failures"] = []


def _call_clean(data: Report) -> None:
    data["runs"][1]["outcome"] = "clean"


def _count(data: Report) -> None:
    data["outcomes"] = {"clean": 2, "failed": 0, "unproved": 0, "broken": 0}


def _hide(data: Report) -> None:
    del data["runs"][1]


def _pass(data: Report) -> None:
    data["runs"][1]["checks"]["generation"] = "passed"


def _schema(data: Report) -> None:
    data["schema"] = "rollout-report/2"


@pytest.mark.parametrize("edit", [_drop_failure, _call_clean, _count, _hide, _pass, _schema])
def test_a_report_that_an_editor_made_better_is_none(
    image: Image, edit: Callable[[Report], None]
) -> None:
    prove.repeat(image, Fake(good(image), (1, failed(image), "")), 2, keep=True)
    data = left(image)
    edit(data)
    host.write_json(repeated.path(image), data)
    with pytest.raises(Problem, match=r"repeated\.json .*; remake it with 'nox -s prove"):
        repeated.read(image)
    host.write(repeated.path(image), "[]")
    with pytest.raises(Problem, match="is no report of repeated runs"):
        repeated.read(image)


# what the report sums up


def test_a_number_has_its_least_median_and_most_and_stands_beside_its_limit(image: Image) -> None:
    ends = [good(image, divergence=value) for value in (1.0043, 1.0215, 1.01)]
    prove.repeat(image, Fake(*ends), 3, keep=False)
    refit = next(check for check in left(image)["checks"] if check["name"] == "refit")
    found = refit["metrics"]["divergence"]
    assert (found["min"], found["median"], found["max"]) == (1.0043, 1.01, 1.0215)
    assert found["at_most"] == BOUND_BF16
    assert found["room_used"] == pytest.approx(0.5)
    control = refit["metrics"]["control_divergence"]
    assert control["at_least"] == BOUND_BF16
    assert refit["metrics"]["tensors"] == {"min": 35, "median": 35, "max": 35}
    assert refit["seconds"] == {"min": 10.0, "median": 10.0, "max": 10.0}


def test_a_number_without_end_is_in_the_report_and_that_is_json(image: Image) -> None:
    data = failed(image)
    data["checks"][2]["metrics"] = {"divergence": "inf"}
    prove.repeat(image, Fake((1, data, "")), 1, keep=False)
    (check,) = [one for one in left(image)["checks"] if one["name"] == "generation"]
    assert check["metrics"]["divergence"]["max"] == "inf"
    assert check["metrics"]["divergence"]["room_used"] == "inf"
    assert "Infinity" not in repeated.left(image).read_text()


def at(second: int, seconds: float) -> Run:
    return Run(1, 0, f"2026-01-02T03:04:{second:02}Z", seconds)


@pytest.mark.parametrize(
    ("ran", "most"),
    [
        ([], 0),
        ([at(0, 10.0), at(10, 10.0), at(20, 10.0)], 1),
        ([at(0, 10.9), at(10, 10.0)], 1),
        ([at(0, 10.0), at(0, 10.0), at(5, 10.0)], 3),
        ([at(0, 10.0), at(5, 10.0), at(12, 10.0)], 2),
        ([Run(1, None, None, 0.0), at(0, 1.0)], 1),
    ],
)
def test_runs_beside_each_other_are_told_from_runs_in_a_row(ran: Sequence[Run], most: int) -> None:
    assert repeated.at_once(ran) == most


# the session's arguments


@pytest.mark.parametrize(
    "given", [["--times"], ["--times", "0"], ["--times", "x"], ["--times=1e3"]]
)
@pytest.mark.usefixtures("image")
def test_a_number_of_runs_that_is_none_is_refused(given: list[str]) -> None:
    with pytest.raises(Problem, match="--times takes a number of runs from 1 to 999") as caught:
        prove.main(["vllm-0.12", *given])
    assert caught.value.code == 2


@pytest.mark.usefixtures("image")
def test_the_whole_smoke_test_is_repeated_and_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(builders, "detect")
    with pytest.raises(Problem, match="--times takes no other option") as caught:
        prove.main(["vllm-0.12", "--times", "5", "--only", "refit"])
    assert caught.value.code == 2


@pytest.mark.parametrize("given", [["--times", "2"], ["--times=2"]])
def test_the_session_repeats(
    image: Image, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    tool = Fake(good(image), good(image))
    monkeypatch.setattr(builders, "detect", lambda: tool)
    assert prove.main(["vllm-0.12", *given, "--keep"]) == 0
    assert repeated.read(image) == left(image)


# runs on another machine


@pytest.fixture
def folder(image: Image, tmp_path: Path) -> Path:
    """Three runs as a lease leaves them."""
    found = tmp_path / "from-gpu"
    found.mkdir()
    for number in (1, 2, 3):
        started = f"2026-01-02T03:0{4 * number - 4}:05Z"
        put(found, number, clean(image) | {"started": started, "seconds": 200.0 + number})
    return found


def put(folder: Path, number: int, data: Report | None, code: int = 0) -> None:
    """What a run of a lease leaves."""
    name = folder / f"repeat-{number:03}"
    if data is not None:
        name.with_suffix(".json").write_text(json.dumps(data))
    end = {"exit": code, "started": "2026-01-02T03:00:00Z", "seconds": 7.0}
    name.with_suffix(".end").write_text(json.dumps(end))


def taken(image: Image, folder: Path, times: int = 0, *, keep: bool = True) -> int:
    return adoption.adopt(image, Fake(), folder, keep=keep, times=times)


def test_runs_of_another_machine_become_one_report(image: Image, folder: Path) -> None:
    assert taken(image, folder, 3, keep=False) == 0
    assert repeated.read(image) is None
    assert taken(image, folder) == 0
    data = repeated.read(image)
    assert data is not None
    assert (data["times"], data["finished"], outcomes(data)) == (3, True, {"clean": 3})
    assert data["seconds"] == {"min": 201.0, "median": 202.0, "max": 203.0}
    assert data["at_once"] == 1
    assert not proofs.kept(image).exists()


def test_they_are_taken_beside_a_proof_too(
    image: Image, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "keep", lambda *_: None)
    (folder / "verify.json").write_text(json.dumps(reports.verified(image, LAYERS)))
    (folder / "smoke.json").write_text(json.dumps(reports.smoked(image, LAYERS)))
    assert taken(image, folder, 3) == 0
    assert proofs.kept(image).exists() and repeated.path(image).exists()
    assert proofs.standing_of(image).word == standing.PROVED
    put(folder, 2, failed(image), 1)
    assert taken(image, folder, 3) == 1


def test_a_run_that_left_no_report_is_counted(image: Image, folder: Path) -> None:
    (folder / "repeat-002.json").unlink()
    put(folder, 2, None, 3)
    (folder / "repeat-002.log").write_text("rollout: too little memory\n")
    assert taken(image, folder) == 3
    data = left(image)
    assert outcomes(data) == {"clean": 2, "unproved": 1}
    assert data["runs"][1]["seconds"] == 7.0
    assert data["failures"][0]["reason"].endswith("having said: rollout: too little memory")


def test_a_gap_between_two_runs_is_a_run_that_nobody_saw_end(image: Image, folder: Path) -> None:
    for file in folder.glob("repeat-002.*"):
        file.unlink()
    assert taken(image, folder) == 3
    data = left(image)
    assert outcomes(data) == {"clean": 2, "broken": 1}
    assert data["failures"][0]["reason"] == "nobody saw it end, and it left no report"


def test_runs_that_never_began_leave_the_report_unfinished(image: Image, folder: Path) -> None:
    assert taken(image, folder, 5) == 3
    data = left(image)
    assert (data["finished"], outcomes(data)) == (False, {"clean": 3})
    assert repeats.cell(image).startswith("[3 of 5 runs clean, 2 not run: it was cut off](")
    with pytest.raises(Problem, match="holds run 3, and --times says 2"):
        taken(image, folder, 2)


def test_a_run_without_its_end_is_judged_by_its_report(image: Image, folder: Path) -> None:
    for file in folder.glob("*.end"):
        file.unlink()
    assert taken(image, folder) == 0
    assert [run["exit"] for run in left(image)["runs"]] == [None] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "verl-rollout:other"}, "is of verl-rollout:other"),
        ({"lock_sha256": "0" * 64}, "is of another lock"),
        ({"layers": [LAYERS[1], *LAYERS[1:]]}, "is of other layers"),
        ({"model": "/model"}, "is of the model /model"),
        ({"driver": "600.1"}, "not of one kind: 'driver' differs"),
        ({"gpus": []}, "not of one kind: 'gpus' differs"),
        ({"program": {}}, "not of one kind: 'program' differs"),
        ({"device": 7}, "is no report"),
    ],
)
def test_runs_of_another_image_or_machine_are_refused(
    image: Image, folder: Path, change: Report, said: str
) -> None:
    put(folder, 2, clean(image) | change)
    with pytest.raises(Problem, match=said) as caught:
        taken(image, folder)
    assert caught.value.code == 2
    assert not repeated.path(image).exists()


@pytest.mark.parametrize("name", ["repeat-4.json", "repeat-000.json", "repeat-0004.end"])
def test_a_run_that_would_be_overlooked_by_its_name_is_refused(
    image: Image, folder: Path, name: str
) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(Problem, match=f"{name} is no run; they are called repeat-001.json"):
        taken(image, folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "NaN", '{"exit": "x", "started": 1, "seconds": 1}'),
        '{"exit": 0, "started": "2026-01-02T03:04:05", "seconds": 1}',
    ],
)
def test_an_end_that_is_none_is_refused(image: Image, folder: Path, text: str) -> None:
    (folder / "repeat-002.end").write_text(text)
    with pytest.raises(Problem, match=r"repeat-002\.end ") as caught:
        taken(image, folder)
    assert caught.value.code == 2


def test_a_link_in_the_folder_gives_nothing_of_this_machine_away(
    image: Image, folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (folder / "repeat-002.json").unlink()
    (folder / "repeat-002.log").symlink_to(secret)
    assert taken(image, folder) == 3
    assert "of this machine" not in repeated.left(image).read_text()


def test_a_number_of_runs_without_a_run_is_refused(image: Image, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="holds no repeat-001"):
        taken(image, tmp_path, 5)


def test_names_of_runs_are_those_that_are_looked_for() -> None:
    assert runs.name(7) == "repeat-007"
    assert len(runs.name(runs.MOST)) == len(runs.name(1))


# pages


def test_an_image_without_such_a_report_has_no_part_of_it(image: Image) -> None:
    assert repeats.section(image) == []
    assert repeats.cell(image) == "not shown yet"
    text = overview.page([image], [])
    assert "None are kept. `nox -s prove -- REF --times 50 --keep` runs and keeps them." in text


def test_the_page_shows_each_check_beside_its_limit_and_every_failure(image: Image) -> None:
    ends = [good(image, divergence=1.0215), (1, failed(image, reason="a|b\nc"), "")]
    prove.repeat(image, Fake(*ends), 2, keep=True)
    text = pages.page(image)
    link = "[1 of 2 runs clean, 1 failed](images/proofs/verl-rollout/vllm-0.12.repeated.json)"
    assert f"| smoke tests in a row | {link} |" in text
    assert f"## Smoke tests in a row\n\n{link}, on a GPU, 2026-01-02" in text
    row = "| `refit` | 2 | 10.0 · 10.0 · 10.0 | `divergence` | 1.01 to 1.0215 ≤ 1.043: 50% |"
    assert row in text
    assert "| `generation` | 1, 1 failed |" in text
    assert "| `divergence` | 1.2 ≤ 1.043: 465% |" in text
    assert "| 2 | failed | `generation` | a\\|b c |" in text
    everything = overview.page([image], [])
    assert (
        f"| vllm-0.12 | {link} | a GPU, 2026-01-02 | 200 s (200 to 200), 2 at once |" in everything
    )
    assert "`generation`, `divergence`: 1.2 ≤ 1.043: 465%" in everything


def test_a_long_reason_is_cut_on_the_page_and_nowhere_else(image: Image) -> None:
    prove.repeat(image, Fake((1, failed(image, reason="x" * 9000), "")), 1, keep=True)
    assert "x" * 301 not in pages.page(image)
    assert "x" * 9000 in repeated.path(image).read_text()

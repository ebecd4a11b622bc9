"""What the report promises: one schema, an honest verdict, a file that is whole or not there."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rollout import report
from rollout.problem import Problem
from rollout.report import Check, Engine, Report


def passed(name: str = "files", **metrics: Any) -> Check:
    return Check(name, "passed", 1.5, metrics)


def failed(name: str = "files") -> Check:
    return Check(name, "failed", 0.5, {}, "a file is missing\nand another")


def unproved(name: str = "sleep") -> Check:
    return Check(name, "unproved", 0.0, {}, "there is no GPU")


def make(checks: list[Check]) -> Report:
    return Report(
        image="verl-rollout:transformers-cpu",
        lock_sha256="0" * 64,
        layers=["sha256:" + "a" * 64],
        engine=Engine("transformers", "5.13.0"),
        torch="2.13.0+cpu",
        cuda=None,
        driver=None,
        device=None,
        started=report.now(),
        seconds=2.0,
        checks=checks,
        verdict=report.verdict(checks),
    )


@pytest.fixture
def data() -> dict[str, Any]:
    return report.document(make([passed(bytes=5), passed("imports", ratio=0.25)]))


# the verdict


@pytest.mark.parametrize(
    ("checks", "verdict", "code"),
    [
        ([passed()], "proved", 0),
        ([passed(), failed("imports")], "failed", 1),
        ([unproved(), failed()], "failed", 1),
        ([passed(), unproved()], "unproved", 3),
        ([], "unproved", 3),
    ],
)
def test_a_failure_outweighs_what_could_not_be_proved(
    checks: list[Check], verdict: str, code: int
) -> None:
    assert report.verdict(checks) == verdict
    assert report.exit_code(verdict) == code


def test_checks_that_did_not_run_leave_the_whole_unproved() -> None:
    assert report.verdict([passed("files")], ["files", "imports"]) == "unproved"
    assert report.verdict([passed("files"), passed("imports")], ["files", "imports"]) == "proved"
    assert report.verdict([failed("files")], ["files", "imports"]) == "failed"


@pytest.mark.parametrize(
    ("status", "reason"), [("fine", None), ("failed", None), ("unproved", ""), ("passed", "why")]
)
def test_a_check_without_a_status_or_reason_cannot_be_made(status: str, reason: str | None) -> None:
    with pytest.raises(ValueError, match="check files"):
        Check("files", status, 0.0, {}, reason)


# the document


def test_the_document_has_exactly_the_promised_keys(data: dict[str, Any]) -> None:
    assert list(data) == [
        *("schema", "image", "lock_sha256", "layers", "engine", "torch", "cuda", "driver"),
        *("device", "started", "seconds", "checks", "verdict", "added"),
    ]
    assert list(data["engine"]) == ["name", "version"]
    assert list(data["checks"][0]) == ["name", "status", "seconds", "metrics", "reason"]
    assert data["schema"] == "rollout-report/1"


def test_what_the_report_writes_is_valid(data: dict[str, Any]) -> None:
    assert report.validate(json.loads(json.dumps(data))) == []
    for checks in ([], [failed()], [unproved()], [passed(), failed("imports")]):
        assert report.validate(report.document(make(checks))) == []


@pytest.mark.parametrize("key", ["schema", "image", "lock_sha256", "layers", "engine", "verdict"])
def test_a_missing_key_is_named(data: dict[str, Any], key: str) -> None:
    del data[key]
    assert f"{key}: missing" in report.validate(data)


def test_unknown_keys_are_named_at_every_level(data: dict[str, Any]) -> None:
    data["gpu"] = data["engine"]["path"] = data["checks"][1]["note"] = "x"
    wrong = report.validate(data)
    assert wrong == ["gpu: unknown", "engine.path: unknown", "checks[1].note: unknown"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "rollout-report/2"),
        ("image", ""),
        ("image", None),
        ("lock_sha256", "abc"),
        ("layers", ["abc"]),
        ("layers", "sha256:" + "a" * 64),
        ("engine", "transformers"),
        ("torch", 2.9),
        ("cuda", ""),
        ("driver", 570),
        ("device", ["H200"]),
        ("started", "yesterday"),
        ("started", "2026-07-08T10:00:00"),
        ("started", "2026-07-08T10:00:00+02:00"),
        ("started", 5),
        ("seconds", "2"),
        ("seconds", True),
        ("seconds", -1),
        ("seconds", float("inf")),
        ("checks", {}),
        ("verdict", "passed"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(data: dict[str, Any], key: str, value: Any) -> None:
    assert report.validate(data) == []
    data[key] = value
    assert any(line.startswith(f"{key}: ") for line in report.validate(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("status", "ok"),
        ("seconds", float("nan")),
        ("metrics", []),
        ("metrics", {"deep": [{"x": float("nan")}]}),
        ("reason", "given though it passed"),
    ],
)
def test_a_wrong_value_in_a_check_is_named_by_its_place(
    data: dict[str, Any], key: str, value: Any
) -> None:
    data["checks"][1][key] = value
    assert any(line.startswith(f"checks[1].{key}: ") for line in report.validate(data))


def test_additions_have_a_name_a_version_and_a_place(data: dict[str, Any]) -> None:
    extra = {"name": "extra", "version": "1.5", "place": "/opt/added"}
    assert report.validate({**data, "added": [extra]}) == []
    (wrong,) = report.validate({**data, "added": [extra, {**extra, "version": 1.5}]})
    assert wrong.startswith("added[1].version: 1.5")
    (wrong,) = report.validate({**data, "added": [{**extra, "size": "1"}]})
    assert wrong == "added[0].size: unknown"
    assert report.validate({**data, "added": None}) == ["added: None is not a list"]


def test_a_report_of_before_there_were_additions_is_valid(data: dict[str, Any]) -> None:
    del data["added"]
    assert report.validate(data) == []


def test_a_verdict_that_the_checks_contradict_is_named(data: dict[str, Any]) -> None:
    lying = copy.deepcopy(data) | {"checks": report.document(make([failed()]))["checks"]}
    assert any(line.startswith("verdict: ") for line in report.validate(lying))
    assert any(line.startswith("verdict: ") for line in report.validate(data | {"checks": []}))
    assert any("verdict" in line for line in report.validate(data | {"verdict": "failed"}))


def test_a_check_reported_twice_is_named(data: dict[str, Any]) -> None:
    data["checks"].append(data["checks"][0])
    assert report.validate(data) == ["checks: files is there 2 times"]


@pytest.mark.parametrize("other", [None, [], "report", 5, {"checks": [5]}, {"engine": []}])
def test_what_is_no_report_is_refused_without_a_crash(other: object) -> None:
    assert report.validate(other)


def test_moments_are_utc_in_iso_8601() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report.now())


# the file


def test_the_file_holds_the_document_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("an older report")
    written = make([passed(bytes=5)])
    report.write(path, written)
    assert json.loads(path.read_text()) == report.document(written)
    assert os.listdir(tmp_path) == ["report.json"]  # noqa: PTH208


def test_numbers_without_a_value_are_kept_by_name(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(path, make([passed(drift=float("inf"), deep=[{"loss": float("nan")}])]))
    data = json.loads(path.read_text())
    assert report.validate(data) == []
    assert data["checks"][0]["metrics"] == {"drift": "inf", "deep": [{"loss": "nan"}]}


def test_the_file_of_a_container_can_be_read_on_the_host(tmp_path: Path) -> None:
    report.write(tmp_path / "report.json", make([passed()]))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_interrupted_write_leaves_the_older_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("an older report")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Problem, match="No space left"):
        report.write(path, make([passed()]))
    assert path.read_text() == "an older report"
    assert os.listdir(tmp_path) == ["report.json"]  # noqa: PTH208


def test_an_unwritable_path_is_found_before_the_run_and_after_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no/report.json", tmp_path / "file/report.json", tmp_path):
        for attempt in (report.writable, lambda at: report.write(at, make([passed()]))):
            with pytest.raises(Problem) as caught:
                attempt(path)
            assert caught.value.code == 2
            assert str(path) in caught.value.sentence


def test_asking_whether_a_path_is_writable_changes_nothing(tmp_path: Path) -> None:
    report.writable(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.json").write_text("an older report")
    report.writable(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "an older report"


def test_a_device_is_written_to_and_never_replaced() -> None:
    report.writable(Path("/dev/null"))
    report.write(Path("/dev/null"), make([passed()]))
    assert Path("/dev/null").is_char_device()


# the terminal


def test_a_row_has_name_status_seconds_and_the_first_metrics() -> None:
    line = report.row(passed("files", files=28000, bytes=1 << 30, ratio=0.123456, ok=True, last=1))
    assert line.split() == [
        *("files", "passed", "1.50"),
        *("files=28000", "bytes=1.0GiB", "ratio=0.1235", "ok=True"),
    ]


def test_the_reason_follows_on_lines_of_its_own() -> None:
    assert report.row(failed()).splitlines()[1:] == ["    a file is missing", "    and another"]
    assert "there is no GPU" in report.row(unproved())
    assert "\n" not in report.row(passed())


def test_columns_stand_under_their_heading() -> None:
    line = report.row(passed(files=1))
    assert report.header().index("status") == line.index("passed")
    assert report.header().index("metrics") == line.index("files=1")

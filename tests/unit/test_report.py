"""What the report promises: one schema, an honest verdict, a file that is whole or not there."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from images.proving import report_file
from rollout import report
from rollout.problem import Problem
from rollout.report import Added, Check, Engine, Framework, Gpu, Report


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
        gpus=[Gpu("a GPU", 80 << 30)],
        device=None,
        model="probe tiny",
        cycles=4,
        framework=Framework("verl", "0.7.1", "/opt/rollout/lib"),
        added=[Added("omegaconf", "2.3.0", "/opt/mine")],
        started=report.now(),
        seconds=2.0,
        checks=checks,
        skipped={},
        program={"files": "0" * 64},
        verdict=report.verdict(checks),
    )


Validate = Callable[[object], list[str]]


@pytest.fixture
def validate() -> Validate:
    return report_file.validate


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
        *("gpus", "device", "model", "cycles", "framework", "added", "started", "seconds"),
        *("checks", "skipped", "program", "verdict"),
    ]
    assert list(data["engine"]) == ["name", "version"]
    assert list(data["checks"][0]) == ["name", "status", "seconds", "metrics", "reason"]
    assert data["schema"] == "rollout-report/2"


def test_what_the_report_writes_is_valid(data: dict[str, Any], validate: Validate) -> None:
    assert validate(json.loads(json.dumps(data))) == []
    for checks in ([], [failed()], [unproved()], [passed(), failed("imports")]):
        assert validate(report.document(make(checks))) == []


@pytest.mark.parametrize("key", ["schema", "image", "lock_sha256", "layers", "engine", "verdict"])
def test_a_missing_key_is_named(data: dict[str, Any], key: str, validate: Validate) -> None:
    del data[key]
    assert f"{key}: missing" in validate(data)


def test_unknown_keys_are_named_at_every_level(data: dict[str, Any], validate: Validate) -> None:
    data["gpu"] = data["engine"]["path"] = data["checks"][1]["note"] = "x"
    wrong = validate(data)
    assert wrong == ["gpu: unknown", "engine.path: unknown", "checks[1].note: unknown"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "rollout-report/1"),
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
        ("device", "an \x1b[2J H200"),
        ("device", "two\nlines"),
        ("device", "half \ud800"),
        ("gpus", {"name": "a GPU", "memory_bytes": 5}),
        ("gpus", "one"),
        ("model", 5),
        ("cycles", 0),
        ("cycles", 4.0),
        ("cycles", True),
        ("framework", ["verl"]),
        ("added", {}),
        ("skipped", None),
        ("skipped", ["nccl"]),
        ("skipped", {"nccl": ""}),
        ("skipped", {"nccl": None}),
        ("program", {"refit": "abc"}),
        ("program", ["refit"]),
        ("started", "yesterday"),
        ("started", "2026-07-08T10:00:00"),
        ("started", "2026-07-08T10:00:00+02:00"),
        ("started", 5),
        ("seconds", "2"),
        ("seconds", True),
        ("seconds", -1),
        ("seconds", float("inf")),
        ("seconds", 10**400),
        ("seconds", 1e300),
        ("checks", {}),
        ("verdict", "passed"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(
    data: dict[str, Any], key: str, value: Any, validate: Validate
) -> None:
    assert validate(data) == []
    data[key] = value
    assert any(re.match(rf"{key}[:[.]", line) for line in validate(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("name", ["a"]),
        ("status", "ok"),
        ("status", ["passed"]),
        ("seconds", None),
        ("metrics", []),
        ("reason", "given though it passed"),
    ],
)
def test_a_wrong_value_in_a_check_is_named_by_its_place(
    data: dict[str, Any], key: str, value: Any, validate: Validate
) -> None:
    data["checks"][1][key] = value
    assert any(line.startswith(f"checks[1].{key}: ") for line in validate(data))


def test_additions_have_a_name_a_version_and_a_place(
    data: dict[str, Any], validate: Validate
) -> None:
    extra = {"name": "extra", "version": "1.5", "place": "/opt/added"}
    assert validate({**data, "added": [extra]}) == []
    (wrong,) = validate({**data, "added": [extra, {**extra, "version": 1.5}]})
    assert wrong.startswith("added[1].version: 1.5")
    (wrong,) = validate({**data, "added": [{**extra, "size": "1"}]})
    assert wrong == "added[0].size: unknown"
    assert validate({**data, "added": "extra"}) == ["added: 'extra' is not a list or null"]


def test_a_report_of_before_there_were_additions_says_that_it_does_not_know(
    data: dict[str, Any], validate: Validate
) -> None:
    assert validate({**data, "added": None}) == []


def test_a_verdict_that_the_checks_contradict_is_named(
    data: dict[str, Any], validate: Validate
) -> None:
    lying = copy.deepcopy(data) | {"checks": report.document(make([failed()]))["checks"]}
    assert any(line.startswith("verdict: ") for line in validate(lying))
    assert any(line.startswith("verdict: ") for line in validate(data | {"checks": []}))
    assert any("verdict" in line for line in validate(data | {"verdict": "failed"}))


@pytest.mark.parametrize(
    ("verdict", "skipped", "sound"),
    [
        ("in-part", {"nccl": "one GPU"}, True),
        ("in-part", {}, False),
        ("proved", {"nccl": "one GPU"}, False),
        ("unproved", {"nccl": "one GPU"}, True),
    ],
)
def test_what_was_skipped_and_the_verdict_have_to_agree(
    data: dict[str, Any], verdict: str, skipped: dict[str, str], sound: bool, validate: Validate
) -> None:
    assert (validate(data | {"verdict": verdict, "skipped": skipped}) == []) is sound


def test_what_ran_was_not_skipped(data: dict[str, Any], validate: Validate) -> None:
    lying = data | {"skipped": {"files": "why"}, "verdict": "in-part"}
    assert validate(lying) == ["skipped: files is there, and ran"]


def test_what_was_skipped_leaves_a_proof_in_part_and_the_exit_code_0() -> None:
    """Nothing on that machine has to be changed for it; the report says what is missing."""
    assert report.verdict([passed()], ["files", "nccl"], ["nccl"]) == "in-part"
    assert report.verdict([passed()], ["files", "nccl"]) == "unproved"
    assert report.verdict([failed()], ["files", "nccl"], ["nccl"]) == "failed"
    assert report.exit_code("in-part") == 0


@pytest.mark.parametrize(
    ("key", "item", "said"),
    [
        ("gpus", {"name": "a GPU"}, "gpus[1].memory_bytes: missing"),
        ("gpus", {"name": "a GPU", "memory_bytes": -1}, "gpus[1].memory_bytes: -1 is not a posi"),
        ("gpus", "a GPU", "gpus[1]: not an object"),
        ("added", {"name": "x", "version": "1", "path": "/"}, "added[1].place: missing"),
        ("added", 7, "added[1]: not an object"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named_by_its_place(
    data: dict[str, Any], key: str, item: Any, said: str, validate: Validate
) -> None:
    data[key].append(item)
    assert any(line.startswith(said) for line in validate(data))


# what others send


@pytest.fixture
def refused() -> Callable[[Path], str]:
    """Why a file is no report; never a traceback, never a wait."""

    def why(path: Path) -> str:
        with pytest.raises(ValueError, match=r"^(is|has|holds|says|cannot) ") as caught:
            report_file.read(path)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 300 and said.isprintable()
        return said

    return why


Refused = Callable[[Path], str]


HOSTILE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda _: b"", "is not JSON"),
    "cut short": (lambda text: text[:40].encode(), "is not JSON"),
    "a list": (lambda _: b"[]", "is no report: report: not an object"),
    "not UTF-8": (lambda _: b"\xff\xfe", "is not UTF-8"),
    "UTF-16": (lambda text: text.encode("utf-16"), "is not UTF-8"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-le"), "is not JSON"),
    "a byte order mark": (lambda text: text.encode("utf-8-sig"), "is not JSON"),
    "NUL": (lambda text: text.replace("a GPU", "a\0GPU").encode(), "is not JSON"),
    "NaN": (lambda text: text.replace("2.0", "NaN").encode(), "holds NaN, which is no JSON"),
    "infinity": (lambda text: text.replace("2.0", "-Infinity").encode(), "holds -Infinity, which"),
    "1e999": (lambda text: text.replace("2.0", "1e999").encode(), "holds a number that is none"),
    "10**400": (lambda text: text.replace("2.0", "1" + "0" * 400).encode(), "holds a number of mo"),
    "10**9999": (lambda text: text.replace("2.0", "1" + "0" * 9999).encode(), "holds a number th"),
    "lists": (lambda _: b"[" * 900 + b"]" * 900, "is nested too deeply"),
    "very many lists": (lambda _: b"[" * 90_000, "is nested too deeply"),
    "objects": (
        lambda text: (text[:-2] + ', "x": ' + '{"a":' * 20 + "1" + "}" * 21).encode(),
        "is",
    ),
    "half a character": (
        lambda text: text.replace("a GPU", "\\ud800").encode(),
        "holds half a cha",
    ),
    "a key twice": (
        lambda text: text.replace("{", '{"image": "a", ', 1).encode(),
        "says 'image' tw",
    ),
    "a long text": (
        lambda text: text.replace("a GPU", "x" * 70_000).encode(),
        "holds a text of 70",
    ),
    "a terminal's command": (lambda text: text.replace("a GPU", "\\u001b[2J").encode(), "is no re"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_report_is_one_sentence(
    data: dict[str, Any], tmp_path: Path, name: str, refused: Refused
) -> None:
    spoil, said = HOSTILE[name]
    path = tmp_path / "report.json"
    path.write_bytes(spoil(json.dumps(data)))
    assert refused(path).startswith(said)


def test_a_report_that_was_sent_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = make([passed(bytes=5)])
    report.write(tmp_path / "report.json", written)
    assert report_file.read(tmp_path / "report.json") == report.document(written)


def test_a_link_is_not_followed_out_of_the_folder(tmp_path: Path, refused: Refused) -> None:
    report.write(tmp_path / "report.json", make([passed()]))
    (tmp_path / "link.json").symlink_to("report.json")
    assert refused(tmp_path / "link.json") == "is a link; put the file itself there"


def test_what_is_no_plain_file_is_neither_waited_for_nor_read(
    tmp_path: Path, refused: Refused
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        assert refused(path) == "is no plain file"
    assert refused(tmp_path / "nothing") == "cannot be read (No such file or directory)"
    assert refused(Path("a\0b")) == "is no name of a file"


def test_a_file_of_100_mb_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as stream:
        stream.truncate(100 << 20)  # a hole: nothing is on the disk
    monkeypatch.delattr(os, "fdopen")
    assert refused(path).startswith("has 104,857,600 bytes, more than ")


# the published schema

ROOT = Path(__file__).resolve().parents[2]
PROOFS = ROOT / "images" / "proofs"
PUBLISHED = json.loads((PROOFS / "rollout-report.schema.json").read_text(encoding="utf-8"))
SCHEMA = jsonschema.Draft202012Validator(PUBLISHED)


def kept() -> dict[str, dict[str, Any]]:
    """Every report that is kept in this repository, by its path."""
    found = {}
    for path in sorted(PROOFS.rglob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if str(data.get("schema", "")).startswith("rollout-report/"):
            found[str(path.relative_to(PROOFS))] = data
    return found


def test_the_published_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    assert list(PUBLISHED["properties"]) == list(report.document(make([])))
    assert sorted(PUBLISHED["required"]) == sorted(PUBLISHED["properties"])


def test_every_kept_report_is_one_of_the_published_schema(validate: Validate) -> None:
    reports = kept()
    assert len(reports) > 10
    for name, data in reports.items():
        assert [error.message for error in SCHEMA.iter_errors(data)] == [], name
        assert validate(data) == [], name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpus", None),
        ("gpus", []),
        ("model", None),
        ("cycles", None),
        ("framework", None),
        ("added", None),
        ("program", None),
        ("device", ""),
        ("device", 5),
        ("gpus", [{"name": "a"}]),
        ("gpus", [{"name": "a", "memory_bytes": 0}]),
        ("cycles", 0),
        ("framework", {"name": "verl"}),
        ("added", [5]),
        ("skipped", {"nccl": ""}),
        ("skipped", []),
        ("program", {"a": "b"}),
        ("seconds", -1),
        ("seconds", 1e10),
        ("started", "yesterday"),
        ("started", "2026-07-08T10:00:00+02:00"),
        ("layers", ["x"]),
        ("lock_sha256", "x"),
        ("verdict", "fine"),
        ("extra", 1),
    ],
)
def test_the_published_schema_and_what_reads_a_report_agree(
    data: dict[str, Any], key: str, value: Any, validate: Validate
) -> None:
    changed = data | {key: value}
    assert SCHEMA.is_valid(changed) == (validate(changed) == [])


def test_a_check_that_did_not_pass_has_a_reason_in_the_published_schema_too(
    data: dict[str, Any],
) -> None:
    assert SCHEMA.is_valid(data)
    for status, reason in (("passed", "why"), ("failed", None), ("unproved", "")):
        data["checks"][0] |= {"status": status, "reason": reason}
        assert not SCHEMA.is_valid(data)


HOSTILE_NAME = "\x1b[2J" + "x" * 10_000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            {"schema": "rollout-report/1"},
            "schema: 'rollout-report/1' is not one of rollout-report/2",
        ),
        ({"verdict": "fine"}, "verdict: 'fine' is not one of proved, in-part, failed, unproved"),
        ({"cycles": 4.5}, "cycles: 4.5 is not a positive number or null"),
        ({"seconds": -1}, "seconds: -1 is not a finite number of seconds"),
        ({"engine": None}, "engine: not an object"),
        ({"gpus": 5}, "gpus: 5 is not a list or null"),
        ({"layers": ["x"]}, "layers[0]: 'x' is not a diff_id: sha256: and 64 hexadecimal digits"),
        ({"lock_sha256": "0" * 64 + "\n"}, "lock_sha256: '000"),
        ({"device": "a\u202eb"}, r"device: 'a\u202eb' is not a line of text or null"),
        (
            {"started": "2026-07-08T10:00:00"},
            "started: '2026-07-08T10:00:00' is not a moment in UTC",
        ),
        ({"skipped": {"nccl": 5}}, "skipped.nccl: 5 is not a line of text"),
        ({"skipped": {HOSTILE_NAME: "why"}}, r"skipped: '\x1b[2Jxxx"),
        ({"program": {HOSTILE_NAME: "0" * 64}}, r"program: '\x1b[2Jxxx"),
        ({HOSTILE_NAME: 5}, r"\x1b[2Jxxx"),
    ],
)
def test_the_host_says_where_it_is_wrong_and_what_should_stand_there(
    data: dict[str, Any], spoil: dict[str, Any], said: str
) -> None:
    wrong = report_file.validate(data | spoil)
    assert wrong[0].startswith(said)
    assert all(line.isprintable() and len(line) < 200 for line in wrong)


def test_of_a_file_that_is_all_wrong_the_host_says_the_first_twenty_things(
    data: dict[str, Any],
) -> None:
    wrong = report_file.validate(data | {"layers": [5] * 100_000})
    assert [line.partition(":")[0] for line in wrong] == [f"layers[{n}]" for n in range(20)]


@pytest.mark.parametrize("key", ["checks", "skipped", "program"])
def test_more_entries_than_a_run_can_leave_are_refused_by_their_number(
    data: dict[str, Any], key: str
) -> None:
    entries = {str(number): "0" * 64 for number in range(1001)}
    many = [data["checks"][0]] * 1001 if key == "checks" else entries
    with pytest.raises(ValueError, match=f"^is no report: {key}: more than 1,000 entries$"):
        report_file.parse(json.dumps(data | {key: many}).encode())


def constrained(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that asks for more than a type or one of some words."""
    wordless = {"pattern", "format", "minimum", "exclusiveMinimum", "maxLength", "anyOf"}
    if isinstance(schema, dict) and wordless & set(schema):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            yield from constrained(part)


def test_the_published_schema_has_a_title_for_whatever_a_sentence_needs_words_for() -> None:
    found = list(constrained(PUBLISHED))
    assert len(found) > 5
    assert [part for part in found if "title" not in part] == []


def test_a_check_reported_twice_is_named(data: dict[str, Any], validate: Validate) -> None:
    data["checks"].append(data["checks"][0])
    assert validate(data) == ["checks: files is there 2 times"]


@pytest.mark.parametrize("other", [None, [], "report", 5, {"checks": [5]}, {"engine": []}])
def test_what_is_no_report_is_refused_without_a_crash(other: object, validate: Validate) -> None:
    assert validate(other)


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


def test_numbers_without_a_value_are_kept_by_name(tmp_path: Path, validate: Validate) -> None:
    path = tmp_path / "report.json"
    report.write(path, make([passed(drift=float("inf"), deep=[{"loss": float("nan")}])]))
    data = json.loads(path.read_text())
    assert validate(data) == []
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
        for attempt, code in (
            (report.writable, 2),
            (lambda at: report.write(at, make([passed()])), 3),  # it was writable before the run
        ):
            with pytest.raises(Problem) as caught:
                attempt(path)
            assert caught.value.code == code
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

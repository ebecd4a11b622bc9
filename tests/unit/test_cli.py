"""What the command ``rollout`` promises: its exit codes, its sentences, and to stand aside."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from images.catalog import ROOT
from images.proving import report_file
from rollout import cli, preflight, program, report, smoke, verify
from rollout.faults import HELD
from rollout.problem import Problem
from rollout.report import Check

FACTS = {
    "reference": "verl-rollout:transformers-cpu",
    "backend": "transformers",
    "framework": "verl",
    "python": "3.11",
    "resolved_as_of": "2026-07-08",
    "engine": {"name": "transformers", "distribution": "transformers"},
    "cuda": None,
    "smoke": {"sleep_levels": [1, 2], "refit": ["shared-memory"]},
    "imports": ["torch", "transformers"],
}


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image's environment, and ``rollout`` in it."""
    (tmp_path / "share/rollout").mkdir(parents=True)
    (tmp_path / "share/rollout/image.json").write_text(json.dumps(FACTS))
    (tmp_path / "share/rollout/requirements.lock").write_text("")
    site = tmp_path / "lib/python3.11/site-packages"
    for name in ("torch-2.13.0+cpu", "transformers-5.13.0"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    monkeypatch.setenv("ROLLOUT_PREFIX", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """``main`` takes over SIGTERM, which is pytest's here."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rollout(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as the launcher in an image starts it."""
    code = "from rollout.cli import main; raise SystemExit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT / "entrypoints")},
        capture_output=True,
        text=True,
        check=False,
    )


# info


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize("argv", [["info"], []], ids=["asked for", "said nothing"])
def test_info_says_what_the_image_is(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for fact in ("verl-rollout:transformers-cpu", "transformers 5.13.0", "2.13.0+cpu"):
        assert fact in out


@pytest.mark.usefixtures("prefix")
def test_info_is_json_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["engine"] == {"name": "transformers", "version": "5.13.0"}


@pytest.mark.parametrize("argv", [["info"], ["smoke"], ["serve"], ["/bin/true"]])
def test_outside_of_an_image_it_says_what_is_missing(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROLLOUT_PREFIX", str(tmp_path))
    monkeypatch.delattr(os, "execvp")  # else a mistake would replace pytest by /bin/true: passed
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rollout: {tmp_path}/share/rollout/image.json cannot be read")
    assert said.count("\n") == 1


# wrong usage


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["smoke", "--cycles", "0"], "argument --cycles: '0' is no number of at least 4"),
        (["smoke", "--cycles", "many"], "argument --cycles: 'many' is no number of at least 4"),
        (["smoke", "--colour"], "unrecognized arguments: --colour"),
        (["info", "--xml"], "unrecognized arguments: --xml"),
        (["verify", "--report"], "argument --report: expected one argument"),
    ],
)
def test_a_bad_option_is_wrong_usage(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["smoke", "--only", "start,refits"],
            "--only: no check 'refits' in this image; did you mean 'refit'?",
        ),
        (
            ["smoke", "--inject", "fliped-byte"],
            "--inject: no fault 'fliped-byte'; did you mean 'flipped-byte'?",
        ),
        (
            ["smoke", "--report", "/nowhere/report.json"],
            "The report cannot be written to /nowhere/report.json: No such file or directory.",
        ),
        (
            ["verify", "--report", "/nowhere/report.json"],
            "The report cannot be written to /nowhere/report.json: No such file or directory.",
        ),
        (
            ["serve", "--port", "8000"],
            "the transformers backend has no server of its own; use an image with an engine",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == f"rollout: {said}\n"


def test_the_help_names_every_command_and_every_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("info", "verify", "smoke", "serve", "Anything else is executed as given"):
        assert text in out
    for code in ("0 proved", "1 a check", "2 wrong usage", "3 cannot be proved", "4 an injected"):
        assert code in out


# smoke and verify


def left(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    assert report_file.validate(data) == []
    return data


ALL = [Check(name, "passed", 1.0) for name in smoke.CHECKS]
FAILED = Check("refit", "failed", 1.0, {}, f"the engine {HELD}: x")
OTHERWISE = Check("refit", "failed", 1.0, {}, "the engine ended")


@pytest.mark.parametrize(
    ("checks", "code", "last"),
    [
        (ALL, 0, "verl-rollout:transformers-cpu: proved in "),
        (ALL[:2], 3, "verl-rollout:transformers-cpu: unproved in "),
        ([ALL[0], FAILED], 1, "verl-rollout:transformers-cpu: failed (refit) in "),
        ([ALL[0], OTHERWISE], 4, "verl-rollout:transformers-cpu: failed (refit) in "),
        ([replace(FAILED, name="start")], 4, "verl-rollout:transformers-cpu: failed (start) in "),
    ],
    ids=["all checks", "some checks", "as it has to", "for another reason", "another check"],
)
def test_the_exit_code_is_the_verdict(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checks: list[Check],
    code: int,
    last: str,
) -> None:
    asked: list[smoke.Options] = []

    def run(_: Any, options: smoke.Options, *__: Any) -> tuple[list[Check], str]:
        asked.append(options)
        return checks, "a CPU"

    monkeypatch.setattr(smoke, "run", run)
    monkeypatch.setenv("ROLLOUT_LAYERS", f"sha256:{'a' * 64},sha256:{'b' * 64}")
    path = prefix / "report.json"
    argv = ["smoke", "--only", "start,refit", "--cycles", "5", "--report", str(path)]
    assert cli.main([*argv, "--inject", "flipped-byte"]) == code
    assert asked == [smoke.Options(("start", "refit"), None, 5, "flipped-byte")]
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    data = left(path)
    assert [check["name"] for check in data["checks"]] == [check.name for check in checks]
    assert data["layers"] == [f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"]
    assert (data["device"], data["driver"], data["cuda"]) == ("a CPU", None, None)


@pytest.mark.parametrize(
    ("missing", "gpus", "code", "verdict"),
    [
        ((), 2, 0, "proved"),
        (("tensor-parallel",), 1, 0, "in-part"),
        (("tensor-parallel",), 2, 3, "unproved"),
        (("server",), 2, 3, "unproved"),
        (("fp8",), 2, 3, "unproved"),
        (("multi-turn",), 2, 3, "unproved"),
    ],
    ids=["none", "one GPU", "tensor-parallel", "server", "fp8", "multi-turn"],
)
def test_an_image_is_proved_by_all_that_it_promises_and_in_part_by_what_one_gpu_can_show(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: tuple[str, ...],
    gpus: int,
    code: int,
    verdict: str,
) -> None:
    wanted = {"sleep_levels": [2], "refit": ["disk"], "fp8": True, "server": True}
    facts = FACTS | {"smoke": wanted | {"tensor_parallel": 2}}
    (prefix / "share/rollout/image.json").write_text(json.dumps(facts))
    checks = [check for check in ALL if check.name not in ("sleep-1", *missing)]
    monkeypatch.setattr(smoke, "run", lambda *_: (checks, "a GPU"))
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: gpus)
    monkeypatch.setattr(smoke, "gpus", lambda _: [report.Gpu("a GPU", 5)] * gpus)
    path = prefix / "report.json"
    assert cli.main(["smoke", "--report", str(path)]) == code
    data = left(path)
    assert data["verdict"] == verdict
    reasons = {"tensor-parallel": "it needs 2 GPUs; one GPU is visible"}
    assert data["skipped"] == (reasons if gpus == 1 else {})
    assert [gpu["name"] for gpu in data["gpus"]] == ["a GPU"] * gpus
    said = "not shown here: tensor-parallel (it needs 2 GPUs; one GPU is visible)\n"
    assert (said in capsys.readouterr().out) == (gpus == 1)


def test_a_report_names_the_program_of_its_checks_and_what_they_ran_on(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = FACTS["smoke"]
    monkeypatch.setattr(smoke, "run", lambda *_: (ALL, "a CPU"))
    path = prefix / "report.json"
    cli.main(["smoke", "--report", str(path)])
    data = left(path)
    checks = smoke.promised(wanted)
    found = program.identity("transformers", (), checks, program.settings(wanted))
    assert data["program"] == found
    assert (data["model"], data["cycles"]) == (f"probe tiny, seed {smoke.SEED}", 4)
    monkeypatch.setattr(verify, "run", lambda *_, **__: [Check(verify.CHECKS[0], "passed", 1.0)])
    cli.main(["verify", "--report", str(path)])
    data = left(path)
    assert data["program"] == program.identity("transformers", verify.available(FACTS), ())
    assert (data["model"], data["cycles"], data["gpus"]) == (None, None, [])


def test_the_verdict_is_said_even_where_the_report_cannot_be_written(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After minutes on a GPU a full disk must not take it away."""
    monkeypatch.setattr(smoke, "run", lambda *_: (ALL, "a CPU"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["smoke", "--report", str(prefix / "report.json")]) == 3
    said = capsys.readouterr()
    assert "verl-rollout:transformers-cpu: proved in " in said.out
    assert "No space left on device" in said.err


def test_verify_names_what_has_no_sha256_and_proves_in_part(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = "engine==1.0\n    # not locked: engine-1.0-x.whl lies on the index of V\n    # via a\n"
    (prefix / "share/rollout/requirements.lock").write_text(f"a==1 \\\n    --hash=x\n{lock}")
    monkeypatch.setattr(
        verify, "run", lambda *_, **__: [Check(name, "passed", 1.0) for name in verify.CHECKS]
    )
    assert cli.main(["verify", "--report", str(prefix / "report.json")]) == 0
    data = json.loads((prefix / "report.json").read_text())
    why = "not locked: engine-1.0-x.whl lies on the index of V"
    assert data["skipped"] == {"sha256 of engine": why}
    assert data["verdict"] == "in-part"
    assert f"not shown here: sha256 of engine ({why})" in capsys.readouterr().out


def test_a_check_that_the_image_does_not_promise_is_in_the_report_with_its_program(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = FACTS | {"framework": {"name": "roll", "version": "8eb27cc2"}}
    (prefix / "share/rollout/image.json").write_text(json.dumps(facts))
    asked: list[dict[str, Any]] = []

    def run(data: dict[str, Any], *_: Any) -> tuple[list[Check], str]:
        asked.append(data)
        return [Check("training", "passed", 1.0)], "a GPU"

    monkeypatch.setattr(smoke, "run", run)
    monkeypatch.setattr(smoke, "gpus", lambda _: [])
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: 1)
    path = tmp_path / "report.json"
    named = ["--framework", str(tmp_path), "--report", str(path)]
    assert cli.main(["smoke", "--only", "training", *named]) == 3, "it proves no image"
    assert "training" in smoke.promised(asked[0]["smoke"])
    assert json.loads(path.read_text())["program"]["training"]


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 1)])
def test_verify_is_proved_by_all_of_its_checks(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    code: int,
) -> None:
    reason = None if status == "passed" else "one byte is another"
    checks = [Check(verify.CHECKS[0], status, 1.0, {}, reason)]
    checks += [Check(name, "passed", 1.0) for name in verify.CHECKS[1:]]
    monkeypatch.setattr(verify, "run", lambda *_, **__: checks)
    assert cli.main(["verify", "--report", str(prefix / "report.json")]) == code
    assert left(prefix / "report.json")["verdict"] == ("failed" if code else "proved")


def test_what_was_added_is_said_and_reported(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "mine"
    (folder / "extra-1.5.dist-info").mkdir(parents=True)
    (folder / "extra-1.5.dist-info/METADATA").write_text("Name: extra\nVersion: 1.5\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(
        verify, "run", lambda *_, **__: [Check(name, "passed", 1.0) for name in verify.CHECKS]
    )
    assert cli.main(["verify", "--report", str(prefix / "report.json")]) == 0
    assert f"added to the image: extra 1.5 ({folder})" in capsys.readouterr().out
    expected = [{"name": "extra", "version": "1.5", "place": str(folder)}]
    assert left(prefix / "report.json")["added"] == expected
    assert cli.main(["info"]) == 0
    assert f"added           extra 1.5 ({folder})" in capsys.readouterr().out.splitlines()
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == expected


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Problem("no GPU here", 3), 3, "rollout: no GPU here\n"),
        (KeyboardInterrupt(), 130, "rollout: interrupted; the engine was stopped\n"),
    ],
)
def test_what_ends_a_proof_early_is_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    said: str,
) -> None:
    def run(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(smoke, "run", run)
    assert cli.main(["smoke"]) == code
    assert capsys.readouterr().err == said


# what is wrong with this host

STOPS = preflight.Finding("cache", "cache-full", "the disk is full; free some")
WARNS = preflight.Finding("memory", "files-limited", "few files; raise the limit", stops=False)


def finds(monkeypatch: pytest.MonkeyPatch, *findings: preflight.Finding) -> list[preflight.Host]:
    """A host with these findings; what was looked at is noted."""
    seen: list[preflight.Host] = []

    def look(host: preflight.Host) -> list[preflight.Finding]:
        seen.append(host)
        return list(findings)

    monkeypatch.setattr(preflight, "KINDS", (SimpleNamespace(look=look),))
    return seen


@pytest.mark.usefixtures("prefix")
def test_the_doctor_prints_every_finding_and_those_that_stop_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = finds(monkeypatch, WARNS, STOPS)
    assert cli.main(["doctor"]) == 3
    assert seen[0].proof  # what the proof needs is looked at, too
    assert seen[0].all
    assert capsys.readouterr().out.splitlines() == [
        "stops    cache      cache-full: the disk is full; free some",
        "warning  memory     files-limited: few files; raise the limit",
        "found on this host: 2; 1 would stop 'rollout smoke'",
    ]


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize(
    ("findings", "code"), [((), 0), ((WARNS,), 0), ((STOPS,), 3), ((WARNS, STOPS), 3)]
)
def test_the_doctor_ends_with_three_where_the_proof_would(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    findings: tuple[preflight.Finding, ...],
    code: int,
) -> None:
    finds(monkeypatch, *findings)
    assert cli.main(["doctor", "--json"]) == code
    listed = json.loads(capsys.readouterr().out)
    assert [item["stops"] for item in listed] == sorted(
        (finding.stops for finding in findings), reverse=True
    )
    assert all(list(item) == ["kind", "name", "sentence", "stops"] for item in listed)
    assert cli.main(["doctor"]) == code
    assert ("found on this host: nothing" in capsys.readouterr().out) == (not findings)


@pytest.mark.usefixtures("prefix")
def test_a_folder_of_temporary_files_that_was_replaced_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/job")
    cli.main(["doctor"])
    said = "TMPDIR is /nowhere/job, which is not there or cannot be written, so /tmp is taken; "
    assert f"tmpdir-not-writable: {said}" in capsys.readouterr().out
    monkeypatch.setenv("TMPDIR", "/nowhere/job")
    monkeypatch.setattr(smoke, "proof", lambda *_: ([], None))
    cli.main(["smoke"])
    assert f"rollout: warning: {said}" in capsys.readouterr().err


# anything else


@pytest.mark.usefixtures("prefix")
def test_anything_else_is_executed_as_given() -> None:
    done = rollout("/bin/sh", "-c", 'printf "%s|" "$0" "$@"; exit 7', "a b", "--help", "")
    assert (done.returncode, done.stdout) == (7, "a b|--help||")


@pytest.mark.usefixtures("prefix")
def test_a_warning_comes_before_what_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    done = rollout("true")
    assert done.returncode == 0
    assert "rollout: warning: PYTORCH_ALLOC_CONF has expandable_segments:True" in done.stderr


def shadowing(prefix: Path, tmp_path: Path) -> str:
    """A folder with a module that the image has, too."""
    for folder in (prefix / "lib/python3.11/site-packages/torch", tmp_path / "mine/torch"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    return str(tmp_path / "mine")


@pytest.mark.usefixtures("stands_aside")
def test_a_path_that_hides_what_is_locked_is_said_before_a_command_and_a_proof(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shadowing(prefix, tmp_path)
    monkeypatch.setenv("PYTHONPATH", folder)
    said, _ = executed(["python3", "train.py"], capsys)
    wanted = f"rollout: warning: PYTHONPATH: {folder} holds torch, which the lock has too"
    assert [line.startswith(wanted) for line in said].count(True) == 1
    monkeypatch.setattr(smoke, "proof", lambda *_: ([], None))
    cli.main(["smoke"])
    assert wanted in capsys.readouterr().err
    cli.main(["doctor"])
    assert f"python-path-hides: PYTHONPATH: {folder} holds torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-command", "no command 'no-such-command' in this image; 'rollout --help' lists"),
        ("--verbose", "no command '--verbose' in this image; 'rollout --help' lists its own"),
        ("{prefix}/share", "'{prefix}/share' cannot be executed"),
        ("{prefix}/garbage", "'{prefix}/garbage' cannot be executed"),
        ("{prefix}/garbage/x", "'{prefix}/garbage/x'"),
        ("", "''"),
    ],
    ids=["unknown", "option", "folder", "garbage", "below a file", "empty"],
)
def test_what_cannot_be_executed_is_wrong_usage_in_a_sentence(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a folder that may not be searched says otherwise
    (prefix / "garbage").write_text("neither a script nor a program")
    (prefix / "garbage").chmod(0o755)
    assert cli.main([name.format(prefix=prefix)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rollout: ")
    assert said.format(prefix=prefix) in last


# what stands aside for the engine


@pytest.fixture
def stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what would have been executed, behind what was said before it."""

    def execvp(file: str, argv: list[str]) -> NoReturn:
        assert file == argv[0]
        print(f"executed: {shlex.join(argv)}", file=sys.stderr)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", execvp)


def executed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The warnings of a command, and what it became."""
    with pytest.raises(SystemExit):
        cli.main(argv)
    *said, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("rollout: ") for line in said)
    return said, last.removeprefix("executed: ")


def is_image_of(prefix: Path, backend: str, cuda: str | None) -> None:
    facts = FACTS | {"backend": backend, "cuda": cuda}
    (prefix / "share/rollout/image.json").write_text(json.dumps(facts))


@pytest.mark.usefixtures("stands_aside", "prefix")
def test_every_finding_is_a_warning_before_a_command_without_what_the_proof_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = finds(monkeypatch, WARNS, STOPS)
    said, became = executed(["python3", "train.py"], capsys)
    assert said == [f"rollout: warning: {finding.sentence}" for finding in (STOPS, WARNS)]
    assert became == "python3 train.py"
    assert [host.proof for host in seen] == [False]


@pytest.mark.usefixtures("stands_aside", "prefix")
@pytest.mark.parametrize(
    ("home", "expected"), [(None, "/caches"), ("", "/caches"), ("/home/me", "/home/me")]
)
def test_a_user_without_a_home_gets_the_folder_of_the_caches(
    monkeypatch: pytest.MonkeyPatch, home: str | None, expected: str
) -> None:
    # FlashInfer asks for the home when it is imported, and a UID of a cluster has none.
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    with pytest.raises(SystemExit):
        cli.main(["python3"])
    assert os.environ["HOME"] == expected


@pytest.mark.usefixtures("stands_aside", "prefix")
@pytest.mark.parametrize(
    ("known", "user", "expected"),
    [(False, None, "rollout"), (False, "", "rollout"), (False, "me", "me"), (True, None, None)],
)
def test_a_user_whom_no_passwd_file_knows_gets_a_name(
    monkeypatch: pytest.MonkeyPatch, known: bool, user: str | None, expected: str | None
) -> None:
    # torch's compiler asks for one when vLLM imports it.
    def look(uid: int) -> None:
        if not known:
            raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", look)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if user is not None:
        monkeypatch.setenv("USER", user)
    with pytest.raises(SystemExit):
        cli.main(["python3"])
    assert os.environ.get("USER") == expected


@pytest.mark.usefixtures("stands_aside")
@pytest.mark.parametrize(
    ("backend", "server"),
    [("vllm", "vllm serve"), ("sglang", "python3 -m sglang.launch_server")],
)
def test_serve_becomes_the_engines_own_server_behind_the_warnings(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    server: str,
) -> None:
    is_image_of(prefix, backend, "12.8")
    monkeypatch.setattr(preflight.drivers, "driver", lambda *_: None)
    said, became = executed(["serve", "/model", "--host", "::", "--help", "a b"], capsys)
    assert became == f"{server} /model --host :: --help 'a b'"
    assert "rollout: warning: no NVIDIA driver on this host; run it on a GPU host" in said


@pytest.mark.usefixtures("stands_aside")
@pytest.mark.parametrize(
    ("given", "config", "alone"),
    [
        (["/model", "--port", "8000"], "", True),
        (["/model", "--host-x", "a"], "", True),
        (["/model", "--host", "10.0.0.7"], "", False),
        (["/model", "--host=::"], "", False),
        (["/model", "--ho", "10.0.0.7"], "", False),
        (["/model", "--config", "{file}"], "port: 8000\nhost: 0.0.0.0\n", False),
        (["/model", "--config={file}"], "host : 0.0.0.0\n", False),
        (["/model", "--config", "{file}"], "port: 8000\n# host: 1\n", True),
        (["/model", "--config", "{file}"], "kv-transfer-config:\n  host: 10.0.0.7\n", True),
        (["/model", "--config", "{file}"], "'host': 0.0.0.0\n", False),
        (["/model", "--config", "/nowhere"], "", True),
        (["/model", "--config"], "", True),
    ],
)
def test_a_server_listens_on_this_machine_alone_unless_its_user_says_otherwise(
    prefix: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    config: str,
    alone: bool,
) -> None:
    is_image_of(prefix, "vllm", None)
    file = prefix / "config.yaml"
    file.write_text(config)
    given = [argument.format(file=file) for argument in given]
    said, became = executed(["serve", *given], capsys)
    assert became == shlex.join(["vllm", "serve", *given, *["--host", "127.0.0.1"] * alone])
    note = "rollout: listening on 127.0.0.1 alone; --host 0.0.0.0 lets others in"
    assert (note in said) is alone


@pytest.mark.usefixtures("stands_aside")
@pytest.mark.parametrize("argv", [["serve"], ["python3", "train.py"]], ids=["serve", "another"])
def test_a_small_shm_is_warned_of_where_there_are_gpus(
    prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
) -> None:
    small = SimpleNamespace(total=64 << 20, free=64 << 20)  # what container engines give
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    is_image_of(prefix, "vllm", "12.8")
    said, _ = executed(argv, capsys)
    warning = "rollout: warning: /dev/shm has 64 MiB, which is enough for one GPU; tensor"
    assert [line for line in said if "/dev/shm" in line and line.startswith(warning)]


@pytest.mark.usefixtures("stands_aside")
def test_a_small_shm_is_not_remarked_on_in_an_image_without_cuda(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SimpleNamespace(total=64 << 20, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    is_image_of(prefix, "transformers", None)
    said, became = executed(["python3", "train.py"], capsys)
    assert became == "python3 train.py"
    assert not [line for line in said if "/dev/shm" in line]

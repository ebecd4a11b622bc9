"""What `rollout verify` promises: nothing in an image differs from its lock unnoticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout import verify
from rollout.environment import Findings
from rollout.problem import Problem
from rollout.report import Check, row

from .conftest import COMPILED, SITE, flip, found, put, seal, shared_object

# the seal


def test_the_command_writes_the_seal(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROLLOUT_PREFIX", str(prefix))
    expected = (prefix / verify.SEAL).read_text()
    (prefix / verify.SEAL).unlink()
    assert verify.main(["--seal"]) == 0
    assert (prefix / verify.SEAL).read_text() == expected
    assert verify.main(["--unseal"]) == 2
    assert "usage" in capsys.readouterr().err


# imports


def test_the_last_words_of_a_failing_import_are_in_the_finding() -> None:
    findings = verify.imports(["json", "no_such_module_anywhere"])
    assert len(findings.problems) == 1
    text = found(findings)
    assert text.startswith("no_such_module_anywhere: cannot be imported: ModuleNotFoundError: No")


def test_a_module_that_kills_its_interpreter_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o755)
    assert "demo: cannot be imported: ended by signal 11" in found(
        verify.imports(["demo"], str(python))
    )


def test_modules_come_from_the_environment_alone(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.run(prefix, ["imports"])[0].status == "passed"
    shutil.rmtree(prefix / SITE / "demo")
    (tmp_path / "demo.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check = verify.run(prefix, ["imports"])[0]
    assert check.status == "failed"
    assert "demo: cannot be imported" in str(check.reason)


def test_an_import_leaves_nothing_behind_in_the_environment(prefix: Path) -> None:
    before = verify.files(prefix).metrics
    verify.run(prefix, ["imports"])
    assert verify.files(prefix).metrics == before
    assert not verify.files(prefix).problems


def test_no_module_to_import_proves_nothing(prefix: Path) -> None:
    (prefix / "share/rollout/image.json").write_text("{}")
    assert verify.run(prefix, ["imports"])[0].status == "unproved"


# the framework

FACTS = {"framework": {"name": "verl"}, "backend": "vllm"}


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter that prints and does what a line of shell says; it notes how it was called."""

    def make(line: str) -> str:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\necho "$@ $HF_HUB_OFFLINE" > {tmp_path}/called\n{line}\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_the_modules_of_a_training_run_are_imported_offline(
    python: Callable[[str], str], tmp_path: Path
) -> None:
    found = verify.framework(FACTS, python("""echo '{"verl": null, "verl.trainer": null}'"""))
    assert not found.problems
    assert found.metrics["modules"] == 2
    called = (tmp_path / "called").read_text()
    assert called == "-I -B -m rollout.frameworks verl vllm 1\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            """echo '{"verl": null, "verl.workers": "No module named omegaconf"}'""",
            "verl.workers: cannot be imported: No module named omegaconf",
        ),
        ("echo oh >&2; exit 1", "verl: cannot be imported: oh"),
        ("kill -SEGV $$", "verl: cannot be imported: ended by signal 11"),
    ],
)
def test_a_module_of_a_training_run_that_cannot_be_imported_is_named(
    python: Callable[[str], str], line: str, sentence: str
) -> None:
    assert sentence in found(verify.framework(FACTS, python(line)))


def test_an_adapter_that_names_no_module_proves_nothing(python: Callable[[str], str]) -> None:
    assert verify.framework(FACTS, python("echo '{}'")).unproved


def test_an_image_without_a_framework_is_not_asked_for_one() -> None:
    assert "framework" in verify.available(FACTS)
    for facts in ({}, {"framework": None}):
        assert "framework" not in verify.available(facts)


# all together


def test_every_check_runs_in_order_and_is_told_as_it_finishes(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "compilers", Findings)  # a host of tests may have no compiler
    put(prefix, f"{SITE}/demo/_c.so", shared_object(("libc.so.6",)))
    seal(prefix)
    told: list[Check] = []
    checks = verify.run(prefix, progress=told.append)
    assert checks == told
    assert [check.name for check in checks] == verify.available({})
    assert [(check.status, check.reason) for check in checks] == [("passed", None)] * len(checks)


def test_only_the_chosen_checks_run(prefix: Path) -> None:
    checks = verify.run(prefix, ["imports", "files"])
    assert [check.name for check in checks] == ["files", "imports"]


def test_a_failure_is_in_the_row_of_its_check(prefix: Path) -> None:
    flip(prefix / COMPILED)
    check = verify.run(prefix, ["files"])[0]
    assert check.status == "failed"
    assert COMPILED in row(check)


def test_very_many_findings_are_counted_in_the_reason_and_kept_in_the_metrics(prefix: Path) -> None:
    for number in range(100):
        (prefix / f"extra{number:03}").touch()
    check = verify.run(prefix, ["files"])[0]
    assert check.metrics["extra"] == 100
    assert str(check.reason).endswith(f"and {100 - verify.SHOWN} more")


def broken_image_json(prefix: Path) -> None:
    (prefix / "share/rollout/image.json").write_text("{")


def no_environment(prefix: Path) -> None:
    shutil.rmtree(prefix)


def empty_environment(prefix: Path) -> None:
    shutil.rmtree(prefix / SITE)


@pytest.mark.parametrize("damage", [broken_image_json, no_environment, empty_environment])
def test_no_environment_is_a_problem_of_usage_not_a_failure(
    prefix: Path, damage: Callable[[Path], None]
) -> None:
    damage(prefix)
    with pytest.raises(Problem) as caught:
        verify.run(prefix)
    assert caught.value.code == 2
    assert str(prefix) in caught.value.sentence


def test_an_unknown_check_is_a_problem_of_usage_and_the_known_ones_are_said(prefix: Path) -> None:
    with pytest.raises(Problem) as caught:
        verify.run(prefix, ["everything"])
    assert caught.value.code == 2
    assert "everything" in caught.value.sentence
    assert "distributions" in caught.value.sentence

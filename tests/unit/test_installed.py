"""What is installed is compared with the lock: no other version, nothing more, nothing less."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rollout import installed, verify
from rollout.environment import Findings
from rollout.problem import Problem

from .conftest import SITE, found, install


def check_distributions(prefix: Path) -> Findings:
    return installed.distributions(prefix, prefix / "share/rollout/requirements.lock")


def test_spellings_of_names_and_versions_do_not_matter(prefix: Path) -> None:
    findings = check_distributions(prefix)
    assert found(findings) == ""
    assert findings.metrics["installed"] == findings.metrics["locked"] == 2


def test_a_distribution_off_the_lock_is_named(prefix: Path) -> None:
    path = prefix / SITE / "demo-1.0.dist-info/METADATA"
    path.write_text("Name: demo\nVersion: 1.0.1\n")
    assert found(check_distributions(prefix)) == "demo: 1.0.1 is installed, 1.0 is locked"


@pytest.mark.parametrize("version", ["1.0+cu128", "1.0rc1", "1.0.post1", "1.0.dev0", "1!1.0"])
def test_a_version_that_only_resembles_the_locked_one_is_named(prefix: Path, version: str) -> None:
    (prefix / SITE / "demo-1.0.dist-info/METADATA").write_text(f"Name: demo\nVersion: {version}\n")
    assert f"demo: {version} is installed, 1.0 is locked" in found(check_distributions(prefix))


def test_an_installed_distribution_that_is_not_locked_is_named(prefix: Path) -> None:
    install(prefix, "smuggled", "3", {})
    assert found(check_distributions(prefix)).startswith("smuggled: 3 is installed and is not in")


def test_a_locked_distribution_that_is_not_installed_is_named(prefix: Path) -> None:
    shutil.rmtree(prefix / SITE / "demo-1.0.dist-info")
    assert found(check_distributions(prefix)) == "demo: 1.0 is locked and is not installed"


def test_a_distribution_installed_twice_is_named_with_both_folders(prefix: Path) -> None:
    install(prefix, "demo", "1.0.0", {})  # the same version, so only the second folder tells
    findings = found(check_distributions(prefix))
    assert findings.startswith("demo: installed 2 times")
    assert "demo-1.0.dist-info" in findings
    assert "demo-1.0.0.dist-info" in findings


def test_an_old_style_distribution_does_not_slip_past(prefix: Path) -> None:
    folder = prefix / SITE / "legacy-4.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Name: legacy\nVersion: 4\n")
    assert "legacy: 4 is installed and is not in the lock" in found(check_distributions(prefix))


def test_a_distribution_without_metadata_is_named(prefix: Path) -> None:
    (prefix / SITE / "demo-1.0.dist-info/METADATA").unlink()
    assert "demo-1.0.dist-info: has no metadata" in found(check_distributions(prefix))


@pytest.mark.parametrize(
    "text", [None, "", "# only a comment\n", "demo>=1.0\n", "demo==1.0\nrubbish here\n", "\xff"]
)
def test_a_lock_that_is_none_is_a_problem_of_usage(prefix: Path, text: str | None) -> None:
    lock = prefix / "share/rollout/requirements.lock"
    lock.unlink()
    if text is not None:
        lock.write_bytes(text.encode("latin-1"))
    with pytest.raises(Problem) as caught:
        verify.run(prefix)
    assert caught.value.code == 2
    assert str(lock) in caught.value.sentence


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.0", "1.0.0"),
        ("2026.06.17", "2026.6.17"),
        ("1.0-RC1", "1.0rc1"),
        ("1.0.c1", "1.0rc1"),
        ("1.0-1", "1.0.post1"),
        ("v1.0.alpha", "1.0a0"),
        ("2.9.0+CU-128", "2.9.0+cu.128"),
    ],
)
def test_spellings_of_one_version_are_equal(one: str, other: str) -> None:
    assert installed.same_version(one) == installed.same_version(other)


def test_a_claim_of_the_catalog_that_does_not_hold_is_named(prefix: Path) -> None:
    lock = prefix / "share/rollout/requirements.lock"
    assert found(installed.distributions(prefix, lock, {"Demo": "1.0"})) == ""
    wrong = installed.distributions(prefix, lock, {"Demo": "1.1", "absent": "2"})
    said = found(wrong)
    assert "Demo: the catalog expects 1.1, installed is 1.0" in said
    assert "absent: the catalog expects 2, installed is none" in said
    assert wrong.metrics["unexpected"] == 2

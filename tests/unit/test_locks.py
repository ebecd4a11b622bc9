"""What `nox -s lock` promises: drift is shown, and a lock that breaks a claim is not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from images.locking import locks, resolution
from rollout.problem import Problem

from ..conftest import Checkout


def fresh(checkout: Checkout, monkeypatch: pytest.MonkeyPatch, text: str | None = None) -> Path:
    """An image whose lock resolves to its own text, or to another."""
    path = checkout.image().lock
    resolved = path.read_text() if text is None else text
    monkeypatch.setattr(resolution, "resolve", lambda _: resolved)
    return path


def test_a_fresh_lock_passes_the_check(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh(checkout, monkeypatch)
    assert locks.main(["vllm-0.12", "--check"]) == 0
    assert capsys.readouterr().out == "locks are what their inputs resolve to\n"


def test_a_drifted_lock_fails_the_check_with_a_diff_and_stays(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkout.image().lock.read_text()
    path = fresh(checkout, monkeypatch, before.replace("2.52.1", "2.53.0"))
    with pytest.raises(Problem, match="locks have drifted") as caught:
        locks.main(["vllm-0.12", "--check"])
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- lockfiles/verl-rollout/vllm-0.12.lock (committed)"
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert changed == ["-ray==2.52.1 \\", "+ray==2.53.0 \\"]
    assert path.read_text() == before


def test_a_resolution_that_breaks_a_claim_is_not_written(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkout.image().lock.read_text()
    path = fresh(checkout, monkeypatch, before.replace("torch==2.9.0", "torch==2.9.1"))
    with pytest.raises(Problem, match=r"expect\.torch' says 2\.9\.0, the lock has 2\.9\.1"):
        locks.main(["vllm-0.12"])
    assert path.read_text() == before


def test_a_resolution_is_written(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    text = checkout.image().lock.read_text().replace("2.52.1", "2.53.0")
    path = fresh(checkout, monkeypatch, text)
    assert locks.main(["vllm-0.12"]) == 0
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["dev", "vllm-cpu", "flash-attn"])
def test_what_is_no_image_is_locked_and_checked_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, resolve, text in (
        ("DEV_LOCK", "resolve_dev", "dev"),
        ("TESTED_LOCK", "resolve_tested", "vllm-cpu"),
        ("FLASH_LOCK", "resolve_flash", "flash-attn"),
    ):
        monkeypatch.setattr(resolution, path, tmp_path / f"{text}.lock")
        monkeypatch.setattr(resolution, resolve, lambda text=text: f"{text}\n")
    assert locks.main([name]) == 0
    assert [path.read_text() for path in tmp_path.iterdir()] == [f"{name}\n"], "it, and no other"
    assert locks.main([name, "--check"]) == 0
    (tmp_path / f"{name}.lock").write_text("older\n")
    with pytest.raises(Problem, match="locks have drifted"):
        locks.main([name, "--check"])
    assert f"+{name}\n" in capsys.readouterr().out


def test_drift_is_nothing_where_nothing_drifted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert "+x" in locks.drift(path, "x\n")
    path.write_text("x\n")
    assert locks.drift(path, "x\n") == ""

"""Whose something is: no running process is taken for one that ended, nor for another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from images.host import owner

HERE = owner.this()
NOBODY = 4194305  # more than the greatest process id of Linux


def test_an_owner_is_found_in_the_names_that_it_is_given() -> None:
    for name in (
        f"rollout-container-{HERE}-0123abcd",
        f"/nowhere/rollout-build-{HERE}",
        f".x.{HERE}",
    ):
        assert owner.parse(name) == HERE
    for name in ("rollout-mine", "rollout-1234-x", f"a{HERE}", f"{HERE}0a", ".x.4711"):
        assert owner.parse(name) != HERE


def test_a_running_process_is_alive_and_one_that_ended_is_not() -> None:
    assert not owner.dead(HERE)
    program = "from images.host import owner; print(owner.this(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdin
        other = owner.parse(process.stdout.readline())
        assert other is not None and other.process == process.pid
        assert not owner.dead(other)
        process.stdin.close()
        for _ in range(100):  # first a zombie that nobody has waited for, which does nothing more
            if owner.dead(other):
                break
            time.sleep(0.05)
        assert owner.dead(other)
    assert owner.dead(other)


def test_a_number_that_another_process_has_got_since_is_not_taken_for_it() -> None:
    assert owner.dead(replace(HERE, start=HERE.start - 1))


def test_what_ran_before_this_boot_has_ended() -> None:
    assert owner.dead(replace(HERE, boot="0" * 8))


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, machine="0" * 8),
        replace(HERE, namespace=1),
        replace(HERE, machine="0" * 8, boot="1" * 8),
    ],
    ids=["another machine", "another container of this machine", "another machine's boot"],
)
def test_what_cannot_be_seen_from_here_counts_as_alive_for_a_week(other: owner.Owner) -> None:
    other = replace(other, process=NOBODY)
    assert not owner.dead(other)
    assert not owner.dead(other, owner.PATIENCE - 1)
    assert owner.dead(other, owner.PATIENCE + 1)


def test_a_machine_is_told_by_more_than_its_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert owner.this().machine != HERE.machine
    assert not owner.dead(HERE), "its numbers are not ours"


def test_a_process_whose_name_looks_like_its_state_is_read_right(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 ("
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as process:
        try:
            assert owner.started(process.pid) is not None
            assert owner.started(os.getpid()) == HERE.start
        finally:
            process.kill()


def test_a_file_is_abandoned_only_with_a_dead_owner_in_its_name(tmp_path: Path) -> None:
    dead = replace(HERE, process=NOBODY)
    foreign = replace(dead, machine="0" * 8)
    names = {f"rollout-x-{dead}-1": True, f"rollout-x-{HERE}-1": False, f".file.{dead}": True}
    names |= {"rollout-x-4194305-1": False, f"rollout-x-{foreign}-1": False}
    for name, abandoned in names.items():
        (tmp_path / name).touch()
        assert owner.abandoned(tmp_path / name) is abandoned, name
    old = time.time() - owner.PATIENCE - 60
    os.utime(tmp_path / f"rollout-x-{foreign}-1", (old, old))
    assert owner.abandoned(tmp_path / f"rollout-x-{foreign}-1")
    assert not owner.abandoned(tmp_path / f"rollout-gone-{dead}-1"), "somebody else was quicker"

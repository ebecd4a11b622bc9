"""What a node of a fleet does: runs the command as its container would, and always comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from images.catalog import ROOT
from rollout import errand

Say = Callable[[str], None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Puts a ``rollout`` on PATH: ``info`` answers, anything else runs this shell text."""

    def make(text: str) -> None:
        path = tmp_path / "bin/rollout"
        path.parent.mkdir()
        path.write_text(
            f'#!/bin/sh\n[ "$1" = info ] && {{ echo \'{{"ray": "2"}}\'; exit; }}\n{text}\n'
        )
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    return make


def test_the_report_the_code_and_the_identity_are_brought(
    command: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    command('echo "$1 $2 $3"; for last; do :; done; echo "{}" > "$last"; exit 3')
    monkeypatch.setenv("ROLLOUT_LAYERS", "sha256:a")
    found = errand.run(["smoke", "--only", "refit"], 20)
    assert (found["code"], found["report"], found["info"]) == (3, "{}\n", {"ray": "2"})
    assert (found["layers"], found["said"]) == ("sha256:a", "smoke --only refit\n")
    json.dumps(found)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    command: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errand, "KILLED", 0.2)
    command(
        f"trap '' TERM; sh -c 'trap \"\" TERM; sleep 60' & echo $! > {tmp_path}/pid; wait; wait"
    )
    begun = time.monotonic()
    found = errand.run(["verify"], 0.5)
    assert found["code"] is None and found["report"] is None
    assert time.monotonic() - begun < 20
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_command_ends_with_the_worker_that_started_it(command: Say, tmp_path: Path) -> None:
    """A driver that is interrupted has its workers killed: the GPU must become free."""
    command(
        f"trap 'echo ended > {tmp_path}/ended; exit' TERM; echo > {tmp_path}/up; sleep 30 & wait"
    )
    code = textwrap.dedent("""
        from rollout import errand
        errand.run(["smoke"], 60)
    """)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "entrypoints")}
    worker = subprocess.Popen([sys.executable, "-c", code], env=env)
    until(tmp_path / "up")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    until(tmp_path / "ended")


def until(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)


def test_without_a_command_rollout_the_node_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    found = errand.run(["smoke"], 1)
    assert (found["code"], found["info"]) == (2, {})
    assert "no command 'rollout'" in found["said"]


def test_the_variables_are_the_containers_with_the_gpus_of_ray(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/environ").write_bytes(b"PATH=/opt/rollout/bin\0CUDA_VISIBLE_DEVICES=0,1,2,3\0")
    worker = {"RAY_RAYLET_PID": "7", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "2,3"}
    expected = {"PATH": "/opt/rollout/bin", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert errand.surroundings(worker, tmp_path) == expected
    # A node that gave Ray no GPU has an empty list in the worker, and its own outside of it.
    found = errand.surroundings(worker | {"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert errand.surroundings(worker, tmp_path / "none") == worker

"""A real vLLM on the CPU, and what the checks of the proof say of it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from images.catalog import ROOT

from . import environment

RUNS = ("offline", "served", "pressed", "rounded")
TIMEOUT = 600.0  # seconds; a minute is usual
Found = dict[str, Any]


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The environment that has vLLM."""
    try:
        return environment.made()
    except environment.Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def told(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What was found in each run; all of them at once, for each start is slow."""
    folder = tmp_path_factory.mktemp("engine")
    with ThreadPoolExecutor() as pool:
        runs = {which: pool.submit(_run, which, prefix, folder) for which in RUNS}
        return {which: run.result() for which, run in runs.items()}


@pytest.fixture(scope="session")
def offline(told: dict[str, Found]) -> Found:
    """What was found on one engine."""
    return told["offline"]


@pytest.fixture(scope="session")
def served(told: dict[str, Found]) -> Found:
    """What was found on one server."""
    return told["served"]


@pytest.fixture(scope="session")
def pressed(told: dict[str, Found]) -> Found:
    """What was found on one engine of many requests at once."""
    return told["pressed"]


@pytest.fixture(scope="session")
def rounded(told: dict[str, Found]) -> Found:
    """What was found on one engine with keys and values in 8 bits."""
    return told["rounded"]


def _run(which: str, prefix: Path, folder: Path) -> Found:
    home = folder / which
    home.mkdir()
    found, log, server = home / "found.json", home / "log", home / "server.log"
    variables = {
        "PATH": f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT / 'entrypoints'}:{ROOT}",
        "HOME": str(home),
        "USER": "rollout",
        "LANG": "C.UTF-8",
        "ROLLOUT_PREFIX": str(prefix),
        "ROLLOUT_ENGINE_LOG": str(server),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Several engines at once, which would both be bound to the first core.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ten messages between its processes are reserved in /dev/shm; a container has 64 MiB of it.
        "VLLM_MQ_MAX_CHUNK_BYTES_MB": "1",
        # What is freed is given back at once, so that memory which grows is memory that is kept.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [str(prefix / "bin" / "python"), "-m", "tests.engine.trainer", which, str(found)]
    # Not pytest's own folder, in which the paths of sockets would be too long.
    with log.open("w") as output, tempfile.TemporaryDirectory(prefix="engine-") as temporary:
        variables["TMPDIR"] = temporary
        code = subprocess.run(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT
        ).returncode
    text = "\n".join(path.read_text(errors="replace") for path in (log, server) if path.exists())
    assert code == 0, text[-8000:]
    answer: Found = json.loads(found.read_text())
    return answer

"""What `rollout info` promises: what the image is, at once, and without importing any of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout import info
from rollout.problem import Problem

IMAGE = {
    "reference": "verl-rollout:vllm-0.12",
    "backend": "vllm",
    "framework": "verl",
    "python": "3.11",
    "resolved_as_of": "2025-12-20",
    "engine": {"name": "vllm", "distribution": "vllm_engine"},
    "imports": ["torch", "vllm"],
}
LOCK = b"torch==2.9.0 \\\n    --hash=sha256:00\n"
VERSION = """\
from typing import Optional

__version__ = '2.9.0+cu128'
debug = False
cuda: Optional[str] = {cuda}
git_version = '0fabc3ba44823f257e70ce397d989c8de5e362c1'
hip: Optional[str] = None
"""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    site = tmp_path / "lib/python3.11/site-packages"
    for name in ("torch-2.9.0", "vLLM.engine-0.12.0", "torch_geometric-1.0", "ray-2.53.0"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text("raise SystemExit('torch was imported')\n")
    (site / "torch/version.py").write_text(VERSION.format(cuda="'12.8'"))
    (tmp_path / "share/rollout").mkdir(parents=True)
    (tmp_path / "share/rollout/image.json").write_text(json.dumps(IMAGE))
    (tmp_path / "share/rollout/requirements.lock").write_bytes(LOCK)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion_info = 3.11.2\n")
    return tmp_path


def test_the_facts_are_those_of_the_files(prefix: Path) -> None:
    assert info.facts(prefix) == {
        "reference": "verl-rollout:vllm-0.12",
        "backend": "vllm",
        "framework": "verl",
        "engine": {"name": "vllm", "version": "0.12.0"},
        "torch": "2.9.0",
        "cuda": "12.8",
        "python": "3.11.2",
        "ray": "2.53.0",
        "lock_sha256": hashlib.sha256(LOCK).hexdigest(),
        "resolved_as_of": "2025-12-20",
        "lacks": {},
    }


def test_what_the_framework_s_defaults_use_and_is_not_there_is_said(prefix: Path) -> None:
    lacks = {"flash-attn": "add a wheel", "ray": "it is there", "vllm_engine": "it is, too"}
    path = prefix / "share/rollout/image.json"
    path.write_text(json.dumps({**IMAGE, "lacks": lacks}))
    facts = info.facts(prefix)
    assert facts["lacks"] == {"flash-attn": "add a wheel"}
    assert info.text(facts).splitlines()[-1].split(maxsplit=1) == [
        "lacks",
        "flash-attn: add a wheel",
    ]
    assert info.lacking(facts["lacks"], ["Flash_Attn"]) == {}, "it was added"


def test_an_image_made_before_that_was_said_lacks_nothing(prefix: Path) -> None:
    path = prefix / "share/rollout/image.json"
    path.write_text(json.dumps({**IMAGE, "lacks": ["damaged"]}))
    assert info.facts(prefix)["lacks"] == {}


def test_the_framework_is_shown_with_its_release(prefix: Path) -> None:
    path = prefix / "share/rollout/image.json"
    framework = {"name": "verl", "distribution": "verl", "version": "0.7.1"}
    path.write_text(json.dumps({**IMAGE, "framework": framework}))
    lines = info.text(info.facts(prefix)).splitlines()
    assert ["framework", "verl", "0.7.1"] in [line.split() for line in lines]


def test_a_cpu_build_of_torch_has_no_cuda(prefix: Path) -> None:
    version = prefix / "lib/python3.11/site-packages/torch/version.py"
    version.write_text(VERSION.format(cuda="None"))
    assert info.facts(prefix)["cuda"] is None
    assert "none (CPU build)" in info.text(info.facts(prefix))


def test_on_a_release_image_its_own_packages_are_told_too(prefix: Path) -> None:
    there = {"torch": "2.10.0a0+ours", "ray": "2.49", "vllm-engine": "0.12.0"}
    given = {"versions": there, "torch": {"cuda": "13.1"}}
    (prefix / "lib/python3.11/site-packages/torch-2.9.0.dist-info").rmdir()
    (prefix / info.RELEASE).write_text(json.dumps(given))
    found = info.facts(prefix)
    assert (found["torch"], found["cuda"], found["ray"]) == ("2.10.0a0+ours", "13.1", "2.53.0")
    (prefix / info.RELEASE).write_text("{")
    with pytest.raises(Problem, match=r"release\.json cannot be read"):
        info.facts(prefix)


def test_the_lock_is_identified_by_every_byte(prefix: Path) -> None:
    before = info.lock_sha256(prefix)
    (prefix / info.LOCK).write_bytes(LOCK + b"\n")
    assert info.lock_sha256(prefix) != before


def test_what_is_not_installed_is_said(prefix: Path) -> None:
    for folder in (prefix / "lib/python3.11/site-packages").glob("*.dist-info"):
        folder.rmdir()
    facts = info.facts(prefix)
    assert facts["torch"] is None
    assert facts["engine"] == {"name": "vllm", "version": None}
    assert "vllm (not installed)" in info.text(facts)
    assert facts["ray"] is None
    assert any(line.split() == ["Ray", "none"] for line in info.text(facts).splitlines())


def test_the_table_has_every_fact(prefix: Path) -> None:
    text = info.text(info.facts(prefix))
    for fact in ("verl-rollout:vllm-0.12", "vllm 0.12.0", "2.9.0", "12.8", "3.11.2", "2025-12-20"):
        assert fact in text
    assert any(line.split() == ["Ray", "2.53.0"] for line in text.splitlines())
    assert hashlib.sha256(LOCK).hexdigest() in text


def test_the_facts_are_json(prefix: Path) -> None:
    assert json.loads(json.dumps(info.facts(prefix))) == info.facts(prefix)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff\xfe"])
def test_an_unreadable_image_json_is_a_problem_of_usage(
    prefix: Path, content: bytes | None
) -> None:
    (prefix / info.IMAGE).unlink()
    if content is not None:
        (prefix / info.IMAGE).write_bytes(content)
    with pytest.raises(Problem) as caught:
        info.facts(prefix)
    assert caught.value.code == 2
    assert "image.json" in caught.value.sentence


def test_a_missing_lock_is_a_problem_of_usage(prefix: Path) -> None:
    (prefix / info.LOCK).unlink()
    with pytest.raises(Problem, match=r"requirements\.lock") as caught:
        info.facts(prefix)
    assert caught.value.code == 2


def test_it_takes_milliseconds_with_many_distributions(prefix: Path) -> None:
    site = prefix / "lib/python3.11/site-packages"
    for number in range(500):
        (site / f"filler{number}").mkdir()
        (site / f"filler{number}-1.0.dist-info").mkdir()
    best = min(_seconds(prefix) for _ in range(5))
    assert best < 0.05


def _seconds(prefix: Path) -> float:
    started = time.perf_counter()
    info.facts(prefix)
    return time.perf_counter() - started


def test_it_imports_neither_the_engine_nor_a_scan_of_all_metadata(prefix: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rollout import info;"
        "info.text(info.facts(Path(sys.argv[1])));"
        "print(sorted({'torch', 'importlib.metadata', 'email'} & set(sys.modules)))"
    )
    package = str(Path(info.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code, str(prefix)],
        env={"PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_the_prefix_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLOUT_PREFIX", raising=False)
    assert info.prefix() == Path("/opt/rollout")
    monkeypatch.setenv("ROLLOUT_PREFIX", "/somewhere")
    assert info.prefix() == Path("/somewhere")

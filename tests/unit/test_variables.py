"""A variable that the engine does not read is refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from images import catalog
from images.building import variables
from rollout.problem import Problem


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An engine that reads two variables, one of them in a folder of its own."""
    for name, text in {
        "vllm/envs.py": 'environ = {"VLLM_LOGGING_LEVEL": 1}\n',
        "vllm/v1/worker.py": "os.getenv('VLLM_DEEP')\n",
        "vllm/notes.txt": "VLLM_IN_NOTES_ALONE\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def image(**env: str) -> catalog.Image:
    found = catalog.find("verl-rollout:vllm-0.12", catalog.load())
    return structs.replace(found, env=env)


def test_what_the_engine_reads_and_what_is_not_its_own_is_no_finding(site: Path) -> None:
    used = image(VLLM_LOGGING_LEVEL="ERROR", VLLM_DEEP="1", NCCL_DEBUG="WARN", HF_HOME="/x")
    assert variables.unread(used, site) == []
    variables.check(used, site)


@pytest.mark.parametrize("name", ["VLLM_USE_V1", "VLLM_LOGGING", "VLLM_IN_NOTES_ALONE"])
def test_what_no_file_of_the_engine_reads_is_an_error_that_names_the_key(
    site: Path, name: str
) -> None:
    """Of an older version, a part of a name, or of a text that nobody runs."""
    with pytest.raises(Problem) as caught:
        variables.check(image(**{name: "1"}), site)
    assert caught.value.code == 2
    assert "images/catalog/verl-rollout/vllm-0.12.toml: key 'env." + name in caught.value.sentence
    assert "vllm==0.12.0" in caught.value.sentence


def test_where_the_engine_is_not_fetched_nothing_is_said(tmp_path: Path) -> None:
    assert variables.unread(image(VLLM_NONE="1"), tmp_path) == []

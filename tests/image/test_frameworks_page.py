"""The commands of docs/frameworks.md that train, read by the framework's own configuration.

``--cfg job`` reads every argument and starts nothing, so neither GPU nor data is needed. An image
that is not built here is skipped with the command that builds it.
"""

from __future__ import annotations

import subprocess

import pytest

from images.building.buildah import Buildah
from images.building.builder import Command
from images.catalog import ROOT

from ..pages import commands
from .conftest import built_here

pytestmark = pytest.mark.image

PAGE = ROOT / "docs" / "frameworks.md"
TRAINERS = ("verl.trainer.main_ppo", "verl.trainer.main_generation_server")


def documented() -> list[tuple[str, list[str]]]:
    """Image and command of whatever the page says in full and starts by docker."""
    found = []
    for words in commands(PAGE.read_text(encoding="utf-8")):
        image = next((n for n, word in enumerate(words) if word.startswith("verl-rollout:")), None)
        if image is not None and set(TRAINERS) & set(words) and "…" not in words:
            found.append((words[image], words[image + 1 :]))
    return found


def test_the_page_has_a_whole_command_for_each_trainer() -> None:
    shown = {word for _, words in documented() for word in words} & set(TRAINERS)
    assert shown == set(TRAINERS)


@pytest.mark.parametrize(
    ("reference", "words"), documented(), ids=[words[2] for _, words in documented()]
)
def test_the_framework_understands_what_the_page_says(
    tool: Buildah, reference: str, words: list[str]
) -> None:
    """Control: an argument that it has not is refused."""
    built_here(tool, reference)

    with tool.container(tool.local + reference) as container:

        def read(*arguments: str) -> subprocess.CompletedProcess[str]:
            asked = Command(reference, ["rollout", *words, *arguments, "--cfg", "job"])
            argv = tool.run_argv(asked, container)
            return subprocess.run(argv, capture_output=True, text=True, check=False)

        done = read()
        assert done.returncode == 0, done.stdout + done.stderr
        given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
        assert f"n_gpus_per_node: {given['trainer.n_gpus_per_node']}" in done.stdout
        assert read("trainer.no_such_argument=1").returncode != 0

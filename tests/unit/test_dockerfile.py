"""The one Dockerfile: each image has the steps of its own layers, and what the catalog says."""

from __future__ import annotations

import re

import pytest

from images import catalog
from images.building import build, dockerfile, layering, pinned
from images.catalog import ROOT, Image
from images.locking import lock
from rollout.problem import Problem

from ..conftest import Checkout

COMMITTED = (ROOT / "images/recipes/Dockerfile").read_text(encoding="utf-8")
STEPS = """\
# base ── torch ── engine
ARG BASE
FROM ${BASE}

# Rendered for each layer. Why.
ARG LAYER
RUN --mount=x \\
    sh /mnt/context/install layer

# Rendered behind the layer torch, whose files it names.
ENV TORCH_HOME=/x

ARG ENTRYPOINTS
RUN sh entrypoints

USER 1
"""


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.reference)
def test_every_layer_of_an_image_has_its_step_in_the_order_of_the_layers(image: Image) -> None:
    locked = lock.read(image)
    text = build.recipe_text(image, locked)
    steps = re.findall(r"(?m)/mnt/context/(?:install )?(\w+)$", text)[:-1]
    assert ["base", *steps, "entrypoints"] == layering.layer_names(image, locked)
    assert re.findall(r"(?m)^ARG (\w+)$", text)[1:-1] == [step.upper() for step in steps]
    assert pinned.dockerfile(text) == []
    assert ("CUDA_HOME" in text) == ("toolchain" in steps)


def test_a_step_is_rendered_for_each_layer_and_told_once() -> None:
    text = dockerfile.steps(STEPS, ["torch", "engine"])
    assert text == (
        "# base ── torch ── engine\nARG BASE\nFROM ${BASE}\n\n"
        "# Rendered for each layer. Why.\n"
        "ARG TORCH\nRUN --mount=x \\\n    sh /mnt/context/install torch\n\n"
        "# Rendered behind the layer torch, whose files it names.\nENV TORCH_HOME=/x\n\n"
        "ARG ENGINE\nRUN --mount=x \\\n    sh /mnt/context/install engine\n\n"
        "ARG ENTRYPOINTS\nRUN sh entrypoints\n\nUSER 1\n"
    )


def test_what_belongs_to_a_layer_is_in_no_image_without_it() -> None:
    """It would name files that are not there."""
    text = dockerfile.steps(STEPS, ["engine"])
    assert "TORCH_HOME" not in text
    assert re.findall(r"install (\w+)", text) == ["engine"]


def test_a_layer_with_a_step_of_its_own_has_that_one_and_no_other_image_has_it() -> None:
    own = "# Rendered for the layer python. Why.\nARG PYTHON\nRUN sh python\n\n"
    text = STEPS.replace("# Rendered for each", own + "# Rendered for each")
    assert dockerfile.steps(text, ["torch"]) == dockerfile.steps(STEPS, ["torch"])
    assert dockerfile.steps(text, ["python", "torch"]) == dockerfile.steps(
        STEPS, ["torch"]
    ).replace("# Rendered for each", own + "# Rendered for each")


@pytest.mark.parametrize("count", [0, 2])
def test_a_dockerfile_without_the_one_step_is_one_sentence(checkout: Checkout, count: int) -> None:
    """Else an image would be built of nothing."""
    image = checkout.image()
    step = "# Rendered for each layer.\nARG LAYER\nRUN x\n\n"
    image.dockerfile.write_text("ARG BASE\nFROM ${BASE}\n\n" + count * step + "USER 1\n")
    with pytest.raises(Problem) as caught:
        build.recipe_text(image, lock.read(image))
    assert caught.value.code == 2
    assert caught.value.sentence.startswith("images/recipes/Dockerfile: it needs one paragraph")


def test_what_decides_the_layers_below_are_neither_comments_nor_the_last_step() -> None:
    below = dockerfile.below(STEPS)
    assert "ENTRYPOINTS" not in below
    assert "#" not in below
    assert dockerfile.below(STEPS.replace("Why.", "Otherwise.")) == below
    assert dockerfile.below(STEPS.replace("sh entrypoints", "sh other")) == below
    assert dockerfile.below(STEPS.replace("USER 1", "USER 2")) != below


def test_variables_and_labels_are_one_instruction_each_behind_the_dockerfile() -> None:
    text = dockerfile.stamped("FROM x\n\n\n", {"B": "2", "A": "1"}, {"l": "3", "k": "4"})
    assert text == 'FROM x\n\nENV A="1" \\\n    B="2"\n\nLABEL k="4" \\\n    l="3"\n'


def test_nothing_to_set_is_no_instruction() -> None:
    assert dockerfile.stamped("FROM x", {}, {}) == "FROM x\n"


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("a b", r'"a b"'),
        ('{"a": 1}', r'"{\"a\": 1}"'),
        ("back\\slash", r'"back\\slash"'),
        ("it's # no comment", '"it\'s # no comment"'),
        ("", '""'),
        ("ZÜRICH", '"ZÜRICH"'),  # Docker knows no \u
    ],
)
def test_a_value_reaches_the_image_as_the_catalog_has_it(value: str, quoted: str) -> None:
    assert dockerfile.stamped("FROM x", {"A": value}, {}) == f"FROM x\n\nENV A={quoted}\n"


def test_the_committed_one_is_shown_as_it_is_built(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    image = checkout.image()
    image.dockerfile.write_text(COMMITTED)
    assert build.main(["vllm-0.12", "--show"]) == 0
    assert capsys.readouterr().out == build.recipe_text(image, lock.read(image))

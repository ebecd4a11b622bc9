"""What recorded layers say of those that were built."""

from __future__ import annotations

import pytest

from images import layers
from images.layers import Record
from rollout.problem import Problem

from ..conftest import Checkout

RECORD = Record("inputs", ("sha256:a", "sha256:b", "sha256:c"))


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        (None, "no layers are recorded for this image"),
        (
            Record("others", RECORD.diff_ids),
            "the recorded layers are of other inputs, so there is nothing to compare",
        ),
        (RECORD, "the layers are the recorded ones, byte for byte"),
        (
            Record("inputs", ("sha256:a", "sha256:x", "sha256:y")),
            "NOT the recorded layers: layer 2, 3 differs, from the same inputs; that is a bug",
        ),
        (
            Record("inputs", RECORD.diff_ids[:2]),
            "NOT the recorded layers: the number of layers differs, from the same inputs; "
            "that is a bug",
        ),
    ],
    ids=["none", "other inputs", "same", "different", "fewer"],
)
def test_layers_are_compared_only_where_that_says_something(
    expected: Record | None, sentence: str
) -> None:
    assert layers.compare(expected, RECORD) == sentence


def test_a_record_lies_beside_the_lock_and_says_how_it_is_made(checkout: Checkout) -> None:
    image = checkout.image()
    assert layers.read(image) is None
    layers.write(image, RECORD)
    assert layers.read(image) == RECORD
    path = checkout.root / "lockfiles/verl-rollout/vllm-0.12.layers"
    assert layers.path(image) == path
    assert "nox -s prove -- verl-rollout:vllm-0.12 --keep" in path.read_text()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"inputs": "x"}', '{"diff_ids": []}', '{"inputs": "", "diff_ids": 1}'],
)
def test_a_malformed_record_is_named_with_the_command_that_remakes_it(
    checkout: Checkout, text: str
) -> None:
    image = checkout.image()
    layers.path(image).write_text(text)
    with pytest.raises(Problem) as caught:
        layers.read(image)
    assert caught.value.code == 2
    assert caught.value.sentence == (
        "lockfiles/verl-rollout/vllm-0.12.layers is malformed; "
        "remake it with 'nox -s prove -- verl-rollout:vllm-0.12 --keep'"
    )

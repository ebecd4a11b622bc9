"""What the README's table promises: it is of today, and an old proof is not shown as one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from images import build, docs, layers, lock, prove
from images.catalog import Image
from images.problem import Problem

from ..conftest import VERSIONS, Checkout

DIFF_IDS = ("sha256:a", "sha256:b")
README = f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n"
PROVED = "[proved](images/proofs/verl-rollout/vllm-0.12.json) on a GPU, 2026-01-02"


@pytest.fixture
def image(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image with a fresh proof."""
    monkeypatch.setattr(build, "base_name", lambda: "base:1")
    found = checkout.image()
    keep(found)
    layers.write(found, layers.Record(build.inputs(found), DIFF_IDS))
    return found


def keep(image: Image, **changes: Any) -> None:
    """Keep a report of the image as it is now."""
    data = {
        "lock_sha256": lock.digest(image.lock),
        "layers": list(DIFF_IDS),
        "verdict": "proved",
        "device": "a GPU",
        "started": "2026-01-02T03:04:05Z",
    }
    lock.write(prove.kept(image), json.dumps(data | changes))


def test_a_fresh_proof_is_shown_with_device_and_day(image: Image) -> None:
    assert docs.standing(image) == PROVED


def test_an_image_without_a_report_is_not_proved_yet(image: Image) -> None:
    prove.kept(image).unlink()
    assert docs.standing(image) == "not proved yet"


def stale_by_lock(image: Image) -> None:
    keep(image, lock_sha256="0" * 64)


def stale_by_layers(image: Image) -> None:
    keep(image, layers=[DIFF_IDS[0], "sha256:x"])


def stale_by_inputs(image: Image) -> None:
    image.dockerfile.write_text("FROM scratch\n")


def stale_by_nothing_to_compare_with(image: Image) -> None:
    layers.path(image).unlink()


@pytest.mark.parametrize(
    "age",
    [stale_by_lock, stale_by_layers, stale_by_inputs, stale_by_nothing_to_compare_with],
    ids=lambda age: age.__name__,
)
def test_a_proof_of_another_lock_or_other_layers_is_stale(image: Image, age: Any) -> None:
    age(image)
    assert docs.standing(image) == f"stale: {PROVED}, for another lock or layers"


def test_a_row_says_what_the_lock_says(image: Image) -> None:
    assert docs.row(image, VERSIONS | {"torch": "2.9.0+cu128"}) == (
        f"| `verl-rollout:vllm-0.12` | vllm 0.12.0 | 2.9.0 | 12.8 | 3.11 | 2025-12-20 | {PROVED} |"
    )
    assert "| none (CPU) |" in docs.row(image, {"vllm": "0.12.0", "torch": "2.9.0+cpu"})


def test_the_table_has_a_row_for_each_image(checkout: Checkout, image: Image) -> None:
    lines = docs.table([image, checkout.image(tag="other")]).splitlines()
    assert len(lines) == 4
    assert "`verl-rollout:other`" in lines[3]
    assert {line.count("|") for line in lines} == {8}


# the README around it


def test_only_what_stands_between_the_markers_is_renewed() -> None:
    found = docs.renewed(README, "new")
    assert found == README.replace("old", "new")
    assert docs.renewed(found, "new") == found


@pytest.mark.parametrize(
    "text",
    [README.replace(docs.BEGIN, ""), README.replace(docs.END, ""), f"{docs.END}\n{docs.BEGIN}\n"],
    ids=["no beginning", "no end", "end before beginning"],
)
def test_lost_markers_are_said_with_what_to_do(text: str) -> None:
    with pytest.raises(Problem, match="README.md has lost its markers; put <!--") as caught:
        docs.renewed(text, "new")
    assert caught.value.code == 2


def test_a_stale_readme_fails_the_check_and_stays(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    docs.README.write_text(README)
    with pytest.raises(Problem, match="table is not fresh .* run 'nox -s docs'") as caught:
        docs.main(["--check"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "\n-old\n" in out
    assert f"\n+| `{image.reference}` |" in out
    assert docs.README.read_text() == README


@pytest.mark.usefixtures("image")
def test_a_renewed_readme_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    docs.README.write_text(README)
    assert docs.main([]) == 0
    assert capsys.readouterr().out == "README.md renewed\n"
    assert docs.main(["--check"]) == 0
    assert PROVED in docs.README.read_text()

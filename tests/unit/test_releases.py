"""Which image is for which release of a framework."""

from __future__ import annotations

import pytest

from images.proving import proofs, standing
from images.proving.standing import Standing
from images.telling import releases

from ..conftest import ABOVE, Checkout


def test_every_release_of_the_catalog_stands_beside_its_image_the_newest_first(
    checkout: Checkout,
) -> None:
    rest = 'name = "verl", resolved-as-of = 2026-03-20, extra = "vllm"'
    old = f'{{ {rest}, version = "0.7.1", fits = ["0.7.0", "0.10.0"] }}'
    new = f'{{ {rest}, version = "0.9.1" }}'
    images = [
        checkout.image({"framework": old}, above=ABOVE),
        checkout.image({"framework": new}, tag="vllm-0.24"),
        checkout.image({"framework": None}, tag="plain"),
    ]
    lines = releases.table(images).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [
        ["verl 0.10.0", "`verl-rollout:vllm-0.12`"],
        ["verl 0.9.1", "`verl-rollout:vllm-0.24`"],
        ["verl 0.7.1", "`verl-rollout:vllm-0.12`"],
        ["verl 0.7.0", "`verl-rollout:vllm-0.12`"],
    ]
    assert cells[2][2:5] == ["vllm 0.12.0", "2.9.0", "12.8"]
    assert cells[2][5] == "it is in the image; the proof does not run it"
    assert "with its extra `vllm`" in cells[0][-1]


def test_a_release_is_said_to_be_run_where_the_proof_trains(checkout: Checkout) -> None:
    smoke = '{ sleep-levels = [1], refit = ["cuda-ipc"], training = true }'
    image = checkout.image({"smoke": smoke})
    assert image.framework
    said = releases.reason(image, image.framework, image.framework.version)
    assert said == "it is in the image, and the proof runs it"


def test_a_checkout_is_said_to_train_where_the_kept_proof_shows_it(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = 'name = "roll", version = "8eb27cc2", requirements = ["six"]'
    changes = {"framework": f"{{ {own}, resolved-as-of = 2026-03-20 }}"}
    image = checkout.image(changes, above=ABOVE)
    assert image.framework
    plain = "what it needs is in the image; its code comes as a checkout of this commit"
    worth = Standing(standing.PROVED, "")
    checks = [{"name": "start", "status": "passed"}]
    monkeypatch.setattr(proofs, "kept_report", lambda _: {"checks": checks})
    monkeypatch.setattr(standing, "judge", lambda *_: worth)
    assert releases.reason(image, image.framework, "8eb27cc2") == plain
    checks.append({"name": "training", "status": "passed"})
    said = releases.reason(image, image.framework, "8eb27cc2")
    assert said == f"{plain}, which trained in the kept proof"
    for other in (
        Standing(standing.STALE, ""),
        Standing(standing.PROVED, "", outgrown=("training",)),
    ):
        worth = other
        assert releases.reason(image, image.framework, "8eb27cc2") == plain


def test_a_cell_says_which_release_is_in_an_image_and_which_fit(checkout: Checkout) -> None:
    rest = 'name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20'
    given = f'{{ {rest}, fits = ["0.7.0", "0.8.0"] }}'
    assert releases.of(checkout.image({"framework": given}).framework) == (
        "verl 0.7.1 (fits 0.7.0, 0.8.0)"
    )
    assert releases.of(checkout.image({"framework": None}).framework) == "—"

"""A new image: one command writes its file, and the file is one of the catalog."""

from __future__ import annotations

import re

import pytest

from images import catalog
from images.catalog import Image
from images.locking import new
from rollout.problem import Problem

from ..conftest import Checkout


@pytest.fixture
def images(checkout: Checkout) -> list[Image]:
    for tag, release in (("vllm-0.12", "0.12.0"), ("vllm-0.24", "0.24.0"), ("vllm-1.2", "1.2.0")):
        checkout.file({"requirements": f'["vllm=={release}", "ray[default]>=2.41"]'}, tag)
    return catalog.load()


@pytest.mark.parametrize(
    ("release", "nearest"),
    [
        ("0.13", "0.12"),
        ("0.23", "0.24"),
        ("0.18", "0.12"),
        ("0.30", "0.24"),
        ("1.0", "1.2"),
        ("2", "1.2"),
    ],
)
def test_the_sibling_is_the_nearest_release_and_rather_an_older_one(
    images: list[Image], release: str, nearest: str
) -> None:
    assert new.sibling("vllm", release, images).tag == f"vllm-{nearest}"


@pytest.mark.usefixtures("images")
def test_a_new_file_is_an_image_of_its_release(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new.main(["other-rollout/vllm-0.13"]) == 0
    path = checkout.root / "images/catalog/other-rollout/vllm-0.13.toml"
    image = catalog.parse(path)
    assert image.reference == "other-rollout:vllm-0.13"
    assert image.requirements == ("vllm==0.13.0", "ray[default]>=2.41")
    assert image.framework
    assert image.resolved_as_of == image.framework.resolved_as_of
    first, *rest = path.read_text().splitlines()
    assert first.startswith(
        "# other-rollout:vllm-0.13: from verl-rollout:vllm-0.12. Read each line"
    )
    old = (checkout.root / "images/catalog/verl-rollout/vllm-0.12.toml").read_text().splitlines()
    assert len(rest) == len(old) - old[0].startswith("#")
    assert "nox -s lock -- other-rollout:vllm-0.13" in capsys.readouterr().out


@pytest.mark.usefixtures("images")
def test_a_file_that_is_there_is_left_alone(checkout: Checkout) -> None:
    path = checkout.root / "images/catalog/verl-rollout/vllm-0.12.toml"
    before = path.read_bytes()
    with pytest.raises(Problem, match=r"vllm-0.12.toml is there already; edit it") as caught:
        new.main(["verl-rollout/vllm-0.12"])
    assert caught.value.code == 2
    assert path.read_bytes() == before


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    "name",
    [
        "vllm-0.13",
        "a/b/vllm-0.13",
        "a/vllm",
        "a/vllm-x",
        "/vllm-0.13",
        "a/",
        "fragments/vllm-0.13",
        "a/vllm-0..1",
    ],
)
def test_another_name_is_one_sentence_and_writes_nothing(checkout: Checkout, name: str) -> None:
    before = sorted(checkout.root.rglob("*"))
    with pytest.raises(Problem, match=r"say it like verl-rollout/vllm-1\.0") as caught:
        new.main([name])
    assert caught.value.code == 2
    assert sorted(checkout.root.rglob("*")) == before


@pytest.mark.usefixtures("images")
def test_an_engine_without_a_sibling_is_told_what_there_is() -> None:
    with pytest.raises(Problem, match=r"no image of 'trtllm' to copy from; known engines are vllm"):
        new.main(["verl-rollout/trtllm-1.2"])


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.tag)
def test_every_committed_file_can_be_copied(image: Image) -> None:
    source = image.path.read_text(encoding="utf-8")
    found = new.text(source, image, "verl-rollout", "x-9.8", "9.8", "2026-01-02")
    assert found.count("resolved-as-of = 2026-01-02") == len(
        re.findall(r"(?m)^resolved-as-of", source)
    )
    if image.backend != "transformers":
        assert re.search(rf'"{image.engine}(\[[^]]*\])?==9\.8\.0"', found)

"""Debian packages that one image needs beside the base's: locked like those, on top of the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from images import catalog
from images.catalog import ROOT
from images.locking import base, locks, resolution
from rollout.problem import Problem

from ..conftest import Checkout

IMAGES = catalog.load()
WITH = [image for image in IMAGES if image.debian]


def test_only_an_image_that_asks_for_packages_has_a_lock_of_them() -> None:
    assert {image.debs for image in WITH} == set((ROOT / "lockfiles").rglob("*.debs"))
    assert WITH


@pytest.mark.parametrize("image", WITH, ids=lambda image: image.reference)
def test_it_is_the_base_and_what_it_asks_for_with_a_reason(image: catalog.Image) -> None:
    bottom, own = base.read(), base.read(image.debs)
    assert set(own.requested) == {*bottom.requested, *image.debian}
    assert set(bottom.debs) < set(own.debs), "every package of the base, to the byte"
    assert all(reason.strip() for reason in image.debian.values())
    assert not image.debian.keys() & base.reasons().keys(), "the base has it"
    assert base.stale(own, {**base.reasons(), **image.debian}) is None


def asking(checkout: Checkout) -> catalog.Image:
    checkout.image({"debian": '{ libmpi = "MPI" }'})
    return catalog.load()[0]


def test_it_is_locked_with_the_base_and_checked_with_it(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = asking(checkout)
    seen: list[tuple[str, Path, dict[str, str]]] = []

    def call(name: str) -> Any:
        def done(snapshot: str | None = None, lock: Path = base.LOCK, **given: Any) -> None:
            lock = lock if snapshot is None or name == "relock" else Path(snapshot)
            seen.append((name, lock, dict(given.get("more", {}))))

        return done

    monkeypatch.setattr(base, "relock", call("relock"))
    monkeypatch.setattr(
        base, "check", lambda lock=base.LOCK, **given: call("check")(None, lock, **given)
    )
    monkeypatch.setattr(resolution, "resolve", lambda of: of.lock.read_text(encoding="utf-8"))
    own = {"libmpi": "MPI"}
    assert locks.main(["base"]) == 0
    assert locks.main(["base", "--check"]) == 0
    assert seen == [
        (name, path, more)
        for name in ("relock", "check")
        for path, more in ((base.LOCK, {}), (image.debs, own))
    ]


def test_a_package_that_is_asked_for_and_not_locked_is_named(tmp_path: Path) -> None:
    text = base.LOCK.read_text(encoding="utf-8")
    path = tmp_path / "x.debs"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Problem, match="libmpi is asked for but not locked"):
        base.check(path, more={"libmpi": "MPI"})

"""``rollout smoke`` in the real image: it proves a sound engine, and each fault makes it fail."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from images import catalog
from images.catalog import Image
from images.proving import report_file
from rollout.faults import FAULTS
from rollout.smoke import available

from .conftest import Container, Sealed, lines

pytestmark = pytest.mark.image


def test_a_sound_image_is_proved_read_only_offline_by_any_uid_without_home(
    sealed: Sealed, image: Image
) -> None:
    done = sealed.run("rollout", "smoke", "--report", "/var/cache/rollout/report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((sealed.cache / "report.json").read_text())
    assert report_file.validate(data) == []
    assert data["verdict"] == "proved"
    assert [check["name"] for check in data["checks"]] == available(image.smoke.facts)
    assert not list(sealed.cache.glob("rollout-*")), "temporary files were left behind"


DEFAULT = catalog.find(catalog.DEFAULT, catalog.load())
SOUGHT = available(DEFAULT.smoke.facts)


# Found by a check that starts an engine of its own: what runs before it is shown by the sound run.
BY_ITSELF = ("long", "lora", "moe")


@pytest.mark.parametrize("fault", [name for name in FAULTS if FAULTS[name].found_by(SOUGHT)])
def test_every_injected_fault_fails_its_check(
    container: Callable[[], Container], fault: str
) -> None:
    here = container()
    path = here.root / "var/cache/rollout/report.json"
    check = FAULTS[fault].found_by(SOUGHT) or ""
    only = ("--only", check) if check in BY_ITSELF else ()
    report = ("--report", "/var/cache/rollout/report.json")
    done = here.run("rollout", "smoke", "--inject", fault, *only, *report)
    assert done.returncode == 1, done.stdout + done.stderr
    assert path.exists(), done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert report_file.validate(data) == []
    assert data["verdict"] == "failed"
    failed = {c["name"]: c["reason"] for c in data["checks"] if c["status"] == "failed"}
    assert list(failed) == [check]
    assert FAULTS[fault].reason in failed[check]
    assert any(line.startswith(check) and "failed" in line for line in lines(done))


def test_some_checks_alone_prove_no_image(container: Callable[[], Container]) -> None:
    done = container().run("rollout", "smoke", "--only", "generation")
    assert done.returncode == 3
    assert any(": unproved in " in line for line in lines(done))


def test_the_probe_keeps_its_margins(container: Callable[[], Container]) -> None:
    """Noise far below the bound, the loss of any single tensor at least tenfold above it."""
    done = container().run("/opt/rollout/bin/python", "-m", "rollout.calibrate")
    assert done.returncode == 0, done.stdout + done.stderr

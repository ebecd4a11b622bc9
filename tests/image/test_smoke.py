"""``rollout smoke`` in the real image: it proves a sound engine, and each fault makes it fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from images import catalog
from images.building.buildah import Buildah
from images.building.builder import Built
from images.catalog import Image
from images.proving import report_file
from rollout.faults import FAULTS
from rollout.smoke import available

from .conftest import Container, Result, Sealed, containers, lines

pytestmark = pytest.mark.image


DEFAULT = catalog.find(catalog.DEFAULT, catalog.load())
# What the default image has for whoever asks by name, and does not promise.
ASKED = "fp8-kv"
SOUGHT = [*available(DEFAULT.smoke.facts), ASKED]


# Found by a check that starts an engine of its own: what runs before it is shown by the sound run.
BY_ITSELF = ("long", "pressure", "lora", "fp8-kv", "moe")


def inject(here: Container, fault: str) -> tuple[Result, Path]:
    """A run with a fault, and where its report is to be."""
    check = FAULTS[fault].found_by(SOUGHT) or ""
    only = ("--only", check) if check in BY_ITSELF else ()
    report = ("--report", "/var/cache/rollout/report.json")
    done = here.run("rollout", "smoke", "--inject", fault, *only, *report)
    return done, here.root / "var/cache/rollout/report.json"


@pytest.fixture(scope="module")
def injected(
    request: pytest.FixtureRequest, tool: Buildah, built: Built
) -> Iterator[dict[str, Future[tuple[Result, Path]]]]:
    """The runs with a fault that are asked for: one for each core, since a run takes one."""
    tests = [item for item in request.session.items if item.parent is request.node]
    given = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    asked = [params["fault"] for params in given if "fault" in params]
    with containers(tool, built) as make, ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {fault: pool.submit(inject, make(), fault) for fault in asked}


# These run beside the runs with a fault, as a proof shares a machine with others.
beside = pytest.mark.usefixtures("injected")


@beside
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


@beside
def test_some_checks_alone_prove_no_image(container: Callable[[], Container]) -> None:
    done = container().run("rollout", "smoke", "--only", "generation")
    assert done.returncode == 3
    assert any(": unproved in " in line for line in lines(done))


@beside
def test_a_check_that_is_asked_for_by_name_passes_where_nothing_is_wrong(
    container: Callable[[], Container],
) -> None:
    done = container().run("rollout", "smoke", "--only", ASKED)
    assert done.returncode == 3, done.stdout + done.stderr
    assert any(line.startswith(ASKED) and "passed" in line for line in lines(done))


@beside
def test_the_probe_keeps_its_margins(container: Callable[[], Container]) -> None:
    """Noise far below the bound, the loss of any single tensor at least tenfold above it."""
    done = container().run("/opt/rollout/bin/python", "-m", "rollout.calibrate")
    assert done.returncode == 0, done.stdout + done.stderr


# Of many requests at once one fault is enough here: test_pressure_engine.py finds all of them in
# the same image, on one engine, whose start takes longer than the check.
ONE = "ignored-abort"
SHOWN = [
    name
    for name, fault in FAULTS.items()
    if fault.found_by(SOUGHT) and (fault.check != "pressure" or name == ONE)
]


@pytest.mark.parametrize("fault", SHOWN)
def test_every_injected_fault_fails_its_check(
    injected: dict[str, Future[tuple[Result, Path]]], fault: str
) -> None:
    done, path = injected[fault].result()
    check = FAULTS[fault].found_by(SOUGHT) or ""
    assert done.returncode == 1, done.stdout + done.stderr
    assert path.exists(), done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert report_file.validate(data) == []
    assert data["verdict"] == "failed"
    failed = {c["name"]: c["reason"] for c in data["checks"] if c["status"] == "failed"}
    assert list(failed) == [check]
    assert FAULTS[fault].reason in failed[check]
    assert any(line.startswith(check) and "failed" in line for line in lines(done))

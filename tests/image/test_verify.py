"""``rollout verify`` in the real image: it passes untouched, and finds what is not."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rollout import verify

from .conftest import Container, lines

pytestmark = pytest.mark.image
SITE = "opt/rollout/lib/python3.11/site-packages"


def test_an_untouched_image_passes_every_check(container: Callable[[], Container]) -> None:
    here = container()
    done = here.run("rollout", "verify", "--report", "/var/cache/rollout/report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((here.root / "var/cache/rollout/report.json").read_text())
    assert report["verdict"] == "proved"
    # This image has no framework, whose modules would be imported too.
    assert [c["name"] for c in report["checks"]] == verify.available({"framework": None})


def test_changed_added_and_removed_files_are_all_named(
    container: Callable[[], Container],
) -> None:
    here = container()
    flipped = {
        "source": f"{SITE}/transformers/__init__.py",
        "bytecode": f"{SITE}/torch/__pycache__/functional.cpython-311.pyc",
        "library": f"{SITE}/torch/lib/libtorch_python.so",
        "entrypoint": f"{SITE}/rollout/checks.py",
    }
    for path in flipped.values():
        with (here.root / path).open("r+b") as file:
            file.seek(-100, 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    (here.root / SITE / "torch/extra.py").write_text("x = 1\n")
    (here.root / SITE / "numpy/version.py").unlink()
    done = here.run("rollout", "verify")
    assert done.returncode == 1
    said = "\n".join(lines(done))
    for name in (*flipped.values(), f"{SITE}/torch/extra.py", f"{SITE}/numpy/version.py"):
        assert name.removeprefix("opt/rollout/") in said, name


def test_a_distribution_that_is_not_the_locked_one_is_named(
    container: Callable[[], Container],
) -> None:
    here = container()
    lock = here.root / "opt/rollout/share/rollout/requirements.lock"
    text = lock.read_text()
    assert "tqdm==" in text
    lock.write_text(text.replace("tqdm==", "tqdm==0.0."))
    done = here.run("rollout", "verify")
    assert done.returncode == 1
    assert any("tqdm" in line for line in lines(done))

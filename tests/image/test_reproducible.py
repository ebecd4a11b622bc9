"""The same bytes again, what differs is named, and no half-made image whatever ends a build."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from images import catalog, host
from images.building import builder, layering, layers
from images.building.buildah import Buildah
from images.catalog import ROOT
from images.host import leftovers
from images.proving import reproduce

pytestmark = pytest.mark.image
TAG = "verl-rollout:test-again"


@pytest.mark.usefixtures("tool")
def test_two_builds_from_nothing_give_the_recorded_image(image: catalog.Image) -> None:
    recorded = layers.read(image)
    assert recorded is not None
    command = [sys.executable, "-m", "images.proving.reproduce", catalog.DEFAULT]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    said = done.stdout.splitlines()
    if done.returncode == 3:  # no room for two builds
        pytest.skip(done.stderr.strip().removeprefix("error: "))
    assert done.returncode == 0, (*said[-20:], done.stderr[-2000:])
    same = "the layers are the recorded ones, byte for byte"
    level = f"R4 ({reproduce.MEANING['R4']}), claimed is {image.reproducible}; {same}"
    assert said[-1].startswith(f"{image.reference}: {level}")
    assert not list(host.scratch().glob("rollout-*")), "two builds leave nothing behind"


def outcome(own: Path, text: str, mode: int) -> reproduce.Outcome:
    """A small image in a storage of its own."""
    own.mkdir()
    (own / "storage.conf").write_text(reproduce.storage_conf(own), encoding="utf-8")
    file = own / "file"
    file.write_text(text)
    file.chmod(mode)
    script = (
        "set -e; name=$(buildah from scratch); "
        f"buildah copy --quiet $name {file} /opt/rollout/file; "
        f"buildah commit --quiet --rm --timestamp 0 $name {TAG}"
    )
    conf = {"CONTAINERS_STORAGE_CONF": str(own / "storage.conf")}
    subprocess.run(["sh", "-c", script], env={**os.environ, **conf}, check=True)
    with reproduce.variables(conf):
        built = Buildah().inspect(f"localhost/{TAG}")
    assert built is not None
    return reproduce.Outcome(built, 0.0, own)


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(
    ("text", "mode", "level", "said"),
    [
        ("one", 0o644, "R4", []),
        ("two", 0o644, "R1", ["opt/rollout/file: content (3 bytes each)"]),
        ("one", 0o600, "R2", ["opt/rollout/file: mode (644 and 600)"]),
    ],
    ids=["same", "content", "mode"],
)
def test_the_file_that_differs_in_a_real_layer_is_named(
    image: catalog.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    mode: int,
    level: str,
    said: list[str],
) -> None:
    monkeypatch.setattr(layering, "layer_names", lambda *_: ["only"])
    monkeypatch.setattr(type(image), "reference", TAG)
    one, two = (
        outcome(tmp_path / "one-own", "one", 0o644),
        outcome(tmp_path / "two-own", text, mode),
    )
    try:
        reached, lines = reproduce.compared(image, one, two, tmp_path)
    finally:
        leftovers.discard(tmp_path)
    assert reached == level
    assert [line.strip() for line in lines if not line.startswith("layer ")] == said


def test_a_killed_build_leaves_no_tag(
    tool: Buildah,
    built: builder.Built,  # noqa: ARG001 - the base and the packages are there
) -> None:
    subprocess.run(["buildah", "rmi", tool.local + TAG], check=False, capture_output=True)
    argv = [
        sys.executable,
        "-m",
        "images.building.build",
        catalog.DEFAULT,
        "--no-cache",
        "--tag",
        TAG,
    ]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    sign = "/mnt/context/install dependencies"
    seen = next((line for line in process.stdout if sign in line), "")
    assert seen, "the build ended before it could be killed"
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [Path("/proc", pid) for pid in file.read_text().split()]
    assert children, "the builder is one of them, in a group of its own"
    process.kill()
    process.communicate()
    for _ in range(100):
        if not any(child.exists() for child in children):
            break
        time.sleep(0.1)
    assert not any(child.exists() for child in children), "it goes on without who asked for it"
    assert tool.inspect(tool.local + TAG) is None

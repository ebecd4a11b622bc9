"""What publishing promises of a real image: what is pulled by digest is what was built and proved.

On loopback, with Debian's registry: published, checked from the registry alone, pulled into a
storage that never saw it, and verified there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import catalog, host
from images.building.buildah import Buildah
from images.building.builder import Built
from images.catalog import Image
from images.publishing import (
    keys,
    packing,
    proof,
    provenance,
    publication,
    tags,
    verify_published,
)
from images.publishing.published import Published
from images.publishing.registry import Registry
from rollout import report
from rollout.problem import Problem

from ..registry.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A registry on this machine, without TLS."""
    try:
        host.require("docker-registry", "skopeo", "zstd")
    except Problem as problem:
        pytest.skip(problem.sentence)
    found = Server(tmp_path / "registry").start()
    yield found
    found.kill()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[list[str]]:
    """buildah with a storage of its own, which is empty."""
    info = json.loads(host.run(["buildah", "info"], quiet=True).stdout)["store"]
    places = [*("--root", f"{tmp_path}/store"), *("--runroot", f"{tmp_path}/run")]
    found = ["buildah", *places, "--storage-driver", info["GraphDriverName"]]
    yield found
    for command in (["rm", "--all"], ["rmi", "--all", "--force"]):
        subprocess.run([*found, *command], check=False, capture_output=True)


def test_what_is_pulled_by_digest_is_the_image_that_was_built_and_verifies(
    image: Image,
    tool: Buildah,
    built: Built,
    server: Server,
    storage: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(packing, "store", lambda: tmp_path / "layers")
    keys.new(tmp_path / "key")
    key = keys.read(tmp_path / "key")
    # These tests run in checkouts that somebody works on.
    commit = provenance.checkout_commit().removesuffix(provenance.DIRTY)
    monkeypatch.setattr(provenance, "checkout_commit", lambda: commit)
    registry = Registry(f"{server.address}/team")
    try:
        proof.passing(image, built.diff_ids)
        unproved = False
    except Problem:  # on a machine whose layers are not the recorded ones, or before its proof
        unproved = True
    publication.publish_image(image, tool, registry, key=key, unproved=unproved)
    tag = tags.of_image(image, unproved=unproved).moving
    digest = registry.resolve(image.repository, tag)
    assert digest

    given = Published(registry, image.repository, tag, key.public)
    checks = verify_published.verify(given, layers=True)
    found = {check.name: check.status for check in checks}
    assert found == dict.fromkeys(verify_published.CHECKS, "passed") | (
        {"report": "unproved"} if unproved else {}
    )

    root = f"{tmp_path}/store+{tmp_path}/run"
    name = "localhost/pulled:by-digest"
    driver = storage[storage.index("--storage-driver") + 1]
    source = f"docker://{registry.reference(image.repository, digest)}"
    target = f"containers-storage:[{driver}@{root}]{name}"
    host.run(["skopeo", "copy", "--quiet", "--src-tls-verify=false", source, target], quiet=True)
    inspected = json.loads(
        host.run([*storage, "inspect", "--type", "image", name], quiet=True).stdout
    )
    assert inspected["FromImageID"] == built.id
    assert inspected["FromImageDigest"] == digest
    host.run([*storage, "from", "--pull-never", "--name", "pulled", name], quiet=True)
    done = host.run(
        [*storage, "run", "--isolation", "chroot", "pulled", "--", "rollout", "verify"],
        quiet=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": proved in " in done.stdout

    capfd.readouterr()
    publication.publish_image(image, tool, registry, key=key, unproved=unproved)
    assert "nothing to do" in capfd.readouterr().out
    assert server.uploads() and max(server.uploads().values()) == 1
    assert report.verdict(checks, verify_published.names(layers=True)) == (
        "unproved" if unproved else "proved"
    )
    assert catalog.find(tag.removesuffix(catalog.UNPROVED), catalog.load()) == image

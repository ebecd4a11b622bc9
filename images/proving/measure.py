"""The numbers of docs/reproducing.md: measured on this machine, never typed.

``nox -s measure`` writes images/proofs/<repository>/<tag>.measured.json; ``nox -s docs`` makes the
table of it. Times are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import build, builder, builders, export, layers
from images.building.buildah import Buildah
from images.catalog import ROOT, Image, shown
from images.host import leftovers
from images.proving import proofs, reproduce
from rollout.problem import Problem

SITE = "/opt/rollout"
PAIRS = 5  # of cold build and bare install


def path(image: Image) -> Path:
    """Where the numbers of an image are kept."""
    return proofs.beside(image, "measured")


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# A step of a measurement: what it prints is kept, and its failure ends the measurement.
_run = partial(host.run, quiet=True)


def inside(tool: Buildah, built: builder.Built) -> dict[str, float]:
    """Start-up of ``rollout info``, and ``rollout verify`` beside a plain sha256 pass.

    All in one container, in turn, so that both read the same files from the same page cache.
    """
    found: dict[str, float] = {}
    with tool.container(built.id) as name:

        def once(*argv: str) -> float:
            command = tool.run_argv(builder.Command("", argv), name)
            return seconds(lambda: _run(command))

        empty = statistics.median(once("true") for _ in range(5))
        found["info_seconds"] = statistics.median(once("rollout", "info") for _ in range(5)) - empty
        plain = f"find {SITE} -type f -print0 | xargs -0 sha256sum > /dev/null"
        files = (
            f"from rollout import verify; from pathlib import Path; verify.files(Path('{SITE}'))"
        )
        python = f"{SITE}/bin/python"
        once("sh", "-c", plain)  # the page cache is warm from here on
        pairs = [(once("sh", "-c", plain), once(python, "-c", files)) for _ in range(3)]
        found["sha256sum_seconds"] = statistics.median(p for p, _ in pairs) - empty
        found["verify_files_seconds"] = statistics.median(f for _, f in pairs) - empty
        found["verify_seconds"] = once("rollout", "verify") - empty
    found["verify_speed"] = found["sha256sum_seconds"] / found["verify_files_seconds"]
    return found


def exported(image: Image, tool: Buildah, built: builder.Built) -> dict[str, float]:
    """Bytes of all files of the image in one zstd stream, as ``nox -s export`` writes them."""
    with leftovers.temporary("measure", build.BUILD) as folder:
        file = folder / "rootfs"
        export.rootfs(image, tool, built, file, layers.LEVEL)
        return {"export_bytes": float(file.stat().st_size)}


def cold_builds(image: Image, tool: Buildah) -> dict[str, float]:
    """The medians of some pairs of cold build and bare install, and the worst ratio of them.

    One pair does not do: on a machine that others share its ratio was 1.15 once and 1.61 once.
    """
    pairs = [cold_build(image, tool) for _ in range(PAIRS)]
    found = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    found["build_ratio_compiled_worst"] = max(pair["build_ratio_compiled"] for pair in pairs)
    return found


def cold_build(image: Image, tool: Buildah) -> dict[str, float]:
    """A build from empty caches beside ``uv pip install`` of the same lock into a bare venv.

    The bare install is timed with bytecode compiled, as the image has it, and without.
    """
    found: dict[str, float] = {}
    uv = host.uv()
    python = f"python{image.python}"
    for key, options in (("bare", []), ("bare_compiled", ["--compile-bytecode"])):
        with leftovers.temporary("measure") as folder:
            env = {**os.environ, **host.uv_environment(os.environ)}
            env["UV_CACHE_DIR"] = f"{folder}/cache"
            _run([uv, "venv", "--quiet", "--python", python, f"{folder}/venv"], env=env)
            argv = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", *options]
            argv += ["--python", f"{folder}/venv/bin/python", "--requirement", str(image.lock)]
            found[f"{key}_install_seconds"] = seconds(partial(_run, argv, env=env))
    found["base_seconds"] = seconds(lambda: build.base_image(tool, image, cache=False))
    tag = "verl-rollout:measured"
    with leftovers.temporary("measure") as folder:
        argv = build.command(image, "--tag", tag)
        # Files of wheels and what uv unpacked of them: an empty folder, an empty cache.
        env = {**os.environ, "UV_CACHE_DIR": f"{folder}/cache"}
        steps: list[tuple[float, str]] = []
        whole = seconds(lambda: steps.extend(_timed(argv, env)))
    _run(["buildah", "rmi", tool.local + tag])
    found["cold_build_seconds"] = whole - found["base_seconds"]
    found["steps_seconds"] = running(steps)
    compiled = found["bare_compiled_install_seconds"]
    found["build_ratio"] = found["cold_build_seconds"] / found["bare_install_seconds"]
    found["build_ratio_compiled"] = found["cold_build_seconds"] / compiled
    found["steps_ratio_compiled"] = found["steps_seconds"] / compiled
    return found


def _timed(argv: Sequence[str], env: Mapping[str, str]) -> list[tuple[float, str]]:
    """The lines that a command prints, each with the second at which it came."""
    with subprocess.Popen(
        argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        lines = [(time.perf_counter(), line.rstrip()) for line in process.stdout or ()]
    if process.returncode:
        raise Problem(f"the build failed: {lines[-1][1] if lines else 'no output'}")
    return lines


def running(lines: Sequence[tuple[float, str]]) -> float:
    """Seconds that a build's RUN steps took, without what buildah did to make layers of them.

    A step begins with its ``STEP n/m: RUN`` and ends with its last line before buildah's next: the
    layer (``-->``, which it does not always tell), another step, or ``COMMIT``.
    """
    whole, begun, last = 0.0, None, 0.0
    for second, line in lines:
        if begun is not None and line.startswith(("--> ", "STEP ", "COMMIT ")):
            whole, begun = whole + last - begun, None
        if re.match(r"STEP \d+/\d+: RUN ", line):
            begun = second
        last = second
    return whole


def proof_times(image: Image) -> dict[str, float]:
    """``prove`` from a fresh clone with empty image storage and warm package caches, and again.

    The clone is of the last commit; the tools are installed as the README's command does it.
    """
    with leftovers.temporary("measure") as folder:
        clone = folder / "clone"
        _run(["git", "clone", "--quiet", str(ROOT), str(clone)])
        storage = folder / "storage.conf"
        storage.write_text(reproduce.storage_conf(folder), encoding="utf-8")
        env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage)}
        command = (
            f"cd {clone} && {sys.executable} -m pip install --quiet --target build/tools "
            "--requirement lockfiles/dev.lock && PYTHONPATH=build/tools "
            f"{sys.executable} -m nox --session prove -- {image.reference}"
        )
        env.pop("PYTHONPATH", None)
        first = seconds(lambda: _run(["sh", "-c", command], env=env))
        second = seconds(lambda: _run(["sh", "-c", command], env=env))
    return {"prove_first_seconds": first, "prove_again_seconds": second}


def main(arguments: Sequence[str]) -> int:
    """``nox -s measure [-- REF]``."""
    parser = argparse.ArgumentParser(prog="nox -s measure --", description="Measure an image.")
    parser.add_argument("ref", nargs="?", default=catalog.DEFAULT, metavar="REF")
    given = parser.parse_args(list(arguments))
    image = catalog.find(given.ref, catalog.load())
    tool = builders.detect("buildah")
    assert isinstance(tool, Buildah)  # noqa: S101 - what detect("buildah") gives
    built = build.build(image, tool)
    data: dict[str, Any] = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "lock_sha256": host.sha256(image.lock),
    }
    steps: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("inside the image", lambda: inside(tool, built)),
        ("size of the export", lambda: exported(image, tool, built)),
    ]
    if "cuda" not in image.expect:  # those of a GPU image are in its proof
        steps += [
            ("cold build and bare install", lambda: cold_builds(image, tool)),
            ("prove from a fresh clone, and again", lambda: proof_times(image)),
        ]
    for name, step in steps:
        host.say(f"measuring: {name}")
        for key, value in step().items():
            data[key] = round(value, 3)
            host.say(f"  {key} = {data[key]}")
    host.write_json(path(image), data)
    host.say(f"{shown(path(image))}; 'nox -s docs' puts it into docs/reproducing.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

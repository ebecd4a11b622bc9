"""What every image promises before an engine starts: labels, user, caches, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from images import catalog, host
from images.building import build, builder, labels
from images.locking import lock

from .conftest import Container, Sealed

pytestmark = pytest.mark.image
SITE = "opt/rollout/lib/python3.11/site-packages"


def test_labels_say_what_is_inside(image: catalog.Image, built: builder.Built) -> None:
    locked = {entry.name: entry.version for entry in lock.read(image)}
    labels = built.config["Labels"]
    assert labels["org.opencontainers.image.title"] == image.reference
    assert labels["rollout.lock.sha256"] == host.sha256(image.lock)
    assert labels["rollout.engine.version"] == locked[image.engine]
    assert labels["rollout.torch"] == locked["torch"]
    assert labels["rollout.ray"] == locked.get("ray", "none")
    assert labels["org.opencontainers.image.version"].endswith(host.sha256(image.lock)[:8])


def test_the_user_is_not_root_and_a_bare_run_says_what_the_image_is(built: builder.Built) -> None:
    assert built.config["User"] == "1000:0"
    assert built.config["Entrypoint"] == ["rollout"]
    assert built.config["Cmd"] == ["info"]


def test_what_asks_for_the_gpu_is_there_where_there_is_cuda(
    image: catalog.Image, built: builder.Built
) -> None:
    env = dict(pair.split("=", 1) for pair in built.config["Env"])
    asked = {name: value for name, value in env.items() if name.startswith("NVIDIA_")}
    assert asked == (labels.GPU if "cuda" in image.expect else {})


def test_every_cache_lies_below_the_one_root(built: builder.Built) -> None:
    env = dict(pair.split("=", 1) for pair in built.config["Env"])
    caches = {k: v for k, v in env.items() if "CACHE" in k or k in ("HOME", "HF_HOME")}
    assert len(caches) >= 6
    assert all(Path(v).is_relative_to("/var/cache/rollout") for v in caches.values()), caches


def test_the_layers_come_from_slow_to_fast_changing(built: builder.Built) -> None:
    # base, torch, dependencies, engine, framework (pip), entrypoints
    assert len(built.diff_ids) == len(set(built.diff_ids)) == 6


def test_info_agrees_with_the_lock(
    image: catalog.Image, built: builder.Built, container: Callable[[], Container]
) -> None:
    facts = json.loads(container().run("rollout", "info", "--json").stdout)
    locked = {entry.name: entry.version for entry in lock.read(image)}
    assert facts["reference"] == image.reference
    assert facts["engine"] == {"name": image.backend, "version": locked[image.engine]}
    assert facts["torch"] == locked["torch"]
    assert facts["ray"] == locked.get("ray")
    assert facts["python"] == built.config["Labels"]["rollout.python"]
    assert facts["lock_sha256"] == host.sha256(image.lock)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("smoke", "--only", "generatoin"), "did you mean 'generation'?"),
        (("smoke", "--inject", "flipped-bite"), "did you mean 'flipped-byte'?"),
        (("smoke", "--model", "/nowhere"), "/nowhere"),
        (("smoke", "--report", "/nowhere/report.json"), "/nowhere/report.json"),
        (("smoke", "--cycles", "0"), "--cycles"),
        (("serve",), "no server of its own"),
        (("no-such-command",), "'no-such-command'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    container: Callable[[], Container], argv: tuple[str, ...], sentence: str
) -> None:
    done = container().run("rollout", *argv)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_anything_else_is_executed_as_given(container: Callable[[], Container]) -> None:
    done = container().run("rollout", "python3", "-c", "import sys; sys.exit(42)")
    assert done.returncode == 42


def test_the_image_holds_no_trace_of_the_host_that_built_it(
    built: builder.Built, container: Callable[[], Container]
) -> None:
    settings = host.uv_environment(os.environ)
    values = {v for k, v in settings.items() if len(v) > 8 and k != "SSL_CERT_FILE"}
    signs = {"indexes.env", "UV_FIND_LINKS", *values}
    config = json.dumps({"config": built.config}, default=str)
    assert not [sign for sign in signs if sign in config]
    root = container().root
    places = [root / p for p in ("etc", "opt/rollout/bin", "opt/rollout/share", "root", "home")]
    places += [
        root / "opt/rollout/pyvenv.cfg",
        root / SITE / "rollout",
    ]
    patterns = [part for sign in signs for part in ("-e", sign)]
    argv = ["grep", "-rIlF", *patterns, *map(str, places)]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert found.stdout == ""
    for folder in ("mnt", "tmp", "run/secrets", "var/cache/rollout", "root/.cache"):
        path = root / folder
        assert not path.exists() or not any(path.iterdir()), f"{folder} is not empty"
    # Neither the CA bundle of the host nor uv itself travelled along.
    assert not list(root.glob("opt/rollout/bin/uv*"))


def test_all_bytecode_ignores_time(container: Callable[[], Container]) -> None:
    """Flags 1: unchecked hash. Anything else holds the time of the build or is checked at start."""
    root = container().root
    compiled = list((root / "opt/rollout").rglob("*.pyc"))
    assert len(compiled) > 4000
    wrong = [p for p in compiled if p.read_bytes()[4:8] != b"\1\0\0\0"]
    assert not wrong, wrong[:3]


def test_nothing_in_the_image_is_newer_than_the_one_timestamp(
    container: Callable[[], Container],
) -> None:
    root = container().root
    late = [
        str(p)
        for part in ("opt", "etc", "usr/lib/python3.11")
        for p in (root / part).rglob("*")
        if p.lstat().st_mtime > build.TIMESTAMP
        and p.name not in ("hosts", "resolv.conf", "hostname")
    ]
    # The container itself touches /etc, not the image.
    assert not late, late[:5]


def test_a_jit_kernel_compiles_with_no_network_and_a_read_only_root(sealed: Sealed) -> None:
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: torch.sin(x) * 2 + x)\n"
        "x = torch.arange(64.0)\n"
        "assert torch.allclose(f(x), torch.sin(x) * 2 + x)\n"
    )
    done = sealed.run("rollout", "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert any(sealed.cache.rglob("*.so")), "nothing was compiled into the cache root"

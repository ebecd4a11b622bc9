"""The steps of a build reach nobody and spoil nothing: code of wheels runs there."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import host
from images.building import builder, isolation
from images.building.buildah import Buildah

pytestmark = pytest.mark.image

# Says whether it reaches a port of this host, what it is told of proxies, whether it finds a secret
# among its own variables or those of a process, and spoils the cache of packages.
ASKS = """\
import os, socket
from pathlib import Path
try:
    socket.create_connection(("127.0.0.1", {port}), 5).close()
    reached = "reached"
except OSError as error:
    reached = "alone"
proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
found = 0
for file in Path("/proc").glob("[0-9]*/environ"):
    try:
        found += b"xyzzy" in file.read_bytes()
    except OSError:
        pass
Path("/mnt/cache/wheel").write_text("spoiled")
print("ANSWER", reached, proxies, "secrets" if found else "none", flush=True)
"""


@pytest.fixture
def listening() -> Iterator[tuple[int, list[str]]]:
    """A port of this host, and who has come to it."""
    came: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            came.append(str(address))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1], came
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.mark.parametrize("apart", [True, False], ids=["as we build", "control"])
def test_a_step_reaches_nobody_finds_no_secret_and_spoils_no_package(
    tool: Buildah,
    built: builder.Built,
    listening: tuple[int, list[str]],
    tmp_path: Path,
    apart: bool,
) -> None:
    """Control: by buildah as it is, the same step does all of that."""
    port, came = listening
    context, cache, place = (tmp_path / name for name in ("context", "cache", "place"))
    for folder in (context, cache, place):
        folder.mkdir()
    (cache / "wheel").write_text("whole")
    (context / "ask.py").write_text(ASKS.format(port=port), encoding="utf-8")
    step = (
        "--mount=type=bind,target=/mnt/context --mount=type=bind,from=fetched,target=/mnt/cache,rw "
        "/opt/rollout/bin/python -I /mnt/context/ask.py"
    )
    text = f"FROM {built.id}\nUSER 0:0\nRUN {step}\n"
    (context / "Dockerfile").write_text(text, encoding="utf-8")
    given = isolation.view(place) if apart else cache
    name = "localhost/rollout-test-offline"
    recipe = builder.Recipe(context, name, 1, fetched=given, cache=False)
    argv = tool.build_argv(recipe, tmp_path / "id")
    env = {
        **os.environ,
        "http_proxy": "http://me:xyzzy@127.0.0.1:9",
        "UV_INDEX_A_PASSWORD": "xyzzy",
    }
    if apart:
        argv = isolation.command(argv, 0, cache, place)
        env = isolation.environment(env)
    else:
        argv.remove("--http-proxy=false")
    # A process of this host that knows a secret, as `nox -s build` itself does.
    knows = subprocess.Popen(["sleep", "600"], env={"SECRET": "xyzzy", "PATH": os.environ["PATH"]})
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    finally:
        knows.kill()
        knows.wait()
        host.run(["buildah", "rmi", recipe.name], quiet=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answer == ("ANSWER alone [] none" if apart else "ANSWER reached ['http_proxy'] secrets")
    assert len(came) == (0 if apart else 1)
    assert (cache / "wheel").read_text() == ("whole" if apart else "spoiled")

"""The steps of a build reach nobody: code of wheels may run there."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import host
from images.building import builder

pytestmark = pytest.mark.image

# Says whether it reaches a port of this host, and what it is told of proxies.
ASKS = """\
import os, socket
try:
    socket.create_connection(("127.0.0.1", {port}), 5).close()
    reached = "reached"
except OSError as error:
    reached = type(error).__name__
proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
secrets = [name for name, value in os.environ.items() if "xyzzy" in value]
print("ANSWER", reached, proxies, secrets, flush=True)
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


@pytest.mark.parametrize("isolated", [True, False], ids=["as we build", "control"])
def test_a_step_has_no_network_no_proxy_and_no_credentials(
    tool: builder.Buildah,
    built: builder.Built,
    listening: tuple[int, list[str]],
    tmp_path: Path,
    isolated: bool,
) -> None:
    """Control: by buildah as it is, the same step reaches this host and is told of the proxy."""
    port, came = listening
    context = tmp_path / "context"
    context.mkdir()
    (context / "ask.py").write_text(ASKS.format(port=port), encoding="utf-8")
    step = "--mount=type=bind,target=/mnt/context /opt/rollout/bin/python -I /mnt/context/ask.py"
    text = f"FROM {built.id}\nUSER 0:0\nRUN {step}\n"
    (context / "Dockerfile").write_text(text, encoding="utf-8")
    recipe = builder.Recipe(context, "localhost/rollout-test-offline", 1, cache=False)
    argv = tool.build_argv(recipe, tmp_path / "id")
    if not isolated:
        argv = [word for word in argv[argv.index("--") + 1 :] if word != "--http-proxy=false"]
    env = {
        **os.environ,
        "http_proxy": "http://me:xyzzy@127.0.0.1:9",
        "UV_INDEX_A_PASSWORD": "xyzzy",
    }
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    finally:
        host.run(["buildah", "rmi", recipe.name], quiet=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    if isolated:
        assert answer.endswith(" [] []")
        assert "reached" not in answer
        assert came == []
    else:
        assert answer == "ANSWER reached ['http_proxy'] ['http_proxy']"
        assert len(came) == 1

"""An engine's own HTTP server: its process, and the requests that a trainer sends it."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.backends import Completion, EngineError

HOST = "127.0.0.1"
TIMEOUT = 600.0  # seconds without an answer after which a server counts as hung
STOPPING = 60.0  # seconds that a server has to end by itself
LOG = "ROLLOUT_ENGINE_LOG"  # a file that keeps what an engine writes
_PR_SET_PDEATHSIG = 1


_given: set[int] = set()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now, and none that this gave before.

    Nobody listens on it either until an engine has started, so the kernel may give it twice.
    """
    while True:
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            port: int = listener.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of an engine's constructor as arguments of its command; False ones are left out."""
    argv: list[str] = []
    for name, value in options.items():
        if value is True:
            argv.append("--" + name.replace("_", "-"))
        elif value is not False:
            argv += ["--" + name.replace("_", "-"), str(value)]
    return argv


def log_file() -> Path:
    """Where an engine's own lines go: where the user wants them, or a file that is deleted."""
    named = os.environ.get(LOG)
    if named:
        return Path(named)
    with tempfile.NamedTemporaryFile(prefix="rollout-engine-", suffix=".log", delete=False) as file:
        return Path(file.name)


def discard(log: Path) -> None:
    """Delete what :func:`log_file` made, unless the user named it."""
    if LOG not in os.environ and log.is_file():
        log.unlink()


def last_error(log: Path) -> str:
    """The last line of a log that names an exception; empty where none does."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = [line.strip() for line in lines if line.split(":")[0].strip().endswith("Error")]
    return found[-1] if found else ""


class Server:
    """``rollout serve`` on a port of this machine; ends with this process, however that ends."""

    def __init__(self, argv: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        self.port = free_port()
        self.log = log
        self.answered: set[str] = set()
        libc = ctypes.CDLL(None)
        # The command that a user gives: it stands beside the environment's Python.
        rollout = str(Path(sys.executable).with_name("rollout"))
        command = [rollout, "serve", *argv, "--host", HOST, "--port", str(self.port)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,  # the terminal's Ctrl-C is for us to pass on
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    def wait(self, path: str) -> None:
        """Wait until the server answers a GET of this path with 200.

        Raises:
            EngineError: it ended, or did not within :data:`TIMEOUT`.
        """
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise EngineError(f"the server ended: {last_error(self.log) or 'without a word'}")
            with contextlib.suppress(EngineError):
                self.call(path)
                return
            time.sleep(0.2)
        raise EngineError(f"the server did not answer {path} for {TIMEOUT:.0f} s")

    @contextlib.contextmanager
    def _answer(self, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        """The answer of status 200, while it is read; the connection is closed then."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                data = json.dumps(body).encode()
                connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                said = response.read().decode("utf-8", "replace").strip().partition("\n")[0][:300]
                raise EngineError(f"the server answered {path} with {response.status}: {said}")
            self.answered.add(path.partition("?")[0])
            yield response
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise EngineError(f"the server did not answer {path}: {why}") from None
        finally:
            connection.close()

    def call(self, path: str, body: object = None) -> Any:
        """GET, or POST where there is a body; the answer as JSON, or its text.

        Raises:
            EngineError: no answer, or one with another status than 200.
        """
        with self._answer(path, body) as response:
            text = response.read().decode("utf-8", "replace")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def offers(self, path: str) -> bool:
        """Whether it has a path, by whatever method: what is to be posted refuses a GET with 405.

        Its own list (/openapi.json) can be switched off; this cannot.

        Raises:
            EngineError: no answer.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT)
        try:
            connection.request("GET", path)
            return connection.getresponse().status != 404
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise EngineError(f"the server did not answer {path}: {why}") from None
        finally:
            connection.close()

    def events(self, path: str, body: object) -> Iterator[Any]:
        """POST, and the server-sent events of the answer as JSON; closed, it hangs up.

        Raises:
            EngineError: the answer ended without its last word, as where a server dies.
        """
        with self._answer(path, body) as response:
            for line in response:
                data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if line.startswith(b"data:"):
                    yield json.loads(data)
        raise EngineError(f"the server broke off its answer to {path}")

    def stop(self) -> None:
        """End it with all that it started; harmless when called twice."""
        # As a terminal's Ctrl-C: at SIGTERM SGLang waits for requests, also for those it refused.
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPPING)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Remote:
    """An engine behind its own server: what of that is the same for every backend."""

    resuming = ""  # the path that ends a pause
    pauses = False  # whether the server has a pause, as it says once it has started
    _server: Server | None = None

    def _http(self) -> Server:
        if self._server is None:
            raise EngineError("the engine is not started")
        return self._server

    def resume(self) -> None:
        self._http().call(self.resuming, {})

    def endpoints(self) -> list[str]:
        """The paths that it answered, sorted."""
        return sorted(self._http().answered)


def interrupted(
    streams: Sequence[Iterator[Completion]], after: int, abort: Callable[[], object]
) -> list[Completion]:
    """Follow answers as they grow until each has ``after`` tokens, then abort all of them.

    A stream gives what there is of its answer so far, again and again. ``abort`` has the server end
    them; what it still sends is taken.

    Raises:
        EngineError: what any of them raised, or an answer without a token.
    """
    latest: list[Completion | None] = [None] * len(streams)
    errors: list[BaseException] = []
    enough = threading.Event()

    def follow(number: int) -> None:
        try:
            for answer in streams[number]:
                latest[number] = answer
                if all(other and len(other.tokens) >= after for other in latest):
                    enough.set()
        except BaseException as error:  # raised where it is waited for
            errors.append(error)
        finally:
            last = latest[number]
            if errors or last is None or len(last.tokens) < after:
                enough.set()

    threads = [threading.Thread(target=follow, args=(n,), daemon=True) for n in range(len(streams))]
    for thread in threads:
        thread.start()
    enough.wait(TIMEOUT)
    abort()
    for thread in threads:
        thread.join(STOPPING)
    if errors:
        raise EngineError(f"the server ended an answer: {errors[0]}")
    found = [answer for answer in latest if answer]
    if any(thread.is_alive() for thread in threads):
        raise EngineError("the server did not end an answer that was aborted")
    if len(found) < len(streams) or any(len(answer.tokens) < after for answer in found):
        raise EngineError(f"the server ended an answer before it had {after} tokens")
    return found

"""An HTTP server whose answers a test gives by path; it sends events in chunks, as uvicorn."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rollout.backends import served

HOST = "127.0.0.1"
CUT = "cut"  # an answer that breaks off: the connection ends where more was promised
Route = Callable[[Any], Any]  # from a body to (status, content), or to an iterator of events


class Site:
    """Started on a free port; ``calls`` are the requests in their order, ``hung_up`` who left."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.calls: list[tuple[str, Any]] = []
        self.hung_up: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.answer(self, None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                assert self.headers["Content-Type"] == "application/json"
                site.answer(self, json.loads(self.rfile.read(length)))

            def log_message(self, *_: object) -> None:
                """Nothing: the terminal is pytest's."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *request: Any) -> None:
                if not isinstance(sys.exception(), OSError):  # who asked may leave without a word
                    super().handle_error(*request)

        self._server = Quiet((HOST, 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        """What was asked for, without bodies."""
        return [path for path, _ in self.calls]

    def bodies(self, path: str) -> list[Any]:
        """What was sent to a path."""
        return [body for asked, body in self.calls if asked == path]

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.calls.append((handler.path, body))
        route = self.routes.get(handler.path.partition("?")[0])
        found = route(body) if route else (404, {"detail": "Not Found"})
        if isinstance(found, Iterator):
            self._stream(handler, found)
            return
        status, content = found
        text = content if isinstance(content, str) else json.dumps(content)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text.encode()) + (99 if text == CUT else 0)))
        handler.end_headers()
        handler.wfile.write(text.encode())
        handler.close_connection = text == CUT

    def _stream(self, handler: BaseHTTPRequestHandler, events: Iterator[Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

        def send(data: bytes) -> None:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        handler.close_connection = True
        try:
            for event in events:
                if event == CUT:
                    return
                send(b"data: " + json.dumps(event).encode() + b"\n\n")
            send(b"data: [DONE]\n\n")
            send(b"")
        except OSError:
            self.hung_up.append(handler.path)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Played(served.Server):
    """``rollout serve`` without a process: it stands at a site already."""

    site: Site
    made: list[Played]
    fails = ""  # its last words, or "no command"

    def __init__(self, argv: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        if self.fails == "no command":
            raise FileNotFoundError("rollout")
        self.argv, self.log, self.variables = list(argv), log, dict(variables)
        self.port = self.site.port
        self.ended = 0
        self.answered = set()
        self._process: Any = SimpleNamespace(poll=lambda: 1 if self.fails else None)
        if self.fails:
            log.write_text(f"{self.fails}\n")
        self.made.append(self)

    def stop(self) -> None:
        self.ended += 1


def played(site: Site, made: list[Played]) -> type[Played]:
    """Servers that stand at this site, kept in ``made``."""
    return type("Here", (Played,), {"site": site, "made": made})

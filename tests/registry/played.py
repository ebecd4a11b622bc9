"""Registries that Debian's is not, and a proxy: played, by answers that a test gives."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import MappingProxyType

from .server import HOST, Certificate


class Listener:
    """A server of this machine, on a port of its own, which leaves the terminal to pytest."""

    def __init__(
        self, handler: type[BaseHTTPRequestHandler], certificate: Certificate | None = None
    ) -> None:
        self._server = ThreadingHTTPServer((HOST, 0), handler)
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.file, certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.address = f"{HOST}:{self.port}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Played(Listener):
    """A registry of canned answers: path to (status, headers, body), or to a list of them.

    A status of 0 ends the connection without an answer.
    """

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[bytes] = []  # of all that was asked
        self.connections = 0
        played = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # a connection stays

            def setup(self) -> None:
                super().setup()
                played.connections += 1

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                played.bodies.append(self.rfile.read(length))
                played.asked.append((self.command, self.path, dict(self.headers)))
                queue = played.answers.get(self.path.partition("?")[0]) or [(404, {}, b"")]
                status, headers, body = queue.pop(0) if len(queue) > 1 else queue[0]
                # Its length may be another than it says.
                self.close_connection = not status or "Content-Length" in headers
                if not status:
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    with suppress(ConnectionError):  # it may be more than anybody wants
                        self.wfile.write(body)

            do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing."""

        super().__init__(Handler, certificate)


class Endless(Listener):
    """A registry whose answers do not end, and do not say how long they are."""

    def __init__(
        self, headers: Mapping[str, str] = MappingProxyType({}), status: int = 200
    ) -> None:
        self.sent = 0
        endless = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(ConnectionError):
                    while endless.sent < 1 << 30:
                        self.wfile.write(bytes(1 << 16))
                        endless.sent += 1 << 16

            def log_message(self, *_: object) -> None:
                """Nothing."""

        super().__init__(Handler)


class Proxy(Listener):
    """A proxy that takes every name for one of this machine; it notes who wants to go where."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                proxy.asked.append((self.path, self.headers.get("Proxy-Authorization", "")))
                self.send_response(200)
                self.end_headers()
                port = int(self.path.partition(":")[2])
                with socket.create_connection((HOST, port)) as there, suppress(ConnectionError):
                    ends = {self.connection: there, there: self.connection}
                    while True:
                        held = [e for e in ends if isinstance(e, ssl.SSLSocket) and e.pending()]
                        for end in held or select.select(list(ends), [], [])[0]:
                            data = end.recv(1 << 16)
                            if not data:
                                return
                            ends[end].sendall(data)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        super().__init__(Handler, certificate)

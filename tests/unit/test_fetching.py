"""What is fetched before a build: the locked bytes, with the host's credentials, and nothing runs.

With the real uv, against an index on this host that asks for a password.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from images import host
from images.building import context, fetching
from images.locking.lock import Locked
from rollout.problem import Problem
from tests.registry.server import Certificate

HOST = "127.0.0.1"
LOGIN = "Basic " + base64.b64encode(b"me:s3cret").decode()
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def said(text: str) -> str:
    """Hash and size of a file, as a RECORD says them."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256={digest.rstrip('=')},{len(text)}"


def wheel() -> bytes:
    """toy 1: with a file that would run as soon as an interpreter started beside it."""
    made = io.BytesIO()
    marker = "import os; open(os.environ['MARKER'], 'w')\n"
    files = {
        "toy.py": "VALUE = 1\n",
        "toy.pth": marker,
        "toy-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1\n",
        "toy-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["toy-1.dist-info/RECORD"] = "".join(f"{n},{said(t)}\n" for n, t in files.items())
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made.getvalue()


def sdist() -> bytes:
    """src 2: as source alone, whose setup.py would run where anything were built of it."""
    made = io.BytesIO()
    files = {
        "src-2/setup.py": "import os; open(os.environ['MARKER'], 'w')\n",
        "src-2/PKG-INFO": "Metadata-Version: 2.1\nName: src\nVersion: 2\n",
    }
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


FILES = {"toy-1-py3-none-any.whl": wheel(), "src-2.tar.gz": sdist()}


def sha256(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


TOY = Locked("toy", "1", sha256("toy-1-py3-none-any.whl"))
SRC = Locked("src", "2", sha256("src-2.tar.gz"))


class Index:
    """An index that asks for a password; its files may lie on another server."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.seen: list[tuple[str, str | None]] = []
        self.elsewhere = ""
        self.open = False
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                login = self.headers.get("Authorization")
                index.seen.append((self.path, login))
                allowed = index.open or login == LOGIN
                status, kind, body = index.answer(self.path) if allowed else (401, "", b"")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if status == 302:
                    self.send_header("Location", kind)
                elif kind:
                    self.send_header("Content-Type", kind)
                if status == 401:
                    self.send_header("WWW-Authenticate", 'Basic realm="toys"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: the terminal is pytest's."""

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.file, certificate.key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"{HOST}:{self.server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, str, bytes]:
        name = path.rstrip("/").rpartition("/")[2]
        if name in FILES:
            if self.elsewhere:
                return 302, f"{self.elsewhere}/files/{name}", b""
            return 200, "application/octet-stream", FILES[name]
        links = [f for f in FILES if f.startswith(f"{name}-")]
        page = "".join(f'<a href="/files/{f}#sha256={sha256(f)}">{f}</a>' for f in links)
        return (200, "text/html", page.encode()) if links else (404, "", b"")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.close()


@pytest.fixture
def settings(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The host's settings: the index with its password, and nothing of this machine's own."""
    for name in list(os.environ):
        if name.startswith(("UV_", "PIP_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("MARKER", str(tmp_path / "something-ran"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return {"UV_DEFAULT_INDEX": f"http://me:s3cret@{index.address}/simple"}


@pytest.fixture
def fetch(settings: dict[str, str], tmp_path: Path) -> functools.partial[list[Path]]:
    place = tmp_path / "context/sources"
    return functools.partial(
        fetching.fetch, python=PYTHON, here=set(), settings=settings, folder=place
    )


def test_what_was_fetched_is_installed_with_no_index_and_no_password(
    fetch: functools.partial[list[Path]], index: Index, settings: dict[str, str], tmp_path: Path
) -> None:
    """This is what the steps of a build do, in their own words."""
    assert fetch([TOY], sources=()) == []
    index.close()
    listed = tmp_path / "toy.txt"
    listed.write_text(TOY.text)
    exported = context.indexes(settings, wheels=False)
    assert "s3cret" not in exported
    command = (
        f"{exported}{host.uv()} pip install --offline --python {sys.executable} --no-deps "
        f"--require-hashes --target {tmp_path}/target --requirements {listed}"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target/toy.py").read_text() == "VALUE = 1\n"


def test_nothing_of_what_is_fetched_runs(
    fetch: functools.partial[list[Path]], tmp_path: Path
) -> None:
    """It would run on the host, beside the credentials: .pth files, and setup.py of a source."""
    [source] = fetch([TOY, SRC], sources={"src"})
    assert source.read_bytes() == FILES["src-2.tar.gz"]
    assert source == tmp_path / "context/sources/src-2.tar.gz"
    assert not (tmp_path / "something-ran").exists()


def test_a_wheel_that_this_host_has_is_not_asked_for(
    fetch: functools.partial[list[Path]], index: Index
) -> None:
    assert fetch([TOY], sources=(), here={"toy"}) == []
    assert index.seen == []


@pytest.mark.parametrize("content", ["VALUE = 1\nMORE = 2\n", "VALUE = 2\n", None])
def test_a_file_that_was_changed_in_the_cache_goes_into_no_layer(
    fetch: functools.partial[list[Path]], content: str | None
) -> None:
    """An installed file is a link to the cache's, so whoever edits the one edits the other."""
    assert fetch([TOY], sources=()) == []
    [file] = fetching.cache().rglob("toy.py")
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(Problem) as caught:
        fetch([TOY], sources=())
    assert "files that differ from their wheels: toy.py; something changed" in caught.value.sentence
    assert f"UV_CACHE_DIR={fetching.cache()} uv cache clean toy'" in caught.value.sentence
    environ = {**os.environ, "UV_CACHE_DIR": str(fetching.cache())}
    subprocess.run([host.uv(), "cache", "clean", "toy"], env=environ, check=True)
    assert fetch([TOY], sources=()) == []


def test_whoever_looks_sees_what_was_fetched_and_may_refuse_it(
    fetch: functools.partial[list[Path]],
) -> None:
    def look(site: Path) -> None:
        assert (site / "toy.py").read_text() == "VALUE = 1\n"
        raise Problem("not this one", 2)

    with pytest.raises(Problem, match="not this one"):
        fetch([TOY], sources=(), look=look)


@pytest.mark.parametrize("name", ["toy", "src"])
def test_other_bytes_than_the_locked_ones_are_refused(
    fetch: functools.partial[list[Path]], name: str
) -> None:
    entry = Locked(name, {"toy": "1", "src": "2"}[name], "0" * 64)
    with pytest.raises(
        Problem, match=r"another (sha256|source distribution of src 2) than the lock"
    ):
        fetch([entry], sources={"src"})


def test_bytes_that_are_not_what_the_index_says_of_them_are_refused(
    fetch: functools.partial[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "download", lambda *_: b"something else")
    with pytest.raises(Problem, match="the file of src has another sha256 than the lock"):
        fetch([SRC], sources={"src"})


@pytest.mark.parametrize("entry", [TOY, SRC])
def test_an_index_that_is_gone_is_one_sentence_without_the_password(
    fetch: functools.partial[list[Path]], index: Index, entry: Locked
) -> None:
    index.close()
    with pytest.raises(Problem) as caught:
        fetch([entry], sources={"src"})
    assert "s3cret" not in caught.value.sentence
    assert "\n" not in caught.value.sentence
    assert "the package index cannot be reached; check the network" in caught.value.sentence


def test_a_server_that_the_index_sends_to_does_not_get_the_password(
    fetch: functools.partial[list[Path]], index: Index
) -> None:
    other = Index()
    other.open = True
    # Another name of the same host: a port alone would be the same host for uv, too.
    index.elsewhere = f"http://{other.address.replace(HOST, 'localhost')}"
    [source] = fetch([SRC], sources={"src"})
    other.close()
    assert source.read_bytes() == FILES["src-2.tar.gz"]
    assert other.seen
    assert {login for _, login in other.seen} == {None}


@pytest.mark.parametrize(
    ("url", "settings", "found"),
    [
        ("https://one.example/f", {}, None),
        ("https://me:p%40ss@one.example/f", {}, ("me", "p@ss")),
        ("https://one.example/f", {"UV_DEFAULT_INDEX": "https://me:x@one.example/s"}, ("me", "x")),
        ("https://two.example/f", {"UV_DEFAULT_INDEX": "https://me:x@one.example/s"}, None),
        ("https://one.example:99/f", {"UV_DEFAULT_INDEX": "https://me:x@one.example/s"}, None),
        (
            "https://one.example/f",
            {"UV_INDEX": "https://y/ n=https://token@one.example/"},
            ("token", ""),
        ),
        (
            "https://one.example/f",
            {
                "UV_INDEX": "my-own=https://one.example/",
                "UV_INDEX_MY_OWN_USERNAME": "me",
                "UV_INDEX_MY_OWN_PASSWORD": "z",
            },
            ("me", "z"),
        ),
    ],
)
def test_a_password_goes_to_the_host_that_it_was_given_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    settings: dict[str, str],
    found: tuple[str, str] | None,
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetching.credentials(url, settings) == found


def test_a_password_of_netrc_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine one.example login me password n\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert fetching.credentials("https://one.example/f", {}) == ("me", "n")
    assert fetching.credentials("https://two.example/f", {}) is None


@pytest.mark.parametrize("place", ["https://{}", "ftp://{}", "file://", "http://[::1"])
def test_an_index_that_sends_to_nowhere_is_one_sentence(
    index: Index, settings: dict[str, str], place: str
) -> None:
    index.elsewhere = place.format(index.address)
    with pytest.raises(Problem, match=r"cannot be fetched \(.*\); check the network") as caught:
        fetching.download(f"http://{index.address}/files/src-2.tar.gz", settings)
    assert "object at" not in caught.value.sentence


def test_an_index_is_trusted_by_the_bundle_of_the_settings(
    settings: dict[str, str], tmp_path: Path
) -> None:
    certificate = Certificate.make(tmp_path / "ca")
    secure = Index(certificate)
    url = f"https://me:s3cret@{secure.address}/files/src-2.tar.gz"
    with pytest.raises(Problem, match=r"cannot be fetched .*self-signed certificate"):
        fetching.download(url, settings)
    assert not secure.seen
    trusting = {**settings, "SSL_CERT_FILE": str(certificate.file)}
    assert fetching.download(url, trusting) == FILES["src-2.tar.gz"]
    secure.close()


def test_the_status_of_an_index_is_said(index: Index, settings: dict[str, str]) -> None:
    with pytest.raises(Problem, match=r"/none cannot be fetched \(Not Found\); check"):
        fetching.download(f"http://{index.address}/none", settings)


def test_a_file_of_the_host_is_not_an_address(settings: dict[str, str]) -> None:
    with pytest.raises(Problem, match="is no address of an index"):
        fetching.download("file:///etc/passwd", settings)

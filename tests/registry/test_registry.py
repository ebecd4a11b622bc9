"""Every way in which a registry fails is one sentence; what it gives is held against its name."""

from __future__ import annotations

import base64
import itertools
import json
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from images.publishing import attach, copies, failures, oci, publication, registry
from images.publishing.copies import Copy
from images.publishing.failures import Unreachable
from images.publishing.oci import Damaged
from images.publishing.registry import Registry
from images.publishing.tags import Tags
from rollout.problem import Problem

from .conftest import REPOSITORY, Toy
from .server import HOST, PASSWORD, USER, Certificate, Server, free_port

Make = Callable[..., Toy]
NAMES = Tags("immutable", "moving")


def refused(copy: Copy, there: Registry) -> str:
    """The sentence that a publication ends with."""
    with pytest.raises(Problem) as caught:
        publication.publish(copy, there, REPOSITORY, NAMES, [])
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


def pushed_by_skopeo(copy: Copy, there: Registry) -> str:
    """The sentence that an upload ends with, where nothing was asked before."""
    with pytest.raises(Problem) as caught, copy.upload([]) as (origin, _):
        name = f"docker://{there.reference(REPOSITORY, copy.descriptor.digest)}"
        argv = registry.copy_argv(origin, name, authfile=there.authfile, cert_dir=there.cert_dir)
        registry.copy(argv, there.name(REPOSITORY))
    return caught.value.sentence


# TLS


def test_an_unknown_authority_is_refused_also_on_this_machine(
    toy: Make, servers: Callable[..., Server], certificate: Certificate
) -> None:
    there = Registry(servers(certificate=certificate).address)
    copy = toy("base").copy()
    for said in (refused(copy, there), pushed_by_skopeo(copy, there)):
        assert f"TLS with {there.host} failed" in said
        assert "SSL_CERT_FILE" in said and "--cert-dir" in said


@pytest.mark.parametrize("way", ["SSL_CERT_FILE", "--cert-dir"])
def test_an_authority_is_made_known_in_two_ways(
    toy: Make,
    servers: Callable[..., Server],
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    server = servers(certificate=certificate)
    folder = None
    if way == "SSL_CERT_FILE":
        monkeypatch.setenv(way, str(certificate.file))
    else:
        folder = certificate.file.parent
    there = Registry(server.address, cert_dir=folder)
    assert publication.publish(toy("base").copy(), there, REPOSITORY, NAMES, [])
    assert not there.plain_http
    assert there.tags(REPOSITORY) == ["immutable", "moving"]


def test_only_a_registry_on_this_machine_may_do_without_tls(
    server: Server, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Registry(server.address)
    assert there.plain_http
    monkeypatch.setattr(registry, "_local", lambda _: False)
    copy = toy("base").copy()
    elsewhere = Registry(server.address)
    for said in (refused(copy, elsewhere), pushed_by_skopeo(copy, elsewhere)):
        assert "does not speak TLS; only a registry on this machine may do without" in said


# Credentials


def login(there: Registry, file: Path, password: str = PASSWORD) -> Path:
    """What ``skopeo login`` writes."""
    encoded = base64.b64encode(f"{USER}:{password}".encode()).decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"auths": {there.host: {"auth": encoded}}}))
    return file


def test_no_credentials_and_wrong_ones_are_refused_with_the_command_that_helps(
    toy: Make, servers: Callable[..., Server], tmp_path: Path
) -> None:
    server, copy = servers(credentials=True), toy("base").copy()
    wrong = login(Registry(server.address), tmp_path / "auth.json", "wrong")
    name = Registry(server.address).name(REPOSITORY)
    for file, words in (
        (None, f"asks for a login, and none is known for {name}; log in with"),
        (wrong, f"refuses these credentials for {name}"),
    ):
        there = Registry(server.address, authfile=file)
        said = refused(copy, there)
        assert said.startswith(f"{server.address} {words}")
        assert f"skopeo login {server.address}" in said
        with pytest.raises(Unreachable) as caught:
            there.tags(REPOSITORY)
        assert caught.value.code == 3, "it is no verdict on an image"
    assert not server.blobs()


def test_skopeo_says_the_same_of_wrong_credentials(
    toy: Make, servers: Callable[..., Server], certificate: Certificate, tmp_path: Path
) -> None:
    server = servers(credentials=True, certificate=certificate)
    wrong = login(Registry(server.address), tmp_path / "auth.json", "wrong")
    there = Registry(server.address, authfile=wrong, cert_dir=certificate.file.parent)
    assert "refuses these credentials" in pushed_by_skopeo(toy("base").copy(), there)


@pytest.mark.parametrize("where", ["skopeo", "docker", "--authfile", "REGISTRY_AUTH_FILE"])
def test_credentials_are_found_where_login_leaves_them(
    toy: Make,
    servers: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    server = servers(credentials=True)
    file = {
        "skopeo": Path(os.environ["XDG_RUNTIME_DIR"]) / "containers/auth.json",
        "docker": Path.home() / ".docker/config.json",
    }.get(where, tmp_path / "own.json")
    login(Registry(server.address), file)
    if where == "REGISTRY_AUTH_FILE":
        monkeypatch.setenv(where, str(file))
    there = Registry(server.address, authfile=file if where == "--authfile" else None)
    assert publication.publish(toy("base", "engine").copy(), there, REPOSITORY, NAMES, [])


def test_what_skopeo_login_writes_is_understood(
    servers: Callable[..., Server], tmp_path: Path
) -> None:
    server, file = servers(credentials=True), tmp_path / "auth.json"
    argv = ["skopeo", "login", "--tls-verify=false", "--authfile", str(file)]
    argv += ["--username", USER, "--password", PASSWORD, server.address]
    subprocess.run(argv, check=True, capture_output=True)
    assert Registry(server.address, authfile=file).tags(REPOSITORY) == []


# A registry that is out of order


def test_nobody_listening_is_tried_again_and_then_said(toy: Make) -> None:
    there = Registry(f"{HOST}:{free_port()}")
    said = refused(toy("base").copy(), there)
    assert said.startswith(f"the connection to {there.host} broke (connection refused), 3 times")
    with pytest.raises(Unreachable) as caught:
        there.tags(REPOSITORY)
    assert caught.value.code == 3


def test_a_host_that_does_not_exist_is_said_at_once(
    toy: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    there, copy = Registry("registry.invalid"), toy("base").copy()
    for said in (refused(copy, there), pushed_by_skopeo(copy, there)):
        # A machine without a resolver cannot tell a wrong name from a broken network.
        assert "there is no host registry.invalid" in said or "broke" in said
    assert "refuses" not in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk takes root to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_of_the_registry_is_called_that_and_leaves_no_tag(
    toy: Make, servers: Callable[..., Server], tiny: Path
) -> None:
    server = servers(storage=tiny)
    there = Registry(server.address)
    said = refused(toy("base", size=6_000_000).copy(), there)
    assert (
        said
        == f"the disk of the registry {there.host} is full; free space there and run this again"
    )
    assert not server.tags(REPOSITORY)


# What a registry gives is held against its name


def blob_file(server: Server, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return server.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


def test_other_bytes_under_a_digest_are_refused(
    toy: Make, server: Server, here: Registry, tmp_path: Path
) -> None:
    copy = toy("base").copy()
    copies.push(copy, here, REPOSITORY)
    layer, config = copy.manifest.layers[0].digest, copy.manifest.config.digest
    for digest in (layer, config, copy.descriptor.digest):
        file = blob_file(server, digest)
        data = file.read_bytes()
        # The manifest stays one, since the registry reads it: only its layer gets another type.
        changed = data.replace(b"tar+zstd", b"tar+gzip")
        file.write_bytes(changed if changed != data else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Problem, match="other bytes"):
        here.download(REPOSITORY, layer, tmp_path / "layer")
    assert not list(tmp_path.glob("*layer*")), "no half of a download is left"
    with pytest.raises(Problem, match="other bytes"):
        here.blob(REPOSITORY, config)
    with pytest.raises(Problem, match="other bytes"):
        here.manifest(REPOSITORY, copy.descriptor.digest)


def test_what_is_not_there_is_told_from_what_cannot_be_asked(
    here: Registry, tmp_path: Path
) -> None:
    nothing = oci.digest(b"nothing")
    assert here.manifest(REPOSITORY, "no-tag") is None
    assert here.resolve(REPOSITORY, nothing) is None
    assert here.blob_size(REPOSITORY, nothing) is None
    assert here.referrers(REPOSITORY, nothing) == []
    assert here.tags(REPOSITORY) == []
    for ask in (here.blob, lambda r, d: here.download(r, d, tmp_path / "x")):
        with pytest.raises(Problem, match="is not in the registry"):
            ask(REPOSITORY, nothing)


def test_a_manifest_whose_blobs_are_missing_gets_no_tag(toy: Make, here: Registry) -> None:
    copy = toy("base").copy()
    with pytest.raises(Problem, match="blob unknown"):
        here.push_manifest(REPOSITORY, "tag", copy.data, oci.MANIFEST)
    assert here.tags(REPOSITORY) == []


def test_a_small_upload_that_is_given_up_leaves_no_blob(server: Server, here: Registry) -> None:
    assert here.why(REPOSITORY) is None
    assert not server.blobs()
    uploads = server.storage / "docker/registry/v2/repositories" / REPOSITORY / "_uploads"
    assert not list(uploads.rglob("data"))


def test_a_manifest_can_be_forgotten(toy: Make, here: Registry) -> None:
    copy = toy("base").copy()
    copies.push(copy, here, REPOSITORY)
    assert here.forget(REPOSITORY, copy.descriptor.digest)
    assert here.manifest(REPOSITORY, copy.descriptor.digest) is None
    assert not here.forget(REPOSITORY, copy.descriptor.digest)


def test_all_tags_come_however_many_pages_they_take(toy: Make, here: Registry) -> None:
    copy = toy("base").copy()
    copies.push(copy, here, REPOSITORY)
    names = sorted(f"tag-{n}" for n in range(5))
    for name in names:
        here.push_manifest(REPOSITORY, name, copy.data, oci.MANIFEST)
    assert here.tags(REPOSITORY) == names


# Registries that Debian's is not: played, by answers that a test gives


class Played:
    """A registry of canned answers: path to (status, headers, body), or to a list of them."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        played = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                played.asked.append((self.command, self.path, dict(self.headers)))
                queue = played.answers.get(self.path.partition("?")[0]) or [(404, {}, b"")]
                status, headers, body = queue.pop(0) if len(queue) > 1 else queue[0]
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
                """Nothing: the terminal is pytest's."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.file, certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.address = f"{HOST}:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def played() -> Iterator[Played]:
    found = Played()
    yield found
    found.close()


def test_a_list_of_referrers_is_taken_from_the_registry_that_keeps_one(played: Played) -> None:
    entry = oci.Descriptor(oci.MANIFEST, oci.digest(b"attestation"), 5, {}, "application/x")
    subject = oci.digest(b"image")
    played.answers[f"/v2/a/referrers/{subject}"] = [
        (200, {"Content-Type": oci.INDEX}, oci.index([entry]))
    ]
    assert Registry(played.address).referrers("a", subject) == [entry]


def test_a_registry_that_lists_referrers_by_itself_gets_no_second_list(played: Played) -> None:
    subject, data = oci.digest(b"image"), oci.manifest(oci.describe(b"{}", oci.EMPTY), [])
    listed = (200, {"Content-Type": oci.INDEX}, oci.index([]))
    played.answers[f"/v2/a/referrers/{subject}"] = [listed]
    path = f"/v2/a/manifests/{oci.digest(data)}"
    played.answers[path] = [(201, {"OCI-Subject": subject}, b"")]
    attach.refer(Registry(played.address), "a", subject, [data])
    assert [p for method, p, _ in played.asked if method == "PUT"] == [path]


def test_a_token_is_fetched_where_the_registry_sends_for_one(
    played: Played, tmp_path: Path
) -> None:
    there = Registry(played.address)
    there.authfile = login(there, tmp_path / "auth.json")
    ask = f'Bearer realm="http://{played.address}/token",service="s",scope="repository:a:pull"'
    played.answers["/token"] = [(200, {}, b'{"token": "abc"}')]
    played.answers["/v2/a/tags/list"] = [
        (401, {"WWW-Authenticate": ask}, b""),
        (200, {}, b'{"tags": ["x"]}'),
    ]
    assert there.tags("a") == ["x"]
    sent = [(path, headers.get("Authorization", "")) for _, path, headers in played.asked]
    token = next(entry for entry in sent if entry[0].startswith("/token"))
    assert token[0] == "/token?service=s&scope=repository%3Aa%3Apull"
    assert token[1].startswith("Basic ")
    assert sent[-1] == ("/v2/a/tags/list", "Bearer abc")


def test_credentials_are_not_sent_to_a_place_without_tls(played: Played, tmp_path: Path) -> None:
    there = Registry(played.address)
    there.authfile = login(there, tmp_path / "auth.json")
    ask = 'Bearer realm="http://tokens.example.com/",service="s"'
    played.answers["/v2/a/tags/list"] = [(401, {"WWW-Authenticate": ask}, b"")]
    with pytest.raises(Problem, match="not safe"):
        there.tags("a")


def test_credentials_do_not_follow_to_the_storage_behind_a_registry(
    played: Played, tmp_path: Path
) -> None:
    there, data = Registry(played.address), b"of the storage"
    there.authfile = login(there, tmp_path / "auth.json")
    path = f"/v2/a/blobs/{oci.digest(data)}"
    storage = f"http://{played.address.replace(HOST, 'localhost')}/storage"
    played.answers[path] = [
        (401, {"WWW-Authenticate": 'Basic realm="r"'}, b""),
        (307, {"Location": storage}, b""),
    ]
    played.answers["/storage"] = [(200, {}, data)]
    assert there.blob("a", oci.digest(data)) == data
    assert "Authorization" in played.asked[-2][2]
    assert "Authorization" not in played.asked[-1][2]
    assert there.blob_size("a", oci.digest(data)) == len(data)
    assert played.asked[-1][0] == "HEAD", "asking for a size downloads nothing"


def test_a_download_that_breaks_goes_on_where_it_broke(played: Played, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    path = f"/v2/a/blobs/{oci.digest(data)}"
    played.answers[path] = [
        (200, {"Content-Length": str(len(data))}, data[:6000]),
        (206, {"Content-Range": f"bytes 6000-{len(data) - 1}/{len(data)}"}, data[6000:]),
    ]
    Registry(played.address).download("a", oci.digest(data), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == data
    assert [headers.get("Range") for _, p, headers in played.asked if p == path] == [
        None,
        "bytes=6000-",
    ]


def test_a_registry_that_is_out_of_order_for_a_moment_is_asked_again(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    played.answers["/v2/a/tags/list"] = [
        (503, {}, b"try later"),
        (429, {}, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}'),
        (200, {}, b'{"tags": ["x"]}'),
    ]
    assert Registry(played.address).tags("a") == ["x"]
    said = capsys.readouterr().out
    assert "it answers 503, try later; again in" in said
    assert "it answers 429, slow down; again in" in said


def test_a_registry_that_says_when_to_come_back_is_asked_then(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    played.answers["/v2/a/tags/list"] = [
        (429, {"Retry-After": "60"}, b"slow down"),
        (200, {}, b'{"tags": ["x"]}'),
    ]
    assert Registry(played.address).tags("a") == ["x"]
    assert slept == [60.0]


def referrers(*names: str) -> bytes:
    """A page of the attestations of an image."""
    entries = [
        {"mediaType": oci.MANIFEST, "digest": oci.digest(name.encode()), "size": len(name)}
        for name in names
    ]
    page = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": entries}
    return json.dumps(page).encode()


def more(path: str) -> dict[str, str]:
    """The headers of a page of attestations that is not the last."""
    return {"Content-Type": oci.INDEX, "Link": f'<{path}?last=2>; rel="next"'}


def test_all_attestations_come_however_many_pages_they_take(played: Played) -> None:
    digest = oci.digest(b"image")
    path = f"/v2/a/referrers/{digest}"
    played.answers[path] = [
        (200, more(path), referrers("1", "2")),
        (200, {"Content-Type": oci.INDEX}, referrers("3")),
    ]
    found = Registry(played.address).referrers("a", digest)
    assert [entry.digest for entry in found] == [oci.digest(name) for name in (b"1", b"2", b"3")]


def test_some_of_the_attestations_are_not_taken_for_all(played: Played) -> None:
    """The missing ones would be attached a second time, or called missing."""
    digest = oci.digest(b"image")
    path = f"/v2/a/referrers/{digest}"
    played.answers[path] = [(200, more(path), referrers("1")), (404, {}, b"")]
    with pytest.raises(Damaged, match="gives some of them, and then 404"):
        Registry(played.address).referrers("a", digest)


def test_a_registry_that_protects_its_tags_is_quoted(played: Played, toy: Make) -> None:
    body = b'{"errors": [{"code": "TAGINVALID", "message": "tag is immutable"}]}'
    played.answers["/v2/a/manifests/tag"] = [(400, {}, body)]
    with pytest.raises(Problem, match="with 400: tag is immutable"):
        Registry(played.address).push_manifest("a", "tag", toy("base").copy().data, oci.MANIFEST)


# Where credentials go


@pytest.fixture
def secure(certificate: Certificate) -> Iterator[Played]:
    """A registry of canned answers that speaks TLS."""
    found = Played(certificate)
    yield found
    found.close()


def authorized(played: Played) -> list[str]:
    """The paths that credentials were sent to."""
    return [path for _, path, headers in played.asked if "Authorization" in headers]


def known(there: Registry, certificate: Certificate, tmp_path: Path) -> Registry:
    """The same with credentials, and with a certificate that is known."""
    file = login(there, tmp_path / "auth.json")
    return Registry(there.target, authfile=file, cert_dir=certificate.file.parent)


BASIC = (401, {"WWW-Authenticate": 'Basic realm="r"'}, b"")


def test_an_upload_never_goes_on_without_tls(
    played: Played, secure: Played, certificate: Certificate, tmp_path: Path
) -> None:
    there = known(Registry(secure.address), certificate, tmp_path)
    # As a registry behind a proxy that ends TLS says it: its own host, in the open.
    location = f"http://{played.address}/v2/a/blobs/uploads/1"
    secure.answers["/v2/a/blobs/uploads/"] = [BASIC, (202, {"Location": location}, b"")]
    played.answers["/v2/a/blobs/uploads/1"] = [(201, {}, b"")]
    with pytest.raises(Unreachable, match="not safe"):
        there.push_blob("a", b"data")
    assert authorized(secure) == ["/v2/a/blobs/uploads/"]
    assert not played.asked


@pytest.mark.parametrize("how", ["a download", "a question for a size", "a page of tags"])
def test_no_answer_leads_from_tls_into_the_open(
    played: Played, secure: Played, certificate: Certificate, tmp_path: Path, how: str
) -> None:
    there = known(Registry(secure.address), certificate, tmp_path)
    digest, open_address = oci.digest(b"data"), f"http://{played.address}/x"
    secure.answers[f"/v2/a/blobs/{digest}"] = [(307, {"Location": open_address}, b"")]
    more = {"Link": f'<{open_address}>; rel="next"'}
    secure.answers["/v2/a/tags/list"] = [(200, more, b'{"tags": ["x"]}')]
    ask: dict[str, Callable[[], object]] = {
        "a download": lambda: there.download("a", digest, tmp_path / "x"),
        "a question for a size": lambda: there.blob_size("a", digest),
        "a page of tags": lambda: there.tags("a"),
    }
    with pytest.raises(Unreachable, match="not safe"):
        ask[how]()
    assert not played.asked


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/hostname",
        "ftp://example.com/x",
        "data:,x",
        "http://registry.example.com/x",
        "http://user:password@127.0.0.1/x",
        "https://127.0.0.1:99999/x",
        "https://[::1/x",
        "https:///x",
    ],
)
def test_a_registry_cannot_send_anywhere_but_to_a_registry(
    played: Played, location: str, tmp_path: Path
) -> None:
    there, digest = Registry(played.address), oci.digest(b"data")
    played.answers["/v2/a/blobs/uploads/"] = [(202, {"Location": location}, b"")]
    played.answers[f"/v2/a/blobs/{digest}"] = [(302, {"Location": location}, b"")]
    for ask in (
        lambda: there.push_blob("a", b"other data"),
        lambda: there.download("a", digest, tmp_path / "x"),
        lambda: there.blob("a", digest),
    ):
        with pytest.raises(Unreachable, match="not safe"):
            ask()


def test_a_storage_behind_a_registry_cannot_ask_for_its_credentials(
    played: Played, tmp_path: Path
) -> None:
    there, digest = Registry(played.address), oci.digest(b"data")
    there.authfile = login(there, tmp_path / "auth.json")
    other = played.address.replace(HOST, "localhost")
    ask = f'Bearer realm="http://{other}/token",service="s"'
    played.answers[f"/v2/a/blobs/{digest}"] = [(307, {"Location": f"http://{other}/s"}, b"")]
    played.answers["/s"] = [(401, {"WWW-Authenticate": ask}, b"")]
    with pytest.raises(Unreachable):
        there.blob("a", digest)
    assert not authorized(played)


def test_credentials_are_sent_to_an_upload_at_the_registry_and_to_none_elsewhere(
    played: Played, tmp_path: Path
) -> None:
    there = Registry(played.address)
    there.authfile = login(there, tmp_path / "auth.json")
    other = f"http://{played.address.replace(HOST, 'localhost')}/elsewhere"
    played.answers["/v2/a/blobs/uploads/"] = [
        BASIC,
        (202, {"Location": "/own"}, b""),
        (202, {"Location": other}, b""),
    ]
    played.answers["/own"] = played.answers["/elsewhere"] = [(201, {}, b"")]
    there.push_blob("a", b"one")
    there.push_blob("a", b"two")
    assert [p.partition("?")[0] for method, p, _ in played.asked if method == "PUT"] == [
        "/own",
        "/elsewhere",
    ]
    assert [p.partition("?")[0] for p in authorized(played)][-2:] == [
        "/own",
        "/v2/a/blobs/uploads/",
    ]


@pytest.mark.parametrize(
    "token",
    [b'{"token": "a\\r\\nb"}', b'{"token": 7}', b'{"token": "\\u2603"}', b"[" * 200_000, b"["],
)
def test_a_token_that_is_none_is_not_sent(played: Played, tmp_path: Path, token: bytes) -> None:
    there = Registry(played.address)
    there.authfile = login(there, tmp_path / "auth.json")
    ask = f'Bearer realm="http://{played.address}/token"'
    played.answers["/token"] = [(200, {}, token)]
    played.answers["/v2/a/tags/list"] = [(401, {"WWW-Authenticate": ask}, b"")]
    with pytest.raises(Unreachable, match="refuses these credentials"):
        there.tags("a")
    assert [path.partition("?")[0] for path in authorized(played)] == ["/token"]


# How much is read, and what is no answer


def test_a_document_is_read_up_to_a_limit(
    played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there, data = Registry(played.address), b"x" * 5000
    monkeypatch.setattr(registry, "MOST_OF_A_MANIFEST", 4000)
    monkeypatch.setattr(registry, "MOST_OF_A_BLOB", 4500)
    digest = oci.digest(data)
    headers = {"Content-Type": oci.INDEX}
    for path in (f"manifests/{digest}", f"blobs/{digest}", f"referrers/{digest}", "tags/list"):
        played.answers[f"/v2/a/{path}"] = [(200, headers, data)]
    asks: list[Callable[[], object]] = [
        lambda: there.manifest("a", digest),
        lambda: there.resolve("a", digest),
        lambda: there.blob("a", digest),
        lambda: there.referrers("a", digest),
        lambda: there.tags("a"),
    ]
    for ask in asks:
        with pytest.raises(Damaged, match="larger than it may be"):
            ask()
    played.answers[f"/v2/a/blobs/{digest}"] = [(200, {}, data)]
    there.download("a", digest, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size == len(data), "a layer goes to a file, of any size"


def test_the_limits_are_those_of_registries_and_attestations() -> None:
    assert registry.MOST_OF_A_MANIFEST == 4 * 1024**2
    assert registry.MOST_OF_A_BLOB == 64 * 1024**2


class Endless(Played):
    """A registry whose blobs do not end, and do not say how long they are."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        endless, old = self, self._server.RequestHandlerClass

        class Handler(old):  # type: ignore[misc, valid-type]
            def do_GET(self) -> None:  # noqa: N802
                self.send_response(200)
                self.end_headers()
                with suppress(ConnectionError):
                    while endless.sent < 1 << 30:
                        self.wfile.write(bytes(1 << 16))
                        endless.sent += 1 << 16

        self._server.RequestHandlerClass = Handler


@pytest.fixture
def endless() -> Iterator[Endless]:
    found = Endless()
    yield found
    found.close()


def test_a_blob_is_read_as_far_as_it_was_announced(endless: Endless, tmp_path: Path) -> None:
    there, digest = Registry(endless.address), oci.digest(b"data")
    with pytest.raises(Damaged, match="larger than it may be, which is 1,000 bytes"):
        there.blob("a", digest, 1000)
    with pytest.raises(Damaged, match="larger than announced, which is 2,000 bytes"):
        there.download("a", digest, tmp_path / "x", size=2000)
    assert not list(tmp_path.glob("*x*")), "no half of a download is left"
    assert endless.sent < 1 << 26
    with pytest.raises(Damaged, match="no attestation's size"):
        there.blob("a", digest, registry.MOST_OF_A_BLOB + 1)


def test_a_download_that_goes_on_counts_from_its_beginning(played: Played, tmp_path: Path) -> None:
    data = b"x" * 8000
    digest = oci.digest(data)
    played.answers[f"/v2/a/blobs/{digest}"] = [
        (200, {"Content-Length": "8000"}, data[:6000]),
        (206, {}, data[:6000]),
    ]
    with pytest.raises(Damaged, match="larger than announced"):
        Registry(played.address).download("a", digest, tmp_path / "x", size=len(data))


def test_a_document_that_ends_early_is_asked_for_again(played: Played) -> None:
    data = b"x" * 500
    digest = oci.digest(data)
    played.answers[f"/v2/a/blobs/{digest}"] = [
        (200, {"Content-Length": "500"}, data[:100]),
        (200, {}, data),
    ]
    assert Registry(played.address).blob("a", digest) == data


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "1_0", "9" * 40])
def test_a_length_that_is_none_is_one_sentence(played: Played, length: str, tmp_path: Path) -> None:
    there, data = Registry(played.address), b"{}"
    digest = oci.digest(data)
    for path in (f"manifests/{digest}", f"blobs/{digest}"):
        played.answers[f"/v2/a/{path}"] = [(200, {"Content-Length": length}, data)]
    for ask in (
        lambda: there.manifest("a", digest),
        lambda: there.blob("a", digest),
        lambda: there.blob_size("a", digest),
        lambda: there.download("a", digest, tmp_path / "x"),
    ):
        with pytest.raises(Damaged, match="as its length"):
            ask()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[" * 200_000,
        b'{"tags": {}}',
        b'{"tags": [1]}',
        b'{"tags": ["a b"]}',
        b'{"tags": ["\\u001b[2J"]}',
    ],
    ids=itertools.count(),
)
def test_a_list_of_tags_that_is_none_is_one_sentence(played: Played, body: bytes) -> None:
    played.answers["/v2/a/tags/list"] = [(200, {}, body)]
    with pytest.raises(Damaged) as caught:
        Registry(played.address).tags("a")
    assert caught.value.sentence.isprintable()


def test_a_list_of_tags_that_never_ends_is_left(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_PAGES", 3)
    more = {"Link": '</v2/a/tags/list?last=x>; rel="next"'}
    played.answers["/v2/a/tags/list"] = [(200, more, b'{"tags": ["x"]}')]
    with pytest.raises(Damaged, match="more than 3 pages"):
        Registry(played.address).tags("a")


def test_an_upload_that_goes_nowhere_is_one_sentence(played: Played) -> None:
    there = Registry(played.address)
    played.answers["/v2/a/blobs/uploads/"] = [(202, {}, b"")]
    with pytest.raises(Problem, match="does not say where it goes on"):
        there.push_blob("a", b"data")
    assert not there.mount("a", oci.digest(b"data"), "b"), "a blob that is not there is not mounted"


def test_what_a_registry_says_cannot_write_to_the_terminal(played: Played) -> None:
    there = Registry(played.address)
    for body in (
        b"\x1b[2J\x1b]0;gone\x07",
        b'{"errors": [{"message": "\\u001b[2J\\u202e\\nx"}]}',
        b'{"errors": ["\\u001b"]}',
        b'{"errors": ' + b"[" * 200_000,
    ):
        played.answers["/v2/a/tags/list"] = [(418, {}, body)]
        with pytest.raises(Problem, match="with 418") as caught:
            there.tags("a")
        assert caught.value.sentence.isprintable()
        assert len(caught.value.sentence) < 1500
    odd = {"Content-Type": "text/\x1b[2J; x"}
    played.answers["/v2/a/manifests/t"] = [(200, odd, b"{}")]
    found = there.manifest("a", "t")
    assert found
    assert found[1].media_type.isprintable()

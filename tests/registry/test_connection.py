"""How a registry is reached: by one connection, the right proxy, with patience, and in safety."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from images.publishing import failures, oci
from images.publishing.failures import Unreachable
from images.publishing.oci import Damaged
from images.publishing.registry import Registry
from rollout.problem import Problem

from .conftest import login
from .played import Endless, Played, Proxy
from .server import HOST, Certificate

# Connections


def test_several_requests_take_one_connection(played: Played) -> None:
    there, data = Registry(played.address), b"data"
    played.answers["/v2/a/tags/list"] = [(200, {}, b'{"tags": ["x"]}')]
    played.answers[f"/v2/a/blobs/{oci.digest(data)}"] = [(200, {}, data)]
    played.answers["/v2/a/blobs/uploads/"] = [(202, {"Location": "/upload"}, b"")]
    played.answers["/upload"] = played.answers["/v2/a/manifests/t"] = [(201, {}, b"stored")]
    there.tags("a")
    before = played.connections
    assert there.blob_size("a", oci.digest(data)) == len(data)
    assert there.blob("a", oci.digest(data)) == data
    assert there.resolve("a", "none") is None
    there.push_blob("a", b"other")
    there.push_manifest("a", "t", b"{}", oci.MANIFEST)
    assert played.connections == before


def test_a_login_and_a_redirection_within_a_host_take_one_connection(
    played: Played, tmp_path: Path
) -> None:
    there, data = Registry(played.address), b"data"
    there.authfile = login(there, tmp_path / "auth.json")
    assert there.plain_http
    before = played.connections
    blob = f"/v2/a/blobs/{oci.digest(data)}"
    refusal = (401, {"WWW-Authenticate": 'Basic realm="r"'}, b"log in")
    played.answers[blob] = [refusal, (307, {"Location": "/storage"}, b"over there")]
    played.answers["/storage"] = [(200, {}, data)]
    assert there.blob("a", oci.digest(data)) == data
    assert [path for _, path, _ in played.asked] == [blob, blob, "/storage"]
    assert played.connections == before + 1, "the question for TLS has one of its own"


def test_what_is_left_of_an_answer_is_not_taken_for_the_next(played: Played) -> None:
    there, data = Registry(played.address), bytes(1 << 20)
    played.answers[f"/v2/a/blobs/{oci.digest(data)}"] = [(200, {}, data)]
    played.answers["/v2/a/tags/list"] = [(200, {}, b'{"tags": ["x"]}')]
    with pytest.raises(Damaged, match="larger than it may be"):
        there.blob("a", oci.digest(data), 10)
    assert there.tags("a") == ["x"]


def test_a_connection_that_the_registry_ends_is_made_anew(played: Played) -> None:
    there = Registry(played.address)
    played.answers["/v2/a/tags/list"] = [
        (200, {"Connection": "close"}, b'{"tags": ["x"]}'),
        (0, {}, b""),
        (200, {}, b'{"tags": ["y"]}'),
    ]
    assert there.tags("a") == ["x"]
    assert there.tags("a") == ["y"]


# Proxies


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy that leads every name to this machine."""
    found = Proxy()
    yield found
    found.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is one of this machine, so that there is a way without the proxy too."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **more: real(HOST, *rest, **more))


def elsewhere(secure: Played, certificate: Certificate) -> Registry:
    """A registry that is not on this machine, by its name."""
    return Registry(f"registry.example.com:{secure.port}", cert_dir=certificate.file.parent)


@pytest.mark.parametrize("form", ["http://{}", "{}", "http://me:p%40ss@{}"])
def test_a_registry_elsewhere_is_asked_through_the_proxy(
    secure: Played,
    proxy: Proxy,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    monkeypatch.setenv("https_proxy", form.format(proxy.address))
    there = elsewhere(secure, certificate)
    secure.answers["/v2/a/tags/list"] = [(200, {}, b'{"tags": ["x"]}')]
    assert there.tags("a") == there.tags("a") == ["x"]
    login = "Basic bWU6cEBzcw==" if "@" in form else ""
    assert proxy.asked == [(there.host, login)], "by one tunnel"
    assert not [h for _, _, headers in secure.asked for h in headers if h.startswith("Proxy")]


@pytest.mark.parametrize(
    "hosts", ["registry.example.com", "x.org, .example.com", "example.com", "*"]
)
def test_a_registry_that_no_proxy_names_is_asked_without_one(
    secure: Played,
    proxy: Proxy,
    names: None,  # noqa: ARG001
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    hosts: str,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", hosts)
    secure.answers["/v2/a/tags/list"] = [(200, {}, b'{"tags": ["x"]}')]
    assert elsewhere(secure, certificate).tags("a") == ["x"]
    assert not proxy.asked


def test_each_address_of_a_redirection_has_its_own_way(
    secure: Played,
    proxy: Proxy,
    names: None,  # noqa: ARG001
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "registry.example.com")
    storage, data = f"storage.example.com:{secure.port}", b"data"
    path = f"/v2/a/blobs/{oci.digest(data)}"
    secure.answers[path] = [(307, {"Location": f"https://{storage}/storage"}, b"")]
    secure.answers["/storage"] = [(200, {}, data)]
    assert elsewhere(secure, certificate).blob("a", oci.digest(data)) == data
    assert [host for host, _ in proxy.asked] == [storage]


def test_a_proxy_with_tls_is_spoken_to_in_secret(
    secure: Played, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its password would be read on the way else."""
    proxy, strange = Proxy(certificate), Registry("registry.example.com")
    monkeypatch.setenv("https_proxy", f"https://me:s3cret@{proxy.address}")
    with pytest.raises(Unreachable, match=r"^TLS with .*self-signed certificate"):
        strange.tags("a")
    assert not proxy.asked
    assert elsewhere(secure, certificate).tags("a") == []
    assert len(proxy.asked) == 1
    proxy.close()


def test_a_certificate_for_another_name_is_refused(
    secure: Played, proxy: Proxy, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authority is known; whoever owns one name must not answer for all."""
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    name = f"registry.example.org:{secure.port}"
    with pytest.raises(Unreachable, match=r"^TLS with .* failed: .*example\.org"):
        Registry(name, cert_dir=certificate.file.parent).tags("a")
    assert proxy.asked
    assert not secure.asked


def test_no_proxy_is_asked_about_this_machine(
    played: Played, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{proxy.address}")
    assert Registry(played.address).tags("a") == []
    assert not proxy.asked


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:1", "http://", "http://[::1", "x:y:z"])
def test_a_proxy_that_is_none_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(Problem, match="no HTTP proxy; say it like") as caught:
        Registry("registry.example.com").tags("a")
    assert caught.value.code == 2


def test_a_proxy_that_refuses_is_one_sentence(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plays a registry knows no CONNECT."""
    monkeypatch.setenv("https_proxy", f"http://me:s3cret@{played.address}")
    with pytest.raises(Unreachable, match=r"broke \(tunnel connection failed: 501") as caught:
        Registry("registry.example.com").tags("a")
    assert "s3cret" not in caught.value.sentence


# Patience


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


@pytest.mark.parametrize("status", [429, 503])
def test_a_registry_that_asks_for_a_long_wait_is_left_alone(
    played: Played, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    there, longest = Registry(played.address), int(failures.LONGEST)
    played.answers["/v2/a/tags/list"] = [
        (status, {"Retry-After": str(longest)}, b""),
        (status, {"Retry-After": str(longest + 30)}, b""),
    ]
    with pytest.raises(Unreachable, match=r"left alone for [0-9]+ minutes; run this again then"):
        there.tags("a")
    assert slept == [longest]


def test_a_server_of_tokens_that_says_when_to_come_back_is_asked_then(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    ask = f'Bearer realm="http://{played.address}/token"'
    played.answers["/token"] = [(429, {"Retry-After": "7"}, b""), (200, {}, b'{"token": "abc"}')]
    refusal = (401, {"WWW-Authenticate": ask}, b"")
    played.answers["/v2/a/tags/list"] = [refusal, refusal, (200, {}, b'{"tags": ["x"]}')]
    assert Registry(played.address).tags("a") == ["x"]
    assert slept == [7.0]


@pytest.mark.parametrize("broken", [(0, {}, b""), (503, {}, b""), (404, {}, b"")])
def test_an_upload_that_breaks_begins_anew_with_all_of_its_bytes(
    played: Played, broken: tuple[int, dict[str, str], bytes]
) -> None:
    """What came of the first one is known to nobody, so nothing is added to it."""
    begun = [(202, {"Location": f"/upload/{n}"}, b"") for n in (1, 2)]
    played.answers["/v2/a/blobs/uploads/"] = begun
    played.answers["/upload/1"] = [broken]
    played.answers["/upload/2"] = [(201, {}, b"")]
    Registry(played.address).push_blob("a", b"data")
    sent = [
        (m, p.partition("?")[0], b)
        for (m, p, _), b in zip(played.asked, played.bodies, strict=True)
    ]
    assert sent[1:] == [
        ("POST", "/v2/a/blobs/uploads/", b""),
        ("PUT", "/upload/1", b"data"),
        ("POST", "/v2/a/blobs/uploads/", b""),
        ("PUT", "/upload/2", b"data"),
    ]


def test_a_piece_of_an_upload_is_sent_once(played: Played) -> None:
    played.answers["/v2/a/blobs/uploads/"] = [(202, {"Location": "/upload"}, b"")]
    played.answers["/upload"] = [(0, {}, b"")]
    assert isinstance(Registry(played.address).why("a"), failures.Broken)
    assert [method for method, _, _ in played.asked] == ["POST", "PATCH", "DELETE"]


# Where credentials go


def authorized(played: Played) -> list[str]:
    """The paths that credentials were sent to."""
    return [path for _, path, headers in played.asked if "Authorization" in headers]


def known(there: Registry, certificate: Certificate, tmp_path: Path) -> Registry:
    """The same with credentials, and with a certificate that is known."""
    file = login(there, tmp_path / "auth.json")
    return Registry(there.target, authfile=file, cert_dir=certificate.file.parent)


BASIC = (401, {"WWW-Authenticate": 'Basic realm="r"'}, b"")


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


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_credentials_do_not_follow_a_server_of_tokens(
    played: Played, tmp_path: Path, host: str
) -> None:
    there = Registry(played.address)
    there.authfile = login(there, tmp_path / "auth.json")
    ask = f'Bearer realm="http://{played.address}/token"'
    other = f"http://{played.address.replace(HOST, host)}/other"
    played.answers["/token"] = [(302, {"Location": other}, b"")]
    played.answers["/other"] = [(200, {}, b'{"token": "abc"}')]
    played.answers["/v2/a/tags/list"] = [
        (401, {"WWW-Authenticate": ask}, b""),
        (200, {}, b'{"tags": ["x"]}'),
    ]
    assert there.tags("a") == ["x"]
    assert [path.partition("?")[0] for path in authorized(played)] == ["/token", "/v2/a/tags/list"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_only_a_question_follows_a_redirection(played: Played, status: int) -> None:
    there, data = Registry(played.address), b"data"
    away = (status, {"Location": "/away"}, b"")
    played.answers["/away"] = [(200, {}, data)]
    for path in ("blobs/uploads/", f"blobs/{oci.digest(data)}", "manifests/t"):
        played.answers[f"/v2/a/{path}"] = [away]
    assert there.blob("a", oci.digest(data)) == data
    for change in (
        lambda: there.push_blob("a", b"other data"),
        lambda: there.push_manifest("a", "t", b"{}", oci.MANIFEST),
        lambda: there.forget("a", "t"),
    ):
        with pytest.raises(Problem, match=f"with {status}"):
            change()
    assert [method for method, path, _ in played.asked if path == "/away"] == ["GET"]


def test_a_redirection_without_an_end_is_left(played: Played) -> None:
    digest = oci.digest(b"data")
    path = f"/v2/a/blobs/{digest}"
    played.answers[path] = [(307, {"Location": path}, b"")]
    with pytest.raises(Problem, match="with 307"):
        Registry(played.address).blob("a", digest)
    assert len(played.asked) == 11


def test_a_redirection_that_does_not_end_itself_is_not_read_to_its_end() -> None:
    found = Endless({"Location": "/again"}, 307)
    with pytest.raises(Problem, match="with 307"):
        Registry(found.address).blob("a", oci.digest(b"data"))
    found.close()
    assert found.sent < 1 << 30

"""HTTP to other machines: which proxy is asked, who sees a password, and what an error says."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from urllib.parse import urljoin

import pytest
from urllib3.exceptions import HTTPError

from images.host import web
from tests.registry.played import Played


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies of this machine."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def played() -> Iterator[Played]:
    """A server of canned answers."""
    found = Played()
    yield found
    found.close()


@pytest.fixture
def there() -> web.Web:
    return web.Web(ssl.create_default_context(), 5)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://one.example/x", "http://secure:1"),
        ("http://one.example/x", "plain:2"),
        ("https://one.example:5000/x", "http://secure:1"),
        ("https://two.example/x", ""),
        ("https://a.two.example:5000/x", ""),
        ("https://three.example:7/x", ""),
        ("https://three.example:8/x", "http://secure:1"),
        ("https://me@two.example/x", ""),
        ("http://localhost:5000/x", ""),
        ("https://127.0.0.1/x", ""),
        ("http://[::1]:5000/x", ""),
        ("http://localhost.example/x", "plain:2"),
    ],
)
def test_an_address_has_the_proxy_that_the_host_has_for_it(
    monkeypatch: pytest.MonkeyPatch, url: str, proxy: str
) -> None:
    monkeypatch.setenv("https_proxy", "http://secure:1")
    monkeypatch.setenv("HTTP_PROXY", "plain:2")
    monkeypatch.setenv("NO_PROXY", "two.example,three.example:7")
    assert web.proxy_of(url) == proxy


def test_without_tls_a_proxy_gets_the_whole_address_and_its_own_password(
    there: web.Web, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{played.address}")
    # As a proxy is asked: by the whole address.
    played.answers["http://index.example/file"] = [(200, {}, b"of the index")]
    with there.open("GET", "http://index.example/file", {}, authorization="mine") as answer:
        assert answer.read() == b"of the index"
    [(_, _, headers)] = played.asked
    assert headers["Host"] == "index.example"
    assert headers["Authorization"] == "mine"
    assert headers["Proxy-Authorization"] == web.basic("me", "p@ss")


def test_a_password_is_for_the_first_address_alone(there: web.Web, played: Played) -> None:
    other = f"http://{played.address.replace('127.0.0.1', 'localhost')}/other"
    played.answers["/first"] = [(302, {"Location": other}, b"")]
    played.answers["/other"] = [(200, {}, b"found")]
    url = f"http://{played.address}/first"
    with there.open("GET", url, {}, authorization="mine", onward=urljoin) as answer:
        assert (answer.read(), answer.url) == (b"found", other)
    assert [headers.get("Authorization") for _, _, headers in played.asked] == ["mine", None]


def test_an_error_says_what_the_system_said(there: web.Web, played: Played) -> None:
    played.close()
    with (
        pytest.raises(HTTPError) as caught,
        there.open("GET", f"http://{played.address}/", {}),
    ):
        pass
    assert str(web.cause(caught.value)) == "[Errno 111] Connection refused"


def test_an_answer_is_as_it_was_sent(there: web.Web, played: Played) -> None:
    """A sha256 is of the bytes that came, not of what they decode to."""
    data = b"\x1f\x8b no gzip"
    played.answers["/x"] = [(200, {"Content-Encoding": "gzip"}, data)]
    with there.open("GET", f"http://{played.address}/x", {}) as answer:
        assert answer.read() == data

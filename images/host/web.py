"""HTTP to other machines: by urllib3, through the proxies of this host.

urllib3 keeps connections open and takes the next request through them. It has one proxy for
everything, though. Here each address has its own, also the one that a server redirects to:
no_proxy names a registry, say, and not the storage behind it.
"""

from __future__ import annotations

import base64
import re
import ssl
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError

from rollout.problem import Problem

_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?")
_REDIRECTIONS = 10  # one after the other, before the next is an answer like any other
_REST = 64 << 10  # bytes of an answer that are read only to keep the connection


def local(host: str) -> bool:
    """Whether a host, with or without a port, is this machine: no proxy is asked about it."""
    return _LOOPBACK.fullmatch(host) is not None


def basic(user: str, password: str) -> str:
    """The header that gives a name and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def cause(error: BaseException) -> BaseException:
    """What went wrong below an exception of urllib3, whose own text names objects of Python."""
    while isinstance(error, HTTPError):
        inner = next((a for a in error.args if isinstance(a, BaseException)), error.__cause__)
        if inner is None:
            break
        error = inner
    return error


def proxy_of(url: str) -> str:
    """The proxy that the host has for an address (http_proxy, https_proxy, no_proxy), or none."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if local(host) or urllib.request.proxy_bypass(host):
        return ""
    return urllib.request.getproxies().get(parts.scheme, "")


@dataclass
class Web:
    """Connections that trust the same certificates; kept until a server closes them.

    ``timeout`` are seconds without a byte. After a fork only one side may use it: each would read
    answers to the other.
    """

    trusted: ssl.SSLContext
    timeout: float
    _pools: dict[str, urllib3.PoolManager] = field(default_factory=dict, repr=False)

    def _through(self, proxy: str) -> urllib3.PoolManager:
        """The connections through a proxy; its credentials stand in its address.

        Raises:
            Problem: exit code 2 for what is no proxy.
        """
        if not proxy:
            return urllib3.PoolManager(ssl_context=self.trusted)
        try:
            # Without a scheme it is what people write: host:port.
            parts = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
            user, _, password = (unquote(word) for word in (parts.auth or "").partition(":"))
            headers = {"Proxy-Authorization": basic(user, password)} if parts.auth else {}
            if parts.host:
                return urllib3.ProxyManager(
                    parts.url,
                    proxy_headers=headers,
                    proxy_ssl_context=self.trusted,
                    ssl_context=self.trusted,
                )
        except LocationValueError:
            pass
        raise Problem(
            "http_proxy or https_proxy names something that is no HTTP proxy; say it like "
            "'http://proxy.example.com:3128'",
            2,
        )

    @contextmanager
    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        authorization: str = "",
        data: bytes | None = None,
        onward: Callable[[str, str], str] | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Send one request, once; the answer comes unread and undecoded, ``url`` says from where.

        ``onward`` makes of an address and of what it redirects to the next address, or raises.
        Without it, and for all but GET and HEAD, a redirection is an answer like any other.
        ``authorization`` goes to the first address alone: the next may be somebody else's.

        Raises:
            urllib3.exceptions.HTTPError: there is no connection, or it broke. So may reading.
        """
        for left in reversed(range(_REDIRECTIONS + 1)):
            proxy = proxy_of(url)
            pools = self._pools.get(proxy) or self._pools.setdefault(proxy, self._through(proxy))
            secret = {"Authorization": authorization} if authorization else {}
            answer = pools.urlopen(
                method,
                url,
                body=data,
                headers={**headers, **secret},
                timeout=self.timeout,
                redirect=False,  # by the next turn of this loop
                retries=False,  # who asks knows what may be sent twice
                preload_content=False,
                decode_content=False,
            )
            location = answer.get_redirect_location()
            try:
                if not location or not onward or method not in ("GET", "HEAD") or not left:
                    answer.url = url
                    yield answer
                    _rest(answer)
                    return
                url, authorization = onward(url, location), ""
                _rest(answer)
            finally:
                answer.close()  # where something is left to read; else it is in the pool already


def _rest(answer: urllib3.BaseHTTPResponse) -> None:
    """Read what little is left, so that the next request can take the same connection."""
    with suppress(HTTPError):
        answer.read(_REST)

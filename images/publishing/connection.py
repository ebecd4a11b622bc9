"""The way to a registry: its address, who one is there, and where it may send to.

It takes the credentials, certificates and proxies that skopeo takes. Every way to fail is one
sentence. A request is sent once; what may be sent again, and after which wait, is for
:func:`images.publishing.failures.patiently`.
"""

from __future__ import annotations

import http.client
import os
import re
import string
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from images.host import web
from images.publishing import answers, credentials, failures, oci
from images.publishing.answers import Answer
from images.publishing.failures import Broken, Unreachable
from images.publishing.names import parse_target
from images.publishing.oci import Damaged
from rollout.problem import Problem

TIMEOUT = 60  # seconds without a byte
AGENT = {"User-Agent": "verl-rollout"}


def onward(address: str, url: str, registry: str) -> str:
    """Where a registry sends to, if that is as safe as ``address``, from where it does so.

    Without TLS one machine is safe, this one, and only where the registry does without as well.

    Raises:
        Unreachable: it is another scheme, a step back from TLS, or no address.
    """
    try:
        whole = urllib.parse.urljoin(address, url)
        whole = urllib.parse.quote(whole, safe=string.punctuation)
        parts = urllib.parse.urlsplit(whole)
        fine = bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        fine = False
    if fine:
        plain = address.startswith("http:") and web.local(parts.netloc)
        fine = parts.scheme == "https" or (parts.scheme == "http" and plain)
    if not fine:
        raise Unreachable(
            f"{registry} sends to {oci.shown(url)!r}, which is not safe: it has to be an address "
            "with https://; whoever runs the registry can mend that"
        )
    return whole


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """What two addresses have in common where the one may see the credentials for the other."""
    parts = urllib.parse.urlsplit(url)
    ports = {"https": http.client.HTTPS_PORT, "http": http.client.HTTP_PORT}
    return parts.scheme, parts.hostname, parts.port or ports.get(parts.scheme)


@dataclass
class Connection:
    """A registry that can be asked, and the prefix that all names in it have.

    Methods take the name of a repository below the prefix. They raise Problem where the registry
    cannot be reached, or refuses.
    """

    target: str
    authfile: Path | None = None
    cert_dir: Path | None = None
    waits: Sequence[float] | None = None  # before each further attempt; else failures.WAITS
    # What was found out once, shared with copies of this object: tokens, and the one way.
    _authorized: dict[tuple[str, bool], str] = field(default_factory=dict, repr=False)
    _ways: list[tuple[str, web.Web]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.host, self.prefix = parse_target(self.target)
        if self.authfile:
            try:
                self.authfile.open("rb").close()
            except OSError as error:
                why = error.strerror
                raise Problem(f"--authfile {self.authfile} cannot be read: {why}", 2) from None

    # Names

    def path(self, repository: str) -> str:
        """What the registry calls a repository."""
        path = f"{self.prefix}/{repository}" if self.prefix else repository
        parse_target(f"{self.host}/{path}")
        return path

    def name(self, repository: str) -> str:
        """A repository in full, as people and docker write it."""
        return f"{self.host}/{self.path(repository)}"

    def reference(self, repository: str, reference: str) -> str:
        """An image in full: by its tag, or by its digest."""
        return f"{self.name(repository)}{'@' if oci.is_digest(reference) else ':'}{reference}"

    # The way

    def _way(self) -> tuple[str, web.Web]:
        """The address of the registry, and what opens it; found out once."""
        if not self._ways:
            way = web.Web(credentials.tls(self.host, self.cert_dir), TIMEOUT)
            name = "registry-1.docker.io" if self.host == credentials.DOCKER_HUB else self.host
            plain = web.local(self.host) and self._is_plain(way, f"https://{name}/v2/")
            self._ways.append((f"{'http' if plain else 'https'}://{name}", way))
        return self._ways[0]

    def _is_plain(self, way: web.Web, address: str) -> bool:
        """Whether a registry of this machine does without TLS; a wrong certificate is an error."""
        try:
            with way.open("GET", address, AGENT):
                return False
        except HTTPError as error:
            problem = failures.unreachable(error, self.host)
            if problem.sentence == failures.PLAIN.format(host=self.host):
                return True
            raise problem from None

    @property
    def plain_http(self) -> bool:
        """Whether this registry is spoken to without TLS."""
        return failures.patiently(self._way, self.waits)[0].startswith("http:")

    # Requests

    @contextmanager
    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str,
        data: bytes | None = None,
    ) -> Iterator[BaseHTTPResponse]:
        """One request, once; what breaks is one sentence, with the wait that the registry wants."""
        further = partial(onward, registry=self.host)
        try:
            with self._way()[1].open(
                *(method, url, {**AGENT, **headers}),
                authorization=authorization,
                data=data,
                onward=further,
            ) as answer:
                try:
                    yield answer
                except Broken as problem:
                    # A server of tokens, asked in between, has said when itself.
                    asked = failures.seconds(answer.headers.get("Retry-After", ""))
                    problem.after = problem.after or asked
                    raise
        except HTTPError as error:
            raise failures.unreachable(error, self.host) from None

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        repository: str,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Iterator[BaseHTTPResponse]:
        """One request, and once more with credentials where the registry asks for them."""
        address, _ = self._way()
        url = onward(address, url, self.host)
        key = (repository, method in ("GET", "HEAD"))
        for attempt in (1, 2):
            known = self._authorized.get(key, "") if _origin(url) == _origin(address) else ""
            with self._send(method, url, headers or {}, known, data) as answer:
                own = _origin(answer.url or "") == _origin(address)  # not of a storage behind it
                challenges = answer.headers.getlist("WWW-Authenticate")
                if answer.status == 401 and attempt == 1 and challenges and own:
                    authorized = self._authorize(challenges[0], repository)
                    if authorized:
                        self._authorized[key] = authorized
                        continue
                yield answer
                return

    def _credentials(self, repository: str) -> tuple[str, str] | None:
        files = (
            [self.authfile] if self.authfile else credentials.auth_files(os.environ, Path.home())
        )
        return credentials.credentials(self.name(repository), files)

    def _meaning(self, status: int, body: bytes, repository: str) -> Problem:
        """What an answer that nobody wanted means to who may have logged in, or not."""
        login = status not in (401, 403) or self._credentials(repository) is not None
        return failures.meaning(status, body, self.name(repository), login=login)

    def _authorize(self, challenge: str, repository: str) -> str:
        """The header that a registry asks for; empty where there are no credentials for it."""
        found = self._credentials(repository)
        basic = web.basic(*found) if found else ""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() != "bearer":
            return basic
        asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = onward(self._way()[0], asked.pop("realm", ""), self.host)
        query = {k: v for k, v in asked.items() if k in ("service", "scope")}
        with self._send("GET", f"{realm}?{urllib.parse.urlencode(query)}", {}, basic) as answer:
            if not 200 <= answer.status < 300:
                raise self._meaning(answer.status, answers.reason(answer), repository)
            try:
                data = oci.document(answers.whole(answer, answers.MOST_OF_A_MANIFEST, realm))
            except Damaged:
                data = {}
        token = data.get("token") or data.get("access_token")
        fine = isinstance(token, str) and re.fullmatch("[!-~]+", token)  # what a header can have
        return f"Bearer {token}" if fine else ""

    def _ask(
        self,
        method: str,
        url: str,
        repository: str,
        *,
        expected: Sequence[int],
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        most: int | None = None,
        what: str = "",
    ) -> Answer:
        """A small question with patience; what is not expected is a Problem.

        The answer is of ``what``, and may have ``most`` bytes, else those of a manifest.
        """

        def once() -> Answer:
            with self._open(method, url, repository, headers, data) as answer:
                if answer.status not in expected:
                    raise self._meaning(answer.status, answers.reason(answer), repository)
                if answer.status < 300:
                    most_of_it = answers.MOST_OF_A_MANIFEST if most is None else most
                    about = what or f"an answer for {self.name(repository)}"
                    body = answers.whole(answer, most_of_it, about)
                else:
                    body = answers.reason(answer)
                return Answer(answer.status, answer.headers, body)

        return failures.patiently(once, self.waits)

"""The one place that talks to a registry.

Layers go through skopeo, which uploads several at once and skips what is there. Small questions
and attestations go over HTTP from here: skopeo cannot ask for referrers or for the size of a blob.
Both take the same credentials (``skopeo login``, ``docker login``), certificates and proxies.
Every way to fail is one sentence; a broken connection is tried again, with longer and longer waits.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import ssl
import string
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from images import host
from images.host import leash
from images.publishing import credentials, failures, oci
from images.publishing.failures import Broken, Odd, Unreachable
from images.publishing.oci import Damaged, Descriptor
from rollout.problem import Problem

TIMEOUT = 60  # seconds without a byte
AGENT = "verl-rollout"
_PIECE = 1 << 20
# What is read into memory, whatever a registry sends: the limit of most registries for a manifest,
# and many times what the largest attestation has.
MOST_OF_A_MANIFEST = 4 << 20
MOST_OF_A_BLOB = 64 << 20
_MOST_OF_A_REASON = 64 << 10
_PAGES = 1000  # of a list
_PORTS = 65535
_LONGEST = 255  # of a name, HOST included: what docker and containers/image take
_HOST = re.compile(
    r"(localhost|\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*)(:[0-9]{1,5})?"
)
_COMPONENT = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?")
_NO_CONNECTION = (OSError, http.client.HTTPException, UnicodeError)  # the last of odd host names


# Names


def parse_target(text: str) -> tuple[str, str]:
    """HOST and PREFIX of ``--to HOST[/PREFIX]``.

    Raises:
        Problem: exit code 2 for what no registry takes as a name.
    """
    bare = text.removeprefix("docker://").rstrip("/")
    name, _, prefix = bare.partition("/")
    if "://" in bare or not _HOST.fullmatch(name) or not (_local(name) or re.search("[.:]", name)):
        raise Problem(
            f"{text!r} does not begin with the host of a registry; say it like "
            "'registry.example.com/team' or '127.0.0.1:5000'",
            2,
        )
    port = name.rpartition("]")[2].partition(":")[2]
    if port and not 0 < int(port) <= _PORTS:
        raise Problem(f"{text!r} has a port that there is not; the last one is {_PORTS}", 2)
    for component in prefix.split("/") if prefix else ():
        if not _COMPONENT.fullmatch(component):
            raise Problem(
                f"{text!r} is no name that a registry takes, because of {component!r}; between "
                "slashes stand lower-case letters and digits, joined by '.', '_', '__' or '-'",
                2,
            )
    if len(bare) > _LONGEST:
        raise Problem(f"{text!r} is longer than {_LONGEST} characters; take a shorter prefix", 2)
    return name, prefix


def parse_reference(text: str) -> tuple[str, str, str]:
    """``HOST[/PREFIX]``, ``REPOSITORY`` and the tag or digest of a reference in full.

    Raises:
        Problem: exit code 2 for what is no such reference.
    """
    bare = text.removeprefix("docker://")
    name, at, reference = bare.partition("@")
    if not at:
        name, _, reference = bare.rpartition(":")
    target, _, repository = name.rpartition("/")
    if at and target and ":" in repository:
        raise Problem(f"{text!r} has both; say a tag or a digest, not both", 2)
    fine = oci.is_digest(reference) if at else is_tag(reference)
    if not fine or not target or "/" in reference:
        raise Problem(
            f"{text!r} is no image of a registry; say HOST[/PREFIX]/REPOSITORY:TAG, or @sha256:… "
            "in place of :TAG",
            2,
        )
    parse_target(name)
    return target, repository, reference


def is_tag(text: str) -> bool:
    """Whether a registry takes this as a tag."""
    return _TAG.fullmatch(text) is not None


def _local(name: str) -> bool:
    """Whether a host is this machine, where a registry may do without TLS."""
    return _LOOPBACK.fullmatch(name) is not None


# HTTP


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
        plain = address.startswith("http:") and _local(parts.netloc)
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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A question for the size of a blob stays one where a registry points to its storage."""

    def __init__(self, registry: str) -> None:
        self._registry = registry

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # Before Python reads it, which ends in errors of other kinds.
        onward(req.full_url, headers.get("Location", ""), self._registry)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        onward(req.full_url, newurl, self._registry)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new and req.get_method() == "HEAD":
            new.method = "HEAD"
        return new


def _length(answer: http.client.HTTPResponse, what: str) -> int | None:
    """The bytes that an answer announces; None where it does not."""
    given = answer.headers.get("Content-Length")
    if given is not None and not re.fullmatch("[0-9]{1,18}", given):
        raise Damaged(f"{what}: the registry gives {oci.shown(given)!r} as its length")
    return None if given is None else int(given)


def _read(answer: http.client.HTTPResponse, most: int, what: str) -> bytes:
    """All of an answer, which may have so many bytes.

    Raises:
        Damaged: it has more.
    """
    if (_length(answer, what) or 0) <= most:
        data = answer.read(most + 1)
        if len(data) <= most:
            if answer.length:  # read() with a limit does not complain of an early end
                raise http.client.IncompleteRead(data, answer.length)
            return data
    raise Damaged(f"{what} is larger than it may be, which is {most:,} bytes")


def _reason(answer: http.client.HTTPResponse) -> bytes:
    """The beginning of an answer that is none to the question."""
    return answer.read(_MOST_OF_A_REASON)


@dataclass(frozen=True)
class Answer:
    """What a registry answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    def header(self, name: str) -> str:
        """A header by its name in any case; empty where there is none."""
        return next((v for k, v in self.headers.items() if k.lower() == name.lower()), "")


@dataclass
class Registry:
    """A registry, and the prefix that all names in it have.

    Methods take the name of a repository below the prefix. They raise Problem where the registry
    cannot be reached, refuses, or gives something else than was asked for.
    """

    target: str
    authfile: Path | None = None
    cert_dir: Path | None = None
    waits: Sequence[float] | None = None  # before each further attempt; else failures.WAITS
    _authorized: dict[tuple[str, bool], str] = field(default_factory=dict, repr=False)
    _openers: list[tuple[str, urllib.request.OpenerDirector]] = field(
        default_factory=list, repr=False
    )

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

    # Connections

    def _connect(self) -> tuple[str, urllib.request.OpenerDirector]:
        """The address of the registry, and what opens it; found out once."""
        if self._openers:
            return self._openers[0]
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.HTTPSHandler(context=credentials.tls(self.host, self.cert_dir)),
            _Redirects(self.host),
        ]
        if _local(self.host):
            handlers.append(urllib.request.ProxyHandler({}))  # none is asked about this machine
        opener = urllib.request.build_opener(*handlers)
        name = "registry-1.docker.io" if self.host == credentials.DOCKER_HUB else self.host
        address = f"https://{name}"
        if _local(self.host) and self._is_plain(opener, address):
            address = f"http://{name}"
        self._openers.append((address, opener))
        return self._openers[0]

    def _is_plain(self, opener: urllib.request.OpenerDirector, address: str) -> bool:
        """Whether a registry of this machine does without TLS; a wrong certificate is an error."""
        try:
            opener.open(f"{address}/v2/", timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            return False
        except urllib.error.URLError as error:
            problem = failures.unreachable(error, self.host)
            if isinstance(error.reason, ssl.SSLError) and problem.sentence == failures.PLAIN.format(
                host=self.host
            ):
                return True
            raise problem from None
        except _NO_CONNECTION as error:
            raise failures.unreachable(error, self.host) from None
        return False

    @property
    def plain_http(self) -> bool:
        """Whether this registry is spoken to without TLS."""
        return failures.patiently(self._connect, self.waits)[0].startswith("http:")

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        repository: str,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """One request, and once more with credentials where the registry asks for them."""
        address, opener = self._connect()
        url = onward(address, url, self.host)
        reads = method in ("GET", "HEAD")
        for attempt in (1, 2):
            request = urllib.request.Request(url, data, dict(headers or {}), method=method)  # noqa: S310 - its scheme is ours
            request.add_header("User-Agent", AGENT)
            known = self._authorized.get((repository, reads))
            if known and _origin(url) == _origin(address):
                # Not to follow a redirection: what signs an address of a storage is in it already.
                request.add_unredirected_header("Authorization", known)
            try:
                answer = opener.open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                answer = cast(http.client.HTTPResponse, error)  # it reads in the same way
            except _NO_CONNECTION as error:
                raise failures.unreachable(error, self.host) from None
            with answer:
                challenge = answer.headers.get("WWW-Authenticate", "")
                own = _origin(answer.geturl()) == _origin(address)  # not of a storage behind it
                if answer.status == 401 and attempt == 1 and challenge and own:
                    authorized = self._authorize(challenge, repository)
                    if authorized:
                        self._authorized[(repository, reads)] = authorized
                        continue
                try:
                    yield answer
                except Broken as problem:
                    problem.after = failures.seconds(answer.headers.get("Retry-After", ""))
                    raise
                except (
                    *(ConnectionError, TimeoutError, ssl.SSLError),
                    http.client.HTTPException,
                ) as error:
                    raise failures.unreachable(error, self.host) from None
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
        basic = base64.b64encode(":".join(found).encode()).decode() if found else ""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() != "bearer":
            return f"Basic {basic}" if basic else ""
        address, opener = self._connect()
        asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = onward(address, asked.pop("realm", ""), self.host)
        query = {k: v for k, v in asked.items() if k in ("service", "scope")}
        request = urllib.request.Request(f"{realm}?{urllib.parse.urlencode(query)}")  # noqa: S310
        request.add_header("User-Agent", AGENT)
        if basic:
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                data = oci.document(_read(answer, MOST_OF_A_MANIFEST, realm))
        except urllib.error.HTTPError as error:
            body = b""
            with error, suppress(*_NO_CONNECTION):
                body = _reason(cast(http.client.HTTPResponse, error))
            problem = self._meaning(error.code, body, repository)
            if isinstance(problem, Broken):
                problem.after = failures.seconds(error.headers.get("Retry-After", ""))
            raise problem from None
        except _NO_CONNECTION as error:
            raise failures.unreachable(error, self.host) from None
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
                    raise self._meaning(answer.status, _reason(answer), repository)
                if answer.status < 300:
                    most_of_it = MOST_OF_A_MANIFEST if most is None else most
                    whole = what or f"an answer for {self.name(repository)}"
                    body = _read(answer, most_of_it, whole)
                else:
                    body = _reason(answer)
                return Answer(answer.status, dict(answer.headers.items()), body)

        return failures.patiently(once, self.waits)

    def _url(self, repository: str, *parts: str) -> str:
        return "/".join(("/v2", self.path(repository), *parts))

    # Questions

    def manifest(self, repository: str, reference: str) -> tuple[bytes, Descriptor] | None:
        """A manifest or index as the registry has it, by tag or digest; None where it has none.

        Raises:
            Damaged: its bytes are not those of the digest that was asked for, or too many.
        """
        url, what = (
            self._url(repository, "manifests", reference),
            self.reference(repository, reference),
        )
        accept = {"Accept": ", ".join(oci.MANIFESTS)}
        answer = self._ask("GET", url, repository, expected=(200, 404), headers=accept, what=what)
        if answer.status == 404:
            return None
        found = Descriptor(
            oci.shown(answer.header("Content-Type").partition(";")[0]),
            oci.digest(answer.body),
            len(answer.body),
        )
        if oci.is_digest(reference) and found.digest != reference:
            raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {found.digest}")
        return answer.body, found

    def resolve(self, repository: str, reference: str) -> str | None:
        """The digest that a tag stands for, None where there is no such tag.

        The digest is of the bytes: what a registry says in a header proves nothing.
        """
        found = self.manifest(repository, reference)
        return found[1].digest if found else None

    def blob_size(self, repository: str, digest: str) -> int | None:
        """The bytes of a blob as the registry counts them, None where it has none."""
        url = self._url(repository, "blobs", digest)

        def once() -> int | None:
            with self._open("HEAD", url, repository) as answer:
                if answer.status == 404:
                    return None
                if answer.status != 200:
                    raise self._meaning(answer.status, b"", repository)
                return _length(answer, self.reference(repository, digest)) or 0

        return failures.patiently(once, self.waits)

    def blob(self, repository: str, digest: str, size: int | None = None) -> bytes:
        """A small blob, in memory; ``size`` are the bytes that a manifest announces.

        Raises:
            Damaged: there is none, its bytes are not those of its digest, or they are too many.
        """
        url, what = self._url(repository, "blobs", digest), self.reference(repository, digest)
        if size is not None and size > MOST_OF_A_BLOB:
            raise Damaged(
                f"{what} is announced with {size:,} bytes, which is no attestation's size"
            )
        most = MOST_OF_A_BLOB if size is None else size
        answer = self._ask("GET", url, repository, expected=(200, 404), most=most, what=what)
        if answer.status == 404:
            raise Damaged(f"{what} is not in the registry")
        if oci.digest(answer.body) != digest:
            given = oci.digest(answer.body)
            raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {given}")
        return answer.body

    def download(
        self, repository: str, digest: str, path: Path, *, size: int | None = None
    ) -> None:
        """Write a blob of any size to a file; a broken download goes on where it broke.

        ``size`` are the bytes that a manifest announces: it ends where more come.

        Raises:
            Damaged: there is none, its bytes are not those of its digest, or they are too many; no
                file is left.
        """
        what = self.reference(repository, digest)
        with host.replacing(path) as temporary:
            with temporary.open("w+b") as file:
                failures.patiently(
                    lambda: self._receive(repository, digest, file, size), self.waits
                )
            given = f"sha256:{host.sha256(temporary)}"
            if given != digest:
                raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {given}")

    def _receive(self, repository: str, digest: str, file: IO[bytes], size: int | None) -> None:
        start, what = file.seek(0, os.SEEK_END), self.reference(repository, digest)
        url, headers = self._url(repository, "blobs", digest), {"Range": f"bytes={start}-"}
        with self._open("GET", url, repository, headers if start else {}) as answer:
            if answer.status == 404:
                raise Damaged(f"{what} is not in the registry")
            if answer.status == 416:
                return  # it was whole already, and the end of the connection came too late
            if answer.status not in (200, 206):
                raise self._meaning(answer.status, _reason(answer), repository)
            if answer.status == 200:  # from the beginning, whatever was asked for
                start = file.seek(0)
                file.truncate()
            expected = _length(answer, what)
            received = 0
            while piece := answer.read(_PIECE):
                received += len(piece)
                if size is not None and start + received > size:
                    raise Damaged(f"{what} is larger than announced, which is {size:,} bytes")
                file.write(piece)
            file.flush()
        if expected is not None and received != expected:
            raise Broken(
                failures.BROKEN.format(host=self.host, why=f"{received} of {expected} bytes came")
            )

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository, sorted; none where there is no such repository.

        Raises:
            Damaged: it is no list of tags, or one without an end.
        """
        found: set[str] = set()
        url, what = self._url(repository, "tags", "list"), f"the tags of {self.name(repository)}"
        for answer in self._pages(url, repository, expected=(200, 404), what=what):
            if answer.status == 404:
                break
            given = oci.document(answer.body).get("tags", [])
            given = [] if given is None else given  # some say null where there are none
            if not isinstance(given, list) or not all(
                isinstance(tag, str) and is_tag(tag) for tag in given
            ):
                raise Damaged(f"{what}: the registry gives something that is no list of tags")
            found.update(given)
        return sorted(found)

    def referrers(self, repository: str, digest: str) -> list[Descriptor]:
        """The attestations of an image: by the referrers API, else by the fallback tag."""
        url, what = self._url(repository, "referrers", digest), f"the attestations of {digest}"
        entries: list[Descriptor] = []
        known = False
        try:
            pages = self._pages(url, repository, expected=(200, 400, 404, 405), what=what)
            for answer in pages:
                fine = answer.status == 200 and answer.header("Content-Type").startswith(oci.INDEX)
                if known and not fine:
                    raise Damaged(
                        f"{what}: the registry gives some of them, and then {answer.status}"
                    )
                if not fine:
                    break
                known = True
                entries += oci.parse_index(answer.body)
        except Odd:
            if known:
                raise  # some of them are worse than none: the others would be attached again
        if known:
            return entries
        found = self.manifest(repository, oci.fallback_tag(digest))
        return oci.parse_index(found[0]) if found else []

    def _pages(
        self, url: str, repository: str, *, expected: Sequence[int], what: str
    ) -> Iterator[Answer]:
        """The pages of a list, as far as the registry says that there are more.

        Raises:
            Damaged: they have no end.
        """
        for _ in range(_PAGES):
            answer = self._ask("GET", url, repository, expected=expected, what=what)
            yield answer
            more = re.match(r'<([^>]+)>;\s*rel="?next"?', answer.header("Link"))
            if not more:
                return
            url = more[1]
        raise Damaged(f"{what} come on more than {_PAGES} pages")

    # Changes

    def push_blob(self, repository: str, data: bytes) -> Descriptor:
        """Upload a small blob, where the registry does not have it; returns what it is."""
        found = Descriptor("application/octet-stream", oci.digest(data), len(data))
        if self.blob_size(repository, found.digest) == len(data):
            return found

        def once() -> None:
            location = self._begin(repository, "")
            joint = "&" if "?" in location else "?"
            url = f"{location}{joint}digest={urllib.parse.quote(found.digest)}"
            headers = {"Content-Type": "application/octet-stream"}
            with self._open("PUT", url, repository, headers, data) as answer:
                if answer.status == 404:  # the upload is gone: the registry was started anew
                    raise Broken(
                        failures.BROKEN.format(host=self.host, why="the upload is unknown")
                    )
                if answer.status != 201:
                    raise self._meaning(answer.status, _reason(answer), repository)

        failures.patiently(once, self.waits)
        return found

    def _begin(self, repository: str, query: str, expected: Sequence[int] = (202,)) -> str:
        """Begin an upload; where it goes on, empty where nothing is left to do."""
        url = self._url(repository, "blobs", "uploads", "") + query
        with self._open("POST", url, repository, {"Content-Length": "0"}, b"") as answer:
            if answer.status not in expected:
                raise self._meaning(answer.status, _reason(answer), repository)
            location = answer.headers.get("Location", "")
            if answer.status == 202 and not location:
                raise Odd(f"{self.host} takes an upload, and does not say where it goes on", 202)
            return "" if answer.status == 201 else location

    def mount(self, repository: str, digest: str, origin: str) -> bool:
        """Let a repository have a blob of another one of this registry (``origin``, its path).

        False where the registry does not do that, or the other one has no such blob.
        """
        query = urllib.parse.urlencode({"mount": digest, "from": origin})

        def once() -> bool:
            location = self._begin(repository, f"?{query}", (201, 202))
            if location:
                self._cancel(repository, location)
            return not location

        try:
            return failures.patiently(once, self.waits)
        except Odd:
            return False

    def _cancel(self, repository: str, location: str) -> None:
        with suppress(Problem), self._open("DELETE", location, repository) as answer:
            _reason(answer)

    def push_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> bool:
        """Put a manifest under a tag or its digest; whether the registry took note of its subject.

        Raises:
            Problem: the registry refuses; so it does where a blob of it is missing.
        """
        url = self._url(repository, "manifests", reference)
        headers = {"Content-Type": media_type}
        answer = self._ask("PUT", url, repository, expected=(201,), headers=headers, data=data)
        return bool(answer.header("OCI-Subject"))

    def forget(self, repository: str, digest: str) -> bool:
        """Remove a manifest; False where the registry does not do that."""
        url = self._url(repository, "manifests", digest)
        return self._ask("DELETE", url, repository, expected=(202, 404, 405)).status == 202

    def why(self, repository: str) -> Problem | None:
        """What the registry says of a small upload; None where it takes it.

        skopeo keeps to itself what a registry answers beside the status, so a full disk is found
        out like this. Nothing stays: the upload is given up.
        """
        try:
            location = self._begin(repository, "")
            headers = {"Content-Type": "application/octet-stream"}
            try:
                with self._open("PATCH", location, repository, headers, bytes(_PIECE)) as answer:
                    location = answer.headers.get("Location", location)
                    if answer.status not in (202, 204):
                        return self._meaning(answer.status, _reason(answer), repository)
            finally:
                self._cancel(repository, location)
        except Problem as problem:
            return problem
        return None


# skopeo


def copy_argv(
    source: str,
    destination: str,
    *,
    plain: tuple[bool, bool] = (False, False),
    authfile: Path | None = None,
    cert_dir: Path | None = None,
) -> list[str]:
    """The command that copies an image without changing a byte of it.

    ``plain`` says of source and destination whether they are registries without TLS.
    """
    sides = {"src": source, "dest": destination}
    remote = [side for side, name in sides.items() if name.startswith("docker://")]
    return [
        *("skopeo", "copy", "--preserve-digests"),
        *(
            f"--{side}-tls-verify=false"
            for side, without in zip(sides, plain, strict=True)
            if without
        ),
        *(word for s in remote if cert_dir for word in (f"--{s}-cert-dir", str(cert_dir))),
        *(["--authfile", str(authfile)] if authfile else []),
        *(source, destination),
    ]


def copy(
    argv: Sequence[str],
    name: str,
    tick: Callable[[], None] = lambda: None,
    seconds: float = 1.0,
) -> None:
    """Run one copy to ``name`` (HOST/PREFIX/REPOSITORY); ``tick`` is called every now and then.

    Raises:
        Broken: the connection broke; what was uploaded in whole blobs stays in the registry.
        Problem: another attempt would end in the same way.
    """
    host.require("skopeo")
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with leash.leashed(argv, stdout=output, stderr=subprocess.STDOUT) as process:
            while True:
                try:
                    code = process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        if code:
            output.seek(0)
            raise failures.meaning_of_skopeo(output.read(), code, name)

"""From a failure to one sentence: of HTTP, of the connection below it, and of skopeo.

The kind of a failure says what may be done: wait and try again (Broken), ask later or as somebody
else, since the registry gave no verdict (Unreachable), or let who asked judge the answer (Odd).
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from urllib3.exceptions import IncompleteRead, InvalidHeader, LocationValueError
from urllib3.util import Retry

from images import host
from images.host import web
from images.publishing import oci
from rollout.problem import Problem

# Seconds before each further attempt, after a connection broke or the registry was out of order.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
# Seconds that a registry may ask for (Retry-After) before it is worth more to end and say so. Most
# limits are counted by the minute, and this waits some of them out. After a longer wait CI would
# end the job, and nobody would read the reason.
LONGEST = 300.0
_RETRY = Retry(retry_after_max=10**9)  # to read the header; nobody waits for so long
_TLS = "TLS with {host} failed: {why}; name its CA with SSL_CERT_FILE=FILE or --cert-dir DIR"
PLAIN = (
    "{host} does not speak TLS; only a registry on this machine may do without (127.0.0.1, "
    "localhost, [::1])"
)
_UNKNOWN = "there is no host {host}, or no way to ask for its address; is the name right?"
_FULL = "the disk of the registry {host} is full; free space there and run this again"
_REFUSED = (
    "{host} refuses these credentials for {name}; log in with 'skopeo login {host}' as somebody "
    "who may do this, or name a file with --authfile"
)
_LOGIN = (
    "{host} asks for a login, and none is known for {name}; log in with 'skopeo login {host}', or "
    "name a file with --authfile"
)
# Seen where two publishers upload the same blob in the same moment; a little later all is well.
_CONFUSED = "{host} does not know yet what it was sent ({why})"
BROKEN = "the connection to {host} broke ({why})"
_FULL_SIGNS = ("no space left", "insufficient storage", "disk quota exceeded", '"err":28')
T = TypeVar("T")


class Unreachable(Problem):
    """A registry that cannot be asked: no verdict on an image, so the exit code is 3.

    Its host is unknown, the connection broke, TLS failed, or credentials are missing or refused.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, 3)


class Broken(Unreachable):
    """What another attempt may mend: a broken connection, a registry that is out of order.

    ``after`` are the seconds that the registry wants to be left alone.
    """

    after = 0.0


class Odd(Problem):
    """An answer that only who asked can judge; ``status`` is HTTP's."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def _says(body: bytes) -> str:
    """What a registry gives as its reason: the first error of its list, else the first line."""
    text = body.decode("utf-8", "replace").strip()
    with suppress(ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        first = json.loads(text)["errors"][0]
        detail = first.get("detail")
        return oci.shown(f"{first['message']}" + (f" ({json.dumps(detail)})" if detail else ""))
    return oci.shown(text.splitlines()[0]) if text else "no reason given"


def seconds(header: str) -> float:
    """What a ``Retry-After`` asks for: seconds, or a moment; 0 for what is neither."""
    try:
        return _RETRY.parse_retry_after(header)
    except (InvalidHeader, ValueError, OverflowError):  # the last two of numbers beyond measure
        return 0.0


def meaning(status: int, body: bytes, name: str, *, login: bool = True) -> Problem:
    """One sentence for an HTTP answer that nobody wanted; ``name`` is HOST/PREFIX/REPOSITORY.

    ``login`` says whether there were credentials to send.
    """
    registry, _, _ = name.partition("/")
    said = _says(body)
    if status == 507 or any(
        sign in body.decode("utf-8", "replace").lower() for sign in _FULL_SIGNS
    ):
        return Problem(_FULL.format(host=registry))
    if status in (401, 403):
        known = said.startswith(("no reason given", "authentication required"))
        reason = "" if known else f" ({said})"
        return Unreachable(
            (_REFUSED if login else _LOGIN).format(host=registry, name=name) + reason
        )
    if b"MANIFEST_BLOB_UNKNOWN" in body:
        return Broken(_CONFUSED.format(host=registry, why=said))
    if status == 429 or status >= 500:
        return Broken(f"{registry} is out of order: it answers {status}, {said}")
    if "NAME_INVALID" in body.decode("utf-8", "replace"):
        return Problem(f"{registry} does not allow the name {name}: {said}", 2)
    return Odd(f"{registry} refuses {name} with {status}: {said}", status)


def unreachable(error: BaseException, registry: str) -> Problem:
    """One sentence for a connection that was not made, or broke."""
    cause = web.cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Unreachable(_TLS.format(host=registry, why=oci.shown(cause.verify_message)))
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
        reason = getattr(cause, "reason", None) or str(cause)  # one made by hand has none
        plain = reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")
        return Unreachable((PLAIN if plain else _TLS).format(host=registry, why=oci.shown(reason)))
    unknown = isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
    if unknown or isinstance(cause, LocationValueError):
        return Unreachable(_UNKNOWN.format(host=registry))
    why = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
    if isinstance(cause, IncompleteRead):
        why = f"{cause.partial} of {cause.partial + cause.expected} bytes came"
    why = oci.shown(why.lower()) or type(cause).__name__
    return Broken(BROKEN.format(host=registry, why=why))


# What skopeo prints -> what it means; seen with 1.9.3, the words are those of Go and its library.
_SKOPEO: tuple[tuple[str, str], ...] = (
    (r"x509: [^\"]*", _TLS),
    (r"tls: [^\"]*", _TLS),
    (r"server gave HTTP response to HTTPS client", PLAIN),
    (r"no such host", _UNKNOWN),
    (r"unauthorized|authentication required|requested access to the resource is denied", _REFUSED),
    (r"(invalid username/password|denied)[^\"]*", _REFUSED),
)
_SKOPEO_BROKEN = re.compile(
    r"connection (refused|reset by peer)|broken pipe|\bEOF\b|i/o timeout|timeout awaiting|"
    r"server closed idle connection|no route to host|network is unreachable|"
    r"server misbehaving|HTTP status: (429|5\d\d)[^\"]*|toomanyrequests|"
    r"blob upload (unknown|invalid)|TLS handshake timeout"
)


def meaning_of_skopeo(output: str, code: int, name: str) -> Problem:
    """One sentence for a copy that failed; ``name`` is HOST/PREFIX/REPOSITORY."""
    registry, _, _ = name.partition("/")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    fatal = [line for line in lines if "level=fatal" in line]
    text = oci.shown((fatal or lines or [""])[-1].replace('\\"', "'"), 1000)
    if any(sign in text.lower() for sign in _FULL_SIGNS):
        return Problem(_FULL.format(host=registry))
    if broken := _SKOPEO_BROKEN.search(text):
        return Broken(BROKEN.format(host=registry, why=broken[0]))
    if confused := re.search(r"blob unknown to registry|digest invalid", text):
        return Broken(_CONFUSED.format(host=registry, why=confused[0]))
    for sign, sentence in _SKOPEO:
        if found := re.search(sign, text):
            return Unreachable(sentence.format(host=registry, name=name, why=found[0]))
    said = re.search(r'msg="(.*)"', text)
    return Problem(f"skopeo exited with {code}: {said[1] if said else text or 'no output'}")


def patiently(
    attempt: Callable[[], T],
    waits: Sequence[float] | None = None,
    moved: Callable[[], bool] = lambda: False,
) -> T:
    """Try something again where that may help, after longer and longer waits.

    A registry that says when to come back is not asked before.

    Patience begins anew where ``moved`` says that a failed attempt has brought something.

    Raises:
        Unreachable: it failed once more after the last wait, or the next one would be very long.
        Problem: it failed in a way that no patience mends.
    """
    waits, failed = WAITS if waits is None else waits, 0
    while True:
        try:
            return attempt()
        except Broken as problem:
            failed = 1 if moved() else failed + 1
            if problem.after > LONGEST:
                pause = f"asks to be left alone for {problem.after / 60:.0f} minutes"
                raise Unreachable(f"{problem.sentence}, and {pause}; run this again then") from None
            if failed > len(waits):
                sentence = f"{problem.sentence}, {failed} times in a row; run this again later"
                raise Unreachable(sentence) from None
            wait = max(waits[failed - 1], problem.after)
            host.say(f"{problem.sentence}; again in {wait:g} s")
            time.sleep(wait)

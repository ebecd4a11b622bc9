"""What a registry answers, read as far as it may go: a registry may send anything, without an end.

Every function may raise what urllib3 does where the connection breaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from urllib3 import BaseHTTPResponse, HTTPHeaderDict

from images.publishing import oci
from images.publishing.oci import Damaged

# What is read into memory, whatever a registry sends: the limit of most registries for a manifest,
# and many times what the largest attestation has.
MOST_OF_A_MANIFEST = 4 << 20
MOST_OF_A_BLOB = 64 << 20
_MOST_OF_A_REASON = 64 << 10


@dataclass(frozen=True)
class Answer:
    """An answer that was read."""

    status: int
    headers: HTTPHeaderDict
    body: bytes = b""


def length(answer: BaseHTTPResponse, what: str) -> int | None:
    """The bytes that an answer announces; None where it does not.

    Raises:
        Damaged: it announces something else.
    """
    given = answer.headers.get("Content-Length")
    if given is not None and not re.fullmatch("[0-9]{1,18}", given):
        raise Damaged(f"{what}: the registry gives {oci.shown(given)!r} as its length")
    return None if given is None else int(given)


def whole(answer: BaseHTTPResponse, most: int, what: str) -> bytes:
    """All of an answer, which may have so many bytes.

    Raises:
        Damaged: it has more.
    """
    data = bytearray()
    if (length(answer, what) or 0) <= most:
        while piece := answer.read(most + 1 - len(data)):
            data += piece
            if len(data) > most:
                break
        else:
            return bytes(data)
    raise Damaged(f"{what} is larger than it may be, which is {most:,} bytes")


def reason(answer: BaseHTTPResponse) -> bytes:
    """The beginning of an answer that is none to the question."""
    return answer.read(_MOST_OF_A_REASON)

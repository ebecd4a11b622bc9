"""Signatures of two forms: a statement in a DSSE envelope, and cosign's of a digest.

Both are other people's forms, and both are made and checked here. Whoever sent one is not believed
before the key says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass

from images.publishing import oci
from images.publishing.attestations import STATEMENT, encoded
from images.publishing.keys import Key, PublicKey
from rollout.problem import Problem

# The annotation under which cosign keeps a signature beside what it signs.
SIGNATURE = "dev.cosignproject.cosign/signature"
_COSIGN = "cosign container image signature"


def pae(kind: str, body: bytes) -> bytes:
    """What is signed of a payload (DSSE v1.0.2, Pre-Authentication Encoding)."""
    name = kind.encode()
    return b" ".join((b"DSSEv1", b"%d" % len(name), name, b"%d" % len(body), body))


def envelope(statement: bytes, key: Key) -> bytes:
    """A statement in a DSSE envelope, signed.

    Without ``keyid``: it is optional, and tools that make one themselves (each its own way) pass
    over signatures with another.
    """
    signature = key.sign(pae(STATEMENT, statement))
    return encoded(
        {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": STATEMENT,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }
    )


@dataclass(frozen=True)
class Envelope:
    """An envelope that somebody sent: nothing in it is to be believed before it is checked."""

    kind: str
    payload: bytes
    signatures: tuple[bytes, ...]

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Read one; ValueError says what is wrong with it."""
        try:
            found = oci.document(data)
            signatures = tuple(_unpacked(entry["sig"]) for entry in found["signatures"])
            return cls(str(found["payloadType"]), _unpacked(found["payload"]), signatures)
        except (oci.Damaged, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("not a DSSE envelope") from None

    def signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures is of this key and of this very payload and type."""
        return any(key.accepts(found, pae(self.kind, self.payload)) for found in self.signatures)


def _unpacked(text: str) -> bytes:
    """Both alphabets of base64, as DSSE asks of whoever checks."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def signature(digest: str, docker_reference: str, key: Key) -> tuple[bytes, dict[str, str]]:
    """cosign's signature of a manifest: the payload, and the annotations that go with its layer.

    The reference is the repository without a tag, as cosign writes it.
    """
    document = {
        "critical": {
            "identity": {"docker-reference": docker_reference},
            "image": {"docker-manifest-digest": digest},
            "type": _COSIGN,
        },
        "optional": None,
    }
    payload = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return payload, {SIGNATURE: base64.b64encode(key.sign(payload)).decode()}


def signed_digest(payload: bytes, annotations: Mapping[str, str], key: PublicKey) -> str | None:
    """The digest that a signature of cosign's form vouches for; None where the key did not sign.

    Raises:
        Problem: the key signed something that is no such payload.
    """
    try:
        found = base64.b64decode(annotations.get(SIGNATURE, ""), validate=True)
    except ValueError:
        return None
    if not key.accepts(found, payload):
        return None
    try:
        critical = json.loads(payload)["critical"]
        if critical["type"] != _COSIGN:
            raise KeyError
        return str(critical["image"]["docker-manifest-digest"])
    except (ValueError, KeyError, TypeError):
        raise Problem("what the key has signed there is no image") from None

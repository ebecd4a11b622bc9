"""Signatures of what is published: as other people's tools make and check them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils

from images.publishing import signatures
from images.publishing.keys import Key
from rollout.problem import Problem

DIGEST = "sha256:" + "1" * 64
KEY = Key(ec.generate_private_key(ec.SECP256R1()))
OTHER = Key(ec.generate_private_key(ec.SECP256R1()))
PAYLOAD = b'{"commit": "c"}'


def test_what_is_signed_is_what_the_specification_of_dsse_says() -> None:
    """The test vector of DSSE v1.0: its key, its payload, its signature (r and s side by side)."""
    kind, body = "http://example.com/HelloWorld", b"hello world"
    assert signatures.pae(kind, body) == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    number = 97358161215184420915383655311931858321456579547487070936769975997791359926199
    key = Key(ec.derive_private_key(number, ec.SECP256R1()))
    r, s = utils.decode_dss_signature(key.sign(signatures.pae(kind, body)))
    assert base64.b64encode(r.to_bytes(32) + s.to_bytes(32)).decode() == (
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    )


def test_lengths_are_of_bytes_not_of_characters() -> None:
    assert signatures.pae("ä", "ö!".encode()) == "DSSEv1 2 ä 3 ö!".encode()


def sealed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(signatures.envelope(PAYLOAD, KEY))
    return found


def read(document: object) -> signatures.Envelope:
    return signatures.Envelope.parse(json.dumps(document).encode())


def test_an_envelope_holds_for_its_payload_its_type_and_its_key_alone() -> None:
    good = sealed()
    assert read(good).signed_by(KEY.public)
    assert not read(good).signed_by(OTHER.public)
    edited = base64.b64decode(good["payload"]).replace(b"c", b"d")
    assert edited != base64.b64decode(good["payload"])
    for change in (
        {"payload": base64.b64encode(edited).decode()},
        {"payloadType": "text/plain"},
        {"signatures": []},
        {"signatures": [{"sig": base64.b64encode(b"no signature").decode()}]},
    ):
        assert not read({**good, **change}).signed_by(KEY.public), change


def test_one_good_signature_among_others_is_enough() -> None:
    good = sealed()
    stranger = {"keyid": "somebody", "sig": base64.b64encode(OTHER.sign(b"x")).decode()}
    both = {**good, "signatures": [stranger, *good["signatures"]]}
    assert read(both).signed_by(KEY.public)


def test_both_alphabets_of_base64_are_read() -> None:
    good = sealed()
    signature = good["signatures"][0]["sig"].replace("+", "-").replace("/", "_")
    payload = good["payload"].replace("+", "-").replace("/", "_")
    assert read({**good, "payload": payload, "signatures": [{"sig": signature}]}).signed_by(
        KEY.public
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"payload": "e30=", "payloadType": "x"}',
        b'{"payload": 7, "payloadType": "x", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "x", "signatures": [7]}',
        b'{"payload": "no base64!", "payloadType": "x", "signatures": []}',
        b'{"payload": "\xff", "payloadType": "x", "signatures": []}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_envelope_is_none(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a DSSE envelope"):
        signatures.Envelope.parse(data)


def test_a_signature_is_the_payload_of_cosign() -> None:
    payload, annotations = signatures.signature(DIGEST, "127.0.0.1:5000/team/verl-rollout", KEY)
    assert json.loads(payload) == {
        "critical": {
            "identity": {"docker-reference": "127.0.0.1:5000/team/verl-rollout"},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    assert set(annotations) == {"dev.cosignproject.cosign/signature"}
    assert signatures.signature(DIGEST, "127.0.0.1:5000/team/verl-rollout", KEY) == (
        payload,
        annotations,
    )


def test_a_signature_holds_for_one_digest_and_one_key() -> None:
    payload, annotations = signatures.signature(DIGEST, "host/name", KEY)
    assert signatures.signed_digest(payload, annotations, KEY.public) == DIGEST
    assert signatures.signed_digest(payload, annotations, OTHER.public) is None
    edited = payload.replace(b"1" * 64, b"2" * 64)
    assert signatures.signed_digest(edited, annotations, KEY.public) is None
    for broken in ({}, {signatures.SIGNATURE: ""}, {signatures.SIGNATURE: "ä?"}):
        assert signatures.signed_digest(payload, broken, KEY.public) is None


@pytest.mark.parametrize(
    "payload",
    [b"{}", b"[]", b"text", b'{"critical": {"type": "another", "image": {}}}'],
)
def test_something_else_that_the_key_has_signed_vouches_for_no_image(payload: bytes) -> None:
    annotations = {signatures.SIGNATURE: base64.b64encode(KEY.sign(payload)).decode()}
    with pytest.raises(Problem, match="no image"):
        signatures.signed_digest(payload, annotations, KEY.public)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_openssl_accepts_what_is_signed_here(tmp_path: Path) -> None:
    (tmp_path / "pub").write_bytes(KEY.public.pem)
    (tmp_path / "other").write_bytes(OTHER.public.pem)
    payload, annotations = signatures.signature(DIGEST, "host/name", KEY)
    envelope = read(sealed())
    signed = {
        payload: base64.b64decode(annotations[signatures.SIGNATURE]),
        signatures.pae(envelope.kind, envelope.payload): envelope.signatures[0],
    }
    for data, signature in signed.items():
        (tmp_path / "data").write_bytes(data)
        (tmp_path / "sig").write_bytes(signature)
        codes = []
        for name in ("pub", "other"):
            argv = ["openssl", "dgst", "-sha256", "-verify", name, "-signature", "sig", "data"]
            codes.append(subprocess.run(argv, cwd=tmp_path, capture_output=True).returncode)
        assert codes == [0, 1]

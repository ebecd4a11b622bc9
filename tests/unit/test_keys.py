"""The keys of a publisher: who can read them, and what is refused as one."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from images.publishing import keys
from images.publishing.keys import Key
from rollout.problem import Problem

KEY = Key(ec.generate_private_key(ec.SECP256R1()))


def test_a_new_key_is_for_its_owner_alone_and_has_a_public_half(tmp_path: Path) -> None:
    public = keys.new(tmp_path / "release")
    assert public == tmp_path / "release.pub"
    assert stat.S_IMODE((tmp_path / "release").stat().st_mode) == 0o600
    key = keys.read(tmp_path / "release")
    assert keys.read_public(public) == key.public
    assert key.public.accepts(key.sign(b"text"), b"text")
    assert not key.public.accepts(key.sign(b"text"), b"test")
    assert not KEY.public.accepts(key.sign(b"text"), b"text")


@pytest.mark.parametrize("there", ["release", "release.pub"])
def test_no_key_is_ever_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("dear to somebody")
    with pytest.raises(Problem, match=f"{there} exists and is not overwritten") as caught:
        keys.new(tmp_path / "release")
    assert caught.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "dear to somebody"


def test_a_place_that_takes_no_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot be written") as caught:
        keys.new(tmp_path / "no" / "folder")
    assert caught.value.code == 2


def test_a_password_closes_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "release"
    monkeypatch.setenv(keys.PASSWORD, "secret")
    keys.new(file)
    assert keys.read(file).public == keys.read_public(tmp_path / "release.pub")
    for password, words in ((None, "has a password; put it into"), ("wrong", "is not opened by")):
        if password is None:
            monkeypatch.delenv(keys.PASSWORD)
        else:
            monkeypatch.setenv(keys.PASSWORD, password)
        with pytest.raises(Problem, match=words) as caught:
            keys.read(file)
        assert caught.value.code == 2
        assert "ROLLOUT_KEY_PASSWORD" in caught.value.sentence
        assert "secret" not in caught.value.sentence


def test_a_password_that_nothing_asks_for_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.PASSWORD, raising=False)
    keys.new(tmp_path / "release")
    monkeypatch.setenv(keys.PASSWORD, "of another key")
    assert keys.read(tmp_path / "release").public


def pem(key: Any) -> bytes:
    found: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return found


def public_pem(key: Any) -> bytes:
    found: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return found


RSA = rsa.generate_private_key(65537, 2048)
P384 = ec.generate_private_key(ec.SECP384R1())
COSIGN = b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n"
OLD_COSIGN = b"-----BEGIN ENCRYPTED COSIGN PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read"),
        (b"", "is no key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is no key in PEM"),
        (pem(RSA), "not an ECDSA key on P-256"),
        (pem(P384), "not an ECDSA key on P-256"),
        (KEY.public.pem, "is a public key"),
        (COSIGN, "cosign's own encrypted form"),
        (OLD_COSIGN, "cosign's own encrypted form"),
    ],
    ids=["none", "empty", "broken", "rsa", "p384", "public", "cosign", "old cosign"],
)
def test_what_is_no_key_to_sign_with_is_told_in_one_sentence(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    file = tmp_path / "key"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Problem, match=words) as caught:
        keys.read(file)
    assert caught.value.code == 2
    assert str(file) in caught.value.sentence


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read"),
        (b"ssh-ed25519 AAAA", "no public key in PEM"),
        (public_pem(RSA), "not an ECDSA key on P-256"),
        (public_pem(P384), "not an ECDSA key on P-256"),
        (pem(KEY.value), "is a private key"),
        (COSIGN, "is a private key"),
    ],
    ids=["none", "ssh", "rsa", "p384", "private", "cosign"],
)
def test_what_is_no_key_to_check_with_is_told_in_one_sentence(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    file = tmp_path / "key.pub"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Problem, match=words) as caught:
        keys.read_public(file)
    assert caught.value.code == 2
    assert "--new-key" not in caught.value.sentence


def test_who_lacks_a_key_is_told_where_keys_of_that_kind_come_from(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"cannot be read .*; ask the publisher for the public key"):
        keys.read_public(tmp_path / "missing.pub")
    with pytest.raises(Problem, match=r"cannot be read .*; make one with .*--new-key FILE"):
        keys.read(tmp_path / "missing")

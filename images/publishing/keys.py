"""The keys of a publisher: ECDSA on P-256 in PEM files, as cosign and openssl take them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rollout.problem import Problem

PASSWORD = "ROLLOUT_KEY_PASSWORD"  # noqa: S105 - the name of a variable


@dataclass(frozen=True)
class PublicKey:
    """What signatures are held against."""

    value: ec.EllipticCurvePublicKey

    def accepts(self, signature: bytes, data: bytes) -> bool:
        """Whether the owner of the private key has signed these bytes."""
        try:
            self.value.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True

    @property
    def pem(self) -> bytes:
        """As cosign, openssl and containers-policy.json take it."""
        return self.value.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@dataclass(frozen=True)
class Key:
    """What signs."""

    value: ec.EllipticCurvePrivateKey

    def sign(self, data: bytes) -> bytes:
        """A signature in ASN.1: the same of the same bytes, so the same attestations every time."""
        return self.value.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))

    @property
    def public(self) -> PublicKey:
        """The other half."""
        return PublicKey(self.value.public_key())


# What to do without a key: whoever signs makes one, and whoever checks is given one.
_NEW = "make one with 'nox -s publish -- --new-key FILE'"
_ASK = "ask the publisher for the public key"


def _content(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Problem(f"--key: {path} cannot be read ({error.strerror}); {advice}", 2) from None


def read(path: Path) -> Key:
    """The private key of a file, opened with the password in ROLLOUT_KEY_PASSWORD where it has one.

    Raises:
        Problem: exit code 2 for what is no such key, or a password that does not open it.
    """
    data = _content(path, _NEW)
    if b"SIGSTORE PRIVATE KEY" in data or b"COSIGN PRIVATE KEY" in data:
        form = "in cosign's own encrypted form, which is not read"
        raise Problem(f"--key: {path} is {form}; {_NEW}", 2)
    if b"PUBLIC KEY" in data:
        raise Problem(f"--key: {path} is a public key, and signing takes the private one", 2)
    password = os.environ.get(PASSWORD, "").encode() or None
    try:
        key = serialization.load_pem_private_key(data, password)
    except TypeError:
        if password is None:
            raise Problem(f"--key: {path} has a password; put it into {PASSWORD}", 2) from None
        # A password for a key that has none: nothing is wrong with the key.
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, UnsupportedAlgorithm):
        wrong = "is not opened by the password in " + PASSWORD if password else "is no key in PEM"
        raise Problem(f"--key: {path} {wrong}; {_NEW}", 2) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Problem(f"--key: {path} is not an ECDSA key on P-256; {_NEW}", 2)
    return Key(key)


def read_public(path: Path) -> PublicKey:
    """The public key of a file.

    Raises:
        Problem: exit code 2 for what is no such key.
    """
    data = _content(path, _ASK)
    if b"PRIVATE KEY" in data:
        raise Problem(f"--key: {path} is a private key, and checking takes the public one", 2)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise Problem(f"--key: {path} is no public key in PEM; {_ASK}", 2) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Problem(f"--key: {path} is not an ECDSA key on P-256; {_ASK}", 2)
    return PublicKey(key)


def new(path: Path) -> Path:
    """Write a new private key, and beside it FILE.pub, which is returned. Nothing is overwritten.

    The key is closed with the password in ROLLOUT_KEY_PASSWORD where that is set.

    Raises:
        Problem: exit code 2 where one of the files is there already or cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    key = Key(ec.generate_private_key(ec.SECP256R1()))
    password = os.environ.get(PASSWORD, "").encode()
    closed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        closed = serialization.BestAvailableEncryption(password)
    pem = key.value.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, closed
    )
    _create(public, key.public.pem, 0o644)
    try:
        _create(path, pem, 0o600)
    except BaseException:
        public.unlink()
        raise
    return public


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise Problem(f"--new-key: {path} exists and is not overwritten; name another", 2) from None
    except OSError as error:
        raise Problem(f"--new-key: {path} cannot be written ({error.strerror})", 2) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)

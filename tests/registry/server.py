"""Debian's registry, started for a test: in the open, with TLS, with credentials; it can be killed.

What it holds and what was sent to it are read off its storage and its access log, not asked of it.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
USER, PASSWORD = "tester", "not-a-secret"
_PATIENCE = 20  # seconds until a registry has to answer
# A completed upload in the access log.
_UPLOADED = re.compile(
    r'"PUT /v2/(\S+)/blobs/uploads/\S*digest=(sha256(?:%3A|:)[0-9a-f]{64})\S* \S+" 201'
)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


@dataclass(frozen=True)
class Certificate:
    """A certificate for this machine and for example.com that is its own authority, and its key."""

    file: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        """Write one."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry of a test")])
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName(
            [
                x509.IPAddress(ipaddress.ip_address(HOST)),
                *(x509.DNSName(name) for name in ("localhost", "*.example.com")),
            ]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        found = cls(folder / "ca.crt", folder / "registry.key.pem")
        found.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        found.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return found


class Server:
    """A registry on a port of its own, with its storage in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        storage: Path | None = None,
        certificate: Certificate | None = None,
        credentials: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.storage = storage or folder / "storage"
        self.log = folder / "log"
        self._config = folder / "config.json"  # JSON is YAML too
        http: dict[str, object] = {"addr": self.address, "secret": "of a test"}
        if certificate:
            http["tls"] = {"certificate": str(certificate.file), "key": str(certificate.key)}
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
            },
            "http": http,
        }
        if credentials:
            users = folder / "users"
            argv = ["htpasswd", "-nbB", USER, PASSWORD]
            users.write_text(
                subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            )
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(users)}}
        self._config.write_text(json.dumps(config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start it and wait until it answers; it keeps its port and what it holds."""
        with self.log.open("ab") as log:
            argv = ["docker-registry", "serve", str(self._config)]
            self._process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self.port)) == 0:
                    return self
            if self._process.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError(f"the registry does not start: {self.log.read_text()[-500:]}")

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    # What it holds

    def blobs(self) -> dict[str, int]:
        """Everything in its storage, by digest, in bytes: manifests too."""
        folder = self.storage / "docker/registry/v2/blobs/sha256"
        return {f"sha256:{f.parent.name}": f.stat().st_size for f in folder.glob("*/*/data")}

    def uploads(self) -> Counter[str]:
        """How often each blob was uploaded to its end."""
        text = self.log.read_text(errors="replace")
        return Counter(digest.replace("%3A", ":") for _, digest in _UPLOADED.findall(text))

    def requests(self, method: str) -> list[str]:
        """The paths that were asked for by a method."""
        text = self.log.read_text(errors="replace")
        return re.findall(rf'"{method} (\S+) HTTP', text)

    def tags(self, repository: str) -> set[str]:
        """The tags of a repository."""
        folder = self.storage / "docker/registry/v2/repositories" / repository / "_manifests/tags"
        return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()

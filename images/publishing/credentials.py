"""Who one is at a registry, and by which certificates: where skopeo and docker look, so do we.

``skopeo login`` and ``docker login`` leave a file, or ask a helper that keeps passwords; folders
called ``certs.d`` have the authorities and certificates of single registries.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rollout.problem import Problem

DOCKER_HUB = "docker.io"


def auth_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The files that ``skopeo login`` and ``docker login`` write, in the order of skopeo."""
    if environ.get("REGISTRY_AUTH_FILE"):
        return [Path(environ["REGISTRY_AUTH_FILE"])]
    runtime = environ.get("XDG_RUNTIME_DIR")
    first = Path(runtime) if runtime else Path(f"/run/containers/{os.getuid()}")
    return [
        first / ("containers/auth.json" if runtime else "auth.json"),
        Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json",
        Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json",
    ]


def _keys(name: str) -> list[str]:
    """What an entry for ``HOST/PREFIX/REPOSITORY`` may be called, the most specific first."""
    parts = name.split("/")
    keys = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    old = "index.docker.io" if parts[0] == DOCKER_HUB else parts[0]
    return [*keys, f"https://{old}/v1/", f"https://{old}", old]


def _helper(program: str, key: str) -> tuple[str, str] | None:
    """What a credential helper of docker knows of a registry."""
    argv = [f"docker-credential-{program}", "get"]
    with suppress(OSError, ValueError, KeyError):
        done = subprocess.run(argv, input=key, capture_output=True, text=True, check=False)
        if not done.returncode:
            data = json.loads(done.stdout)
            return str(data["Username"]), str(data["Secret"])
    return None


def credentials(name: str, files: Sequence[Path]) -> tuple[str, str] | None:
    """User and password for ``HOST/PREFIX/REPOSITORY``, from the first file that has them.

    Raises:
        Problem: exit code 2 for a file that is damaged.
    """
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            entries, helpers = data.get("auths") or {}, data.get("credHelpers") or {}
            for key in _keys(name):
                if key in helpers or (key in entries and data.get("credsStore")):
                    found = _helper(str(helpers.get(key) or data["credsStore"]), key)
                    if found:
                        return found
                if (entries.get(key) or {}).get("auth"):
                    user, _, password = (
                        base64.b64decode(entries[key]["auth"]).decode().partition(":")
                    )
                    return user, password.rstrip("\0")
        except OSError:
            continue
        except (ValueError, AttributeError, TypeError, RecursionError, binascii.Error):
            raise Problem(
                f"{file} is no file of credentials; make it anew with 'skopeo login'", 2
            ) from None
    return None


def _certificates(name: str, cert_dir: Path | None) -> list[Path]:
    """Folders with certificates for a registry: the one given, else those of skopeo and docker."""
    if cert_dir:
        return [cert_dir]
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers"
    bases = [own, Path("/etc/containers"), Path("/etc/docker")]
    return [folder for base in bases if (folder := base / "certs.d" / name).is_dir()]


def tls(name: str, cert_dir: Path | None = None) -> ssl.SSLContext:
    """The host's certificates (SSL_CERT_FILE is honoured) and those for this registry.

    Raises:
        Problem: exit code 2 for a folder without certificates, or with broken ones.
    """
    context = ssl.create_default_context()
    for folder in _certificates(name, cert_dir):
        try:
            for authority in sorted(folder.glob("*.crt")):
                context.load_verify_locations(authority)
            for certificate in sorted(folder.glob("*.cert")):
                context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        except (OSError, ssl.SSLError) as error:
            raise Problem(f"the certificates in {folder} cannot be read: {error}", 2) from None
    if cert_dir and not [*cert_dir.glob("*.crt"), *cert_dir.glob("*.cert")]:
        raise Problem(f"--cert-dir {cert_dir} holds no certificate (*.crt, *.cert)", 2)
    return context

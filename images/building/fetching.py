"""The files of a lock, fetched by their sha256 before anything is built.

This is the only part of a build that knows the host's index, credentials and CA bundle. uv fetches
the wheels into a cache on this host and runs nothing of them; a build mounts that cache and has no
network. To take a source distribution, uv would have to run its code. So uv only says where that
file lies, and this module fetches it.
"""

from __future__ import annotations

import hashlib
import netrc
import os
import re
import ssl
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from packaging.pylock import PackageSdist
from urllib3.exceptions import HTTPError

from images import host
from images.building import fetched, streaming
from images.host import leftovers, web
from images.locking import lock, pylock
from images.locking.lock import Locked
from images.locking.pylock import PLATFORM
from rollout.problem import Problem

TIMEOUT = 180.0  # seconds without a byte


def cache() -> Path:
    """uv's cache on this host: where UV_CACHE_DIR says, else one of our own."""
    return Path(os.environ.get("UV_CACHE_DIR") or host.cache() / "uv")


def wheels_argv(uv: str, python: str, listed: Path, target: Path) -> list[str]:
    """The command that fetches the wheels of a list; the target is a by-product.

    It installs for the image's platform and not for this host's, and runs no code of what it takes.
    """
    return [
        *(uv, "pip", "install", "--no-config", "--python", sys.executable),
        *("--target", str(target), "--python-version", python, "--python-platform", PLATFORM),
        *("--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirements", str(listed)),
    ]


def sources_argv(uv: str, python: str, asked: Path, output: Path) -> list[str]:
    """The command that says where source distributions lie; without dependencies it builds none."""
    return [
        *(uv, "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-deps"),
        *("--no-binary", ":all:", "--python-version", python, "--python-platform", PLATFORM),
        *("--output-file", str(output), str(asked)),
    ]


def fetch(
    locked: Sequence[Locked],
    python: str,
    sources: Collection[str],
    here: Collection[str],
    settings: Mapping[str, str],
    folder: Path,
    look: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Fetch what a lock has: wheels into :func:`cache`, source distributions into ``folder``.

    ``here`` are distributions whose wheels lie on this host already. ``look`` is given a folder
    with the content of the others, and may refuse it. Returns the sources' files.

    Raises:
        Problem: the index does not answer, or does not have the locked file; a file in the cache is
            not its wheel's.
    """
    environ = {**os.environ, **settings, "UV_CACHE_DIR": str(cache()), "UV_LINK_MODE": "hardlink"}
    cache().mkdir(parents=True, exist_ok=True)
    leftovers.used(cache())
    wanted = [e for e in locked if e.name not in sources and e.name not in here]
    # Beside the cache, so that nothing is copied: the target's files are links to the cache's.
    with leftovers.temporary("fetch", cache().parent) as place:
        listed = place / "wheels.txt"
        listed.write_text("".join(entry.text for entry in wanted), encoding="utf-8")
        if wanted:
            streaming.run(wheels_argv(host.uv(), python, listed, place / "target"), environ)
            fetched.check(place / "target", cache())
            look(place / "target")
    return _sources([e for e in locked if e.name in sources], python, settings, environ, folder)


def _sources(
    entries: Sequence[Locked],
    python: str,
    settings: Mapping[str, str],
    environ: Mapping[str, str],
    folder: Path,
) -> list[Path]:
    if not entries:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    asked, output = folder / "asked.in", folder / "pylock.toml"
    asked.write_text("".join(f"{e.name}=={e.version}\n" for e in entries), encoding="utf-8")
    argv = sources_argv(host.uv(), python, asked, output)
    done = host.run(argv, quiet=True, env=dict(environ), check=False)
    if done.returncode:
        raise Problem(streaming.meaning(done.stderr.splitlines(), done.returncode))
    found = {str(p.name): p.sdist for p in pylock.read(output.read_text("utf-8")).packages}
    asked.unlink()
    output.unlink()
    return [_source(entry, found.get(entry.name), settings, folder) for entry in entries]


def _source(
    entry: Locked, sdist: PackageSdist | None, settings: Mapping[str, str], folder: Path
) -> Path:
    if not sdist or sdist.hashes.get("sha256") != entry.sha256:
        what = f"the index has another source distribution of {entry.name} {entry.version}"
        raise Problem(lock.other_file(what))
    target = folder / sdist.filename
    data = download(sdist.url, settings) if sdist.url else Path(sdist.path or "").read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise Problem(lock.other_file(f"the file of {entry.name} has another sha256"))
    target.write_bytes(data)
    return target


def download(url: str, settings: Mapping[str, str]) -> bytes:
    """A file of an index, with the credentials that the host has for it.

    Raises:
        Problem: it cannot be had.
    """
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if parts.scheme not in ("http", "https"):
        raise Problem(f"{bare} is no address of an index; check UV_* and PIP_*")
    known = credentials(url, settings)
    login = web.basic(*known) if known else ""
    there = web.Web(ssl.create_default_context(cafile=settings.get("SSL_CERT_FILE")), TIMEOUT)
    try:
        with there.open("GET", bare, {}, authorization=login, onward=urljoin) as answer:
            if answer.status < 300:
                return answer.read()
            why = str(answer.reason or answer.status)
    except (HTTPError, ValueError) as error:  # the latter of what an index sends to
        why = str(web.cause(error))
    raise Problem(f"{bare} cannot be fetched ({why}); check the network and UV_*/PIP_*")


def credentials(url: str, settings: Mapping[str, str]) -> tuple[str, str] | None:
    """Name and password for an address: its own, those of an index on its host, or netrc's."""
    wanted = urlsplit(url)
    found = [wanted]
    for key, value in settings.items():
        if key.startswith("UV_") and "INDEX" in key:
            for word in value.split():
                name, equals, rest = word.partition("=")
                index = urlsplit(rest if equals and "://" in rest and "://" not in name else word)
                if index.hostname == wanted.hostname and index.port == wanted.port:
                    found.append(index)
                    prefix = "UV_INDEX_" + re.sub(r"[^A-Za-z0-9]", "_", name).upper()
                    user, secret = (settings.get(f"{prefix}_{w}") for w in ("USERNAME", "PASSWORD"))
                    if equals and (user or secret):
                        return user or "", secret or ""
    for place in found:
        if place.username is not None:
            return unquote(place.username), unquote(place.password or "")
    try:
        login = netrc.netrc().authenticators(wanted.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return (login[0], login[2] or "") if login else None

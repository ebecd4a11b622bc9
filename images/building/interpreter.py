"""The file of a Python that the base does not have, fetched by its sha256 before anything is built.

uv knows where such files lie, and knows the newest build of each release alone. The catalog names
one build, which stays where it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from images import host
from images.building import fetching
from images.catalog import Image
from images.host import leftovers
from images.schema import Interpreter
from rollout.problem import Problem

FILE = "interpreter.tar.gz"  # in a context
MIRROR = "UV_PYTHON_INSTALL_MIRROR"  # uv's own: where its users keep such files


def identity(image: Image) -> str:
    """The sha256 of an image's own Python; empty where the base has it."""
    return image.interpreter.sha256 if image.interpreter else ""


def list_argv(uv: str) -> list[str]:
    """The command that says where builds of Python lie; it asks nobody."""
    return [
        *(uv, "python", "list", "--no-config", "--all-versions", "--only-downloads"),
        *("--show-urls", "--output-format", "json"),
    ]


def place(listed: str) -> str:
    """The place that all builds of one kind lie below, of what :func:`list_argv` says.

    Raises:
        Problem: it names none.
    """
    for entry in json.loads(listed):
        url = str(entry["url"])
        if unquote(url).endswith("-x86_64-unknown-linux-gnu-install_only_stripped.tar.gz"):
            return url.rsplit("/", 2)[0]
    raise Problem(f"uv knows of no Python for this platform; set {MIRROR} to a folder of builds", 3)


def address(wanted: Interpreter, below: str) -> str:
    """Where the file of a Python lies below a place: in a folder for the day of its build."""
    day = wanted.file.partition("+")[2].partition("-")[0]
    return f"{below.rstrip('/')}/{day}/{quote(wanted.file)}"


def fetch(wanted: Interpreter, settings: Mapping[str, str]) -> Path:
    """The file of a Python from the cache, fetched first where it is not there yet.

    Raises:
        Problem: it cannot be had, or is another one than the catalog names.
    """
    path = host.cache() / "pythons" / f"{wanted.sha256}.tar.gz"
    if path.exists() and host.sha256(path) != wanted.sha256:
        path.unlink()
        host.say(f"{wanted.file}: the cached file is damaged; deleted, it is fetched again")
    if not path.exists():
        url = address(wanted, settings.get(MIRROR) or _place())
        host.say(f"fetching {wanted.file}")
        data = _content(url, settings)
        found = hashlib.sha256(data).hexdigest()
        if found != wanted.sha256:
            what = f"{wanted.file} has sha256 {found}, the catalog says {wanted.sha256}"
            raise Problem(f"{what}; do not use that mirror, or find out why it changed")
        path.parent.mkdir(parents=True, exist_ok=True)
        with host.replacing(path) as partial:
            partial.write_bytes(data)
    leftovers.used(path)
    return path


def _place() -> str:
    return place(host.run(list_argv(host.uv()), quiet=True).stdout)


def _content(url: str, settings: Mapping[str, str]) -> bytes:
    parts = urlsplit(url)
    if parts.scheme not in ("file", ""):
        return fetching.download(url, settings)
    try:
        return Path(unquote(parts.path)).read_bytes()
    except OSError as error:
        what = f"{unquote(parts.path)} cannot be read ({error.strerror})"
        raise Problem(f"{what}; {MIRROR} names its place") from None

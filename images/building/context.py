"""What a builder is given: a folder with the Dockerfile and all that its steps read."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from packaging.utils import canonicalize_name

from images import host
from images.catalog import RECIPES
from images.locking import lock, resolution
from images.locking.lock import Locked

# The script of every step that installs and what it reads, in the context under these names; and
# the script of the last step, which decides no other layer.
ORDER = RECIPES / "order.toml"
SCRIPTS = [*(RECIPES / name for name in ("install", "prune", "prune.toml", "owners")), ORDER]
OWN_RULES = RECIPES / "prune-framework.toml"  # for the layer of that name alone
LAST = RECIPES / "entrypoints"
PYTHON = RECIPES / "python"  # the step of a Python that the base does not have
# Settings of uv that say where packages come from. The others speak of the host's own projects,
# folders and files, which do not exist in the build container.
_TRAVELS = re.compile(
    "UV_(DEFAULT_INDEX|INDEX(_(URL|STRATEGY))?|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|"
    "CONCURRENT_.*|TORCH_BACKEND)$"
)
_BARE = re.compile(r"(?<=://)[^/@\s]+@")  # credentials in an address
# Only tests set it: by how much the clock of a build's steps is ahead, as libfaketime reads it.
CLOCK = "ROLLOUT_TEST_CLOCK"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def digest(*parts: str | bytes) -> str:
    """sha256 over texts and bytes, each with its length, so that no two lists look alike."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(data)}:".encode() + data)
    return whole.hexdigest()


def arguments(
    texts: Mapping[str, str], bottom: str, files: Mapping[str, bytes], python: str = ""
) -> dict[str, str]:
    """Build arguments: the base, and for each layer the sha256 of what it installs and how.

    ``python`` is the sha256 of a Python that the base does not have.
    """
    parts = [part for name, data in sorted(files.items()) for part in (name, data)]
    return {**below(texts, bottom, python), "ENTRYPOINTS": digest(LAST.read_bytes(), *parts)}


def below(texts: Mapping[str, str], bottom: str, python: str = "") -> dict[str, str]:
    """Those of the arguments that decide the layers below our own package."""
    given = {"PYTHON": digest(PYTHON.read_bytes(), python)} if python else {}
    scripts = [script.read_bytes() for script in SCRIPTS]
    own = {"framework": [OWN_RULES.read_bytes()]}
    values = {n.upper(): digest(*scripts, *own.get(n, []), text) for n, text in texts.items()}
    return {"BASE": bottom, **given, **values}


def clock(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that turn the clock of a build's steps; empty unless a test asks for them."""
    if CLOCK not in environ:
        return {}
    return {
        "LD_PRELOAD": f"/mnt/context/tools/{FAKETIME.name}",
        "FAKETIME": environ[CLOCK],
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # or programs that wait would wait for a day
        "NO_FAKE_STAT": "1",
    }


def indexes(settings: Mapping[str, str], wheels: bool) -> str:
    """The names of the host's indexes, as a file for the shell in the build container.

    uv finds what is in its cache by these names. It keeps them without credentials, and so does
    this file.
    """
    inside = {k: _BARE.sub("", v) for k, v in settings.items() if _TRAVELS.match(k)}
    # An index that is a folder of the host does not exist in there.
    local = [k for k, v in inside.items() if "INDEX" in k and re.match(r"([^/]+=)?(/|\.|file:)", v)]
    for name in local:
        del inside[name]
    # Folders of the host do not exist in there; their wheels travel in the context.
    links = inside.pop("UV_FIND_LINKS", "").split(",")
    links = [link for link in links if "://" in link and not link.startswith("file:")]
    if wheels:
        links.append("/mnt/context/wheels")
    if links:
        inside["UV_FIND_LINKS"] = ",".join(links)
    return exports(inside)


def exports(values: Mapping[str, str]) -> str:
    """Variables as a shell reads them from a file."""
    return "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(values.items()))


def place(source: Path, target: Path) -> None:
    """A file in the context without a second copy on the disk, where the file systems allow it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(source.stat().st_mode)


def prepare(
    folder: Path,
    recipe: str,
    texts: Mapping[str, str],
    files: Mapping[str, bytes],
    wheels: Sequence[Path],
    sources: Collection[str] = (),
    settings: str = "",
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Lay out a build context. ``sources`` are built, so they stand in a list of their own.

    ``settings`` is what :func:`indexes` gives, ``more`` are files that this build alone reads.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tools", "layers", "wheels", "sources", "payload"):
        (folder / name).mkdir(parents=True)
    (folder / "indexes.env").write_text(settings, encoding="utf-8")
    (folder / "Dockerfile").write_text(recipe, encoding="utf-8")
    for script in (*SCRIPTS, OWN_RULES, PYTHON, LAST):
        place(script, folder / script.name)
    place(Path(host.uv()), folder / "tools" / "uv")
    last = tomllib.loads(ORDER.read_text("utf-8"))
    for name, text in texts.items():
        lists: dict[str, list[str]] = {}
        for entry in lock.parse(text, folder):
            kind = "sources" if entry.name in sources else "wheels"
            lists.setdefault("last" if entry.name in last else kind, []).append(entry.text)
        for kind, lines in lists.items():
            path = folder / "layers" / f"{name}.{kind}.txt"
            path.write_text("".join(lines), encoding="utf-8")
    for name, data in files.items():
        path = folder / "payload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, data in more.items():
        (folder / name).write_bytes(data)
    for wheel in wheels:
        place(wheel, folder / "wheels" / wheel.name)


def own_wheels(locked: Sequence[Locked], find_links: str) -> list[Path]:
    """The wheels of a lock that lie in folders of this host; uv checks their sha256."""
    versions = lock.versions(locked)
    found = []
    for wheel in resolution.local_wheels(find_links, versions):
        name, version, *_ = wheel.name.split("-")
        if versions[canonicalize_name(name)] == version:
            found.append(wheel)
    return found

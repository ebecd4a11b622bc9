"""The base image: Debian 12 packages, locked one by one and joined into one tar.

``relock`` asks Debian which packages the names in ``images/recipes/packages.toml`` need and writes
``lockfiles/base.lock``; ``fetch`` brings exactly those files; ``make`` joins them into a root file
system with no network at all. The sha256 in the lock decides what is genuine, so it does not
matter which mirror a file came from.

apt_sources.py knows the mirrors, debian.py asks them, rootfs.py is the recipe.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from images import catalog, host
from images.catalog import RECIPES, ROOT, Image, shown
from images.host import leftovers
from images.locking import debian, rootfs
from images.locking.apt_sources import ARCHITECTURE, SNAPSHOT, SUITE
from images.locking.debian import RELOCK, Deb
from images.schema import quoted
from rollout.problem import Problem

LOCK = ROOT / "lockfiles" / "base.lock"
PACKAGES = RECIPES / "packages.toml"
EPOCH = rootfs.EPOCH


@dataclass(frozen=True)
class Lock:
    """The content of base.lock: what was asked for, when, and every package that this took."""

    requested: tuple[str, ...]
    as_of: str
    debs: tuple[Deb, ...]


# --- packages.toml and base.lock ------------------------------------------------------------------


def reasons(path: Path = PACKAGES) -> dict[str, str]:
    """The packages asked for, each with its reason.

    Raises:
        Problem: the file is not TOML, or a package stands there without a reason.
    """
    table = catalog.toml(path)
    for name, reason in table.items():
        if not isinstance(reason, str) or not reason.strip():
            raise Problem(f'{shown(path)}: {name} has no reason; write {name} = "why"', 2)
    return table


_LINE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)=(?P<version>[0-9][0-9A-Za-z.+~:-]*)"
    r" sha256:(?P<sha256>[0-9a-f]{64}) (?P<path>pool/\S+\.deb)"
)
_HEADER = {"made by": RELOCK, "suite": SUITE, "architecture": ARCHITECTURE}


def render(lock: Lock) -> str:
    """The text of base.lock."""
    fields = {**_HEADER, "as of": lock.as_of, "requested": " ".join(sorted(lock.requested))}
    header = [
        "# Every Debian package of the base image; the sha256 decides what is genuine.",
        *(f"# {key}: {value}" for key, value in fields.items()),
    ]
    debs = sorted(lock.debs, key=lambda deb: deb.name)
    return "\n".join([*header, *map(str, debs)]) + "\n"


def parse(text: str, name: str = "lockfiles/base.lock") -> Lock:
    """Read the text of base.lock; ``name`` is what an error calls the file.

    Raises:
        Problem: a line that is not as ``render`` writes it, with its number.
    """

    def wrong(what: str) -> Problem:
        return Problem(f"{what}; remake it with '{RELOCK}'", 2)

    header: dict[str, str] = {}
    debs: list[Deb] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            key, colon, value = line.lstrip("# ").partition(": ")
            if colon:
                header[key] = value
            continue
        where = f"{name}:{number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise wrong(f"{where}: not 'name=version sha256:… pool/….deb': {quoted(line)}")
        deb = Deb(**match.groupdict())
        if debs and debs[-1].name >= deb.name:
            order = f"{quoted(deb.name)} stands after {quoted(debs[-1].name)}"
            raise wrong(f"{where}: {order}, so the file was edited by hand")
        debs.append(deb)
    for key in ("as of", "requested", *_HEADER):
        if key not in header:
            raise wrong(f"{name}: the header has no '# {key}: …'")
    for key in ("suite", "architecture"):
        if header[key] != _HEADER[key]:
            what = f"{key} is {quoted(header[key])}, this code makes {_HEADER[key]!r}"
            raise wrong(f"{name}: {what}")
    if not SNAPSHOT.fullmatch(header["as of"]):
        raise wrong(f"{name}: 'as of' is {quoted(header['as of'])}, not like 20261119T000000Z")
    return Lock(tuple(header["requested"].split()), header["as of"], tuple(debs))


def read(path: Path = LOCK) -> Lock:
    """Read a lock file.

    Raises:
        Problem: the file is missing or malformed.
    """
    if not path.exists():
        raise Problem(f"{shown(path)} is missing; make it with '{RELOCK}'", 2)
    return parse(catalog.text(path, f"remake it with '{RELOCK}'"), shown(path))


def python(minor: str, path: Path = LOCK) -> str:
    """The whole version of a Python (``3.11``) as the base has it: ``3.11.2``.

    Raises:
        Problem: the lock has no such Python.
    """
    name = f"python{minor}"
    for deb in read(path).debs:
        if deb.name == name:
            # Python itself tells neither Debian's revision nor its epoch.
            return deb.version.rpartition(":")[2].partition("-")[0].partition("+")[0]
    raise Problem(f"{shown(path)} has no {name}; ask for it in {shown(PACKAGES)}", 2)


def python_of(image: Image) -> str:
    """The whole version of the Python of an image: the base's, or the file that it names.

    Raises:
        Problem: the base has no such Python.
    """
    return image.interpreter.version if image.interpreter else python(image.python)


def lock_of(image: Image | None) -> Path:
    """The lock of the Debian packages below an image: its own where it asks for more of them."""
    return image.debs if image and image.debian else LOCK


def identity(path: Path = LOCK) -> str:
    """Twelve hex digits for what the base image holds: they change with the lock and the recipe."""
    # The recipe counts too: else a tar cached before a change here would be taken for the new one.
    both = path.read_bytes() + b"\0" + rootfs.recipe().encode()
    return hashlib.sha256(both).hexdigest()[:12]


def stale(lock: Lock, requested: Iterable[str], name: str = "lockfiles/base.lock") -> str | None:
    """A sentence where the lock was made for other packages than are asked for now."""
    wanted, locked = set(requested), set(lock.requested)
    parts = [f"{n} is asked for but not locked" for n in sorted(wanted - locked)]
    parts += [f"{n} is locked but no longer asked for" for n in sorted(locked - wanted)]
    absent = sorted((wanted & locked) - {deb.name for deb in lock.debs})
    parts += [f"{n} has no line" for n in absent]
    return f"{name}: {', '.join(parts)}; remake it with '{RELOCK}'" if parts else None


# --- the stations ---------------------------------------------------------------------------------


def relock(
    snapshot: str | None = None,
    lock: Path = LOCK,
    packages: Path = PACKAGES,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Lock:
    """Ask Debian what the packages asked for need, and write the lock.

    ``more`` are those that an image needs beside the base's, each with its reason.

    A lock that already holds just that is left as it is, date and all, so that locking twice
    changes nothing.

    Raises:
        Problem: apt fails, or the sources have no security updates.
    """
    names = {**reasons(packages), **more}
    with debian.apt(snapshot) as conf:
        if not debian.has_security(conf):
            raise Problem(
                f"this machine's apt sources have {SUITE} but not {SUITE}-security; add it: a lock "
                "made without it would hold packages with known holes"
            )
        debs = debian.resolve(conf, names)
        made = Lock(tuple(sorted(names)), debian.as_of(debian.dates(conf)), tuple(debs))
    try:
        old = read(lock)
    except Problem:
        old = None
    if old and (old.debs, old.requested) == (made.debs, made.requested):
        made = old
    else:
        host.write(lock, render(made))
    host.say(f"{shown(lock)}: {len(made.debs)} packages")
    return made


def fetch(lock: Path = LOCK, snapshot: str | None = None) -> Path:
    """See that every locked file is in the cache, and give its folder: ``<sha256>.deb`` each.

    Touches no network where all are there.

    Raises:
        Problem: the mirror no longer has a version, or sent other bytes than were locked.
    """
    locked = read(lock)
    folder = host.cache() / "debs"
    folder.mkdir(parents=True, exist_ok=True)
    for deb in locked.debs:
        kept = folder / f"{deb.sha256}.deb"
        if kept.exists() and host.sha256(kept) != deb.sha256:
            kept.unlink()
            host.say(f"{deb.name}: the cached file is damaged; deleted, it is fetched again")
        leftovers.used(kept)
    missing = _missing(locked, folder)
    if not missing:
        return folder
    host.say(f"fetching {len(missing)} Debian packages")
    with debian.apt(snapshot) as conf, leftovers.temporary("debs", folder) as new:
        missing = _listed(conf, missing, new, folder, locked.as_of)
        if missing:
            debian.download(conf, missing, new)
        wrong = []
        for deb in missing:
            file = next(new.glob(f"{debian.downloaded_name(deb)}_*.deb"))
            got = host.sha256(file)
            if got == deb.sha256:
                file.replace(folder / f"{deb.sha256}.deb")
            else:  # deleted with the folder it lies in
                wrong.append(f"{deb.name} {deb.version} has sha256 {got}, locked is {deb.sha256}")
    if wrong:
        raise Problem(
            f"the mirror sent other files than were locked, deleted: {'; '.join(wrong)}; "
            "do not use that mirror, or find out why they changed"
        )
    return folder


def _missing(locked: Lock, folder: Path) -> list[Deb]:
    return [deb for deb in locked.debs if not (folder / f"{deb.sha256}.deb").exists()]


def _listed(conf: Path, debs: list[Deb], new: Path, folder: Path, as_of: str) -> list[Deb]:
    """Return the packages that the index lists; bring the files of the others from the pool.

    Raises:
        Problem: the mirror has neither.
    """
    offered = debian.offered(conf, debs)
    listed = [deb for deb in debs if deb.version in offered.get(deb.name, ())]
    others = [deb for deb in debs if deb not in listed]
    debian.from_pool(conf, others, new)
    lost = []
    for deb in others:
        file = new / f"{deb.sha256}.deb"
        if file.exists() and host.sha256(file) == deb.sha256:
            file.replace(folder / file.name)
            host.say(f"{deb.name} {deb.version}: no index lists it any more; the mirror has it yet")
        else:
            lost.append(deb)
    problem = debian.vanished(lost, offered, as_of)
    if problem:
        raise problem
    return listed


def check(
    lock: Path = LOCK,
    packages: Path = PACKAGES,
    snapshot: str | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """See that the lock fits what is asked for and can still be fetched.

    Raises:
        Problem: it does not, with what to do.
    """
    locked = read(lock)
    sentence = stale(locked, {**reasons(packages), **more}, shown(lock))
    if sentence:
        raise Problem(sentence)
    missing = _missing(locked, host.cache() / "debs")
    if missing:
        folder = host.cache() / "debs"
        folder.mkdir(parents=True, exist_ok=True)
        with debian.apt(snapshot) as conf, leftovers.temporary("debs", folder) as new:
            _listed(conf, missing, new, folder, locked.as_of)


def make(lock: Path, destination: Path, more: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Make the root file system's tar from the locked files alone; the same bytes every time.

    ``more`` are packages that are asked for beside those of every image.

    Raises:
        Problem: a package cannot be had, or what got installed is not what is locked.
    """
    locked = read(lock)
    sentence = stale(locked, {**reasons(), **more}, shown(lock))
    if sentence:
        raise Problem(sentence)
    folder = fetch(lock)
    with host.replacing(destination) as partial:
        rootfs.make(locked.debs, locked.requested, folder, partial)
        wrong = rootfs.differences(locked.debs, rootfs.status(partial))
        if wrong:
            raise Problem(
                f"the base that was made is not that of {shown(lock)}: {'; '.join(wrong)}"
            )
    return destination


def tarball(image: Image | None = None) -> Path:
    """The tar of a base from the cache, made first where it is not there yet.

    It is the common one, but for an image that asks for packages of its own.
    """
    lock = lock_of(image)
    path = host.cache() / f"base-{identity(lock)}.tar"
    if not path.exists():
        host.say("making the base image from Debian packages")
        make(lock, path, image.debian if image else {})
    leftovers.used(path)
    return path

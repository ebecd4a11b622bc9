"""The base image: Debian 12 packages, locked one by one and joined into one tar.

``relock`` asks Debian which packages the names in ``images/base/packages.toml`` need and writes
``lockfiles/base.lock``; ``fetch`` brings exactly those files; ``make`` joins them into a root file
system with no network at all. The sha256 in the lock decides what is genuine, so it does not
matter which mirror a file came from.

Commands needed: mmdebstrap and dpkg-deb to make the tar; apt-get and apt-cache to lock and fetch
(mmdebstrap brings them along). No root is needed where user namespaces are allowed.

No address of a mirror is written here or in the lock. It comes from this machine's own apt sources
where they have Debian 12, else from mmdebstrap's default, and dated archives from
``ROLLOUT_SNAPSHOT_MIRROR`` or from that default. ``ROLLOUT_SNAPSHOT=20261119T000000Z`` makes every
station here use the archive as it was then.
"""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from images import host
from images.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "lockfiles" / "base.lock"
PACKAGES = ROOT / "images" / "base" / "packages.toml"
RELOCK = "nox -s lock -- base"
SUITE = "bookworm"
ARCHITECTURE = "amd64"
# The release of Debian 12. Every file made or shipped later gets this time, so it has to lie before
# any clock that builds: were it in a builder's future, that builder's own times would stay.
EPOCH = 1686355200

_SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
_SNAPSHOT = re.compile(r"\d{8}T\d{6}Z")

# What dpkg does not unpack. Licences stay (Debian's terms ask for them).
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    # 57 MB that no JIT compiler opens: a debugging tool of GCC's and Python as a static library.
    "path-exclude=/usr/bin/*lto-dump*",
    "path-exclude=/usr/lib/python3.11/config-3.11-*/libpython3.11*.a",
)

# Before the first package: /bin and its like are links from the start, as usr-is-merged demands (or
# it refuses to install), and dpkg does not wait for the disk after each file (the tree is thrown
# away if anything fails; waiting doubles the time).
_SETUP = """
for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done
echo force-unsafe-io > "$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
"""

# After the last package: out with whatever depends on this machine or this minute.
_CUSTOMIZE = r"""
set -eu
umask 022
# apt is not in the image; its sources would name a folder of this machine.
rm -rf "$1/etc/apt" "$1/var/lib/apt" "$1/var/cache/apt" "$1/var/log/apt"
rm -f "$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
# Back-up copies hold whatever state came one step before, locks hold nothing.
rm -f "$1"/var/lib/dpkg/*-old "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/lock*
rm -f "$1"/etc/passwd- "$1"/etc/group- "$1"/etc/shadow- "$1"/etc/gshadow- "$1"/etc/.pwd.lock
# The loader's own cache remembers inode numbers.
rm -rf "$1/var/cache/ldconfig"
find "$1/var/log" -type f -delete
# mmdebstrap copied this machine's. Empty files stay as places to mount on where the root is
# read-only; without hosts, "localhost" would be asked of a name server.
rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/machine-id"
for f in hostname resolv.conf; do : > "$1/etc/$f"; done
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > "$1/etc/hosts"
# Debian compiles Python's library with time stamps in each file, or, for our SOURCE_DATE_EPOCH,
# with a hash that every import compares with the source. Unchecked is as reproducible and reads
# no source; no bytecode at all would slow every start of a user who may not write there.
find "$1/usr" "$1/etc" -name __pycache__ -prune -exec rm -rf {} +
# -B and -f, or the modules that the compiler itself imports get time stamps first and are skipped.
chroot "$1" env PYTHONHASHSEED=0 python3.11 -B -m compileall -q -f -j 1 \
  --invalidation-mode unchecked-hash /usr/lib/python3.11
"""


@dataclass(frozen=True)
class Deb:
    """One locked package: what it is called, and the sha256 that its file must have."""

    name: str
    version: str
    sha256: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}={self.version} sha256:{self.sha256} {self.path}"


@dataclass(frozen=True)
class Lock:
    """The content of base.lock: what was asked for, when, and every package that this took."""

    requested: tuple[str, ...]
    as_of: str
    debs: tuple[Deb, ...]


@dataclass(frozen=True)
class Source:
    """One suite of a Debian archive, as apt is told about it."""

    uri: str
    suite: str
    options: tuple[tuple[str, str], ...] = ()  # deb822 field names, such as Signed-By

    @property
    def archive(self) -> str:
        """The archive's name on a snapshot server: ``debian`` or ``debian-security``."""
        return "debian-security" if self.suite.endswith("-security") else "debian"


# --- packages.toml and base.lock ------------------------------------------------------------------


def reasons(path: Path = PACKAGES) -> dict[str, str]:
    """The packages asked for, each with its reason.

    Raises:
        Problem: the file is not TOML, or a package stands there without a reason.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise Problem(f"{_shown(path)}: {error}", 2) from None
    for name, reason in table.items():
        if not isinstance(reason, str) or not reason.strip():
            raise Problem(f'{_shown(path)}: {name} has no reason; write {name} = "why"', 2)
    return dict(table)


_LINE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)=(?P<version>[0-9][0-9A-Za-z.+~:-]*)"
    r" sha256:(?P<sha256>[0-9a-f]{64}) (?P<path>pool/\S+\.deb)"
)
_HEADER = {
    "made by": RELOCK,
    "suite": SUITE,
    "architecture": ARCHITECTURE,
}


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
    header: dict[str, str] = {}
    debs: list[Deb] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            key, colon, value = line.lstrip("# ").partition(": ")
            if colon:
                header[key] = value
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise Problem(
                f"{name}:{number}: not 'name=version sha256:… pool/….deb': {line!r}; "
                f"remake it with '{RELOCK}'"
            )
        deb = Deb(**match.groupdict())
        if debs and debs[-1].name >= deb.name:
            raise Problem(
                f"{name}:{number}: {deb.name} stands after {debs[-1].name}, so the file was edited "
                f"by hand; remake it with '{RELOCK}'"
            )
        debs.append(deb)
    for key in ("as of", "requested", *_HEADER):
        if key not in header:
            raise Problem(f"{name}: the header has no '# {key}: …'; remake it with '{RELOCK}'")
    for key in ("suite", "architecture"):
        if header[key] != _HEADER[key]:
            raise Problem(f"{name}: {key} is {header[key]!r}, this code makes {_HEADER[key]!r}")
    if not _SNAPSHOT.fullmatch(header["as of"]):
        raise Problem(f"{name}: 'as of' is {header['as of']!r}, not like 20261119T000000Z")
    return Lock(tuple(header["requested"].split()), header["as of"], tuple(debs))


def read(path: Path = LOCK) -> Lock:
    """Read a lock file.

    Raises:
        Problem: the file is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Problem(f"{_shown(path)} is missing; make it with '{RELOCK}'") from None
    return parse(text, _shown(path))


def identity(path: Path = LOCK) -> str:
    """Twelve hex digits for what the base image holds: they change with the lock and the recipe."""
    # The recipe counts too: else a tar cached before a change here would be taken for the new one.
    recipe = "\0".join([*_DPKG_OPTIONS, _SETUP, _CUSTOMIZE, str(EPOCH)])
    both = path.read_bytes() + b"\0" + recipe.encode()
    return hashlib.sha256(both).hexdigest()[:12]


def stale(lock: Lock, requested: Iterable[str], name: str = "lockfiles/base.lock") -> str | None:
    """A sentence where the lock was made for other packages than are asked for now."""
    wanted, locked = set(requested), set(lock.requested)
    parts = [f"{n} is asked for but not locked" for n in sorted(wanted - locked)]
    parts += [f"{n} is locked but no longer asked for" for n in sorted(locked - wanted)]
    absent = sorted((wanted & locked) - {deb.name for deb in lock.debs})
    parts += [f"{n} has no line" for n in absent]
    return f"{name}: {', '.join(parts)}; remake it with '{RELOCK}'" if parts else None


# --- where the packages come from -----------------------------------------------------------------


def one_line_sources(text: str) -> list[Source]:
    """The Debian 12 entries of a file in sources.list form."""
    form = re.compile(
        r"deb\s+(?:\[(?P<options>[^]]*)]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)"
    )
    found = []
    for line in text.splitlines():
        match = form.fullmatch(line.partition("#")[0].strip())
        if not match:
            continue
        pairs = [o.partition("=") for o in (match["options"] or "").split()]
        fields = {key.title(): value for key, _, value in pairs}
        fields["Architectures"] = fields.pop("Arch", "").replace(",", " ")
        fields |= {"URIs": match["uri"], "Suites": match["suite"], "Components": match["rest"]}
        found += _debian(fields)
    return found


def deb822_sources(text: str) -> list[Source]:
    """The Debian 12 entries of a file in .sources form."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace() and key:
                fields[key] += "\n" + line
            else:
                name, _, value = line.partition(":")
                key = "URIs" if name.lower() == "uris" else name.strip().title()
                fields[key] = value.strip()
        enabled = fields.get("Enabled", "yes").lower() in ("yes", "true", "1")
        if enabled and "deb" in fields.get("Types", "").split():
            found += _debian(fields)
    return found


def _debian(fields: Mapping[str, str]) -> list[Source]:
    """The sources that an entry names, where it is Debian's own and has our suite.

    Others publish a suite "bookworm" with a component "main" too, so the address or the key has to
    speak of Debian. That is a first sieve: apt itself then takes only what signed itself "Debian".
    """
    architectures = fields.get("Architectures", "").split()
    if "main" not in fields.get("Components", "").split():
        return []
    if architectures and ARCHITECTURE not in architectures:
        return []
    key = fields.get("Signed-By", "")
    kept = ("Signed-By", "Trusted", "Check-Valid-Until", "Check-Date")
    options = tuple((name, fields[name]) for name in kept if fields.get(name))
    return [
        Source(uri.rstrip("/"), suite, options)
        for uri in fields.get("URIs", "").split()
        for suite in fields.get("Suites", "").split()
        if suite in _SUITES
        and ("debian" in urllib.parse.urlsplit(uri).path or "debian-archive" in key)
    ]


def host_sources(files: Mapping[str, str]) -> list[Source]:
    """The Debian 12 entries among a machine's apt sources: file name -> content.

    Empty where they lack Debian 12 itself, so that the caller falls back on the default.
    """
    found: list[Source] = []
    for name in sorted(files):
        if name.endswith(".list"):
            found += one_line_sources(files[name])
        elif name.endswith(".sources"):
            found += deb822_sources(files[name])
    distinct = list(dict.fromkeys(found))
    return distinct if any(s.suite == SUITE for s in distinct) else []


def snapshot_sources(default: Sequence[Source], date: str, mirror: str | None) -> list[Source]:
    """The sources as they were at ``date``; ``mirror`` is the root above ``archive/``.

    Without a mirror it is derived from the default sources, whose host is called ``deb.…``.

    Raises:
        Problem: the date is not written as snapshot servers write it, or there is no mirror.
    """
    if not _SNAPSHOT.fullmatch(date):
        raise Problem(f"snapshot {date!r} is no date like 20261119T000000Z", 2)
    if not mirror:
        hosts = [urllib.parse.urlsplit(s.uri) for s in default if s.suite == SUITE]
        if not hosts or not hosts[0].netloc.startswith("deb."):
            raise Problem("no snapshot server is known; name one with ROLLOUT_SNAPSHOT_MIRROR", 2)
        mirror = f"{hosts[0].scheme}://snapshot.{hosts[0].netloc.removeprefix('deb.')}"
    return [
        Source(
            f"{mirror.rstrip('/')}/archive/{source.archive}/{date}",
            source.suite,
            # An old index says itself that it is out of date; here that is the point.
            (*source.options, ("Check-Valid-Until", "no")),
        )
        for source in default
    ]


def sources_text(sources: Iterable[Source]) -> str:
    """The sources as a file for apt."""
    stanzas = []
    for source in sources:
        fields = {
            "Types": "deb",
            "URIs": source.uri,
            "Suites": source.suite,
            "Components": "main",
            "Architectures": ARCHITECTURE,
            **dict(source.options),
        }
        stanzas.append("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return "\n".join(stanzas)


def default_sources_argv() -> list[str]:
    """The command that makes mmdebstrap say which sources it would use, and do nothing else."""
    return [
        "mmdebstrap",
        "--mode=unshare",
        "--variant=extract",
        "--skip=update",
        """--setup-hook=sed 's/^/source: /' "$1"/etc/apt/sources.list""",
        SUITE,
        "/dev/null",
    ]


def _sources(snapshot: str | None) -> list[Source]:
    date = snapshot or os.environ.get("ROLLOUT_SNAPSHOT")
    if not date:
        folder = Path("/etc/apt")
        files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
        found = host_sources(
            {str(f): f.read_text(encoding="utf-8", errors="replace") for f in files if f.is_file()}
        )
        if found:
            return found
    said = _run(default_sources_argv())
    lines = re.findall(r"^source: (.*)$", said, re.MULTILINE)
    default = one_line_sources("\n".join(lines))
    if date:
        return snapshot_sources(default, date, os.environ.get("ROLLOUT_SNAPSHOT_MIRROR"))
    return default


# --- apt, in a world of its own -------------------------------------------------------------------

_ESSENTIAL = f"?and(?essential,?architecture({ARCHITECTURE}),?origin(^Debian$))"
# Only what calls itself Debian 12 in its signed index may be taken, whoever else is listed.
_PREFERENCES = f"""\
Package: *
Pin: release o=Debian,n={SUITE}*
Pin-Priority: 500

Package: *
Pin: release a=*
Pin-Priority: -1
"""


def apt_conf(root: Path) -> str:
    """Settings that turn this machine's apt into one with nothing installed and its own indexes.

    Read after the machine's own settings, so its proxy, certificates, credentials and keyrings
    hold; what would make the outcome depend on the machine is cleared.
    """
    return f"""\
#clear APT::Architectures;
#clear APT::Default-Release;
#clear APT::Update;
#clear DPkg;
APT::Architecture "{ARCHITECTURE}";
APT::Architectures "{ARCHITECTURE}";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
// The helper user may not read a private folder; signatures and hashes are checked as ever.
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
// apt counts itself as essential; here it is not.
pkgCacheGen::ForceEssential ",";
Dir::State "{root}/state";
Dir::State::Lists "{root}/state/lists";
Dir::State::status "{root}/state/status";
Dir::Cache "{root}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources";
Dir::Etc::preferences "{root}/preferences";
Dir::Etc::preferencesparts "/dev/null";
"""


def update_argv(conf: Path) -> list[str]:
    """Bring the indexes; one that fails is a failure, else an old one would be used in silence."""
    return ["apt-get", "-c", str(conf), "-q", "update", "--error-on=any"]


def resolve_argv(conf: Path, names: Iterable[str]) -> list[str]:
    """Say which files an empty machine needs for the essential packages and ``names``."""
    wanted = [_ESSENTIAL, *sorted(names)]
    return ["apt-get", "-c", str(conf), "-qq", "--print-uris", "install", *wanted]


def download_argv(conf: Path, debs: Iterable[Deb]) -> list[str]:
    """Download exactly these versions into the current folder."""
    exact = [f"{deb.name}={deb.version}" for deb in debs]
    return ["apt-get", "-c", str(conf), "-q", "download", *exact]


def parse_uris(text: str) -> list[Deb]:
    """The packages in what ``apt-get --print-uris install`` prints."""
    form = re.compile(
        r"'(?P<uri>[^']+)' (?P<file>\S+)_\S+\.deb \d+ SHA256:(?P<sha256>[0-9a-f]{64})"
    )
    debs = []
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        match = form.fullmatch(line.strip())
        if not match:
            raise Problem(f"apt-get said something unexpected: {line!r}")
        name, version = urllib.parse.unquote(match["file"]).split("_", 1)
        path = urllib.parse.unquote(urllib.parse.urlsplit(match["uri"]).path)
        debs.append(Deb(name, version, match["sha256"], path[path.index("/pool/") + 1 :]))
    return sorted(debs, key=lambda deb: deb.name)


def parse_stanzas(text: str) -> list[dict[str, str]]:
    """The one-line fields of the stanzas in a dpkg status file or a package index."""
    stanzas = []
    for stanza in re.split(r"\n\s*\n", text.strip()):
        pairs = [line.split(": ", 1) for line in stanza.splitlines() if re.match(r"\S+: ", line)]
        if pairs:
            stanzas.append({key: value.strip() for key, value in pairs})
    return stanzas


def vanished(
    debs: Iterable[Deb], offered: Mapping[str, Sequence[str]], as_of: str
) -> Problem | None:
    """The problem with packages that the mirror no longer has: name -> versions it offers."""
    gone = [deb for deb in debs if deb.version not in offered.get(deb.name, ())]
    if not gone:
        return None
    parts = [
        f"{deb.name} {deb.version} (it offers {' and '.join(offered.get(deb.name, ())) or 'none'})"
        for deb in gone
    ]
    return Problem(
        f"the mirror no longer has {', '.join(parts)}; lock what it has with '{RELOCK}', or take "
        f"the archive as it was when this was locked: set ROLLOUT_SNAPSHOT={as_of}",
        1,
    )


def as_of(dates: Iterable[str]) -> str:
    """The midnight after the newest of the indexes' dates: a snapshot of then has them all."""
    newest = max(email.utils.parsedate_to_datetime(date).astimezone(UTC) for date in dates)
    midnight = datetime(newest.year, newest.month, newest.day, tzinfo=UTC) + timedelta(days=1)
    return midnight.strftime("%Y%m%dT%H%M%SZ")


@contextmanager
def _apt(snapshot: str | None) -> Iterator[Path]:
    """An apt of our own with fresh indexes; gives its configuration file."""
    sources = _sources(snapshot)
    with tempfile.TemporaryDirectory(prefix="rollout-apt-") as folder:
        root = Path(folder)
        for part in ("state/lists/partial", "cache/archives/partial", "sources"):
            (root / part).mkdir(parents=True)
        (root / "state/status").touch()
        (root / "sources/debian.sources").write_text(sources_text(sources), encoding="utf-8")
        (root / "preferences").write_text(_PREFERENCES, encoding="utf-8")
        conf = root / "apt.conf"
        conf.write_text(apt_conf(root), encoding="utf-8")
        _run(update_argv(conf))
        yield conf


def _dates(conf: Path) -> list[str]:
    texts = [f.read_text("utf-8") for f in (conf.parent / "state/lists").glob("*Release")]
    return [date for text in texts for date in re.findall(r"^Date: (.+)$", text, re.MULTILINE)]


def _offered(conf: Path, debs: Sequence[Deb]) -> dict[str, list[str]]:
    names = [deb.name for deb in debs]
    # Exits with 100 where a name is unknown: that is an answer here.
    said = _run(["apt-cache", "-c", str(conf), "-q", "show", *names], check=False)
    offered: dict[str, list[str]] = {}
    for stanza in parse_stanzas(said):
        if "Version" in stanza and "Package" in stanza:
            offered.setdefault(stanza["Package"], []).append(stanza["Version"])
    return offered


# --- the stations ---------------------------------------------------------------------------------


def relock(snapshot: str | None = None, lock: Path = LOCK, packages: Path = PACKAGES) -> Lock:
    """Ask Debian what the packages asked for need, and write the lock.

    A lock that already holds just that is left as it is, date and all, so that locking twice
    changes nothing.

    Raises:
        Problem: apt fails, or the sources have no security updates.
    """
    names = reasons(packages)
    with _apt(snapshot) as conf:
        text = (conf.parent / "sources/debian.sources").read_text(encoding="utf-8")
        if f"Suites: {SUITE}-security\n" not in text:
            raise Problem(
                f"this machine's apt sources have {SUITE} but not {SUITE}-security; add it: a lock "
                "made without it would hold packages with known holes"
            )
        debs = parse_uris(_run(resolve_argv(conf, names)))
        made = Lock(tuple(sorted(names)), as_of(_dates(conf)), tuple(debs))
    try:
        old = read(lock)
    except Problem:
        old = None
    if old and (old.debs, old.requested) == (made.debs, made.requested):
        made = old
    else:
        _write(lock, render(made))
    host.say(f"{_shown(lock)}: {len(made.debs)} packages")
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
        if kept.exists() and _sha256(kept) != deb.sha256:
            kept.unlink()
            host.say(f"{deb.name}: the cached file is damaged; deleted, it is fetched again")
    missing = [deb for deb in locked.debs if not (folder / f"{deb.sha256}.deb").exists()]
    if not missing:
        return folder
    host.say(f"fetching {len(missing)} Debian packages")
    with _apt(snapshot) as conf, tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
        problem = vanished(missing, _offered(conf, missing), locked.as_of)
        if problem:
            raise problem
        _run(download_argv(conf, missing), cwd=Path(new))
        wrong = []
        for deb in missing:
            file = next(Path(new).glob(f"{downloaded_name(deb)}_*.deb"))
            got = _sha256(file)
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


def check(lock: Path = LOCK, packages: Path = PACKAGES, snapshot: str | None = None) -> None:
    """See that the lock fits what is asked for and can still be fetched.

    Raises:
        Problem: it does not, with what to do.
    """
    locked = read(lock)
    sentence = stale(locked, reasons(packages), _shown(lock))
    if sentence:
        raise Problem(sentence)
    cached = host.cache() / "debs"
    missing = [deb for deb in locked.debs if not (cached / f"{deb.sha256}.deb").exists()]
    if missing:
        with _apt(snapshot) as conf:
            problem = vanished(missing, _offered(conf, missing), locked.as_of)
        if problem:
            raise problem


def mmdebstrap_argv(repository: Path, destination: Path, names: Iterable[str]) -> list[str]:
    """The command that makes the tar from a folder of packages and nothing else."""
    return [
        "mmdebstrap",
        # For root too: its mounts then live in a namespace and end with it, however it ends.
        "--mode=unshare",
        "--format=tar",
        "--variant=essential",
        f"--architectures={ARCHITECTURE}",
        f"--include={','.join(sorted(names))}",
        # The hook removes all of apt, so mmdebstrap would find nothing to clean; device nodes
        # cannot be unpacked without root, and every runtime brings its own.
        "--skip=cleanup/apt,cleanup/mmdebstrap,output/dev",
        *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
        f"--setup-hook={_SETUP}",
        f"--customize-hook={_CUSTOMIZE}",
        "",  # no suite: a folder of packages has none
        str(destination),
        # "copy", because dpkg inside the new root cannot see this machine's folders. Trusted,
        # because every file was compared with the lock a moment ago.
        f"deb [trusted=yes] copy:{repository} ./",
    ]


def build_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the packages' scripts get to see: nothing of this machine but where its commands are."""
    kept = {k: environ[k] for k in ("TMPDIR", "HOME") if environ.get(k)}
    return {
        **kept,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive",
        "SOURCE_DATE_EPOCH": str(EPOCH),
    }


def index_stanza(control: str, deb: Deb, file: str, size: int) -> str:
    """The package's entry in the index of our folder."""
    return f"{control.strip()}\nFilename: ./{file}\nSize: {size}\nSHA256: {deb.sha256}\n"


def differences(locked: Iterable[Deb], status: str) -> list[str]:
    """How the packages that dpkg says are installed differ from the locked ones."""
    wanted = {f"{deb.name}={deb.version}" for deb in locked}
    stanzas = parse_stanzas(status)
    installed = {
        f"{s['Package']}={s['Version']}" for s in stanzas if s["Status"] == "install ok installed"
    }
    broken = {s["Package"] for s in stanzas if s["Status"] != "install ok installed"}
    return [
        *(f"{p} is locked but not installed" for p in sorted(wanted - installed)),
        *(f"{p} is installed but not locked" for p in sorted(installed - wanted)),
        *(f"{p} is half installed" for p in sorted(broken)),
    ]


def make(lock: Path, destination: Path) -> Path:
    """Make the root file system's tar from the locked files alone; the same bytes every time.

    Raises:
        Problem: a package cannot be had, or what got installed is not what is locked.
    """
    locked = read(lock)
    sentence = stale(locked, reasons(), _shown(lock))
    if sentence:
        raise Problem(sentence)
    folder = fetch(lock)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, since only a rename within one file system is all or nothing.
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        with tempfile.TemporaryDirectory(prefix="rollout-base-") as temporary:
            repository = Path(temporary) / "debs"
            _repository(locked.debs, folder, repository)
            # Without root, a stranger's user id inside the namespace has to read it.
            Path(temporary).chmod(0o755)
            argv = mmdebstrap_argv(repository, partial, locked.requested)
            _run(argv, env=build_environment(os.environ))
        with tarfile.open(partial) as tar:
            status = tar.extractfile("./var/lib/dpkg/status")
            text = status.read().decode() if status else ""
        wrong = differences(locked.debs, text)
        if wrong:
            raise Problem(f"the base came out other than {_shown(lock)}: {'; '.join(wrong)}")
        _add_dev(partial)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    return destination


def tarball(lock: Path = LOCK) -> Path:
    """The base's tar from the cache, made first where it is not there yet."""
    path = host.cache() / f"base-{identity(lock)}.tar"
    if not path.exists():
        host.say("making the base image from Debian packages")
        make(lock, path)
    return path


def _repository(debs: Iterable[Deb], cached: Path, repository: Path) -> None:
    """Lay the locked files out as a folder that apt can install from."""
    repository.mkdir(mode=0o755)
    stanzas = []
    for deb in debs:
        file = repository / f"{deb.name}_{deb.sha256[:12]}.deb"
        shutil.copyfile(cached / f"{deb.sha256}.deb", file)
        file.chmod(0o644)
        if _sha256(file) != deb.sha256:
            raise Problem(f"{deb.name}: the cached file changed while it was copied; run it again")
        control = _run(["dpkg-deb", "--field", str(file)])
        fields = parse_stanzas(control)[0]
        if (fields["Package"], fields["Version"]) != (deb.name, deb.version):
            raise Problem(
                f"the file locked as {deb.name} {deb.version} is {fields['Package']} "
                f"{fields['Version']}; remake the lock with '{RELOCK}'"
            )
        stanzas.append(index_stanza(control, deb, file.name, file.stat().st_size))
    packages = repository / "Packages"
    packages.write_text("\n".join(stanzas), encoding="utf-8")
    packages.chmod(0o644)


def _add_dev(path: Path) -> None:
    """Put an empty /dev in the tar: a read-only root has to have the place to mount it."""
    entry = tarfile.TarInfo("./dev")
    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, EPOCH
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry)


# --- small things ---------------------------------------------------------------------------------


def downloaded_name(deb: Deb) -> str:
    """How ``apt-get download`` begins a file's name: without what a file name may not hold."""
    return f"{deb.name}_{deb.version.replace(':', '%3a')}"


def _shown(path: Path) -> str:
    """A path as a reader of the repository knows it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
) -> str:
    """The one place that runs commands: gives what was printed, errors included.

    The umask is set, because programs that make files by themselves would put the caller's into
    the image.

    Raises:
        Problem: the command is missing or failed, with what it said of the error.
    """
    try:
        done = subprocess.run(
            list(argv),
            env={**os.environ, "LC_ALL": "C.UTF-8"} if env is None else dict(env),
            cwd=cwd,
            umask=0o022,
            check=False,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if check else subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise Problem(f"command {argv[0]!r} is not installed", 3) from None
    if check and done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"E: |Err:|dpkg: error", line)]
        why = "; ".join(dict.fromkeys(errors or lines[-3:]))
        raise Problem(f"'{shlex.join(argv[:1])}' exited with {done.returncode}: {why[:1500]}")
    return done.stdout

"""An apt of our own: it knows Debian's archives, and nothing else of the machine that it runs on.

Commands needed: apt-get and apt-cache, and mmdebstrap for its default sources.
"""

from __future__ import annotations

import email.utils
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from debian.deb822 import Deb822

from images import host
from images.host import leftovers
from images.locking import apt_sources
from images.locking.apt_sources import ARCHITECTURE, SUITE, Source
from rollout.problem import Problem

RELOCK = "nox -s lock -- base"

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


@dataclass(frozen=True)
class Deb:
    """One locked package: what it is called, and the sha256 that its file must have."""

    name: str
    version: str
    sha256: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}={self.version} sha256:{self.sha256} {self.path}"


# --- asking apt -----------------------------------------------------------------------------------


@contextmanager
def apt(snapshot: str | None) -> Iterator[Path]:
    """An apt of our own with fresh indexes; gives its configuration file."""
    sources = apt_sources.sources_text(_sources(snapshot))
    with leftovers.temporary("apt") as root:
        for part in ("state/lists/partial", "cache/archives/partial", "sources"):
            (root / part).mkdir(parents=True)
        (root / "state/status").touch()
        (root / "sources/debian.sources").write_text(sources, encoding="utf-8")
        (root / "preferences").write_text(_PREFERENCES, encoding="utf-8")
        conf = root / "apt.conf"
        conf.write_text(apt_conf(root), encoding="utf-8")
        run(update_argv(conf))
        yield conf


def has_security(conf: Path) -> bool:
    """Whether the sources have security updates."""
    text = (conf.parent / "sources/debian.sources").read_text(encoding="utf-8")
    return f"Suites: {SUITE}-security\n" in text


def resolve(conf: Path, names: Iterable[str]) -> list[Deb]:
    """The packages that an empty machine needs for the essential ones and ``names``."""
    return parse_uris(run(resolve_argv(conf, names)))


def dates(conf: Path) -> list[str]:
    """The dates of the indexes, as they state them."""
    texts = [f.read_text("utf-8") for f in (conf.parent / "state/lists").glob("*Release")]
    return [date for text in texts for date in re.findall(r"^Date: (.+)$", text, re.MULTILINE)]


def offered(conf: Path, debs: Iterable[Deb]) -> dict[str, list[str]]:
    """The versions that the mirror has of these packages: name -> versions."""
    names = [deb.name for deb in debs]
    # Exits with 100 where a name is unknown: that is an answer here.
    said = run(["apt-cache", "-c", str(conf), "-q", "show", *names], check=False)
    found: dict[str, list[str]] = {}
    for stanza in parse_stanzas(said):
        if "Version" in stanza and "Package" in stanza:
            found.setdefault(stanza["Package"], []).append(stanza["Version"])
    return found


def download(conf: Path, debs: Iterable[Deb], folder: Path) -> None:
    """Bring exactly these versions into a folder; ``downloaded_name`` says how they are called."""
    run(download_argv(conf, debs), cwd=folder)


def from_pool(conf: Path, debs: Iterable[Deb], folder: Path) -> None:
    """Bring files that no index lists any more, where a mirror has them yet: ``<sha256>.deb``.

    A mirror drops a version from its index the day the next one comes, and its file days later.
    """
    text = (conf.parent / "sources/debian.sources").read_text(encoding="utf-8")
    uris = list(dict.fromkeys(re.findall(r"^URIs: (.+)$", text, re.MULTILINE)))
    for deb in debs:
        file = folder / f"{deb.sha256}.deb"
        for uri in uris:
            run(pool_argv(conf, uri, deb, file), check=False)  # apt deletes what has another sha256
            if file.exists():
                break


def _sources(snapshot: str | None) -> list[Source]:
    date = snapshot or os.environ.get("ROLLOUT_SNAPSHOT")
    if not date:
        folder = Path("/etc/apt")
        files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
        found = apt_sources.host_sources(
            {str(f): f.read_text(encoding="utf-8", errors="replace") for f in files if f.is_file()}
        )
        if found:
            return found
    said = run(default_sources_argv())
    lines = re.findall(r"^source: (.*)$", said, re.MULTILINE)
    default = apt_sources.one_line_sources("\n".join(lines))
    if date:
        mirror = os.environ.get("ROLLOUT_SNAPSHOT_MIRROR")
        return apt_sources.snapshot_sources(default, date, mirror)
    return default


# --- what apt is told, and what it answers --------------------------------------------------------


def apt_conf(root: Path) -> str:
    """Settings that turn this machine's apt into one with nothing installed and its own indexes.

    apt reads it after the machine's own settings, so proxy, certificates, credentials and keyrings
    hold. Settings that would make the outcome depend on the machine are cleared.
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
    """Bring the indexes; one that fails is an error, or apt would use an old one in silence."""
    return ["apt-get", "-c", str(conf), "-q", "update", "--error-on=any"]


def resolve_argv(conf: Path, names: Iterable[str]) -> list[str]:
    """Say which files an empty machine needs for the essential packages and ``names``."""
    wanted = [_ESSENTIAL, *sorted(names)]
    return ["apt-get", "-c", str(conf), "-qq", "--print-uris", "install", *wanted]


def download_argv(conf: Path, debs: Iterable[Deb]) -> list[str]:
    """Download exactly these versions into the current folder."""
    exact = [f"{deb.name}={deb.version}" for deb in debs]
    return ["apt-get", "-c", str(conf), "-q", "download", *exact]


def pool_argv(conf: Path, uri: str, deb: Deb, file: Path) -> list[str]:
    """Download a file by its path in an archive; apt keeps it only where the sha256 is the locked.

    The mirror's index is not asked: its signature says less than the lock's sha256.
    """
    address = f"{uri.rstrip('/')}/{urllib.parse.quote(deb.path, safe='/')}"
    helper = "/usr/lib/apt/apt-helper"
    return [helper, "-c", str(conf), "download-file", address, str(file), f"SHA256:{deb.sha256}"]


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


def parse_stanzas(text: str) -> list[Deb822]:
    """The stanzas of a dpkg status file or a package index."""
    return list(Deb822.iter_paragraphs(text.splitlines()))


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
    """The midnight after the newest date of the indexes: a snapshot of that time has them all."""
    newest = max(email.utils.parsedate_to_datetime(date).astimezone(UTC) for date in dates)
    midnight = datetime(newest.year, newest.month, newest.day, tzinfo=UTC) + timedelta(days=1)
    return midnight.strftime("%Y%m%dT%H%M%SZ")


def downloaded_name(deb: Deb) -> str:
    """How the name of a file begins that ``apt-get download`` wrote: without a colon."""
    return f"{deb.name}_{deb.version.replace(':', '%3a')}"


# --- small things ---------------------------------------------------------------------------------


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
) -> str:
    """Run one of Debian's commands: gives what was printed, errors included.

    The umask is set, because these programs make files: the caller's would get into the image.

    Raises:
        Problem: the command is missing or failed, with what it said of the error.
    """
    env = {**os.environ, "LC_ALL": "C.UTF-8"} if env is None else env
    done = host.run(argv, quiet=True, env=env, cwd=cwd, check=False, umask=0o022)
    said = done.stdout + done.stderr if check else done.stdout
    if check and done.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"E: |Err:|dpkg: error", line)]
        why = "; ".join(dict.fromkeys(errors or lines[-3:]))
        raise Problem(f"'{shlex.join(argv[:1])}' exited with {done.returncode}: {why[:1500]}")
    return said

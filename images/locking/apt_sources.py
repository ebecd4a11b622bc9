"""Which archives of Debian there are: a machine's own apt sources, or a dated snapshot of them.

No address of a mirror is written here or in the lock. It comes from this machine's own apt sources
where they have Debian 12, else from mmdebstrap's default, and dated archives from
``ROLLOUT_SNAPSHOT_MIRROR`` or from that default. ``ROLLOUT_SNAPSHOT=20261119T000000Z`` makes every
station of the base use the archive as it was then.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from debian.deb822 import Deb822

from rollout.problem import Problem

SUITE = "bookworm"
ARCHITECTURE = "amd64"
SNAPSHOT = re.compile(r"\d{8}T\d{6}Z")

_FIELD = re.compile(r"[^\s:]+\s*:")
_OFF = ("no", "false", "off", "disable", "without", "0")  # to apt, everything else is a yes
_SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")


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
    """The Debian 12 entries of a file in .sources form.

    Raises:
        ValueError: a line is no field of a stanza; the message says which, as a clause.
    """
    lines = text.splitlines()
    _only_fields(lines)
    found = []
    # Lines and no text: a text of one line would be taken for the name of a file.
    for fields in Deb822.iter_paragraphs(lines):
        enabled = fields.get("Enabled", "").lower() not in _OFF
        if enabled and "deb" in fields.get("Types", "").split():
            found += _debian(fields)
    return found


def _only_fields(lines: Sequence[str]) -> None:
    """Refuse what is no line of a stanza: python-debian passes over it, or ends there."""
    inside = False
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        if not line.strip(" \t"):
            inside = False
        elif _FIELD.match(line):
            inside = True
        elif not (inside and line[0].isspace()):
            raise ValueError(f"has a line {number} that is no field: {line[:60]!a}")


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

    Raises:
        Problem: a file is malformed.
    """
    found: list[Source] = []
    for name in sorted(files):
        if name.endswith(".list"):
            found += one_line_sources(files[name])
        elif name.endswith(".sources"):
            try:
                found += deb822_sources(files[name])
            except ValueError as error:
                raise Problem(f"{name} {error}; mend or remove that line", 2) from None
    distinct = list(dict.fromkeys(found))
    return distinct if any(s.suite == SUITE for s in distinct) else []


def snapshot_sources(default: Sequence[Source], date: str, mirror: str | None) -> list[Source]:
    """The sources as they were at ``date``; ``mirror`` is the root above ``archive/``.

    Without a mirror it is derived from the default sources, whose host is called ``deb.…``.

    Raises:
        Problem: the date is not written as snapshot servers write it, or there is no mirror.
    """
    if not SNAPSHOT.fullmatch(date):
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
            # An old index says that it is out of date; here an old one is wanted.
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

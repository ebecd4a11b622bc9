"""Is what is installed what the lock says: each distribution, once, at that version?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rollout import info
from rollout.environment import Finding, Findings, counts, opened, printable
from rollout.problem import Problem

_LOCKED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*==\s*([^\s;]+)\s*(?:;.*)?")
_VERSION = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<post_n1>\d+)|(?P<post>[-_.]?(?:post|rev|r)[-_.]?(?P<post_n2>\d*)))?"
    r"(?P<dev>[-_.]?dev[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?"
)
_KINDS = ("off_lock", "not_locked", "not_installed", "twice", "nameless", "unexpected")
_PRE = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}


def distributions(
    prefix: Path, lock: Path, expected: Mapping[str, str] = MappingProxyType({})
) -> Findings:
    """Installed is what is locked, at that version: nothing else, nothing less, nothing twice.

    ``expected`` are the claims of the catalog, distribution to version, held against what is there.
    Problem (code 2) if there is no environment at prefix or the lock cannot be read.
    """
    root, sites = opened(prefix)
    locked = read_lock(lock)
    found: dict[str, list[Installed]] = {}
    problems: list[Finding] = []
    for item in installed(root, sites):
        if item.name and item.version:
            found.setdefault(item.name, []).append(item)
        else:
            what = "has no metadata that names a distribution and its version"
            problems.append(Finding(item.folder, "nameless", what))
    for name in sorted(found.keys() | locked.keys()):
        problems += _wrong_versions(name, found.get(name, []), locked.get(name, []))
    for name, version in expected.items():
        there = [item.version for item in found.get(info.normalised(name), [])]
        if there != [version]:
            what = f"the catalog expects {version}, installed is {', '.join(there) or 'none'}"
            problems.append(Finding(name, "unexpected", what))
    metrics = {"installed": sum(map(len, found.values())), "locked": len(locked)}
    metrics |= counts(problems, _KINDS)
    return Findings(tuple(problems), metrics)


def _wrong_versions(name: str, there: list[Installed], locked: list[str]) -> Iterator[Finding]:
    if not there:
        yield Finding(name, "not_installed", f"{locked[0]} is locked and is not installed")
    if len(there) > 1:
        folders = " and ".join(printable(item.folder) for item in there)
        yield Finding(name, "twice", f"installed {len(there)} times, in {folders}")
    accepted = {same_version(version) for version in locked}
    for item in there:
        if not locked:
            yield Finding(name, "not_locked", f"{item.version} is installed and is not in the lock")
        elif same_version(item.version) not in accepted:
            what = f"{item.version} is installed, {' or '.join(locked)} is locked"
            yield Finding(name, "off_lock", what)


def same_version(text: str) -> str:
    """A form in which spellings of one version are equal (PEP 440): 2026.06.17 and 2026.6.17."""
    match = _VERSION.fullmatch(text.strip().lower())
    if not match:
        return text.strip().lower()
    part = match.groupdict()
    release = [int(number) for number in part["release"].split(".")]
    while len(release) > 1 and not release[-1]:
        release.pop()
    same = f"{int(part['epoch'] or 0)}!" + ".".join(map(str, release))
    if part["pre"]:
        same += f"{_PRE.get(part['pre'], part['pre'])}{int(part['pre_n'] or 0)}"
    if part["post"] or part["post_n1"]:
        same += f".post{int(part['post_n1'] or part['post_n2'] or 0)}"
    if part["dev"]:
        same += f".dev{int(part['dev_n'] or 0)}"
    return same + ("+" + re.sub("[-_]", ".", part["local"]) if part["local"] else "")


def read_lock(lock: Path) -> dict[str, list[str]]:
    """Names (PEP 503) and versions of a lock; Problem (code 2) if it is none.

    Markers are not evaluated: a lock is made for one platform, the image's, so they all hold.
    """
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise Problem(f"The lock {lock} cannot be read ({error.strerror}).", 2) from None
    except UnicodeDecodeError:
        raise Problem(f"The lock {lock} is not a text file.", 2) from None
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        requirement = re.sub(r"(^|\s)(#|--).*", "", line).strip()
        match = _LOCKED.fullmatch(requirement)
        if match:
            found.setdefault(info.normalised(match[1]), []).append(match[2])
        elif requirement:
            raise Problem(f"The lock {lock} has a line that locks nothing: {requirement}", 2)
    if not found:
        raise Problem(f"The lock {lock} names no distribution.", 2)
    return found


class Installed(NamedTuple):
    """One installed distribution: PEP 503 name, version as it states it, folder below prefix."""

    name: str
    version: str
    folder: str


def installed(root: str, sites: Iterable[str]) -> Iterator[Installed]:
    """Every distribution that Python would find, by its own metadata, not by its folder's name."""
    for site in sites:
        for name in sorted(os.listdir(f"{root}/{site}")):
            if name.endswith((".dist-info", ".egg-info")):
                fields = _metadata(f"{root}/{site}/{name}")
                known = info.normalised(fields.get("name", ""))
                yield Installed(known, fields.get("version", ""), f"{site}/{name}")


def _metadata(folder: str) -> dict[str, str]:
    for path in (f"{folder}/METADATA", f"{folder}/PKG-INFO", folder):
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                # Up to the first empty line: a description may well contain "Version: …" again.
                lines = [line.partition(":") for line in takewhile(str.strip, stream)]
        except OSError:
            continue
        return {key.strip().lower(): value.strip() for key, _, value in lines}
    return {}

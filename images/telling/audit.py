"""Known vulnerabilities of what is locked: ``nox -s audit`` asks, compares, and writes a page.

- pip-audit asks the Python index about every distribution of every lock,
- debsecan asks Debian's security tracker about the packages of the base.

What they find is held against lockfiles/accepted.toml, and lockfiles/AUDIT.md says all of it with
the day. Exit code: 0 where nothing is new, 1 where something is, 3 where somebody could not be
asked: no answer is never taken for "nothing known".
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from images import host
from images.catalog import ROOT, shown
from images.host import leftovers
from images.locking import base, lock, rootfs
from images.locking.apt_sources import SUITE
from images.telling import markdown
from rollout.problem import Problem

LOCKFILES = ROOT / "lockfiles"
ACCEPTED = LOCKFILES / "accepted.toml"
PAGE = LOCKFILES / "AUDIT.md"
PIP_AUDIT = (sys.executable, "-m", "pip_audit")
DEBSECAN = "debsecan"


@dataclass(frozen=True, order=True)
class Finding:
    """One known weakness of one version of a package, in one lock."""

    lock: str
    package: str
    version: str
    id: str
    fixed: str  # the versions without it; empty where there is none
    waits: bool = False  # nobody can do anything: Debian has no fix for this release


@dataclass(frozen=True)
class Answer:
    """What a service said of one lock: how many it knew, whom it did not know, what it found."""

    lock: str
    known: int
    unknown: Sequence[str] = ()
    findings: Sequence[Finding] = ()


@dataclass(frozen=True)
class Accepted:
    """An entry of accepted.toml."""

    id: str
    packages: frozenset[str]
    reason: str
    until: date


@dataclass
class Judged:
    """Findings by what has to be done about them."""

    new: list[Finding] = field(default_factory=list)
    accepted: list[tuple[Finding, Accepted]] = field(default_factory=list)
    waiting: list[Finding] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)  # entries that no finding needs


# --- Python ---------------------------------------------------------------------------------------


def rounds(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Distributions in groups in which each name is once: a lock for many systems has some twice.

    A version loses its local part ("+cu128"): the index knows the release alone, and what is known
    of the release holds for its builds.
    """
    groups: list[dict[str, str]] = []
    for name, version in pairs:
        public = version.partition("+")[0]
        if any(group.get(name) == public for group in groups):
            continue
        free = next((group for group in groups if name not in group), None)
        if free is None:
            groups.append(free := {})
        free[name] = public
    return groups


def pip_audit_argv(listed: Path) -> list[str]:
    """The command that asks about a list of requirements, and installs nothing."""
    return [
        *(*PIP_AUDIT, "--requirement", str(listed), "--no-deps", "--disable-pip"),
        *("--vulnerability-service", "pypi", "--format", "json", "--progress-spinner", "off"),
    ]


def parse_pip_audit(text: str, where: str) -> Answer:
    """The answer of pip-audit.

    Raises:
        ValueError: it is none.
    """
    data: Any = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("dependencies"), list):
        raise ValueError("no list of dependencies")
    findings, unknown, known = [], [], 0
    for entry in data["dependencies"]:
        name = str(entry["name"])
        if "skip_reason" in entry:
            unknown.append(name)
            continue
        known += 1
        version = str(entry["version"])
        for weak in entry["vulns"]:
            fixed = ", ".join(map(str, weak["fix_versions"]))
            findings.append(Finding(where, name, version, str(weak["id"]), fixed))
    return Answer(where, known, unknown, findings)


def ask_index(path: Path) -> Answer:
    """Ask about the distributions of one lock.

    Raises:
        Problem: exit code 3 where the index did not answer, or knows none of them.
    """
    where = shown(path)
    found: list[Answer] = []
    with leftovers.temporary("audit") as folder:
        for group in rounds(lock.PINNED.findall(path.read_text(encoding="utf-8"))):
            listed = folder / "requirements.txt"
            lines = (f"{name}=={version}\n" for name, version in group.items())
            listed.write_text("".join(lines), encoding="utf-8")
            # It exits with 1 for a finding and for a failure alike.
            done = host.run(pip_audit_argv(listed), quiet=True, check=False)
            try:
                found.append(parse_pip_audit(done.stdout, where))
            except (ValueError, KeyError, TypeError):
                said = done.stderr.strip().splitlines()
                tail = f": {said[-1]}" if said else ""
                raise Problem(f"{where}: pip-audit gave no answer{tail}", 3) from None
    known = sum(answer.known for answer in found)
    if not known:
        raise Problem(
            f"{where}: the index tells nothing of vulnerabilities (a mirror may not hand them on);"
            " run it where pip-audit reaches an index that does",
            3,
        )
    unknown = [name for answer in found for name in answer.unknown]
    return Answer(where, known, unknown, [one for answer in found for one in answer.findings])


# --- Debian ---------------------------------------------------------------------------------------


def debsecan_argv(status: Path) -> list[str]:
    """The command that asks about the packages of a dpkg status file."""
    return [DEBSECAN, "--suite", SUITE, "--status", str(status), "--format", "summary"]


def parse_debsecan(text: str, versions: Mapping[str, str], where: str) -> list[Finding]:
    """The findings of ``debsecan --format summary``: id, package, and notes in brackets.

    Raises:
        Problem: a line is none of these.
    """
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"(\S+) (\S+)(?: \((.*)\))?", line.strip())
        if not match:
            raise Problem(f"debsecan said what this audit cannot read: {line.strip()!r}", 3)
        notes = (match[3] or "").split(", ")
        package, fixed = match[2], "fixed" in notes
        said = "a newer package" if fixed else ""
        version = versions.get(package, "")
        found.append(Finding(where, package, version, match[1], said, waits=not fixed))
    return found


def ask_debian(status: str) -> Answer:
    """Ask about the packages that a status file of dpkg names.

    Raises:
        Problem: exit code 3 where Debian's tracker did not answer.
    """
    where = shown(base.LOCK)
    versions = {deb.name: deb.version for deb in base.read().debs}
    with leftovers.temporary("audit") as folder:
        file = folder / "status"
        file.write_text(status, encoding="utf-8")
        done = host.run(debsecan_argv(file), quiet=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        tail = f": {said[-1]}" if said else ""
        raise Problem(f"{where}: debsecan gave no answer{tail}", 3)
    return Answer(where, len(versions), (), parse_debsecan(done.stdout, versions, where))


# --- what is new ----------------------------------------------------------------------------------


def read_accepted(path: Path = ACCEPTED) -> list[Accepted]:
    """What may stay.

    Raises:
        Problem: exit code 2, naming the file and the entry that is not as it has to be.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"{shown(path)} cannot be read: {error}", 2) from None
    found = []
    for name, entry in data.items():
        given = entry if isinstance(entry, dict) else {}
        packages, reason, until = (given.get(key) for key in ("packages", "reason", "until"))
        right = (
            set(given) == {"packages", "reason", "until"}
            and isinstance(packages, list)
            and bool(packages)
            and all(isinstance(package, str) for package in packages)
            and isinstance(reason, str)
            and bool(reason.strip())
            and type(until) is date
        )
        if not right:
            raise Problem(
                f"{shown(path)}: [{name}] needs packages (names), reason (a sentence) and until"
                " (a day), and nothing else",
                2,
            )
        assert isinstance(packages, list) and isinstance(reason, str)  # noqa: S101 - for mypy
        assert isinstance(until, date)  # noqa: S101 - for mypy
        found.append(Accepted(name, frozenset(packages), reason, until))
    return found


def judge(findings: Iterable[Finding], accepted: Iterable[Accepted], today: date) -> Judged:
    """Part findings into new ones, accepted ones, and those that wait for Debian."""
    result, used = Judged(), set()
    entries = {entry.id: entry for entry in accepted}
    for finding in sorted(set(findings)):
        entry = entries.get(finding.id)
        if entry and finding.package in entry.packages and today <= entry.until:
            used.add(entry.id)
            result.accepted.append((finding, entry))
        elif finding.waits:
            result.waiting.append(finding)
        else:
            result.new.append(finding)
    result.idle = sorted(entries.keys() - used)
    return result


# --- the page -------------------------------------------------------------------------------------


def page(answers: Sequence[Answer], judged: Judged, today: date) -> str:
    """The kept page: who was asked about what and when, and what was found."""
    counts = [
        (
            f"`{answer.lock}`",
            str(answer.known),
            ", ".join(sorted(set(answer.unknown))) or "—",
            str(len(answer.findings)),
        )
        for answer in answers
    ]
    parts = [
        "<!-- GENERATED by 'nox -s audit'; do not edit. -->",
        f"# Known vulnerabilities of what is locked, as of {today.isoformat()}",
        "",
        "pip-audit asked the Python index, debsecan asked Debian's security tracker. A package that"
        " the index does not know is named. Nothing is known of it, which does not mean that it has"
        " no weakness.",
        "",
        markdown.table(("lock", "packages asked about", "not known there", "found"), counts),
        "",
        "## New",
        "",
        _rows(judged.new) or "None.",
        "",
        "## What stays, and why",
        "",
        _rows((f for f, _ in judged.accepted), [_cell(e) for _, e in judged.accepted]) or "None.",
        "",
        "## No fix in this release of Debian",
        "",
        "A relock of the base takes a fix as soon as Debian has one.",
        "",
        _waiting(judged.waiting) or "None.",
    ]
    return "\n".join(parts) + "\n"


def _cell(entry: Accepted) -> str:
    reason = " ".join(entry.reason.split()).replace("|", "\\|")
    return f"{reason} (until {entry.until.isoformat()})"


def _rows(findings: Iterable[Finding], reasons: Sequence[str] | None = None) -> str:
    """A table of findings; the same one in several locks is one row."""
    head = ["id", "package", "version", "fixed in", "locks", *(["why it stays"] * bool(reasons))]
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, one in enumerate(findings):
        why = [reasons[number]] if reasons else []
        key = (one.id, one.package, one.version, one.fixed or "—", *why)
        rows.setdefault(key, []).append(one.lock)
    lines = [(*key[:4], ", ".join(locks), *key[4:]) for key, locks in sorted(rows.items())]
    return markdown.table(head, lines) if lines else ""


def _waiting(findings: Iterable[Finding]) -> str:
    packages: dict[str, list[str]] = {}
    for one in findings:
        packages.setdefault(one.package, []).append(one.id)
    lines = [(name, ", ".join(sorted(ids))) for name, ids in sorted(packages.items())]
    return markdown.table(("package", "ids"), lines) if lines else ""


def locks() -> list[Path]:
    """Every lock of Python distributions, the tools' own among them."""
    return [path for path in sorted(LOCKFILES.rglob("*.lock")) if path != base.LOCK]


def main(arguments: Sequence[str]) -> int:
    """``nox -s audit``: ask about every lock, write the page, name what is new."""
    if arguments:
        raise Problem(f"audit takes no argument, and was given {arguments[0]!r}", 2)
    accepted = read_accepted()
    host.require(DEBSECAN)
    answers = []
    for path in locks():
        host.say(f"{shown(path)}: asking the index")
        answers.append(ask_index(path))
    host.say(f"{shown(base.LOCK)}: asking Debian's security tracker")
    answers.append(ask_debian(rootfs.status(base.tarball())))
    today = datetime.now(UTC).date()
    judged = judge((one for answer in answers for one in answer.findings), accepted, today)
    host.write(PAGE, page(answers, judged, today))
    for entry in judged.idle:
        host.say(f"{shown(ACCEPTED)}: [{entry}] is found no more, or its day is over; remove it")
    for one in judged.new:
        fix = f"fixed in {one.fixed}" if one.fixed else "no fix is known"
        host.say(f"{one.lock}: {one.package} {one.version}: {one.id}, {fix}")
    host.say(
        f"{shown(PAGE)}: {len(judged.new)} new, {len(judged.accepted)} accepted, "
        f"{len(judged.waiting)} without a fix in Debian"
    )
    return 1 if judged.new else 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""Is every file the one that was installed? Its hash against RECORD, or against the seal.

RECORD, which each distribution brings, has the hashes of what came out of its wheel. The seal, made
at image build, has the rest: compiled files, links, our own package, and the RECORD files.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rollout import info
from rollout.environment import Finding, Findings, Tree, counts, opened, printable, scan, threads
from rollout.problem import Problem

SEAL = f"{info.SHARE}/unrecorded.sha256"

_BUFFER = 1 << 18  # bytes; fits a core's cache beside what hashes it
_BATCH = 256  # small files for one thread at a time: handing over each would cost more than hashing
_LARGE = 1 << 22  # bytes; files from this size on are handed out singly and first


def seal(prefix: Path) -> str:
    """The text of the seal: what no RECORD settles, sorted by path, the seal itself left out.

    A file is a line ``<sha256>  <path>``, a symbolic link ``-> <target><tab><path>``, paths below
    the prefix; backslashes and unprintable characters are escaped as in Python. Files that several
    distributions claim with different contents are sealed too, so that one content is settled on.
    Problem (code 2) where the prefix is none, or a file cannot be read.
    """
    root, sites = opened(prefix)
    claims = records(root, sites).claims
    tree = scan(root)
    unsettled = [path for path in tree.files if len(claims.get(path, ())) != 1 and path != SEAL]
    lines: list[tuple[str, str]] = []
    for content in contents(root, [(path, "sha256", 0) for path in unsettled]):
        if content.error:
            raise Problem(f"{prefix / content.path} {content.error}: nothing can be sealed.", 2)
        lines.append((content.path, f"{content.digest.hex()}  {printable(content.path)}\n"))
    for path, target in tree.links.items():
        lines.append((path, f"-> {printable(target)}\t{printable(path)}\n"))
    return "".join(line for _, line in sorted(lines))


def files(prefix: Path) -> Findings:
    """Every file below prefix against RECORD (hash and size) or the seal; nothing less or more.

    Metrics: files and bytes read, distributions, files that several distributions claim with
    different contents (contested), and problems by kind. Problem (code 2) if there is no
    environment at prefix.
    """
    root, sites = opened(prefix)
    recorded = records(root, sites)
    tree = scan(root)
    problems = [*recorded.problems, *tree.problems]
    try:
        with open(f"{root}/{SEAL}", encoding="utf-8") as stream:
            sealed = parse_seal(stream.read())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(Finding(SEAL, "missing", f"the seal cannot be read ({why})"))
        sealed = None
    contested = {path for path, claims in recorded.claims.items() if len(claims) > 1}
    wanted = _wanted(recorded.claims, contested, sealed)
    problems += _wrong_presence(tree, wanted, sealed)
    size = 0
    jobs = [(p, wanted[p][0].algorithm, wanted[p][0].size or 0) for p in tree.files if p in wanted]
    for content in contents(root, jobs):
        size += content.size
        problems += _wrong_content(content, wanted[content.path])
    metrics: dict[str, Any] = {"files": len(jobs), "bytes": size}
    metrics |= {"distributions": recorded.distributions, "contested": len(contested)}
    metrics |= counts(problems, ("changed", "missing", "extra", "unreadable"))
    return Findings(tuple(sorted(problems)), metrics)


def _wanted(
    claims: dict[str, list[Claim]], contested: set[str], sealed: Seal | None
) -> dict[str, list[Claim]]:
    """What each file has to be; several claims mean that any of them will do."""
    if sealed is None:
        return claims
    wanted = {path: [claim] for path, claim in sealed.claims.items()}
    wanted.update(claims)  # a wheel's own word first: the seal speaks where RECORD is silent
    for path in contested & sealed.claims.keys():
        settled = sealed.claims[path].digest
        # What the seal settled on must still be what one of the distributions brought.
        wanted[path] = [claim for claim in claims[path] if claim.digest == settled] or claims[path]
    return wanted


def _wrong_presence(
    tree: Tree, wanted: Mapping[str, Sequence[Claim]], sealed: Seal | None
) -> Iterator[Finding]:
    there = set(tree.files)
    links = sealed.links if sealed else {}
    hidden = tuple(tree.unreadable)
    for path in wanted.keys() - there - tree.links.keys():
        if not path.startswith(hidden):
            yield Finding(path, "missing", "missing")
    for path, target in links.items():
        if path in there:
            yield Finding(path, "changed", f"changed: a file, not a link to {printable(target)}")
        elif path not in tree.links and not path.startswith(hidden):
            yield Finding(path, "missing", f"missing: a link to {printable(target)}")
    for path, target in tree.links.items():
        shown = printable(target)
        if path in wanted:
            yield Finding(path, "changed", f"changed: a link to {shown}, not a file")
        elif path in links and links[path] != target:
            what = f"changed: a link to {shown}, not to {printable(links[path])}"
            yield Finding(path, "changed", what)
        elif path not in links and sealed:
            yield Finding(path, "extra", f"extra: a link to {shown} that nothing accounts for")
    if sealed:
        for path in there - wanted.keys() - links.keys() - {SEAL}:
            yield Finding(path, "extra", "extra: no distribution and no seal accounts for it")


def _wrong_content(content: Content, wanted: Sequence[Claim]) -> Iterator[Finding]:
    path = content.path
    if content.error:
        yield Finding(path, "unreadable", content.error)
        return
    sizes = sorted({claim.size for claim in wanted if claim.size is not None})
    if all(claim.size is not None for claim in wanted) and content.size not in sizes:
        expected = " or ".join(map(str, sizes))
        yield Finding(path, "changed", f"changed: {content.size} bytes, not {expected}")
    elif all(content.digest != claim.digest for claim in wanted):
        algorithm = wanted[0].algorithm
        what = f"changed: {algorithm} {_short(content.digest)}, not {_short(wanted[0].digest)}"
        yield Finding(path, "changed", what)
    if content.mode & 0o444 != 0o444:
        what = f"not every user can read this file (mode {content.mode:04o})"
        yield Finding(path, "unreadable", what)


def _short(digest: bytes) -> str:
    return digest.hex()[:12] + "…"


# What is expected -------------------------------------------------------------------------------


class Claim(NamedTuple):
    """The content that a file is to have; size in bytes, None where only a hash was recorded."""

    algorithm: str
    digest: bytes
    size: int | None


class Records(NamedTuple):
    """All RECORD files of a prefix, paths relative to it."""

    claims: dict[str, list[Claim]]  # more than one where distributions disagree
    distributions: int
    problems: list[Finding]


class Seal(NamedTuple):
    """The parsed seal: contents of files, targets of symbolic links."""

    claims: dict[str, Claim]
    links: dict[str, str]


def records(root: str, sites: Iterable[str]) -> Records:
    """Read the RECORD of every distribution in the site-packages folders (relative to root)."""
    found = Records({}, 0, [])
    count = 0
    for site in sites:
        for name in sorted(os.listdir(f"{root}/{site}")):
            if name.endswith(".dist-info"):
                count += 1
                _read_record(root, site, name, found)
    return found._replace(distributions=count)


def _read_record(root: str, site: str, name: str, found: Records) -> None:
    where = f"{site}/{name}/RECORD"
    try:
        with open(f"{root}/{where}", encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream):
                if row:
                    _read_row(site, row, found.claims)
    except OSError as error:
        found.problems.append(Finding(where, "missing", f"cannot be read ({error.strerror})"))
    except (ValueError, csv.Error) as error:
        found.problems.append(Finding(where, "changed", f"is not a RECORD ({error})"))


def _read_row(site: str, row: list[str], claims: dict[str, list[Claim]]) -> None:
    path, digest, size = row
    if not digest:
        return  # RECORD itself and compiled files: the seal has them
    path = f"{site}/{path}"
    if "/." in path or "//" in path:  # a look first: normpath on every row would cost a second
        path = os.path.normpath(path)
        if not row[0].strip("/") or row[0].startswith("/") or path.startswith("../"):
            raise ValueError(f"names {row[0]}, which is outside the environment")
    algorithm, _, encoded = digest.partition("=")
    raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    claim = Claim(algorithm, raw, int(size) if size else None)
    others = claims.setdefault(path, [])
    if claim not in others:
        others.append(claim)


def parse_seal(text: str) -> Seal:
    """The seal's text, as ``seal`` writes it; ValueError names a line that is none."""
    found = Seal({}, {})
    for line in text.splitlines():
        try:
            if line.startswith("-> "):
                target, path = line[3:].split("\t")
                found.links[_unescaped(path)] = _unescaped(target)
            else:
                digest, path = line[:64], line[66:]
                if not path or line[64:66] != "  ":
                    raise ValueError("two spaces belong between sha256 and path")
                found.claims[_unescaped(path)] = Claim("sha256", binascii.unhexlify(digest), None)
        except ValueError:
            raise ValueError(f"no line of a seal: {printable(line)}") from None
    return found


def _unescaped(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape") if "\\" in text else text


# Hashing ----------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What reading one file gave; digest is empty and error set where it could not be read."""

    path: str
    digest: bytes
    size: int
    mode: int
    error: str = ""


def contents(root: str, jobs: Sequence[tuple[str, str, int]]) -> Iterator[Content]:
    """Hash files in parallel; jobs are (path below root, algorithm, expected bytes or 0)."""
    large = sorted((job for job in jobs if job[2] >= _LARGE), key=lambda job: -job[2])
    small = [job for job in jobs if job[2] < _LARGE]
    batches = [[job] for job in large]
    batches += [small[at : at + _BATCH] for at in range(0, len(small), _BATCH)]
    with ThreadPoolExecutor(threads()) as pool:
        yield from chain.from_iterable(pool.map(partial(_hash_batch, root), batches))


def _hash_batch(root: str, batch: Sequence[tuple[str, str, int]]) -> list[Content]:
    buffer = bytearray(_BUFFER)
    return [_hash(root, path, algorithm, buffer) for path, algorithm, _ in batch]


def _hash(root: str, path: str, algorithm: str, buffer: bytearray) -> Content:
    # System calls rather than file objects: at tens of thousands of files their making is the cost.
    try:
        hasher = hashlib.new(algorithm)
        handle = os.open(f"{root}/{path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            mode = os.fstat(handle).st_mode
            view = memoryview(buffer)
            size = 0
            while count := os.readv(handle, [buffer]):
                hasher.update(view[:count])
                size += count
        finally:
            os.close(handle)
    except OSError as error:
        return Content(path, b"", 0, 0, f"cannot be read ({error.strerror})")
    except ValueError:
        return Content(path, b"", 0, 0, f"cannot be checked: no hash is called {algorithm}")
    return Content(path, hasher.digest(), size, stat.S_IMODE(mode))

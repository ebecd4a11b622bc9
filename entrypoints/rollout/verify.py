"""Is the environment the locked one, whole and unchanged, and can it be loaded?

Four checks, each with a name: ``files`` (every byte against RECORD or the seal), ``distributions``
(against the lock), ``libraries`` (what shared objects need) and ``imports``. Nothing is trusted
that the environment itself could have altered unseen: RECORD vouches for what came out of a wheel,
and ``share/rollout/unrecorded.sha256``, the seal made at image build, for all the rest, RECORD
files included.

    python -m rollout.verify --seal     make the seal; the last step of an image build
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from rollout import info
from rollout.problem import Problem
from rollout.report import Check

SEAL = f"{info.SHARE}/unrecorded.sha256"
CHECKS = ("files", "distributions", "libraries", "imports")

SHOWN = 20  # findings in the reason of a check; with all, one lost folder would fill the screen
IMPORT_LIMIT_S = 600  # a cold disk and a large engine take minutes, a deadlock takes forever

# Driver libraries: the NVIDIA container runtime mounts them from the host when a container starts,
# so no image has them and none may bring its own. Names as in the runtime's own list.
DRIVER_LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvcuvid|nvoptix|nvidia-(ml|cfg|nscq|sandboxutils|ptxjitcompiler"
    r"|fatbinaryloader|nvvm|nvvm70|gpucomp|compiler|opencl|encode|fbc|ifr|opticalflow|allocator"
    r"|ngx|pkcs11|pkcs11-openssl3|rtcore|tls|glcore|glsi|glvkspirv|eglcore))\.so(\..*)?"
)


class Finding(NamedTuple):
    """One thing that is wrong: where (a path below the prefix, a name), its kind, and what."""

    where: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{printable(self.where)}: {self.what}"


@dataclass(frozen=True)
class Findings:
    """What a check found, every single thing, and its metrics.

    ``unproved`` is a sentence where there was nothing to look at: that is no success.
    """

    problems: tuple[Finding, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    unproved: str = ""


def printable(text: str) -> str:
    """The text on one line: what a terminal could take for a command is escaped, reversibly."""
    if text.isprintable() and "\\" not in text:
        return text
    return text.encode("unicode_escape").decode("ascii")


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


# What is there ----------------------------------------------------------------------------------


class Tree(NamedTuple):
    """Everything below a prefix, paths relative to it; no symbolic link is followed."""

    files: list[str]
    links: dict[str, str]
    problems: list[Finding]
    unreadable: list[str]  # folders whose content is unknown


def scan(root: str) -> Tree:
    """List a prefix. Folders that not every user can list, and odd files, are problems."""
    tree = Tree([], {}, [], [])
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{root}/{folder}") as entries:
                for entry in entries:
                    _sort_in(f"{folder}{entry.name}", entry, tree, folders)
        except OSError as error:
            tree.unreadable.append(folder)
            what = f"cannot be listed ({error.strerror})"
            tree.problems.append(Finding(folder or ".", "unreadable", what))
    return tree


def _sort_in(path: str, entry: os.DirEntry[str], tree: Tree, folders: list[str]) -> None:
    if entry.is_symlink():
        tree.links[path] = os.readlink(entry.path)
    elif entry.is_dir(follow_symlinks=False):
        mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
        if mode & 0o555 != 0o555:
            what = f"not every user can enter this folder (mode {mode:04o})"
            tree.problems.append(Finding(path, "unreadable", what))
        folders.append(path + "/")
    elif entry.is_file(follow_symlinks=False):
        tree.files.append(path)
    else:  # never opened: reading a pipe would wait for ever
        what = "extra: a device, pipe or socket, which no environment holds"
        tree.problems.append(Finding(path, "extra", what))


# Hashing ----------------------------------------------------------------------------------------

_BUFFER = 1 << 18  # bytes; fits a core's cache beside what hashes it
_BATCH = 256  # small files for one thread at a time: handing over each would cost more than hashing
_LARGE = 1 << 22  # bytes; files from this size on are handed out singly and first
_THREADS = (
    16  # more only queue for the interpreter lock, which small files hold for half their time
)


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
    with ThreadPoolExecutor(_threads()) as pool:
        yield from chain.from_iterable(pool.map(partial(_hash_batch, root), batches))


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), _THREADS)


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


# files ------------------------------------------------------------------------------------------


def seal(prefix: Path) -> str:
    """The text of the seal: what no RECORD settles, sorted by path, the seal itself left out.

    A file is a line ``<sha256>  <path>``, a symbolic link ``-> <target><tab><path>``, paths below
    the prefix; backslashes and unprintable characters are escaped as in Python. Files that several
    distributions claim with different contents are sealed too, so that one content is settled on.
    Problem (code 2) where the prefix is none, or a file cannot be read.
    """
    root, sites = _opened(prefix)
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
    root, sites = _opened(prefix)
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
    kinds = ("changed", "missing", "extra", "unreadable")
    metrics: dict[str, Any] = {"files": len(jobs), "bytes": size}
    metrics |= {"distributions": recorded.distributions, "contested": len(contested)}
    metrics |= {kind: sum(finding.kind == kind for finding in problems) for kind in kinds}
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


# distributions ----------------------------------------------------------------------------------

_LOCKED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*==\s*([^\s;]+)\s*(?:;.*)?")
_VERSION = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<post_n1>\d+)|(?P<post>[-_.]?(?:post|rev|r)[-_.]?(?P<post_n2>\d*)))?"
    r"(?P<dev>[-_.]?dev[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?"
)
_PRE = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}


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


def distributions(prefix: Path, lock: Path) -> Findings:
    """Installed is what is locked, at that version: nothing else, nothing less, nothing twice.

    Problem (code 2) if there is no environment at prefix or the lock cannot be read.
    """
    root, sites = _opened(prefix)
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
    kinds = ("off_lock", "not_locked", "not_installed", "twice", "nameless")
    metrics = {"installed": sum(map(len, found.values())), "locked": len(locked)}
    metrics |= {kind: sum(finding.kind == kind for finding in problems) for kind in kinds}
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


# libraries --------------------------------------------------------------------------------------

_ELF = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME = 1, 5, 14
_LONGEST_NAME = 4096  # bytes; PATH_MAX
_NOT_FOUND = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)
_NO_VERSION = re.compile(r"(\S+: version `.*' not found) \(required by (.*)\)$", re.MULTILINE)


class Elf(NamedTuple):
    """The dynamic section of an ELF file; machine is e_machine, interpreter the loader's path."""

    machine: int
    needed: tuple[str, ...]
    soname: str
    interpreter: str


def read_elf(path: str) -> Elf | None:
    """Parse a dynamically linked ELF file; None for any other file, ValueError for a broken one.

    Files of another word size or byte order have machine 0.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(handle, 64, 0)
        if head[:4] != _ELF:
            return None
        if head[4:6] != b"\x02\x01":  # 64 bits, little-endian: what images are made for
            return Elf(0, (), "", "")
        return _read_elf(handle, head)
    except struct.error:
        raise ValueError("a broken ELF file") from None
    finally:
        os.close(handle)


def _read_elf(handle: int, head: bytes) -> Elf | None:
    kind, machine = struct.unpack_from("<HH", head, 16)
    table, width, count = (
        *struct.unpack_from("<Q", head, 32),
        *struct.unpack_from("<HH", head, 54),
    )
    if kind not in (2, 3):  # neither executable nor shared object
        return None
    raw = os.pread(handle, width * count, table)
    # type, offset in the file, address in memory, size in the file
    segments = [struct.unpack_from("<I4xQQ8xQ", raw, width * at) for at in range(count)]
    dynamic = b"".join(
        _segment(handle, segment) for segment in segments if segment[0] == _PT_DYNAMIC
    )
    if not dynamic:
        return None
    interpreter = b"".join(_segment(handle, item) for item in segments if item[0] == _PT_INTERP)
    tags = list(struct.iter_unpack("<QQ", dynamic))
    address = next((value for tag, value in tags if tag == _DT_STRTAB), 0)
    strings = _offset(segments, address)
    names = {
        wanted: [_name(handle, strings + value) for tag, value in tags if tag == wanted]
        for wanted in (_DT_NEEDED, _DT_SONAME)
    }
    soname = "".join(names[_DT_SONAME][:1])
    return Elf(machine, tuple(names[_DT_NEEDED]), soname, os.fsdecode(interpreter.rstrip(b"\0")))


def _segment(handle: int, segment: tuple[Any, ...]) -> bytes:
    _, offset, _, size = segment
    raw = os.pread(handle, size, offset)
    if len(raw) != size:
        raise ValueError("a broken ELF file")
    return raw


def _offset(segments: list[tuple[Any, ...]], address: int) -> int:
    for kind, offset, start, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return int(offset + address - start)
    raise ValueError("a broken ELF file")


def _name(handle: int, offset: int) -> str:
    name, end, _ = os.pread(handle, _LONGEST_NAME, offset).partition(b"\0")
    if not end:
        raise ValueError("a broken ELF file")
    return os.fsdecode(name)


class Loaded(NamedTuple):
    """What the dynamic loader says of one file."""

    missing: tuple[str, ...]  # of the file and of all that it pulls in
    versions: tuple[tuple[str, str], ...]  # (the file that requires one, the complaint)
    failure: str


def load(loader: str, path: str) -> Loaded:
    """Ask the loader to resolve a file as it would when loading it (nothing of it is run)."""
    # As ldd does it, less its shell. Not --list, which gives up at the first missing library.
    # cwd: an empty entry in a search path means the current folder, which must not help.
    result = subprocess.run(
        [loader, path],
        env=os.environ | {"LD_TRACE_LOADED_OBJECTS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        check=False,
    )
    return parse_loader(result.returncode, os.fsdecode(result.stdout))


def parse_loader(code: int, text: str) -> Loaded:
    """What the loader's exit code and words amount to."""
    missing = tuple(dict.fromkeys(_NOT_FOUND.findall(text)))
    versions = tuple((by, what) for what, by in _NO_VERSION.findall(text))
    failed = code and not missing and not versions
    return Loaded(missing, versions, _ending(code, text) if failed else "")


def libraries(prefix: Path, optional: Collection[str] = ()) -> Findings:
    """Every ELF file below prefix finds the libraries that it needs.

    A library that the loader does not find is counted, not reported, if a file below prefix is that
    library (by_import_order: the engine imports its owner first, as torch before its extensions),
    if the NVIDIA driver on the host has it (driver), or if it is named in optional. Problem (code
    2) if there is no environment at prefix.
    """
    root, _ = _opened(prefix)
    own = read_elf(os.path.realpath(sys.executable))
    if own is None or not own.interpreter:
        return Findings(unproved="this Python is statically linked: there is no loader to ask")
    objects, foreign, problems = _objects(root, own.machine)
    if not objects:
        return Findings(tuple(problems), unproved="there is no shared object in this environment")
    with ThreadPoolExecutor(_threads()) as pool:
        ask = partial(load, own.interpreter)
        answers = dict(zip(objects, pool.map(ask, (f"{root}/{p}" for p in objects)), strict=True))
    missing = _missing(objects, answers)
    provided = {elf.soname for elf in objects.values()} | {os.path.basename(p) for p in objects}
    accounts = [(path, library, _account(library, provided, optional)) for path, library in missing]
    for path, library, account in accounts:
        if account == "unresolved":
            what = f"needs {printable(library)}, which is nowhere"
            problems.append(Finding(path, "unresolved", what))
    problems = sorted({*problems, *_failures(root, answers)})
    metrics = {"objects": len(objects), "needed": sum(len(e.needed) for e in objects.values())}
    for account in ("by_import_order", "driver", "optional"):
        metrics[account] = sum(item[2] == account for item in accounts)
    metrics |= {"foreign": foreign}
    for kind in ("unresolved", "broken"):
        metrics[kind] = sum(finding.kind == kind for finding in problems)
    return Findings(tuple(problems), metrics)


def _objects(root: str, machine: int) -> tuple[dict[str, Elf], int, list[Finding]]:
    """The ELF files of this machine, the number of those of others, and the broken ones."""
    found: dict[str, Elf] = {}
    foreign = 0
    problems: list[Finding] = []
    for path in sorted(scan(root).files):
        name = path.rpartition("/")[2]
        try:
            # To read the first bytes of every file would take as long as the rest of this check.
            if ".so" not in name and not os.stat(f"{root}/{path}").st_mode & 0o111:
                continue
            elf = read_elf(f"{root}/{path}")
        except OSError as error:
            problems.append(Finding(path, "broken", f"cannot be read ({error.strerror})"))
        except ValueError as error:
            problems.append(Finding(path, "broken", str(error)))
        else:
            foreign += elf is not None and elf.machine != machine
            if elf is not None and elf.machine == machine:
                found[path] = elf
    return found, foreign, problems


def _missing(objects: Mapping[str, Elf], answers: Mapping[str, Loaded]) -> list[tuple[str, str]]:
    """(file, library) for what is not found, at the file that needs it, once.

    The loader repeats at a file what the libraries below it lack: those speak for themselves where
    they are in the environment; what is left comes from a system library and stays with the file.
    """
    direct = [(p, m) for p, a in answers.items() for m in a.missing if m in objects[p].needed]
    reported = {library for _, library in direct}
    rest = [(p, m) for p, a in answers.items() for m in a.missing if m not in reported]
    return direct + rest


def _account(library: str, provided: Collection[str], optional: Collection[str]) -> str:
    if DRIVER_LIBRARIES.fullmatch(library):
        return "driver"
    if library in provided:
        return "by_import_order"
    return "optional" if library in optional else "unresolved"


def _failures(root: str, answers: Mapping[str, Loaded]) -> Iterator[Finding]:
    for path, answer in answers.items():
        if answer.failure:
            yield Finding(path, "broken", f"the loader refuses it: {printable(answer.failure)}")
        for by, what in answer.versions:
            # The loader names the culprit at every file that pulls it in: once is enough.
            culprit = by.removeprefix(f"{root}/")
            where = culprit if culprit in answers else path
            yield Finding(where, "unresolved", printable(what))


# imports ----------------------------------------------------------------------------------------


def imports(modules: Sequence[str], python: str = sys.executable) -> Findings:
    """Each module imports in a fresh interpreter; metrics give the seconds that each took."""
    if not modules:
        return Findings(unproved="image.json names no module to import")
    problems: list[Finding] = []
    metrics: dict[str, Any] = {"modules": len(modules)}
    for module in modules:
        started = time.monotonic()
        failure = _import(python, module)
        metrics[f"{module}_seconds"] = round(time.monotonic() - started, 3)
        if failure:
            problems.append(Finding(module, "import", f"cannot be imported: {failure}"))
    return Findings(tuple(problems), metrics)


def _import(python: str, module: str) -> str:
    # -I: neither a user's site-packages, nor PYTHONPATH, nor the current folder may help or harm.
    # -B: compiled files must not appear in an environment that was just checked for extra files.
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    try:
        result = subprocess.run(
            [python, "-I", "-B", "-c", code, module],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=IMPORT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_LIMIT_S} s"
    except OSError as error:
        return f"{python} cannot be run ({error.strerror})"
    text = result.stderr.decode("utf-8", "replace")
    return printable(_ending(result.returncode, text)) if result.returncode else ""


def _ending(code: int, text: str) -> str:
    """The last words of a process, and the signal that ended it if one did."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = lines[-1] if lines else ""
    if code < 0:
        cause = f"ended by signal {-code} ({signal.strsignal(-code)})"
        return f"{cause}; {words}" if words else cause
    return words or f"ended with exit code {code} and no message"


# All together -----------------------------------------------------------------------------------


def _opened(prefix: Path) -> tuple[str, list[str]]:
    """The prefix as an absolute text, and its site-packages folders relative to it."""
    root = os.path.abspath(prefix)
    sites = [os.path.relpath(site, root) for site in info.site_packages(Path(root))]
    if not os.path.isdir(root):
        raise Problem(f"There is no environment at {prefix}: no such folder.", 2)
    names = (name for site in sites for name in os.listdir(f"{root}/{site}"))
    if not any(name.endswith(".dist-info") for name in names):
        raise Problem(f"The environment at {prefix} is empty: no distribution is installed.", 2)
    return root, sites


def run(
    prefix: Path,
    only: Collection[str] = (),
    progress: Callable[[Check], None] = lambda _: None,
) -> list[Check]:
    """Run the checks named in only (all, if empty), in the order of CHECKS.

    progress is called with each as it finishes. Problem (code 2) before anything runs, if a name
    is unknown, there is no environment at prefix, or what a check goes by cannot be read.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise Problem(f"No check is called {unknown[0]}; there are: {', '.join(CHECKS)}.", 2)
    chosen = [name for name in CHECKS if not only or name in only]
    _opened(prefix)
    lock = prefix / info.LOCK
    if "distributions" in chosen:
        read_lock(lock)
    facts = info.image(prefix) if {"libraries", "imports"} & set(chosen) else {}
    python = prefix / "bin/python"
    work: dict[str, Callable[[], Findings]] = {
        "files": partial(files, prefix),
        "distributions": partial(distributions, prefix, lock),
        "libraries": partial(libraries, prefix, _names(facts, "optional_libraries")),
        "imports": partial(
            imports, _names(facts, "imports"), str(python if python.exists() else sys.executable)
        ),
    }
    checks = []
    for name in chosen:
        checks.append(_check(name, work[name]))
        progress(checks[-1])
    return checks


def _names(facts: Mapping[str, Any], key: str) -> list[str]:
    names = facts.get(key, [])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise Problem(f"image.json: {key} is not a list of names.", 2)


def _check(name: str, work: Callable[[], Findings]) -> Check:
    started = time.monotonic()
    found = work()
    seconds = time.monotonic() - started
    if found.problems:
        return Check(name, "failed", seconds, found.metrics, reason(found.problems))
    if found.unproved:
        return Check(name, "unproved", seconds, found.metrics, found.unproved)
    return Check(name, "passed", seconds, found.metrics, None)


def reason(problems: Sequence[Finding]) -> str:
    """The findings, one a line; of very many the first, and how many more there are."""
    lines = [str(finding) for finding in problems[:SHOWN]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more else lines)


def main(arguments: Sequence[str]) -> int:
    """``python -m rollout.verify --seal``: write the seal of this image's environment."""
    if list(arguments) != ["--seal"]:
        print("usage: python -m rollout.verify --seal", file=sys.stderr)
        return 2
    prefix = info.prefix()
    try:
        text = seal(prefix)
        (prefix / SEAL).write_text(text, encoding="utf-8")
    except Problem as problem:
        print(problem.sentence, file=sys.stderr)
        return problem.code
    except OSError as error:
        print(f"The seal cannot be written to {prefix / SEAL}: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"{prefix / SEAL}: {len(text.splitlines())} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

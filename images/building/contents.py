"""What is in a layer: every entry of its tar, how two layers differ, and what must not be in one.

A layer is compared by its ``diff_id``, the sha256 of its uncompressed tar. Where two differ, that
number says nothing of why; the entries do.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from packaging.utils import canonicalize_name

from rollout.checks import named

SITE = re.compile(r"opt/rollout/lib/python3\.\d+/site-packages/")
# Not the one of a copy that another distribution carries (setuptools/_vendor).
_RECORD = re.compile(SITE.pattern + r"([^/]+)-[^/-]+\.dist-info/RECORD")
# In the order in which a difference is named: the first is the one to look at.
KINDS = ("missing", "added", "type", "content", "mode", "owner", "mtime", "xattr", "order")
_TYPES = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}
_PIECE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One entry of a layer's tar. ``content`` is a file's sha256, or what a link points to."""

    path: str
    type: str
    content: str
    mode: int
    owner: str
    mtime: float
    xattrs: tuple[tuple[str, str], ...]
    size: int = 0
    head: bytes = b""  # a file's first sixteen bytes


def read(
    stream: IO[bytes], keep: Callable[[str], bool] = lambda _: False
) -> Iterator[tuple[Entry, bytes]]:
    """Each entry of an uncompressed layer, and its bytes where ``keep`` wants them of that path."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            path = member.name.removeprefix("./").strip("/")
            content, head, kept = member.linkname, b"", b""
            file = tar.extractfile(member) if member.isreg() else None
            if file:
                hashed = hashlib.sha256()
                pieces = []
                wanted = keep(path)
                while piece := file.read(_PIECE):
                    head = head or piece[:16]
                    hashed.update(piece)
                    if wanted:
                        pieces.append(piece)
                content, kept = hashed.hexdigest(), b"".join(pieces)
            found = Entry(
                path,
                _TYPES.get(member.type, f"type {member.type!r}"),
                content,
                member.mode & 0o7777,  # buildah writes the type into it as well
                f"{member.uid}:{member.gid}",
                member.mtime if member.mtime % 1 else int(member.mtime),  # a header may say 1.0
                tuple(sorted((k, v) for k, v in member.pax_headers.items() if "xattr" in k)),
                member.size if file else 0,
                head,
            )
            yield found, kept


# How two layers differ


@dataclass(frozen=True)
class Difference:
    """One path, and the kinds of difference that it shows."""

    path: str
    kinds: tuple[str, ...]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {', '.join(self.kinds)}" + (
            f" ({self.detail})" if self.detail else ""
        )


_COMPARED = ("type", "content", "mode", "owner", "mtime")


def differences(first: Sequence[Entry], second: Sequence[Entry]) -> list[Difference]:
    """How a second layer differs from a first one, by path; none where no entry does."""
    before, after = ({entry.path: entry for entry in layer} for layer in (first, second))
    found = []
    for path in sorted(before.keys() | after.keys()):
        if path not in after or path not in before:
            found.append(Difference(path, ("added" if path in after else "missing",)))
            continue
        one, two = before[path], after[path]
        kinds = [kind for kind in _COMPARED if getattr(one, kind) != getattr(two, kind)]
        kinds += ["xattr"] if one.xattrs != two.xattrs else []
        if kinds:
            found.append(Difference(path, tuple(kinds), _detail(kinds[0], one, two)))
    common = before.keys() & after.keys()
    sequences = ([e.path for e in layer if e.path in common] for layer in (first, second))
    for one_path, other_path in zip(*sequences, strict=False):
        if one_path != other_path:
            detail = f"where one has it, the other has {other_path}"
            found.append(Difference(one_path, ("order",), detail))
            break  # one entry that moved displaces all behind it
    return found


def _detail(kind: str, one: Entry, two: Entry) -> str:
    if kind == "content" and one.type == "file":
        same = one.size == two.size
        return f"{one.size} bytes each" if same else f"{one.size} and {two.size} bytes"
    if kind == "mode":
        return f"{one.mode:o} and {two.mode:o}"
    if kind == "xattr":
        texts = [", ".join(f"{k}={v!r}" for k, v in entry.xattrs) for entry in (one, two)]
        return " and ".join(text or "none" for text in texts)
    return f"{getattr(one, kind)} and {getattr(two, kind)}"


# A layer in few words, so that another machine can say where its own differs


@dataclass(frozen=True)
class Part:
    """A folder of a layer: whose it is, what it holds, and digests of that."""

    owner: str  # the distribution that it comes with, or "-"
    files: int
    bytes: int
    content: str
    mode: str

    def __str__(self) -> str:
        return f"{self.owner} {self.files} {self.bytes} {self.content} {self.mode}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """What :meth:`__str__` wrote. ValueError for anything else."""
        owner, files, size, content, mode = text.split()
        return cls(owner, int(files), int(size), content, mode)


def part_of(path: str) -> str:
    """The folder that an entry is counted with: a package of site-packages, or one of Debian's."""
    inside = SITE.match(path)
    if not inside:
        names = path.split("/")
        deep = 3 if names[:2] == ["usr", "lib"] else 2 if names[0] in ("usr", "opt", "var") else 1
        return "/".join(names[:deep])
    names = path[inside.end() :].split("/")
    depth = 2 if names[0] == "nvidia" and len(names) > 2 else 1  # fifteen libraries share that one
    return "site-packages/" + "/".join(names[:depth])


def short(values: Iterable[object]) -> str:
    """Twelve hex digits that stand for a sequence."""
    whole = hashlib.sha256()
    for value in values:
        whole.update(f"{value}\0".encode(errors="surrogateescape"))  # a name may be no UTF-8
    return whole.hexdigest()[:12]


@dataclass(frozen=True)
class Summary:
    """A layer: its folders, and a digest for each thing that all entries have."""

    parts: Mapping[str, Part]
    owner: str
    mtime: str
    xattr: str
    order: str


def summary(layer: Sequence[Entry], owners: Mapping[str, str]) -> Summary:
    """The summary of a layer; ``owners`` are the distributions of its folders."""
    folders: dict[str, list[Entry]] = {}
    for entry in layer:
        folders.setdefault(part_of(entry.path), []).append(entry)
    parts = {}
    for name, inside in sorted(folders.items()):
        listed = sorted(inside, key=lambda entry: entry.path)
        parts[name] = Part(
            owners.get(name, "-"),
            sum(entry.type == "file" for entry in listed),
            sum(entry.size for entry in listed),
            short((e.path, e.type, e.content) for e in listed),
            short((e.path, e.mode) for e in listed),
        )
    ordered = sorted(layer, key=lambda entry: entry.path)
    return Summary(
        parts,
        short((e.path, e.owner) for e in ordered),
        short((e.path, e.mtime) for e in ordered),
        short((e.path, e.xattrs) for e in ordered),
        short(e.path for e in layer),
    )


def explained(first: Summary, second: Summary) -> list[Difference]:
    """How two summaries differ: folders where content or mode does, the layer for the rest."""
    found = []
    for name in sorted(first.parts.keys() | second.parts.keys()):
        one, two = first.parts.get(name), second.parts.get(name)
        if one is None or two is None:
            found.append(Difference(name, ("missing" if two is None else "added",)))
            continue
        kinds = tuple(k for k in ("content", "mode") if getattr(one, k) != getattr(two, k))
        if kinds:
            detail = f"{one.files} files of {one.bytes} bytes, and {two.files} of {two.bytes}"
            found.append(Difference(name, kinds, detail))
    # With other paths all of these differ too, and say nothing of their own.
    if not any(set(d.kinds) & {"missing", "added"} or "content" in d.kinds for d in found):
        kinds = tuple(
            kind
            for kind in ("owner", "mtime", "xattr", "order")
            if getattr(first, kind) != getattr(second, kind)
        )
        found += [Difference("the whole layer", kinds)] if kinds else []
    return found


def owners(records: Mapping[str, bytes]) -> dict[str, str]:
    """Which distribution a folder comes with, by RECORD path and its bytes; the largest share."""
    counts: dict[str, dict[str, int]] = {}
    for path, content in records.items():
        site, record = SITE.match(path), _RECORD.fullmatch(path)
        if not site or not record:
            continue
        name = canonicalize_name(record[1])
        for row in csv.reader(io.StringIO(content.decode())):
            if row and not row[0].startswith(".."):
                share = counts.setdefault(part_of(site[0] + row[0]), {})
                share[name] = share.get(name, 0) + int(row[2] if len(row) > 2 and row[2] else 0)
    return {part: max(sorted(share), key=share.__getitem__) for part, share in counts.items()}


def is_record(path: str) -> bool:
    """Whether a path is the list of files of a distribution."""
    return _RECORD.fullmatch(path) is not None


# What must not be in a layer


@dataclass(frozen=True)
class Rule:
    """Something that would make the next build differ, or that only takes room."""

    what: str
    broken: Callable[[Entry], bool]


def _below(*folders: str) -> Callable[[Entry], bool]:
    places = tuple(f"{folder}/" for folder in folders)
    return lambda entry: entry.path.startswith(places)


def _matches(pattern: str) -> Callable[[Entry], bool]:
    sign = re.compile(pattern)
    return lambda entry: sign.search(entry.path) is not None


def rules(timestamp: int) -> dict[str, Rule]:
    """What no layer may hold, by the name of the breaker; files have that moment's time."""
    compiled = re.compile(r"(opt/rollout|usr/lib/python3\.\d+)/")

    def timed(entry: Entry) -> bool:
        # PEP 552: flags 1, the hash of a source that no import compares.
        bytecode = entry.type == "file" and entry.path.endswith(".pyc")
        return bytecode and entry.head[4:8] != b"\1\0\0\0"

    return {
        "bytecode": Rule("bytecode that holds a time, or is compared with its source", timed),
        "stray bytecode": Rule(
            "bytecode outside of the compiled trees",
            lambda e: "__pycache__" in e.path.split("/") and not compiled.match(e.path),
        ),
        "timestamp": Rule("a time of its own", lambda e: e.mtime != timestamp),
        "ldconfig": Rule("the loader's cache of inode numbers", _below("var/cache/ldconfig")),
        "logs": Rule("a log", lambda e: e.type != "folder" and _below("var/log")(e)),
        "apt": Rule(
            "what apt and dpkg leave behind",
            _matches(
                r"^(etc/apt|var/lib/apt|var/cache/apt)(/|$)"
                r"|^var/(lib/dpkg|cache/debconf)/[^/]+-old$|^var/lib/dpkg/lock"
                r"|^etc/((passwd|group|shadow|gshadow)-|\.pwd\.lock)$"
            ),
        ),
        "machine": Rule(
            "the identity of a machine",
            lambda e: (
                (
                    e.size > 0
                    and _matches(r"^etc/(hostname|resolv\.conf|machine-id|ssh/ssh_host_)")(e)
                )
                or e.path == "var/lib/dbus/machine-id"
            ),
        ),
        "installer": Rule(
            "when and by what it was installed",
            _matches(
                r"site-packages/[^/]+\.dist-info/(INSTALLER|REQUESTED|direct_url\.json|uv_\w+\.json)$"
                r"|^opt/rollout/\.lock$"
            ),
        ),
        "cache": Rule(
            "a cache or temporary file",
            lambda e: (
                e.type != "folder"
                and _matches(
                    r"^(tmp|var/tmp|mnt|run|var/cache/rollout|(root|home/[^/]+)/\.cache)/"
                )(e)
            ),
        ),
        "removed": Rule("the mark of something removed", _matches(r"(^|/)\.wh\.")),
    }


# Several wheels ship the same empty file for a folder that they share.
_SHARED_BYTES = 1024


def twice(layers: Sequence[Sequence[Entry]]) -> list[str]:
    """Files that more than one layer holds: the lower ones are paid for and never seen."""
    seen: dict[str, Entry] = {}
    found = []
    for layer in layers:
        for entry in layer:
            if entry.type == "folder":
                continue
            other = seen.setdefault(entry.path, entry)
            # The last layer takes rights from Debian's programs (images/recipes/entrypoints).
            tamed = other.mode & ~entry.mode & 0o6000
            same = other.content == entry.content and (entry.size < _SHARED_BYTES or tamed)
            if other is not entry and not same:
                found.append(entry.path)
    return found


def broken(layers: Sequence[Sequence[Entry]], timestamp: int) -> list[str]:
    """A sentence for each rule that layers break, with the first files that do."""
    found = []
    for name, rule in rules(timestamp).items():
        paths = [entry.path for layer in layers for entry in layer if rule.broken(entry)]
        if paths:
            found.append(f"{name}: {rule.what}: {named(paths)}")
    doubled = twice(layers)
    if doubled:
        found.append(f"twice: in two layers: {named(doubled)}")
    return found


def load(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The entries of a layer's uncompressed tar, and the distributions of its folders."""
    found, records = [], {}
    with path.open("rb") as stream:
        for entry, content in read(stream, is_record):
            found.append(entry)
            if content:
                records[entry.path] = content
    return found, owners(records)

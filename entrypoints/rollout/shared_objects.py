"""Does every shared object and program find its libraries? ELF files, and the dynamic loader."""

from __future__ import annotations

import fnmatch
import os
import re
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rollout.environment import (
    Finding,
    Findings,
    counts,
    ending,
    opened,
    printable,
    scan,
    threads,
)

# Driver libraries: the NVIDIA container runtime mounts them from the host when a container starts,
# so no image has them and none may bring its own. Names as in the runtime's own list.
DRIVER_LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvcuvid|nvoptix|nvidia-(ml|cfg|nscq|sandboxutils|ptxjitcompiler"
    r"|fatbinaryloader|nvvm|nvvm70|gpucomp|compiler|opencl|encode|fbc|ifr|opticalflow|allocator"
    r"|ngx|pkcs11|pkcs11-openssl3|rtcore|tls|glcore|glsi|glvkspirv|eglcore))\.so(\..*)?"
)

_ELF = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME = 1, 5, 14
_LONGEST_NAME = 4096  # bytes; PATH_MAX
_NOT_FOUND = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)
_NO_VERSION = re.compile(r"(\S+: version `.*' not found) \(required by (.*)\)$", re.MULTILINE)


def libraries(prefix: Path, optional: Collection[str] = ()) -> Findings:
    """Every ELF file below prefix finds the libraries that it needs.

    A library that the loader does not find is counted, not reported, if a file below prefix is that
    library (by_import_order: the engine imports its owner first, as torch before its extensions),
    if the NVIDIA driver on the host has it (driver), or if a pattern in optional names it. Problem
    (code 2) if there is no environment at prefix.
    """
    root, _ = opened(prefix)
    own = read_elf(os.path.realpath(sys.executable))
    if own is None or not own.interpreter:
        return Findings(unproved="this Python is statically linked: there is no loader to ask")
    objects, foreign, problems = _objects(root, own.machine)
    if not objects:
        return Findings(tuple(problems), unproved="there is no shared object in this environment")
    with ThreadPoolExecutor(threads()) as pool:
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
    metrics |= {"foreign": foreign, **counts(problems, ("unresolved", "broken"))}
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
    named = any(fnmatch.fnmatchcase(library, pattern) for pattern in optional)
    return "optional" if named else "unresolved"


def _failures(root: str, answers: Mapping[str, Loaded]) -> Iterator[Finding]:
    for path, answer in answers.items():
        if answer.failure:
            yield Finding(path, "broken", f"the loader refuses it: {printable(answer.failure)}")
        for by, what in answer.versions:
            # The loader names the culprit at every file that pulls it in: once is enough.
            culprit = by.removeprefix(f"{root}/")
            where = culprit if culprit in answers else path
            yield Finding(where, "unresolved", printable(what))


# Reading ELF files ------------------------------------------------------------------------------


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
    table, width, count = struct.unpack_from("<Q14xHH", head, 32)
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


# Asking the loader ------------------------------------------------------------------------------


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
    return Loaded(missing, versions, ending(code, text) if failed else "")

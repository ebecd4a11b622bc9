"""The folder of temporary files: whether it can be written, has room, and a name for sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rollout.environment import printable
from rollout.preflight import image
from rollout.preflight.cache import ROOM_NEEDED, Access, Statvfs, cache_root, room
from rollout.preflight.files import below
from rollout.preflight.finding import Finding, Host

_KIND = "temporary"
_VARIABLE, _USUAL = "TMPDIR", "/tmp"  # noqa: S108 - where temporary files go else
# Bytes of temporary files: the proof on a GPU writes its probe there, of which the weights are
# 1.8 GiB ("bytes" of refit in the kept reports).
PROBE = 2 << 30
# Bytes of a UNIX socket's path, less what is put behind the folder: by Ray
# (/ray/session_<date and process>/sockets/plasma_store), and by engines: a UUID by vLLM
# (get_open_zmq_ipc_path), a temporary file's name by SGLang (PortArgs).
_SOCKET = 107
_OF_RAY = 72
_OF_ENGINES = {"vllm": 37, "sglang": 12}


def work_folder(
    environ: Mapping[str, str], root: Path = Path("/"), access: Access = os.access
) -> Path | None:
    """A folder for temporary files that can be written; with a read-only root /tmp cannot."""
    for candidate in (environ.get(_VARIABLE), _USUAL, str(cache_root(environ))):
        if candidate and _open(root, candidate, access):
            return Path(candidate)
    return None


def _open(root: Path, folder: str, access: Access) -> bool:
    # One that is no path from the root counts from where the command runs.
    return access(str(below(root, str(Path(folder).absolute()))), os.W_OK | os.X_OK)


def look(
    host: Host, access: Access = os.access, statvfs: Statvfs = os.statvfs
) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first.

    ``host.environ`` is as the job set it: a process of ``rollout`` has already put the folder that
    can be written in the place of one that cannot, and would see nothing wrong.
    """
    given = host.environ.get(_VARIABLE)
    taken = work_folder(host.environ, host.root, access)
    if taken is not None:
        yield from _room(host, str(taken), statvfs)
    if not given:
        return
    if _open(host.root, given, access):
        yield from _long(host, given)
        return
    instead = f", so {taken} is taken" if taken else ""
    change = f", or set {_VARIABLE}={taken}" if taken else ""
    sentence = (
        f"{_VARIABLE} is {printable(given)}, which is not there or cannot be written{instead}; "
        f"mount it into the container{change}"
    )
    yield Finding(_KIND, "tmpdir-not-writable", sentence, stops=False)


def _long(host: Host, folder: str) -> Iterator[Finding]:
    """Whether sockets can be made there: the kernel takes so many bytes of a path and no more."""
    needed = _OF_ENGINES.get(image.backend(host))
    if needed is None:  # no engine, and no Ray
        return
    length, shown = len(os.fsencode(folder)), printable(folder)
    if length > _SOCKET - needed:
        sentence = (
            f"{_VARIABLE} is {shown}, too long for the engine's sockets ({_SOCKET - needed} bytes "
            f"at most); set {_VARIABLE}={_USUAL}"
        )
        yield Finding(_KIND, "tmpdir-too-long", sentence)
    elif length > _SOCKET - _OF_RAY and not host.environ.get("RAY_TMPDIR"):
        sentence = (
            f"{_VARIABLE} is {shown}, too long for Ray's sockets ({_SOCKET - _OF_RAY} bytes at "
            f"most); set RAY_TMPDIR={_USUAL}"
        )
        yield Finding(_KIND, "tmpdir-too-long-for-ray", sentence, stops=False)


def _room(host: Host, folder: str, statvfs: Statvfs) -> Iterator[Finding]:
    """Room for temporary files: the proof's, or the least of any command."""
    needed = PROBE if host.proof and host.cuda else ROOM_NEEDED
    found = room(host, folder, statvfs)
    if found and found[0] < needed:
        sentence = (
            f"the disk of {printable(folder)} has room for {found[0] >> 20} MiB of temporary "
            f"files, {needed >> 20} needed; free some, or set {_VARIABLE} to a folder on another"
        )
        yield Finding(_KIND, "tmpdir-full", sentence)

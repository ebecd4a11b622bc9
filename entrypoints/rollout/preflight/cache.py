"""The folders that hold what engines compile and download."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.environment import printable
from rollout.preflight import files, mounts
from rollout.preflight.finding import Finding, Host

_KIND = "cache"
CACHE = "/var/cache/rollout"
_ROOT = "XDG_CACHE_HOME"
# Folders of what engines compile and load as programs. The images set all but the last two, below
# the one root; a job may set others.
_COMPILED = (
    *("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"),
    *("FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR", "SGLANG_CACHE_DIR", "SGLANG_DG_CACHE_DIR"),
    *("DG_JIT_CACHE_DIR", "CUTE_DSL_CACHE_DIR"),
)
# Folders of what is kept for speed alone, or was put there by others: nothing fails at once where
# they cannot be written.
_KEPT = (
    *("CUDA_CACHE_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"),
    "TORCH_HOME",
)
_REOPENED = (".lock", ".log")  # files that whoever comes next opens to write (FlashInfer, inductor)
_TRUE = frozenset({"1", "on", "true", "yes"})  # as huggingface_hub reads its variables
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

_NFS = frozenset({"nfs", "nfs4"})
_CLUSTER = {
    "lustre": "Lustre",
    "gpfs": "GPFS",
    "beegfs": "BeeGFS",
    "ceph": "CephFS",
    "wekafs": "WekaFS",
    "panfs": "PanFS",
    "pvfs2": "OrangeFS",
    "gfs2": "GFS2",
    "ocfs2": "OCFS2",
    "afs": "AFS",
}
_CIFS = frozenset({"cifs", "smb3", "smbfs"})
# FUSE that lies on a local disk: how podman, enroot and Apptainer make a container's root.
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.squashfuse", "fuse.squashfuse_ll"})

# Bytes. Below the first nothing can be compiled; the second is a guess from above: an engine's
# kernels are some hundred MB, their sizes were not measured.
ROOM_NEEDED = 64 << 20
ROOM_OF_MANY = 2 << 30

# A look through the caches ends after so many entries or seconds: a shared disk may take a
# millisecond for each.
_ENTRIES = 2000
_SECONDS = 0.03

Access = Callable[[str, int], bool]
Statvfs = Callable[[Path], os.statvfs_result]


@dataclass(frozen=True)
class _Place:
    """A folder that a variable names."""

    variable: str
    path: str  # as the container sees it

    @property
    def said(self) -> str:
        shown = printable(self.path)
        return shown if self.variable == _ROOT else f"{shown} ({self.variable})"

    @property
    def change(self) -> str:
        """What to change so that another folder is taken."""
        if self.variable == _ROOT:
            return f"mount one at {printable(self.path)}"
        return f"set {self.variable} to one"


def look(
    host: Host, access: Access = os.access, statvfs: Statvfs = os.statvfs
) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first.

    ``access`` and ``statvfs`` are the system's calls, which tests answer themselves.
    """
    mounted = mounts.read(host.root)
    root = _Place(_ROOT, str(cache_root(host.environ)))
    # An image of the CPU compiles nothing for its proof.
    compiled = [root, *_named(host.environ, _COMPILED if host.cuda else ())]
    closed: list[str] = []
    for place in compiled:
        if not _below(place.path, closed):
            found = [*_closed(host, place, mounted, access)]
            yield from found
            closed += [place.path for _ in found]
    if not closed:
        yield from _foreign(host, compiled[1:], access)
        yield from _room(host, root, statvfs)
    slow: list[str] = []
    for place in compiled:
        if not _below(place.path, [*closed, *slow]):
            found = [*_remote(host, place, mounted)]
            yield from found
            slow += [place.path for _ in found]
    yield from _kept(host, mounted, access, closed)


def cache_root(environ: Mapping[str, str]) -> Path:
    """The one root of all caches."""
    return Path(environ.get(_ROOT) or CACHE)


def _named(environ: Mapping[str, str], variables: Sequence[str]) -> list[_Place]:
    """The folders that variables name; a relative one is nobody's on purpose, and passed over."""
    pairs = ((name, environ.get(name, "")) for name in variables)
    return [_Place(name, os.path.normpath(value)) for name, value in pairs if value.startswith("/")]


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _existing(host: Host, path: str) -> Path:
    """The folder itself, or the nearest one above it that exists: there it would be made."""
    place = files.below(host.root, path)
    while not files.there(place) and place not in (host.root, place.parent):
        place = place.parent
    return place


def _mount(host: Host, place: _Place, mounted: Sequence[mounts.Mount]) -> mounts.Mount | None:
    """The mount that a folder lies on, links followed as far as they stay below the root."""
    top = Path(os.path.realpath(host.root))
    real = Path(os.path.realpath(_existing(host, place.path)))
    inside = Path("/", real.relative_to(top)) if real.is_relative_to(top) else place.path
    return mounts.holding(mounted, str(inside))


# What cannot be written ---------------------------------------------------------------------------


def _closed(
    host: Host, place: _Place, mounted: Sequence[mounts.Mount], access: Access
) -> Iterator[Finding]:
    """A folder of compiled files that cannot be used."""
    mount = _mount(host, place, mounted)
    if mount and "ro" in mount.options:
        sentence = f"{place.said} is mounted read-only; give a writable folder: {place.change}"
        yield Finding(_KIND, "cache-read-only", sentence)
    elif not access(str(_existing(host, place.path)), os.W_OK | os.X_OK):
        way_out = "mount a writable folder there, or run with group 0"
        yield Finding(_KIND, "cache-not-writable", f"{place.said} cannot be written; {way_out}")
    elif mount and "noexec" in mount.options and host.cuda:
        sentence = (
            f"{place.said} is mounted noexec, and compiled kernels cannot be loaded from there; "
            "mount it with exec (docker: '--tmpfs …:exec')"
        )
        yield Finding(_KIND, "cache-noexec", sentence)


def _kept(
    host: Host, mounted: Sequence[mounts.Mount], access: Access, closed: Sequence[str]
) -> Iterator[Finding]:
    """Folders of what is downloaded: read-only ones are often meant so, and offline always."""
    offline = any(host.environ.get(name, "").lower() in _TRUE for name in _OFFLINE)
    said = list(closed)
    for place in _named(host.environ, _KEPT):
        if _below(place.path, said) or (offline and place.variable != "CUDA_CACHE_PATH"):
            continue
        mount = _mount(host, place, mounted)
        read_only = mount is not None and "ro" in mount.options
        if read_only or not access(str(_existing(host, place.path)), os.W_OK | os.X_OK):
            said.append(place.path)
            sentence = (
                f"{place.said} cannot be written, and nothing new is kept there; set "
                f"{place.variable} to a writable folder, or HF_HUB_OFFLINE=1 where all is there"
            )
            yield Finding(_KIND, "cache-cannot-grow", sentence, stops=False)


def _foreign(host: Host, places: Sequence[_Place], access: Access) -> Iterator[Finding]:
    """What another user compiled, and this one cannot read or replace."""
    unread: list[str] = []
    fixed: list[str] = []
    for path, folder in _entries([str(files.below(host.root, place.path)) for place in places]):
        if not access(path, os.R_OK | (os.X_OK if folder else 0)):
            unread.append(path)
        elif (folder or path.endswith(_REOPENED)) and not access(path, os.W_OK):
            fixed.append(path)
    if unread:
        sentence = (
            f"{_who(host, unread)} cannot be read by this user; let their owner run "
            f"'chmod -R g+rwX {cache_root(host.environ)}', or give this user a cache of its own"
        )
        yield Finding(_KIND, "cache-unreadable", sentence)
    if fixed:
        sentence = (
            f"{_who(host, fixed)} cannot be written by this user, who cannot replace what is "
            f"compiled there; let their owner run 'chmod -R g+rwX {cache_root(host.environ)}', "
            "or give this user a cache of its own"
        )
        yield Finding(_KIND, "cache-of-another-user", sentence, stops=False)


def _entries(folders: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """What lies below folders, those at the top first, and whether each is a folder itself."""
    waiting, seen, end = list(dict.fromkeys(folders)), set(), time.monotonic() + _SECONDS
    left = _ENTRIES
    while waiting:
        folder = waiting.pop(0)
        if folder in seen:
            continue
        seen.add(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if left == 0 or time.monotonic() > end:
                        return
                    left -= 1
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        waiting.append(entry.path)
                    if not entry.is_symlink():
                        yield entry.path, is_folder
        except OSError:  # gone meanwhile, or not to be read: that was said of it above
            continue


def _who(host: Host, found: Sequence[str]) -> str:
    """The first of some files with its owner, and how many more there are."""
    first = Path(found[0])
    shown = printable(f"/{first.relative_to(host.root)}")
    try:
        status = first.lstat()
        shown += f" (user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
    except OSError:  # gone meanwhile
        pass
    return f"{shown} and {len(found) - 1} more" if len(found) > 1 else shown


# Where they lie, and how much room there is -------------------------------------------------------


def _remote(host: Host, place: _Place, mounted: Sequence[mounts.Mount]) -> Iterator[Finding]:
    """A folder of compiled files that several nodes may have at once."""
    mount = _mount(host, place, mounted)
    if mount is None:
        return
    where, change = f"{place.said} lies on", f"take a folder on a local disk: {place.change}"
    if mount.kind in _NFS:
        sentence = (
            f"{where} NFS ({mount.source}), where locks hold on one node alone and files vanish "
            f"under another (ESTALE); {change}"
        )
        yield Finding(_KIND, "cache-on-nfs", sentence, stops=False)
    elif mount.kind in _CLUSTER:
        sentence = (
            f"{where} {_CLUSTER[mount.kind]} ({mount.source}), where all nodes write the same "
            f"small files and wait for each other; {change}"
        )
        yield Finding(_KIND, "cache-on-cluster-disk", sentence, stops=False)
    elif mount.kind in _CIFS:
        sentence = (
            f"{where} CIFS ({mount.source}), which keeps no modes and no links of compiled files; "
            f"{change}"
        )
        yield Finding(_KIND, "cache-on-cifs", sentence, stops=False)
    elif mount.kind.startswith("fuse.") and mount.kind not in _LOCAL_FUSE:
        sentence = (
            f"{where} {mount.kind} ({mount.source}), where files may be slow and cannot be "
            f"locked; {change}"
        )
        yield Finding(_KIND, "cache-on-fuse", sentence, stops=False)


def _room(host: Host, root: _Place, statvfs: Statvfs) -> Iterator[Finding]:
    """What is left on the disk of the root."""
    disk = f"the disk of {printable(root.path)} has room for"
    found = room(host, root.path, statvfs)
    if found is None:
        return
    free, files = found
    if free < ROOM_NEEDED or files == 0:
        left = "no file more" if files == 0 else f"{free >> 20} MiB"
        sentence = f"{disk} {left}; free some, or {root.change} on another"
        yield Finding(_KIND, "cache-full", sentence)
    elif free < ROOM_OF_MANY and host.cuda:
        sentence = (
            f"{disk} {free >> 20} MiB, and engines compile and download more; free some, or "
            f"{root.change} on another"
        )
        yield Finding(_KIND, "cache-nearly-full", sentence, stops=False)


def room(host: Host, path: str, statvfs: Statvfs) -> tuple[int, int] | None:
    """Bytes and files that this user may still write, -1 where files are not counted."""
    try:
        found = statvfs(_existing(host, path))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else -1

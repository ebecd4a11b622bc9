"""Is everything in the image what the list says: each file, folder and link, its mode and owner?

The list (inventory.py) is made with the last layer. What is inside of the environment is hashed by
hashes.py; here are its modes, owners and empty folders, and all that lies outside of it.

Some differences are no damage. They are named, each time (``aside`` of the metrics):

- mounts that cover files of the image, and what engines write into it (written.py);
- owners that cannot be compared, since the whole image was unpacked or is seen as another user's;
- files that this user may not read, as /etc/shadow: their mode, owner and size are compared;
- what lies beside the image's own folders, where additions belong (docs/adding.md).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rollout import hashes, inventory, mounts, written
from rollout.environment import Finding, Findings, counts, printable
from rollout.inventory import FILE, FOLDER, LINK, NAMES, OTHER, PLAIN, VOLATILE, Entry, Seen
from rollout.mounts import Mounts

KINDS = ("changed", "missing", "extra", "unreadable", "mode", "owner")
REMEDY = "take the image anew"
REMEDY_EXTRA = "remove it; additions belong in /opt/added or a folder of their own"
# What programs, the loader and Python read by themselves. Elsewhere a name that no layer has is
# somebody's own: a checkout in /opt/mine, data in /data.
_SYSTEM = ("usr", "etc", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "boot", "var")
# Where a site says which index its additions come from; nothing that runs reads them.
_SETTINGS = frozenset({"etc/pip.conf", "etc/uv"})
_SPECIAL = {stat.S_ISUID: "set-user", stat.S_ISGID: "set-group", stat.S_ISVTX: "sticky"}
# What a user who is not root loses of a mode in unpacking: tar does not set these bits.
_LOST = 0o7022
_WORDS = {FILE: "a file", FOLDER: "a folder", LINK: "a link", OTHER: "a device, pipe or socket"}
_NAMED = 5
UIDS, ALL = "/proc/self/uid_map", ["0", "0", "4294967295"]


def whole(
    prefix: Path,
    mounted: Callable[[str, str], Mounts] = mounts.read,
    mapped: Callable[[], bool] = lambda: user_namespace(),
) -> Findings:
    """Everything in the image that an environment lies in, against the list.

    Metrics: what was compared, problems by kind, and ``aside``. ``mapped`` says whether this
    process sees owners through a map of its user namespace.
    """
    root, own = inventory.root_of(prefix)
    where = f"{own}/{inventory.LIST}"
    try:
        with open(f"{root}/{where}", encoding="utf-8") as stream:
            expected = inventory.parse(stream.read())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        what = f"the list of what is in the image cannot be read ({why}); {REMEDY}"
        return Findings((Finding(inventory.LIST, "missing", what),), {})
    look = Look(
        "" if root == "/" else root, own, expected, mounted(root, f"{root.rstrip('/')}/{own}")
    )
    look.all()
    look.settle(mapped())
    problems = tuple(sorted(look.problems))
    metrics = {"entries": len(look.seen), **counts(problems, KINDS)}
    aside = look.aside()
    return Findings(problems, {**({"aside": aside} if aside else {}), **metrics})


def user_namespace() -> bool:
    """Whether owners are seen through the map of a user namespace."""
    try:
        with open(UIDS, encoding="ascii") as stream:
            return stream.read().split() != ALL
    except OSError:
        return False


@dataclass
class Look:
    """One look at an image; what was found gathers in the lists."""

    root: str
    own: str
    expected: Mapping[str, Entry]
    mounts: Mounts
    problems: list[Finding] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    owners: list[tuple[str, Entry, Entry]] = field(default_factory=list)
    modes: list[tuple[str, int, int]] = field(default_factory=list)
    extras: dict[str, Seen] = field(default_factory=dict)
    jobs: list[tuple[str, str, int]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # folders that cannot be listed
    unread: list[str] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    beside: list[str] = field(default_factory=list)
    strange: str = ""  # whose the image seems to be

    def _bad(self, path: str, kind: str, what: str, remedy: str = REMEDY) -> None:
        self.problems.append(Finding(self._named(path), kind, f"{what}; {remedy}"))

    def _named(self, path: str) -> str:
        """A path as other findings name it: from the environment, or from the root."""
        inside = path.startswith(f"{self.own}/")
        return path[len(self.own) + 1 :] if inside else f"/{path}"

    def all(self) -> None:
        """Compare everything."""
        for path, seen in inventory.walk(self.root, self.mounts, self._ours):
            if path not in NAMES and path not in inventory.MOUNTED:
                self._one(path, seen)
        self._extra()
        self._missing()
        self._contents()

    def _ours(self, path: str) -> bool:
        """Whether a folder is looked into."""
        return path in self.expected or _system(path, self.own)

    # One path ------------------------------------------------------------------------------------

    def _one(self, path: str, seen: Seen) -> None:
        if path.startswith(f"{self.own}/"):
            self._inside(path, seen)
        elif path not in self.expected:
            self.extras[path] = seen
        else:
            self._outside(path, seen, self.expected[path])
        if seen.rights:
            what = f"has rights beyond its mode ({', '.join(seen.rights)})"
            self._bad(path, "mode", what)
        if seen.error:
            self.closed.append(path)
            locked = self.expected.get(path)
            if locked is None or locked.mode & 0o005 == 0o005:
                self._bad(path, "unreadable", seen.error)
            else:
                self.unread.append(path)

    def _inside(self, path: str, seen: Seen) -> None:
        """What is in the environment; what its files hold is for hashes.py to say."""
        entry = seen.entry
        locked = self.expected.get(path)
        if entry.kind == OTHER or (locked and locked.kind != entry.kind):
            return
        self.seen.add(path)
        if entry.kind == FOLDER and not seen.inside and not seen.error and locked is None:
            self._bad(path, "extra", "extra: an empty folder that no layer has", REMEDY_EXTRA)
        self._rights(path, entry, locked or Entry(entry.kind, PLAIN[entry.kind], 0, 0))

    def _outside(self, path: str, seen: Seen, locked: Entry) -> None:
        entry = seen.entry
        self.seen.add(path)
        if entry.kind != locked.kind:
            now, then = _WORDS[entry.kind], _WORDS[locked.kind]
            to = f" to {printable(entry.content)}" if entry.kind == LINK else ""
            self._bad(path, "changed", f"changed: {now}{to}, not {then}")
            return
        free = path in written.REWRITTEN
        self._rights(path, entry, locked)
        if entry.kind == LINK and entry.content != locked.content:
            links = f"a link to {printable(entry.content)}, not to {printable(locked.content)}"
            self._bad(path, "changed", f"changed: {links}")
        if entry.kind == FILE:
            if entry.size != locked.size and path != written.CACHE and not free:
                self._bad(path, "changed", f"changed: {entry.size} bytes, not {locked.size}")
            elif entry.mode & 0o004 or os.access(f"{self.root}/{path}", os.R_OK):
                self.jobs.append((path, "sha256", entry.size or 0))
            else:
                self.unread.append(path)

    def _rights(self, path: str, entry: Entry, locked: Entry) -> None:
        self.owners.append((path, locked, entry))
        # Written anew a file has fewer rights, those of a temporary one (mktemp).
        fewer = path in written.REWRITTEN and not entry.mode & ~locked.mode
        if entry.kind != LINK and entry.mode != locked.mode and not fewer:
            self.modes.append((path, entry.mode, locked.mode))

    # What is too much, and what is not there -----------------------------------------------------

    def _extra(self) -> None:
        """What no layer has: an engine's, the driver's, somebody's own, or damage."""
        accounted = set()
        for path, seen in self.extras.items():
            if seen.entry.kind == OTHER:
                self._bad(path, "extra", f"extra: {_WORDS[OTHER]}", "remove it")
            elif written.added(path):
                self.written.add(path)
            elif seen.entry.kind == LINK and written.to_mount(self.root, path, self.mounts):
                accounted.add(path)
            elif not _system(path, self.own):
                self.beside.append(path)
            else:
                continue
            accounted.add(path)
        led = {above for path in accounted for above in _above(path)}
        damage = {
            path: seen
            for path, seen in self.extras.items()
            if path not in accounted and path not in led and not self.mounts.leads(path)
        }
        for path, seen in damage.items():
            if any(above in damage for above in _above(path)):
                continue  # its folder is named
            what = _WORDS[seen.entry.kind]
            if seen.entry.kind == LINK:
                what += f" to {printable(seen.entry.content)}"
            elif seen.entry.kind == FOLDER:
                count = sum(other.startswith(f"{path}/") for other in damage)
                what = f"a folder with {count} entries" if count else "an empty folder"
            self._bad(path, "extra", f"extra: {what} that no layer has", REMEDY_EXTRA)

    def _missing(self) -> None:
        lost = {path for path in self.expected if path not in self.seen}
        for path in sorted(lost):
            locked = self.expected[path]
            inside = path.startswith(f"{self.own}/")
            over = self.mounts.over(path)
            if over is not None:
                if not inside and not self._same(path, locked):
                    self.covered.add(over if over else path)
            elif any(above in self.closed for above in _above(path)):
                self.unread.append(path)
            elif path in self.extras or any(above in lost for above in _above(path)):
                continue
            elif not inside or locked.kind == FOLDER:  # hashes.py names files of the environment
                if os.path.lexists(f"{self.root}/{path}"):
                    continue  # it is named as changed
                self._bad(path, "missing", f"missing: {_WORDS[locked.kind]}")

    def _same(self, path: str, locked: Entry) -> bool:
        """Whether a mount shows what the image has at a path; modes are the mount's own."""
        if path in VOLATILE or locked.kind == FOLDER:
            return True
        try:
            found = os.lstat(f"{self.root}/{path}")
        except OSError:
            return False
        if inventory.kind_of(found.st_mode) != locked.kind:
            return False
        if locked.kind == LINK:
            return os.readlink(f"{self.root}/{path}") == locked.content
        if found.st_size != locked.size:
            return False
        (content,) = hashes.contents(self.root, [(path, "sha256", 0)])
        return not content.error and content.digest.hex() == locked.content

    def _contents(self) -> None:
        def known(path: str) -> bool:
            return path in self.seen or path.startswith(f"{self.own}/")

        for content in hashes.contents(self.root, self.jobs):
            path, locked = content.path, self.expected[content.path]
            if content.error:
                self._bad(path, "unreadable", content.error)
            elif content.digest.hex() != locked.content:
                if path in written.REWRITTEN or path == written.CACHE:
                    doubt = written.doubtful(self.root, path, self.mounts, known)
                    if not doubt:
                        self.written.add(path)
                        continue
                    self._bad(path, "changed", f"changed: {doubt}")
                    continue
                now, then = content.digest.hex()[:12], locked.content[:12]
                self._bad(path, "changed", f"changed: sha256 {now}…, not {then}…")

    # Owners and modes ----------------------------------------------------------------------------

    def settle(self, mapped: bool) -> None:
        """Which owners and modes are wrong, and which come from how the image was unpacked."""
        pairs = [(locked, seen) for _, locked, seen in self.owners]
        users = _usual((locked.uid, seen.uid) for locked, seen in pairs)
        groups = _usual((locked.gid, seen.gid) for locked, seen in pairs)
        strange = {**_moved(users), **{-1 - k: v for k, v in _moved(groups).items()}}
        one = (
            len({(seen.uid, seen.gid) for _, seen in pairs})
            == 1
            < len({(locked.uid, locked.gid) for locked, _ in pairs})
        )
        shifted = users.get(0, 0) != 0 or groups.get(0, 0) != 0
        excused = bool(strange) and (mapped or one or shifted)
        for path, locked, seen in self.owners:
            if (seen.uid, seen.gid) == (locked.uid, locked.gid):
                continue
            if excused and (seen.uid, seen.gid) == (users[locked.uid], groups[locked.gid]):
                continue
            owner = f"{seen.uid}:{seen.gid}, not {locked.uid}:{locked.gid}"
            self._bad(path, "owner", f"changed: it belongs to {owner}")
        if excused:
            self.strange = f"root's are {users.get(0, 0)}:{groups.get(0, 0)}'s here"
        for path, mode, locked_mode in self.modes:
            if excused and not mode & ~locked_mode and not (mode ^ locked_mode) & ~_LOST:
                continue
            self._bad(path, "mode", f"changed: {_of_mode(mode, locked_mode)}")

    def aside(self) -> str:
        """What differs and is no damage, in one sentence; empty where nothing does."""
        said = []
        if self.strange:
            said.append(f"owners not comparable ({self.strange})")
        if not self.mounts.known:
            said.append(f"mounts unknown (no {mounts.LIST})")
        for what, paths in (
            ("covered by mounts", self.covered),
            ("written by an engine", self.written),
            ("beside the image", self.beside),
        ):
            if paths:
                said.append(f"{what}: {_list(paths)}")
        if self.unread:
            said.append(f"{len(self.unread)} not readable for this user")
        return "; ".join(said)


def _system(path: str, own: str) -> bool:
    """Whether nothing may lie at a path but what a layer has."""
    if path in _SETTINGS:
        return False
    return path.split("/")[0] in _SYSTEM or path == own or path.startswith(f"{own}/")


def _above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _usual(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """For each locked number the one that is seen most often in its place."""
    usual: dict[int, int] = {}
    for (locked, seen), _ in Counter(pairs).most_common():
        usual.setdefault(locked, seen)
    return usual


def _moved(usual: Mapping[int, int]) -> dict[int, int]:
    return {locked: seen for locked, seen in usual.items() if locked != seen}


def _of_mode(mode: int, locked: int) -> str:
    what = [f"the {name} bit is set" for bit, name in _SPECIAL.items() if mode & ~locked & bit]
    if locked & 0o111 and not mode & 0o111:
        what.append("nobody may execute it")
    words = f" ({', '.join(what)})" if what else ""
    return f"mode {mode:04o}, not {locked:04o}{words}"


def _list(paths: Collection[str]) -> str:
    shown = [f"/{printable(path)}" for path in sorted(paths)]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + more

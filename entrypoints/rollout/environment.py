"""What the checks of ``rollout verify`` share: an environment's tree, and how findings are said."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rollout import info
from rollout.problem import Problem

_THREADS = 16  # more only queue for the interpreter lock, which small files hold half their time


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


def counts(problems: Iterable[Finding], kinds: Iterable[str]) -> dict[str, int]:
    """How many problems there are of each kind, as metrics."""
    found = [finding.kind for finding in problems]
    return {kind: found.count(kind) for kind in kinds}


def ending(code: int, text: str) -> str:
    """The last words of a process, and the signal that ended it if one did."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = lines[-1] if lines else ""
    if code < 0:
        cause = f"ended by signal {-code} ({signal.strsignal(-code)})"
        return f"{cause}; {words}" if words else cause
    return words or f"ended with exit code {code} and no message"


def threads() -> int:
    """How many threads to read files with."""
    return min(len(os.sched_getaffinity(0)), _THREADS)


def opened(prefix: Path) -> tuple[str, list[str]]:
    """The prefix as an absolute text, and its site-packages folders relative to it.

    Problem (code 2) where there is no environment.
    """
    root = os.path.abspath(prefix)
    sites = [os.path.relpath(site, root) for site in info.site_packages(Path(root))]
    if not os.path.isdir(root):
        raise Problem(f"There is no environment at {prefix}: no such folder.", 2)
    names = (name for site in sites for name in os.listdir(f"{root}/{site}"))
    if not any(name.endswith(".dist-info") for name in names):
        raise Problem(f"The environment at {prefix} is empty: no distribution is installed.", 2)
    return root, sites


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

"""Another revision of this checkout: which commit it is, and its files in a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images import host
from images.catalog import ROOT
from images.host import leftovers
from rollout.problem import Problem


def worktree_argv(folder: Path, revision: str) -> list[str]:
    """The command that lays out a revision beside this checkout."""
    return ["git", "worktree", "add", "--quiet", "--detach", str(folder), revision]


def commit(revision: str) -> str:
    """The commit that a revision names.

    Raises:
        Problem: exit code 2 where git knows none of that name.
    """
    argv = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{revision}^{{commit}}"]
    done = host.run(argv, quiet=True, check=False, cwd=ROOT)
    if done.returncode:
        raise Problem(
            f"--changed-since: git knows no commit {revision!r} in this checkout; fetch it, or "
            "name another one",
            2,
        )
    return done.stdout.strip()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The files of a commit in a folder of their own; removed at the end."""
    with leftovers.temporary("matrix") as place:
        folder = place / "tree"
        host.run(worktree_argv(folder, revision), quiet=True, cwd=ROOT)
        try:
            yield folder
        finally:
            remove = ["git", "worktree", "remove", "--force", str(folder)]
            host.run(remove, quiet=True, check=False, cwd=ROOT)

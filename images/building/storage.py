"""What we keep in a builder's storage beside its images: a lock, and notes about them.

All of it belongs to the storage, not to a checkout: several clones build in one storage, and one
clone in several.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from images import host
from images.building import builder
from images.host import leftovers, owner


@contextmanager
def alone(tool: builder.Builder) -> Iterator[None]:
    """One of our builds at a time in a storage.

    Two at once take each other's steps for their own, and may end as an image with another id.
    """
    folder = tool.own()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = owner.parse(handle.read())
            who = f" (process {holder.process})" if holder else ""
            host.say(f"another build{who} is running in this storage; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(f"{owner.this()}\n")
        handle.flush()
        yield


def _note(tool: builder.Builder, inputs: str) -> Path:
    return tool.own() / "built" / inputs


def remember(tool: builder.Builder, inputs: str, image: str) -> None:
    """Keep which image was built of these inputs."""
    host.write(_note(tool, inputs), f"{image}\n")


def find(tool: builder.Builder, inputs: str) -> builder.Built | None:
    """The image of this storage that was built of these inputs, whatever it is called by now."""
    try:
        text = _note(tool, inputs).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return tool.inspect(text) if re.fullmatch("[0-9a-f]{64}", text) else None


def keep_base(tool: builder.Builder, name: str, unused: float = leftovers.UNUSED) -> None:
    """Note that a base was of use, and remove those of its name that none has used for long."""
    folder = tool.own() / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    repository, _, tag = name.rpartition(":")
    (folder / tag).touch()
    for other in set(tool.tags(repository)) - {tag}:
        note = folder / other
        if not note.exists():
            note.touch()  # it is older than the notes: its time begins now
        elif time.time() - note.stat().st_mtime > unused and tool.remove(f"{repository}:{other}"):
            with suppress(FileNotFoundError):
                note.unlink()

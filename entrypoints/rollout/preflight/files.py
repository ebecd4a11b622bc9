"""Files of a host, as far as this user may look: what is closed to him is as if it were not there.

``Path.exists`` and its like raise PermissionError below a folder that this user may not enter, and
a look at a host must end no command.
"""

from __future__ import annotations

import os
from pathlib import Path


def below(root: Path, path: str) -> Path:
    """A path of the host, as it is found below its root."""
    return root / path.lstrip("/")


def there(path: Path) -> bool:
    """Whether a path leads to anything."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where one may not look


def exists(root: Path, path: str) -> bool:
    """Whether a path of the host leads to anything."""
    return there(below(root, path))


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; nothing where it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def text(path: Path) -> str:
    """What a file says, whatever its bytes; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

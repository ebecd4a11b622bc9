"""Images as parts of files: what several of them share is written once, and in the first.

The parts of an image are one archive, split: each content that no earlier image has, named after
its sha256, mode and owner, and last a list of what lies where. leased.py puts it together.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from images import host
from images.building import build, export
from images.building.build import TIMESTAMP
from images.building.buildah import Buildah
from images.building.layers import zstd_argv
from images.catalog import Image
from rollout.problem import Problem


def read_have(path: Path) -> dict[str, str]:
    """What a machine has, by sha256: lines as sha256sum writes them.

    Raises:
        Problem: exit code 2 where that file is another.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"--have: {path} cannot be read: {error}", 2) from None
    found = {}
    for number, line in enumerate(lines, 1):
        sha, _, name = line.partition("  ")
        if len(sha) != 64 or not name.startswith("/"):
            raise Problem(f"--have: {path}, line {number} is no sha256 and path; make it anew", 2)
        found[sha] = name
    return found


def content(sha256: str, mode: int, uid: int, gid: int) -> str:
    """The name of a content among all: files that share one are one file on the machine."""
    return f"{sha256[:2]}/{sha256}-{mode:o}-{uid}-{gid}"


def entries(root: Path) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """What lies in an image, parents first, each with the file to send where it is one."""
    for path in export.tree(root):
        info = path.lstat()
        entry: dict[str, Any] = {
            "path": f"rootfs/{path.relative_to(root)}",
            "mode": stat.S_IMODE(info.st_mode),
            "uid": info.st_uid,
            "gid": info.st_gid,
        }
        if stat.S_ISLNK(info.st_mode):
            yield entry | {"link": str(path.readlink())}, None
        elif stat.S_ISDIR(info.st_mode):
            yield entry, None
        elif stat.S_ISREG(info.st_mode):
            yield entry, path


def archive(
    stream: IO[bytes],
    root: Path,
    own: Mapping[str, bytes],
    sent: set[str],
    have: Mapping[str, str],
    name: str,
) -> None:
    """Write the archive of one image; ``sent`` grows by what it has."""
    listed: list[dict[str, Any]] = [
        {"path": "", "mode": 0o755, "uid": 0, "gid": 0},
        {"path": "rootfs", "mode": 0o755, "uid": 0, "gid": 0},
    ]
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:

        def add(entry: dict[str, Any], sha: str, size: int, data: IO[bytes]) -> None:
            key = content(sha, entry["mode"], entry["uid"], entry["gid"])
            entry["content"] = key
            if sha in have:
                entry["there"] = have[sha]
            elif key not in sent:
                tar.addfile(_member(key, size, entry), data)
            sent.add(key)
            listed.append(entry)

        for entry, path in entries(root):
            if path is None:
                listed.append(entry)
                continue
            with path.open("rb") as file:
                add(entry, host.sha256(path), path.stat().st_size, file)
        for file_name, data in own.items():
            mode = 0o755 if file_name == "run" else 0o644
            entry = {"path": file_name, "mode": mode, "uid": 0, "gid": 0}
            add(entry, hashlib.sha256(data).hexdigest(), len(data), io.BytesIO(data))
        text = json.dumps(listed, separators=(",", ":")).encode()
        last = {"mode": 0o644, "uid": 0, "gid": 0}
        tar.addfile(_member(f"{name}.json", len(text), last), io.BytesIO(text))


def _member(name: str, size: int, entry: Mapping[str, Any]) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, TIMESTAMP
    info.mode, info.uid, info.gid = entry["mode"], entry["uid"], entry["gid"]
    return info


def split(file: Path, size: int) -> dict[str, str]:
    """Cut a file into parts of so many bytes beside it, and remove it; name to sha256."""
    found = {}
    with file.open("rb") as stream:
        for number in range(1000):
            data = stream.read(size)
            if not data:
                break
            part = file.with_name(f"{file.stem}.{number:03}")
            part.write_bytes(data)
            found[part.name] = hashlib.sha256(data).hexdigest()
        else:
            raise Problem(
                f"{file.name} has more than 1000 parts of {size} bytes; take larger ones", 2
            )
    file.unlink()
    return found


def write(
    image: Image,
    tool: Buildah,
    folder: Path,
    sent: set[str],
    have: Mapping[str, str],
    *,
    part: int,
    level: int,
) -> dict[str, str]:
    """Write one image as parts into a folder; their names to their sha256.

    Raises:
        Problem: the image is not built, or not today's.
    """
    built = build.current(image, tool)
    name = export.stem(image)
    own = {
        "run": export.LAUNCHER.read_bytes(),
        "environment": export.environment(built.config, built.diff_ids).encode(),
    }
    whole = folder / f"{name}.whole"
    with export.mounted(tool, built.id) as root:
        export.pack(zstd_argv(level), whole, lambda out: archive(out, root, own, sent, have, name))
    return split(whole, part)

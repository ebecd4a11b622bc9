"""The layers of a published image, unpacked to look into them: their bytes, lock and seal.

Layers are the registry's, so nothing is written but what was downloaded, and reading ends where no
layer of ours would go on: a few bytes may unpack to as many as there is room for.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from images import host
from images.building import labels
from images.host import leftovers
from images.locking import lock
from images.publishing import sbom
from images.publishing.published import Metrics, Published
from rollout.hashes import SEAL
from rollout.problem import Problem

# Where an image keeps the lock that it was built from (images/recipes/install).
LOCK_INSIDE = "opt/rollout/share/rollout/requirements.lock"
# And the seal, by which `rollout verify` knows all other files (rollout.hashes).
SEAL_INSIDE = f"opt/rollout/{SEAL}"
# More than any image of ours has.
LONGEST_LOCK = 16 << 20
LARGEST_LAYER = 64 << 30
_PIECE = 1 << 20


def check_contents(image: Published) -> Metrics:
    """Every layer has its digest and its diff_id, and the lock inside is the attested one."""
    host.require("zstd")
    total, text, seal = 0, b"", ""
    with leftovers.temporary("published", host.scratch()) as folder:
        for (which, layer), diff_id in zip(image.named_layers, image.diff_ids, strict=True):
            path = folder / "layer"
            image.registry.download(image.repository, layer.digest, path, size=layer.size)
            found = unpacked(path, which)
            if found.diff_id != diff_id:
                raise Problem(f"{which} unpacks to {found.diff_id}, the configuration: {diff_id}")
            total, text, seal = total + found.size, found.lock or text, found.seal or seal
            path.unlink()  # or the largest image would be here as a whole
    if hashlib.sha256(text).hexdigest() != image.labels[labels.LOCK]:
        raise Problem(f"the layers hold another {LOCK_INSIDE} than the image names")
    locked = lock.parse(text.decode("utf-8", "replace"), Path(LOCK_INSIDE))
    inside = {sbom.pypi_purl(entry).to_string(): entry.sha256 for entry in locked}
    differing = sorted(set(inside.items()) ^ set(image.distributions.items()))
    if differing:
        raise Problem(f"the SBOM and the lock in the image differ in {differing[0][0]}")
    return {"bytes": total, "distributions": len(inside), "seal": seal or "none"}


@dataclass(frozen=True)
class Unpacked:
    """What is in a layer: the sha256 and bytes of its tar, the lock and the seal's sha256 in it."""

    diff_id: str
    size: int
    lock: bytes = b""
    seal: str = ""


class _Counted:
    """A stream that is hashed and counted as it is read, and has an end."""

    def __init__(self, stream: IO[bytes], which: str) -> None:
        self.stream, self.which, self.size, self.hash = stream, which, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.size += len(piece)
        if self.size > LARGEST_LAYER:
            raise Problem(
                f"{self.which} unpacks to more than {LARGEST_LAYER:,} bytes, as no layer of ours "
                "does; it was not read further"
            )
        self.hash.update(piece)
        return piece


def unpacked(path: Path, which: str) -> Unpacked:
    """Unpack a compressed layer to look into it; nothing is written.

    Raises:
        Problem: it cannot be unpacked, is no tar, or holds more than any layer of ours.
    """
    # zstd opens gzip too. The window is that of layers.zstd_argv.
    argv = ["zstd", "--decompress", "--stdout", "--quiet", "--long=27", str(path)]
    text, seal = b"", ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout  # noqa: S101 - for mypy: it was asked for
        stream = _Counted(process.stdout, which)
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_PIECE) as tar:  # type: ignore[call-overload]
                for member in tar:
                    name = member.name.removeprefix("./")
                    if name == LOCK_INSIDE:
                        found = _lock(tar, member, which)
                        text = text if found is None else found
                    elif name == SEAL_INSIDE and (file := tar.extractfile(member)):
                        seal = hashlib.file_digest(file, "sha256").hexdigest()
            while stream.read(_PIECE):
                pass
        except BaseException as error:
            process.kill()  # or it would be waited for to its end
            if isinstance(error, tarfile.TarError):
                raise Problem(f"{which} is no compressed tar") from None
            raise
    if process.returncode:
        raise Problem(f"{which} cannot be unpacked: zstd exited with {process.returncode}")
    return Unpacked(f"sha256:{stream.hash.hexdigest()}", stream.size, text, seal)


def _lock(tar: tarfile.TarFile, member: tarfile.TarInfo, which: str) -> bytes | None:
    """The lock in a layer; None where something that is no file has its name."""
    if member.size > LONGEST_LOCK:
        raise Problem(
            f"{which} holds a {LOCK_INSIDE} of {member.size:,} bytes, more than the "
            f"{LONGEST_LOCK:,} of any lock of ours; it was not read"
        )
    file = tar.extractfile(member)
    return file.read() if file else None

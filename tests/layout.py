"""Reading an OCI layout back, as a tool would that knows nothing of who wrote it."""

from __future__ import annotations

from pathlib import Path

from images.publishing import oci
from images.publishing.oci import Descriptor


def read(folder: Path) -> tuple[bytes, Descriptor]:
    """The manifest of the one image of a layout, with its own bytes."""
    (entry,) = oci.parse_index((folder / "index.json").read_bytes())
    data = (folder / "blobs/sha256" / entry.digest.removeprefix("sha256:")).read_bytes()
    assert oci.digest(data) == entry.digest
    return data, entry

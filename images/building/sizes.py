"""What weighs: tables of layers and folders, computed from the records in lockfiles/.

Nothing is measured here. A record says what each layer takes as a tar and compressed, and what each
of its folders holds; the lock says what asked for the distribution that a folder comes with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from images.building import layers
from images.building.contents import Part
from images.building.layers import Layer
from images.catalog import ROOT, Image

PAGE = ROOT / "lockfiles" / "SIZES.md"
LARGEST = 20


def recorded(images: Sequence[Image]) -> dict[str, tuple[Layer, ...]]:
    """The layers of every image that has a record, by reference."""
    return {image.reference: record.layers for image in images if (record := layers.read(image))}


@dataclass(frozen=True)
class Shared:
    """What a registry holds of a catalog: each layer once."""

    registry: int  # bytes of every layer, once
    whole: int  # bytes of every image, as if it were alone

    @property
    def ratio(self) -> float:
        """Registry bytes ÷ sum of images: 1 where nothing is shared."""
        return self.registry / self.whole if self.whole else 1.0


def shared(images: Mapping[str, Sequence[Layer]]) -> Shared:
    """Compressed bytes of a catalog with and without sharing."""
    once = {layer.diff_id: layer.compressed for found in images.values() for layer in found}
    return Shared(
        sum(once.values()),
        sum(layer.compressed for found in images.values() for layer in found),
    )


def layer_table(images: Sequence[Image]) -> str:
    """Every layer of the catalog: what it takes, and which images carry it."""
    found = recorded(images)
    if not found:
        return "No layers are recorded yet; `nox -s reproduce -- REF --keep` records them."
    users: dict[str, list[str]] = {}
    distinct: dict[str, Layer] = {}
    for reference, own in found.items():
        for layer in own:
            distinct[layer.diff_id] = layer
            users.setdefault(layer.diff_id, []).append(reference.rpartition(":")[2])
    lines = ["| layer | diff_id | as a tar | compressed | in |", "| --- | --- | --- | --- | --- |"]
    for diff_id, layer in distinct.items():
        lines.append(f"{_cells(layer)} {', '.join(users[diff_id])} |")
    whole = shared(found)
    lines += [
        "",
        f"A registry holds {megabytes(whole.registry)} for {len(found)} images, whose sum is "
        f"{megabytes(whole.whole)}: {whole.ratio:.2f}.",
    ]
    return "\n".join(lines)


def _cells(layer: Layer) -> str:
    """A layer in a row of a table: its name, digest and sizes."""
    digest = layer.diff_id.removeprefix("sha256:")[:12]
    size, packed = megabytes(layer.bytes), megabytes(layer.compressed)
    return f"| {layer.name} | `{digest}` | {size} | {packed} |"


def layers_of(image: Image) -> str:
    """The layers of an image below our own package, as recorded, from the lowest up."""
    own = recorded([image]).get(image.reference)
    if not own:
        return "No layers are recorded yet."
    lines = ["| layer | diff_id | as a tar | compressed |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *map(_cells, own)])


def needed_by(text: str) -> dict[str, list[str]]:
    """What asked for each distribution of a lock, from the comments that uv writes."""
    found: dict[str, list[str]] = {}
    name, listing = "", False
    for line in text.splitlines():
        entry = re.match(r"([a-z0-9][a-z0-9._-]*)==", line)
        if entry:
            name, listing = entry[1], False
        elif name and line.strip().startswith("# via"):
            listing = True
            rest = line.strip().removeprefix("# via").strip()
            found.setdefault(name, []).extend([rest] if rest else [])
        elif listing and line.strip().startswith("#"):
            found[name].append(line.strip().lstrip("# "))
    return found


def largest(image: Image, own: Sequence[Layer]) -> str:
    """The folders of an image that take most, with what needs each."""
    asked = needed_by(image.lock.read_text(encoding="utf-8"))
    parts: list[tuple[str, str, Part]] = [
        (name, layer.name, part) for layer in own for name, part in layer.summary.parts.items()
    ]
    parts.sort(key=lambda item: -item[2].bytes)
    whole = sum(part.bytes for _, _, part in parts)
    lines = [
        "| folder | bytes | of all | layer | comes with | needed by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, layer, part in parts[:LARGEST]:
        who = asked.get(part.owner, [])
        reason = ", ".join(who) if who else "the base" if layer == "base" else "the catalog file"
        owner = part.owner if part.owner != "-" else "Debian" if layer == "base" else "this project"
        lines.append(
            f"| `{name}` | {part.bytes:,} | {part.bytes / whole:.1%} | {layer} | {owner} | "
            f"{reason} |"
        )
    return "\n".join(lines)


def page(images: Sequence[Image]) -> str:
    """lockfiles/SIZES.md: the largest folders of every image."""
    parts = [
        "<!-- GENERATED by 'nox -s docs' from the records beside this file; do not edit. -->",
        "# What takes room in each image",
        "",
        f"The {LARGEST} largest folders, uncompressed, with the distribution that each comes with "
        "and what asked for it. What was taken out, and why, is in images/recipes/prune.toml.",
    ]
    found = recorded(images)
    for image in images:
        if image.reference in found:
            own = found[image.reference]
            tar, packed = (sum(getattr(x, k) for x in own) for k in ("bytes", "compressed"))
            parts += [
                "",
                f"## {image.reference}",
                "",
                f"{megabytes(tar)} in layers, {megabytes(packed)} compressed; the budget is "
                f"{megabytes(image.size.compressed)}.",
                "",
                largest(image, own),
            ]
    return "\n".join(parts) + "\n"


def megabytes(size: int) -> str:
    """Bytes for people, as registries count them."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"

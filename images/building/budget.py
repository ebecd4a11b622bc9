"""What an image may weigh, and what no layer may hold: checked at the end of each build.

Layers that are recorded, or that an earlier build here has checked, are known by their digest and
not read again. Only a new one makes a build read and compress; the last layer, which holds our own
files alone, counts as small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from images import catalog, host
from images.building import builder, contents, layers
from images.building.buildah import Buildah
from images.building.layers import Layer, megabytes
from images.catalog import Image, shown
from rollout.problem import Problem


def over(image: Image, found: Sequence[Layer]) -> list[str]:
    """The budgets of an image that its layers exceed, each as a clause of a sentence."""
    whole = sum(layer.compressed for layer in found)
    top = max(found, key=lambda layer: layer.compressed)
    sizes = (
        ("it", whole, "compressed", image.size.compressed),
        (f"its layer {top.name}", top.compressed, "largest-layer", image.size.largest_layer),
    )
    return [
        f"{what} takes {megabytes(size)} compressed, and 'size.{key}' allows {megabytes(allowed)}"
        for what, size, key, allowed in sizes
        if size > allowed
    ]


def _checked() -> Path:
    # Named after the rules: a layer that passed others is read again.
    return host.cache() / "layers" / host.sha256(Path(contents.__file__))[:12]


def remembered() -> dict[str, Layer]:
    """Layers that an earlier build here has checked."""
    found = {}
    for file in sorted(_checked().glob("*.json")):
        try:
            layer = layers.parse(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            continue  # another version wrote it: the layer is read again
        found[layer.diff_id] = layer
    return found


def check(image: Image, tool: Buildah, built: builder.Built, labels: Sequence[str]) -> None:
    """Hold an image that was just built against the rules; ``labels`` are its layers' names.

    Raises:
        Problem: it breaks one; the image stays, so that it can be looked at.
    """
    seen = remembered() | known()
    if all(diff_id in seen for diff_id in built.diff_ids[:-1]):
        found = [seen[diff_id] for diff_id in built.diff_ids if diff_id in seen]
        broken = over(image, found)
    else:
        host.say(f"{image.reference} has new layers: what do they hold, and what do they weigh?")
        measured = layers.measure(tool, built.id, labels, seen)
        broken = [*measured.broken, *over(image, measured.layers)]
        if not broken:
            for layer in measured.layers:
                file = _checked() / f"{layer.diff_id.removeprefix('sha256:')}.json"
                host.write(file, json.dumps(layers.plain(layer)) + "\n")
    if broken:
        where = shown(image.path)
        raise Problem(f"{image.reference} breaks its rules ({where}): {'; '.join(broken)}")


def known() -> dict[str, Layer]:
    """Every recorded layer of the catalog, by ``diff_id``: shared ones are there once."""
    records = [layers.read(image) for image in catalog.load()]
    return {layer.diff_id: layer for record in records if record for layer in record.layers}

"""The keys of a catalog file and the fragments, for who adds an image."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from images import catalog
from images.catalog import Image, Key, shown
from images.telling import markdown

TYPES = {
    str: "string",
    list: "list",
    dict: "table",
    bool: "true or false",
    int: "number",
    datetime.date: "date",
}


def _rows(keys: Mapping[str, Key], prefix: str = "") -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, key in keys.items():
        needed = "yes" if key.required else "no"
        found.append((f"`{prefix}{name}`", TYPES[key.kind], needed, key.what))
        found += _rows(catalog.TABLE_KEYS.get(name, {}) if not prefix else {}, f"{name}.")
    return found


def table() -> str:
    """Every key with its type, whether a file must have it, and what it says."""
    return markdown.table(("key", "type", "needed", "what it says"), _rows(catalog.KEYS))


def fragments(images: Sequence[Image]) -> str:
    """The fragments, what each is for, and which images take it."""
    rows = []
    for path in sorted((catalog.CATALOG / catalog.FRAGMENTS).glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
        sentence = " ".join(line.lstrip("# ") for line in first.splitlines()).partition(". ")[0]
        who = ", ".join(image.tag for image in images if path in image.fragments)
        rows.append((f"[{path.stem}]({shown(path)})", sentence.rstrip("."), who))
    return markdown.table(("fragment", "what it is for", "taken by"), rows)

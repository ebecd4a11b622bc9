"""The keys of a catalog file and the fragments, for who adds an image."""

from __future__ import annotations

from collections.abc import Sequence

from images import catalog, schema
from images.catalog import Image, shown
from images.telling import markdown


def table() -> str:
    """Every key with its type, whether a file must have it, and what it says."""
    rows = []
    for name, key in schema.KEYS.items():
        kind, needed = schema.kind(key.type).removeprefix("a "), "yes" if key.required else "no"
        rows.append((f"`{name}`", kind, needed, str(key.about.description)))
    return markdown.table(("key", "type", "needed", "what it says"), rows)


def fragments(images: Sequence[Image]) -> str:
    """The fragments, what each is for, and which images take it."""
    rows = []
    for path in sorted((catalog.CATALOG / catalog.FRAGMENTS).glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
        sentence = " ".join(line.lstrip("# ") for line in first.splitlines()).partition(". ")[0]
        users = [catalog.short(i, images) for i in images if path in i.fragments]
        rows.append((f"[{path.stem}]({shown(path)})", sentence.rstrip("."), ", ".join(users)))
    return markdown.table(("fragment", "what it is for", "taken by"), rows)

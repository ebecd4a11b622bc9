"""The keys of a catalog file and the fragments, for who adds an image."""

from __future__ import annotations

from collections.abc import Sequence

from images import catalog, schema
from images.catalog import Image, shown


def table() -> str:
    """Every key with its type, whether a file must have it, and what it says."""
    lines = ["| key | type | needed | what it says |", "| --- | --- | --- | --- |"]
    for name, key in schema.KEYS.items():
        kind, needed = schema.kind(key.type).removeprefix("a "), "yes" if key.required else "no"
        lines.append(f"| `{name}` | {kind} | {needed} | {key.about.description} |")
    return "\n".join(lines)


def fragments(images: Sequence[Image]) -> str:
    """The fragments, what each is for, and which images take it."""
    lines = ["| fragment | what it is for | taken by |", "| --- | --- | --- |"]
    for path in sorted((catalog.CATALOG / catalog.FRAGMENTS).glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
        sentence = " ".join(line.lstrip("# ") for line in first.splitlines()).partition(". ")[0]
        who = ", ".join(image.tag for image in images if path in image.fragments)
        lines.append(f"| [{path.stem}]({shown(path)}) | {sentence.rstrip('.')} | {who} |")
    return "\n".join(lines)

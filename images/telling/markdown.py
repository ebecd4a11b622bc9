"""Tables as Markdown has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line for each row; a head may have empty cells."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in (["---"] * len(head), *rows)]
    return "\n".join(lines)

"""What a refit is played with where its adapter is not to see torch, and what was written of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Tensor:
    """A tensor, as far as what counts a refit looks at it."""

    value: int

    def numel(self) -> int:
        return 5

    def element_size(self) -> int:
        return 2

    def detach(self) -> Tensor:
        return self

    def clone(self) -> Tensor:
        return Tensor(self.value)


def written(folder: Path) -> list[dict[str, Any]]:
    """A line for each refit."""
    return [json.loads(line) for line in (folder / "refits.jsonl").read_text().splitlines()]

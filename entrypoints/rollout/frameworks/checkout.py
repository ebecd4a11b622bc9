"""A framework that is on no index: users bring its code as a checkout, and the image has the rest.

How it is started is not known here: no image promises the check ``training`` for it. ``rollout
verify`` imports what its code imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class Checkout:
    """Such a framework, as far as an image has it."""

    needed: ClassVar[tuple[str, ...]]  # modules from outside of it that its own import

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        self.engine, self.checkout = engine, checkout

    def modules(self) -> list[str]:
        """The modules that its own import, to be imported where there is no GPU."""
        return list(self.needed)

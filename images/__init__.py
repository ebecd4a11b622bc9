"""The line: catalog file, lock, image, proof, registry. One module for each station."""

import sys
from pathlib import Path

# The contracts that both sides share (report, faults) live in the package that every image carries.
sys.path.append(str(Path(__file__).resolve().parent.parent / "entrypoints"))

"""The line: catalog file, lock, image, proof, registry. One module for each station."""

import sys
from pathlib import Path

# The contracts that both sides share (report, faults) live in the package that every image carries.
# Before everything else: another distribution called rollout would answer in its place.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "entrypoints"))

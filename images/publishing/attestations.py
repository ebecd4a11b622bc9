"""What travels with a published image: smoke report, list of contents (SBOM), provenance.

The same image, commit and key give the same bytes: nothing holds the moment of a run, and
signatures are deterministic (RFC 6979). So publishing again finds its attestations there already.

The forms are other people's, so that other people's tools read them: CycloneDX 1.6 (sbom.py),
in-toto Statement v1 with SLSA provenance v1 (provenance.py) in a DSSE envelope, and cosign's simple
signing (both in signatures.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

# Artifact types, which are the media types of what is attached: except for a signed provenance,
# which is a statement in an envelope.
REPORT = "application/vnd.verl-rollout.report.v1+json"
SBOM = "application/vnd.cyclonedx+json"
STATEMENT = "application/vnd.in-toto+json"
ENVELOPE = "application/vnd.dsse.envelope.v1+json"


@dataclass(frozen=True)
class Attestation:
    """One thing that is attached to an image: a file name, what it is, and its bytes."""

    name: str
    artifact_type: str
    media_type: str
    data: bytes

    @cached_property
    def sha256(self) -> str:
        """In hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def encoded(document: object) -> bytes:
    """A document as JSON, the same bytes every time."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

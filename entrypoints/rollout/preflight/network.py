"""What a job of many nodes, or one without a network, needs of the network."""

from __future__ import annotations

from collections.abc import Iterator

from rollout.preflight.finding import Finding, Host


def look(host: Host) -> Iterator[Finding]:  # noqa: ARG001 - asked as every kind is
    """Every finding of this kind, most fundamental first."""
    yield from ()

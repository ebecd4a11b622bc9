"""What is known of the caches before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.preflight import cache
from rollout.preflight.finding import Host
from tests.unit import hosts
from tests.unit.hosts import sentences


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return hosts.tree(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(machine, {"XDG_CACHE_HOME": "/cache"}, None)
    assert list(cache.look(host)) == []
    monkeypatch.setattr(cache.os, "access", lambda *_: False)  # root may write everywhere
    way_out = "mount a writable folder there, or run with group 0"
    assert sentences(cache.look(host)) == [f"/cache cannot be written; {way_out}"]
    assert sentences(cache.look(Host(machine, {}, None))) == [
        f"/var/cache/rollout cannot be written; {way_out}"
    ]

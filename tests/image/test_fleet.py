"""`rollout fleet` on three real Ray nodes of one image, on this machine's loopback.

No GPU is needed: `fleet verify` is proved, and `fleet smoke` says on each node what is missing. An
image with Ray that is not built here, or was built before it had this command, is skipped with the
command that builds it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from .ray_nodes import RAYS, Node, head, join

pytestmark = pytest.mark.image

REFERENCE = "verl-rollout:vllm-0.12"
assert REFERENCE in RAYS

Fleet = tuple[list[Node], str]


@pytest.fixture
def fleet(node: Callable[[str], Node]) -> Fleet:
    """Three nodes of one image in one cluster, the head first, and its address."""
    made = [node(REFERENCE) for _ in range(3)]
    if not list(made[0].root.glob("opt/rollout/lib/python3*/site-packages/rollout/fleet.py")):
        pytest.skip(f"this {REFERENCE} has no fleet yet: nox -s build -- {REFERENCE}")
    address = head(made[0])
    for one in made[1:]:
        assert join(one, address), one.said
    return made, address


def asked(one: Node, address: str, *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON file and output of a fleet that is asked beside this node."""
    file = "/tmp/fleet.json"
    done = one.drive("rollout", "fleet", *argv, "--address", address, "--report", file)
    said = done.stdout + done.stderr
    written = one.folder / "fleet.json"
    assert written.exists(), said
    data: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return done.returncode, data, said


def test_three_nodes_of_one_image_are_proved_each_by_its_own_report(fleet: Fleet) -> None:
    made, address = fleet
    code, data, said = asked(made[0], address, "verify", "--nodes", "3")
    assert code == 0, said
    assert [one["verdict"] for one in data["nodes"]] == ["proved"] * 3
    assert [one["report"]["image"] for one in data["nodes"]] == [REFERENCE] * 3
    assert [one["differs"] for one in data["nodes"]] == [[]] * 3
    assert len({one["id"] for one in data["nodes"]}) == 3
    assert data["nodes"][0]["head"]


def test_without_gpus_every_node_says_that_nothing_can_be_proved_there(fleet: Fleet) -> None:
    made, address = fleet
    code, data, said = asked(made[1], address, "smoke", "--nodes", "3")
    assert code == 3, said
    assert [one["verdict"] for one in data["nodes"]] == ["unproved"] * 3
    assert all("GPU" in one["reason"] for one in data["nodes"]), said


def test_a_node_that_dies_in_the_middle_is_named_and_never_proved(fleet: Fleet) -> None:
    made, address = fleet
    timer = threading.Timer(8.0, made[2].stop)  # verify takes longer, reading gigabytes
    timer.start()
    code, data, said = asked(made[0], address, "verify", "--nodes", "3")
    timer.join()
    assert code == 1, said
    assert sorted(one["verdict"] for one in data["nodes"]) == ["died", "proved", "proved"]


def test_a_node_that_does_not_end_in_time_is_named_and_never_proved(fleet: Fleet) -> None:
    made, address = fleet
    code, data, said = asked(made[0], address, "verify", "--nodes", "3", "--timeout", "1")
    assert code == 1, said
    assert [one["verdict"] for one in data["nodes"]] == ["hung"] * 3

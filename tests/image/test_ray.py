"""Ray nodes of these images form one cluster: two of one image, two of two images.

They are real nodes (ray_nodes.py). The default image has no Ray; one that is not built here is
skipped with the command that builds it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest

from images.locking import base

from .ray_nodes import RAYS, Node, head, join

pytestmark = pytest.mark.image

LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
# What Python says of itself, changed before Ray asks: it is the next patch release then.
ANOTHER_PYTHON = """\
import collections, sys
v = sys.version_info
kind = collections.namedtuple("version_info", "major minor micro releaselevel serial")
sys.version_info = kind(v.major, v.minor, v.micro + 1, v.releaselevel, v.serial)
"""
# Asked on the head: the nodes that are there, and what a task on each of them sees.
DRIVER = """\
import json, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def seen():
    return ".".join(map(str, sys.version_info[:3]))

alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
found = [ray.get(seen.options(scheduling_strategy=On(node, soft=False)).remote()) for node in alive]
print("SEEN " + json.dumps(sorted(found)))
"""


def reads_the_level(version: str) -> bool:
    """Whether a Ray takes the level from the variable; the one before 2.51 has it fixed."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (2, 51)


def seen(one: Node, address: str) -> list[str]:
    """A driver beside this node asks every node of the cluster for its Python."""
    done = one.drive("rollout", "python3", "-c", DRIVER, address)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN "))
    found: list[str] = json.loads(line.removeprefix("SEEN "))
    return found


def another_python(one: Node) -> dict[str, str]:
    """Variables with which a node's Python is the next patch release."""
    folder = one.folder / "another-python"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ANOTHER_PYTHON, encoding="utf-8")
    return {"PYTHONPATH": "/tmp/another-python"}


@pytest.mark.parametrize("reference", RAYS)
def test_two_nodes_of_one_image_are_one_cluster(
    node: Callable[[str], Node], reference: str
) -> None:
    first, second = node(reference), node(reference)
    address = head(first)
    assert join(second, address)
    assert seen(first, address) == [base.python("3.11")] * 2


@pytest.mark.parametrize("reference", RAYS)
def test_another_patch_release_of_python_joins_where_the_image_says_so(
    node: Callable[[str], Node], reference: str
) -> None:
    """Control: without the variable Ray turns the same node away."""
    first, strict, second = node(reference), node(reference), node(reference)
    address = head(first)
    assert not join(strict, address, **another_python(strict), **{LEVEL: "patch"})
    assert "Version mismatch" in strict.said, strict.said
    joined = join(second, address, **another_python(second))
    assert joined == (second.env.get(LEVEL) == "minor") == reads_the_level(RAYS[reference])
    if joined:
        assert len(set(seen(first, address))) == 2


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(RAYS, 2)])
def test_nodes_of_two_images_are_one_cluster_where_their_ray_is_the_same(
    node: Callable[[str], Node], one: str, other: str
) -> None:
    # Another Ray ends in many ways, not always in a word about versions: no node is what counts.
    first, second = node(one), node(other)
    address = head(first)
    assert join(second, address) == (RAYS[one] == RAYS[other])
    assert len(seen(first, address)) == 1 + (RAYS[one] == RAYS[other])

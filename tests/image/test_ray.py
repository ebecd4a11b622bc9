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
# As the Python of a TensorRT-LLM image starts; but for Ray's workers alone, so that what starts
# them still has what a launcher left.
ALONE = """\
import os, sys
if any("default_worker" in word for word in sys.orig_argv):
    import rollout_startup
    rollout_startup.alone(os.environ)
"""
LEFT_BY_LAUNCHERS = {
    "SLURM_JOB_ID": "7",
    "MPI_LOCALRANKID": "0",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "TORCH_CUDA_ARCH_LIST": "8.0",
}
# What a worker has of them, what the process has that started it, and an actor that is given more.
OF_WORKERS = """\
import json, os, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False)
names = json.loads(sys.argv[2])

@ray.remote(num_cpus=0)
class Worker:
    def seen(self):
        with open(f"/proc/{os.getppid()}/environ") as parent:
            above = dict(line.partition("=")[::2] for line in parent.read().split("\\0"))
        return [[name for name in names if name in found] for found in (os.environ, above)]

given = {"env_vars": {"PMIX_RANK": "9", "KEPT": "1"}}
workers = [Worker.remote(), Worker.options(runtime_env=given).remote()]
print("SEEN " + json.dumps(ray.get([worker.seen.remote() for worker in workers])))
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


WITH_WORKERS = "verl-rollout:vllm-0.12"  # any image with Ray: the tests build this one


def test_workers_have_nothing_of_a_launcher_though_what_starts_them_has(
    node: Callable[[str], Node],
) -> None:
    one = node(WITH_WORKERS)
    folder = one.folder / "alone"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ALONE, encoding="utf-8")
    one.env |= {"PYTHONPATH": "/tmp/alone", **LEFT_BY_LAUNCHERS}
    address = head(one)
    names = json.dumps([*LEFT_BY_LAUNCHERS, "KEPT"])
    done = one.drive("rollout", "python3", "-c", OF_WORKERS, address, names)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN "))
    plain, given = json.loads(line.removeprefix("SEEN "))
    assert plain == [[], list(LEFT_BY_LAUNCHERS)]
    assert given == [["KEPT"], list(LEFT_BY_LAUNCHERS)]

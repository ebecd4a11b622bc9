"""A lease: images in parts, put together on a machine that has nothing, and their proofs there."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from images import catalog
from images.building import layers
from images.building.contents import Summary
from images.building.layers import Layer, Record
from images.catalog import Image
from images.proving import checkouts, lease, leased, parcels
from images.proving.checkouts import Checkout
from rollout import smoke
from rollout.faults import FAULTS
from rollout.problem import Problem

from ..conftest import sha256

needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is not installed")
IMAGES = [image for image in catalog.load() if "cuda" in image.expect and layers.read(image)]


# the plan

MB = 1_000_000


def record(*sizes: tuple[str, int]) -> Record:
    made = [
        Layer(name, sha256(name), 2 * size, size, Summary({}, "", "", "", ""))
        for name, size in sizes
    ]
    return Record("inputs", "buildah", tuple(made))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Record | None]], None]:
    """Gives images the layers of a test, and 100 seconds of proof each."""

    def give(records: Mapping[str, Record | None]) -> None:
        monkeypatch.setattr(layers, "read", lambda image: records[image.reference])
        monkeypatch.setattr(lease, "run_seconds", lambda *_: 100.0)

    return give


def planned(images: Sequence[Image], budget: float) -> list[list[tuple[str, int]]]:
    found = lease.plan(images, part=10 * MB, part_seconds=1, budget=budget, gpus=2)
    return [[(one.image.reference, one.bytes) for one in together] for together in found]


def test_a_layer_is_sent_once_in_a_lease_and_what_shares_most_comes_next(
    recorded: Callable[[Mapping[str, Record | None]], None],
) -> None:
    one, other, sibling = IMAGES[:3]
    base = ("base", 100 * MB)
    recorded(
        {
            one.reference: record(base, ("torch", 900 * MB)),
            other.reference: record(base, ("another torch", 900 * MB)),
            sibling.reference: record(base, ("torch", 900 * MB), ("engine", 50 * MB)),
        }
    )
    assert planned([one, other, sibling], budget=10_000) == [
        [
            (one.reference, 1000 * MB),
            (sibling.reference, 50 * MB),
            (other.reference, 900 * MB),
        ]
    ]


def test_what_does_not_fit_into_the_seconds_of_a_lease_begins_the_next_with_all_its_layers(
    recorded: Callable[[Mapping[str, Record | None]], None],
) -> None:
    one, other = IMAGES[:2]
    base = ("base", 100 * MB)
    recorded(
        {
            one.reference: record(base, ("torch", 900 * MB)),
            other.reference: record(base, ("another torch", 900 * MB)),
        }
    )
    # Each: 100 parts of a second, 20 s to unpack, 100 s to prove.
    assert planned([one, other], budget=230) == [
        [(one.reference, 1000 * MB)],
        [(other.reference, 1000 * MB)],
    ]


def test_an_image_of_unknown_size_is_refused_with_what_to_do(
    recorded: Callable[[Mapping[str, Record | None]], None],
) -> None:
    recorded({IMAGES[0].reference: None})
    with pytest.raises(Problem, match=r"no recorded layers.*nox -s build -- .* --record") as caught:
        planned(IMAGES[:1], budget=1)
    assert caught.value.code == 3


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_every_promise_and_every_fault_of_an_image_is_run(image: Image) -> None:
    jobs = {job["name"]: job for job in lease.jobs(image, 2)}
    promised = smoke.promised(image.smoke.facts)
    wide = "nccl" in image.smoke.refit or "tensor-parallel" in promised
    apart = ["smoke-disaggregated"] if "disaggregated" in promised and not wide else []
    assert [name for name in jobs if not name.startswith("fault-")] == [
        *("verify", "smoke", *apart, "warm")
    ]
    assert jobs["smoke"]["gpus"] == (2 if wide else 1)
    assert all(jobs[name]["gpus"] == 2 for name in apart)
    sought = [n for n in FAULTS if FAULTS[n].found_by(smoke.available(image.smoke.facts, 2))]
    assert [n for n in jobs if n.startswith("fault-")] == [f"fault-{name}" for name in sought]
    assert {job["ends"] for name, job in jobs.items() if name.startswith("fault-")} == {1}
    names = list(jobs)
    for job in jobs.values():  # nothing waits for what comes after it
        assert not job["after"] or names.index(job["after"]) < names.index(job["name"])


def test_a_smoke_test_that_is_to_be_repeated_is_so_many_jobs_before_the_faults() -> None:
    image = IMAGES[0]
    once, often = lease.jobs(image, 2), lease.jobs(image, 2, times=3)
    more = [job for job in often if job not in once]
    assert [job["name"] for job in more] == ["repeat-001", "repeat-002", "repeat-003"]
    assert len(once) == len(often) - 3
    smoked = next(job for job in once if job["name"] == "smoke")
    for one in more:
        assert (one["argv"], one["gpus"], one["shares"]) == (
            ["smoke"],
            smoked["gpus"],
            leased.WHOLE,
        )
        assert (one["after"], one["ends"]) == ("smoke", 0)
    order = [job["name"] for _, job in leased.ordered([("one", job) for job in often])]
    assert order.index("smoke") < order.index("warm") < order.index("repeat-001")
    faults = [place for place, name in enumerate(order) if name.startswith("fault-")]
    assert order.index("repeat-003") < min(faults)
    kept = lease.run_seconds(image, 2)
    assert lease.run_seconds(image, 2, times=2) > kept


# a framework that comes as a checkout

ROLL = next(image for image in IMAGES if image.reference == "roll-rollout:vllm-0.12")


def test_a_checkout_trains_once_and_with_each_fault_of_training() -> None:
    bare, brought = lease.jobs(ROLL, 2), lease.jobs(ROLL, 2, checkout=Checkout("roll", Path(), ""))
    more = {job["name"]: job for job in brought if job not in bare}
    sought = [name for name, fault in FAULTS.items() if fault.check == "training"]
    assert list(more) == ["smoke-training", *(f"fault-{name}" for name in sought)]
    assert sought
    for name, job in more.items():
        argv = ["--only", "training", "--framework", leased.CHECKOUT]
        assert job["argv"][-4:] == argv
        assert job["checkout"] == "checkouts/roll.tar.gz"
        assert job["ends"] == (3 if name == "smoke-training" else 1)
    assert not any(job["checkout"] for job in bare)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a framework with one commit."""
    root = tmp_path / "clone"
    (root / "roll").mkdir(parents=True)
    (root / "roll/one.py").write_text("one = 1\n")
    (root / "LICENSE").write_text("free\n")
    (root / "picture.png").write_bytes(b"large")
    for argv in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(root), *who, *argv], check=True)
    return root


def test_a_checkout_is_sent_with_its_code_and_the_commit_that_reports_name(
    clone: Path, tmp_path: Path
) -> None:
    one = checkouts.parse(f"roll={clone}")
    with tarfile.open(checkouts.write(one, tmp_path)) as tar:
        assert sorted(tar.getnames()) == [".git/HEAD", "LICENSE", "roll/one.py"]
        head = tar.extractfile(".git/HEAD")
        assert head and head.read().decode().strip() == one.commit
    assert len(one.commit) == 40
    assert [path.name for path in (tmp_path / "checkouts").iterdir()] == ["roll.tar.gz"]


def test_a_checkout_that_is_not_as_its_commit_is_refused(clone: Path, tmp_path: Path) -> None:
    (clone / "roll/one.py").write_text("one = 2\n")
    with pytest.raises(Problem, match=r"is not as its commit is: M roll/one.py; commit or undo"):
        checkouts.write(checkouts.parse(f"roll={clone}"), tmp_path)
    assert not (tmp_path / "checkouts").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("roll", "'roll' is no NAME=DIR of a framework and its clone"),
        ("roll=", "'roll=' is no NAME=DIR"),
        ("roll=/nowhere", "'roll=/nowhere' is no NAME=DIR"),
        ("roll={empty}", "is no clone, so nobody knows its commit; clone it"),
        ("verl={clone}", "none of these images trains verl from a checkout"),
        ("roll={clone}", "and roll-rollout:vllm-0.12 is for roll 8eb27cc2; check that commit out"),
    ],
    ids=["no folder", "empty", "nowhere", "no clone", "another framework", "another commit"],
)
def test_a_checkout_that_proves_nothing_is_refused(
    clone: Path, tmp_path: Path, given: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    text = given.format(clone=clone, empty=tmp_path / "empty")
    with pytest.raises(Problem, match=re.escape(said)) as caught:
        checkouts.chosen([checkouts.parse(text)], [ROLL])
    assert caught.value.code == 2


@needs_zstd
@pytest.mark.parametrize("fate", ["whole", "damaged", "lost"])
def test_a_job_has_its_checkout_or_is_named_and_the_others_run(
    machine: Machine, clone: Path, tmp_path: Path, fate: str
) -> None:
    file = checkouts.write(checkouts.parse(f"roll={clone}"), machine.packed)
    name = f"checkouts/{file.name}"
    trains = job("smoke-training", checkout=name)
    # The launcher of the test prints what it was asked for, and the file that it would show.
    shows = "*:/checkout:ro) cat ${word%%:*}/roll/one.py;;"
    run = f'echo "$*"; for word in $*; do case $word in {shows} esac; done'
    machine.add("one", tree(tmp_path / "one", {"a": "b"}), run=run, jobs=[trains, job("smoke")])
    plan = {"bundles": machine.bundles, "checkouts": {name: leased.sha256(file)}}
    (machine.packed / "plan.json").write_text(json.dumps(plan))
    if fate == "damaged":
        file.write_bytes(b"another")
    elif fate == "lost":
        file.unlink()
    machine.put()
    code = machine.run("conduct", "--gpus", "1").returncode
    assert "one: smoke exited with 0" in machine.log()
    if fate == "whole":
        assert code == 0
        assert "one = 1\n" in (machine.place.out / "one/smoke-training.log").read_text()
        return
    assert code == 1
    assert "smoke-training cannot run: " in machine.log()
    assert "is damaged, or was not sent" in machine.log()
    assert "done; not as it should: one: smoke-training\n" in machine.log()


@pytest.mark.parametrize("text", ["x", "-1", "1000", ""])
def test_so_many_repeats_no_lease_takes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of at most 999"):
        lease.often(text)
    assert lease.often("50") == 50


# parts


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """The files of an image, with a folder, a link and a mode of its own."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "bin").symlink_to("usr/bin")
    (root / "dev").mkdir()
    (root / "dev/null").write_text("the host's")
    return root


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Mode, and text or target, of everything below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        kind = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (
            mode,
            kind or (path.read_text() if path.is_file() else ""),
        )
    return found


class Machine:
    """A folder for what is packed, and one that stands for the machine."""

    def __init__(self, folder: Path) -> None:
        self.packed, self.place = folder / "packed", leased.Place(folder / "stash")
        self.packed.mkdir()
        self.place.root.mkdir()
        lease.tools(self.packed / "tools")
        shutil.copy(leased.__file__, self.packed / "leased.py")
        self.bundles: list[dict[str, Any]] = []
        self.sent: set[str] = set()

    def add(
        self,
        name: str,
        root: Path,
        *,
        run: str = "true",
        jobs: Sequence[dict[str, Any]] = (),
        have: Mapping[str, str] | None = None,
        part: int = 1000,
    ) -> list[str]:
        """Pack one image; returns the contents that its archive holds."""
        stream = io.BytesIO()
        own = {"run": f"#!/bin/sh\n{run}\n".encode(), "environment": f"NAME={name}\n".encode()}
        parcels.archive(stream, root, own, self.sent, have or {}, name)
        whole = self.packed / f"{name}.whole"
        argv = ["zstd", "-q", "--stdout"]
        done = subprocess.run(argv, input=stream.getvalue(), capture_output=True, check=True)
        whole.write_bytes(done.stdout)
        parts = parcels.split(whole, part)
        self.bundles.append({"name": name, "parts": parts, "jobs": list(jobs)})
        (self.packed / "plan.json").write_text(json.dumps({"bundles": self.bundles}))
        with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
            return tar.getnames()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What runs there, as it is run there: nothing of this repository can be imported."""
        argv = [sys.executable, "-I", str(self.packed / "leased.py")]
        return subprocess.run(
            [*argv, "--root", str(self.place.root), *arguments],
            cwd=self.packed,
            env={"PATH": os.environ["PATH"], "OUT": str(self.place.root)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def put(self) -> subprocess.CompletedProcess[str]:
        parts = [str(self.packed / name) for bundle in self.bundles for name in bundle["parts"]]
        return self.run("put", *parts)

    def log(self) -> str:
        return (self.place.root / "log").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if os.geteuid() != 0:
        pytest.skip("the files of an image are root's")
    return Machine(tmp_path)


def job(name: str, **other: Any) -> dict[str, Any]:
    made = {"name": name, "argv": [name], "gpus": 1, "shares": 1, "after": "", "ends": 0}
    made["checkout"] = ""
    return made | {"limit": 30, "rank": 0} | other


@needs_zstd
def test_an_image_that_arrives_in_parts_is_the_image(machine: Machine, tmp_path: Path) -> None:
    root = tree(tmp_path / "one", {"usr/bin/sh": "shell", "usr/lib/a": "same", "usr/lib/b": "same"})
    (root / "usr/bin/sh").chmod(0o755)
    machine.add("one", root, part=100)
    count = len(machine.bundles[0]["parts"])
    assert machine.put().stdout == f"one: 0 of {count} parts are missing\n"
    assert machine.run("conduct", "--gpus", "0").returncode == 0
    (root / "dev/null").unlink()  # /dev is the host's
    assert contents(machine.place.images / "one/rootfs") == contents(root)
    assert not list(machine.place.parts.iterdir())  # room for the next


@needs_zstd
def test_what_an_earlier_image_has_is_not_sent_again(machine: Machine, tmp_path: Path) -> None:
    one = tree(tmp_path / "one", {"usr/lib/torch": "torch", "usr/lib/vllm": "0.12"})
    other = tree(tmp_path / "other", {"usr/lib/torch": "torch", "usr/lib/vllm": "0.24"})
    first, second = machine.add("one", one), machine.add("other", other)
    torch = sha256("torch").removeprefix("sha256:")
    assert any(torch in name for name in first)
    assert not any(torch in name for name in second)
    machine.put()
    assert machine.run("conduct", "--gpus", "0").returncode == 0
    (other / "dev/null").unlink()
    assert contents(machine.place.images / "other/rootfs") == contents(other)


@needs_zstd
def test_what_the_machine_has_is_not_sent_and_is_taken_there_if_it_is_still_that(
    machine: Machine, tmp_path: Path
) -> None:
    text = "torch" * 20_000
    there = tmp_path / "there/libtorch.so"
    there.parent.mkdir()
    there.write_text(text)
    root = tree(tmp_path / "one", {"usr/lib/torch": text})
    assert machine.run("have", str(there.parent)).returncode == 0
    have = parcels.read_have(machine.place.root / "have.txt")
    assert list(have.values()) == [str(there)]
    names = machine.add("one", root, have=have)
    assert not any(next(iter(have)) in name for name in names)
    machine.put()
    assert machine.run("conduct", "--gpus", "0").returncode == 0
    (root / "dev/null").unlink()
    assert contents(machine.place.images / "one/rootfs") == contents(root)
    machine.add("again", root, have=have, jobs=[job("verify")])
    shutil.rmtree(machine.place.root)
    machine.place.root.mkdir()
    there.write_text("another")
    machine.put()
    assert machine.run("conduct", "--gpus", "0").returncode == 1
    assert f"{there} of this machine is another file than it said" in machine.log()


@needs_zstd
def test_a_damaged_part_is_refused_and_named(machine: Machine, tmp_path: Path) -> None:
    machine.add("one", tree(tmp_path / "one", {"a": "b"}), part=100)
    first = machine.packed / next(iter(machine.bundles[0]["parts"]))
    first.write_bytes(b"x" + first.read_bytes()[1:])
    done = machine.put()
    assert done.returncode == 1
    assert f"{first.name} is damaged, or no part of this lease; send it again\n" in done.stdout
    assert "one: 1 of " in done.stdout


@pytest.mark.parametrize("text", ["", "0" * 64 + "  relative\n", "no sum  /a\n"])
def test_a_list_of_another_kind_is_no_list_of_what_a_machine_has(tmp_path: Path, text: str) -> None:
    path = tmp_path / "have.txt"
    path.write_text(text)
    if not text:
        assert parcels.read_have(path) == {}
        return
    with pytest.raises(Problem, match="line 1 is no sha256 and path; make it anew") as caught:
        parcels.read_have(path)
    assert caught.value.code == 2


# what runs there


@pytest.mark.parametrize(
    ("free", "gpus", "shares", "held"),
    [
        ([4, 4], 2, 4, [0, 1]),
        ([4, 3], 2, 4, None),
        ([4, 3], 1, 4, [0]),
        ([4, 3], 1, 1, [1]),  # the one that is in use already: the other stays whole
        ([0, 0], 1, 1, None),
        ([0, 0], 0, 0, []),
    ],
)
def test_a_job_gets_the_gpus_that_have_room(
    free: list[int], gpus: int, shares: int, held: list[int] | None
) -> None:
    assert leased.fits(free, gpus, shares) == held


def test_what_needs_all_gpus_is_not_overtaken_and_small_ones_fill_what_is_left() -> None:
    small, wide, more = job("a"), job("b", gpus=2, shares=4), job("c")
    jobs = [("one", small), ("one", wide), ("one", more)]
    assert leased.chosen(jobs, [4, 4]) == [(("one", small), [0])]
    assert leased.chosen(jobs[1:], [4, 4]) == [(("one", wide), [0, 1])]
    alone, without = job("d", shares=4), job("verify", gpus=0, shares=0)
    waiting = [("one", alone), ("two", alone), ("one", small), ("two", without)]
    given = leased.chosen(waiting, [4, 2])
    assert given == [(("one", alone), [0]), (("two", without), [])]


def test_jobs_that_share_a_gpu_begin_together_on_one_that_nobody_is_on() -> None:
    jobs = [("one", job(name)) for name in "abcde"]
    assert leased.chosen(jobs, [3, 0]) == []
    assert [held for _, held in leased.chosen(jobs, [4, 1])] == [[0], [0], [0], [0]]
    assert [held for _, held in leased.chosen(jobs, [4, 4])] == [[0], [0], [0], [0], [1]]


def test_a_fault_that_is_found_after_a_sleep_has_a_gpu_alone() -> None:
    assert lease.shares("refit") == lease.shares("partial-rollout") == 1
    assert lease.shares("sleep-1") == lease.shares("server") == leased.WHOLE
    assert lease.shares("training") < leased.WHOLE


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_for_a_fault_of_a_check_with_an_engine_of_its_own_no_other_check_runs(image: Image) -> None:
    for one in lease.jobs(image, 2):
        if one["name"].startswith("fault-"):
            check = lease.looked_for_by(one["argv"][2], image.smoke.facts, 2)
            assert one["argv"][3:] == (["--only", check] if check in smoke.ALONE else [])


def test_proofs_of_all_images_come_before_the_faults_of_any() -> None:
    fault, smoke, warm = job("fault-a", rank=2), job("smoke"), job("warm", rank=1)
    wide = job("smoke-wide", gpus=2)
    given = leased.ordered([("one", fault), ("one", warm), ("one", smoke), ("two", wide)])
    assert given == [("two", wide), ("one", smoke), ("one", warm), ("one", fault)]


@needs_zstd
def test_jobs_end_as_they_should_or_are_named(machine: Machine, tmp_path: Path) -> None:
    run = 'case "$*" in *fault-found*) exit 1;; *fault*) exit 0;; esac; echo said'
    jobs = [job("smoke"), job("fault-found", ends=1), job("fault-unfound", ends=1, after="smoke")]
    machine.add("one", tree(tmp_path / "one", {"a": "b"}), run=run, jobs=jobs)
    machine.put()
    assert machine.run("conduct", "--gpus", "2").returncode == 1
    log = machine.log()
    assert "done; not as it should: one: fault-unfound\n" in log
    assert log.index("one: smoke exited with 0") < log.index("one: fault-unfound begins")
    assert machine.run("collect", "0").returncode == 0
    with tarfile.open(machine.place.root / "reports.tar.gz") as tar:
        names = tar.getnames()
    ran = ("fault-found", "fault-unfound", "smoke")
    assert sorted(names) == [
        "log",
        *(f"out/one/{name}.{kind}" for name in ran for kind in ("end", "log")),
    ]
    assert (machine.place.out / "one/smoke.log").read_text() == "said\n"
    end = json.loads((machine.place.out / "one/fault-found.end").read_text())
    assert end["exit"] == 1
    assert datetime.fromisoformat(end["started"]).tzinfo is not None


@needs_zstd
def test_a_job_that_hangs_is_stopped_and_the_others_run(machine: Machine, tmp_path: Path) -> None:
    jobs = [job("smoke", limit=1), job("fault-a")]
    run = 'case "$*" in *smoke*) sleep 50;; esac'
    machine.add("one", tree(tmp_path / "one", {"a": "b"}), run=run, jobs=jobs)
    machine.put()
    assert machine.run("conduct", "--gpus", "1").returncode == 1
    assert "one: smoke had its 1 s and was stopped" in machine.log()
    assert "one: fault-a exited with 0" in machine.log()


@needs_zstd
def test_an_image_that_cannot_be_put_together_keeps_no_other_from_running(
    machine: Machine, tmp_path: Path
) -> None:
    machine.add("one", tree(tmp_path / "one", {"a": "b"}), jobs=[job("verify")])
    apart = tree(tmp_path / "other", {"a": "c"})
    machine.add("other", apart, run="exit 0", jobs=[job("verify")])
    machine.add("sibling", tree(tmp_path / "sibling", {"a": "b"}), jobs=[job("verify")])
    (name,) = machine.bundles[0]["parts"]
    machine.put()
    (machine.place.parts / name).write_bytes(b"no archive")
    assert machine.run("conduct", "--gpus", "1").returncode == 1
    assert "one cannot be put together: RuntimeError: zstd and tar exited with" in machine.log()
    assert "other: verify exited with 0" in machine.log()
    assert "a came with an image before it, which failed" in machine.log()
    assert "done; not as it should: one: verify, sibling: verify\n" in machine.log()


def test_reports_come_back_while_jobs_still_run(tmp_path: Path) -> None:
    place = leased.Place(tmp_path)
    (place.out / "one").mkdir(parents=True)
    (place.out / "one/verify.json").write_text("{}")
    (place.out / "one/smoke.log").write_bytes(b"x" * (leased.TAIL + 1))
    assert leased.collect(place, 0, tmp_path) == 0
    with tarfile.open(tmp_path / "reports.tar.gz") as tar:
        sizes = {member.name: member.size for member in tar}
    assert sizes == {"out/one/verify.json": 2, "out/one/smoke.tail": leased.TAIL}

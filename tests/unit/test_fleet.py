"""``rollout fleet``: no node is counted as proved but by its own report; Ray is played here.

The real one, with three nodes on this machine, is in tests/image/test_fleet.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import cli, errand, fleet, nodes
from rollout.nodes import Answer, Node

INFO = {
    "reference": "verl-rollout:vllm-0.12",
    "lock_sha256": "a" * 64,
    "python": "3.11.2",
    "ray": "2.53.0",
    "program": {"start": "1"},
}
REPORT = {"verdict": "proved", "checks": [{"name": "start", "status": "passed"}], "skipped": {}}


def brought(**changes: Any) -> dict[str, Any]:
    """What an errand brings from a node on which all is well, with changes."""
    found = {"info": INFO, "layers": "", "code": 0, "report": json.dumps(REPORT), "said": "done\n"}
    return {**found, "seconds": 1.5, **changes}


def node(number: int, *, head: bool = False, gpus: float = 0) -> Node:
    return Node(f"{number}" * 56, f"10.0.0.{number}", f"host{number}", head, gpus)


HEAD = node(1, head=True)


def reported(verdict: str, **changes: Any) -> str:
    return json.dumps(REPORT | {"verdict": verdict} | changes)


FAILED = [{"name": "refit", "status": "failed", "reason": "a tensor is lost\nmore"}]


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        (brought(), "proved", None),
        (
            brought(report=reported("in-part", skipped={"nccl": "one GPU"})),
            "in-part",
            "not shown here: nccl",
        ),
        (
            brought(code=1, report=reported("failed", checks=FAILED)),
            "failed",
            "refit: a tensor is lost",
        ),
        (
            brought(code=3, report=reported("unproved")),
            "unproved",
            "only some of its checks were asked for",
        ),
        (brought(code=3, report=None, said="x\nrollout: no GPU here\n"), "unproved", "no GPU here"),
        (brought(code=2, report=None, said="rollout: no model\n"), "refused", "no model"),
        (
            brought(code=None, report=None, said="compiling\n"),
            "hung",
            "no end in 60 s; its last line: compiling",
        ),
        # It wrote its report and then did not end: the GPU is not free.
        (brought(code=None), "hung", "no end in 60 s; its last line: done"),
        (
            brought(code=-9, report=None, said=""),
            "failed",
            "signal 9 ended it and left no report; its last line: it printed nothing",
        ),
        (
            brought(code=0, report=None),
            "failed",
            "it ended with 0 and left no report; its last line: done",
        ),
        (
            brought(report=reported("failed")),
            "failed",
            "its report says 'failed', and its exit code is 0",
        ),
        (
            brought(code=1),
            "failed",
            "its report says 'proved', and its exit code is 1",
        ),
        (brought(report="{"), "failed", "its report is not JSON"),
    ],
)
def test_a_node_is_worth_what_its_report_and_its_exit_code_say_alike(
    found: dict[str, Any], verdict: str, reason: str | None
) -> None:
    answer = nodes.judged(HEAD, found, 60)
    assert answer.verdict == verdict
    assert answer.reason == reason or (reason and str(answer.reason).startswith(reason))


def answer(number: int, verdict: str = "proved", **changes: Any) -> Answer:
    identity = nodes.identity(brought(info=INFO | changes)) if changes.get("known", True) else {}
    return Answer(node(number, head=number == 1), verdict, None, 1.0, identity)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "verl-rollout:vllm-0.24"}, "image verl-rollout:vllm-0.24 instead of verl"),
        ({"lock_sha256": "b" * 64}, "lock bbbbbbbbbbbb instead of aaaaaaaaaaaa"),
        ({"python": "3.11.9"}, "Python 3.11.9 instead of 3.11.2"),
        ({"ray": "2.55.1"}, "Ray 2.55.1 instead of 2.53.0"),
        ({"program": {"start": "2"}}, "checks of other digests"),
    ],
)
def test_a_node_that_is_not_what_the_head_is_is_named_and_fails_the_fleet(
    change: Mapping[str, Any], said: str
) -> None:
    answers = [answer(1), answer(2, **change), answer(3)]
    assert list(nodes.differences(answers)) == [answers[1].node.id]
    assert nodes.differences(answers)[answers[1].node.id][0].startswith(said)
    assert nodes.verdict(answers) == "failed"
    lines = fleet.ending(answers, 2.0)
    assert lines[0].startswith("10.0.0.2 222222 is not what 10.0.0.1 111111 (head) is: ")
    assert lines[-1] == "fleet: failed (3 proved; 1 of another image) in 2.0 s"


def test_other_layers_are_another_image() -> None:
    found = brought(layers=f"sha256:{'c' * 64},sha256:{'d' * 64}")
    answers = [answer(1), Answer(node(2), "proved", None, 1.0, nodes.identity(found))]
    assert nodes.differences(answers) == {node(2).id: ["layers dddddddddddd instead of unknown"]}


@pytest.mark.parametrize(
    ("verdicts", "whole", "code"),
    [
        (["proved", "proved"], "proved", 0),
        (["proved", "in-part"], "in-part", 0),
        (["proved", "unproved"], "unproved", 3),
        (["proved", "refused"], "unproved", 3),
        (["unproved", "failed"], "failed", 1),
        (["proved", "hung"], "failed", 1),
        (["proved", "died"], "failed", 1),
        (["not-asked", "proved"], "proved", 0),
        (["not-asked"], "unproved", 3),
        ([], "unproved", 3),
    ],
)
def test_a_fleet_is_proved_by_every_node_that_was_asked(
    verdicts: list[str], whole: str, code: int
) -> None:
    answers = [answer(index, word) for index, word in enumerate(verdicts, 1)]
    assert nodes.verdict(answers) == whole
    assert cli.report.exit_code(whole) == code


def test_a_node_that_did_not_tell_what_it_is_proves_nothing() -> None:
    assert nodes.verdict([answer(1), answer(2, known=False)]) == "unproved"


# With a played Ray


class RayError(Exception):
    """As ray.exceptions has it."""


class RayTaskError(RayError):
    """What Python raised in a task."""


class Played(ModuleType):
    """A cluster: ``outcome`` says of a node what its task brings, raises, or (None) never does."""

    def __init__(self, listed: list[Node], outcome: Callable[[Node], Any], held: float = 0) -> None:
        super().__init__("ray")
        self.listed, self.outcome, self.held = listed, outcome, held
        self.sent: list[tuple[str, Any, Any]] = []
        self.cancelled: list[Any] = []
        self.lost: set[str] = set()
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.cloudpickle = SimpleNamespace(register_pickle_by_value=lambda _: None)
        self.connected: list[str] = []

    def init(self, address: str, **_: Any) -> None:
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance. Please …")
        self.connected.append(address)

    def shutdown(self) -> None:
        self.connected.pop()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": one.id,
                "NodeManagerAddress": one.address,
                "NodeManagerHostname": one.name,
                "Alive": one.id not in self.lost,
                "Resources": {nodes.HEAD: 1.0} if one.head else {"GPU": one.gpus},
            }
            for one in self.listed
        ]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": sum(one.gpus for one in self.listed)}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": self.cluster_resources()["GPU"] - self.held}

    def remote(self, **how: Any) -> Any:
        def task(function: Any) -> Any:
            assert function is errand.run

            def start(*arguments: Any) -> str:
                self.sent.append((how["scheduling_strategy"].node_id, how, arguments))
                return str(how["scheduling_strategy"].node_id)

            return SimpleNamespace(remote=start)

        return task

    def _of(self, reference: str) -> Any:
        return self.outcome(next(one for one in self.listed if one.id == reference))

    def wait(self, references: list[str], **_: Any) -> tuple[list[str], list[str]]:
        done = [one for one in references if self._of(one) is not None][:1]
        return done, [one for one in references if one not in done]

    def get(self, reference: str) -> Any:
        found = self._of(reference)
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self, reference: str, *, force: bool) -> None:
        assert force
        self.cancelled.append(reference)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Played]:
    """Makes a Ray that ``import ray`` gives."""

    def make(*listed: Node, outcome: Callable[[Node], Any], held: float = 0) -> Played:
        ray = Played(list(listed), outcome, held)
        strategies = ModuleType("ray.util.scheduling_strategies")

        def bound(node_id: str, *, soft: bool) -> SimpleNamespace:
            assert not soft, "the task would run on another node"
            return SimpleNamespace(node_id=node_id)

        strategies.NodeAffinitySchedulingStrategy = bound  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
        return ray

    monkeypatch.setattr(fleet, "_reachable", lambda _: None)
    monkeypatch.setattr(fleet, "SETTLED", -1.0)
    return make


TWO = fleet.Options("verify", address="10.0.0.1:6379", timeout=60)


def test_every_node_is_asked_once_and_its_whole_report_is_kept(
    play: Callable[..., Played], tmp_path: Path
) -> None:
    ray = play(node(2), HEAD, outcome=lambda _: brought())
    said: list[str] = []
    options = fleet.Options("smoke", ("--only", "refit"), "10.0.0.1:6379", 60)
    assert fleet.run(options, said.append, tmp_path / "fleet.json") == 0
    assert sorted(where for where, _, _ in ray.sent) == [HEAD.id, node(2).id]
    assert {arguments[1] for _, _, arguments in ray.sent} == {60.0}
    assert ray.sent[0][2][0] == ["smoke", "--only", "refit"]
    assert {how["max_retries"] for _, how, _ in ray.sent} == {0}
    assert said[-1].startswith("fleet: proved (2 proved) in ")
    data = json.loads((tmp_path / "fleet.json").read_text())
    assert (data["schema"], data["verdict"]) == (fleet.SCHEMA, "proved")
    assert [one["head"] for one in data["nodes"]] == [True, False]
    assert [one["report"] for one in data["nodes"]] == [REPORT, REPORT]
    assert ray.connected == []


def test_a_proof_gets_all_gpus_of_its_node_and_verify_none(play: Callable[..., Played]) -> None:
    ray = play(HEAD, node(2, gpus=8), outcome=lambda _: brought())
    for command, gpus in (("smoke", [0, 8]), ("verify", [0, 0])):
        ray.sent.clear()
        fleet.run(fleet.Options(command, address="10.0.0.1:6379"), lambda _: None, None)
        assert [how["num_gpus"] for _, how, _ in ray.sent] == gpus


@pytest.mark.parametrize(
    ("error", "verdict", "said"),
    [
        (RayError("The node died. See …"), "died", "RayError: The node died"),
        (RayTaskError("traceback\nOSError: no space"), "failed", "OSError: no space"),
    ],
)
def test_a_node_whose_task_is_lost_is_named_and_never_proved(
    play: Callable[..., Played], error: Exception, verdict: str, said: str
) -> None:
    play(HEAD, node(2), outcome=lambda one: brought() if one.head else error)
    lines: list[str] = []
    assert fleet.run(TWO, lines.append, None) == 1
    (row,) = (line for line in lines if line.startswith("10.0.0.2"))
    assert verdict in row and row.endswith(said)


def test_a_node_that_leaves_the_cluster_is_not_waited_for(play: Callable[..., Played]) -> None:
    ray = play(HEAD, node(2), outcome=lambda one: brought() if one.head else None)
    listed = ray.nodes
    asked = 0

    def leaving() -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        ray.lost = {node(2).id} if asked > 2 else set()
        return listed()

    ray.nodes = leaving  # type: ignore[method-assign]
    lines: list[str] = []
    assert fleet.run(TWO, lines.append, None) == 1
    assert any("died" in line and "its node left the cluster" in line for line in lines)


def test_a_node_that_never_answers_is_ended_when_the_time_is_over(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = play(HEAD, node(2), outcome=lambda one: brought() if one.head else None)
    monkeypatch.setattr(fleet, "GRACE", -60.0)
    lines: list[str] = []
    assert fleet.run(TWO, lines.append, None) == 1
    assert ray.cancelled == [node(2).id]
    assert any("hung" in line and "no answer in 0 s" in line for line in lines)


def test_nodes_without_a_gpu_are_left_out_where_that_is_asked_for_and_named(
    play: Callable[..., Played], tmp_path: Path
) -> None:
    ray = play(HEAD, node(2, gpus=8), outcome=lambda _: brought())
    options = fleet.Options(address="10.0.0.1:6379", gpu_nodes=True)
    assert fleet.run(options, lambda _: None, tmp_path / "fleet.json") == 0
    assert [where for where, _, _ in ray.sent] == [node(2).id]
    data = json.loads((tmp_path / "fleet.json").read_text())
    assert [one["verdict"] for one in data["nodes"]] == ["not-asked", "proved"]


# Refused in one sentence


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image's environment."""
    (tmp_path / "share/rollout").mkdir(parents=True)
    facts = {"smoke": {"sleep_levels": [1], "refit": ["shared-memory"]}}
    (tmp_path / "share/rollout/image.json").write_text(json.dumps(facts))
    monkeypatch.setenv("ROLLOUT_PREFIX", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["fleet", *argv])
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    return code, said.err


@pytest.mark.usefixtures("prefix")
def test_an_image_without_ray_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused([], capsys) == (
        2,
        "rollout: this image has no Ray, so it is no node of a cluster; take one that has\n",
    )


def test_no_cluster_is_wrong_usage(
    prefix: Path, play: Callable[..., Played], capsys: pytest.CaptureFixture[str]
) -> None:
    play(HEAD, outcome=lambda _: brought())
    code, said = refused([], capsys)
    assert code == 2 and "no Ray cluster can be reached from this node: Could not find" in said
    assert fleet.latest({"RAY_TMPDIR": str(prefix)}) == ""


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--address", "ray://head:10001"], "'ray://head:10001' is no HOST:PORT of a Ray head"),
        (
            ["--address", "127.0.0.1:1"],
            "no Ray cluster answers at 127.0.0.1:1 (Connection refused)",
        ),
        (["--only", "generaton"], "no check 'generaton' in this image; did you mean 'generation'?"),
        (["verify", "--only", "start"], "fleet verify: --only is for smoke alone"),
        (
            ["--report", "/nowhere/fleet.json"],
            "The report cannot be written to /nowhere/fleet.json",
        ),
    ],
)
def test_wrong_usage_is_said_before_any_node_is_asked(
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    code, sentence = refused(argv, capsys)
    assert code == 2 and said in sentence


def test_a_cluster_that_is_gone_but_still_written_down_is_not_waited_for(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    (prefix / "ray").mkdir()
    (prefix / "ray/ray_current_cluster").write_text("127.0.0.1:1\n")
    code, sentence = refused([], capsys)
    assert code == 2 and "no Ray cluster answers at 127.0.0.1:1" in sentence


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--nodes", "3", "--timeout", "1"], "1 of 3 nodes are in the cluster after 1 s"),
        (["--gpu-nodes"], "--gpu-nodes: none of 1 nodes gives Ray a GPU"),
    ],
)
def test_too_few_nodes_cannot_be_proved_here(
    argv: list[str],
    said: str,
    play: Callable[..., Played],
    capsys: pytest.CaptureFixture[str],
) -> None:
    play(HEAD, outcome=lambda _: brought())
    code, sentence = refused(["--address", "10.0.0.1:6379", *argv], capsys)
    assert code == 3 and said in sentence


@pytest.mark.usefixtures("prefix")
def test_gpus_that_other_jobs_hold_are_said_and_not_waited_for(
    play: Callable[..., Played], capsys: pytest.CaptureFixture[str]
) -> None:
    ray = play(HEAD, node(2, gpus=8), outcome=lambda _: brought(), held=3)
    code, sentence = refused(["--address", "10.0.0.1:6379"], capsys)
    assert code == 3 and "other jobs hold 3 of the cluster's 8 GPUs" in sentence
    assert ray.sent == []
    assert cli.main(["fleet", "verify", "--address", "10.0.0.1:6379"]) == 0

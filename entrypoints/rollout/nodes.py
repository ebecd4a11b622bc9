"""The nodes of a fleet: what each is, what became of it, and what all of them prove together.

Everything here is computed from what Ray lists and what an errand brought; fleet.py asks for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout import report

HEAD = "node:__internal_head__"  # the resource by which Ray marks its head
PASSED = ("proved", "in-part")
# A node that hangs or dies under the proof has not passed it. Not asked is what was left out.
BROKEN = ("failed", "hung", "died")
NOT_ASKED = "not-asked"
# What of two nodes has to be alike, each with its name for people.
IDENTITY = {
    "reference": "image",
    "lock_sha256": "lock",
    "layers": "layers",
    "python": "Python",
    "ray": "Ray",
    "program": "checks",
}


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as Ray describes it."""

    id: str
    address: str
    name: str
    head: bool
    gpus: float

    @property
    def label(self) -> str:
        """Address and the beginning of the id: several nodes may have one address."""
        return f"{self.address} {self.id[:6]}{' (head)' if self.head else ''}"


@dataclass(frozen=True)
class Answer:
    """What became of one node. ``report`` is as ``rollout`` wrote it, None where it wrote none."""

    node: Node
    verdict: str
    reason: str | None
    seconds: float
    identity: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None


def alive(listed: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, of what ``ray.nodes()`` lists; the head first."""
    found = [
        Node(
            id=str(one["NodeID"]),
            address=str(one["NodeManagerAddress"]),
            name=str(one.get("NodeManagerHostname", "")),
            head=HEAD in one["Resources"],
            gpus=float(one["Resources"].get("GPU", 0)),
        )
        for one in listed
        if one["Alive"]
    ]
    return sorted(found, key=lambda node: (not node.head, node.address, node.id))


def identity(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a node is, of what its errand brought: the keys of IDENTITY, or empty."""
    info = found["info"]
    return {key: info.get(key) for key in IDENTITY} | {"layers": found["layers"]} if info else {}


def judged(node: Node, found: Mapping[str, Any], timeout: float) -> Answer:
    """The answer of a node, from what its errand brought.

    The verdict is the report's where the exit code says the same. ``refused`` is a node on which
    the command was wrong usage (a model that is not there, say).
    """
    code, data = found["code"], None
    if found["report"]:
        try:
            data = report.parse_json(found["report"].encode())
        except ValueError as error:
            return _answer(node, found, "failed", f"its report {error}")
    if not isinstance(data, dict):
        return _answer(node, found, *_unreported(code, found["said"], timeout))
    verdict = data.get("verdict")
    if code is None:
        return _answer(node, found, *_unreported(None, found["said"], timeout), data)
    if verdict not in report.EXIT_CODES or report.EXIT_CODES[str(verdict)] != code:
        why = f"its report says {report.shown(verdict)}, and its exit code is {code}"
        return _answer(node, found, "failed", why, data)
    return _answer(node, found, str(verdict), _reason(data), data)


def _answer(
    node: Node,
    found: Mapping[str, Any],
    verdict: str,
    reason: str | None,
    data: Mapping[str, Any] | None = None,
) -> Answer:
    return Answer(node, verdict, reason, float(found["seconds"]), identity(found), data)


def _unreported(code: int | None, said: str, timeout: float) -> tuple[str, str]:
    """Verdict and reason of a node without a report."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1].removeprefix("rollout: ") if lines else "it printed nothing"
    if code is None:
        return "hung", f"no end in {timeout:.0f} s; its last line: {last}"
    if code in (2, 3):
        return {2: "refused", 3: "unproved"}[code], last
    how = f"signal {-code} ended it" if code < 0 else f"it ended with {code}"
    return "failed", f"{how} and left no report; its last line: {last}"


def _reason(data: Mapping[str, Any]) -> str | None:
    """Why a report is not one of a proof, or what it could not show; None where all was shown."""
    short = [c for c in data.get("checks", []) if c.get("status") != "passed"]
    if short:
        why = str(short[0].get("reason") or "").strip().splitlines()
        return f"{short[0].get('name')}: {why[0] if why else 'no reason given'}"
    skipped = data.get("skipped") or {}
    if skipped:
        return f"not shown here: {', '.join(skipped)}"
    return None if data.get("verdict") in PASSED else "only some of its checks were asked for"


def base(answers: Sequence[Answer]) -> Answer | None:
    """The node that all others are compared with: the head, or the first that told what it is."""
    return next((answer for answer in answers if answer.identity), None)


def differences(answers: Sequence[Answer]) -> dict[str, list[str]]:
    """By a node's id how it differs from the base, a clause each; nodes alike are left out.

    A node that told nothing of itself is left out too: no verdict counts it as proved.
    """
    found, first = {}, base(answers)
    for answer in answers:
        if first is None or not answer.identity:
            continue
        clauses = [
            f"{name} {_brief(answer.identity[key])} instead of {_brief(first.identity[key])}"
            for key, name in IDENTITY.items()
            if answer.identity[key] != first.identity[key]
        ]
        if clauses:
            found[answer.node.id] = clauses
    return found


def _brief(value: object) -> str:
    if not value:
        return "unknown"
    if isinstance(value, str):
        digest = value.rpartition(",")[2].removeprefix("sha256:")
        return digest[:12] if len(digest) >= 40 else value
    return "of other digests"  # a digest for each check, of which a reader has nothing


def verdict(answers: Sequence[Answer]) -> str:
    """``proved``, ``in-part``, ``failed`` or ``unproved``, for all nodes together.

    A node that hangs, dies, or is not what the head is makes it failed: no job should start there.
    """
    asked = [answer for answer in answers if answer.verdict != NOT_ASKED]
    if any(answer.verdict in BROKEN for answer in asked) or differences(asked):
        return "failed"
    # Of a node that did not tell what it is nobody knows whether it is one of these.
    known = all(answer.identity for answer in asked)
    if asked and known and all(answer.verdict in PASSED for answer in asked):
        return "proved" if all(answer.verdict == "proved" for answer in asked) else "in-part"
    return "unproved"

"""``rollout fleet``: the proof on every node of a Ray cluster, in one table and one file.

Ray is the scheduler: one task for each node that is alive, bound to it. The task runs ``rollout
smoke`` (or ``verify``) there and brings the report back (errand.py). What the answers are worth is
computed in nodes.py.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout import errand, nodes, report
from rollout.nodes import NOT_ASKED, Answer, Node
from rollout.problem import Problem

SCHEMA = "rollout-fleet/1"
TIMEOUT = 1800  # seconds for each node: a first start compiles for minutes
GRACE = 60.0  # seconds beyond that for Ray: to start a worker, and to end one that hangs
SETTLED = 10.0  # seconds in which the nodes' free GPUs become known


@dataclass(frozen=True)
class Options:
    """What ``rollout fleet`` was asked for; ``arguments`` go to the command on each node."""

    command: str = "smoke"
    arguments: tuple[str, ...] = ()
    address: str | None = None  # of the cluster, host:port; None: the one that this node is in
    timeout: int = TIMEOUT  # seconds
    nodes: int = 1  # that there have to be
    gpu_nodes: bool = False  # leave out the nodes that give Ray no GPU


# The file and the terminal ------------------------------------------------------------------------


def document(
    answers: Sequence[Answer], options: Options, started: str, seconds: float
) -> dict[str, Any]:
    """The JSON form of a run; a node's ``report`` is its whole report (rollout-report/2)."""
    differing = nodes.differences(answers)
    return {
        "schema": SCHEMA,
        "command": [options.command, *options.arguments],
        "timeout": options.timeout,
        "started": started,
        "seconds": seconds,
        "nodes": [
            {
                "id": answer.node.id,
                "address": answer.node.address,
                "name": answer.node.name,
                "head": answer.node.head,
                "gpus": answer.node.gpus,
                "verdict": answer.verdict,
                "reason": answer.reason,
                "differs": differing.get(answer.node.id, []),
                "seconds": answer.seconds,
                "identity": dict(answer.identity),
                "report": answer.report,
            }
            for answer in answers
        ],
        "verdict": nodes.verdict(answers),
    }


def header() -> str:
    """The heading over the rows."""
    return f"{'node':<30} {'verdict':<9} {'seconds':>8}  {'image':<28} reason"


def row(answer: Answer) -> str:
    """One row of the terminal table."""
    image = str(answer.identity.get("reference") or "unknown")
    line = f"{answer.node.label:<30} {answer.verdict:<9} {answer.seconds:>8.1f}  {image:<28}"
    return f"{line} {answer.reason or ''}".rstrip()


def ending(answers: Sequence[Answer], seconds: float) -> list[str]:
    """What is printed below the rows: who differs, and the sum."""
    asked = [answer for answer in answers if answer.verdict != NOT_ASKED]
    differing, first = nodes.differences(asked), nodes.base(asked)
    label = first.node.label if first else ""
    lines = [
        f"{answer.node.label} is not what {label} is: {'; '.join(differing[answer.node.id])}"
        for answer in asked
        if answer.node.id in differing
    ]
    count = Counter(answer.verdict for answer in answers)
    parts = ", ".join(f"{number} {word}" for word, number in count.items())
    if differing:
        parts += f"; {len(differing)} of another image"
    lines.append(f"fleet: {nodes.verdict(answers)} ({parts}) in {seconds:.1f} s")
    return lines


# Ray ---------------------------------------------------------------------------------------------


def _reachable(address: str) -> None:
    """Ask before Ray does, which tries for a minute and ends in pages of its own."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise Problem(f"{address!r} is no HOST:PORT of a Ray head; say --address HOST:PORT", 2)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise Problem(f"no Ray cluster answers at {address} ({why}); is its head up?", 2) from None


def latest(environ: Mapping[str, str]) -> str:
    """The address of the cluster that `ray start` last wrote down on this node; empty if none."""
    folder = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp"  # noqa: S108 - as Ray has it
    try:
        return Path(folder, "ray/ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster.

    Raises:
        Problem: exit code 2 where there is no Ray in this image, or no cluster for this node.
    """
    try:
        import ray
    except ImportError:
        sentence = "this image has no Ray, so it is no node of a cluster; take one that has"
        raise Problem(sentence, 2) from None
    address = address or os.environ.get("RAY_ADDRESS") or latest(os.environ) or "auto"
    if address != "auto":
        _reachable(address)
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Ray does otherwise
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: by its release
        sentence = f"no Ray cluster can be reached from this node: {_first(error)}"
        raise Problem(f"{sentence} ('ray start' makes one; run this inside of it)", 2) from None
    finally:
        signal.signal(signal.SIGTERM, mine)  # Ray puts its own there, with another exit code
    try:
        # A node of another image has another errand, or none: all of them get this one.
        ray.cloudpickle.register_pickle_by_value(errand)
        yield ray
    finally:
        ray.shutdown()  # what still runs for this driver ends with it


def _joined(ray: Any, wanted: int, timeout: float) -> list[Node]:
    """The nodes, once there are as many as wanted; Problem (code 3) if that does not come."""
    end = time.monotonic() + timeout
    while True:
        found = nodes.alive(ray.nodes())
        if len(found) >= wanted:
            return found
        if time.monotonic() > end:
            here = f"{len(found)} of {wanted} nodes are in the cluster after {timeout:.0f} s"
            raise Problem(f"{here}; see what 'ray start' said on the others", 3)
        time.sleep(1)


def _free(ray: Any) -> None:
    """Problem (code 3) where other jobs hold GPUs: the proof would wait for them for ever."""
    end = time.monotonic() + SETTLED
    while True:
        total = ray.cluster_resources().get("GPU", 0)
        free = ray.available_resources().get("GPU", 0)
        if free >= total:
            return
        if time.monotonic() > end:
            held = f"other jobs hold {total - free:g} of the cluster's {total:g} GPUs"
            raise Problem(f"{held}; end them, or ask for 'verify', which needs none", 3)
        time.sleep(1)


def _sent(ray: Any, node: Node, options: Options) -> Any:
    """Send the errand to a node; returns the reference of what it will bring."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # All GPUs of the node, so that Ray starts nothing beside the proof.
    gpus = node.gpus if options.command == "smoke" else 0
    bound = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=bound)
    argv = [options.command, *options.arguments]
    return task(errand.run).remote(argv, float(options.timeout))


def _brought(ray: Any, node: Node, reference: Any, options: Options, seconds: float) -> Answer:
    """The answer of a node whose task has ended, however it ended."""
    try:
        return nodes.judged(node, ray.get(reference), options.timeout)
    except ray.exceptions.RayTaskError as error:  # Python raised there, in our own errand
        last = str(error).strip().splitlines()[-1]
        return Answer(node, "failed", f"the command could not be run there: {last}", seconds)
    except ray.exceptions.RayError as error:  # its worker or the node itself is gone
        return Answer(node, "died", f"{type(error).__name__}: {_first(error)}", seconds)


def _first(error: Exception) -> str:
    """The first sentence of an error of Ray's, which goes on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". ")[0].removesuffix(".") if lines else "Ray says no more"


def _asked(
    ray: Any, chosen: Sequence[Node], options: Options, show: Callable[[Answer], None]
) -> list[Answer]:
    """Ask these nodes, and wait for every one: for its answer, its end, or the end of the time."""
    begun = time.monotonic()
    waiting = {_sent(ray, node, options): node for node in chosen}
    answers: list[Answer] = []

    def close(reference: Any, answer: Answer) -> None:
        del waiting[reference]
        answers.append(answer)
        show(answer)

    while waiting:
        left = options.timeout + GRACE - (time.monotonic() - begun)
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, min(5.0, left)))
        seconds = time.monotonic() - begun
        for reference in done:
            close(reference, _brought(ray, waiting[reference], reference, options, seconds))
        alive = {node.id for node in nodes.alive(ray.nodes())}
        for reference, node in [*waiting.items()]:
            if node.id not in alive:
                close(reference, Answer(node, "died", "its node left the cluster", seconds))
            elif left <= 0:
                ray.cancel(reference, force=True)
                why = f"no answer in {options.timeout + GRACE:.0f} s, though its node is alive"
                close(reference, Answer(node, "hung", why, seconds))
    return answers


def run(options: Options, show: Callable[[str], None], path: Path | None) -> int:
    """``rollout fleet``: ask every node, print a row for each, write the file; the exit code.

    Raises:
        Problem: exit code 2 without Ray or a cluster, 3 where nodes or their GPUs are missing.
    """
    started, clock = report.now(), time.monotonic()
    with _cluster(options.address) as ray:
        found = _joined(ray, options.nodes, options.timeout)
        chosen = [node for node in found if node.gpus or not options.gpu_nodes]
        if not chosen:
            raise Problem(f"--gpu-nodes: none of {len(found)} nodes gives Ray a GPU", 3)
        if options.command == "smoke":
            _free(ray)
        show(header())
        left = [Answer(n, NOT_ASKED, "it gives Ray no GPU", 0.0) for n in found if n not in chosen]
        for answer in left:
            show(row(answer))
        answers = left + _asked(ray, chosen, options, lambda answer: show(row(answer)))
    order = {node.id: index for index, node in enumerate(found)}
    answers.sort(key=lambda answer: order[answer.node.id])
    seconds = time.monotonic() - clock
    for line in ending(answers, seconds):
        show(line)
    if path:
        report.save(path, document(answers, options, started, seconds))
    return report.exit_code(nodes.verdict(answers))

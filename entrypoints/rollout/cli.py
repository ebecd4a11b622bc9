"""``rollout``: the command of every image.

Exit codes: 0 proved, 1 a check failed (with --inject: the one that had to find the fault), 2 wrong
usage, 3 cannot be proved here, 4 an injected fault that its own check did not find.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rollout import added, info, preflight, report
from rollout.problem import Problem


def cycles(text: str) -> int:
    """A number of cycles, for argparse. Fewer than four do not show growth from cycle to cycle."""
    if not text.isdigit() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 4")
    return int(text)


def count(text: str) -> int:
    """A number of nodes or seconds, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line of the image."""
    top = argparse.ArgumentParser(
        prog="rollout",
        description="What this image is, and the proof that it works.",
        epilog="Anything else is executed as given: rollout python3, rollout bash …  "
        "Exit codes: 0 proved, 1 a check failed, 2 wrong usage, 3 cannot be proved here, "
        "4 an injected fault that its own check did not find.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("info", help="reference, engine, torch, CUDA, lock; needs no GPU")
    one.add_argument("--json", action="store_true", help="print JSON")
    two = commands.add_parser("verify", help="every file is the locked one; needs no GPU")
    two.add_argument("--report", type=Path, metavar="FILE", help="write the checks as JSON")
    three = commands.add_parser("smoke", help="the proof: generation, sleep, wake, refit")
    three.add_argument("--only", default="", metavar="CHECK,…", help="run these checks alone")
    three.add_argument("--model", type=Path, metavar="DIR", help="a model of yours, not the probe")
    three.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON")
    three.add_argument("--cycles", type=cycles, default=4, metavar="N", help="of sleep and wake")
    three.add_argument(
        "--framework", type=Path, metavar="DIR", help="train with this checkout, not the image's"
    )
    three.add_argument(
        "--inject", metavar="FAULT[@TRANSPORT]", help="break one thing; the run must fail"
    )
    four = commands.add_parser("doctor", help="all that is wrong with this host, in milliseconds")
    four.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser(
        "serve",
        help="the engine's own OpenAI server; arguments pass through; "
        "on 127.0.0.1 unless --host says otherwise",
    )
    _fleet_parser(
        commands.add_parser("fleet", help="smoke or verify on every node of a Ray cluster")
    )
    return top


def _fleet_parser(five: argparse.ArgumentParser) -> None:
    five.description = "Run it on every node of the Ray cluster that this one is in."
    five.add_argument("what", nargs="?", choices=("smoke", "verify"), default="smoke")
    five.add_argument("--only", metavar="CHECK,…", help="as of smoke")
    five.add_argument("--model", metavar="DIR", help="as of smoke; a folder that all nodes have")
    five.add_argument("--framework", metavar="DIR", help="as of smoke; a folder that all have")
    five.add_argument("--cycles", type=cycles, metavar="N", help="as of smoke")
    five.add_argument("--report", type=Path, metavar="FILE", help="write all reports as JSON")
    five.add_argument(
        "--timeout", type=count, metavar="SECONDS", help="for each node; 1800 by default"
    )
    five.add_argument("--nodes", type=count, default=1, metavar="N", help="wait for so many")
    five.add_argument("--gpu-nodes", action="store_true", help="leave out nodes without a GPU")
    five.add_argument("--address", metavar="HOST:PORT", help="of the cluster, if not this node's")


COMMANDS = ("info", "verify", "smoke", "doctor", "fleet", "serve", "-h", "--help")


def _info(as_json: bool) -> int:
    facts = info.facts(info.prefix())
    beside = added.found(info.prefix(), os.environ)
    facts["lacks"] = info.lacking(facts["lacks"], (item.name for item in beside))
    if as_json:
        from rollout import program, verify

        # Read from the sources each time: a third of a second, which the table need not take.
        data = info.image(info.prefix())
        identity = program.of_image(data, verified=verify.available(data))
        more = {"added": [asdict(item) for item in beside], "program": identity}
        print(json.dumps({**facts, **more}, indent=1))
        return 0
    print(info.text(facts))
    for item in beside:
        print(f"{'added':<16}{item.name} {item.version} ({item.place})")
    return 0


@dataclass(frozen=True)
class Ran:
    """What a report says of a run beside its checks; see report.Report for the names."""

    program: Mapping[str, str]
    device: str | None = None
    gpus: Sequence[report.Gpu] = ()
    model: str | None = None
    cycles: int | None = None
    framework: report.Framework | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


def _conclude(
    checks: Sequence[report.Check],
    expected: Sequence[str],
    ran: Ran,
    path: Path | None,
    started: str,
    seconds: float,
) -> int:
    """Say the verdict, write the report where one was asked for, return the exit code."""
    facts = info.facts(info.prefix())
    outcome = report.verdict(checks, expected, ran.skipped)
    beside = added.found(info.prefix(), os.environ)
    for item in beside:
        print(f"added to the image: {item.name} {item.version} ({item.place})", flush=True)
    names = [check.name for check in checks if check.status == "failed"]
    tail = f" ({', '.join(names)})" if names else ""
    for name, why in ran.skipped.items():
        print(f"{facts['reference']}: not shown here: {name} ({why})", flush=True)
    print(f"{facts['reference']}: {outcome}{tail} in {seconds:.1f} s", flush=True)
    if path:
        result = report.Report(
            image=facts["reference"],
            lock_sha256=facts["lock_sha256"],
            # A container does not know its layers; who starts it may say them (nox -s prove does).
            layers=[layer for layer in os.environ.get("ROLLOUT_LAYERS", "").split(",") if layer],
            engine=report.Engine(facts["engine"]["name"], facts["engine"]["version"] or "none"),
            torch=facts["torch"],
            cuda=facts["cuda"],
            driver=preflight.driver() if facts["cuda"] else None,
            gpus=list(ran.gpus),
            device=ran.device,
            model=ran.model,
            cycles=ran.cycles,
            framework=ran.framework,
            added=beside,
            started=started,
            seconds=seconds,
            checks=list(checks),
            skipped=dict(ran.skipped),
            program=dict(ran.program),
            verdict=outcome,
        )
        report.write(path, result)
    return report.exit_code(outcome)


def _show(check: report.Check) -> None:
    print(report.row(check), flush=True)


def _verify(path: Path | None) -> int:
    from rollout import program, verify

    if path:
        report.writable(path)
    started, clock = report.now(), time.perf_counter()
    print(report.header(), flush=True)
    checks = verify.run(info.prefix(), progress=_show)
    seconds = time.perf_counter() - clock
    data = info.image(info.prefix())
    expected = verify.available(data)
    skipped = {
        f"sha256 of {name}": f"not locked: {why}"
        for name, why in info.unlocked(info.prefix()).items()
    }
    identity = program.of_image(data, verified=expected, smoked=()) if path else {}
    ran = Ran(identity, skipped=skipped)
    return _conclude(checks, expected, ran, path, started, seconds)


def _smoke(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from rollout import program, smoke

    only = tuple(name for name in given.only.split(",") if name)
    if given.report:
        report.writable(given.report)
    started, clock = report.now(), time.perf_counter()
    options = smoke.Options(only, given.model, given.cycles, given.inject, given.framework)
    data = smoke.tried(info.image(info.prefix()), options)
    checks, device = smoke.run(data, options, _show, environ)
    seconds = time.perf_counter() - clock
    # Some checks alone prove no image: the verdict is 'unproved', unless one of them failed.
    expected, wanted = smoke.promised(data["smoke"]), data["smoke"]
    ran = Ran(
        program=program.of_image(data, verified=()) if given.report else {},
        device=device,
        gpus=smoke.gpus(data),
        model=smoke.model(data, options),
        cycles=options.cycles,
        framework=_trained(checks, data),
        skipped=smoke.skipped(wanted, smoke.visible_gpus(data)),
    )
    code = _conclude(checks, expected, ran, given.report, started, seconds)
    return _injected(given.inject, checks, expected) if given.inject and code == 1 else code


def _fleet(given: argparse.Namespace) -> int:
    from rollout import fleet, smoke

    names = ("only", "model", "framework", "cycles")
    said = {f"--{name}": getattr(given, name) for name in names if getattr(given, name)}
    if given.what == "verify" and said:
        raise Problem(f"fleet verify: {', '.join(said)} is for smoke alone", 2)
    data = info.image(info.prefix())
    only = [name for name in (given.only or "").split(",") if name]
    if only:  # a check that no image has would end with the same sentence on every node
        smoke.selected(only, data["smoke"], smoke.ANY)
    if given.report:
        report.writable(given.report)
    options = fleet.Options(
        command=given.what,
        arguments=tuple(str(word) for pair in said.items() for word in pair),
        address=given.address,
        timeout=given.timeout or fleet.TIMEOUT,
        nodes=given.nodes,
        gpu_nodes=given.gpu_nodes,
    )
    return fleet.run(options, lambda line: print(line, flush=True), given.report)


def _injected(fault: str, checks: Sequence[report.Check], known: Sequence[str]) -> int:
    """The exit code of a run with a fault that failed: 1 if it failed as it has to, else 4."""
    from rollout.faults import unseen

    failed = {c.name: str(c.reason) for c in checks if c.status == "failed"}
    why = unseen(fault, failed, known)
    if why:
        print(
            f"rollout: {fault} was not found by its own check: {why}", file=sys.stderr, flush=True
        )
    return 4 if why else 1


def _trained(checks: Sequence[report.Check], data: Mapping[str, Any]) -> report.Framework | None:
    """The framework that really ran, as its check found it; None where none did."""
    found = next((check.metrics for check in checks if check.name == "training"), {})
    said, path = str(found.get("framework", "")), str(found.get("framework_path", ""))
    name = data["framework"]["name"] if said and path else ""
    version = said.removeprefix(name).strip()
    return report.Framework(name, version, path) if name and version else None


def _doctor(environ: Mapping[str, str], *, as_json: bool) -> int:
    """Print all findings, those that stop the proof first; the exit code of `rollout smoke`."""
    cuda = info.image(info.prefix()).get("cuda")
    found = preflight.look(preflight.Host(Path("/"), environ, cuda, all=True))
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        for finding in found:
            weight = "stops" if finding.stops else "warning"
            print(f"{weight:<9}{finding.kind:<11}{finding.name}: {finding.sentence}")
        stops = sum(finding.stops for finding in found)
        tail = f"; {stops} would stop 'rollout smoke'" if found else ""
        print(f"found on this host: {len(found) or 'nothing'}{tail}")
    return 3 if any(finding.stops for finding in found) else 0


def _execute(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Become the given command, after a look that costs milliseconds.

    ``environ`` is as the job gave it: what was replaced in this process is wrong there, too.
    """
    cuda = info.image(info.prefix()).get("cuda")
    found = preflight.look(preflight.Host(Path("/"), environ, cuda, proof=False))
    for finding in found:
        print(f"rollout: warning: {finding.sentence}", file=sys.stderr, flush=True)
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 - running what the user asked for is the purpose
    except FileNotFoundError:
        raise Problem(
            f"no command {argv[0]!r} in this image; 'rollout --help' lists its own", 2
        ) from None
    except (OSError, ValueError) as error:
        raise Problem(f"{argv[0]!r} cannot be executed: {error}", 2) from None


LOOPBACK = "127.0.0.1"
# The engines' own servers, by backend.
SERVERS = {"vllm": ("vllm", "serve"), "sglang": ("python3", "-m", "sglang.launch_server")}


def _has_host(arguments: Sequence[str]) -> bool:
    """Whether arguments of a server say where it listens; a file of settings may, too."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--host", "--hos", "--ho"):  # argparse takes a part of a name
            return True
        if name == "--config":
            path = Path(value or "".join(arguments[number + 1 : number + 2]))
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # the engine says so
            # A key of its own: a "host" inside of another one is not where the server listens.
            if re.search(r"^['\"]?host['\"]?[ \t]*:", text, re.MULTILINE):
                return True
    return False


def _serve(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    name = info.image(info.prefix())["backend"]
    if name not in SERVERS:
        sentence = f"the {name} backend has no server of its own; use an image with an engine"
        raise Problem(sentence, 2)
    # vLLM would listen on every address, and who reaches it can have it load other weights. Behind
    # the user's own arguments: vLLM looks for the model in front.
    if not _has_host(arguments):
        arguments = [*arguments, "--host", LOOPBACK]
        sentence = f"rollout: listening on {LOOPBACK} alone; --host 0.0.0.0 lets others in"
        print(sentence, file=sys.stderr, flush=True)
    return _execute([*SERVERS[name], *arguments], environ)


def _dispatch(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        return _execute(argv, environ) if argv else _info(as_json=False)
    if argv[0] == "serve":
        return _serve(argv[1:], environ)
    given = parser().parse_args(argv)
    if given.command == "info":
        return _info(given.json)
    if given.command == "doctor":
        return _doctor(environ, as_json=given.json)
    if given.command == "fleet":
        return _fleet(given)
    return _verify(given.report) if given.command == "verify" else _smoke(given, environ)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; a :class:`Problem` becomes one sentence and its exit code."""
    # A container is stopped with SIGTERM; the engine has to be ended then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environ = dict(os.environ)  # as the job gave it
    # With a read-only root /tmp cannot be written, and torch.compile fails where nothing can.
    place = preflight.work_folder(os.environ)
    if place:
        os.environ["TMPDIR"] = str(place)
    # A UID that no passwd file knows has no home else, and FlashInfer cannot be imported without.
    if not os.environ.get("HOME"):
        os.environ["HOME"] = os.environ.get("XDG_CACHE_HOME") or preflight.CACHE
    # Nor a name, and torch's compiler, which vLLM imports, asks for one before anything else.
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = os.environ["LOGNAME"] = "rollout"
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv, environ)
    except Problem as problem:
        print(f"rollout: {problem}", file=sys.stderr, flush=True)
        return problem.code
    except KeyboardInterrupt:
        print("rollout: interrupted; the engine was stopped", file=sys.stderr, flush=True)
        return 130

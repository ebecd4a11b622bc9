"""Is the environment the locked one, whole and unchanged, and can it be loaded?

Seven checks, each with a name: ``files`` (every byte against RECORD or the seal, in hashes.py; all
else in the image, modes and owners against the list, in whole.py),
``distributions`` (against the lock, in installed.py; additions, in added.py), ``libraries`` (what
shared objects need, in shared_objects.py), ``compilers`` (what compiles kernels, in compilers.py),
``imports``, ``interface`` (what the backend uses of its engine, in backends/interface.py) where the
backend says that, and ``framework`` (every module that a training run touches) where there is one.
Nothing is trusted that the environment itself could have altered unseen: RECORD
vouches for what came out of a wheel, and ``share/rollout/unrecorded.sha256``, the seal made at
image build, for all the rest, RECORD files and the list included.

    python -m rollout.verify --seal     make the list and the seal; the last step of an image build
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rollout import added, driverless, info, inventory, mounts
from rollout.backends.interface import has as has_interface
from rollout.compilers import compilers
from rollout.environment import Finding, Findings, ending, opened, printable
from rollout.hashes import SEAL, files, seal
from rollout.installed import distributions, read_lock
from rollout.problem import Problem
from rollout.report import Check
from rollout.shared_objects import libraries
from rollout.whole import whole

CHECKS = ("files", "distributions", "libraries", "compilers", "imports", "interface", "framework")

SHOWN = 20  # findings in the reason of a check; with all, one lost folder would fill the screen
IMPORT_LIMIT_S = 600  # a cold disk and a large engine take minutes, a deadlock takes forever


def available(facts: Mapping[str, Any]) -> list[str]:
    """The checks of an image; ``facts`` are its image.json, or "backend" and "framework" of it."""
    left_out = set()
    if not has_interface(facts.get("backend", "")):
        left_out.add("interface")
    if not facts.get("framework"):
        left_out.add("framework")
    return [name for name in CHECKS if name not in left_out]


def run(
    prefix: Path,
    only: Collection[str] = (),
    progress: Callable[[Check], None] = lambda _: None,
) -> list[Check]:
    """Run the checks named in only (all that the image has, if empty), in the order of CHECKS.

    progress is called with each as it finishes. Problem (code 2) before anything runs, if a name
    is unknown, there is no environment at prefix, or what a check goes by cannot be read.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise Problem(f"No check is called {unknown[0]}; there are: {', '.join(CHECKS)}.", 2)
    opened(prefix)
    lock = prefix / info.LOCK
    facts = info.image(prefix) if set(only) != {"files"} else {}
    chosen = [name for name in available(facts) if not only or name in only]
    if "distributions" in chosen:
        read_lock(lock)
    python = prefix / "bin/python"
    work: dict[str, Callable[[], Findings]] = {
        "files": partial(_files, prefix),
        "distributions": partial(_distributions, prefix, lock, facts),
        "libraries": partial(libraries, prefix, _names(facts, "optional_libraries")),
        "compilers": compilers,
        "imports": partial(
            imports, _names(facts, "imports"), str(python if python.exists() else sys.executable)
        ),
        "interface": partial(interface, facts, str(python if python.exists() else sys.executable)),
        "framework": partial(framework, facts, str(python if python.exists() else sys.executable)),
    }
    checks = []
    for name in chosen:
        checks.append(_check(name, work[name]))
        progress(checks[-1])
    return checks


def _files(prefix: Path) -> Findings:
    """Everything in the image is what was installed: the environment's files, and all around it."""
    inside, around = files(prefix), whole(prefix)
    first = ("files", "bytes", "entries", "aside")  # what the table has room for
    found: dict[str, Any] = {**around.metrics, **inside.metrics}
    for kind in inside.metrics.keys() & around.metrics.keys():
        found[kind] = inside.metrics[kind] + around.metrics[kind]
    ordered = [name for name in first if name in found]
    ordered += [name for name in found if name not in first]
    # The seal covers the list, and with RECORD it is all that both looks go by: who has another
    # copy of the image, as a registry has, compares this one number.
    seal_sha256 = _sha256(prefix / SEAL)
    problems = (*inside.problems, *around.problems)
    metrics = {name: found[name] for name in ordered}
    return Findings(problems, {**metrics, "seal": seal_sha256})


def _sha256(path: Path) -> str:
    """The sha256 of a file; "none" where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "none"


def _distributions(prefix: Path, lock: Path, facts: Mapping[str, Any]) -> Findings:
    """What is installed is locked, and nothing that was added beside it hides any of it."""
    found = distributions(prefix, lock, _claims(facts))
    hidden = added.shadows(prefix, lock, facts, os.environ)
    beside = {"added": len(added.found(prefix, os.environ)), "shadowed": len(hidden)}
    return Findings((*found.problems, *hidden), {**beside, **found.metrics}, found.unproved)


def _claims(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the catalog expects of distributions; CUDA is none, torch says what it was built for."""
    claims = facts.get("expect", {})
    return {name: str(version) for name, version in claims.items() if name != "cuda"}


def _names(facts: Mapping[str, Any], key: str) -> list[str]:
    names = facts.get(key, [])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise Problem(f"image.json: {key} is not a list of names.", 2)


def _check(name: str, work: Callable[[], Findings]) -> Check:
    started = time.monotonic()
    found = work()
    seconds = time.monotonic() - started
    if found.problems:
        return Check(name, "failed", seconds, found.metrics, reason(found.problems))
    if found.unproved:
        return Check(name, "unproved", seconds, found.metrics, found.unproved)
    return Check(name, "passed", seconds, found.metrics, None)


def reason(problems: Sequence[Finding]) -> str:
    """The findings, one a line; of very many the first, and how many more there are."""
    lines = [str(finding) for finding in problems[:SHOWN]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more else lines)


def imports(modules: Sequence[str], python: str = sys.executable) -> Findings:
    """Each module imports in a fresh interpreter; metrics give the seconds that each took."""
    if not modules:
        return Findings(unproved="image.json names no module to import")
    problems: list[Finding] = []
    metrics: dict[str, Any] = {"modules": len(modules)}
    for module in modules:
        started = time.monotonic()
        failure = _import(python, module)
        metrics[f"{module}_seconds"] = round(time.monotonic() - started, 3)
        if failure:
            problems.append(Finding(module, "import", f"cannot be imported: {failure}"))
    return Findings(tuple(problems), metrics)


def interface(facts: Mapping[str, Any], python: str = sys.executable) -> Findings:
    """The engine has what its backend uses, with no GPU; metrics give how much was looked at."""
    name = facts["backend"]
    started = time.monotonic()
    promised = (word for word in ("fp8", "server") if facts.get("smoke", {}).get(word))
    module = ("rollout.backends.interface", name, *promised)
    with driverless.environment() as environ:
        outcome = _answer(python, module, "interface", "compared", environ)
    if isinstance(outcome, Finding):
        return Findings((outcome,))
    if not outcome["looked_at"]:
        return Findings(unproved=f"the backend {name} says nothing that it uses of its engine")
    problems = tuple(
        Finding(where, "interface", printable(what)) for where, what in outcome["problems"]
    )
    metrics = {**outcome["looked_at"], "without": ",".join(outcome["without"]) or "nothing"}
    return Findings(problems, {**metrics, "seconds": round(time.monotonic() - started, 3)})


def framework(facts: Mapping[str, Any], python: str = sys.executable) -> Findings:
    """Every module that a run of the framework touches imports, with no GPU and no network.

    One process for all of them, as in a run: engines take many seconds to import.
    """
    name, engine = facts["framework"]["name"], facts["backend"]
    started = time.monotonic()
    # A look-up in a hub is a bug, and is to fail at once.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    module = ("rollout.frameworks", name, engine)
    with driverless.environment() as environ:
        outcome = _answer(python, module, "import", "imported", environ | offline)
    if isinstance(outcome, Finding):
        return Findings((outcome,))
    if not outcome:
        return Findings(unproved=f"the adapter of {name} names no module to import")
    problems = tuple(
        Finding(module, "import", f"cannot be imported: {printable(failure)}")
        for module, failure in outcome.items()
        if failure
    )
    seconds = round(time.monotonic() - started, 3)
    return Findings(problems, {"modules": len(outcome), "import_seconds": seconds})


def _answer(
    python: str,
    module: tuple[str, ...],
    kind: str,
    done: str,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any] | Finding:
    """The JSON object that a module of ours prints, given a subject as its first argument.

    What it was to be (``done``: "imported") is said in the finding where there is no answer.
    """
    subject = module[1]
    try:
        said = subprocess.run(
            [python, "-I", "-B", "-m", *module],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=env,
            timeout=IMPORT_LIMIT_S,
            check=False,
        )
        outcome: dict[str, Any] = json.loads(said.stdout)
    except subprocess.TimeoutExpired:
        return Finding(subject, kind, f"not done after {IMPORT_LIMIT_S} s")
    except OSError as error:
        return Finding(python, kind, f"cannot be run ({error.strerror})")
    except ValueError:
        failure = printable(ending(said.returncode, said.stderr.decode("utf-8", "replace")))
        return Finding(subject, kind, f"cannot be {done}: {failure}")
    return outcome


def _import(python: str, module: str) -> str:
    # -I: neither a user's site-packages, nor PYTHONPATH, nor the current folder may help or harm.
    # -B: compiled files must not appear in an environment that was just checked for extra files.
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    try:
        result = subprocess.run(
            [python, "-I", "-B", "-c", code, module],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=IMPORT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_LIMIT_S} s"
    except OSError as error:
        return f"{python} cannot be run ({error.strerror})"
    text = result.stderr.decode("utf-8", "replace")
    return printable(ending(result.returncode, text)) if result.returncode else ""


def main(arguments: Sequence[str]) -> int:
    """``python -m rollout.verify --seal``: write the list of this image, then its seal."""
    if list(arguments) != ["--seal"]:
        print("usage: python -m rollout.verify --seal", file=sys.stderr)
        return 2
    prefix = info.prefix()
    root, own = inventory.root_of(prefix)
    listed = prefix / inventory.LIST
    try:
        what = inventory.make(prefix, mounts.read(root, f"{root.rstrip('/')}/{own}"))
        listed.write_text(what, encoding="utf-8")
        text = seal(prefix)
        (prefix / SEAL).write_text(text, encoding="utf-8")
    except Problem as problem:
        print(problem.sentence, file=sys.stderr)
        return problem.code
    except OSError as error:
        where = error.filename or prefix / SEAL
        print(f"{where} cannot be written or read: {error.strerror}.", file=sys.stderr)
        return 2
    for path, lines in ((listed, what), (prefix / SEAL, text)):
        print(f"{path}: {len(lines.splitlines())} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

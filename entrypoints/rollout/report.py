"""The report of a run: checks, verdict, JSON file and terminal rows.

Standard library alone, because the host reads reports too (``nox -s prove``, the README table).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollout.problem import Problem

SCHEMA = "rollout-report/1"
STATUSES = ("passed", "failed", "unproved")
EXIT_CODES = {"proved": 0, "failed": 1, "unproved": 3}
SHOWN_METRICS = 4  # of each check in the terminal; the file has them all

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYER = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Check:
    """The outcome of one named check.

    ``seconds`` is wall-clock time. ``metrics`` holds JSON values; the first few are shown in the
    terminal, so the telling ones come first. ``reason`` says why a check did not pass and is None
    for one that did.
    """

    name: str
    status: str
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no report may hold (ValueError): an unknown status, a failure unexplained."""
        if self.status not in STATUSES:
            raise ValueError(f"check {self.name}: no status is called {self.status!r}")
        if self.status != "passed" and not self.reason:
            raise ValueError(f"check {self.name}: {self.status}, and no reason given")
        if self.status == "passed" and self.reason is not None:
            raise ValueError(f"check {self.name}: passed, and a reason given")


@dataclass(frozen=True)
class Engine:
    """The engine of an image, by name and exact version."""

    name: str
    version: str


@dataclass(frozen=True)
class Added:
    """What a user added to the image: a distribution or a module, and the folder it lies in."""

    name: str
    version: str
    place: str


@dataclass(frozen=True)
class Report:
    """One run in one image; the keys of its JSON form are these fields, in this order.

    ``layers`` are diff_ids (``sha256:…``; empty where the run cannot know them), ``cuda``,
    ``driver`` and ``device`` are None without a GPU, ``started`` is UTC in ISO 8601, ``seconds`` is
    wall-clock time.
    """

    image: str
    lock_sha256: str
    layers: list[str]
    engine: Engine
    torch: str | None
    cuda: str | None
    driver: str | None
    device: str | None
    started: str
    seconds: float
    checks: list[Check]
    verdict: str
    added: list[Added] = field(default_factory=list)
    schema: str = SCHEMA


def now() -> str:
    """This moment, as ``Report.started`` wants it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def verdict(checks: Sequence[Check], expected: Collection[str] = ()) -> str:
    """``proved``, ``failed`` or ``unproved``.

    A check named in ``expected`` that did not run leaves the whole unproved: silence is no proof.
    """
    if any(check.status == "failed" for check in checks):
        return "failed"
    complete = set(expected) <= {check.name for check in checks}
    if checks and complete and all(check.status == "passed" for check in checks):
        return "proved"
    return "unproved"


def exit_code(outcome: str) -> int:
    """The exit code that a verdict stands for: 0 proved, 1 failed, 3 unproved (else KeyError)."""
    return EXIT_CODES[outcome]


# The file ---------------------------------------------------------------------------------------


def document(report: Report) -> dict[str, Any]:
    """The JSON form of a report, ``schema`` first, every number finite."""
    data: dict[str, Any] = _finite(asdict(report))
    return {"schema": data.pop("schema"), **data}


def writable(path: Path) -> None:
    """Raise Problem (code 2) if a report cannot be written at path; ask before a long run."""
    try:
        if _special(path):
            os.close(os.open(path, os.O_WRONLY))
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part = _part(path)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        part.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def write(path: Path, report: Report) -> None:
    """Write a report whole or not at all; Problem (code 2) where that is not possible."""
    text = json.dumps(document(report), indent=1, allow_nan=False) + "\n"
    try:
        if _special(path):  # such as /dev/stdout: nothing there that could be replaced
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise _unwritable(path, error) from None


def _replace(path: Path, text: str) -> None:
    part = _part(path)
    try:
        # Not mkstemp: its mode 0600 would keep the report of a container from the host's user.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            part.replace(path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # A single file mounted into the container is a mount point: it can only be rewritten.
            path.write_text(text, encoding="utf-8")
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}.part"


def _special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _unwritable(path: Path, error: OSError) -> Problem:
    return Problem(f"The report cannot be written to {path}: {error.strerror}.", 2)


def _finite(value: Any) -> Any:
    # JSON has no infinity. A name is kept rather than null: "inf" tells how far off a run was.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# The terminal -----------------------------------------------------------------------------------


def header() -> str:
    """The heading over the rows."""
    return f"{'check':<24} {'status':<8} {'seconds':>9}  metrics"


def row(check: Check) -> str:
    """One row of the terminal table; what did not pass has its reason on the lines below."""
    metrics = "  ".join(_metric(key, value) for key, value in _shown(check.metrics))
    line = f"{check.name:<24} {check.status:<8} {check.seconds:>9.2f}  {metrics}".rstrip()
    reason = [] if check.reason is None else check.reason.splitlines()
    return "\n".join([line, *(f"    {text}" for text in reason)])


def _shown(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    scalars = [(key, value) for key, value in metrics.items() if not isinstance(value, dict | list)]
    return scalars[:SHOWN_METRICS]


def _metric(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{key}={value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and key.endswith("bytes"):
        return f"{key}={_size(value)}"
    return f"{key}={value}"


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count}B"


# The schema -------------------------------------------------------------------------------------


def validate(data: object) -> list[str]:
    """What is wrong with a parsed report, one sentence each and the key first; empty if nothing."""
    if not isinstance(data, dict):
        return ["report: not an object"]
    # Reports that were kept before anything could be added do not say what was.
    wrong = _keys("", {"added": [], **data}, {f.name for f in fields(Report)})
    wrong += _values("", data, _REPORT)
    engine, checks = data.get("engine"), data.get("checks")
    if isinstance(engine, dict):
        wrong += _keys("engine.", engine, {"name", "version"})
        wrong += _values("engine.", engine, {"name": _text, "version": _text})
    items = data.get("added")
    for number, item in enumerate(items if isinstance(items, list) else []):
        wrong += _validate_added(f"added[{number}]", item)
    if isinstance(checks, list):
        for number, check in enumerate(checks):
            wrong += _validate_check(f"checks[{number}]", check)
        wrong += _validate_verdict(checks, data.get("verdict"))
    return wrong


def _validate_added(where: str, item: object) -> list[str]:
    if not isinstance(item, dict):
        return [f"{where}: not an object"]
    wrong = _keys(f"{where}.", item, {f.name for f in fields(Added)})
    return wrong + _values(f"{where}.", item, dict.fromkeys(item, _text))


def _validate_check(where: str, check: object) -> list[str]:
    if not isinstance(check, dict):
        return [f"{where}: not an object"]
    wrong = _keys(f"{where}.", check, {f.name for f in fields(Check)})
    wrong += _values(f"{where}.", check, _CHECK)
    if check.get("status") == "passed" and check.get("reason") is not None:
        wrong.append(f"{where}.reason: given for a check that passed")
    if check.get("status") in ("failed", "unproved") and not check.get("reason"):
        wrong.append(f"{where}.reason: missing from a check that did not pass")
    return wrong


def _validate_verdict(checks: list[object], given: object) -> list[str]:
    known = [check for check in checks if isinstance(check, dict)]
    names = Counter(str(check.get("name")) for check in known)
    wrong = [f"checks: {name} is there {count} times" for name, count in names.items() if count > 1]
    statuses = {str(check.get("status")) for check in known}
    if given == "proved" and statuses != {"passed"}:
        wrong.append("verdict: proved, though not every check passed")
    if (given == "failed") != ("failed" in statuses):
        wrong.append(f"verdict: {given}, which the checks contradict")
    return wrong


def _keys(where: str, data: Mapping[str, object], known: set[str]) -> list[str]:
    missing = [f"{where}{key}: missing" for key in sorted(known - set(data))]
    return missing + [f"{where}{key}: unknown" for key in sorted(map(str, set(data) - known))]


_Test = Callable[[object], str]  # what is expected instead; empty if the value will do


def _values(where: str, data: Mapping[str, object], tests: Mapping[str, _Test]) -> list[str]:
    wrong = [(key, test(data[key])) for key, test in tests.items() if key in data]
    return [f"{where}{key}: {data[key]!r} is not {why}" for key, why in wrong if why]


def _text(value: object) -> str:
    return "" if isinstance(value, str) and value else "a text"


def _optional_text(value: object) -> str:
    return "" if value is None or not _text(value) else "a text or null"


def _seconds(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fine = number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
    return "" if fine else "a finite number of seconds"


def _sha256(value: object) -> str:
    fine = isinstance(value, str) and _SHA256.fullmatch(value)
    return "" if fine else "a sha256 of 64 hexadecimal digits"


def _layers(value: object) -> str:
    items = value if isinstance(value, list) else [None]
    fine = all(isinstance(item, str) and _LAYER.fullmatch(item) for item in items)
    return "" if fine else "a list of diff_ids"


def _moment(value: object) -> str:
    wanted = "a moment in UTC, ISO 8601"
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return wanted
    offset = moment.utcoffset() if moment else None
    return "" if offset is not None and not offset else wanted


def _one_of(*choices: str) -> _Test:
    return lambda value: "" if value in choices else "one of " + ", ".join(choices)


def _kind(kind: type, name: str) -> _Test:
    return lambda value: "" if isinstance(value, kind) else name


def _metrics(value: object) -> str:
    fine = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return "" if fine and _is_finite(value) else "an object of finite JSON values"


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_finite(item) for item in value)
    return value is None or isinstance(value, str | int)


_REPORT: dict[str, _Test] = {
    "schema": _one_of(SCHEMA),
    "image": _text,
    "lock_sha256": _sha256,
    "layers": _layers,
    "engine": _kind(dict, "an object"),
    "torch": _optional_text,
    "cuda": _optional_text,
    "driver": _optional_text,
    "device": _optional_text,
    "started": _moment,
    "seconds": _seconds,
    "checks": _kind(list, "a list"),
    "verdict": _one_of(*EXIT_CODES),
    "added": _kind(list, "a list"),
}
_CHECK: dict[str, _Test] = {
    "name": _text,
    "status": _one_of(*STATUSES),
    "seconds": _seconds,
    "metrics": _metrics,
    "reason": _optional_text,
}

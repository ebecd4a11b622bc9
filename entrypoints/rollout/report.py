"""The report of a run: checks, verdict, JSON file and terminal rows.

The host reads reports of others by the published schema (images/proving/report_file.py). From here
it takes how a file of this size and depth is read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollout.problem import Problem

SCHEMA = "rollout-report/2"
STATUSES = ("passed", "failed", "unproved")
# What a machine can show was shown where it is "in-part": nobody has to change anything there.
EXIT_CODES = {"proved": 0, "in-part": 0, "failed": 1, "unproved": 3}
SHOWN_METRICS = 4  # of each check in the terminal; the file has them all

LARGEST = 4 << 20  # bytes of a file that can be a report; the largest kept one has 12 thousand
_LONGEST = 64 << 10  # characters of a text; the reason of a check may hold what an engine printed
_DEEPEST = 8  # objects and lists inside each other


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
class Gpu:
    """A GPU that the run could see."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Framework:
    """The training framework that really ran: its version, and the folder it was imported from."""

    name: str
    version: str
    path: str


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
    ``driver`` and ``device`` are None without a GPU, ``gpus`` is empty then. ``model`` is what the
    smoke test ran on (``probe …``, or a folder of the user's) and ``cycles`` how often it slept;
    both are None for ``rollout verify``. ``framework`` is None where none ran. ``skipped`` says of
    each check and transport that was promised and cannot run here why. ``program`` has for each
    check the identity of what decides its result (program.py). ``started`` is UTC in ISO 8601,
    ``seconds`` is wall-clock time. What a report of an older schema cannot know is None.
    """

    image: str
    lock_sha256: str
    layers: list[str]
    engine: Engine
    torch: str | None
    cuda: str | None
    driver: str | None
    gpus: list[Gpu] | None
    device: str | None
    model: str | None
    cycles: int | None
    framework: Framework | None
    added: list[Added] | None
    started: str
    seconds: float
    checks: list[Check]
    skipped: dict[str, str]
    program: dict[str, str] | None
    verdict: str
    schema: str = SCHEMA


def now() -> str:
    """This moment, as ``Report.started`` wants it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def verdict(
    checks: Sequence[Check], expected: Collection[str] = (), skipped: Collection[str] = ()
) -> str:
    """``proved``, ``in-part``, ``failed`` or ``unproved``.

    A check named in ``expected`` that neither ran nor was ``skipped`` leaves the whole unproved:
    silence is no proof. Where something was skipped the whole is proved in part.
    """
    if any(check.status == "failed" for check in checks):
        return "failed"
    complete = set(expected) <= {check.name for check in checks} | set(skipped)
    if checks and complete and all(check.status == "passed" for check in checks):
        return "in-part" if skipped else "proved"
    return "unproved"


def exit_code(outcome: str) -> int:
    """The exit code of a verdict: 0 proved and in part, 1 failed, 3 unproved (else KeyError)."""
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
    """Write a report as :func:`save` does."""
    save(path, document(report))


def save(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; Problem (code 3) where that is no longer possible."""
    text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
    try:
        if _special(path):  # such as /dev/stdout: nothing there that could be replaced
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise _unwritable(path, error, 3) from None


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


def _unwritable(path: Path, error: OSError, code: int = 2) -> Problem:
    return Problem(f"The report cannot be written to {path}: {error.strerror}.", code)


def _finite(value: Any) -> Any:
    # JSON has no infinity. A name is kept rather than null: "inf" tells how far off a run was.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def content(path: Path) -> bytes:
    """The bytes of a file of the size of a report, from a plain file alone.

    Raises:
        ValueError: it is something else; the message says what, as a clause.
    """
    try:
        # Neither to follow a link out of the folder, nor to wait for who writes into a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("is a link; put the file itself there") from None
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise ValueError("is no name of a file") from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("is no plain file")
        if about.st_size > LARGEST:
            raise ValueError(f"has {about.st_size:,} bytes, more than the {LARGEST:,} it may have")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(LARGEST)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def parse_json(data: bytes) -> object:
    """The JSON value that bytes hold, of no more depth and no other numbers than a report has.

    Raises:
        ValueError: they hold none; the message says why, as a clause.
    """
    try:
        found: object = json.loads(
            data.decode(), parse_constant=_no_number, object_pairs_hook=_once
        )
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, line {error.lineno})") from None
    except _Odd as error:
        raise ValueError(str(error)) from None
    except ValueError:  # a number of more digits than Python reads
        raise ValueError("holds a number that is none") from None
    wrong = _strange(found)
    if wrong:
        raise ValueError(wrong)
    return found


class _Odd(ValueError):
    """What JSON of ours never holds."""


def _no_number(name: str) -> object:
    raise _Odd(f"holds {name}, which is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Odd(f"says {shown(name)} twice")
    return found


def _strange(value: object) -> str:
    """What a parsed value has that no report of ours has, as a clause; empty if nothing."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            if depth == _DEEPEST:
                return "is nested too deeply"
            inside = [*item, *item.values()] if isinstance(item, dict) else item
            waiting += [(one, depth + 1) for one in inside]
        elif isinstance(item, str):
            if len(item) > _LONGEST:
                return f"holds a text of {len(item):,} characters"
            try:
                item.encode()
            except UnicodeEncodeError:
                return "holds half a character (a lone surrogate)"
        elif isinstance(item, float) and not math.isfinite(item):
            return "holds a number that is none"
        elif isinstance(item, int) and abs(item) > 1 << 63:
            return "holds a number of more than 64 bits"
    return ""


def shown(value: object) -> str:
    """A value of a report as a sentence can hold it: short, and nothing that a terminal obeys."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # an integer of thousands of digits has no text
        return "something without end"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


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

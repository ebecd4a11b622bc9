"""A report that somebody else wrote: held against the published schema, and judged beyond it.

What a report may hold stands once, in images/proofs/rollout-report.schema.json. What no schema says
is done by hand: the size of the file and what kind of file it is, its encoding, a key that is there
twice, a number that is none (all in rollout.report), and whether checks and verdict agree.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators

from images.catalog import ROOT
from rollout import report
from rollout.report import shown

SCHEMA = ROOT / "images" / "proofs" / "rollout-report.schema.json"

_MOST = 20  # sentences about one report; a file that is all wrong has a hundred thousand
_TYPES = {"object": "an object", "array": "a list", "string": "a text", "null": "null"}


def read(path: Path) -> dict[str, Any]:
    """The report in a file.

    Raises:
        ValueError: it is none; the message says why, as a clause that begins with a verb.
    """
    return parse(report.content(path))


def parse(data: bytes) -> dict[str, Any]:
    """The report that bytes hold, whoever sent them.

    Raises:
        ValueError: they hold none; the message says why, as a clause.
    """
    found = report.parse_json(data)
    wrong = next(_wrong(found), "")  # the first alone: what is left may be long
    if wrong:
        raise ValueError(f"is no report: {wrong}")
    parsed: dict[str, Any] = found  # type: ignore[assignment]
    return parsed


def validate(data: object) -> list[str]:
    """What is wrong with a parsed report, one sentence each and the key first; empty if nothing.

    Twenty sentences at most.
    """
    return list(dict.fromkeys(islice(_wrong(data), _MOST)))


def _wrong(data: object) -> Iterator[str]:
    sound = True
    for error in _validator().iter_errors(data):
        sound = False
        yield from _sentences(error)
    if sound:
        yield from _contradictions(data)


@cache
def _validator() -> Any:
    formats = FormatChecker(formats=())  # its own need packages that nobody installs here
    formats.checks("line")(_is_line)
    formats.checks("date-time", raises=(ValueError, OverflowError))(_is_moment)
    # JSON Schema takes 4.0 for an integer. No run counts like that.
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: _is_count(value))
    kind = validators.extend(Draft202012Validator, type_checker=types)
    return kind(json.loads(SCHEMA.read_text(encoding="utf-8")), format_checker=formats)


def _is_line(value: object) -> bool:
    """Whether it neither ends a row of a table nor commands a terminal; no pattern says that."""
    return not isinstance(value, str) or value.isprintable()


def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sentences(error: ValidationError) -> list[str]:
    """What an error of the schema says to people."""
    where = _place(error)
    inside = f"{where}." if where else ""
    if error.validator == "required":  # one error for each key, and none of them names it
        return [
            f"{inside}{key}: missing" for key in error.validator_value if key not in error.instance
        ]
    if error.validator == "additionalProperties":
        unknown = sorted(set(error.instance) - set(error.schema["properties"]))
        return [f"{inside}{_bare(key)}: unknown" for key in unknown]
    if error.validator == "type" and error.validator_value == "object":
        return [f"{where or 'report'}: not an object"]
    if error.validator in ("maxItems", "maxProperties"):
        return [f"{where}: more than {error.validator_value:,} entries"]
    return [f"{where}: {shown(error.instance)} is not {_expected(error)}"]


def _place(error: ValidationError) -> str:
    """Where it is wrong, such as ``checks[1].seconds``; empty for the report itself."""
    steps = (f"[{s}]" if isinstance(s, int) else f".{_bare(s)}" for s in error.absolute_path)
    return "".join(steps).removeprefix(".")


def _expected(error: ValidationError) -> str:
    """What should stand there: the schema has a title for all that its keywords do not say."""
    if "title" in error.schema:
        return str(error.schema["title"])
    wanted = error.validator_value
    if error.validator == "type":
        return " or ".join(
            _TYPES[name] for name in ([wanted] if isinstance(wanted, str) else wanted)
        )
    return "one of " + ", ".join([wanted] if error.validator == "const" else wanted)


def _contradictions(data: Any) -> Iterator[str]:
    """Where the checks of a report, what it skipped and its verdict do not agree."""
    names = Counter(check["name"] for check in data["checks"])
    for name, count in names.items():
        if count > 1:
            yield f"checks: {_bare(name)} is there {count} times"
    for name in sorted(set(data["skipped"]) & set(names)):
        yield f"skipped: {_bare(name)} is there, and ran"
    verdict, statuses = data["verdict"], {check["status"] for check in data["checks"]}
    if verdict in ("proved", "in-part"):
        if statuses != {"passed"}:
            yield f"verdict: {verdict}, though not every check passed"
        if (verdict == "in-part") != bool(data["skipped"]):
            yield f"verdict: {verdict}, which what was skipped contradicts"
    if (verdict == "failed") != ("failed" in statuses):
        yield f"verdict: {verdict}, which the checks contradict"


def _bare(name: str) -> str:
    """A name as a sentence can hold it: short, printable and without quotes."""
    return shown(name).strip("'")

"""What a catalog file may promise, beyond the types of its keys (images/schema.py)."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from images.schema import File, Framework, Wrong, quoted
from rollout import backends, frameworks, smoke

DEBIAN = "3.11"  # the Python of Debian 12
# What the image itself, its launcher or whoever starts it has to decide.
_RESERVED = {
    *("PATH", "HOME", "USER", "LANG", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD"),
    *("VIRTUAL_ENV", "XDG_CACHE_HOME", "ROLLOUT_PREFIX", "ROLLOUT_LAYERS"),
}


def check(file: File) -> None:
    """Hold a catalog file against every rule.

    Raises:
        Wrong: the first that it breaks, with the key.
    """
    _check_requirements(file)
    _check_days(file)
    _check_promises(file)
    _check_python(file)
    _check_elsewhere(file)
    _check_release(file)
    for variable in file.env:
        if variable in _RESERVED:
            raise _wrong(f"env.{variable}", "is not an engine's to set; remove it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise _wrong(f"env.{variable}", "is no name of a variable")


def _wrong(key: str, what: str) -> Wrong:
    return Wrong(f"key {quoted(key)} {what}")


def _check_requirements(file: File) -> None:
    """Each is one. They ask for the engine, and for the release of the framework that is named."""
    asked: dict[str, Iterable[str]] = {"requirements": file.requirements}
    name = version = ""
    if file.framework:
        name, version = canonicalize_name(file.framework.name), file.framework.version
        asked["framework.requirements"] = file.framework.requirements
        asked["framework.fits"] = [f"{name}=={release}" for release in file.framework.fits]
        asked["framework.undeclared"] = file.framework.undeclared
        asked["framework.overrides"] = file.framework.overrides
    names = set()
    for key, lines in asked.items():
        for line in lines:
            try:
                found = Requirement(line)
            except InvalidRequirement:
                raise _wrong(key, f"has {quoted(line)}, not a requirement (PEP 508)") from None
            found.name = canonicalize_name(found.name)
            names.add((key, found.name))
            own = (key, found.name) == ("framework.requirements", name)
            if own and str(found.specifier) != f"=={version}":
                what = f"asks for {found}, 'framework.version' says {version}; make them agree"
                raise _wrong(key, what)
    if file.framework and file.framework.files:
        _check_files(file.framework)
    # The distribution that carries an engine has the name of its backend.
    if ("requirements", canonicalize_name(file.backend)) not in names:
        raise _wrong("requirements", f"does not ask for the engine {file.backend!r}")


def _check_files(framework: Framework) -> None:
    """A digest as reports name it, of a framework that no wheel brings."""
    if framework.packaged:
        what = f"is of a checkout, and {framework.name} is in the image; remove it"
        raise _wrong("framework.files", what)
    if not re.fullmatch(r"[0-9a-f]{12}", framework.files):
        what = (
            f"is {quoted(framework.files)}, and no digest of 12 digits; "
            "the report of a training with the checkout names it behind 'files-'"
        )
        raise _wrong("framework.files", what)


def _check_days(file: File) -> None:
    """Nothing is resolved as of a day that is still to come: such a lock would move every day."""
    days = {"resolved-as-of": file.resolved_as_of}
    if file.framework:
        days["framework.resolved-as-of"] = file.framework.resolved_as_of
    for key, day in days.items():
        if day > datetime.datetime.now(datetime.UTC).date():
            raise _wrong(key, f"is {day}, which is still to come; name a day that is over")
    if file.framework and file.resolved_as_of > file.framework.resolved_as_of:
        what = (
            f"is {file.resolved_as_of}, later than 'framework.resolved-as-of' "
            f"({file.framework.resolved_as_of}), whose index would lack what the engine's lock "
            "has; name an earlier day, or a later one there"
        )
        raise _wrong("resolved-as-of", what)


def _check_python(file: File) -> None:
    """A Python that the base does not have comes as a file, and is the one that is named."""
    if file.interpreter is None:
        if file.python != DEBIAN:
            raise _wrong(
                "python", f"is {file.python}, and Debian 12 has {DEBIAN}; add [interpreter]"
            )
    elif file.python == DEBIAN:
        raise _wrong("interpreter", f"is given, and Debian 12 has Python {DEBIAN}; remove it")
    elif not file.interpreter.version.startswith(f"{file.python}."):
        what = f"is Python {file.interpreter.version}, 'python' says {file.python}; make them agree"
        raise _wrong("interpreter.file", what)


def _check_elsewhere(file: File) -> None:
    """Each wheel once; a sha256 with its source, and metadata with theirs, and none without."""
    names = [entry.name for entry in file.elsewhere]
    for entry in file.elsewhere:
        if names.count(entry.name) > 1:
            raise _wrong("elsewhere.name", f"has {quoted(entry.name)} twice; say it once")
        if entry.name in file.source_distributions:
            raise _wrong("elsewhere.name", f"has {quoted(entry.name)}, a source distribution too")
        for key, value, beside, source in (
            ("sha256", entry.sha256, "source", entry.source),
            ("requires", entry.requires, "requires-source", entry.requires_source),
        ):
            if bool(value) != bool(source.strip()):
                what = f"of {entry.name} has no {beside if value else key}; give both, or none"
                raise _wrong(f"elsewhere.{key}", what)
        for line in entry.requires:
            try:
                Requirement(line)
            except InvalidRequirement:
                what = f"has {quoted(line)}, not a requirement (PEP 508)"
                raise _wrong("elsewhere.requires", what) from None


def _check_release(file: File) -> None:
    """A digest with its source, or none; and a reason for what the image holds otherwise."""
    if file.release is None:
        return
    if bool(file.release.digest) != bool(file.release.source.strip()):
        beside = "source" if file.release.digest else "digest"
        raise _wrong("release", f"has no {beside}; give both digest and source, or none")
    for name, reason in file.release.otherwise.items():
        if not reason.strip():
            raise _wrong(f"release.otherwise.{name}", "gives no reason; say why it does no harm")


def _check_promises(file: File) -> None:
    """The backend can keep each promise, and what nobody can show is one, with its reason."""
    can, wanted, name = backends.abilities(file.backend), file.smoke, file.backend
    if can is None:
        raise _wrong("backend", f"is {name}, which nothing drives yet; add its module")
    several: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
        ("sleep-levels", wanted.sleep_levels, can.levels),
        ("refit", wanted.refit, can.transports),
    )
    for key, asked, kept in several:
        for value in asked:
            if asked.count(value) > 1:
                raise _wrong(f"smoke.{key}", f"has {value!r} twice; say it once")
            if value not in kept:
                choices = ", ".join(map(str, kept))
                what = f"promises {value}, and the {name} backend has {choices} alone"
                raise _wrong(f"smoke.{key}", what)
    for key in ("fp8", "lora", "server", "moe", "fp8-kv"):
        sleeps = getattr(wanted, key.replace("-", "_"))
        if sleeps and not wanted.sleep_levels:
            what = (
                "is promised, and its check puts the engine to sleep; name a level in sleep-levels"
            )
            raise _wrong(f"smoke.{key}", what)
    for key, promise, able in (
        ("fp8", wanted.fp8, can.fp8),
        ("lora", wanted.lora, can.lora),
        ("server", wanted.server, can.server),
        ("long", wanted.long, can.long),
        ("tensor-parallel", wanted.tensor_parallel, can.tensor_parallel),
        ("moe", wanted.moe, can.moe),
        ("pressure", wanted.pressure, can.pressure),
        ("disaggregated", wanted.disaggregated, can.disaggregated),
        ("fp8-kv", wanted.fp8_kv, can.fp8_kv),
    ):
        if promise and not able:
            raise _wrong(f"smoke.{key}", f"is promised, and the {name} backend has none")
    promised = (*smoke.promised(wanted.facts), *wanted.refit)
    for what, reason in file.not_shown.items():
        if what not in promised:
            near = difflib.get_close_matches(what, promised, 1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise _wrong(f"not-shown.{what}", f"is nothing that this image promises; {hint}")
        if not reason.strip():
            raise _wrong(f"not-shown.{what}", "gives no reason; say why nobody can show it")
    if wanted.training and not file.framework:
        raise _wrong("smoke.training", "needs the table [framework]; add one")
    if wanted.training and file.framework and not frameworks.trains(file.framework.name):
        what = f"is promised, and nothing starts a training of {file.framework.name}"
        raise _wrong("smoke.training", what)

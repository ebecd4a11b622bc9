"""One rule: what the reports of an image are worth today.

Nobody believes the verdict of a report. This module computes what a report is worth from what the
catalog promises, from the layers and the proof program of today, and from the checks of the report.
``prove``, ``publish``, ``verify-published``, ``matrix``, the release and the tables all ask it:

- *proved*: every promised check and transport passed, in today's layers, by today's program;
- *in part*: something promised could not run there, and the report says what and why;
- *by earlier checks*: the layers are today's; what a check asks has changed since, or is new;
- *stale*: of other layers, or of another lock;
- *not proved yet*: no report, or one that shows something else than it should.

A report may show more than was promised: what somebody asked for by name (:func:`asked`).

Everything here is pure but for :func:`program_of`, which reads the sources of the proof program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from images.catalog import Image
from rollout import frameworks, program, smoke, verify
from rollout.checks import rate

PROVED, IN_PART, EARLIER = "proved", "in part", "by earlier checks"
STALE, UNPROVED = "stale", "not proved yet"
# What every program that ever wrote a report has run: without them a report proves nothing.
CORE = (
    *("files", "distributions", "libraries", "compilers", "imports"),
    *("start", "refit", "generation", "multi-turn", "partial-rollout", "cycle"),
)
# The reason for what a report does not have, where it does not say which program wrote it.
NOT_ASKED = "not asked for then, or it could not run"
ENVIRONMENT = Path("/opt/rollout")  # inside every image
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Today:
    """An image as it is now: what a report of it has to name, and to show."""

    reference: str
    lock_sha256: str
    engine: tuple[str, str]  # name and version
    torch: str
    framework: tuple[str, str] | None  # name and version of what trains in it
    layers: tuple[str, ...] | None  # below our own package; None where none are recorded as yet
    checks: tuple[str, ...]  # promised by the catalog
    transports: tuple[str, ...]
    program: Mapping[str, str]  # check -> identity of what decides its result
    not_shown: Mapping[str, str] = field(default_factory=dict)  # and why nobody can show it
    above: int = 0  # how many of these layers stand above the engine: the framework's
    brought: bool = False  # whether the framework's own code comes as a checkout

    @property
    def engine_layers(self) -> tuple[str, ...] | None:
        """The layers that decide what the engine is; None where none are recorded as yet."""
        return None if self.layers is None else self.layers[: len(self.layers) - self.above]


@dataclass(frozen=True)
class Standing:
    """What a report is worth: one of the five words, and a sentence that says why."""

    word: str
    sentence: str
    missing: Mapping[str, str] = field(default_factory=dict)  # promised and not shown, with reasons
    since: str = ""  # the day of a proof by earlier checks
    outgrown: Collection[str] = ()  # of what is asked for by name, the checks that changed since

    @property
    def good(self) -> bool:
        """Whether it shows something of the layers of today."""
        return self.word in (PROVED, IN_PART, EARLIER)


@cache
def _sources() -> program.Sources:
    return program.Sources()


def verified(image: Image) -> list[str]:
    """The checks of ``rollout verify`` in an image."""
    return verify.available({"backend": image.backend, "framework": image.framework})


def asked(image: Image) -> tuple[str, ...]:
    """The checks that an image has for whoever asks by name, and does not promise.

    A framework that is on no index trains from a checkout of the user's: nobody can promise it of
    the image alone, and a kept report may show it.
    """
    framework = image.framework
    if framework is None or framework.packaged or image.smoke.training:
        return ()
    return (smoke.TRAINING,) if frameworks.trains(framework.name) else ()


def facts_of(image: Image) -> dict[str, Any]:
    """What the smoke test of an image may run: "smoke" in its image.json, and what is asked for."""
    return {**image.smoke.facts, **dict.fromkeys(asked(image), True)}


def program_of(image: Image) -> dict[str, str]:
    """The identity of today's proof program, as an image of this catalog file has it."""
    facts = facts_of(image)
    return program.identity(
        image.backend,
        verified(image),
        smoke.promised(facts),
        program.settings(facts),
        framework=image.framework.name if image.framework else "",
        sources=_sources(),
    )


def promised(image: Image) -> tuple[str, ...]:
    """The checks that a proof of an image consists of, in their order."""
    return (*verified(image), *smoke.promised(image.smoke.facts))


def _passed(report: Report) -> set[str]:
    return {check["name"] for check in report["checks"] if check["status"] == "passed"}


def _skipped(report: Report) -> dict[str, str]:
    """What a report says could not run there, with the reason: left out, or begun in vain."""
    begun = {
        check["name"]: " ".join(check["reason"].split())
        for check in report["checks"]
        if check["status"] == "unproved"
    }
    return {**report["skipped"], **begun}


def sent_by(report: Report, transports: Sequence[str]) -> list[str]:
    """The transports by which weights arrived: each leaves its speed with the check of a refit."""
    measured = [c["metrics"] for c in report["checks"] if c["name"] == "refit"]
    return [name for name in transports if any(rate(name) in metrics for metrics in measured)]


def foreign(report: Report, today: Today) -> str:
    """Why a report is of another image than this one, as a clause; empty if it is not."""
    if report["image"] != today.reference:
        return f"is of {report['image']}, not of {today.reference}"
    engine = (report["engine"]["name"], report["engine"]["version"])
    if report["lock_sha256"] == today.lock_sha256:
        if engine != today.engine:
            return f"has the engine {' '.join(engine)}, and the lock {' '.join(today.engine)}"
        if report["torch"] != today.torch:
            return f"has torch {report['torch']}, and the lock {today.torch}"
    return _another_framework(report, today)


def _another_framework(report: Report, today: Today) -> str:
    """Why what trained is not the image's own framework, as a clause; empty if it is."""
    ran = report["framework"]
    if ran is None:
        return ""
    if today.framework is None:
        return f"trained with {ran['name']} {ran['version']}, and this image has no framework"
    if today.brought:
        if (ran["name"], ran["version"]) != today.framework:
            own = " ".join(today.framework)
            return f"trained with {ran['name']} {ran['version']}, and the image is for {own}"
        return ""
    if not Path(ran["path"]).is_relative_to(ENVIRONMENT):
        return f"trained with {ran['name']} of {ran['path']}, and not with the image's own"
    if report["lock_sha256"] == today.lock_sha256 and (
        (ran["name"], ran["version"]) != today.framework
    ):
        own = " ".join(today.framework)
        return f"trained with {ran['name']} {ran['version']}, and the image has {own}"
    return ""


def outdated(report: Report, today: Today) -> str:
    """Why a report is not of the engine layers of today, as a clause; empty if it is."""
    engine = today.engine_layers
    if report["lock_sha256"] != today.lock_sha256 and not today.above:
        return "is of another lock"
    if engine is None:
        return "is of layers that are not recorded for today's inputs"
    below_ours = tuple(report["layers"][:-1])
    if below_ours[: len(engine)] != engine or (not today.above and below_ours != engine):
        return "is of other layers"
    return ""


def regrown(report: Report, today: Today) -> bool:
    """Whether the layer above the engine, the framework's, is another one than in a report.

    The engine is to the byte what it was, and was asked the same. The rest of the environment is
    not, nor is what trains in it.
    """
    below_ours = tuple(report["layers"][:-1])
    return report["lock_sha256"] != today.lock_sha256 or below_ours != today.layers


def unfinished(report: Report) -> str:
    """Why a report shows no proof whatever was promised, as a clause; empty if it may."""
    names = [check["name"] for check in report["checks"] if check["status"] == "failed"]
    if names:
        return f"says that {', '.join(names)} failed"
    model, cycles = report["model"], report["cycles"]
    if model is not None and not model.startswith("probe "):
        return f"is of the model {model}, and the proof is of the probe"
    if cycles is not None and cycles < smoke.CYCLES:
        return f"slept {cycles} times, and growth shows after {smoke.CYCLES}"
    return ""


def judge(report: Report | None, today: Today) -> Standing:
    """What a valid report (rollout.report) is worth; None stands for no report."""
    if report is None:
        return Standing(UNPROVED, "there is no report")
    other = foreign(report, today) or unfinished(report)
    if other:
        return Standing(UNPROVED, f"its report {other}")
    old = outdated(report, today)
    if old:
        return Standing(STALE, f"its report {old}")
    return _shown(report, today)


def _shown(report: Report, today: Today) -> Standing:
    passed, skipped = _passed(report), _skipped(report)
    known = report["program"] or {}
    missing = [name for name in today.checks if name not in passed]
    more = [n for n in today.program if n in passed and n not in today.checks]
    outgrown = tuple(n for n in more if known.get(n) != today.program[n])
    ways = sent_by(report, today.transports)
    unsent = [name for name in today.transports if name not in ways]
    lost = [name for name in CORE if name in today.checks and name not in passed]
    # A check of the report's own program that neither passed nor was skipped is withheld.
    lost += [n for n in missing if known.get(n) == today.program[n] and n not in (*skipped, *lost)]
    if known.get("refit") == today.program["refit"]:
        lost += [name for name in unsent if name not in skipped]
    if lost:
        return Standing(UNPROVED, f"its report lacks {listed(lost)}, and does not say why")
    if not ways:
        return Standing(UNPROVED, "its report shows no transport that the catalog promises")
    without = {name: skipped.get(name, NOT_ASKED) for name in (*missing, *unsent)}
    tail = f"; not shown: {reasons(without)}" if without else ""
    changed = [n for n in today.checks if n not in skipped and known.get(n) != today.program[n]]
    other = ""
    if regrown(report, today):
        other = "what stands above the engine is another today"
    elif changed:
        which = "all of them" if len(changed) == len(today.checks) else listed(changed)
        other = f"changed since: {which}"
    if other:
        day = report["started"][:10]
        said = f"by the checks of {day}; {other}{tail}"
        return Standing(EARLIER, said, without, day, outgrown)
    if without:
        return Standing(IN_PART, f"all but {reasons(without)}", without, outgrown=outgrown)
    return Standing(PROVED, "every promised check and transport passed", outgrown=outgrown)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: the first few, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def reasons(without: Mapping[str, str]) -> str:
    """What is not shown, in a sentence, with the reasons."""
    return ", ".join(f"{name} ({why})" for name, why in without.items())


def publishable(found: Standing, today: Today) -> str:
    """Why an image of this standing is not published, as a clause; empty if it is.

    One that is proved in part is published where the catalog says why nobody can show the rest.
    """
    if found.word == PROVED:
        return ""
    silent = [name for name in found.missing if name not in today.not_shown]
    if found.word == IN_PART and not silent:
        return ""
    said = f"{found.word}: {found.sentence}" if found.word != UNPROVED else found.sentence
    if found.word == IN_PART:
        return f"{said}; [not-shown] of the catalog has no reason for {listed(silent)}"
    return said


def of_fault(report: Report, today: Today, check: str) -> str:
    """What a run with an injected fault, found by this check, is worth today; empty if all."""
    if foreign(report, today) or outdated(report, today):
        return STALE
    if check == smoke.TRAINING and regrown(report, today):
        return EARLIER
    known = (report["program"] or {}).get(check)
    return "" if known is not None and known == today.program.get(check) else EARLIER


# What is kept beside a report ---------------------------------------------------------------------


def no_second_start(again: Report, first: Report) -> str:
    """Why a report shows no start whose cache an earlier one had filled; empty if it does."""
    if again["layers"] != first["layers"]:
        return "is of other layers than the first start"
    if again["started"] == first["started"]:
        return "is of the first start itself"
    starts = []
    for one in (first, again):
        found = [c for c in one["checks"] if (c["name"], c["status"]) == ("start", "passed")]
        if not found:
            return "shows no start that passed"
        starts.append(found[0]["metrics"].get("cache_files_added"))
    before, after = starts
    if not isinstance(before, int) or not isinstance(after, int):
        return "does not say what a start adds to the cache"
    # On a CPU nothing is compiled, and neither start adds a file.
    if after > before or (after == before and before):
        return f"adds {after} files to the cache, as a first start does ({before})"
    return ""


def no_calibration(data: Mapping[str, Any], today: Today, versions: Mapping[str, str]) -> str:
    """Why a calibration is of another image or machine than this one's; empty if it is not.

    ``versions`` are those of the lock.
    """
    named = data.get("lock_sha256")
    if named is not None and named != today.lock_sha256:
        return "is of another lock"
    device = "cpu" if today.torch.endswith("+cpu") else "cuda"
    if data["device"] != device:
        return f"was measured on {data['device']}, and this image runs on {device}"
    # A build of torch names its CUDA inside the image; in the lock it need not.
    for name, wanted in (("torch", today.torch), ("transformers", versions.get("transformers"))):
        found = str(data[name])
        if wanted is None or found.partition("+")[0] != wanted.partition("+")[0]:
            return f"has {name} {found}, and the lock {wanted}"
    return ""

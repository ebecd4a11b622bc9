"""Second station: from a catalog file to a lock.

A lock is ``uv pip compile`` output in requirements form: exact versions, the sha256 of the one file
that the platform installs, and no index address, so it works with any mirror and the hash alone
decides what is genuine. That file is a wheel, but for what ``[source-distributions]`` names.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from images import catalog, host
from images.catalog import ROOT, Image, shown
from images.locking import base
from images.schema import quoted
from rollout.problem import Problem

# glibc of Debian 12, the base image: wheels that need a newer one would not load there.
PLATFORM = "x86_64-manylinux_2_36"
DEV_LOCK = ROOT / "lockfiles" / "dev.lock"
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==(\S+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?: \\)?$")


# The first line of the second part of a lock: what stands above the engine. Installers skip it.
ABOVE = "# Above the engine: "
# What every image has above its engine, beside the framework: users add packages with it.
TOOLS = ("pip",)


_UNDATED = re.compile(r"^warning: `([^`]+)` is missing an upload date", re.MULTILINE)


class Unanswered(Problem):
    """The package index could not say what it had on a day; the lock may be right all the same."""


@dataclass(frozen=True)
class Locked:
    """One distribution of a lock; ``above`` the engine are the framework and what it needs."""

    name: str
    version: str
    sha256: str
    above: bool = False

    @property
    def text(self) -> str:
        """The requirement in pip's form, hash included."""
        return f"{self.name}=={self.version} \\\n    --hash=sha256:{self.sha256}\n"


def versions(locked: Iterable[Locked]) -> dict[str, str]:
    """The version of each distribution, by its name."""
    return {entry.name: entry.version for entry in locked}


def parse(text: str, path: Path) -> list[Locked]:
    """The distributions of a lock, in file order.

    Raises:
        Problem: a line that is not ``uv pip compile`` output, named by file and line.
    """
    found: list[Locked] = []
    name = version = ""
    above = False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        above = above or bare.startswith(ABOVE)
        if not bare or bare.startswith("#"):
            continue
        pinned, hashed = _PINNED.match(bare), _HASH.search(bare)
        if pinned and not name:
            name, version = pinned[1], pinned[2]
        elif hashed and name:
            found.append(Locked(canonicalize_name(name), version, hashed[1], above))
            name = ""
        else:
            where = f"{shown(path)}, line {number}"
            lacking = f"{quoted(name)} has no sha256"
            what = lacking if name and pinned else f"cannot read {quoted(bare)}"
            raise Problem(f"{where}: {what}; remake it with 'nox -s lock'", 2)
    if name:
        raise Problem(
            f"{shown(path)}: {quoted(name)} has no sha256; remake it with 'nox -s lock'", 2
        )
    return found


def read(image: Image) -> list[Locked]:
    """The lock of an image, held against what its catalog file claims.

    Raises:
        Problem: the lock is missing, malformed, or contradicts a key of ``[expect]``.
    """
    if not image.lock.exists():
        command = f"nox -s lock -- {image.reference}"
        raise Problem(f"{shown(image.lock)} does not exist; make it with '{command}'", 2)
    locked = parse(catalog.text(image.lock, "restore it from git"), image.lock)
    contradictions = claims_broken(image, versions(locked))
    if contradictions:
        raise Problem(f"{shown(image.path)}: " + "; ".join(contradictions), 2)
    return locked


def claims_broken(image: Image, versions: Mapping[str, str]) -> list[str]:
    """What a lock contradicts of a catalog file, each as a clause of a sentence."""
    broken = []
    for key, claim in image.expect.items():
        locked = cuda(versions) if key == "cuda" else versions.get(canonicalize_name(key))
        if locked != claim:
            broken.append(f"key 'expect.{key}' says {claim}, the lock has {locked or 'none'}")
    for name in sorted(image.sources):
        if name not in versions:
            broken.append(f"key 'source-distributions.{name}' is not in the lock; remove it")
    if image.framework:
        for name in image.framework.left_out:
            if name in versions:
                broken.append(f"key 'framework.left-out.{name}' is in the lock; remove the key")
    return broken


def cuda(versions: Mapping[str, str]) -> str | None:
    """The CUDA release (major.minor) of a lock, read off the runtime wheel that torch pins."""
    # The suffixed name first: it is torch's. Beside it the plain one is the toolchain's (nvcc).
    for name in ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime"):
        if name in versions:
            return ".".join(versions[name].split(".")[:2])
    return None


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


@dataclass(frozen=True)
class Question:
    """What uv is asked to resolve.

    A day of None is today. ``pins`` are versions that must not move. ``overrides`` stand in the
    place of what anything asks of these distributions. Of ``sources`` the source distribution is
    taken, of all others a wheel.
    """

    python: str
    resolved_as_of: datetime.date | None
    requirements: tuple[str, ...]
    sources: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def engine_question(image: Image) -> Question:
    """The engine and what it needs, as of its own day."""
    return Question(
        image.python,
        image.resolved_as_of,
        image.requirements,
        tuple(image.source_distributions),
    )


def above_question(image: Image, engine: Sequence[Locked]) -> Question:
    """The framework and the tools beside an engine, none of whose pins may move."""
    pins = tuple(f"{entry.name}=={entry.version}" for entry in engine)
    framework = image.framework
    if framework is None:
        wanted = (*image.requirements, *TOOLS)
        day, sources = image.resolved_as_of, tuple(image.source_distributions)
        return Question(image.python, day, wanted, sources, pins)
    # A marker that holds nowhere: uv then takes neither the distribution nor what it alone needs.
    nowhere = tuple(f"{name} ; sys_platform == 'nowhere'" for name in framework.left_out)
    return Question(
        image.python,
        framework.resolved_as_of,
        (*image.requirements, *framework.requirements, *framework.undeclared, *TOOLS),
        tuple(sorted(image.sources)),
        pins,
        (*framework.overrides, *nowhere),
    )


def release_question(question: Question, image: Image, release: str) -> Question:
    """Whether a release of the framework takes the engine, by its own metadata; of any day."""
    framework = image.framework
    if framework is None:
        raise ValueError(f"{image.reference} has no framework")
    extra = f"[{framework.extra}]" if framework.extra else ""
    wanted = (f"{framework.name}{extra}=={release}",)
    return replace(question, requirements=wanted, resolved_as_of=None)


def compile_argv(
    uv: str, question: Question, folder: Path, output: Path, extra: Sequence[str]
) -> list[str]:
    """One resolution as a command line; :func:`_ask` writes the files it names in ``folder``."""
    pins = ["--constraints", str(folder / "pins.txt")] if question.pins else []
    overrides = ["--overrides", str(folder / "overrides.txt")] if question.overrides else []
    day = question.resolved_as_of
    limit = ["--exclude-newer", day.isoformat()] if day else []
    return [
        # Not --quiet: of a file that is left out for want of an upload time only a warning tells.
        *(uv, "pip", "compile", "--no-progress", "--no-header", "--no-config"),
        *("--python-version", question.python, "--python-platform", PLATFORM),
        *limit,
        # A source distribution runs code of its own to build: only what the catalog file names may.
        # The image builds it. Here uv reads the metadata that lies in it, and builds only where
        # that is not all there: in isolation, with tools that no lock has.
        *("--only-binary", ":all:"),
        *(word for name in question.sources for word in ("--no-binary", name)),
        *pins,
        *overrides,
        *("--generate-hashes", "--output-file", str(output)),
        *extra,
        str(folder / "requirements.in"),
    ]


@cache
def _tags(python: str) -> dict[Tag, int]:
    """Wheel tags that the platform takes, each with its rank: 0 is the most specific."""
    version = tuple(int(part) for part in python.split("."))
    glibc = int(PLATFORM.rpartition("_")[2])
    platforms = []
    for minor in range(glibc, 4, -1):
        platforms.append(f"manylinux_2_{minor}_x86_64")
        old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}.get(minor)
        platforms += [f"{old}_x86_64"] if old else []
    platforms.append("linux_x86_64")
    wanted = [
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(
            version, interpreter=f"cp{''.join(python.split('.'))}", platforms=platforms
        ),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(wanted)))}


def best(wheels: Sequence[Mapping[str, Any]], python: str) -> Mapping[str, Any]:
    """Of the files of one release the one that an installer takes: the most specific tag.

    Some releases have two for one platform: for an older and a newer glibc, or with and without
    compiled parts.
    """
    tags = _tags(python)

    def rank(wheel: Mapping[str, Any]) -> int:
        name = wheel.get("name") or unquote(wheel["url"].rpartition("/")[2])
        return min(tags.get(tag, len(tags)) for tag in parse_wheel_filename(name)[3])

    return min(wheels, key=rank)


def locked_file(package: Mapping[str, Any], python: str) -> Mapping[str, Any]:
    """The one file of a release that is locked.

    uv gives no wheels for what it may not take as a wheel, and no source for everything else.
    """
    found: Mapping[str, Any] = (
        best(package["wheels"], python) if "wheels" in package else package["sdist"]
    )
    return found


def keep_hashes(text: str, chosen: set[str]) -> str:
    """Drop the hashes of files that the image does not install (other systems, sources)."""
    lines: list[str] = []
    for line in text.splitlines():
        hashed = _HASH.search(line)
        if hashed and hashed[1] not in chosen:
            continue
        lines.append(line.removesuffix(" \\") if hashed else line)
    return "\n".join(lines) + "\n"


def header(command: str, facts: str) -> str:
    """The first lines of a generated lock."""
    return f"# GENERATED by '{command}'; do not edit.\n# {facts}\n"


def resolve(image: Image) -> str:
    """The text of the lock of an image, as the index has it today.

    First the engine, then what stands above it with every pin of the engine held: so the same
    engine has the same first part, and its layers the same bytes, whatever trains beside it.

    Raises:
        Problem: nothing satisfies the requirements, or the index cannot be reached.
    """
    below = _ask(image, engine_question(image))
    engine = parse(below, image.lock)
    question = above_question(image, engine)
    whole = _ask(image, question)
    lost = {entry.name for entry in engine} - {entry.name for entry in parse(whole, image.lock)}
    if lost:
        names = ", ".join(sorted(lost))
        what = f"the framework's overrides take {names} from the engine"
        raise Problem(f"{shown(image.path)}: {what}; change [framework]", 2)
    added = _blocks(whole).items() - _blocks(below).items()
    names_below = {entry.name for entry in engine}
    more = "".join(text for name, text in sorted(added) if name not in names_below)
    facts = f"Python {image.python}, {PLATFORM}, resolved as of {image.resolved_as_of}"
    for release in image.framework.fits if image.framework else ():
        try:
            _ask(image, release_question(question, image, release), forms=("requirements.txt",))
        except Unanswered:  # which says nothing of the release
            raise
        except Problem as problem:
            what = f"key 'framework.fits' has {release}, which does not: {problem.sentence}"
            raise Problem(f"{shown(image.path)}: {what}", 2) from None
    title = f"{ABOVE}resolved as of {question.resolved_as_of}, no pin of the engine moved.\n"
    return header(f"nox -s lock -- {image.reference}", facts) + below + title + more


def _blocks(text: str) -> dict[str, str]:
    """The text of each distribution of a lock, comments below it included, by its normal name."""
    blocks: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        pinned = _PINNED.match(line)
        name = canonicalize_name(pinned[1]) if pinned else name
        blocks[name] = blocks.get(name, "") + line
    return blocks


# Twice from one cache: pylock.toml names the files that fit the platform, and the requirements form
# says which distribution wanted which.
_FORMS = ("pylock.toml", "requirements.txt")


def _ask(image: Image, question: Question, forms: Sequence[str] = _FORMS) -> str:
    """What uv answers: pins with the hash of the one file that the platform takes, no header.

    Raises:
        Problem: nothing satisfies the question, or the index cannot be reached.
    """
    environ = host.uv_environment(os.environ)
    extra = torch_arguments(image.requirements, environ)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, lines in (
            ("requirements.in", question.requirements),
            ("pins.txt", question.pins),
            ("overrides.txt", question.overrides),
        ):
            (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        texts = []
        for file in forms:
            argv = compile_argv(host.uv(), question, folder, folder / file, extra)
            done = host.run(argv, quiet=True, env={**os.environ, **environ}, check=False)
            undated = _UNDATED.search(done.stderr)
            if undated:  # also where something else was taken in its place
                what = f"the package index gives no upload time of {undated[1]}"
                why = f"{what}, so nobody can say what it had on a day"
                raise Unanswered(f"{image.reference} cannot be resolved: {why}")
            if done.returncode:
                kind = Unanswered if _unreached(done.stderr) else Problem
                raise kind(f"{image.reference} cannot be resolved: {_reason(done.stderr)}")
            texts.append((folder / file).read_text(encoding="utf-8"))
    if "pylock.toml" not in forms:
        return texts[-1]
    packages = tomllib.loads(texts[0])["packages"]
    chosen = {locked_file(package, image.python)["hashes"]["sha256"] for package in packages}
    # uv's "via" comments name the temporary input files.
    body = re.sub(r"-r \S*requirements\.in", shown(image.path), texts[1])
    body = re.sub(r" *# +-c \S*pins\.txt\n", "", body)
    body = re.sub(r"--override \S*overrides\.txt", f"{shown(image.path)}, [framework]", body)
    return keep_hashes(body, chosen)


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
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "dev.lock"
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
    return header("nox -s lock -- dev", "Python 3.11 or newer, any system") + body


def drift(path: Path, text: str) -> str:
    """A unified diff from the file to the text that it should hold; empty where they agree."""
    current = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(
        current.splitlines(keepends=True),
        text.splitlines(keepends=True),
        f"{shown(path)} (committed)",
        f"{shown(path)} (resolved now)",
    )
    return "".join(lines)


def check(images: Sequence[Image]) -> list[str]:
    """Resolve again and compare; what is returned are the diffs of the locks that drifted."""
    diffs = []
    for image in images:
        read(image)
        difference = drift(image.lock, resolve(image))
        if difference:
            diffs.append(difference)
    return diffs


def main(arguments: Sequence[str]) -> int:
    """``nox -s lock [-- REF … | base | dev | --check]``."""
    parser = argparse.ArgumentParser(prog="nox -s lock --", description="Resolve or check locks.")
    parser.add_argument("refs", nargs="*", metavar="REF", help="an image, 'base' or 'dev'")
    parser.add_argument("--check", action="store_true", help="resolve again and compare")
    parser.add_argument("--snapshot", metavar="DATE", help="base: Debian as of 20260101T000000Z")
    given = parser.parse_args(list(arguments))
    images = catalog.load()
    chosen = [catalog.find(n, images) for n in given.refs if n not in ("base", "dev")]
    if not given.refs:
        chosen = images
    dev = not given.refs or "dev" in given.refs
    if given.check:
        diffs = check(chosen) + ([drift(DEV_LOCK, resolve_dev())] if dev else [])
        if not given.refs or "base" in given.refs:
            base.check()
        sys.stdout.write("".join(diffs))
        if any(diffs):
            raise Problem("locks have drifted (diff above); remake them with 'nox -s lock'")
        host.say("locks are what their inputs resolve to")
        return 0
    for image in chosen:
        text = resolve(image)
        found = versions(parse(text, image.lock))
        broken = claims_broken(image, found)
        if broken:
            raise Problem(f"{shown(image.path)}: " + "; ".join(broken), 2)
        host.write(image.lock, text)
        host.say(f"{shown(image.lock)}: {len(found)} distributions")
    if dev:
        host.write(DEV_LOCK, resolve_dev())
        host.say(shown(DEV_LOCK))
    # Only when asked for: Debian's archive moves on, and a lock of it cannot be made again by date
    # without a snapshot.
    if "base" in given.refs:
        base.relock(snapshot=given.snapshot)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

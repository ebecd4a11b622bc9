"""First station: the catalog, one TOML file for each released image.

``images/catalog/<repository>/<tag>.toml`` is the only hand-written place for a version, with the
fragments that it takes by name (``use``): what several images say alike stands there once. What a
file may say is in images/schema.py and images/rules.py.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from images import rules, schema
from images.schema import File, Part, Wrong, quoted
from rollout import report
from rollout.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
CATALOG = ROOT / "images" / "catalog"
RECIPES = ROOT / "images" / "recipes"  # what builds read: the Dockerfile, scripts, their rules
FRAGMENTS = "fragments"  # the folder of the catalog that holds no images
DEFAULT = "verl-rollout:transformers-cpu"
GZIP = "-gzip"  # behind the tags of what is published with layers of gzip
UNPROVED = "-unproved"  # behind the tags of what is published without a proof
# What a registry takes: a repository in small letters, a tag of at most 128 characters.
_REPOSITORY = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Image(File, frozen=True, kw_only=True):
    """One released image, as its catalog file states it together with its fragments."""

    path: Path

    @property
    def repository(self) -> str:
        return self.path.parent.name

    @property
    def tag(self) -> str:
        return self.path.stem

    @property
    def reference(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def engine(self) -> str:
        """The distribution that carries the engine: each backend has its name."""
        return self.backend

    @property
    def fragments(self) -> tuple[Path, ...]:
        """The files of the fragments that it takes, in their order."""
        return tuple(_fragments(self.path) / f"{name}.toml" for name in self.use)

    @property
    def sources(self) -> frozenset[str]:
        """All distributions of this image that exist as source alone."""
        framework = self.framework.source_distributions if self.framework else {}
        return frozenset(self.source_distributions) | frozenset(framework)

    @property
    def lock(self) -> Path:
        return ROOT / "lockfiles" / self.repository / f"{self.tag}.lock"

    @property
    def debs(self) -> Path:
        """The lock of its Debian packages, where it needs more than the base has."""
        return self.lock.with_suffix(".debs")

    @property
    def files(self) -> tuple[Path, ...]:
        """What an image is made from, of this checkout: what a person writes, and the lock."""
        return (self.path, *self.fragments, self.lock, self.dockerfile)

    @property
    def dockerfile(self) -> Path:
        return RECIPES / "Dockerfile"


def _fragments(path: Path) -> Path:
    """The folder of the fragments that a catalog file or a fragment can take."""
    return path.parent.parent / FRAGMENTS


def shown(path: Path) -> str:
    """A path as people know it: relative to the checkout where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def text(path: Path, remedy: str) -> str:
    """The text of a file of ours; ``remedy`` is what to do where it is none.

    Raises:
        Problem: exit code 2 where it is no plain file, too large, or no UTF-8.
    """
    try:
        return report.content(path).decode()
    except UnicodeDecodeError:
        raise Problem(f"{shown(path)} is not UTF-8; {remedy}", 2) from None
    except ValueError as error:
        raise Problem(f"{shown(path)} {error}; {remedy}", 2) from None


def toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file of ours.

    Raises:
        Problem: exit code 2 where it is none.
    """
    try:
        return tomllib.loads(report.content(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{shown(path)} is not valid TOML: {error}", 2) from None
    except RecursionError:
        raise Problem(f"{shown(path)} is nested too deeply", 2) from None
    except ValueError as error:
        raise Problem(f"{shown(path)} {error}", 2) from None


def whole(path: Path) -> dict[str, Any]:
    """What a catalog file says together with its fragments, all of which ``use`` names.

    Lists of requirements are joined, the fragments' first. Every other key may be said once.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    found: dict[str, Any] = {}
    taken: list[str] = []
    _take(path, found, {}, taken)
    return {**found, "use": taken}


def _take(path: Path, found: dict[str, Any], said: dict[str, str], taken: list[str]) -> None:
    """Add a file to a table, the fragments that it uses before it, each of them once."""
    table = toml(path)
    try:
        schema.read(table, Part)
    except Wrong as wrong:
        raise Problem(f"{shown(path)}: {wrong}", 2) from None
    for name in table.pop("use", []):
        if name in taken:
            continue
        known = sorted(fragment.stem for fragment in _fragments(path).glob("*.toml"))
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise Problem(f"{shown(path)}: key 'use' names the fragment {quoted(name)}; {hint}", 2)
        taken.append(name)
        _take(_fragments(path) / f"{name}.toml", found, said, taken)
    _join(found, table, path, said)


def _join(
    table: dict[str, Any],
    more: Mapping[str, Any],
    path: Path,
    said: dict[str, str],
    prefix: str = "",
) -> None:
    """Add the keys of one file to a table; ``said`` are those that are there, with their files."""
    for key, value in more.items():
        name = prefix + key
        if isinstance(value, dict):
            _join(table.setdefault(key, {}), value, path, said, f"{name}.")
        elif key == "requirements" and isinstance(value, list) and name in said:
            table[key] = [*table[key], *value]
        elif name in said:
            what = f"key {quoted(name)} stands in {said[name]} too; say it once"
            raise Problem(f"{shown(path)}: {what}", 2)
        else:
            table[key] = value
            said[name] = shown(path)


def parse(path: Path) -> Image:
    """Read one catalog file.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    table = whole(path)
    try:
        file = schema.read(table, File)
        rules.check(file)
    except Wrong as wrong:
        raise Problem(f"{shown(path)}: {wrong}", 2) from None
    image = Image(**structs.asdict(file), path=path)
    _check_names(image)
    return image


def _check_names(image: Image) -> None:
    """Repository and tag are names that a registry takes.

    Raises:
        Problem: exit code 2, naming the file.
    """
    name, tag = image.repository, image.tag
    if name == FRAGMENTS or len(name) > 128 or not _REPOSITORY.fullmatch(name):
        what = f"the folder {name!r} is no name of a repository; use a-z, 0-9 and single . _ -"
    elif not TAG.fullmatch(tag):
        what = f"{tag!r} is no tag; use at most 128 of A-Z, a-z, 0-9, _ . -, a letter first"
    elif tag.endswith(UNPROVED):
        what = f"a tag that ends in {UNPROVED} stands for an image without a proof; rename the file"
    elif tag.endswith(GZIP):
        what = f"a tag that ends in {GZIP} stands for an image with layers of gzip; rename the file"
    else:
        return
    raise Problem(f"{shown(image.path)}: {what}", 2)


def load(catalog: Path = CATALOG) -> list[Image]:
    """All images, sorted by reference.

    Raises:
        Problem: a file that does not parse, or two files with one reference.
    """
    images: dict[str, Image] = {}
    for path in sorted(catalog.glob("*/*.toml")):
        if path.parent.name == FRAGMENTS:
            continue
        image = parse(path)
        # A registry does not tell `Verl:X` from `verl:x`, and some file systems do.
        key = image.reference.lower()
        if key in images:
            other = shown(images[key].path)
            raise Problem(f"{shown(path)} and {other} are one reference, {key}; rename one", 2)
        images[key] = image
    return [images[key] for key in sorted(images)]


def find(reference: str, images: Sequence[Image]) -> Image:
    """The image that a full (``verl-rollout:vllm-0.12``) or short (``vllm-0.12``) REF names."""
    found = [i for i in images if reference in (i.reference, i.tag)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(i.reference for i in found)
        raise Problem(f"REF {quoted(reference)} is ambiguous; say {names}", 2)
    known = [i.reference for i in images] + [i.tag for i in images]
    near = difflib.get_close_matches(reference, known, 1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(known[: len(images)])
    raise Problem(f"no image {quoted(reference)} in {shown(CATALOG)}; {hint}", 2)


def short(image: Image, images: Sequence[Image]) -> str:
    """The shortest REF that :func:`find` takes for an image: its tag where no other has that."""
    alone = [one.tag for one in images].count(image.tag) == 1
    return image.tag if alone else image.reference


def select(arguments: Sequence[str], images: Sequence[Image]) -> tuple[list[Image], list[str]]:
    """Split a session's arguments into images (REF …) and the options that follow them."""
    count = next((n for n, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    return [find(a, images) for a in arguments[:count]], list(arguments[count:])

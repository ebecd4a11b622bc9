"""First station: the catalog, one TOML file for each released image.

``images/catalog/<repository>/<tag>.toml`` is the only hand-written place for a version, with the
fragments that it takes by name (``use``): what several images say alike stands there once. Parsing
is strict, because a key that is silently ignored is a setting that somebody believes to be in
force.
"""

from __future__ import annotations

import datetime
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from rollout import backends, report, smoke
from rollout.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
CATALOG = ROOT / "images" / "catalog"
RECIPES = ROOT / "images" / "recipes"  # what builds read: the Dockerfile, scripts, their rules
FRAGMENTS = "fragments"  # the folder of the catalog that holds no images
DEFAULT = "verl-rollout:transformers-cpu"
BACKENDS = ("vllm", "sglang", "tensorrt-llm", "transformers")
FRAMEWORKS = ("verl", "roll", "open-instruct")  # whose adapter is in entrypoints/rollout/frameworks
PYTHONS = ("3.11",)  # what the base image (Debian 12) has
QUOTED = 80  # characters of a line that an error quotes
LEVELS = ("R1", "R2", "R3", "R4")  # what two builds agree in: images/proving/reproduce.py
REUSES = ("turns", "prompts")  # what a prefix cache keeps of a request that has ended
TRANSPORTS = ("shared-memory", "cuda-ipc", "cuda-ipc-flattened", "nccl", "disk")


@dataclass(frozen=True)
class Smoke:
    """What the proof of an image has to show."""

    sleep_levels: tuple[int, ...]
    refit: tuple[str, ...]
    fp8: bool = False  # a second start with weights in 8 bits, refitted from bfloat16
    server: bool = False  # the engine's own server, over HTTP
    training: bool = False  # the framework's own trainer makes steps with this engine
    tensor_parallel: int = 0  # GPUs to divide a model among, where so many are visible
    reuse: str = "turns"  # what its prefix cache keeps of a request that has ended

    @property
    def facts(self) -> dict[str, Any]:
        """As image.json has it, which decides the checks of ``rollout smoke``."""
        return {
            "sleep_levels": list(self.sleep_levels),
            "refit": list(self.refit),
            "fp8": self.fp8,
            "server": self.server,
            **({"training": True} if self.training else {}),
            **({"tensor_parallel": self.tensor_parallel} if self.tensor_parallel else {}),
            **({"reuse": self.reuse} if self.reuse != "turns" else {}),
        }


@dataclass(frozen=True)
class Framework:
    """The training framework whose runs start in an image.

    It is resolved on a day of its own, because a release that fits an engine often comes later, and
    with every pin of the engine held.
    """

    name: str
    version: str  # of the release that the proof runs
    resolved_as_of: datetime.date
    requirements: tuple[str, ...]
    # Other releases whose own metadata takes this engine: `nox -s lock` asks a resolver.
    fits: tuple[str, ...] = ()
    # The framework's extra that bounds the engine, where these releases are held against it too.
    extra: str = ""
    # What it imports and does not ask for: a requirement, with its reason.
    undeclared: Mapping[str, str] = field(default_factory=dict)
    # What the framework asks for and this image holds otherwise: a requirement, with its reason.
    overrides: Mapping[str, str] = field(default_factory=dict)
    # What it asks for and this image does not have, by its normal name, with the reason.
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Distributions of its own that exist as source alone, by their normal names.
    source_distributions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """What an image may weigh at most in a registry, in bytes."""

    compressed: int
    largest_layer: int


@dataclass(frozen=True)
class Image:
    """One released image, as its catalog file states it."""

    repository: str
    tag: str
    backend: str
    framework: Framework | None
    python: str
    resolved_as_of: datetime.date
    requirements: tuple[str, ...]
    expect: Mapping[str, str]
    env: Mapping[str, str]
    smoke: Smoke
    size: Size
    reproducible: str  # the level of images/proving/reproduce.py that two builds have to reach
    path: Path
    fragments: tuple[Path, ...] = ()  # the files that it uses, in their order
    # Libraries that something in the image could load and nothing of an engine does, with a reason.
    optional_libraries: Mapping[str, str] = field(default_factory=dict)
    # Distributions that exist as source alone, by their normal names: the image builds them.
    source_distributions: Mapping[str, str] = field(default_factory=dict)
    # What it promises and nobody can show: checks and transports, with the reason.
    not_shown: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def engine(self) -> str:
        """The distribution that carries the engine: each backend has its name."""
        return self.backend

    @property
    def sources(self) -> frozenset[str]:
        """All distributions of this image that exist as source alone."""
        framework = self.framework.source_distributions if self.framework else {}
        return frozenset(self.source_distributions) | frozenset(framework)

    @property
    def lock(self) -> Path:
        return ROOT / "lockfiles" / self.repository / f"{self.tag}.lock"

    @property
    def files(self) -> tuple[Path, ...]:
        """What an image is made from, of this checkout: what a person writes, and the lock."""
        return (self.path, *self.fragments, self.lock, self.dockerfile)

    @property
    def dockerfile(self) -> Path:
        return RECIPES / "Dockerfile"


class Key(NamedTuple):
    """A key of a catalog file."""

    kind: type  # in TOML
    required: bool
    what: str  # for docs/new-image.md


KEYS: dict[str, Key] = {
    "use": Key(list, False, "fragments to take, by name"),
    "backend": Key(str, True, "the engine, and the module that drives it"),
    "python": Key(str, True, "major and minor version; Debian 12 has one"),
    "resolved-as-of": Key(datetime.date, True, "the day whose index the engine's lock sees"),
    "requirements": Key(list, True, "what the engine's lock is resolved from, each with a reason"),
    "framework": Key(dict, False, "whose training runs in this image"),
    "expect": Key(dict, True, "versions that the lock has to have, and that the image is held to"),
    "env": Key(dict, False, "variables of the image, each with a reason"),
    "smoke": Key(dict, True, "what the proof has to show"),
    "not-shown": Key(dict, False, "a promised check or transport: why nobody can show it"),
    "size": Key(dict, True, "what it may weigh in a registry"),
    "reproducible": Key(str, True, "the level that two builds reach: R1 to R4"),
    "source-distributions": Key(
        dict, False, "distributions without a wheel: the image builds them"
    ),
    "optional-libraries": Key(dict, False, "libraries that a file asks for and nothing loads here"),
}
SMOKE_KEYS: dict[str, Key] = {
    "sleep-levels": Key(list, True, "1 (weights kept in main memory), 2 (dropped), or both"),
    "refit": Key(list, True, "transports of weights: " + ", ".join(TRANSPORTS)),
    "fp8": Key(bool, False, "a second start with weights in 8 bits"),
    "server": Key(bool, False, "the engine's own server, over HTTP"),
    "training": Key(bool, False, "the framework's own trainer makes steps; needs [framework]"),
    "tensor-parallel": Key(int, False, "GPUs to divide a model among: 2"),
    "reuse": Key(str, False, "what the prefix cache keeps of a request: turns, or prompts alone"),
}
FRAMEWORK_KEYS: dict[str, Key] = {
    "name": Key(str, True, "a framework that has an adapter: " + ", ".join(FRAMEWORKS)),
    "version": Key(str, True, "the release that is in the image"),
    "resolved-as-of": Key(datetime.date, True, "the day whose index its lock sees"),
    "requirements": Key(list, False, "what it is resolved from; by default the release itself"),
    "fits": Key(list, False, "other releases whose metadata takes this engine"),
    "extra": Key(str, False, "its extra that bounds the engine"),
    "undeclared": Key(dict, False, "what it imports and does not ask for"),
    "overrides": Key(dict, False, "what it asks for and this image holds otherwise"),
    "left-out": Key(dict, False, "what it asks for and this image does not have"),
    "source-distributions": Key(dict, False, "distributions of its own without a wheel"),
}
SIZE_KEYS: dict[str, Key] = {
    "compressed": Key(str, True, "of all layers, like '3.6 GB'"),
    "largest-layer": Key(str, True, "of the largest one"),
}
TABLE_KEYS = {"framework": FRAMEWORK_KEYS, "smoke": SMOKE_KEYS, "size": SIZE_KEYS}
_UNITS = {"MB": 10**6, "GB": 10**9}
_TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "a table",
    bool: "true or false",
    int: "a number",
    datetime.date: "a date",
}


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


def quoted(value: Any) -> str:
    """A value of a file as an error quotes it: it may be of any length."""
    if isinstance(value, str):
        return repr(value if len(value) <= QUOTED else f"{value[:QUOTED]}…")
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


def whole(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A catalog file with its fragments, and the fragments' own files.

    Lists of requirements are joined, the fragments' first. Every other key may be said once.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    found: dict[str, Any] = {}
    taken: dict[str, Path] = {}
    _take(path, path.parent.parent / FRAGMENTS, found, {}, taken)
    return found, list(taken.values())


def _take(
    path: Path, fragments: Path, found: dict[str, Any], said: dict[str, str], taken: dict[str, Path]
) -> None:
    """Add a file to a table, the fragments that it uses before it, each of them once."""
    table = toml(path)
    names = table.pop("use", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Problem(f"{shown(path)}: key 'use' must be a list of fragments' names", 2)
    for name in names:
        if name in taken:
            continue
        place = taken[name] = fragments / f"{name}.toml"
        if "/" in name or not place.is_file():
            known = sorted(fragment.stem for fragment in fragments.glob("*.toml"))
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise Problem(f"{shown(path)}: key 'use' names the fragment {quoted(name)}; {hint}", 2)
        _take(place, fragments, found, said, taken)
    _check_keys(table, KEYS, path, partly=True)
    for key, keys in TABLE_KEYS.items():
        _check_keys(table.get(key, {}), keys, path, f"{key}.", partly=True)
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
        if isinstance(value, dict) and isinstance(table.get(key, {}), dict):
            _join(table.setdefault(key, {}), value, path, said, f"{name}.")
        elif key == "requirements" and isinstance(value, list) and name in said:
            table[key] = [*table[key], *value]
        elif name in said or key in table:
            # What is a table there has no place of its own.
            other = said.get(name, "a fragment")
            raise Problem(
                f"{shown(path)}: key {quoted(name)} stands in {other} too; say it once", 2
            )
        else:
            table[key] = value
            said[name] = shown(path)


def _check_keys(
    table: Mapping[str, Any],
    keys: Mapping[str, Key],
    path: Path,
    prefix: str = "",
    *,
    partly: bool = False,
) -> None:
    for key, value in table.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else "remove it"
            raise Problem(f"{shown(path)}: unknown key {quoted(prefix + key)}; {hint}", 2)
        kind = keys[key].kind
        # A TOML datetime is a date too, but uv wants the day alone.
        if not isinstance(value, kind) or isinstance(value, datetime.datetime):
            raise Problem(
                f"{shown(path)}: key {quoted(prefix + key)} must be {_TYPE_NAMES[kind]}", 2
            )
    for key, known in keys.items():
        if known.required and not partly and key not in table:
            raise Problem(f"{shown(path)}: key {prefix + key!r} is missing; add it", 2)


def _strings(table: Mapping[str, Any], path: Path, prefix: str) -> dict[str, str]:
    for key, value in table.items():
        if not isinstance(value, str):
            raise Problem(f"{shown(path)}: key {quoted(f'{prefix}.{key}')} must be a string", 2)
    return dict(table)


def _chosen(values: Sequence[Any], known: Sequence[Any], path: Path, key: str) -> tuple[Any, ...]:
    if not values:
        raise Problem(f"{shown(path)}: key {key!r} is empty; say at least one of {known}", 2)
    for value in values:
        # True equals 1, and is no level.
        if value not in known or isinstance(value, bool):
            choices = ", ".join(str(k) for k in known)
            raise Problem(f"{shown(path)}: key {key!r} has {quoted(value)}; known are {choices}", 2)
    return tuple(values)


def _bytes(table: Mapping[str, str], path: Path, key: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) (MB|GB)", table[key])
    if not match:
        given = table[key]
        message = (
            f"{shown(path)}: key 'size.{key}' has {quoted(given)}; say it like '3.6 GB' or '450 MB'"
        )
        raise Problem(message, 2)
    return round(float(match[1]) * _UNITS[match[2]])


def parse(path: Path) -> Image:
    """Read one catalog file.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    table, fragments = whole(path)
    _check_keys(table, KEYS, path)
    _check_keys(table["smoke"], SMOKE_KEYS, path, "smoke.")
    _check_keys(table["size"], SIZE_KEYS, path, "size.")
    backend = _chosen([table["backend"]], BACKENDS, path, "backend")[0]
    names = {r.name for r in _requirements(table["requirements"], path, "requirements")}
    image = Image(
        repository=path.parent.name,
        tag=path.stem,
        backend=backend,
        framework=_framework(table["framework"], path) if "framework" in table else None,
        python=_chosen([table["python"]], PYTHONS, path, "python")[0],
        resolved_as_of=table["resolved-as-of"],
        requirements=tuple(table["requirements"]),
        expect=_strings(table["expect"], path, "expect"),
        env=_strings(table.get("env", {}), path, "env"),
        smoke=Smoke(
            _chosen(table["smoke"]["sleep-levels"], (1, 2), path, "smoke.sleep-levels"),
            _chosen(table["smoke"]["refit"], TRANSPORTS, path, "smoke.refit"),
            fp8=table["smoke"].get("fp8", False),
            server=table["smoke"].get("server", False),
            training=table["smoke"].get("training", False),
            tensor_parallel=_chosen(
                [table["smoke"].get("tensor-parallel", 0)], (0, 2), path, "smoke.tensor-parallel"
            )[0],
            reuse=_chosen([table["smoke"].get("reuse", "turns")], REUSES, path, "smoke.reuse")[0],
        ),
        size=Size(
            _bytes(table["size"], path, "compressed"), _bytes(table["size"], path, "largest-layer")
        ),
        reproducible=_chosen([table["reproducible"]], LEVELS, path, "reproducible")[0],
        path=path,
        fragments=tuple(fragments),
        optional_libraries=_strings(
            table.get("optional-libraries", {}), path, "optional-libraries"
        ),
        source_distributions=_named(table, path, "source-distributions"),
        not_shown=_strings(table.get("not-shown", {}), path, "not-shown"),
    )
    _check_names(image)
    _check_days(image)
    _check_promises(image)
    for name in image.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Problem(f"{shown(path)}: key {quoted(f'env.{name}')} is no name of a variable", 2)
    if image.smoke.training and not image.framework:
        message = f"{shown(path)}: key 'smoke.training' needs the table [framework]; add one"
        raise Problem(message, 2)
    if canonicalize_name(image.engine) not in names:
        message = f"{shown(path)}: key 'requirements' does not ask for the engine {image.engine!r}"
        raise Problem(message, 2)
    return image


# What a registry takes: a repository in small letters, a tag of at most 128 characters.
_REPOSITORY = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
UNPROVED = "-unproved"  # behind the tags of what is published without a proof
# What the image itself, its launcher or whoever starts it has to decide.
_RESERVED = {
    *("PATH", "HOME", "USER", "LANG", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD"),
    *("VIRTUAL_ENV", "XDG_CACHE_HOME", "ROLLOUT_PREFIX", "ROLLOUT_LAYERS"),
}


def _wrong(image: Image, key: str, what: str) -> Problem:
    return Problem(f"{shown(image.path)}: key {quoted(key)} {what}", 2)


def _check_names(image: Image) -> None:
    """Repository and tag are names that a registry takes, and the variables are the engine's.

    Raises:
        Problem: exit code 2, naming the file.
    """
    name, tag = image.repository, image.tag
    if name == FRAGMENTS or len(name) > 128 or not _REPOSITORY.fullmatch(name):
        what = f"the folder {name!r} is no name of a repository; use a-z, 0-9 and single . _ -"
        raise Problem(f"{shown(image.path)}: {what}", 2)
    if not _TAG.fullmatch(tag):
        what = f"{tag!r} is no tag; use at most 128 of A-Z, a-z, 0-9, _ . -, a letter first"
        raise Problem(f"{shown(image.path)}: {what}", 2)
    if tag.endswith(UNPROVED):
        what = f"a tag that ends in {UNPROVED} stands for an image without a proof; rename the file"
        raise Problem(f"{shown(image.path)}: {what}", 2)
    for variable in image.env:
        if variable in _RESERVED:
            raise _wrong(image, f"env.{variable}", "is not an engine's to set; remove it")


def _check_days(image: Image) -> None:
    """Nothing is resolved as of a day that is still to come: such a lock would move every day.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    days = {"resolved-as-of": image.resolved_as_of}
    if image.framework:
        days["framework.resolved-as-of"] = image.framework.resolved_as_of
    for key, day in days.items():
        if day > datetime.datetime.now(datetime.UTC).date():
            raise _wrong(image, key, f"is {day}, which is still to come; name a day that is over")
    if image.framework and image.resolved_as_of > image.framework.resolved_as_of:
        what = (
            f"is {image.resolved_as_of}, later than 'framework.resolved-as-of' "
            f"({image.framework.resolved_as_of}), whose index would lack what the engine's lock "
            "has; name an earlier day, or a later one there"
        )
        raise _wrong(image, "resolved-as-of", what)


def _check_promises(image: Image) -> None:
    """The backend can keep what the proof is to show.

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    can, wanted, name = backends.abilities(image.backend), image.smoke, image.backend
    if can is None:
        raise _wrong(image, "backend", f"is {name}, which nothing drives yet; add its module")
    for key, values in (("sleep-levels", wanted.sleep_levels), ("refit", wanted.refit)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise _wrong(image, f"smoke.{key}", f"has {twice[0]!r} twice; say it once")
    known: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
        ("sleep-levels", wanted.sleep_levels, can.levels),
        ("refit", wanted.refit, can.transports),
    )
    for key, asked, kept in known:
        for value in asked:
            if value not in kept:
                choices = ", ".join(map(str, kept))
                what = f"promises {value}, and the {name} backend has {choices} alone"
                raise _wrong(image, f"smoke.{key}", what)
    for key, promise, able in (
        ("fp8", wanted.fp8, can.fp8),
        ("server", wanted.server, can.server),
        ("tensor-parallel", wanted.tensor_parallel, can.tensor_parallel),
    ):
        if promise and not able:
            raise _wrong(image, f"smoke.{key}", f"is promised, and the {name} backend has none")
    promised = (*smoke.promised(wanted.facts), *wanted.refit)
    for what, reason in image.not_shown.items():
        if what not in promised:
            near = difflib.get_close_matches(what, promised, 1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise _wrong(image, f"not-shown.{what}", f"is nothing that this image promises; {hint}")
        if not reason.strip():
            raise _wrong(image, f"not-shown.{what}", "gives no reason; say why nobody can show it")


def _requirements(lines: Sequence[Any], path: Path, key: str) -> list[Requirement]:
    """Requirements as PEP 508 has them, their names normal."""
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except (InvalidRequirement, TypeError):
            message = f"{shown(path)}: key {key!r} has {quoted(line)}, not a requirement (PEP 508)"
            raise Problem(message, 2) from None
        requirement.name = canonicalize_name(requirement.name)
        found.append(requirement)
    return found


def _named(table: Mapping[str, Any], path: Path, key: str, prefix: str = "") -> dict[str, str]:
    """A table of distributions, by their normal names, each with a reason."""
    reasons = _strings(table.get(key, {}), path, prefix + key)
    return {canonicalize_name(name): reason for name, reason in reasons.items()}


def _framework(table: Mapping[str, Any], path: Path) -> Framework:
    """The table [framework].

    Raises:
        Problem: exit code 2, naming the file and the key.
    """
    _check_keys(table, FRAMEWORK_KEYS, path, "framework.")
    name = _chosen([table["name"]], FRAMEWORKS, path, "framework.name")[0]
    # Where the index has no wheel of the framework, the file names what it depends on instead.
    lines = table.get("requirements", [f"{name}=={table['version']}"])
    asked = _requirements(lines, path, "framework.requirements")
    own = [requirement for requirement in asked if requirement.name == canonicalize_name(name)]
    if own and str(own[0].specifier) != f"=={table['version']}":
        what = f"key 'framework.requirements' asks for {own[0]}, 'framework.version' says"
        raise Problem(f"{shown(path)}: {what} {table['version']}; make them agree", 2)
    fits = table.get("fits", [])
    _requirements([f"{name}=={release}" for release in fits], path, "framework.fits")
    undeclared = _strings(table.get("undeclared", {}), path, "framework.undeclared")
    _requirements(list(undeclared), path, "framework.undeclared")
    overrides = _strings(table.get("overrides", {}), path, "framework.overrides")
    _requirements(list(overrides), path, "framework.overrides")
    return Framework(
        name=name,
        version=table["version"],
        resolved_as_of=table["resolved-as-of"],
        requirements=tuple(lines),
        fits=tuple(fits),
        extra=table.get("extra", ""),
        undeclared=undeclared,
        overrides=overrides,
        left_out=_named(table, path, "left-out", "framework."),
        source_distributions=_named(table, path, "source-distributions", "framework."),
    )


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


def select(arguments: Sequence[str], images: Sequence[Image]) -> tuple[list[Image], list[str]]:
    """Split a session's arguments into images (REF …) and the options that follow them."""
    count = next((n for n, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    return [find(a, images) for a in arguments[:count]], list(arguments[count:])

"""What users added to an image: where it lies, what it is, and whether it hides what is locked.

Additions lie beside the sealed environment: in the places of ``startup.py``, where pip puts them,
and in the folders of PYTHONPATH. Whatever is found here is read from files; nothing is imported.

A module is hidden where Python would take an addition's of the same name, and an addition is of no
use where Python takes the locked one. Both are found, since both are mistakes. A folder without an
``__init__.py`` is a part of a package that several distributions may share (nvidia, google): of
such a one only what lies in it is compared. The framework's own distribution is the one that users
may replace.

    python -m rollout.added     make what Python starts with, and pip's constraints; at image build
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout import info, startup
from rollout.environment import Finding, ending, opened, printable
from rollout.installed import installed, read_lock
from rollout.problem import Problem
from rollout.report import Added

CONSTRAINTS = f"{info.SHARE}/constraints.txt"
BY_MPI = ("tensorrt-llm",)  # engines that import mpi4py: see startup.alone
STARTUP = "rollout_startup"  # startup.py outside of the package
STARTS = "zz_rollout.pth"  # the last one of all: what other .pth files add is sealed, too
UNKNOWN = "unknown"  # the version of what brings no metadata
SHOWN = 20  # modules without metadata in one folder; a home folder may hold hundreds

# What lies beside a package and is not imported by its name: some wheels bring their tests or
# documents along, and every checkout has such folders.
_BESIDE = {
    *("benchmark", "benchmarks", "conftest", "doc", "docs", "example", "examples", "images"),
    *("noxfile", "scripts", "setup", "test", "tests", "tools"),
}
_SUFFIXES = (".py", ".pyc", ".so")
_LOOK_LIMIT_S = 60


# Where additions lie -----------------------------------------------------------------------------


def python_path(environ: Mapping[str, str]) -> list[str]:
    """The folders of PYTHONPATH as Python has them: an empty entry is the current folder."""
    value = environ.get("PYTHONPATH", "")
    entries = [os.path.abspath(entry) for entry in value.split(os.pathsep)] if value else []
    return [entry for entry in dict.fromkeys(entries) if os.path.isdir(entry)]


def installed_to(places: Sequence[str]) -> dict[str, str]:
    """Folders of the places that exist, with their .pth files' folders: folder to place."""
    found: dict[str, str] = {}
    for place in places:
        folder = startup.folder(place)
        if os.path.isdir(folder):
            for path in [folder, *_named_by_pth(folder)]:
                found.setdefault(path, place)
    return found


def _named_by_pth(folder: str) -> Iterator[str]:
    """The folders that the .pth files in a folder add to the path, as ``site`` reads them."""
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".pth") or name.startswith("."):
            continue
        for line in _lines(f"{folder}/{name}"):
            if line.strip() and not line.startswith(("#", "import ", "import\t")):
                path = os.path.abspath(os.path.join(folder, line.rstrip()))
                if os.path.isdir(path):
                    yield path


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def _sealed(root: str, sites: Iterable[str]) -> list[str]:
    """The folders of the sealed environment that modules are imported from."""
    folders = [f"{root}/{site}" for site in sites]
    return [path for folder in folders for path in [folder, *_named_by_pth(folder)]]


# What they are ----------------------------------------------------------------------------------


def found(
    prefix: Path, environ: Mapping[str, str], places: Sequence[str] = startup.PLACES
) -> list[Added]:
    """What was added, as it is found on the path: distributions, and modules without metadata.

    The place of an editable installation is the folder of its source.
    """
    own = {os.path.realpath(folder) for folder in _sealed(*_opened(prefix))}
    listed: list[Added] = []
    on_path = {folder: folder for folder in python_path(environ)}
    into = {startup.folder(place): place for place in places}
    for folder, place in {**on_path, **into}.items():
        if os.path.isdir(folder) and os.path.realpath(folder) not in own:
            listed += _in_folder(folder, place)
    return listed


def _opened(prefix: Path) -> tuple[str, list[str]]:
    root = os.path.abspath(prefix)
    return root, [os.path.relpath(site, root) for site in info.site_packages(Path(root))]


def _in_folder(folder: str, place: str) -> Iterator[Added]:
    items = list(distributions_in(folder, place))
    yield from sorted((item for item, _ in items), key=lambda item: item.name)
    accounted = _BESIDE.union(*(modules_of(where) for _, where in items))
    loose = [
        name
        for name, path in sorted(_names(folder).items())
        if name not in accounted and _regular(path) and not name.startswith("__editable__")
    ]
    for name in loose[:SHOWN]:
        yield Added(name, UNKNOWN, place)
    if len(loose) > SHOWN:
        yield Added(f"and {len(loose) - SHOWN} more modules", UNKNOWN, place)


def distributions_in(folder: str, place: str) -> Iterator[tuple[Added, str]]:
    """Each distribution in a folder, and the folder of its metadata."""
    try:
        items = list(installed("", [folder.lstrip("/")]))
    except OSError:  # not ours to list: Python cannot import from there either
        return
    for item in items:
        where = f"/{item.folder}"
        name = item.name or os.path.basename(where)
        yield Added(name, item.version or UNKNOWN, _source(where) or place), where


def _source(metadata: str) -> str:
    """The folder that an editable installation is imported from; empty for any other."""
    try:
        with open(f"{metadata}/direct_url.json", encoding="utf-8") as stream:
            data = json.load(stream)
        editable = data["dir_info"]["editable"]
        return str(data["url"]).removeprefix("file://") if editable else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def modules_of(metadata: str) -> set[str]:
    """The top-level modules that a distribution says it has."""
    found = {line.strip() for line in _lines(f"{metadata}/top_level.txt")}
    for line in _lines(f"{metadata}/RECORD"):
        first, slash, _ = line.rsplit(",", 2)[0].strip('"').partition("/")
        if not first.endswith((".dist-info", ".data")) and first not in ("..", "__pycache__"):
            found.add(first if slash else _stem(first))
    return {name for name in found if name.isidentifier()}


# What they hide ---------------------------------------------------------------------------------


def _stem(name: str) -> str:
    """The module that a file of this name is; empty if it is none."""
    return name.split(".")[0] if name.endswith(_SUFFIXES) else ""


def _names(folder: str) -> dict[str, str]:
    """The modules and packages in a folder, each with its path."""
    names: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name if "." not in entry.name else _stem(entry.name)
                # A file goes before a folder that is no package; which of two is rare enough.
                if name.isidentifier() and ("." in entry.name or name not in names):
                    names[name] = entry.path
    except OSError:  # Python finds nothing there either
        return {}
    names.pop("__pycache__", None)
    return names


def _regular(path: str) -> bool:
    """Whether a path is a module or a package of its own, not a part of a shared one."""
    return path.endswith(_SUFFIXES) or any(
        os.path.isfile(f"{path}/__init__{suffix}") for suffix in (".py", ".pyc")
    )


def _holds_modules(path: str) -> bool:
    """Whether there is anything to import below a path: a wheel may bring a folder of pictures."""
    if _regular(path):
        return True
    return any(_stem(file) for _, _, files in os.walk(path) for file in files)


def collisions(folder: str, sealed: Sequence[str], above: str = "") -> Iterator[str]:
    """The modules of a folder, by their dotted names, that the sealed folders have as well."""
    theirs = _names(folder)
    ours: dict[str, list[str]] = {}
    for path in sealed:
        for name, where in _names(path).items():
            if name in theirs:
                ours.setdefault(name, []).append(where)
    for name in sorted(ours):
        if not above and name in _BESIDE:
            continue
        path = theirs[name]
        if any(os.path.realpath(path) == os.path.realpath(own) for own in ours[name]):
            continue
        if _regular(path):
            if any(map(_holds_modules, ours[name])):
                yield above + name
        elif os.path.isdir(path) and not any(map(_regular, ours[name])):
            yield from collisions(path, ours[name], f"{above}{name}.")


def framework(facts: Mapping[str, Any]) -> str:
    """The distribution that users may replace, by its normal name; empty where there is none."""
    data = facts.get("framework")
    return info.normalised(str(data["distribution"])) if isinstance(data, dict) else ""


def framework_modules(root: str, sites: Iterable[str], distribution: str) -> set[str]:
    """The top-level modules of the framework in the sealed environment."""
    if not distribution:
        return set()
    return {
        module
        for item in installed(root, sites)
        if item.name == distribution
        for module in modules_of(f"{root}/{item.folder}")
        if module not in _BESIDE
    }


def _hidden(
    root: str, sites: Sequence[str], distribution: str, folders: Iterable[str]
) -> dict[str, list[str]]:
    """For each folder the modules that the sealed environment has as well."""
    sealed = _sealed(root, sites)
    own = {os.path.realpath(path) for path in sealed}
    hidden: dict[str, list[str]] = {}
    for folder in folders:
        names = [] if os.path.realpath(folder) in own else list(collisions(folder, sealed))
        if names:
            hidden[folder] = names
    if hidden and distribution:
        free = framework_modules(root, sites, distribution)
        hidden = {
            folder: [name for name in names if name.split(".")[0] not in free]
            for folder, names in hidden.items()
        }
    return {folder: names for folder, names in hidden.items() if names}


def other_home(environ: Mapping[str, str]) -> str:
    """The folder that PYTHONHOME names in the place of the image's Python; empty where none."""
    home = environ.get("PYTHONHOME", "").split(os.pathsep)[0]
    return home if home and os.path.realpath(home) != os.path.realpath(sys.base_prefix) else ""


def hidden(prefix: Path, environ: Mapping[str, str]) -> dict[str, list[str]]:
    """For each folder of PYTHONPATH the locked modules that it hides. Milliseconds.

    A user's site-packages (~/.local, PYTHONUSERBASE) are not on the path of this environment.
    """
    folders = python_path(environ)
    return _hidden(*_opened(prefix), framework(info.image(prefix)), folders) if folders else {}


def shadows(
    prefix: Path,
    lock: Path,
    facts: Mapping[str, Any],
    environ: Mapping[str, str],
    places: Sequence[str] = startup.PLACES,
) -> list[Finding]:
    """Every addition that has a locked distribution's name, or a module that one has.

    What Python itself finds elsewhere than in the sealed environment comes on top: a .pth file may
    run code that no look at files foresees.
    """
    root, sites = opened(prefix)
    locked, allowed = read_lock(lock), framework(facts)
    folders = {folder: folder for folder in python_path(environ)} | installed_to(places)
    own = {os.path.realpath(path) for path in _sealed(root, sites)}
    problems: list[Finding] = []
    covered: dict[str, set[str]] = {}
    for folder, place in folders.items():
        if os.path.realpath(folder) in own:
            continue
        for item, where in distributions_in(folder, place):
            if item.name in locked and item.name != allowed:
                version = " or ".join(locked[item.name])
                what = f"{item.version} was added in {item.place}, and the lock has {version}"
                problems.append(Finding(item.name, "shadowed", f"{what}; remove what was added"))
                covered.setdefault(folder, set()).update(modules_of(where))
    for folder, names in _hidden(root, sites, allowed, folders).items():
        for name in names:
            if name.split(".")[0] not in covered.get(folder, set()):
                what = f"a module of this name was added in {folders[folder]}"
                owner = _owner(root, sites, name)
                problems.append(Finding(name, "shadowed", f"{what}, and the lock has {owner}"))
                covered.setdefault(folder, set()).add(name.split(".")[0])
    known = {name for names in covered.values() for name in names}
    return problems + [
        finding
        for finding in _found_elsewhere(root, sites, allowed, environ)
        if finding.where not in known
    ]


def _owner(root: str, sites: Iterable[str], module: str) -> str:
    """The locked distribution that a module belongs to, with its version."""
    start = module.replace(".", "/")
    for item in installed(root, sites):
        for line in _lines(f"{root}/{item.folder}/RECORD"):
            if line.startswith((f"{start}/", f"{start}.")):
                return f"it as a part of {item.name} {item.version}"
    return "it, too"


_LOOK = """
import importlib.util, json, sys
origins = {}
for name in json.load(sys.stdin):
    try:
        spec = importlib.util.find_spec(name)
    except Exception:
        continue
    if spec and spec.has_location:
        origins[name] = spec.origin
print("\\n" + json.dumps(origins))
"""


def _found_elsewhere(
    root: str, sites: Sequence[str], distribution: str, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """Locked modules that a Python with these variables finds outside of the prefix."""
    import subprocess  # here: a command that is only executed does not wait for it

    python = f"{root}/bin/python"
    if not os.path.exists(python):
        return
    free = framework_modules(root, sites, distribution) | _BESIDE | sys.stdlib_module_names
    names = {
        name
        for folder in _sealed(root, sites)
        for name, path in _names(folder).items()
        if name not in free and _regular(path)
    }
    # -P: the folder that somebody is in says nothing of a job. -B: no bytecode is to be written.
    done = subprocess.run(
        [python, "-P", "-B", "-c", _LOOK],
        input=json.dumps(sorted(names)),
        capture_output=True,
        text=True,
        env=dict(environ),
        timeout=_LOOK_LIMIT_S,
        check=False,
    )
    if done.returncode:
        why = printable(ending(done.returncode, done.stderr))
        what = f"does not start with the variables of this container: {why}"
        yield Finding("python", "shadowed", what)
        return
    inside = os.path.realpath(root) + "/"
    origins = json.loads(done.stdout.splitlines()[-1])
    for name, origin in sorted(origins.items()):
        if not os.path.realpath(origin).startswith(inside):
            what = f"Python finds it at {printable(origin)}, not in the sealed environment"
            yield Finding(name, "shadowed", what)


# At image build ---------------------------------------------------------------------------------


def constraints(locked: Mapping[str, Sequence[str]], allowed: str) -> str:
    """The lock as pip's constraints: without hashes, which would be asked of every addition."""
    return "".join(
        f"{name}=={version}\n"
        for name, versions in sorted(locked.items())
        for version in versions
        if name != allowed
    )


def starts(prefix: str, distribution: str, modules: Iterable[str], backend: str = "") -> str:
    """The line of the .pth file."""
    called = f"{STARTUP}.begin({prefix!r}, {distribution!r}, {sorted(modules)!r})"
    first = f"{STARTUP}.alone(__import__('os').environ); " if backend in BY_MPI else ""
    return f"import {STARTUP}; {first}{called}\n"


def install(prefix: Path) -> None:
    """Write what Python starts with, and pip's constraints. The seal has to be made after it."""
    root, sites = opened(prefix)
    facts = info.image(prefix)
    allowed = framework(facts)
    modules = framework_modules(root, sites, allowed)
    line = starts(root, allowed, modules, facts.get("backend", ""))
    (prefix / CONSTRAINTS).write_text(constraints(read_lock(prefix / info.LOCK), allowed), "utf-8")
    site = Path(root, sites[0])
    source = Path(startup.__file__).read_text(encoding="utf-8")
    (site / f"{STARTUP}.py").write_text(source, encoding="utf-8")
    (site / STARTS).write_text(line, encoding="utf-8")


def main() -> int:
    """``python -m rollout.added``, for the image's own environment."""
    try:
        install(info.prefix())
    except Problem as problem:
        print(problem.sentence, file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main())

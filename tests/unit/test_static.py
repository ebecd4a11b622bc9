"""What holds for the text of this repository: no host, no moving tag, versions in one place."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from images import catalog
from images.building import build, layering, layers, pinned
from images.catalog import ROOT, Image
from images.locking import lock

IMAGES = catalog.load()
ENTRYPOINTS = ROOT / "entrypoints"


def ignored() -> set[str]:
    """Folders that git does not know, and git's own."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return {line.strip("/") for line in lines} | {".git", ".venv", "venv"}


def texts(root: Path, skip: set[str]) -> Iterator[tuple[Path, str]]:
    """Every text file of the repository."""
    for path in sorted(root.iterdir()):
        if path.name in skip or path.is_symlink():
            continue
        if path.is_dir():
            yield from texts(path, skip)
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


FILES = dict(texts(ROOT, ignored()))


def found(pattern: str) -> list[str]:
    """Where a pattern stands: file and line."""
    sign = re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in FILES.items()
        if sign.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        if sign.search(line)
    ]


# Each in pieces, or this file would be the first to name them.
HOSTS = [
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("pypi.nvidia", "com"),
    ("download.pytorch", "org"),
    ("wheels.vllm", "ai"),
    ("anaconda", "org"),
    ("deb.debian", "org"),
    ("security.debian", "org"),
    ("snapshot.debian", "org"),
    ("archive.ubuntu", "com"),
    ("registry.npmjs", "org"),
    ("proxy.golang", "org"),
    ("crates", "io"),
]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: ".".join(host[:-1]))
def test_no_file_names_a_package_registry(host: tuple[str, str]) -> None:
    assert found(r"(?<![\w-])" + re.escape(".".join(host)) + r"(?![\w-])") == []


@pytest.mark.parametrize(
    "pattern",
    [":" + r"latest\b", r"apt(-get)?\s+(-\S+\s+)*(dist-|full-)?" + "upgrade"],
    ids=["moving tag", "upgrade"],
)
def test_nothing_depends_on_the_day_of_a_build(pattern: str) -> None:
    assert found(pattern) == []


def test_what_is_looked_for_would_be_found() -> None:
    assert re.search(r"(?<![\w-])b\.c(?![\w-])", "https://a.b.c/d")
    assert {"noxfile.py", "README.md", ".gitignore"} <= {path.name for path in FILES}
    assert Path(__file__) in FILES
    assert found(r"^FROM \$\{BASE\}")


# Dockerfiles

DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    return pinned.instructions(path.read_text(encoding="utf-8"))


def test_every_backend_of_the_catalog_has_its_dockerfile() -> None:
    assert {image.dockerfile for image in IMAGES} <= set(DOCKERFILES)


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_a_dockerfile_installs_each_layer_of_a_lock_behind_its_argument(image: Image) -> None:
    layers = layering.layer_names(image, lock.read(image))[1:]
    recipe = pinned.instructions(build.recipe_text(image, lock.read(image)))
    steps = [step for step in recipe if step[0] in ("ARG", "RUN")]
    assert steps.pop(0) == ("ARG", "BASE")
    arguments = [value for name, value in steps[::2] if name == "ARG"]
    installed = [
        shlex.split(value)[-1].rpartition("/")[2] for name, value in steps[1::2] if name == "RUN"
    ]
    # A layer that this lock does not fill needs no step; a step needs its layer.
    assert arguments == [name.upper() for name in installed] == [name.upper() for name in layers]


@pytest.mark.parametrize(
    "path",
    [path for path in DOCKERFILES if path != build.BASE_DOCKERFILE],
    ids=lambda path: path.parent.name,
)
def test_a_dockerfile_has_one_stage_and_ends_as_the_user(path: Path) -> None:
    # What each of its steps may be is in tests/unit/test_pinned.py.
    steps = instructions(path)
    assert [value for name, value in steps if name == "FROM"] == ["${BASE}"]
    assert steps[-1] == ("USER", "1000:0")


def test_the_base_is_unpacked_and_nothing_runs() -> None:
    # images/locking/rootfs.py has made the tar from locked packages.
    steps = instructions(build.BASE_DOCKERFILE)
    assert steps[:2] == [("FROM", "scratch"), ("ADD", "base.tar /")]
    assert not [name for name, _ in steps[2:] if name in ("ADD", "COPY", "RUN")]


# the package inside an image


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """The modules that a file imports when it is imported itself."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "rollout" if node.level else str(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
            handlers = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.ExceptHandler)]
            yield from imported(inner + [n for h in handlers for n in h.body])


@pytest.mark.parametrize(
    "path", sorted(ENTRYPOINTS.rglob("*.py")), ids=lambda path: path.relative_to(ENTRYPOINTS).name
)
def test_the_package_in_an_image_imports_the_standard_library_alone(path: Path) -> None:
    # `rollout info` answers without torch, and no engine is imported before it is asked for.
    names = {name.split(".")[0] for name in imported(ast.parse(path.read_bytes()).body)}
    assert names - set(sys.stdlib_module_names) - {"rollout"} == set()


def test_an_import_is_found_wherever_it_runs() -> None:
    code = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import c
try:
    import d
except ImportError:
    import e
class C:
    from f import g
    def m(self):
        import hidden
"""
    assert list(imported(ast.parse(code).body)) == ["a.b", "typing", "c", "d", "e", "f"]


# versions


def versions(image: Image) -> set[str]:
    """The versions and the day that a catalog file states; Python's is Debian's, not its own."""
    wanted = {str(image.resolved_as_of), *image.expect.values()}
    for line in image.requirements:
        wanted |= {specifier.version for specifier in Requirement(line).specifier}
    # A bound such as <2 is a figure like any other: it cannot be looked for.
    return {
        v for version in wanted for v in (version, version.split("+")[0]) if "." in v or "-" in v
    }


def handwritten() -> dict[Path, str]:
    """Dockerfiles, the scripts of a build and the stations; a page may name any version."""
    chosen = {}
    for path, text in FILES.items():
        inside = path.is_relative_to(ROOT / "images") and path.suffix in (".py", "", ".Dockerfile")
        if inside or path.name == "noxfile.py":
            chosen[path] = text
    return chosen


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_a_version_is_written_by_hand_in_the_catalog_alone(image: Image) -> None:
    pattern = "|".join(re.escape(version) for version in sorted(versions(image)))
    sign = re.compile(rf"(?<![\w.])({pattern})(?![\w]|\.\d)")
    places = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in handwritten().items()
        for number, line in enumerate(text.splitlines(), 1)
        if sign.search(line)
    ]
    assert places == []


def test_the_stations_and_dockerfiles_are_looked_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in handwritten()}
    assert {
        "images/locking/resolution.py",
        "images/recipes/Dockerfile",
        "images/recipes/base.Dockerfile",
        "images/recipes/install",
    } <= names
    assert not [name for name in names if name.startswith("images/catalog/")]


# pages

PAGES = sorted(path for path in FILES if path.suffix == ".md" and path.name != "CHANGELOG.md")
LINK = re.compile(r"(?<!`)\[[^]\n]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as a forge makes them."""
    fenced = re.sub(r"(?ms)^```.*?^```$", "", text)
    titles = re.findall(r"(?m)^#+ (.+)$", fenced)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    lost = []
    for target in LINK.findall(re.sub(r"(?ms)^```.*?^```$", "", FILES[page])):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            lost.append(target)
    assert lost == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = [t.partition("#")[0] for t in LINK.findall(FILES[page])]
        waiting += [(page.parent / t).resolve() for t in targets if t and "://" not in t]
    docs_pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert sorted(docs_pages - seen) == []


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(FILES[ROOT / "README.md"].splitlines()) <= 250


# recorded layers


def test_every_image_is_recorded_from_its_inputs_of_today() -> None:
    # A relock, or any other change of what goes into an image, brings its record along.
    stale = []
    for image in IMAGES:
        recorded = layers.read(image)
        if lock.unlocked(lock.read(image)):  # which no machine can build
            assert recorded is None
            continue
        if recorded is None or recorded.inputs != build.inputs(image):
            stale.append(f"nox -s reproduce -- {image.reference} --keep")
    assert stale == []


def test_images_with_the_same_torch_carry_the_same_layers_up_to_it() -> None:
    shared: dict[tuple[str, str], set[str]] = {}
    for image in IMAGES:
        recorded = layers.read(image)
        if recorded is None:  # the test above says of which image that may be
            continue
        versions = lock.versions(lock.read(image))
        # An engine that decodes no sound brings no torchaudio: its layer of torch is another one.
        torch = ", ".join(f"{n} {versions[n]}" for n in layering.TORCH if n in versions)
        for layer in recorded.layers:
            # The base does not know of a torch: all images stand on one.
            key = {"base": "every", "torch": torch}.get(layer.name, versions["torch"])
            if layer.name in ("base", "mathlibs", "nvidia", "torch"):
                shared.setdefault((key, layer.name), set()).add(layer.diff_id)
    assert len(shared) >= 3
    assert {key: found for key, found in shared.items() if len(found) > 1} == {}

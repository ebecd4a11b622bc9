"""What every Python of an image starts with, in a real interpreter of a toy environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout import added, startup

from .conftest import SITE, install


class Toy:
    """An environment with a framework, and two places for additions."""

    def __init__(self, prefix: Path, running: Path, built: Path) -> None:
        self.prefix, self.running, self.built = prefix, running, built

    def python(self, code: str, *options: str, **env: str) -> Any:
        """What the code prints, read as JSON."""
        argv = [str(self.prefix / "bin/python"), *options, "-c", code]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, env=env, cwd=self.prefix
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)


@pytest.fixture
def toy(prefix: Path, tmp_path: Path) -> Toy:
    """The framework is verl 0.7.1; its Python knows the two places."""
    install(prefix, "verl", "0.7.1", {"verl/__init__.py": b"version = 'sealed'\n"})
    facts = {"framework": {"name": "verl", "distribution": "verl", "version": "0.7.1"}}
    (prefix / "share/rollout/image.json").write_text(json.dumps(facts))
    with (prefix / "pyvenv.cfg").open("a") as stream:
        stream.write("include-system-site-packages = false\n")
    added.install(prefix)
    running, built = tmp_path / "running", tmp_path / "built"
    line = (prefix / SITE / added.STARTS).read_text()
    places = f", {(str(running), str(built))!r})"
    (prefix / SITE / added.STARTS).write_text(line.rstrip().removesuffix(")") + places + "\n")
    return Toy(prefix, running, built)


WHICH = "import json, verl; print(json.dumps(verl.version))"
VERSION = "import importlib.metadata as m, json; print(json.dumps(m.version('verl')))"
PATH = "import json, sys; print(json.dumps(sys.path))"


@pytest.mark.parametrize("options", [(), ("-I",)], ids=["as jobs start", "isolated"])
def test_additions_come_on_the_path_behind_what_is_sealed(
    toy: Toy, options: tuple[str, ...]
) -> None:
    install(toy.built, "one", "1.0", {"one.py": b"", "demo/__init__.py": b""})
    install(toy.running, "two", "1.0", {"two.py": b""})
    path = toy.python(PATH, *options)
    sealed, running, built = (str(p / SITE) for p in (toy.prefix, toy.running, toy.built))
    assert path[-3:] == [sealed, running, built]
    found = toy.python("import demo, json, one, two; print(json.dumps(demo.__file__))", *options)
    assert found.startswith(sealed)


def test_a_place_that_is_not_there_is_not_on_the_path(toy: Toy) -> None:
    assert str(toy.prefix / SITE) == toy.python(PATH)[-1]


def test_pth_files_of_additions_count(toy: Toy, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine.py").write_text("x = 1\n")
    install(toy.built, "mine", "1.0", {"mine.pth": f"{source}\n".encode()})
    assert toy.python("import json, mine; print(json.dumps(mine.x))") == 1


def test_an_installed_release_of_the_framework_wins_and_says_its_version(toy: Toy) -> None:
    assert toy.python(WHICH) == "sealed"
    assert toy.python(VERSION) == "0.7.1"
    install(toy.built, "verl", "0.8.0", {"verl/__init__.py": b"version = 'built'\n"})
    assert toy.python(WHICH, "-I") == "built"
    assert toy.python(VERSION, "-I") == "0.8.0"
    install(toy.running, "verl", "0.9.0", {"verl/__init__.py": b"version = 'running'\n"})
    assert toy.python(WHICH) == "running"
    assert toy.python(VERSION) == "0.9.0"


def test_a_checkout_on_the_path_wins_over_all_of_them(toy: Toy, tmp_path: Path) -> None:
    install(toy.built, "verl", "0.8.0", {"verl/__init__.py": b"version = 'built'\n"})
    (tmp_path / "checkout/verl").mkdir(parents=True)
    (tmp_path / "checkout/verl/__init__.py").write_text("version = 'mine'\n")
    assert toy.python(WHICH, PYTHONPATH=str(tmp_path / "checkout")) == "mine"


def test_an_editable_installation_wins_that_brings_a_finder(toy: Toy, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("version = 'editable'\n")
    # As setuptools writes them: a finder behind all others, which alone would come too late.
    finder = f"""
import sys
from importlib.util import spec_from_file_location
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return spec_from_file_location(name, {str(source)!r}) if name == "verl" else None
def install():
    sys.meta_path.append(Finder)
"""
    hook = b"import editable_finder; editable_finder.install()\n"
    files = {"editable_finder.py": finder.encode(), "editable.pth": hook}
    install(toy.built, "verl", "0.8.0.dev0", files)
    assert toy.python(WHICH) == "editable"
    assert toy.python(VERSION) == "0.8.0.dev0"


def test_the_folder_above_a_checkout_is_no_framework(toy: Toy) -> None:
    (toy.prefix / "verl/verl").mkdir(parents=True)  # the job starts in the prefix
    assert toy.python(WHICH) == "sealed"


def test_a_package_of_the_users_called_rollout_is_not_ours(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "rollout.py").write_text("raise SystemExit('not to be run')\n")
    assert toy.python(WHICH, PYTHONPATH=str(tmp_path)) == "sealed"


def test_starting_imports_nothing_that_a_bare_python_does_not(toy: Toy) -> None:
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    with_it = set(toy.python(code))
    (toy.prefix / SITE / added.STARTS).unlink()
    assert with_it - set(toy.python(code)) == {"__future__", "rollout_startup"}


# pip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/opt/rollout/bin/pip", "list"], ["python", "/opt/rollout/bin/pip", "list"], True),
        (["pip3"], ["python", "pip3"], True),
        (["-m", "list"], ["python3", "-m", "pip", "list"], True),
        (["-m"], ["python3", "-m", "torch.utils.collect_env"], False),
        (["train.py"], ["python3", "train.py"], False),
        (["-c"], ["python3", "-c", "import pip"], False),
        ([], [], False),
    ],
)
def test_pip_is_known_however_it_is_started(
    argv: list[str], original: list[str], expected: bool
) -> None:
    assert startup.runs_pip(argv, original) is expected


@pytest.fixture
def guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs guide_pip for a prefix and places of this test, and undoes what it does."""
    for name in ("prefix", "exec_prefix"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    places = (str(tmp_path / "running"), str(tmp_path / "built"))

    def run(*arguments: str, **environ: str) -> dict[str, str]:
        startup.guide_pip("/opt/rollout", places, arguments, environ)
        return environ

    return run


def test_root_adds_to_the_image_without_a_cache(guided: Any, tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    environ = guided("install", "x")
    assert environ["PIP_PREFIX"] == str(tmp_path / "built") == sys.prefix
    assert environ["PIP_NO_CACHE_DIR"] == "1"
    assert environ["PIP_CONSTRAINT"] == "/opt/rollout/share/rollout/constraints.txt"


def test_who_cannot_write_there_adds_to_the_cache_folder(guided: Any, tmp_path: Path) -> None:
    environ = guided("install", "x")  # there is no place of the image here
    assert environ["PIP_PREFIX"] == str(tmp_path / "running") == sys.prefix
    assert "PIP_NO_CACHE_DIR" not in environ


def test_constraints_of_the_users_stay(guided: Any) -> None:
    environ = guided("install", "x", PIP_CONSTRAINT="/mine.txt")
    assert environ["PIP_CONSTRAINT"].split() == [
        "/mine.txt",
        "/opt/rollout/share/rollout/constraints.txt",
    ]


@pytest.mark.parametrize("option", ["--target=/x", "-t", "--prefix", "--user", "--root=/x"])
def test_a_place_that_the_user_names_is_taken_within_the_lock(guided: Any, option: str) -> None:
    before = sys.prefix
    environ = guided("install", option)
    assert "PIP_PREFIX" not in environ
    assert environ["PIP_CONSTRAINT"]
    assert sys.prefix == before
    assert "PIP_PREFIX" not in guided("install", PIP_TARGET="/x")


def test_another_environment_is_none_of_ours(guided: Any) -> None:
    assert guided("--python", "/x/bin/python", "install", "y") == {}


def test_pip_sees_an_addition_before_the_sealed_framework(
    guided: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "built").mkdir()
    added_there = startup.folder(str(tmp_path / "built"))
    sealed = startup.folder("/opt/rollout")
    monkeypatch.setattr(sys, "path", ["/usr/lib/python3.11", sealed, added_there])
    guided("list")
    assert not (tmp_path / "built/pyvenv.cfg").exists()
    assert sys.path == ["/usr/lib/python3.11", added_there, sealed]


def test_a_place_that_pip_changes_has_the_file_that_pip_misses_otherwise(
    guided: Any, tmp_path: Path
) -> None:
    guided("uninstall", "x")
    text = (tmp_path / "running/pyvenv.cfg").read_text()
    assert text == "include-system-site-packages = false\n"

"""A Python that the base does not have: the file that the catalog names, and no other."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from images import catalog, host
from images.building import context, interpreter
from images.catalog import ROOT
from images.schema import Interpreter
from rollout.problem import Problem

from . import pythons
from .pythons import MINOR

NAME = "cpython-3.12.1+20260101-x86_64-unknown-linux-gnu-install_only_stripped.tar.gz"
CONTENT = b"a Python"
WANTED = Interpreter(NAME, hashlib.sha256(CONTENT).hexdigest(), "a list")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache/pythons"


def mirror(folder: Path, content: bytes = CONTENT) -> dict[str, str]:
    """The settings of a host that has such files in a folder, as uv's mirrors lay them out."""
    file = folder / "mirror/20260101" / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return {interpreter.MIRROR: f"file://{folder}/mirror"}


def test_its_file_is_fetched_once_and_is_the_one_of_the_catalog(
    cache: Path, tmp_path: Path
) -> None:
    path = interpreter.fetch(WANTED, mirror(tmp_path))
    assert (path.parent, path.read_bytes()) == (cache, CONTENT)
    assert interpreter.fetch(WANTED, {interpreter.MIRROR: "/not/there"}) == path
    path.write_bytes(b"damaged")
    shutil.rmtree(tmp_path / "mirror")
    assert interpreter.fetch(WANTED, mirror(tmp_path)).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"another Python", b""])
def test_another_file_is_refused_and_not_kept(cache: Path, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Problem, match=f"the catalog says {WANTED.sha256}"):
        interpreter.fetch(WANTED, mirror(tmp_path, content))
    assert not list(cache.glob("*"))


def test_a_mirror_without_it_is_one_sentence(cache: Path, tmp_path: Path) -> None:  # noqa: ARG001
    with pytest.raises(Problem, match=f"{interpreter.MIRROR} names its place"):
        interpreter.fetch(WANTED, {interpreter.MIRROR: str(tmp_path)})


@pytest.mark.parametrize(
    "image", [i for i in catalog.load() if i.interpreter], ids=lambda i: i.reference
)
def test_uv_itself_says_where_such_files_lie(image: catalog.Image) -> None:
    """It may know a later build of that release; the day is the catalog's."""
    assert image.interpreter
    listed = subprocess.run(
        interpreter.list_argv(host.uv()), capture_output=True, text=True, check=True
    )
    url = interpreter.address(image.interpreter, interpreter.place(listed.stdout))
    known = {entry["url"] for entry in json.loads(listed.stdout)}
    assert {u.rsplit("/", 2)[0] for u in known} >= {url.rsplit("/", 2)[0]}
    assert url.endswith(f"/{image.interpreter.file.replace('+', '%2B')}")


def test_a_uv_that_knows_none_is_one_sentence() -> None:
    with pytest.raises(Problem, match=f"set {interpreter.MIRROR}"):
        interpreter.place('[{"url": "https://a/b/c.tar.bz2"}]')


def test_its_sha256_and_what_unpacks_it_decide_every_layer_above() -> None:
    one, other = (context.below({}, "base:1", python) for python in ("a", "b"))
    assert one.keys() == {"BASE", "PYTHON"}
    assert one["PYTHON"] != other["PYTHON"]
    assert context.below({}, "base:1").keys() == {"BASE"}


# the step


def archive(folder: Path) -> Path:
    """As such a file is: everything below one folder, made for a place called /install."""
    made = folder / "python"
    pythons.install(made)
    (made / f"lib/libpython{MINOR}.so.1.0").write_text("Python's own library")
    for entry in list((made / f"lib/python{MINOR}").glob("_sysconfigdata_*.py")):
        text = entry.read_text(encoding="utf-8")
        entry.unlink()  # a link
        told = "build_time_vars.update(INCLUDEDIR='/install/include')"
        entry.write_text(f"{text}\n{told}\n", encoding="utf-8")
    (made / f"lib/python{MINOR}/site-packages").mkdir()
    (made / f"lib/python{MINOR}/site-packages/beside.py").write_text("")
    path = folder / interpreter.FILE
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(made, "python")
    return path


def test_the_step_makes_the_environment_of_that_python(tmp_path: Path) -> None:
    places = {"/opt": tmp_path / "opt", "/mnt/context": tmp_path / "context"}
    places["/usr/lib/x86_64-linux-gnu"] = tmp_path / "lib"
    for place in places.values():
        place.mkdir()
    given = places["/mnt/context"]
    archive(tmp_path).rename(given / interpreter.FILE)
    for name in ("tools", "payload"):
        (given / name).mkdir()
    (given / "payload/python").write_text(MINOR)
    (given / "tools/uv").symlink_to(host.uv())
    script = (ROOT / "images/recipes/python").read_text(encoding="utf-8")
    for name, place in places.items():
        script = script.replace(name, str(place))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    home = places["/opt"] / "python"
    code = (
        "import sys, sysconfig, string; print(sys.version_info[:2], sys.base_prefix,"
        " string.__cached__, sysconfig.get_config_var('INCLUDEDIR'), sep='\\n')"
    )
    asked = [str(places["/opt"] / "rollout/bin/python"), "-I", "-c", code]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")
    cached = home / f"lib/python{MINOR}/__pycache__/string.cpython-{MINOR.replace('.', '')}.pyc"
    assert said[:4] == [str(sys.version_info[:2]), str(home), str(cached), f"{home}/include"]
    # Flags of an unchecked hash: no time of this build, and nothing to look at in its source.
    assert cached.read_bytes()[4:8] == b"\x01\0\0\0"
    assert not (home / f"lib/python{MINOR}/site-packages/__pycache__").exists()
    assert (tmp_path / f"lib/libpython{MINOR}.so.1.0").read_text() == "Python's own library"

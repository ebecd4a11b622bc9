"""What the reader of sources promises: each fact has its place, and a backend asks for no other.

The records in tests/surface/records are of the wheels that the locks name. A backend's comparison
runs whole against an engine that is made of each. tests/engine holds the reader against Python.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from images import catalog
from images.catalog import ROOT
from images.locking import lock
from tests.surface import kept, record, sources
from tests.surface.__main__ import main
from tests.surface.fields import fields, made, members
from tests.surface.signatures import function, method, written
from tests.surface.surface import Class, Module, Outside, Surface, Thing

from . import recorded

PLACES = sorted(kept.FOLDER.iterdir())
BACKENDS = {package: backend for backend, package in kept.PACKAGES.items()}
# What only a run of the engine decides.
UNREAD = {
    "sglang-0.5.23": [
        ["arguments", "cannot be looked at: TypeError: namespace() is not a callable object"]
    ],  # its ServerArgs is made when it is imported (msgspec.defstruct), of fields put together
}


def backend_of(found: record.Record) -> str:
    return BACKENDS[found["package"]]


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: str(place.stem))
def place(request: pytest.FixtureRequest) -> Path:
    """One record after another."""
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def told(place: Path) -> kept.Told:
    """What the backend's comparison says of an engine that is made of it."""
    found = kept.read(place)
    return kept.compared(found["names"], backend_of(found))


# the records that are kept


def test_every_image_of_vllm_and_sglang_has_the_record_of_its_wheel() -> None:
    wanted = {}
    for image in catalog.load():
        if image.backend in ("vllm", "sglang"):
            path = ROOT / "lockfiles" / image.repository / f"{image.tag}.lock"
            (own,) = (e for e in lock.parse(path.read_text(), path) if e.name == image.backend)
            wanted[kept.path(own.name, own.version)] = own.sha256
    assert {p: kept.read(p)["origin"]["sha256"] for p in PLACES} == wanted, "nox -s surface"


def test_a_record_says_where_it_comes_from(place: Path) -> None:
    found = kept.read(place)
    assert found["about"] == record.ABOUT
    assert place == kept.path(found["package"], found["release"])
    assert record.text(found) == place.read_text(encoding="utf-8"), "nobody has edited its form"
    for name, entry in found["names"].items():
        if entry["kind"] not in ("outside", "module", "compiled"):
            assert entry["file"].startswith(f"{found['package']}/"), name
            assert entry["line"] > 0, name


def test_the_backend_asks_for_nothing_that_the_sources_do_not_have(
    place: Path, told: kept.Told
) -> None:
    assert told["problems"] == UNREAD.get(place.stem, [])
    assert sum(told["looked_at"].values()) > (60 if place.stem not in UNREAD else 40)


def test_the_record_is_of_what_the_backend_asks_today(place: Path, told: kept.Told) -> None:
    assert set(told["asked"]) <= set(kept.read(place)["asked"]), "nox -s surface"


def test_what_a_proof_found_missing_is_what_the_sources_miss() -> None:
    report = json.loads((ROOT / "images/proofs/verl-rollout/sglang-0.5.12.json").read_text())
    said = [m for m in json.dumps(report).split('"') if m.startswith("begin_weight_update,")]
    found = kept.compared(kept.read(kept.path("sglang", "0.5.12"))["names"], "sglang")
    assert said == [",".join(found["without"])]


@pytest.mark.parametrize(
    ("package", "release", "name", "change"),
    [
        ("vllm", "0.12.0", "vllm:LLM.collective_rpc", {"signature": "(self, method)"}),
        ("vllm", "0.12.0", "vllm.outputs:RequestOutput", {"signature": "(prompt)"}),
        ("vllm", "0.12.0", "vllm.v1.engine.llm_engine:LLMEngine", {"assigns": []}),
        ("sglang", "0.5.12", "sglang.srt.server_args:ServerArgs", {"fields": ["model_path"]}),
        ("sglang", "0.5.12", "sglang.srt.entrypoints.http_server:app", {"routes": ["/health"]}),
    ],
)
def test_a_call_that_the_sources_do_not_have_fails(
    package: str, release: str, name: str, change: dict[str, Any]
) -> None:
    names = copy.deepcopy(kept.read(kept.path(package, release))["names"])
    names[name] |= change
    problems = kept.compared(names, package)["problems"]
    assert problems
    server = name.endswith(":app")
    assert {where for where, _ in problems} == {"the server" if server else name}


@pytest.mark.parametrize("name", ["vllm:LLM.sleep", "vllm.cumem_allocator", "vllm:SamplingParams"])
def test_a_name_that_the_sources_lose_is_found(name: str) -> None:
    names = kept.read(kept.path("vllm", "0.12.0"))["names"]
    left = {key: about for key, about in names.items() if not f"{key}.".startswith(f"{name}.")}
    if name == "vllm:LLM.sleep":
        left["vllm:LLM"] = names["vllm:LLM"] | {
            "has": [one for one in names["vllm:LLM"]["has"] if one != "sleep"]
        }
    assert name in [where for where, _ in kept.compared(left, "vllm")["problems"]]


def test_an_engine_can_be_played_from_a_record(tmp_path: Path) -> None:
    surface = made_of(tmp_path, {"engine/__init__.py": ENGINE})
    names = record.record(
        surface, "engine", ["engine:Engine", "engine:Options", "engine:Engine.go"]
    )
    made_modules = recorded.modules(names["names"], {"engine:Engine.go": lambda **given: given})
    engine: Any = made_modules["engine"]
    played = engine.Engine().go(1, fast=True)
    assert (played["steps"], played["fast"], played["more"]) == (1, True, {})
    with pytest.raises(TypeError):
        engine.Engine().go()
    with pytest.raises(ValueError, match="no field 'modell'"):
        engine.Options(modell=1)


# reading

ENGINE = """\
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, ClassVar, overload
import enum
from .below import *
from .below import Base as Renamed
try:
    from fast import go
except ImportError:
    def go(): ...
if TYPE_CHECKING:
    from .lazy import Lazy

def __getattr__(name): ...

@dataclass
class Options:
    model: str
    _: KW_ONLY
    seed: int = 0
    count: ClassVar[int] = 1
    cache: dict = field(default_factory=dict)
    own: int = field(init=False, default=2)

class Tag(enum.Enum):
    MODEL = "model"
    CACHE = "cache"

def timed(call):
    @wraps(call)
    def inner(*args, **kwargs): return call(*args, **kwargs)
    return inner

class Engine(Renamed):
    plain = Options
    def __init__(self, model="x"):
        self.model = model
    @overload
    def go(self, steps: int): ...
    @timed
    def go(self, steps: int, /, *rest, fast: bool = False, start=Tag.MODEL, **more): ...
    async def later(self): ...
    async def stream(self):
        yield 1
    @property
    def ready(self): ...
    @property
    def count(self): ...
    @count.setter
    def count(self, value): ...
    @staticmethod
    def make(name): ...
    @unknown.mark
    def strange(self): ...
"""
FILES = {
    "engine/__init__.py": ENGINE,
    "engine/below.py": "class Base(object):\n    def stop(self, now=True): ...\n_hidden = 1\n",
    "engine/lazy.py": "class Lazy: ...\n",
    "engine/fast.cpython-311.so": "",
}


def made_of(folder: Path, files: dict[str, str]) -> Surface:
    """Sources of a test."""
    for name, text in (FILES | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Surface(sources.opened(folder, "engine"))


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    return made_of(tmp_path, {})


def kind(surface: Surface, name: str) -> Class:
    found = surface.find(name)
    assert isinstance(found, Thing)
    return surface.kind_of(found)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("engine:Base", ("engine.below", "Base", 1)),
        ("engine:Renamed", ("engine.below", "Base", 1)),
        ("engine:Engine.stop", ("engine.below", "Base.stop", 2)),
        ("engine:Engine.go", ("engine", "Engine.go", 41)),
        ("engine:Lazy", ("engine.lazy", "Lazy", 1)),
        ("engine:Engine.plain", ("engine", "Engine.plain", 35)),
    ],
)
def test_a_name_is_followed_to_its_line(
    surface: Surface, name: str, where: tuple[str, str, int]
) -> None:
    found = surface.find(name)
    assert isinstance(found, Thing)
    assert (found.module.name, found.name, found.node.lineno) == where


@pytest.mark.parametrize(
    "name", ["engine:_hidden", "engine:Engine.halt", "engine.none:Base", "x:y"]
)
def test_what_the_sources_do_not_have_is_nothing(surface: Surface, name: str) -> None:
    assert surface.find(name) is None


def test_what_is_of_others_or_compiled_is_said_to_be(surface: Surface) -> None:
    assert surface.find("engine:go") == Outside("fast.go")
    compiled = surface.find("engine.fast")
    assert isinstance(compiled, Module)
    assert surface.find("engine.fast:run") == Outside("engine.fast.run")


def test_a_signature_is_as_python_would_tell_it(surface: Surface) -> None:
    engine = kind(surface, "engine:Engine")
    go = method(engine, "go")
    assert go is not None
    text, left = written(go.parameters)
    assert text == ("(self, steps: 'int', /, *rest, fast: 'bool' = False, start=..., **more)")
    assert left == {"start": "Tag.MODEL"}
    kinds = {name: method(engine, name) for name in ("later", "stream", "ready", "count", "make")}
    assert {name: (f.kind, f.binding) for name, f in kinds.items() if f} == {
        "later": ("coroutine", ""),
        "stream": ("function", ""),
        "ready": ("property", ""),
        "count": ("property", ""),
        "make": ("function", "static"),
    }


def test_what_only_a_run_decides_is_said(surface: Surface) -> None:
    strange = method(kind(surface, "engine:Engine"), "strange")
    assert strange is not None
    assert strange.doubt == "decorated by unknown.mark"
    assert kind(surface, "engine:Engine").assigned == ["model"]


def test_fields_and_members_are_in_their_order(surface: Surface) -> None:
    options = kind(surface, "engine:Options")
    assert [f.name for f in fields(options)] == ["model", "seed", "cache", "own"]
    own = made(options)
    assert own is not None
    assert written(own)[0] == "(model: 'str', *, seed: 'int' = 0, cache: 'dict' = ...)"
    assert members(kind(surface, "engine:Tag")) == {"MODEL": "'model'", "CACHE": "'cache'"}


def test_a_wheel_an_sdist_and_a_tag_say_the_same(surface: Surface, tmp_path: Path) -> None:
    wheel, sdist = tmp_path / "engine-1.0-py3-none-any.whl", tmp_path / "engine-1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in FILES:
            archive.write(tmp_path / name, name)
    with tarfile.open(sdist, "w:gz") as archive_:
        archive_.add(tmp_path / "engine", "engine-1.0/python/engine")
    steps = ["init -q", "add engine", "-c user.name=a -c user.email=a@b commit -qm one", "tag v1.0"]
    for step in steps:
        subprocess.run(["git", "-C", str(tmp_path), *step.split()], check=True)
    asked = ["engine:Engine", "engine:Engine.stop", "engine:Options"]
    own = record.record(surface, "engine", asked)["names"]
    for place, tag in ((wheel, ""), (sdist, ""), (tmp_path, "v1.0")):
        opened = sources.opened(place, "engine", tag)
        assert opened.release == (tag or "1.0")
        assert record.record(Surface(opened), "engine", asked)["names"] == own
    origin = sources.opened(tmp_path, "engine", "v1.0").origin
    assert origin["tag"] == "v1.0"
    assert len(origin["commit"]) == 40


def test_a_place_without_the_engine_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vllm", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: has no package vllm\n"
    assert main(["vllm", str(tmp_path), "--tag", "v1"]) == 2
    assert "git rev-parse" in capsys.readouterr().err


def test_a_function_of_a_module_is_read_as_well(surface: Surface) -> None:
    found = surface.find("engine:timed")
    assert isinstance(found, Thing)
    assert written(function(found).parameters) == ("(call)", {})

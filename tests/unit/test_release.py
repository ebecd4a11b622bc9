"""A build on an engine's release image: what it has stays as it is, and what is added fits."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from images import catalog, host
from images.building import build, pinned, release
from images.catalog import RECIPES, ROOT, Image
from images.locking import lock
from images.locking.lock import Locked
from rollout.installed import distributions
from rollout.problem import Problem

from ..conftest import Checkout
from . import pythons
from .pythons import MINOR

DIGEST = f"sha256:{hashlib.sha256(b'an image').hexdigest()}"
TORCH = "2.10.0a0+ours"
ABI = "__version__ = '{}'\nclass version: cuda = '13.1'\nclass _C: _GLIBCXX_USE_CXX11_ABI = {}\n"
WITH = [image for image in catalog.load() if image.release]


def told(**changes: str) -> dict[str, str | None]:
    """A catalog file that names a release image."""
    keys = {
        "image": '"vendor/engine/release"',
        "digest": f'"{DIGEST}"',
        "source": '"github a/b"',
        "torch": f'"{TORCH}"',
        "torch-source": '"a report"',
        **changes,
    }
    table = ", ".join(f"{key} = {value}" for key, value in keys.items() if value)
    return {"release": f"{{ {table} }}", "expect": "{}"}


# what is built


@pytest.mark.parametrize("image", WITH, ids=lambda image: image.reference)
def test_an_image_of_the_catalog_is_named_by_a_digest_and_rendered_whole(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image.release
    assert build.main([image.reference, "--show", "--from", "registry.example/mirror"]) == 0
    text = capsys.readouterr().out
    steps = pinned.instructions(text)
    named = f"${{REGISTRY}}/{image.release.image}@{image.release.digest}"
    assert [value for name, value in steps if name == "FROM"] == [named]
    assert pinned.dockerfile(text) == []
    runs = [value.split("/")[-1] for name, value in steps if name == "RUN"]
    assert runs == ["additions", "entrypoints"]
    users = [value for name, value in steps if name == "USER"]
    assert (users[0], users[-1]) == ("0:0", "1000:0")
    assert ("ENTRYPOINT", '["rollout"]') in steps
    # Its own programs and libraries stay where they are found.
    paths = [value for name, value in steps if name == "ENV" and "PATH=" in value.split()[0]]
    assert len(paths) == 1
    assert paths[0].endswith(":${PATH}")
    assert "LD_LIBRARY_PATH" not in text
    assert f'{build.labels.TORCH}="{image.release.torch}"' in text
    assert "rollout.cuda" not in text


@pytest.mark.parametrize("image", WITH, ids=lambda image: image.reference)
def test_what_may_be_added_has_a_sha256_and_is_nothing_that_the_engine_brings(image: Image) -> None:
    locked = lock.read(image)
    names = {entry.name for entry in release.candidates(image, locked)}
    assert image.framework
    assert image.framework.name in names
    assert not names & {"torch", "torchvision", "triton", image.engine, "mpi4py"}
    assert not [name for name in names if name.startswith("tensorrt")]
    assert all(entry.sha256 for entry in release.candidates(image, locked))


def test_an_image_without_a_release_image_cannot_be_built_on_one(checkout: Checkout) -> None:
    with pytest.raises(Problem, match=r"names no release image.*leave out --from") as caught:
        release.plan(checkout.image(), "registry.example")
    assert caught.value.code == 2


def test_a_digest_that_nobody_has_published_is_said_in_one_sentence(checkout: Checkout) -> None:
    image = checkout.image(told(digest="", source=""))
    with pytest.raises(Problem) as caught:
        build.build(image, None, registry="r")  # type: ignore[arg-type]  # before the builder
    assert caught.value.code == 3
    assert caught.value.sentence == (
        f"{image.reference} cannot be built on vendor/engine/release: images/catalog/verl-rollout/"
        "vllm-0.12.toml has no digest of it, for none was found in a public file; add "
        "'release.digest' and 'release.source'"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": ""}, "'release' has no source; give both digest and source, or none"),
        ({"digest": ""}, "'release' has no digest"),
        ({"digest": '"sha256:12"'}, "key 'release.digest' has 'sha256:12'; say it like"),
        ({"image": '"a/b:1"'}, "key 'release.image' has 'a/b:1'; say it like"),
        ({"otherwise": '{ numpy = "" }'}, "'release.otherwise.numpy' gives no reason"),
    ],
    ids=range(5),
)
def test_what_the_catalog_says_of_one_is_whole(
    checkout: Checkout, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(Problem) as caught:
        checkout.image(told(**changes))
    assert said in caught.value.sentence


def test_what_decides_a_layer_is_in_its_argument_and_the_registry_in_none(
    checkout: Checkout,
) -> None:
    image = checkout.image(told())
    one, other = (release.plan(image, where).arguments("") for where in ("a", "b"))
    assert one | {"REGISTRY": "b"} == other
    again = release.plan(checkout.image(told(torch='"2.11"')), "a").arguments("")
    assert again["ADDITIONS"] != one["ADDITIONS"]
    facts = json.loads(release.plan(image, "a").files["image.json"])
    assert facts["reference"] == f"{image.reference}{release.TAG}"
    assert facts["expect"] == {}
    # Its torch lies beside what is added, where no file of ours is.
    assert {"libc10*.so", "libtorch*.so"} <= set(facts["optional_libraries"])


def test_layers_of_a_release_image_are_not_recorded(checkout: Checkout) -> None:
    checkout.image(told())
    with pytest.raises(Problem, match="--record keeps layers of our own"):
        build.main(["vllm-0.12", "--from", "r", "--record"])


# the step


@dataclass(frozen=True)
class Wheel:
    """A distribution of a test: its files, and what it asks for."""

    name: str
    version: str
    files: Mapping[str, str]
    requires: Sequence[str] = ()

    @property
    def about(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"

    def content(self) -> dict[str, bytes]:
        info = f"{self.about}.dist-info"
        asks = "".join(f"Requires-Dist: {line}\n" for line in self.requires)
        head = f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n{asks}"
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        texts = {**self.files, f"{info}/METADATA": head, f"{info}/WHEEL": kind}
        found = {name: text.encode() for name, text in texts.items()}
        rows = io.StringIO()
        for name, data in found.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            csv.writer(rows, lineterminator="\n").writerow([name, f"sha256={digest}", len(data)])
        rows.write(f"{info}/RECORD,,\n")
        return {**found, f"{info}/RECORD": rows.getvalue().encode()}

    def unpacked(self, site: Path) -> None:
        for name, data in self.content().items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(data)

    def packed(self, folder: Path) -> str:
        path = folder / f"{self.about}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in self.content().items():
                archive.writestr(zipfile.ZipInfo(name), data)
        return hashlib.sha256(path.read_bytes()).hexdigest()


THERE = (
    Wheel("torch", TORCH, {"torch/__init__.py": ABI.format(TORCH, True), "torch/lib/a.txt": "a"}),
    Wheel("vllm", "0.12.0", {"vllm/__init__.py": ""}, ["numpy"]),
    Wheel("numpy", "2.1", {"numpy/__init__.py": "# its own\n"}),
    Wheel("broken", "1", {"broken.py": ""}, ["nowhere"]),  # what does not fit without us is theirs
)
VERL = Wheel("verl", "0.7.1", {"verl/__init__.py": "import numpy\n"}, ["numpy", "codetiming>=1"])
ADDED = (VERL, Wheel("codetiming", "1.4", {"codetiming.py": ""}))
LOCKED = (*ADDED, Wheel("numpy", "1.26", {"numpy/__init__.py": "# the lock's\n"}))


class Step:
    """A release image with a Python of its own, and the step that adds to it."""

    def __init__(self, folder: Path, checkout: Checkout, pip: Path) -> None:
        self.folder, self.checkout = folder, checkout
        self.own = pythons.install(folder / "usr")
        self.site = pythons.site(self.own)
        (self.site / "pip.pth").write_text(f"{pip}\n")
        for one in THERE:
            one.unpacked(self.site)
        self.context = folder / "context"
        for name in ("context/wheels", "context/tools", "cache", "opt", "var"):
            (folder / name).mkdir(parents=True)
        (self.context / "tools/uv").symlink_to(host.uv())
        for name in ("owners", "order.toml"):
            shutil.copy2(ROOT / "images/recipes" / name, self.context)
        (self.context / "indexes.env").write_text(
            f"export UV_FIND_LINKS={self.context}/wheels\nexport UV_NO_INDEX=1\n"
        )
        for script in ("additions", "beside"):
            text = (ROOT / "images/recipes" / script).read_text(encoding="utf-8")
            for name, place in (
                ("/mnt/context", self.context),
                ("/mnt/cache", folder / "cache"),
                ("/opt/rollout", folder / "opt/rollout"),
                ("/var/cache/rollout", folder / "var/rollout"),
                ("chown 1000:0", "true"),  # nobody but root could
            ):
                text = text.replace(name, str(place))
            (self.context / script).write_text(text, encoding="utf-8")

    @property
    def environment(self) -> Path:
        return self.folder / "opt/rollout"

    def run(self, locked: Sequence[Wheel] = LOCKED, **changes: str) -> tuple[int, str]:
        """Its exit code, and what it says."""
        keys = told(**changes) | {"python": '"3.11"', "framework": KEYS}
        image = self.checkout.image(keys, versions={"vllm": "0.12.0"})
        via = "    # via images/catalog/x.toml\n"
        entries = [Locked(w.name, w.version, w.packed(self.context / "wheels")) for w in locked]
        head = lock.header("nox -s lock", "of a test")
        engine = Locked("vllm", "0.12.0", hashlib.sha256(b"v").hexdigest())
        image.lock.write_text(head + "".join(e.text + via for e in (engine, *entries)))
        said = json.loads(release.asked(image, lock.read(image)))
        (self.context / "release.json").write_text(json.dumps(said | {"python": MINOR} | self.more))
        argv = ["sh", str(self.context / "additions")]
        env = {"PATH": f"{self.own.parent}:/usr/bin:/bin", "PIP_CONSTRAINT": "/not/there"}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
        return done.returncode, done.stdout + done.stderr

    more: Mapping[str, object] = {}


KEYS = (
    '{ name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20, '
    'left-out = { tensorboard = "no" } }'
)


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pip of these tests in a folder of its own."""
    place = tmp_path_factory.mktemp("pip")
    spec = importlib.util.find_spec("pip")
    assert spec
    assert spec.origin
    (place / "pip").symlink_to(Path(spec.origin).parent)
    return place


@pytest.fixture
def step(tmp_path: Path, checkout: Checkout, pip: Path) -> Step:
    return Step(tmp_path / "machine", checkout, pip)


def test_what_the_image_lacks_is_added_and_nothing_that_it_has_is_touched(step: Step) -> None:
    before = {p: p.read_bytes() for p in step.site.rglob("*") if p.is_file()}
    # What the catalog gives a reason for may be there otherwise than it is asked for.
    wants = Wheel("wants", "1", {"wants.py": ""}, ["numpy<2"])
    code, said = step.run((*LOCKED, wants), otherwise='{ numpy = "it is the same here" }')
    assert code == 0, said
    assert "3 of 4 distributions are added" in said
    assert f"torch {TORCH}: 2 files as they were, ABI and symbols fit" in said
    now = {p: p.read_bytes() for p in step.site.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert now == {path: data for path, data in before.items() if path.suffix != ".pyc"}
    facts = json.loads((step.environment / "share/rollout/release.json").read_text())
    assert facts["added"] == {"codetiming": "1.4", "verl": "0.7.1", "wants": "1"}
    assert facts["otherwise"] == {"numpy": ["1.26", "2.1"]}
    assert (facts["torch"]["cuda"], facts["torch"]["cxx11_abi"]) == ("13.1", True)
    assert facts["versions"]["numpy"] == "2.1"
    assert facts["image"] == f"vendor/engine/release@{DIGEST}"
    # Its environment is the locked one, as `rollout verify` sees it.
    found = distributions(step.environment, step.environment / "share/rollout/requirements.lock")
    assert found.problems == ()
    code_ = "import numpy, torch, verl, codetiming; print(torch.__file__); print(numpy.__file__)"
    asked = [str(step.environment / "bin/python"), "-I", "-c", code_]
    out = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(step.site / "torch/__init__.py"), str(step.site / "numpy/__init__.py")]


@pytest.mark.parametrize(
    ("more", "changes", "said"),
    [
        ({"python": "3.99"}, {}, f"the release image has Python {MINOR}, the lock is for 3.99"),
        ({}, {"torch": '"2.9"'}, f"its torch is {TORCH}, the catalog says 2.9"),
        ({"engine": ["vllm", "0.13"]}, {}, "its vllm is 0.12.0, locked is 0.13"),
    ],
    ids=["python", "torch", "engine"],
)
def test_another_image_than_the_lock_is_for_is_refused(
    step: Step, more: Mapping[str, object], changes: dict[str, str], said: str
) -> None:
    step.more = more
    code, text = step.run(**changes)
    assert code != 0
    assert said in text
    assert not list(step.environment.glob("lib/python3.*/site-packages/verl"))


def test_an_addition_that_does_not_fit_or_hides_a_module_is_named(step: Step) -> None:
    wants = Wheel("wants", "1", {"wants.py": ""}, ["numpy<2", "tensorboard"])
    hides = Wheel("numpy-of-others", "1", {"numpy/__init__.py": ""})
    code, text = step.run((*LOCKED, wants, hides))
    assert code != 0
    assert "what was added does not fit what the release image has: wants 1 has requirement" in text
    assert "numpy-of-others has the module numpy, and hides" in text
    assert "tensorboard" not in text, "the catalog leaves it out, with a reason"
    assert "nowhere" not in text, "what was so before is not ours"


def test_another_torch_before_the_images_own_is_found(step: Step) -> None:
    sneaky = Wheel("sneaky", "1", {"torch/__init__.py": ABI.format("2.9", False)})
    code, said = step.run((*LOCKED, sneaky))
    assert code != 0
    for key, before in (("cxx11_abi", "True"), ("version", TORCH), ("folder", str(step.site))):
        assert f"torch's {key} was {before}" in said
    assert "sneaky has the module torch, and hides" in said


def test_a_changed_file_of_torch_is_found(step: Step) -> None:
    script = step.context / "additions"
    change = f"echo b > {step.site}/torch/lib/a.txt\n"
    text = script.read_text().replace("rm -f ", f"{change}rm -f ", 1)
    assert change in text
    script.write_text(text)
    code, answer = step.run()
    assert code != 0
    assert "torch's sha256 was" in answer


def test_an_image_whose_pip_says_nothing_is_no_proof_that_all_fits(step: Step) -> None:
    (step.site / "pip.pth").unlink()
    code, text = step.run()
    assert code != 0
    assert "pip of the release image does not say what fits" in text


# symbols


@pytest.fixture
def beside() -> ModuleType:
    loader = SourceFileLoader("beside", str(ROOT / "images/recipes/beside"))
    spec = importlib.util.spec_from_loader("beside", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


GIVES = "#include <string>\nnamespace c10 { void check(std::string const&) {} }\n"
NEEDS = (
    "#include <string>\nnamespace c10 { void check(std::string const&); }\n"
    'extern "C" void run() { c10::check("x"); }\n'
)


def compiled(folder: Path, name: str, text: str, *options: str) -> Path:
    source = folder / f"{Path(name).name}.cpp"
    source.write_text(text)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    argv = ["g++", "-shared", "-fPIC", *options, "-o", str(folder / name), str(source)]
    subprocess.run(argv, check=True)
    return folder / name


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("abi", [1, 0])
def test_an_addition_of_another_cxx_abi_is_found(
    beside: ModuleType, tmp_path: Path, abi: int
) -> None:
    compiled(tmp_path, "torch/lib/libc10.so", GIVES, "-D_GLIBCXX_USE_CXX11_ABI=1")
    flag = f"-D_GLIBCXX_USE_CXX11_ABI={abi}"
    compiled(tmp_path, "site/added/_C.so", NEEDS, flag)
    found = beside.unresolved(tmp_path / "site", tmp_path / "torch/lib")
    if abi:
        assert found == []
    else:
        [said] = found
        assert said.startswith("added/_C.so needs _ZN3c105checkERKSs, which the image's torch")


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_what_another_addition_gives_is_there(beside: ModuleType, tmp_path: Path) -> None:
    compiled(tmp_path, "site/own/libours.so", GIVES)
    compiled(tmp_path, "site/own/_C.so", NEEDS)
    (tmp_path / "site/own/text.so").write_text("no ELF file")
    assert beside.unresolved(tmp_path / "site", tmp_path / "torch/lib") == []
    assert (
        "_ZN3c105checkERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
        in (beside.symbols(tmp_path / "site/own/libours.so")[0])
    )


@pytest.mark.parametrize(
    ("name", "torchs"),
    [
        ("_ZN3c106detail14torchCheckFailEPKcS2_jRKSs", True),
        ("_ZNK2at6Tensor4sizeEl", True),
        ("_ZN5torch3jit6ScriptE", True),
        ("aoti_torch_get_current_cuda_stream", True),
        ("torch_call_dispatcher", True),
        ("_ZN12at_somewhere4callEv", False),
        ("_ZSt4cout", False),
        ("PyObject_Call", False),
        ("cudaMalloc", False),
    ],
)
def test_what_torch_gives_is_told_by_its_name(beside: ModuleType, name: str, torchs: bool) -> None:
    assert bool(beside._TORCHS.search(name)) == torchs


# the lock


def test_what_somebody_else_than_the_engine_asks_for_is_told_from_what_it_brings() -> None:
    text = (
        "a==1\n    # via images/catalog/x.toml\n"
        "Engine==1\n    # via images/catalog/x.toml\n"
        "b==1\n    # via\n    #   A\n    #   engine\n"
        "c==1\n    # via b\n"
        "d==1\n    # via engine\n"
        "e==1\n    # via d\n"
    )
    assert lock.wanted(text, "engine") == {"a", "b", "c"}


def test_the_scripts_of_the_step_are_recipes_of_this_checkout() -> None:
    assert {script.parent for script in release.SCRIPTS} == {RECIPES}

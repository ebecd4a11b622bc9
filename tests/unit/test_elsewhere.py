"""Wheels that the public index does not have: no sha256 is invented, and none is passed over."""

from __future__ import annotations

import email
import os
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.building import build, pinned
from images.locking import base, elsewhere, lock, locks, resolution
from images.locking.lock import MARK
from images.publishing import matrix
from images.schema import Elsewhere
from rollout.problem import Problem

from ..conftest import Checkout, sha256

IMAGES = catalog.load()
ENGINE = '{ name = "vllm", index = "V", tags = "cp311-cp311-linux_x86_64", why = "w" }'
KNOWN, NEW = sha256("known"), sha256("new")
TORCH = (
    '{ name = "torch", index = "P", tags = "cp311-cp311-linux_x86_64", why = "w", '
    'requires = ["sympy>=1.13"], requires-source = "its METADATA", '
    f'sha256 = "{KNOWN}", source = "github a/b" }}'
)
REQUIREMENTS = '["vllm==0.12.0", "torch==2.9.0"]'
WHEEL = "vllm-0.12.0-cp311-cp311-linux_x86_64.whl lies on the index of V"


def made(checkout: Checkout, *entries: str) -> catalog.Image:
    """An image of which these wheels lie elsewhere."""
    keys = {"elsewhere": f"[{', '.join(entries)}]", "requirements": REQUIREMENTS}
    return checkout.image(keys)


def committed(image: catalog.Image) -> str:
    """Its lock, as a resolution leaves it, written to its file."""
    text = elsewhere.marked(image.lock.read_text(encoding="utf-8"), image)
    image.lock.write_text(text, encoding="utf-8")
    return text


# the lock


def test_a_wheel_without_a_known_sha256_is_marked_with_its_file_and_where_that_lies(
    checkout: Checkout,
) -> None:
    image = made(checkout, ENGINE)
    text = committed(image)
    assert f"vllm==0.12.0\n    {MARK}{WHEEL}\n" in text
    (missing,) = lock.unlocked(lock.read(image))
    assert (missing.name, missing.version, missing.lacking) == ("vllm", "0.12.0", WHEEL)
    assert missing.sha256 == ""


def test_a_published_sha256_stands_in_the_lock_with_its_source(checkout: Checkout) -> None:
    image = made(checkout, TORCH)
    text = committed(image)
    assert f"torch==2.9.0 \\\n    --hash=sha256:{KNOWN}\n    # sha256 from github a/b\n" in text
    assert lock.unlocked(lock.read(image)) == []


def test_a_lock_without_such_wheels_is_left_as_it_is(checkout: Checkout) -> None:
    image = checkout.image()
    text = image.lock.read_text(encoding="utf-8")
    assert elsewhere.marked(text, image) == text


def test_a_lock_that_cannot_be_read_is_remade(checkout: Checkout) -> None:
    image = made(checkout, ENGINE)
    resolved = image.lock.read_text(encoding="utf-8")
    image.lock.write_text("<<<<<<< ours\n", encoding="utf-8")
    assert f"{MARK}{WHEEL}" in elsewhere.marked(resolved, image)


def test_an_installer_that_asks_for_hashes_refuses_a_mark(tmp_path: Path) -> None:
    listed = tmp_path / "r.txt"
    entry = lock.Locked("vllm", "0.12.0", "", lacking=WHEEL)
    listed.write_text(entry.text, encoding="utf-8")
    argv = [host.uv(), "pip", "install", "--dry-run", "--require-hashes", "--no-index"]
    argv += ["--target", str(tmp_path / "t"), "--requirements", str(listed)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()


def test_a_distribution_without_hash_and_without_mark_is_still_no_lock(checkout: Checkout) -> None:
    image = made(checkout, ENGINE)
    text = committed(image).replace(f"    {MARK}{WHEEL}\n", "    # via nothing\n")
    image.lock.write_text(text, encoding="utf-8")
    with pytest.raises(Problem, match="'vllm' has no sha256"):
        lock.read(image)


# the question


def test_a_stand_in_says_what_the_catalog_file_says_and_is_always_the_same_file(
    checkout: Checkout, tmp_path: Path
) -> None:
    image = made(checkout, ENGINE, TORCH)
    written = elsewhere.stand_ins(image.elsewhere, image.requirements, tmp_path)
    assert [entry.name for entry in written] == ["torch"]
    wheel = tmp_path / "torch-2.9.0-cp311-cp311-linux_x86_64.whl"
    first = wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        told = email.message_from_string(archive.read("torch-2.9.0.dist-info/METADATA").decode())
    assert told["Name"] == "torch"
    assert told["Version"] == "2.9.0"
    assert told.get_all("Requires-Dist") == ["sympy>=1.13"]
    elsewhere.stand_ins(image.elsewhere, image.requirements, tmp_path)
    assert wheel.read_bytes() == first
    assert elsewhere.stubs(image.elsewhere) == ("vllm",)


def test_a_stand_in_of_no_pinned_release_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    image = made(checkout, TORCH)
    with pytest.raises(Problem, match="pin no release of it; add torch==") as caught:
        elsewhere.stand_ins(image.elsewhere, ["vllm==0.12.0", "torch>=2"], tmp_path)
    assert caught.value.code == 2


def test_uv_is_given_stubs_as_sources_and_stand_ins_as_wheels(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made(checkout, ENGINE, TORCH)
    asked: dict[str, Any] = {}

    def run(argv: Sequence[str], **given: Any) -> subprocess.CompletedProcess[str]:
        links = given["env"]["UV_FIND_LINKS"].split(",")
        asked.update(argv=list(argv), wheels=sorted(p.name for p in Path(links[0]).glob("*.whl")))
        Path(argv[argv.index("--output-file") + 1]).write_text("answer", encoding="utf-8")
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(host, "run", run)
    question = resolution.engine_question(image)
    assert resolution._answer(image, question, "requirements.txt") == "answer"
    assert asked["wheels"] == ["torch-2.9.0-cp311-cp311-linux_x86_64.whl"]
    argv = asked["argv"]
    assert argv[argv.index("--no-binary") + 1] == "vllm"


# --fill


def answer(image: catalog.Image, **changes: str) -> dict[tuple[str, str], str]:
    """What the indexes have: what is locked, and the missing wheel; with changes of hashes."""
    found = {(e.name, e.version): e.sha256 or NEW for e in lock.read(image)}
    return {key: changes.get(key[0], value) for key, value in found.items()}


def test_filling_puts_the_sha256_in_place_of_the_mark_and_moves_nothing_else(
    checkout: Checkout,
) -> None:
    image = made(checkout, ENGINE, TORCH)
    resolved = image.lock.read_text(encoding="utf-8")
    text = committed(image)
    done = elsewhere.filled(image, text, answer(image), lock.read(image))
    here = (
        f"vllm==0.12.0 \\\n    --hash=sha256:{NEW}\n    # sha256 from the index of V, by --fill\n"
    )
    assert done == text.replace(f"vllm==0.12.0\n    {MARK}{WHEEL}\n", here)
    image.lock.write_text(done, encoding="utf-8")
    assert lock.unlocked(lock.read(image)) == []
    # A later resolution keeps it, so that `--check` finds no drift.
    assert elsewhere.marked(resolved, image) == done
    # Of another release nobody has a sha256.
    other = resolved.replace("vllm==0.12.0", "vllm==0.12.1")
    assert MARK in elsewhere.marked(other, image)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drop": "ray"}, "ray is not asked for any more"),
        ({"add": "extra"}, "extra 1 is new"),
        ({"version": "ray"}, "ray is 9, locked is 2.52.1"),
        ({"file": "ray"}, "ray 2.52.1 has another file than the locked one"),
    ],
    ids=["gone", "new", "version", "file"],
)
def test_filling_refuses_whatever_else_moved(
    checkout: Checkout, change: dict[str, str], said: str
) -> None:
    image = made(checkout, ENGINE)
    text = committed(image)
    old, found = lock.read(image), answer(image)
    ((kind, name),) = change.items()
    key = next((key for key in found if key[0] == name), (name, "1"))
    if kind == "drop":
        del found[key]
    elif kind == "add":
        found[key] = NEW
    elif kind == "version":
        found[name, "9"] = found.pop(key)
    else:
        found[key] = sha256("other")
    with pytest.raises(Problem, match="more than the marks would move") as caught:
        elsewhere.filled(image, text, found, old)
    assert said in caught.value.sentence
    assert image.lock.read_text(encoding="utf-8") == text


def wheel(folder: Path, name: str, version: str, *requires: str) -> str:
    """Write a wheel of nothing but its metadata; returns its sha256."""
    entry = Elsewhere(
        name=name, index="", tags="py3-none-any", why="", requires=requires or ("pip",)
    )
    elsewhere._write(folder, entry, version)
    return host.sha256(folder / entry.file(version))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of every index, for the real uv."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"file://{empty}")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def half_locked(checkout: Checkout, served: Path) -> catalog.Image:
    """An image of an engine that lies elsewhere, of ray, and of pip; its lock has one mark."""
    entry = ENGINE.replace("cp311-cp311-linux_x86_64", "py3-none-any")
    keys = {
        "elsewhere": f"[{entry}]",
        "requirements": '["vllm==0.12.0", "ray==2.52.1"]',
        "expect": '{ ray = "2.52.1" }',
        "framework": None,
    }
    image = checkout.image(keys)
    lines = [f"vllm==0.12.0 \\\n    --hash=sha256:{KNOWN}\n    # via a\n"]
    for name, version in (("ray", "2.52.1"), ("pip", "26.0")):
        sha = wheel(served, name, version)
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{sha}\n    # via b\n")
    image.lock.write_text("# head\n" + "".join(lines), encoding="utf-8")
    committed(image)
    return image


def test_uv_fills_a_lock_from_an_index_that_has_the_wheel(checkout: Checkout, served: Path) -> None:
    image = half_locked(checkout, served)
    text = image.lock.read_text(encoding="utf-8")
    sha = wheel(served, "vllm", "0.12.0", "ray")
    assert locks.main([image.tag, "--fill"]) == 0
    done = image.lock.read_text(encoding="utf-8")
    assert lock.unlocked(lock.read(image)) == []
    assert f"--hash=sha256:{sha}\n    # sha256 from the index of V, by --fill" in done
    assert done.partition("ray==")[2] == text.partition("ray==")[2]


@pytest.mark.parametrize(
    ("requires", "code", "said"),
    [
        ("", 3, "which this machine does not reach"),
        ("numpy", 1, "more than the marks would move: numpy 1.0 is new"),
        ("ray<2", 1, "the wheels ask for something else than what was said of them"),
    ],
    ids=["no wheel", "another requirement", "another release"],
)
def test_uv_refuses_a_wheel_that_is_not_what_was_said_of_it(
    checkout: Checkout, served: Path, requires: str, code: int, said: str
) -> None:
    image = half_locked(checkout, served)
    text = image.lock.read_text(encoding="utf-8")
    wheel(served, "numpy", "1.0")
    if requires:
        wheel(served, "vllm", "0.12.0", requires)
    with pytest.raises(Problem) as caught:
        locks.main([image.tag, "--fill"])
    assert caught.value.code == code
    assert said in caught.value.sentence
    assert image.lock.read_text(encoding="utf-8") == text


def test_where_the_index_is_out_of_reach_filling_says_so_and_writes_nothing(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made(checkout, ENGINE, TORCH)
    text = committed(image)

    def nothing(*_: Any, leave: Any = (), **__: Any) -> str:
        assert set(leave) == {"vllm"}
        raise Problem("Because vllm==0.12.0 has no usable wheels")

    monkeypatch.setattr(resolution, "_answer", nothing)
    with pytest.raises(Problem, match="does not reach; name that index to uv or pip") as caught:
        locks.main([image.tag, "--fill"])
    assert caught.value.code == 3
    assert WHEEL in caught.value.sentence
    assert image.lock.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "arguments", [["--fill"], ["base", "--fill"], ["vllm-0.12", "--fill", "--check"]]
)
def test_filling_is_asked_of_images_alone(checkout: Checkout, arguments: list[str]) -> None:
    made(checkout, ENGINE)
    with pytest.raises(Problem, match="--fill takes images alone") as caught:
        locks.main(arguments)
    assert caught.value.code == 2


# what cannot be built


def test_a_build_says_in_one_sentence_which_files_it_cannot_get_and_where_they_are(
    checkout: Checkout,
) -> None:
    image = made(checkout, ENGINE)
    committed(image)
    with pytest.raises(Problem) as caught:
        build.build(image, None)  # type: ignore[arg-type]  # it is refused before the builder
    assert caught.value.code == 3
    sentence = caught.value.sentence
    assert sentence.startswith(f"{image.reference} cannot be built here: {WHEEL}, and lockfiles/")
    assert sentence.endswith("--fill' on a machine that reaches that index")
    assert "\n" not in sentence


def test_another_way_to_build_it_is_named_where_there_is_one(checkout: Checkout) -> None:
    table = '{ image = "v/release", torch = "2", torch-source = "a" }'
    keys = {"elsewhere": f"[{ENGINE}]", "requirements": REQUIREMENTS, "release": table}
    image = checkout.image(keys)
    committed(image)
    with pytest.raises(Problem) as caught:
        build.build(image, None)  # type: ignore[arg-type]  # it is refused before the builder
    assert caught.value.sentence.endswith("; or build on v/release, by '--from HOST'")


@pytest.mark.parametrize(
    "image", [i for i in IMAGES if lock.unlocked(lock.read(i))], ids=lambda i: i.tag
)
def test_that_is_all_that_keeps_an_image_of_the_catalog_from_being_built(
    image: catalog.Image,
) -> None:
    """Its Python, its Debian packages and its steps are there, for a machine with the files."""
    whole = [replace(entry, sha256=NEW, lacking="") for entry in lock.read(image)]
    elsewhere.refuse(image, whole)
    assert base.read(image.debs if image.debian else base.LOCK).debs
    assert pinned.dockerfile(build.recipe_text(image, whole)) == []


def test_ci_leaves_out_what_cannot_be_built_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = [image.reference for image in IMAGES if image not in matrix.buildable(IMAGES)]
    assert left == [i.reference for i in IMAGES if lock.unlocked(lock.read(i))]
    said = capsys.readouterr().err
    assert all(f"{reference} is left out: " in said for reference in left)


# the catalog


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (ENGINE.replace("why", f'sha256 = "{KNOWN}", why'), "of vllm has no source; give both"),
        (ENGINE.replace("why", 'source = "x", why'), "of vllm has no sha256; give both"),
        (ENGINE.replace("why", 'requires = ["a"], why'), "of vllm has no requires-source"),
        (ENGINE.replace("why", 'requires = ["a b"], requires-source = "x", why'), "(PEP 508)"),
        (ENGINE.replace("why", 'sha256 = "12", why'), "'elsewhere.sha256' has '12'; say it like"),
        (
            ENGINE.replace(", why", ", whi"),
            "unknown key 'elsewhere.whi'; did you mean 'elsewhere.why'",
        ),
        (ENGINE.replace('why = "w"', "why = 1"), "key 'elsewhere.why' must be a string"),
        (f"{ENGINE}, {ENGINE}", "'elsewhere.name' has 'vllm' twice"),
    ],
    ids=range(8),
)
def test_what_is_said_of_such_a_wheel_is_whole(checkout: Checkout, entry: str, said: str) -> None:
    with pytest.raises(Problem) as caught:
        made(checkout, entry)
    assert said in caught.value.sentence
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"python": '"3.12"'}, "key 'python' is 3.12, and Debian 12 has 3.11; add [interpreter]"),
        ({"interpreter": "3.11"}, "'interpreter' is given, and Debian 12 has Python 3.11"),
        ({"python": '"3.12"', "interpreter": "3.13"}, "is Python 3.13.1, 'python' says 3.12"),
    ],
    ids=range(3),
)
def test_a_python_comes_from_debian_or_from_a_file_that_is_named(
    checkout: Checkout, keys: dict[str, str], said: str
) -> None:
    if minor := keys.get("interpreter"):
        file = f"cpython-{minor}.1+20260101-x86_64-unknown-linux-gnu-install_only.tar.gz"
        table = f'{{ file = "{file}", sha256 = "{KNOWN}", source = "uv" }}'
        keys = {**keys, "interpreter": table}
    with pytest.raises(Problem) as caught:
        checkout.image(keys)
    assert said in caught.value.sentence


WITH_WHEELS = [(i.reference, e) for i in IMAGES for e in i.elsewhere]


@pytest.mark.parametrize(("reference", "entry"), WITH_WHEELS, ids=lambda each: str(each)[:40])
def test_every_sha256_of_the_catalog_names_the_repository_that_published_it(
    reference: str, entry: Elsewhere
) -> None:
    assert bool(entry.sha256) == entry.source.startswith("github ")
    image = catalog.find(reference, IMAGES)
    (locked,) = [one for one in lock.read(image) if one.name == entry.name]
    if entry.sha256:
        assert locked.sha256 == entry.sha256
    elif locked.lacking:
        assert locked.lacking == elsewhere.lacking(entry, locked.version)
    else:
        assert "by --fill" in image.lock.read_text(encoding="utf-8")


def test_uv_fetches_no_python_to_read_metadata(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "UV_PYTHON_DOWNLOADS", "automatic")
    seen = []

    def run(argv: Sequence[str], **given: Any) -> subprocess.CompletedProcess[str]:
        seen.append(given["env"]["UV_PYTHON_DOWNLOADS"])
        Path(argv[argv.index("--output-file") + 1]).write_text("", encoding="utf-8")
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(host, "run", run)
    image = checkout.image()
    resolution._answer(image, resolution.engine_question(image), "requirements.txt")
    assert seen == ["never"]

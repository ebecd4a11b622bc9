"""What the matrix of CI promises: an image that a change touches is built, and no other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.catalog import ROOT
from images.locking import lock
from images.proving import proofs
from images.publishing import matrix
from rollout.problem import Problem

from .. import reports
from ..conftest import Checkout, sha256

# Those that a runner can build: tests/unit/test_elsewhere.py looks at the others.
IMAGES = [image for image in catalog.load() if not lock.unlocked(lock.read(image))]
ALL = [image.reference for image in IMAGES]
COPIED = ("images", "entrypoints", "lockfiles")
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")


def git(folder: Path, *arguments: str) -> str:
    argv = [*GIT, *arguments]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's images as the one commit of another."""
    folder = tmp_path_factory.mktemp("origin")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "before")
    return folder


@pytest.fixture
def clone(origin: Path, tmp_path: Path) -> Path:
    """A clone of it for one test to change."""
    git(tmp_path, "clone", "--quiet", str(origin), "clone")
    return tmp_path / "clone"


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The station of a clone, which works on that clone."""
    argv = [sys.executable, "-m", "images.publishing.matrix", *arguments]
    return subprocess.run(argv, cwd=clone, capture_output=True, text=True, check=False)


def changed(clone: Path, revision: str = "HEAD") -> list[str]:
    done = run(clone, "--changed-since", revision, "--json")
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


# what has changed since a revision


def other_hash(path: Path) -> None:
    """One digit of the last sha256 of a lock becomes another."""
    head, sign, tail = path.read_text(encoding="utf-8").rpartition("sha256:")
    path.write_text(head + sign + ("1" if tail[0] == "0" else "0") + tail[1:], encoding="utf-8")


def test_where_nothing_changed_nothing_is_built(clone: Path) -> None:
    assert changed(clone) == []


def test_another_lock_is_another_image_and_no_other(clone: Path) -> None:
    image = IMAGES[-1]
    other_hash(clone / image.lock.relative_to(ROOT))
    assert changed(clone) == [image.reference]


def test_a_variable_in_a_catalog_file_changes_that_image(clone: Path) -> None:
    image = next(i for i in IMAGES if "[env]" in i.path.read_text(encoding="utf-8"))
    path = clone / image.path.relative_to(ROOT)
    text = path.read_text(encoding="utf-8")
    assert text.count("[env]\n") == 1
    path.write_text(text.replace("[env]\n", '[env]\nA_TEST = "1"\n'), encoding="utf-8")
    assert changed(clone) == [image.reference]


@pytest.mark.parametrize("backend", sorted({image.backend for image in IMAGES}))
def test_a_variable_of_a_fragment_changes_the_images_that_use_it(clone: Path, backend: str) -> None:
    """Of vLLM's alone, say; the fragment debian-12 is every image's."""
    name = {"transformers": "debian-12", "vllm": "vllm-engine"}.get(backend, backend)
    path = clone / "images/catalog/fragments" / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("[env]\n", '[env]\nANOTHER = "1"\n'), encoding="utf-8")
    users = [i.reference for i in IMAGES if name in [f.stem for f in i.fragments]]
    assert changed(clone) == users
    assert users == (
        ALL if name == "debian-12" else [i.reference for i in IMAGES if i.backend == backend]
    )


@pytest.mark.parametrize(
    "path",
    [
        "lockfiles/base.lock",
        "images/recipes/base.Dockerfile",
        "images/recipes/Dockerfile",
        "images/recipes/install",
        "images/building/builder.py",
        "images/building/buildah.py",
    ],
)
def test_what_every_image_is_made_of_changes_them_all(clone: Path, path: str) -> None:
    target = clone / path
    if target.suffix == ".lock":
        first, _, rest = target.read_text(encoding="utf-8").partition(" sha256:")
        digit = "1" if rest[0] == "0" else "0"
        target.write_text(f"{first} sha256:{digit}{rest[1:]}", encoding="utf-8")
    else:
        instruction = "\nRUN true\n" if path.endswith("recipes/Dockerfile") else "\n# another one\n"
        append(target, instruction)
    assert changed(clone) == ALL


def test_another_installer_changes_them_all(clone: Path) -> None:
    path = clone / matrix.TOOLS
    text = path.read_text(encoding="utf-8")
    assert text.count(f"\n{matrix.INSTALLER}") == 1
    path.write_text(text.replace(f"\n{matrix.INSTALLER}", f"\n{matrix.INSTALLER}9"), "utf-8")
    assert changed(clone) == ALL


def test_what_no_layer_is_made_of_changes_none(clone: Path) -> None:
    for path in ("images/telling/docs.py", "images/building/export.py", "images/recipes/launcher"):
        append(clone / path, "\n# another one\n")
    append(clone / matrix.TOOLS, "another-tool==1.0\n")
    assert changed(clone) == []


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("checks.py", "control: the engine had the weights", "control: it had all weights"),
        ("oracle.py", "# 700: exp of more", "# exp of more"),
    ],
    ids=["sentence", "comment"],
)
def test_what_is_reworded_in_our_own_package_changes_none(
    clone: Path, path: str, before: str, after: str
) -> None:
    file = clone / "entrypoints/rollout" / path
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")
    assert changed(clone) == []


def test_another_bound_changes_exactly_the_images_that_have_its_check(clone: Path) -> None:
    file = clone / "entrypoints/rollout/oracle.py"
    text = file.read_text(encoding="utf-8")
    assert "BOUND_FP8 = 1.080" in text
    file.write_text(text.replace("BOUND_FP8 = 1.080", "BOUND_FP8 = 1.070"), encoding="utf-8")
    wanted = [image.reference for image in IMAGES if image.smoke.fp8]
    assert wanted and changed(clone) == wanted


def test_another_promise_changes_its_image(clone: Path) -> None:
    image = catalog.find(catalog.DEFAULT, IMAGES)
    path = clone / image.path.relative_to(ROOT)
    text = path.read_text(encoding="utf-8")
    assert text.count("sleep-levels = [1, 2]") == 1
    path.write_text(text.replace("sleep-levels = [1, 2]", "sleep-levels = [1]"), encoding="utf-8")
    assert changed(clone) == [image.reference]


def test_a_new_image_counts_as_changed(clone: Path) -> None:
    image = IMAGES[0]
    for path in (image.path, image.lock):
        source = clone / path.relative_to(ROOT)
        shutil.copy(source, source.with_stem("a-new-one"))
    assert changed(clone) == [f"{image.repository}:a-new-one"]


def test_an_image_that_is_gone_is_not_built(clone: Path) -> None:
    (clone / IMAGES[0].path.relative_to(ROOT)).unlink()
    assert changed(clone) == []


def test_the_revision_asked_for_is_the_one_compared_with(clone: Path) -> None:
    other_hash(clone / IMAGES[0].lock.relative_to(ROOT))
    git(clone, "commit", "--quiet", "--all", "--message", "after")
    assert changed(clone, "HEAD^1") == [IMAGES[0].reference]
    assert changed(clone, "HEAD") == []


def test_a_revision_whose_code_fails_makes_every_image_count(clone: Path) -> None:
    path = clone / "images" / "catalog.py"
    whole = path.read_text(encoding="utf-8")
    path.write_text("raise RuntimeError('broken on purpose')\n", encoding="utf-8")
    git(clone, "commit", "--quiet", "--all", "--message", "broken")
    path.write_text(whole, encoding="utf-8")
    done = run(clone, "--changed-since", "HEAD", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, ALL)
    assert "so all images count: RuntimeError: broken on purpose" in done.stderr


@pytest.mark.parametrize("revision", ["no-such-thing", "0" * 40, "-h", "HEAD:images", ""])
def test_a_revision_that_is_none_is_wrong_usage(
    origin: Path, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "ROOT", origin)
    with pytest.raises(Problem, match=f"^--changed-since: git knows no commit {revision!r}") as no:
        matrix.main([f"--changed-since={revision}"])
    assert no.value.code == 2


@pytest.mark.parametrize("code", ["pass", "raise KeyboardInterrupt"], ids=["success", "interrupt"])
def test_the_other_revision_is_taken_away_again(clone: Path, code: str) -> None:
    program = (
        f"from images.host import revisions\nwith revisions.worktree('HEAD') as tree:\n    {code}"
    )
    # Without bytecode: its folders would count as something that is left.
    argv = [sys.executable, "-B", "-c", program]
    subprocess.run(argv, cwd=clone, capture_output=True, check=False)
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    assert git(clone, "status", "--porcelain", "--", *COPIED) == ""


# the list itself


def test_the_list_comes_from_the_catalog(capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([]) == 0
    assert capsys.readouterr().out.splitlines() == ALL


def test_json_is_the_last_line_and_nothing_else_is_on_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A workflow takes it by `tail -n 1` into a line of its outputs.
    assert matrix.main(["--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == ALL
    assert out.count("\n") == 1


def test_changed_and_proved_are_not_asked_at_once() -> None:
    with pytest.raises(SystemExit) as caught:
        matrix.main(["--proved", "--changed-since", "HEAD"])
    assert caught.value.code == 2


LAYERS = [f"sha256:{sha256(name)}" for name in ("base", "engine", "ours")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"layers": LAYERS[1:]}, "stale: its report is of other layers"),
        ({"program": None}, "by earlier checks: by the checks of 2026-01-02; "),
        ({"skipped": {"nccl": "one GPU"}, "verdict": "in-part"}, "lacks nccl"),
        (None, "there is no report"),
    ],
    ids=["proved", "stale", "earlier", "in part", "no report"],
)
def test_a_release_publishes_what_the_one_rule_allows(
    changes: dict[str, Any] | None,
    why: str,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = checkout.image()
    now = proofs.today(image, LAYERS)
    monkeypatch.setattr(proofs, "today", lambda *_: now)
    if changes is not None:
        host.write(proofs.kept(image), json.dumps(reports.of(image, LAYERS) | changes))
    if why == "lacks nccl":
        wanted = replace(now, transports=("cuda-ipc", "nccl"))
        monkeypatch.setattr(proofs, "today", lambda *_: wanted)
        why = "in part: all but nccl (one GPU); [not-shown] of the catalog has no reason for nccl"
    assert matrix.proved([image]) == ([] if why else [image.reference])
    said = capsys.readouterr().err
    assert said.startswith(f"{image.reference} is left out: {why}" if why else "")
    assert bool(said) == bool(why)


# what makes images


@pytest.mark.parametrize("name", [*matrix.MAKERS, matrix.TOOLS])
def test_a_maker_that_has_moved_is_not_compared_as_nothing(clone: Path, name: str) -> None:
    """Else nothing that turns inputs into layers would count any more, and nobody would notice."""
    git(clone, "rm", "--quiet", "--cached", name)
    shutil.move(clone / name, clone / "elsewhere")
    with pytest.raises(FileNotFoundError):
        matrix.makers(clone)


def test_a_list_of_makers_that_is_old_is_said(monkeypatch: pytest.MonkeyPatch, clone: Path) -> None:
    monkeypatch.setattr(matrix, "MAKERS", ("images/gone.py",))
    with pytest.raises(
        Problem,
        match=r"gone\.py is not there; name what builds images now in images/publishing/matrix\.py",
    ) as caught:
        matrix.same_makers(clone)
    assert caught.value.code == 2


def test_a_revision_that_kept_its_makers_elsewhere_builds_all_images(clone: Path) -> None:
    for name in matrix.MAKERS:
        (clone / name).unlink()
    assert not matrix.same_makers(clone)

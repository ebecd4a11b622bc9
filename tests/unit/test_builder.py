"""What a builder is told to do, and which one is taken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.building import builder, builders, isolation, streaming
from images.building.buildah import Buildah
from images.building.builder import Command, Recipe
from images.building.docker import Docker
from images.host import leash, owner
from rollout.problem import Problem

RECIPE = Recipe(
    Path("/context"),
    "localhost/verl-rollout:toy",
    1686355200,
    {"TORCH": "2", "BASE": "b:1"},
    Path("/fetched"),
)
# What both take, in one order whatever the order of the mappings.
COMMON = [
    *("--build-arg", "BASE=b:1", "--build-arg", "TORCH=2"),
    *("--build-context", "fetched=/fetched"),
    *("--tag", "localhost/verl-rollout:toy", "--file", "/context/Dockerfile", "/context"),
]
COMMAND = Command(
    "toy:1", ["rollout", "verify"], "1000:0", {"/here": "/report"}, {"B": "2", "A": "x y"}
)
OPTIONS = [
    *("--user", "1000:0", "--volume", "/here:/report", "--env", "A=x y", "--env", "B=2"),
]


def test_buildah_builds_with_one_timestamp_and_no_trace_of_itself() -> None:
    argv = Buildah().build_argv(RECIPE, Path("/id"))
    mark = f"/nonexistent/rollout-build-{owner.this()}"
    assert argv == [
        *("buildah", "--default-mounts-file", mark, "bud"),
        *("--isolation", "chroot", "--format", "oci", "--network", "host"),
        "--http-proxy=false",
        *("--layers", "--timestamp", "1686355200", "--identity-label=false"),
        *("--iidfile", "/id", *COMMON),
    ]


@pytest.mark.parametrize(("uid", "own"), [(0, []), (1000, ["buildah", "unshare"])])
def test_a_build_is_kept_apart_from_this_host(uid: int, own: list[str]) -> None:
    argv = isolation.command(["buildah", "bud"], uid, Path("/cache"), Path("/place"))
    script = argv[argv.index("-c") + 1]
    assert argv == [
        *own,
        *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        *("sh", "-c", script, "sh", "/cache", "/place", "buildah", "bud"),
    ]
    assert isolation.command(["x"], uid, None, Path("/place"))[-2:] == ["--", "x"]
    assert isolation.view(Path("/place")) == Path("/place/merged")


def test_a_builder_is_told_no_credentials() -> None:
    kept = {"PATH": "/bin", "HOME": "/root", "LC_ALL": "C", "TMPDIR": "/t", "XDG_RUNTIME_DIR": "/r"}
    kept |= {"CONTAINERS_STORAGE_CONF": "/s", "STORAGE_DRIVER": "vfs"}
    gone = ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "https_proxy", "NETRC", "ROLLOUT_KEY_PASSWORD")
    assert (
        isolation.environment(kept | dict.fromkeys((*gone, "GITHUB_TOKEN", "PATHS"), "x")) == kept
    )


def test_docker_builds_the_same_dockerfile_with_the_same_timestamp() -> None:
    plain = Docker().build_argv(RECIPE)
    archive = Docker().archive_argv(RECIPE, Path("/scratch/image.tar"))
    for argv in (plain, archive):
        assert argv[:2] == ["docker", "build"]
        assert argv[-len(COMMON) :] == COMMON
        assert "SOURCE_DATE_EPOCH=1686355200" in argv
        assert "--provenance=false" in argv, "provenance records who built it, and when"
        assert argv[argv.index("--network") + 1] == "none"
    assert "type=docker" in plain
    assert "type=docker,rewrite-timestamp=true,dest=/scratch/image.tar" in archive


def test_the_cache_is_left_out_where_that_is_asked_for() -> None:
    recipe = Recipe(Path("/context"), "toy:1", 0, cache=False)
    for argv in (
        lambda given: Buildah().build_argv(given, Path("/id")),
        Docker().build_argv,
    ):
        assert "--no-cache" in argv(recipe)
        assert "--no-cache" not in argv(RECIPE)


def test_a_command_runs_in_a_container_of_buildah() -> None:
    argv = Buildah().run_argv(COMMAND, "working")
    start = ["buildah", "run", "--isolation", "chroot"]
    assert argv == [*start, *OPTIONS, "working", "--", "rollout", "verify"]


def test_a_command_runs_in_a_container_of_docker() -> None:
    argv = Docker().run_argv(COMMAND, "working")
    start = ["docker", "run", "--rm", "--name", "working", "--entrypoint", "rollout"]
    assert argv == [*start, *OPTIONS, "toy:1", "verify"]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, str]]:
    """Exit code and output of commands, by a word in them; ``calls`` keeps their lines."""
    table: dict[str, tuple[int, str]] = {}

    def run(argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        table["calls"] = (0, table.get("calls", (0, ""))[1] + line + "\n")
        code, out = next((a for word, a in table.items() if word in line), (0, ""))
        return subprocess.CompletedProcess(argv, code, out, "")

    monkeypatch.setattr(host, "run", run)
    return table


BUILDAH_SAYS = """{"FromImageID": "0123", "FromImageDigest": "sha256:4567", "OCIv1":
    {"config": {"User": "1000:0"}, "rootfs": {"diff_ids": ["sha256:a", "sha256:b"]}}}"""
DOCKER_SAYS = """[{"Id": "sha256:0123", "Config": {"User": "1000:0"},
    "RootFS": {"Layers": ["sha256:a", "sha256:b"]}}]"""


CONTAINERD = '[["driver-type","io.containerd.snapshotter.v1"]]'
CLASSIC = '[["Backing Filesystem","extfs"]]'


@pytest.mark.parametrize(
    ("tool", "says", "store", "manifest"),
    [
        (Buildah(), BUILDAH_SAYS, "", "sha256:4567"),
        (Docker(), DOCKER_SAYS, CLASSIC, ""),
        (Docker(), DOCKER_SAYS, CONTAINERD, "sha256:0123"),
    ],
    ids=["buildah", "docker", "docker with containerd"],
)
def test_both_builders_describe_an_image_alike(
    tool: builder.Builder,
    says: str,
    store: str,
    manifest: str,
    answers: dict[str, tuple[int, str]],
) -> None:
    answers["inspect"], answers["docker info"] = (0, says), (0, store)
    found = tool.inspect("toy:1")
    assert found is not None
    layers = ("sha256:a", "sha256:b")
    described = (found.id, found.config, found.diff_ids, found.manifest)
    assert described == ("0123", {"User": "1000:0"}, layers, manifest)
    answers["inspect"] = (1, "")
    assert tool.inspect("toy:1") is None


@pytest.mark.parametrize("tool", [Buildah(), Docker()], ids=["buildah", "docker"])
def test_an_image_of_a_registry_is_brought_once_or_said_in_one_sentence(
    tool: builder.Builder, answers: dict[str, tuple[int, str]]
) -> None:
    image = f"registry.example/a@sha256:{64 * '0'}"
    answers["inspect"] = (1, "")
    tool.pull(image)
    assert f"{tool.name} pull --quiet {image}\n" in answers["calls"][1]
    answers["pull"] = (125, "")
    with pytest.raises(Problem, match=f"{image} cannot be pulled by {tool.name}: ") as caught:
        tool.pull(image)
    assert caught.value.code == 3
    answers["docker info"] = (0, CLASSIC)
    answers["inspect"] = (0, BUILDAH_SAYS if tool.name == "buildah" else DOCKER_SAYS)
    tool.pull(image)  # it is there


@pytest.mark.parametrize(
    "says",
    [
        "buildah version 1.28.2 (image-spec 1.0.2-dev, runtime-spec 1.0.2-dev)\n",
        "buildah version 1.28.2\n",
    ],
)
@pytest.mark.parametrize(("user", "told"), [(0, ""), (1234, " without root")])
def test_buildah_says_its_release_and_whose_it_is_and_nothing_of_its_own_parts(
    answers: dict[str, tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    user: int,
    told: str,
) -> None:
    answers["buildah --version"] = (0, says)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert Buildah().version() == f"buildah 1.28.2{told}"


@pytest.mark.parametrize(("driver", "copies"), [("overlay", 1), ("vfs", 3)])
def test_a_storage_that_copies_layers_needs_more_room(
    answers: dict[str, tuple[int, str]], driver: str, copies: int
) -> None:
    answers["buildah info"] = (0, json.dumps({"store": {"GraphDriverName": driver}}))
    assert Buildah().copies() == copies


def test_the_layers_of_an_image_come_in_the_order_of_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cc", "aa", "bb"]
    ran: list[Sequence[str]] = []

    def run(argv: Sequence[str], **_: Any) -> None:
        ran.append(argv)
        target = Path(argv[-1].removeprefix("dir:"))
        target.mkdir()
        for name in [*names, "version", "the configuration"]:
            (target / name).write_text(name)
        layers = [{"digest": f"sha256:{name}", "size": 2} for name in names]
        manifest = {"config": {"digest": "sha256:the configuration"}, "layers": layers}
        (target / "manifest.json").write_text(json.dumps(manifest))

    monkeypatch.setattr(host, "run", run)
    found = Buildah().blobs("localhost/toy:1", tmp_path)
    assert [path.read_text() for path in found] == names
    assert all(path.is_relative_to(tmp_path) for path in found)
    (argv,) = ran
    assert list(argv[:2]) == ["buildah", "push"]
    assert argv[-2] == "localhost/toy:1"
    assert "--disable-compression" in argv, "a diff_id is of the uncompressed layer"


def test_docker_builds_an_archive_where_its_store_takes_one(
    answers: dict[str, tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(streaming, "run", built.append)
    answers["docker info"] = (0, CONTAINERD)
    assert Docker().build(RECIPE) == RECIPE.name
    loaded = answers["calls"][1].splitlines()[-1].split()
    assert loaded[:2] == ["docker", "load"]
    archive = Path(loaded[-1])
    assert built == [Docker().archive_argv(RECIPE, archive)]
    assert archive.is_relative_to(tmp_path)
    assert not archive.parent.exists()


def test_docker_says_what_its_classic_store_cannot_do(
    answers: dict[str, tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built: list[list[str]] = []
    monkeypatch.setattr(streaming, "run", built.append)
    answers["docker info"] = (0, CLASSIC)
    assert Docker().build(RECIPE) == RECIPE.name
    assert built == [Docker().build_argv(RECIPE)]
    assert "keeps the time of each file" in capsys.readouterr().out


def test_a_working_container_is_removed_whatever_happened(
    answers: dict[str, tuple[int, str]],
) -> None:
    with pytest.raises(ZeroDivisionError), Buildah().container("toy:1") as name:
        raise ZeroDivisionError
    made, removed = answers["calls"][1].splitlines()
    assert made == f"buildah from --pull-never --name {name} toy:1", "nothing is downloaded"
    assert removed == f"buildah rm {name}"
    assert owner.parse(name) == owner.this(), "the next run has to know whose it was"


@pytest.mark.parametrize(
    ("user", "writer", "owners"), [(0, "1000:0", [(1000, 0)]), (1234, "0:0", [])]
)
def test_a_container_of_buildah_writes_a_report_as_somebody_who_may(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: int,
    writer: str,
    owners: list[tuple[int, int]],
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "chown", lambda _, uid, gid: given.append((uid, gid)))
    assert Buildah().writer(tmp_path) == writer
    assert given == owners


def test_a_container_of_docker_writes_a_report_as_the_folders_owner(tmp_path: Path) -> None:
    assert Docker().writer(tmp_path) == f"{tmp_path.stat().st_uid}:0"


# what killed runs left

GONE = replace(owner.this(), process=4194305)  # more than the greatest process id of Linux


def container(name: str, number: str) -> dict[str, str]:
    """A row of ``buildah containers --json``."""
    return {"id": number, "imageid": "abc", "imagename": "", "containername": name}


@pytest.mark.parametrize(
    ("name", "mounts", "swept"),
    [
        (f"rollout-container-{GONE}-0123abcd", "", True),
        (f"rollout-container-{owner.this()}-0123abcd", "", False),
        ("0123-working-container", f"/nonexistent/rollout-build-{GONE}", True),
        ("0123-working-container-7", f"/nonexistent/rollout-build-{owner.this()}", False),
        ("localhost-verl-rollout-base-working-container", "", False),
        ("0123-working-container", "/etc/mounts.conf", False),
        ("mine", f"/nonexistent/rollout-build-{GONE}", False),
        ("rollout-0123456789ab", "", False),
    ],
    ids=[
        *("a killed proof's", "a running proof's", "a killed build's", "a running build's"),
        *("somebody's build on our base", "somebody's", "a person's", "without an owner"),
    ],
)
def test_only_containers_of_ours_whose_owner_is_dead_are_removed(
    answers: dict[str, tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mounts: str,
    swept: bool,
) -> None:
    ended: list[tuple[str, str]] = []
    monkeypatch.setattr(leash, "ended", lambda *given: ended.append(given))
    answers["containers --json"] = (0, json.dumps([container(name, "7")]))
    answers["--type container 7"] = (0, json.dumps({"DefaultMountsFilePath": mounts}))
    Buildah().sweep()
    removed = [c for c in answers["calls"][1].splitlines() if c.startswith("buildah rm")]
    assert removed == (["buildah rm 7"] if swept else [])
    assert ended == ([("ROLLOUT_CONTAINER", name)] if swept else []), "what ran in it goes first"


def test_a_container_that_is_gone_when_it_is_looked_at_is_nobodys(
    answers: dict[str, tuple[int, str]],
) -> None:
    answers["containers --json"] = (0, json.dumps([container("0-working-container", "7")]))
    answers["--type container 7"] = (125, "")
    Buildah().sweep()
    assert "buildah rm" not in answers["calls"][1]


def test_a_storage_without_containers_is_swept_too(answers: dict[str, tuple[int, str]]) -> None:
    answers["containers --json"] = (0, "null")
    Buildah().sweep()
    assert answers["calls"][1] == "buildah containers --json\n"


def test_of_dockers_containers_those_of_dead_owners_are_removed(
    answers: dict[str, tuple[int, str]],
) -> None:
    dead, alive = (f"rollout-container-{whose}-01" for whose in (GONE, owner.this()))
    answers["docker ps"] = (0, f"{dead}\n{alive}\nrollout-container-mine\n")
    Docker().sweep()
    removed = [c for c in answers["calls"][1].splitlines() if c.startswith("docker rm")]
    assert removed == [f"docker rm --force {dead}"]


# which one


def test_an_unknown_builder_is_answered_with_the_known_ones() -> None:
    with pytest.raises(Problem) as caught:
        builders.detect("kaniko")
    assert caught.value.code == 2
    assert caught.value.sentence == "unknown builder 'kaniko'; known are buildah, docker"


def test_a_missing_docker_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Problem) as caught:
        builders.detect("docker")
    assert caught.value.code == 3
    way_out = "install it, or leave out --builder docker"
    assert caught.value.sentence == f"docker is not installed; {way_out}"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("docker version", "no docker engine answers; start it, or leave out --builder docker"),
        ("buildx", "docker has no buildx; install it, or leave out --builder docker"),
    ],
)
def test_a_docker_that_cannot_build_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, tuple[int, str]],
    word: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/docker")
    assert isinstance(builders.detect("docker"), Docker)
    answers.clear()
    answers[word] = (1, "")
    with pytest.raises(Problem) as caught:
        builders.detect("docker")
    assert (caught.value.code, caught.value.sentence) == (3, sentence)


def test_buildah_is_taken_and_asked_for_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    required: list[str] = []
    monkeypatch.setattr(host, "require", required.append)
    assert isinstance(builders.detect(), Buildah)
    assert required == ["buildah"]


@pytest.mark.parametrize("folder", ["/nonexistent", "/dev/null"])
@pytest.mark.parametrize("name", ["buildah", "docker"])
def test_a_wrong_folder_for_temporary_files_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    with pytest.raises(Problem, match=f"^TMPDIR is {folder}, no folder that can be") as caught:
        builders.detect(name)
    assert caught.value.code == 2

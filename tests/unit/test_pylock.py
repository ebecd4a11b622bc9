"""Which file of a release is locked: the one that an installer takes in the image."""

from __future__ import annotations

from itertools import permutations

import pytest

from images.locking import pylock
from rollout.problem import Problem

from ..conftest import sha256

MIRROR = "https://mirror.example/x"


def text(*files: str, sdist: str = "", keys: str = "") -> str:
    """A pylock.toml with the release 1 of x, whose files lie at a mirror."""
    tables = {file: f'{{ url = "{MIRROR}/{file}", hashes = {hashes(file)} }}' for file in files}
    lines = [
        'lock-version = "1.0"\ncreated-by = "uv"\n[[packages]]\nname = "x"',
        keys,
        f"wheels = [{', '.join(tables.values())}]" if files else "",
        f'sdist = {{ url = "{MIRROR}/{sdist}", hashes = {hashes(sdist)} }}' if sdist else "",
    ]
    return "\n".join(lines)


def hashes(file: str) -> str:
    return f'{{ sha256 = "{sha256(file)}" }}'


def chosen(*files: str, sdist: str = "", keys: str = "") -> str:
    """The file that is locked, whatever the order in which the index has them; empty for none."""
    answers = [
        pylock.hashes(pylock.read(text(*order, sdist=sdist, keys=keys)), "3.11")
        for order in permutations(files)
    ]
    assert all(answer == answers[0] for answer in answers)
    named = {sha256(file): file for file in (*files, sdist)}
    return ", ".join(named[one] for one in answers[0])


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        # an older and a newer glibc
        ("x-1-cp311-cp311-manylinux_2_28_x86_64.whl", "x-1-cp311-cp311-manylinux_2_17_x86_64.whl"),
        ("x-1-cp311-cp311-manylinux_2_36_x86_64.whl", "x-1-cp311-cp311-manylinux_2_35_x86_64.whl"),
        ("x-1-cp311-cp311-manylinux_2_27_x86_64.whl", "x-1-cp311-cp311-manylinux2014_x86_64.whl"),
        ("x-1-cp311-cp311-manylinux2014_x86_64.whl", "x-1-cp311-cp311-manylinux1_x86_64.whl"),
        ("x-1-cp311-cp311-manylinux2014_x86_64.whl", "x-1-cp311-cp311-linux_x86_64.whl"),
        # with and without compiled parts
        ("x-1-cp311-cp311-manylinux_2_17_x86_64.whl", "x-1-py3-none-any.whl"),
        ("x-1-cp311-none-any.whl", "x-1-py3-none-any.whl"),
        ("x-1-py3-none-manylinux1_x86_64.whl", "x-1-py3-none-any.whl"),
        ("x-1-py3-none-any.whl", "x-1-py2.py3-none-win_amd64.whl"),
        # for one Python, and for all from one on
        ("x-1-cp311-cp311-manylinux1_x86_64.whl", "x-1-cp38-abi3-manylinux_2_28_x86_64.whl"),
        ("x-1-cp311-abi3-manylinux_2_17_x86_64.whl", "x-1-cp38-abi3-manylinux_2_28_x86_64.whl"),
        ("x-1-cp38-abi3-manylinux_2_28_x86_64.whl", "x-1-cp38-abi3-manylinux_2_17_x86_64.whl"),
        ("x-1-cp38-abi3-manylinux_2_17_x86_64.whl", "x-1-py3-none-manylinux_2_28_x86_64.whl"),
        # what the platform does not take at all
        ("x-1-py3-none-any.whl", "x-1-cp312-cp312-manylinux_2_28_x86_64.whl"),
        ("x-1-py3-none-any.whl", "x-1-cp312-abi3-manylinux_2_28_x86_64.whl"),
        ("x-1-py3-none-any.whl", "x-1-cp311-cp311-manylinux_2_40_x86_64.whl"),
        ("x-1-py3-none-any.whl", "x-1-cp311-cp311-manylinux_2_28_aarch64.whl"),
        ("x-1-py3-none-any.whl", "x-1-cp311-cp311-musllinux_1_2_x86_64.whl"),
        ("x-1-py3-none-any.whl", "x-1-cp311-cp311-win_amd64.whl"),
    ],
)
def test_of_two_files_the_one_that_an_installer_takes_is_locked(better: str, worse: str) -> None:
    assert chosen(better, worse) == better


def test_of_many_files_the_most_specific_is_locked() -> None:
    best = "x-1-cp311-cp311-manylinux_2_28_x86_64.whl"
    found = chosen(
        "x-1-py3-none-any.whl",
        "x-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        best,
        "x-1-cp38-abi3-manylinux_2_34_x86_64.whl",
        "x-1-cp311-cp311-manylinux_2_39_x86_64.whl",
    )
    assert found == best


def test_a_file_of_several_tags_is_as_good_as_its_best() -> None:
    both = "x-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_28_x86_64.whl"
    assert chosen(both, "x-1-cp311-cp311-manylinux_2_17_x86_64.whl") == both


def test_a_file_is_known_by_its_address_with_its_local_version() -> None:
    compiled = "x-1%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"
    assert chosen("x-1%2Bcpu-py3-none-any.whl", compiled, keys='version = "1+cpu"') == compiled


def test_a_release_that_uv_may_only_build_is_locked_by_its_source() -> None:
    assert chosen(sdist="x-1.tar.gz") == "x-1.tar.gz"


def test_a_source_beside_a_wheel_that_fits_is_not_locked() -> None:
    wheel = "x-1-py3-none-any.whl"
    assert chosen(wheel, sdist="x-1.tar.gz") == wheel


@pytest.mark.parametrize(
    ("marker", "taken"),
    [
        ("platform_machine == 'x86_64'", True),
        ("python_full_version >= '3.11' and python_full_version < '3.12'", True),
        ("sys_platform == 'linux' and implementation_name == 'cpython'", True),
        ("platform_machine == 'aarch64'", False),
        ("sys_platform == 'win32' or os_name == 'nt'", False),
        ("python_version >= '3.12'", False),
    ],
)
def test_markers_are_held_against_the_image_and_not_against_this_machine(
    marker: str, taken: bool
) -> None:
    wheel = "x-1-py3-none-any.whl"
    assert chosen(wheel, keys=f'marker = "{marker}"') == (wheel if taken else "")


def test_a_release_without_a_file_for_the_platform_is_one_sentence() -> None:
    with pytest.raises(Problem) as caught:
        chosen("x-1-cp311-cp311-win_amd64.whl")
    sentence = caught.value.sentence
    assert sentence.startswith("a release has no file for x86_64-manylinux_2_36: ")
    assert "'x'" in sentence
    assert sentence.endswith("; ask for another release of it")


@pytest.mark.parametrize(
    "broken", ["=", "", 'lock-version = "9"\ncreated-by = "uv"\npackages = []']
)
def test_what_is_no_pylock_is_one_sentence(broken: str) -> None:
    with pytest.raises(Problem, match=r"uv wrote a pylock\.toml that cannot be read: .+; run this"):
        pylock.read(broken)

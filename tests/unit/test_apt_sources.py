"""Which of a machine's apt sources are Debian's own, and where dated archives lie."""

from __future__ import annotations

import pytest

from images.locking import apt_sources
from rollout.problem import Problem

DEBIAN_KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""\
# our mirror
Types: deb deb-src
URIs: http://mirror.example/debian/
# a comment inside a stanza
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {DEBIAN_KEY}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: https://node.example/node_20.x
Suites: nodistro
Components: main

Types: deb
URIs: https://vendor.example/linux
Suites: bookworm
Components: main
Signed-By: /etc/apt/keyrings/vendor.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://arm.example/debian
Suites: bookworm
Components: main
Architectures: arm64
"""
ONE_LINE = f"""\
# deb http://commented.example/debian bookworm main
deb [arch=amd64,i386 signed-by={DEBIAN_KEY}] http://mirror.example/debian bookworm main # ours
deb http://mirror.example/debian bookworm-updates contrib main
deb [trusted=yes]   http://mirror.example/debian-security   bookworm-security main
deb-src http://source.example/debian bookworm main
deb [arch=arm64] http://arm.example/debian bookworm main
deb http://mirror.example/debian trixie main
deb http://mirror.example/debian bookworm-backports main
deb http://mirror.example/debian bookworm non-free
deb https://vendor.example/linux bookworm main
deb https://vendor.example/linux/debian bookworm stable
deb cdrom:[Debian 12]/ bookworm main
deb http://flat.example/debian ./
"""


def test_only_debians_own_entries_are_taken_from_deb822_sources() -> None:
    found = apt_sources.deb822_sources(DEB822)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]


ONE = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"


@pytest.mark.parametrize("word", ["yes", "TRUE", "on", "enable", "with", "1", "", "perhaps"])
def test_an_entry_is_on_by_every_word_that_apt_takes_for_a_yes(word: str) -> None:
    assert len(apt_sources.deb822_sources(f"{ONE}Enabled: {word}\n")) == 1


@pytest.mark.parametrize("word", ["no", "false", "Off", "disable", "without", "0"])
def test_an_entry_is_off_by_every_word_that_apt_takes_for_a_no(word: str) -> None:
    assert len(apt_sources.deb822_sources(f"{ONE}enabled:{word}\n\n{ONE}")) == 1


def test_names_of_fields_are_read_in_any_case() -> None:
    assert apt_sources.deb822_sources(ONE.lower()) == apt_sources.deb822_sources(ONE)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{ONE}some words\n", "line 5 that is no field: 'some words'"),
        (f"some words\n\n{ONE}", "line 1 that is no field: 'some words'"),
        (f"# a comment\n a value without a name\n\n{ONE}", "line 2 that is no field: ' a value"),
        (f"{ONE}\n: x\n\n{ONE}", "line 6 that is no field: ': x'"),
        ("/etc/hostname", "line 1 that is no field: '/etc/hostname'"),
        (f"{ONE}\x1b[2J\n", r"line 5 that is no field: '\x1b[2J'"),
    ],
)
def test_a_line_that_is_no_field_is_refused_with_its_file_and_number(text: str, line: str) -> None:
    with pytest.raises(Problem) as caught:
        apt_sources.host_sources({"/etc/apt/sources.list.d/a.sources": text})
    assert caught.value.code == 2
    said = caught.value.sentence
    assert said.startswith(f"/etc/apt/sources.list.d/a.sources has a {line}")
    assert said.endswith("; mend or remove that line")


def test_only_debians_own_entries_are_taken_from_one_line_sources() -> None:
    found = apt_sources.one_line_sources(ONE_LINE)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]


def test_a_mirrors_key_and_trust_settings_are_kept() -> None:
    one_line = apt_sources.one_line_sources(ONE_LINE)
    assert one_line[0].options == (("Signed-By", DEBIAN_KEY),)
    assert one_line[2].options == (("Trusted", "yes"),)
    inline = apt_sources.sources_text(apt_sources.deb822_sources(DEB822)[2:])
    assert "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END" in inline


def test_both_forms_say_the_same_after_being_written_for_apt() -> None:
    written = apt_sources.sources_text(apt_sources.deb822_sources(DEB822))
    assert apt_sources.deb822_sources(written) == apt_sources.deb822_sources(DEB822)
    assert "\nArchitectures: amd64\n" in written


def test_files_that_apt_ignores_are_ignored() -> None:
    files = {"/etc/apt/sources.list.d/debian.sources.disabled": DEB822, "a.list.save": ONE_LINE}
    assert apt_sources.host_sources(files) == []


def test_the_same_entry_in_two_files_counts_once() -> None:
    line = "deb http://mirror.example/debian bookworm main"
    assert len(apt_sources.host_sources({"a.list": line, "b.list": line + "\n"})) == 1


def test_a_host_without_debian_12_gives_no_sources() -> None:
    other = "deb http://mirror.example/ubuntu noble main\n"
    assert apt_sources.host_sources({"/etc/apt/sources.list": other}) == []
    only_security = "deb http://mirror.example/debian-security bookworm-security main\n"
    assert apt_sources.host_sources({"/etc/apt/sources.list": only_security}) == []


# --- snapshots

DEFAULT = apt_sources.one_line_sources(
    "deb http://deb.example.org/debian bookworm main\n"
    "deb http://deb.example.org/debian bookworm-updates main\n"
    "deb http://security.example.org/debian-security bookworm-security main\n"
)


def test_a_snapshots_address_is_derived_from_the_default_mirror() -> None:
    found = apt_sources.snapshot_sources(DEFAULT, "20261119T000000Z", None)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://snapshot.example.org/archive/debian/20261119T000000Z", "bookworm"),
        ("http://snapshot.example.org/archive/debian/20261119T000000Z", "bookworm-updates"),
        (
            "http://snapshot.example.org/archive/debian-security/20261119T000000Z",
            apt_sources._SUITES[2],
        ),
    ]
    assert all(("Check-Valid-Until", "no") in s.options for s in found)


def test_a_snapshot_mirror_can_be_named() -> None:
    found = apt_sources.snapshot_sources(DEFAULT, "20261119T000000Z", "https://cache.example/snap/")
    assert found[0].uri == "https://cache.example/snap/archive/debian/20261119T000000Z"


@pytest.mark.parametrize("date", ["2026-11-19", "20261119", "20261119T000000", "latest"])
def test_a_snapshot_date_in_another_form_is_refused(date: str) -> None:
    with pytest.raises(Problem, match=f"'{date}'.*20261119T000000Z") as caught:
        apt_sources.snapshot_sources(DEFAULT, date, None)
    assert caught.value.code == 2


def test_an_unknown_snapshot_server_is_said_with_the_variable_that_names_one() -> None:
    odd = apt_sources.one_line_sources("deb http://mirror.example/debian bookworm main")
    with pytest.raises(Problem, match="ROLLOUT_SNAPSHOT_MIRROR"):
        apt_sources.snapshot_sources(odd, "20261119T000000Z", None)

"""What the base station promises, shown without a network, without root and without Debian."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from images import base, host
from images.problem import Problem

SHA = "ab" * 32
DEB = base.Deb("libc6", "2.36-9+deb12u10", SHA, "pool/main/g/glibc/libc6_2.36-9+deb12u10_amd64.deb")
GXX = base.Deb("g++", "4:12.2.0-3", "cd" * 32, "pool/main/g/gcc-defaults/g++_12.2.0-3_amd64.deb")
LOCK = base.Lock(("g++", "libc6"), "20261120T000000Z", (GXX, DEB))

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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no command may run."""

    def refuse(argv: list[str], **_: object) -> str:
        raise AssertionError(f"ran {argv}")

    monkeypatch.setattr(base, "_run", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = host.cache() / "debs"
    folder.mkdir(parents=True)
    return folder


def write_lock(folder: Path, *contents: bytes) -> Path:
    """A lock of packages p0, p1, … whose files have these contents."""
    debs = [
        base.Deb(f"p{n}", "1-1", hashlib.sha256(c).hexdigest(), f"pool/main/p/p{n}.deb")
        for n, c in enumerate(contents)
    ]
    path = folder / "base.lock"
    names = tuple(deb.name for deb in debs)
    path.write_text(base.render(base.Lock(names, "20261120T000000Z", tuple(debs))))
    return path


# --- sources


def test_only_debians_own_entries_are_taken_from_deb822_sources() -> None:
    found = base.deb822_sources(DEB822)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]


def test_only_debians_own_entries_are_taken_from_one_line_sources() -> None:
    found = base.one_line_sources(ONE_LINE)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]


def test_a_mirrors_key_and_trust_settings_are_kept() -> None:
    one_line = base.one_line_sources(ONE_LINE)
    assert one_line[0].options == (("Signed-By", DEBIAN_KEY),)
    assert one_line[2].options == (("Trusted", "yes"),)
    inline = base.sources_text(base.deb822_sources(DEB822)[2:])
    assert "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END" in inline


def test_both_forms_say_the_same_after_being_written_for_apt() -> None:
    written = base.sources_text(base.deb822_sources(DEB822))
    assert base.deb822_sources(written) == base.deb822_sources(DEB822)
    assert "\nArchitectures: amd64\n" in written


def test_files_that_apt_ignores_are_ignored() -> None:
    files = {"/etc/apt/sources.list.d/debian.sources.disabled": DEB822, "a.list.save": ONE_LINE}
    assert base.host_sources(files) == []


def test_the_same_entry_in_two_files_counts_once() -> None:
    line = "deb http://mirror.example/debian bookworm main"
    assert len(base.host_sources({"a.list": line, "b.list": line + "\n"})) == 1


def test_a_host_without_debian_12_gives_no_sources() -> None:
    other = "deb http://mirror.example/ubuntu noble main\n"
    assert base.host_sources({"/etc/apt/sources.list": other}) == []
    only_security = "deb http://mirror.example/debian-security bookworm-security main\n"
    assert base.host_sources({"/etc/apt/sources.list": only_security}) == []


def test_apt_may_take_nothing_that_does_not_sign_itself_debian_12() -> None:
    first, second = base._PREFERENCES.strip().split("\n\n")
    assert "release o=Debian,n=bookworm*" in first and "Pin-Priority: 500" in first
    assert "Pin-Priority: -1" in second


def test_the_private_apt_shares_no_state_with_the_host() -> None:
    text = base.apt_conf(Path("/private"))
    for key in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourceparts"):
        assert f'\n{key} "/private/' in text
    assert "Proxy" not in text and "Dir::Etc::Trusted" not in text  # the host's hold


# --- snapshots

DEFAULT = base.one_line_sources(
    "deb http://deb.example.org/debian bookworm main\n"
    "deb http://deb.example.org/debian bookworm-updates main\n"
    "deb http://security.example.org/debian-security bookworm-security main\n"
)


def test_a_snapshots_address_is_derived_from_the_default_mirror() -> None:
    found = base.snapshot_sources(DEFAULT, "20261119T000000Z", None)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://snapshot.example.org/archive/debian/20261119T000000Z", "bookworm"),
        ("http://snapshot.example.org/archive/debian/20261119T000000Z", "bookworm-updates"),
        ("http://snapshot.example.org/archive/debian-security/20261119T000000Z", base._SUITES[2]),
    ]
    assert all(("Check-Valid-Until", "no") in s.options for s in found)


def test_a_snapshot_mirror_can_be_named() -> None:
    found = base.snapshot_sources(DEFAULT, "20261119T000000Z", "https://cache.example/snap/")
    assert found[0].uri == "https://cache.example/snap/archive/debian/20261119T000000Z"


@pytest.mark.parametrize("date", ["2026-11-19", "20261119", "20261119T000000", "latest"])
def test_a_snapshot_date_in_another_form_is_refused(date: str) -> None:
    with pytest.raises(Problem, match=f"'{date}'.*20261119T000000Z") as caught:
        base.snapshot_sources(DEFAULT, date, None)
    assert caught.value.code == 2


def test_an_unknown_snapshot_server_is_said_with_the_variable_that_names_one() -> None:
    odd = base.one_line_sources("deb http://mirror.example/debian bookworm main")
    with pytest.raises(Problem, match="ROLLOUT_SNAPSHOT_MIRROR"):
        base.snapshot_sources(odd, "20261119T000000Z", None)


def test_a_lock_is_dated_by_the_archive_and_not_by_the_clock() -> None:
    dates = ["Sat, 06 Sep 2025 10:27:53 UTC", "Fri, 31 Oct 2025 20:13:04 +0000"]
    assert base.as_of(dates) == "20251101T000000Z"


# --- the lock


def test_a_lock_reads_back_as_it_was_written() -> None:
    assert base.parse(base.render(LOCK)) == LOCK


def test_the_header_names_the_command_that_remakes_it() -> None:
    assert "nox -s lock -- base" in base.render(LOCK).partition("\ng++=")[0]


@pytest.mark.parametrize(
    "line",
    [
        "zlib1g=1:1.2.13",
        f"zlib1g=1:1.2.13 {SHA} pool/main/z/zlib1g.deb",
        f"zlib1g=1:1.2.13 sha256:{SHA[:-1]} pool/main/z/zlib1g.deb",
        f"zlib1g=1:1.2.13 sha256:{SHA} http://mirror.example/pool/main/z/zlib1g.deb",
        f"zlib1g=1:1.2.13 sha256:{SHA} /pool/main/z/zlib1g.deb",
        "",
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(line: str) -> None:
    text = base.render(LOCK)
    number = len(text.splitlines()) + 1
    with pytest.raises(Problem, match=rf"^base\.lock:{number}: .*nox -s lock -- base") as caught:
        base.parse(f"{text}{line}\n", "base.lock")
    assert caught.value.code == 1


def test_lines_out_of_order_or_twice_are_named() -> None:
    for again in (GXX, DEB):
        text = base.render(LOCK)
        with pytest.raises(Problem, match=rf":{len(text.splitlines()) + 1}: .*edited by hand"):
            base.parse(f"{text}{again}\n")


@pytest.mark.parametrize("key", ["made by", "suite", "architecture", "as of", "requested"])
def test_a_header_that_lacks_a_line_is_refused(key: str) -> None:
    lines = [n for n in base.render(LOCK).splitlines() if not n.startswith(f"# {key}:")]
    with pytest.raises(Problem, match=key):
        base.parse("\n".join(lines))


def test_a_missing_lock_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="nox -s lock -- base"):
        base.read(tmp_path / "base.lock")


def test_a_lock_made_for_other_packages_is_stale() -> None:
    assert base.stale(LOCK, ["g++", "libc6"]) is None
    sentence = base.stale(LOCK, ["g++", "gcc"]) or ""
    assert "gcc is asked for but not locked" in sentence
    assert "libc6 is locked but no longer asked for" in sentence


def test_the_identity_changes_with_the_lock_and_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = base.identity(write_lock(tmp_path, b"one"))
    assert len(first) == 12 and base.identity(write_lock(tmp_path, b"one")) == first
    assert base.identity(write_lock(tmp_path, b"two")) != first
    monkeypatch.setattr(base, "_CUSTOMIZE", "true")
    assert base.identity(write_lock(tmp_path, b"one")) != first


# --- the committed files


def test_every_package_asked_for_has_a_reason_and_a_line_in_the_lock() -> None:
    reasons = base.reasons()
    assert all(len(reason.split()) > 3 for reason in reasons.values())
    assert base.stale(base.read(), reasons) is None


def test_a_package_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packages.toml"
    for text in ('gcc = ""', "gcc = true"):
        path.write_text(text)
        with pytest.raises(Problem, match="gcc has no reason"):
            base.reasons(path)


def test_the_committed_lock_is_as_this_code_would_write_it() -> None:
    text = base.LOCK.read_text(encoding="utf-8")
    assert base.render(base.parse(text)) == text
    assert "://" not in text


def test_the_image_gets_no_package_manager_that_fetches() -> None:
    names = {deb.name for deb in base.read().debs}
    assert not names & {"apt", "perl", "usrmerge", "curl", "wget"}


# --- fetching


def test_apts_list_of_files_becomes_lock_lines() -> None:
    said = (
        "'http://mirror.example/debian/pool/main/g/gcc-defaults/g%2b%2b_12.2.0-3_amd64.deb' "
        f"g++_4%3a12.2.0-3_amd64.deb 1356 SHA256:{'cd' * 32}\n"
        "'http://mirror.example/debian-security/pool/updates/main/x/xz/liblzma5_5.4.1-1_amd64.deb' "
        f"liblzma5_5.4.1-1_amd64.deb 205796 SHA256:{SHA}\n"
    )
    first, second = base.parse_uris(said)
    assert first == GXX
    assert second.path == "pool/updates/main/x/xz/liblzma5_5.4.1-1_amd64.deb"


def test_a_vanished_version_is_said_with_both_versions_and_both_ways_out() -> None:
    offered = {"libc6": ["2.36-9+deb12u13"], "g++": ["4:12.2.0-3"]}
    problem = base.vanished([GXX, DEB], offered, "20261120T000000Z")
    assert problem is not None and problem.code == 1
    for part in ("libc6 2.36-9+deb12u10", "2.36-9+deb12u13", "nox -s lock -- base"):
        assert part in problem.sentence
    assert "ROLLOUT_SNAPSHOT=20261120T000000Z" in problem.sentence
    assert "g++" not in problem.sentence


def test_nothing_has_vanished_where_every_version_is_offered() -> None:
    offered = {"libc6": ["3", DEB.version], "g++": [GXX.version]}
    assert base.vanished([GXX, DEB], offered, "20261120T000000Z") is None


def test_a_full_cache_needs_no_command_and_so_no_network(cache: Path, tmp_path: Path) -> None:
    lock = write_lock(tmp_path, b"one", b"two")
    for content in (b"one", b"two"):
        (cache / f"{hashlib.sha256(content).hexdigest()}.deb").write_bytes(content)
    assert base.fetch(lock) == cache


def test_a_damaged_file_in_the_cache_is_deleted_and_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = write_lock(tmp_path, b"one")
    kept = cache / f"{hashlib.sha256(b'one').hexdigest()}.deb"
    kept.write_bytes(b"other")
    with pytest.raises(AssertionError, match="ran"):  # it goes on to fetch
        base.fetch(lock)
    assert not kept.exists()
    assert "p0" in capsys.readouterr().out


def test_other_bytes_than_were_locked_never_reach_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = write_lock(tmp_path, b"one")

    def mirror(argv: list[str], cwd: Path | None = None, **_: object) -> str:
        if "show" in argv:
            return "Package: p0\nVersion: 1-1\n"
        if cwd:
            (cwd / "p0_1-1_amd64.deb").write_bytes(b"forged")
        return ""

    monkeypatch.setattr(base, "_run", mirror)
    monkeypatch.setattr(base, "_sources", lambda _: DEFAULT)
    with pytest.raises(Problem, match="p0 1-1 has sha256 " + hashlib.sha256(b"forged").hexdigest()):
        base.fetch(lock)
    assert list(cache.iterdir()) == []


def test_only_missing_files_are_asked_for_by_exact_version() -> None:
    argv = base.download_argv(Path("/c"), [GXX])
    assert argv[-2:] == ["download", "g++=4:12.2.0-3"]
    assert base.downloaded_name(GXX) == "g++_4%3a12.2.0-3"


# --- making


def test_the_tar_is_made_without_any_network_mirror() -> None:
    argv = base.mmdebstrap_argv(Path("/debs"), Path("/out.tar"), LOCK.requested)
    assert argv[-1] == "deb [trusted=yes] copy:/debs ./"
    assert argv[-3] == ""  # a suite name would bring mmdebstrap's default mirror
    assert not any("://" in argument for argument in argv)
    assert "--variant=essential" in argv and "--include=g++,libc6" in argv


def test_the_packages_scripts_see_nothing_of_the_caller() -> None:
    seen = base.build_environment({"LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo", "HOME": "/h"})
    assert seen["TZ"] == "UTC" and seen["LC_ALL"] == "C.UTF-8" and "LANG" not in seen
    assert seen["SOURCE_DATE_EPOCH"] == str(base.EPOCH)


def test_licences_stay_in_the_image() -> None:
    options = list(base._DPKG_OPTIONS)
    exclude = options.index("path-exclude=/usr/share/doc/*")
    assert options.index("path-include=/usr/share/doc/*/copyright") > exclude  # the last one wins


def test_an_image_that_differs_from_the_lock_is_found() -> None:
    def stanza(name: str, version: str, state: str = "installed") -> str:
        return f"Package: {name}\nStatus: install ok {state}\nVersion: {version}\n"

    good = stanza("g++", GXX.version) + "\n" + stanza("libc6", DEB.version)
    assert base.differences(LOCK.debs, good) == []
    assert base.differences(LOCK.debs, good + "\n" + stanza("perl", "5")) == [
        "perl=5 is installed but not locked"
    ]
    assert "libc6=2.36-9+deb12u10 is locked but not installed" in base.differences(
        LOCK.debs, stanza("g++", GXX.version) + "\n" + stanza("libc6", "2.36-9+deb12u13")
    )
    half = stanza("g++", GXX.version) + "\n" + stanza("libc6", DEB.version, "half-configured")
    assert "libc6 is half installed" in base.differences(LOCK.debs, half)


def test_a_failed_build_leaves_nothing_behind(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = write_lock(tmp_path, b"one")
    (cache / f"{hashlib.sha256(b'one').hexdigest()}.deb").write_bytes(b"one")

    def fail(argv: list[str], **_: object) -> str:
        if argv[0] == "mmdebstrap":
            Path(argv[-2]).write_bytes(b"half")
            raise Problem("no")
        return "Package: p0\nVersion: 1-1\n"

    monkeypatch.setattr(base, "_run", fail)
    monkeypatch.setattr(base, "reasons", lambda: {"p0": "why"})
    (tmp_path / "out").mkdir()
    with pytest.raises(Problem, match="no"):
        base.make(lock, tmp_path / "out" / "base.tar")
    assert list((tmp_path / "out").iterdir()) == []

"""What our own apt is told, and how its answers are read, shown without running it."""

from __future__ import annotations

from pathlib import Path

from images.locking import debian

SHA = "ab" * 32
DEB = debian.Deb(
    "libc6", "2.36-9+deb12u10", SHA, "pool/main/g/glibc/libc6_2.36-9+deb12u10_amd64.deb"
)
GXX = debian.Deb("g++", "4:12.2.0-3", "cd" * 32, "pool/main/g/gcc-defaults/g++_12.2.0-3_amd64.deb")


def test_apt_may_take_nothing_that_does_not_sign_itself_debian_12() -> None:
    first, second = debian._PREFERENCES.strip().split("\n\n")
    assert "release o=Debian,n=bookworm*" in first and "Pin-Priority: 500" in first
    assert "Pin-Priority: -1" in second


def test_the_private_apt_shares_no_state_with_the_host() -> None:
    text = debian.apt_conf(Path("/private"))
    for key in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourceparts"):
        assert f'\n{key} "/private/' in text
    assert "Proxy" not in text and "Dir::Etc::Trusted" not in text  # the host's hold


def test_a_lock_is_dated_by_the_archive_and_not_by_the_clock() -> None:
    dates = ["Sat, 06 Sep 2025 10:27:53 UTC", "Fri, 31 Oct 2025 20:13:04 +0000"]
    assert debian.as_of(dates) == "20251101T000000Z"


def test_apts_list_of_files_becomes_lock_lines() -> None:
    said = (
        "'http://mirror.example/debian/pool/main/g/gcc-defaults/g%2b%2b_12.2.0-3_amd64.deb' "
        f"g++_4%3a12.2.0-3_amd64.deb 1356 SHA256:{'cd' * 32}\n"
        "'http://mirror.example/debian-security/pool/updates/main/x/xz/liblzma5_5.4.1-1_amd64.deb' "
        f"liblzma5_5.4.1-1_amd64.deb 205796 SHA256:{SHA}\n"
    )
    first, second = debian.parse_uris(said)
    assert first == GXX
    assert second.path == "pool/updates/main/x/xz/liblzma5_5.4.1-1_amd64.deb"


def test_a_vanished_version_is_said_with_both_versions_and_both_ways_out() -> None:
    offered = {"libc6": ["2.36-9+deb12u13"], "g++": ["4:12.2.0-3"]}
    problem = debian.vanished([GXX, DEB], offered, "20261120T000000Z")
    assert problem is not None and problem.code == 1
    for part in ("libc6 2.36-9+deb12u10", "2.36-9+deb12u13", "nox -s lock -- base"):
        assert part in problem.sentence
    assert "ROLLOUT_SNAPSHOT=20261120T000000Z" in problem.sentence
    assert "g++" not in problem.sentence


def test_nothing_has_vanished_where_every_version_is_offered() -> None:
    offered = {"libc6": ["3", DEB.version], "g++": [GXX.version]}
    assert debian.vanished([GXX, DEB], offered, "20261120T000000Z") is None


def test_only_missing_files_are_asked_for_by_exact_version() -> None:
    argv = debian.download_argv(Path("/c"), [GXX])
    assert argv[-2:] == ["download", "g++=4:12.2.0-3"]
    assert debian.downloaded_name(GXX) == "g++_4%3a12.2.0-3"

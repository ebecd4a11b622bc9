"""What the base station promises, shown without a network, without root and without Debian."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from images import host
from images.locking import base, debian, rootfs
from rollout.problem import Problem

from .test_apt_sources import DEFAULT
from .test_debian import DEB, GXX, SHA

LOCK = base.Lock(("g++", "libc6"), "20261120T000000Z", (GXX, DEB))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no command may run."""

    def refuse(argv: list[str], **_: object) -> str:
        raise AssertionError(f"ran {argv}")

    monkeypatch.setattr(debian, "run", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = host.cache() / "debs"
    folder.mkdir(parents=True)
    return folder


def write_lock(folder: Path, *contents: bytes) -> Path:
    """A lock of packages p0, p1, … whose files have these contents."""
    debs = [
        debian.Deb(f"p{n}", "1-1", hashlib.sha256(c).hexdigest(), f"pool/main/p/p{n}.deb")
        for n, c in enumerate(contents)
    ]
    path = folder / "base.lock"
    names = tuple(deb.name for deb in debs)
    path.write_text(base.render(base.Lock(names, "20261120T000000Z", tuple(debs))))
    return path


# --- the lock


def test_a_lock_reads_back_as_it_was_written() -> None:
    assert base.parse(base.render(LOCK)) == LOCK


@pytest.mark.parametrize(
    ("debian_has", "whole"),
    [("3.11.2-6+deb12u9", "3.11.2"), ("1:3.11.14-1", "3.11.14"), ("3.11.2+dfsg-1", "3.11.2")],
)
def test_the_whole_version_of_python_is_the_one_that_it_says_of_itself(
    tmp_path: Path, debian_has: str, whole: str
) -> None:
    python = debian.Deb("python3.11", debian_has, "0" * 64, "pool/main/p/python3.11.deb")
    path = tmp_path / "base.lock"
    path.write_text(base.render(base.Lock(("python3.11",), LOCK.as_of, (python,))))
    assert base.python("3.11", path) == whole
    with pytest.raises(Problem, match=r"has no python3\.12"):
        base.python("3.12", path)


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
    assert caught.value.code == 2


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
    monkeypatch.setattr(rootfs, "_CUSTOMIZE", "true")
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

    monkeypatch.setattr(debian, "run", mirror)
    monkeypatch.setattr(debian, "_sources", lambda _: DEFAULT)
    with pytest.raises(Problem, match="p0 1-1 has sha256 " + hashlib.sha256(b"forged").hexdigest()):
        base.fetch(lock)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("sent", "kept"), [(b"one", True), (b"forged", False), (None, False)])
def test_a_version_that_no_index_lists_comes_from_the_pool_if_it_is_the_locked_one(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes | None,
    kept: bool,
) -> None:
    lock = write_lock(tmp_path, b"one")

    def mirror(argv: list[str], **_: object) -> str:
        if "download-file" in argv and sent is not None:
            assert argv[-3].endswith("/pool/main/p/p0.deb")
            Path(argv[-2]).write_bytes(sent)
        return "Package: p0\nVersion: 1-2\n" if "show" in argv else ""

    monkeypatch.setattr(debian, "run", mirror)
    monkeypatch.setattr(debian, "_sources", lambda _: DEFAULT)
    if kept:
        assert base.fetch(lock) == cache
        assert [file.read_bytes() for file in cache.iterdir()] == [b"one"]
        return
    with pytest.raises(Problem, match=r"no longer has p0 1-1 \(it offers 1-2\)"):
        base.fetch(lock)
    assert list(cache.iterdir()) == []


# --- making


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

    monkeypatch.setattr(debian, "run", fail)
    monkeypatch.setattr(base, "reasons", lambda: {"p0": "why"})
    (tmp_path / "out").mkdir()
    with pytest.raises(Problem, match="no"):
        base.make(lock, tmp_path / "out" / "base.tar")
    assert list((tmp_path / "out").iterdir()) == []

"""What the building machine's settings become, and what is said where something is missing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from images import host
from images.catalog import ROOT
from rollout.problem import Problem

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\n'
UBUNTU = 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n'
MINT = 'ID=linuxmint\nID_LIKE="ubuntu debian"\n'
FEDORA = 'NAME="Fedora Linux"\nID=fedora\nPRETTY_NAME="not debian"\n\n# a comment\n'


@pytest.fixture(autouse=True)
def no_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a CA bundle, unless a test makes one."""
    monkeypatch.setattr(host, "_CA_BUNDLES", ())


@pytest.mark.parametrize(
    ("pip", "uv", "value"),
    [
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "https://mirror.example/simple"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "https://a.example https://b.example"),
        ("PIP_NO_INDEX", "UV_NO_INDEX", "1"),
        ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST", "mirror.example"),
        ("PIP_DEFAULT_TIMEOUT", "UV_HTTP_TIMEOUT", "60"),
    ],
)
def test_a_setting_for_pip_is_one_for_uv(pip: str, uv: str, value: str) -> None:
    assert host.uv_environment({pip: value, "HOME": "/x"}) == {uv: value}
    assert host.uv_environment({pip: ""}) == {}


def test_folders_of_wheels_are_separated_as_uv_wants_them() -> None:
    found = host.uv_environment({"PIP_FIND_LINKS": "/a  /b\nhttps://c.example"})
    assert found == {"UV_FIND_LINKS": "/a,/b,https://c.example"}


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_a_setting_made_for_uv_wins(name: str) -> None:
    given = {"PIP_INDEX_URL": "https://pip.example", name: "https://uv.example"}
    # uv itself prefers UV_DEFAULT_INDEX to UV_INDEX_URL, its older name.
    assert host.uv_environment(given) == {name: "https://uv.example"}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"])
def test_a_proxy_is_honoured_in_capitals_and_without(name: str) -> None:
    both = {name: "one.example", name.lower(): "two.example"}
    assert host.uv_environment(both) == both
    assert host.uv_environment({name.lower(): "two.example"}) == {name.lower(): "two.example"}


@pytest.mark.parametrize(
    "name", ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
)
def test_a_ca_bundle_is_honoured_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    found = host.uv_environment({name: str(tmp_path / "ca.pem")})
    assert found == {"SSL_CERT_FILE": str(tmp_path / "ca.pem"), "UV_SYSTEM_CERTS": "1"}


def test_a_ca_bundle_that_is_not_there_gives_way_to_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "system.crt").touch()
    monkeypatch.setattr(host, "_CA_BUNDLES", (str(tmp_path / "system.crt"),))
    assert host.ca_bundle({"PIP_CERT": str(tmp_path / "none")}) == tmp_path / "system.crt"


def test_nothing_else_of_the_host_reaches_uv() -> None:
    assert host.uv_environment({"HOME": "/x", "PYTHONPATH": "y", "PIP_TARGET": "z"}) == {}


# missing tools


@pytest.mark.parametrize(
    ("text", "debian"),
    [(DEBIAN, True), (UBUNTU, True), (MINT, True), (FEDORA, False), ("", False)],
)
def test_debian_and_its_children_are_known(text: str, debian: bool) -> None:
    assert host.is_debian(text) is debian


@dataclass
class Machine:
    """A machine: its release, its user, its tools, and the commands it was made to run."""

    release: Path
    user: int = 1000
    tools: set[str] = field(default_factory=set)
    ran: list[list[str]] = field(default_factory=list)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path / "os-release")
    made.release.write_text(DEBIAN)
    monkeypatch.setattr(host, "Path", {"/etc/os-release": made.release}.__getitem__)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in made.tools else None)
    monkeypatch.setattr(os, "geteuid", lambda: made.user)
    monkeypatch.setattr(host, "run", lambda argv, **_: made.ran.append(list(argv)))
    return made


@pytest.mark.parametrize(
    ("release", "user", "tools", "how"),
    [
        (DEBIAN, 1000, {"apt-get"}, "run 'sudo apt-get install buildah mmdebstrap'"),
        (DEBIAN, 0, set(), "run 'sudo apt-get install buildah mmdebstrap'"),
        (FEDORA, 0, {"apt-get"}, "install them for your system"),
    ],
    ids=["not root", "no apt-get", "not Debian"],
)
def test_what_may_not_be_installed_is_said(
    machine: Machine, release: str, user: int, tools: set[str], how: str
) -> None:
    machine.release.write_text(release)
    machine.user, machine.tools = user, tools
    with pytest.raises(Problem) as caught:
        host.require("mmdebstrap", "buildah")
    assert caught.value.code == 3
    needs = "building needs buildah mmdebstrap, not found on this machine"
    assert caught.value.sentence == f"{needs}; {how}"
    assert machine.ran == []


def test_what_is_missing_is_installed_by_root_on_debian(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.user, machine.tools = 0, {"apt-get"}
    host.require("buildah", "apt-get")
    update, install = machine.ran
    assert update[:2] == ["apt-get", "update"]
    assert install == [
        *("apt-get", "install", "--yes", "--no-install-recommends", "buildah", "-qq")
    ], "what is there is left alone"
    assert capsys.readouterr().out == "installing with apt-get: buildah\n"


def test_what_is_there_is_not_asked_for_again(machine: Machine) -> None:
    machine.user, machine.tools = 0, {"buildah", "apt-get"}
    host.require("buildah")
    assert machine.ran == []


# commands


def test_a_failed_command_is_said_with_its_last_line() -> None:
    argv = ["sh", "-c", "echo one >&2; echo two >&2; exit 4"]
    with pytest.raises(Problem, match=r"^'sh -c .*' exited with 4: two$") as caught:
        host.run(argv, quiet=True)
    assert caught.value.code == 1
    assert host.run(argv, quiet=True, check=False).returncode == 4


def test_a_command_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a folder that may not be searched says otherwise
    with pytest.raises(Problem, match="command 'no-such-command' is not installed") as caught:
        host.run(["no-such-command"])
    assert caught.value.code == 3


def test_a_missing_uv_is_answered_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(Problem, match="the pinned uv is missing; run this through nox") as caught:
        host.uv()
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Problem("this is wrong", 3), 3, "error: this is wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted; run it again to go on\n"),
        (
            OSError(errno.ENOSPC, "full", "/x/y"),
            1,
            "error: no disk space left (/x/y); free some and run it again\n",
        ),
        (OSError(errno.EDQUOT, "q"), 1, "error: no disk space left; free some and run it again\n"),
    ],
)
def test_what_a_station_raises_is_one_sentence_and_an_exit_code(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Sequence[str]) -> int:
        raise raised

    assert host.guarded(main, []) == code
    assert capsys.readouterr() == ("", said)


def test_an_odd_byte_in_what_a_command_says_is_no_traceback() -> None:
    done = host.run(["printf", "caf\\351\\n"], quiet=True)
    assert done.stdout == "caf\ufffd\n"
    with pytest.raises(Problem, match=r"exited with 3: caf.$"):
        host.run(["sh", "-c", "printf 'caf\\351\\n' >&2; exit 3"], quiet=True)


def test_another_package_called_rollout_does_not_answer_in_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "__init__.py").write_text("")
    program = "import images, rollout.problem; print(rollout.problem.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(ROOT / "entrypoints/rollout/problem.py"), done.stderr


def test_what_nobody_expected_keeps_its_traceback() -> None:
    def main(_: Sequence[str]) -> int:
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        host.guarded(main, [])


def test_a_station_gets_its_arguments_and_gives_its_code() -> None:
    assert host.guarded(len, ["a", "b"]) == 2


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.sqsh"
    with pytest.raises(KeyboardInterrupt), host.replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(file.parent.iterdir())
    with host.replacing(file) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in file.parent.iterdir()] == ["x.sqsh"]


def test_a_file_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    host.write(tmp_path / "new/a.lock", "é\n")
    assert (tmp_path / "new/a.lock").read_bytes() == "é\n".encode()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.lock"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.write_text("old\n")
    with pytest.raises(UnicodeEncodeError):
        host.write(path, "new \udc80")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, target: Path) -> Path:
        assert self.read_text() == "new\n", "the new text is whole before it replaces the old"
        assert target == path
        raise KeyboardInterrupt

    path = tmp_path / "a.lock"
    path.write_text("old\n")
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.write(path, "new\n")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_large_files_lie_beside_the_caches_and_not_in_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/tmp")
    folder = host.scratch()
    assert folder.is_dir()
    assert folder.is_relative_to(host.cache())
    assert host.cache().is_relative_to(tmp_path)
    assert host.scratch() == folder, "it may be there already"


def test_a_sentence_that_quotes_a_huge_line_stays_one_that_can_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    huge = "y" * 10_000_000

    def main(_: Sequence[str]) -> int:
        raise Problem(f"x.lock:7: not a requirement: {huge!r}", 2)

    assert host.guarded(main, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: x.lock:7: not a requirement: 'yyy")
    assert said.endswith("characters more)\n")
    assert len(said) < 5000
    assert Problem("x" * 3000).sentence == "x" * 3000

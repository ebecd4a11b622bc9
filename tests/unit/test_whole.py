"""Nothing in an image changes unnoticed, outside of its environment either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout import inventory, verify
from rollout.environment import Findings
from rollout.mounts import Mounts
from rollout.problem import Problem
from rollout.whole import whole

from .conftest import SITE, found, seal

NONE = Mounts(frozenset(), frozenset())


def mounted(*points: str) -> Callable[[str, str], Mounts]:
    return lambda _root, _prefix: Mounts(frozenset(points), frozenset())


@pytest.fixture
def root(prefix: Path) -> Path:
    """The root of an image, with a little of what a real one has around its environment."""
    root = prefix.parents[1]
    for name, mode in {"usr/bin/env": 0o755, "etc/issue": 0o644, "etc/passwd": 0o644}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
        (root / name).chmod(mode)
    (root / "bin").symlink_to("usr/bin")
    for folder in ("usr/lib", "etc/empty", "var/cache/rollout", "tmp", "proc", "opt/added"):
        (root / folder).mkdir(parents=True)
    seal(prefix)
    return root


def look(root: Path, *points: str, mapped: bool = False) -> Findings:
    return whole(root / "opt/rollout", mounted(*points), lambda: mapped)


def test_an_image_that_nobody_touched_is_whole(root: Path) -> None:
    findings = look(root)
    assert not findings.problems
    assert "aside" not in findings.metrics
    assert findings.metrics["entries"] > 20


def test_the_list_is_the_same_each_time(root: Path) -> None:
    first = inventory.make(root / "opt/rollout", NONE)
    assert inventory.make(root / "opt/rollout", NONE) == first


def test_names_that_no_terminal_should_show_are_listed_and_read_back(root: Path) -> None:
    (root / "usr/lib/a\tb\n\\").write_text("x")
    (root / "usr/lib/link").symlink_to("a\tb\n\\")
    (root / "usr/lib/Főtanúsítvány").write_text("x")
    seal(root / "opt/rollout")
    assert not look(root).problems


def replaced(root: Path) -> None:
    (root / "usr/bin/env").write_text("usr/bin/eNv\n")


def longer(root: Path) -> None:
    (root / "etc/issue").write_text("longer\n" * 9)


def removed(root: Path) -> None:
    (root / "etc/issue").unlink()


def folder_removed(root: Path) -> None:
    (root / "etc/empty").rmdir()


def redirected(root: Path) -> None:
    (root / "bin").unlink()
    (root / "bin").symlink_to("opt")


def a_link_no_more(root: Path) -> None:
    (root / "bin").unlink()
    (root / "bin").mkdir()


def preload(root: Path) -> None:
    (root / "etc/ld.so.preload").touch()


def foreign_folder(root: Path) -> None:
    (root / "usr/lib/x/y").mkdir(parents=True)
    (root / "usr/lib/x/z").touch()


def foreign_folder_inside(root: Path) -> None:
    (root / "opt/rollout" / SITE / "x").mkdir()


def set_user(root: Path) -> None:
    (root / "usr/bin/env").chmod(0o4755)


def not_executable(root: Path) -> None:
    (root / "usr/bin/env").chmod(0o644)


def mode_inside(root: Path) -> None:
    (root / "opt/rollout" / SITE / "other.py").chmod(0o666)


def pipe(root: Path) -> None:
    os.mkfifo(root / "pipe")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (replaced, "/usr/bin/env: changed: sha256"),
        (longer, "/etc/issue: changed: 63 bytes, not 10; take the image anew"),
        (removed, "/etc/issue: missing: a file; take the image anew"),
        (folder_removed, "/etc/empty: missing: a folder; take"),
        (redirected, "/bin: changed: a link to opt, not to usr/bin; take"),
        (a_link_no_more, "/bin: changed: a folder, not a link; take"),
        (preload, "/etc/ld.so.preload: extra: a file that no layer has; remove it; additions"),
        (foreign_folder, "/usr/lib/x: extra: a folder with 2 entries that no layer has; remove"),
        (foreign_folder_inside, f"{SITE}/x: extra: an empty folder that no layer has; remove"),
        (set_user, "/usr/bin/env: changed: mode 4755, not 0755 (the set-user bit is set); take"),
        (not_executable, "/usr/bin/env: changed: mode 0644, not 0755 (nobody may execute it)"),
        (mode_inside, f"{SITE}/other.py: changed: mode 0666, not 0644; take"),
        (pipe, "/pipe: extra: a device, pipe or socket; remove it"),
    ],
)
def test_every_change_is_one_finding(
    root: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(root)
    text = found(look(root))
    assert text.startswith(sentence)
    assert text.count("\n") == 0
    check = verify.run(root / "opt/rollout", ["files"])[0]
    assert check.status == "failed"
    assert sentence in str(check.reason)


def test_a_list_that_is_lost_or_damaged_is_a_finding(root: Path) -> None:
    path = root / "opt/rollout" / inventory.LIST
    path.write_text("nonsense\n")
    assert "cannot be read (it is damaged)" in found(look(root))
    path.unlink()
    assert "cannot be read (No such file" in found(look(root))


def test_a_list_that_was_changed_to_fit_is_found_by_the_seal(root: Path) -> None:
    (root / "etc/issue").unlink()
    path = root / "opt/rollout" / inventory.LIST
    kept = [line for line in path.read_text().splitlines(True) if "etc/issue" not in line]
    path.write_text("".join(kept))
    assert not look(root).problems
    check = verify.run(root / "opt/rollout", ["files"])[0]
    assert f"{inventory.LIST}: changed: sha256" in str(check.reason)


# mounts


def test_what_is_mounted_is_no_change_and_what_it_covers_is_said(root: Path) -> None:
    (root / "etc/issue").write_text("the site's own\n")
    (root / "usr/lib/firmware/nvidia").mkdir(parents=True)
    (root / "usr/lib/firmware/nvidia/gsp.bin").touch()
    findings = look(root, "etc/issue", "usr/lib/firmware/nvidia/gsp.bin")
    assert not findings.problems
    assert findings.metrics["aside"] == "covered by mounts: /etc/issue"


def test_a_mount_that_shows_the_same_covers_nothing(root: Path) -> None:
    findings = look(root, "etc/issue", "usr")
    assert not findings.problems
    assert "aside" not in findings.metrics


def test_links_to_the_driver_are_no_change_and_other_links_are(root: Path) -> None:
    (root / "usr/lib/gbm").mkdir()
    (root / "usr/lib/libcuda.so.550").touch()
    (root / "usr/lib/libcuda.so.1").symlink_to("libcuda.so.550")
    (root / "usr/lib/gbm/nvidia-drm_gbm.so").symlink_to("../libcuda.so.1")
    assert not look(root, "usr/lib/libcuda.so.550").problems
    assert "/usr/lib/libcuda.so.1: extra: a link to libcuda.so.550" in found(look(root))


def test_without_a_list_of_mounts_that_is_said(root: Path) -> None:
    findings = whole(root / "opt/rollout", lambda *_: NONE._replace(known=False), lambda: False)
    assert not findings.problems
    assert findings.metrics["aside"] == "mounts unknown (no /proc/self/mountinfo)"


# what a run writes, and what users add


def test_places_that_every_run_writes_to_are_not_looked_into(root: Path) -> None:
    for name in ("tmp/x", "var/cache/rollout/x", "opt/added/x", "etc/hosts", "etc/resolv.conf"):
        (root / name).touch()
    assert "aside" not in look(root).metrics
    assert not look(root).problems


def test_additions_in_folders_of_their_own_are_named_and_are_no_damage(root: Path) -> None:
    for name in ("data", "opt/mine"):
        (root / name).mkdir()
        (root / name / "train.py").touch()
    findings = look(root)
    assert not findings.problems
    assert findings.metrics["aside"] == "beside the image: /data, /opt/mine"


def test_settings_of_pip_may_lie_where_pip_looks_and_others_may_not(root: Path) -> None:
    (root / "etc/pip.conf").touch()
    (root / "etc/uv").mkdir()
    (root / "etc/uv/uv.toml").touch()
    findings = look(root)
    assert not findings.problems
    assert "/etc/pip.conf" in findings.metrics["aside"]
    (root / "etc/other").touch()
    assert "/etc/other: extra: a file that no layer has" in found(look(root))


def test_the_user_that_an_engine_adds_is_said_and_is_no_damage(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("12345:*:12345:0::/:/bin/sh\n")
    (root / ".dockerenv").touch()
    findings = look(root)
    assert not findings.problems
    assert findings.metrics["aside"] == "written by an engine: /.dockerenv, /etc/passwd"


# owners; whose files these are differs among those who run the tests, so the list is changed


def owned(root: Path, owners: Callable[[str, int, int], tuple[int, int]]) -> None:
    """Other owners in the list than there are, and those of plain files as well."""
    path = root / "opt/rollout" / inventory.LIST
    listed = inventory.parse(path.read_text())
    text = ""
    for name, entry in listed.items():
        uid, gid = owners(name, entry.uid, entry.gid)
        text += inventory._line(name, entry._replace(uid=uid, gid=gid))
    path.write_text(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's own files have the owner of an image's")
def test_one_file_of_another_owner_is_a_change(root: Path) -> None:
    os.chown(root / "etc/passwd", 3, 3)
    seal(root / "opt/rollout")
    owned(root, lambda name, uid, gid: (5, gid) if name == "etc/issue" else (uid, gid))
    assert found(look(root)) == (
        "/etc/issue: changed: it belongs to 0:0, not 5:0; take the image anew"
    )
    findings = look(root, mapped=True)
    assert not findings.problems
    assert "owners not comparable (root's are 0:0's here)" in findings.metrics["aside"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_an_image_of_another_user_is_called_not_comparable_and_a_single_file_is_found(
    root: Path,
) -> None:
    for path in root.rglob("*"):
        os.chown(path, 7, 7, follow_symlinks=False)
    findings = look(root)
    assert not findings.problems
    assert findings.metrics["aside"] == "owners not comparable (root's are 7:7's here)"
    os.chown(root / "etc/issue", 8, 7)
    assert found(look(root)).startswith("/etc/issue: changed: it belongs to 8:7, not 0:0")


def test_what_this_user_may_not_read_is_counted_and_its_mode_is_compared(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "etc/opasswd").touch(mode=0o600)
    seal(root / "opt/rollout")
    monkeypatch.setattr(os, "access", lambda *_: False)
    findings = look(root)
    assert not findings.problems
    assert findings.metrics["aside"] == "1 not readable for this user"
    (root / "etc/opasswd").chmod(0o640)
    assert "/etc/opasswd: changed: mode 0640, not 0600" in found(look(root))


# the build


def test_no_list_is_made_of_an_image_with_a_device_or_a_pipe(root: Path) -> None:
    os.mkfifo(root / "usr/lib/pipe")
    with pytest.raises(Problem, match="/usr/lib/pipe is no file, folder or link"):
        inventory.make(root / "opt/rollout", NONE)

"""What the file check promises: not one byte in an image differs from what was installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rollout import hashes

from .conftest import COMPILED, SITE, flip, found, install, record_line, seal


def test_an_untouched_environment_has_nothing_wrong(prefix: Path) -> None:
    findings = hashes.files(prefix)
    assert found(findings) == ""
    there = [path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()]
    assert findings.metrics["files"] == len(there) - 1  # the seal does not seal itself
    assert findings.metrics["bytes"] == sum(p.stat().st_size for p in there) - len(
        (prefix / hashes.SEAL).read_bytes()
    )


@pytest.mark.parametrize(
    "path",
    [
        f"{SITE}/demo/core.bin",
        f"{SITE}/rollout/verify.py",
        f"{SITE}/demo-1.0.dist-info/RECORD",
        f"{SITE}/demo-1.0.dist-info/METADATA",
        "bin/demo",
        "pyvenv.cfg",
        "share/rollout/image.json",
        "share/rollout/requirements.lock",
        COMPILED,
    ],
)
def test_one_flipped_byte_in_any_file_is_found(prefix: Path, path: str) -> None:
    flip(prefix / path)
    findings = hashes.files(prefix)
    assert f"{path}: changed" in found(findings)
    assert findings.metrics["changed"] >= 1


def test_one_flipped_byte_in_a_compiled_file_is_found_and_nothing_else_is_accused(
    prefix: Path,
) -> None:
    flip(prefix / COMPILED)
    assert [finding.where for finding in hashes.files(prefix).problems] == [COMPILED]


def test_a_file_that_grew_is_named_with_both_sizes(prefix: Path) -> None:
    path = prefix / SITE / "other.py"
    path.write_bytes(path.read_bytes() + b"\n")
    assert f"{SITE}/other.py: changed: 13 bytes, not 12" in found(hashes.files(prefix))


@pytest.mark.parametrize("path", [f"{SITE}/demo/__init__.py", COMPILED, "pyvenv.cfg", "bin/demo"])
def test_a_missing_file_is_named(prefix: Path, path: str) -> None:
    (prefix / path).unlink()
    assert found(hashes.files(prefix)) == f"{path}: missing"


def test_a_whole_missing_distribution_is_named_file_by_file(prefix: Path) -> None:
    shutil.rmtree(prefix / SITE / "demo-1.0.dist-info")
    findings = found(hashes.files(prefix))
    assert f"{SITE}/demo-1.0.dist-info/RECORD: missing" in findings
    assert f"{SITE}/demo/core.bin: extra" in findings  # nothing vouches for it any more


@pytest.mark.parametrize("path", [f"{SITE}/usercustomize.py", "bin/tool", f"{SITE}/demo/.hidden"])
def test_an_extra_file_is_named(prefix: Path, path: str) -> None:
    (prefix / path).write_text("import this\n")
    findings = hashes.files(prefix)
    assert found(findings).startswith(f"{path}: extra")
    assert findings.metrics["extra"] == 1


def test_a_pipe_is_named_and_never_waited_for(prefix: Path) -> None:
    os.mkfifo(prefix / SITE / "demo/pipe")
    assert f"{SITE}/demo/pipe: extra" in found(hashes.files(prefix))


def test_a_link_that_points_elsewhere_is_named_with_both_targets(prefix: Path) -> None:
    (prefix / "lib64").unlink()
    (prefix / "lib64").symlink_to("/tmp")
    assert found(hashes.files(prefix)) == "lib64: changed: a link to /tmp, not to lib"


def test_a_file_that_became_a_link_is_named_even_if_the_content_is_the_same(prefix: Path) -> None:
    path = prefix / SITE / "other.py"
    path.rename(prefix.parent / "elsewhere.py")
    path.symlink_to(prefix.parent / "elsewhere.py")
    assert f"{SITE}/other.py: changed: a link to" in found(hashes.files(prefix))


def test_a_link_that_became_a_file_is_named(prefix: Path) -> None:
    (prefix / "bin/python").unlink()
    (prefix / "bin/python").write_text("#!/bin/sh\n")
    assert "bin/python: changed: a file, not a link" in found(hashes.files(prefix))


def test_an_extra_and_a_missing_link_are_named(prefix: Path) -> None:
    (prefix / "lib64").rename(prefix / "lib32")
    findings = found(hashes.files(prefix))
    assert "lib64: missing: a link to lib" in findings
    assert "lib32: extra: a link to lib" in findings


def test_a_file_that_not_every_user_can_read_is_named(prefix: Path) -> None:
    (prefix / SITE / "other.py").chmod(0o600)
    findings = hashes.files(prefix)
    assert f"{SITE}/other.py: not every user can read this file (mode 0600)" in found(findings)
    assert findings.metrics["unreadable"] == 1


def test_a_folder_that_not_every_user_can_enter_is_named(prefix: Path) -> None:
    (prefix / SITE / "demo").chmod(0o700)
    assert f"{SITE}/demo: not every user can enter" in found(hashes.files(prefix))


def test_a_record_cannot_vouch_for_files_outside_the_environment(prefix: Path) -> None:
    record = prefix / SITE / "demo-1.0.dist-info/RECORD"
    for path in ("/etc/hostname", "../../../../outside"):
        record.write_text(record_line(path, b""))
        assert f"names {path}, which is outside the environment" in found(hashes.files(prefix))


def test_a_damaged_record_is_named(prefix: Path) -> None:
    (prefix / SITE / "demo-1.0.dist-info/RECORD").write_text("demo/core.bin,sha256=AAAA,many\n")
    assert "demo-1.0.dist-info/RECORD: is not a RECORD" in found(hashes.files(prefix))


def test_a_removed_seal_is_named(prefix: Path) -> None:
    (prefix / hashes.SEAL).unlink()
    assert f"{hashes.SEAL}: the seal cannot be read" in found(hashes.files(prefix))


def test_a_damaged_seal_is_named(prefix: Path) -> None:
    (prefix / hashes.SEAL).write_text("not a seal\n")
    assert "no line of a seal: not a seal" in found(hashes.files(prefix))


def test_of_two_distributions_that_claim_one_file_the_sealed_content_alone_will_do(
    prefix: Path,
) -> None:
    install(prefix, "one", "1", {"shared.py": b"one"})
    install(prefix, "two", "1", {"shared.py": b"two"})
    seal(prefix)
    findings = hashes.files(prefix)
    assert found(findings) == ""
    assert findings.metrics["contested"] == 1
    (prefix / SITE / "shared.py").write_bytes(b"one")  # genuine, but not what was built
    assert f"{SITE}/shared.py: changed" in found(hashes.files(prefix))


def test_what_nobody_brought_is_found_even_if_it_was_sealed(prefix: Path) -> None:
    install(prefix, "one", "1", {"shared.py": b"one"})
    install(prefix, "two", "1", {"shared.py": b"two"})
    (prefix / SITE / "shared.py").write_bytes(b"six")
    seal(prefix)
    assert f"{SITE}/shared.py: changed" in found(hashes.files(prefix))


# the seal


def test_the_seal_is_the_same_whenever_it_is_made(prefix: Path) -> None:
    first = (prefix / hashes.SEAL).read_text()
    assert hashes.seal(prefix) == first
    paths = [line.split("  ")[-1].split("\t")[-1] for line in first.splitlines()]
    assert paths == sorted(paths)


def test_the_seal_covers_what_no_record_hashes_and_only_that(prefix: Path) -> None:
    text = hashes.seal(prefix)
    for path in (COMPILED, "pyvenv.cfg", f"{SITE}/rollout/verify.py", "lib64", "bin/python"):
        assert path in text
    assert hashes.SEAL not in text
    assert "core.bin" not in text


def test_odd_names_survive_the_seal(prefix: Path) -> None:
    names = ["tab\there", "line\nbreak", "back\\slash", "grün", os.fsdecode(b"\xff"), "-> x"]
    for name in names:
        (prefix / name).write_text(name, errors="surrogateescape")
    (prefix / "link\n").symlink_to("a\tb")
    seal(prefix)
    assert found(hashes.files(prefix)) == ""
    (prefix / "line\nbreak").write_text("changed")
    assert found(hashes.files(prefix)).startswith("line\\nbreak: changed")

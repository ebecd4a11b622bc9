"""images/recipes/owners: no file of an image depends on which distribution was written last."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from images.catalog import ROOT

OWNERS = ROOT / "images/recipes/owners"
ORDER = 'over = "made to lie over the others"\n'


def place(site: Path, name: str, files: dict[str, str], there: bool = True) -> Path:
    """Install a distribution by hand; the hash of a file is its content."""
    record = site / f"{name}-1.0.dist-info" / "RECORD"
    record.parent.mkdir(parents=True)
    rows = [f"{path},sha256={content},1\n" for path, content in files.items()]
    record.write_text("".join([*rows, f"{record.parent.name}/RECORD,,\n"]), encoding="utf-8")
    for path, content in files.items() if there else ():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content, encoding="utf-8")
    return record


def owners(site: Path, order: str = ORDER) -> subprocess.CompletedProcess[str]:
    rules = site.parent / "order.toml"
    rules.write_text(order, encoding="utf-8")
    argv = [sys.executable, "-I", "-S", str(OWNERS), str(site), str(rules)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_two_contents_of_one_file_end_the_build(tmp_path: Path) -> None:
    """Which of them is there would depend on how fast each was written."""
    first = place(tmp_path / "site", "first", {"shared.py": "aa", "own.py": "xx"})
    second = place(tmp_path / "site", "second", {"shared.py": "bb"})
    before = [first.read_bytes(), second.read_bytes()]
    done = owners(tmp_path / "site")
    assert done.returncode == 1
    assert "first and second bring shared.py with different content" in done.stderr
    assert "order.toml" in done.stderr
    assert [first.read_bytes(), second.read_bytes()] == before


def test_the_one_that_is_named_keeps_the_file(tmp_path: Path) -> None:
    """The other loses its row, so that `rollout verify` accepts one content alone."""
    under = place(tmp_path / "site", "under", {"shared.py": "aa", "own.py": "xx"})
    over = place(tmp_path / "site", "over", {"shared.py": "bb"})
    before = over.read_bytes()
    assert owners(tmp_path / "site").returncode == 0
    assert under.read_text().splitlines() == ["own.py,sha256=xx,1", "under-1.0.dist-info/RECORD,,"]
    assert over.read_bytes() == before


def test_two_that_are_both_named_are_without_an_order(tmp_path: Path) -> None:
    """They are installed at once again."""
    place(tmp_path / "site", "over", {"shared.py": "aa"})
    place(tmp_path / "site", "upper_most", {"shared.py": "bb"})
    done = owners(tmp_path / "site", ORDER + 'upper-most = "likewise"\n')
    assert done.returncode == 1
    assert "over and upper-most bring shared.py" in done.stderr


@pytest.mark.parametrize("other", ["aa", None])
def test_a_record_is_not_written_where_nothing_changes(tmp_path: Path, other: str | None) -> None:
    """A file of a lower layer would be copied into this one."""
    record = place(tmp_path / "site", "first", {"shared.py": "aa"})
    if other:
        place(tmp_path / "site", "second", {"shared.py": other})
    record.chmod(0o444)
    before = record.stat()
    assert owners(tmp_path / "site").returncode == 0
    assert record.stat().st_mtime_ns == before.st_mtime_ns


def test_every_order_has_its_reason() -> None:
    rules = tomllib.loads((ROOT / "images/recipes/order.toml").read_text(encoding="utf-8"))
    assert rules
    assert all(len(reason) > 20 for reason in rules.values())

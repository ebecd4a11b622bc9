"""What is taken out of the distributions: listed files, whole and with their rows, nothing else."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from images.catalog import ROOT
from rollout import verify

PRUNE = ROOT / "images/recipes/prune"
RULES = tomllib.loads((ROOT / "images/recipes/prune.toml").read_text(encoding="utf-8"))
CHECKS = {*verify.CHECKS, "smoke"}
OWN_RULES = '"*/tests/*" = "because; imports"\n"demo/gone.py" = "because; imports"\n'
ROWS = "demo/kept.py,sha256=a,1\ndemo/gone.py,sha256=b,1\ndemo/tests/test_a.py,sha256=c,1\n"
COMPILED = "demo/__pycache__/kept.cpython-311.pyc,,\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two distributions: one that a rule concerns, and one that none does."""
    site = tmp_path / "site-packages"
    files = {
        "demo/kept.py": "",
        "demo/gone.py": "",
        "demo/tests/test_a.py": "",
        "demo/tests/data/a.txt": "",
        "demo/__pycache__/kept.cpython-311.pyc": "",
        "demo/__pycache__/gone.cpython-311.pyc": "",
        "demo/tests/__pycache__/test_a.cpython-311.pyc": "",
        "demo-1.dist-info/RECORD": f"{ROWS}{COMPILED}demo-1.dist-info/RECORD,,\n",
        # as no writer of ours would: quoted without need, and with the other line ends
        "other-1.dist-info/RECORD": '"other.py",sha256=d,1\r\nother-1.dist-info/RECORD,,\r\n',
        "other.py": "",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(text.encode())
    return site


def prune(site: Path, rules: str = OWN_RULES) -> None:
    path = site.parent / "rules.toml"
    path.write_text(rules)
    subprocess.run([sys.executable, "-I", str(PRUNE), str(site), str(path)], check=True)


def test_rules_for_some_distributions_take_nothing_from_the_others(site: Path) -> None:
    """A layer takes nothing out of those below it: their bytes would change for nothing."""
    same = site / "below-1.dist-info" / "RECORD"
    same.parent.mkdir()
    same.write_text("below/tests/test_b.py,sha256=e,1\n")
    kept = site / "below/tests/test_b.py"
    kept.parent.mkdir(parents=True)
    kept.touch()
    rules = site.parent / "rules.toml"
    rules.write_text(OWN_RULES)
    listed = site.parent / "list.txt"
    listed.write_text("Demo==1 \\\n    --hash=sha256:0\n")
    argv = [sys.executable, "-I", str(PRUNE), str(site), str(rules), str(listed)]
    subprocess.run(argv, check=True)
    assert kept.exists()
    assert same.read_text() == "below/tests/test_b.py,sha256=e,1\n"
    assert not (site / "demo/gone.py").exists()
    assert not (site / "demo/__pycache__/gone.cpython-311.pyc").exists()
    assert "gone" not in (site / "demo-1.dist-info/RECORD").read_text()


def there(site: Path) -> set[str]:
    return {str(path.relative_to(site)) for path in site.rglob("*")}


def test_listed_files_go_with_their_compiled_files_and_the_folders_they_empty(site: Path) -> None:
    prune(site)
    assert there(site) == {
        *("demo", "demo/kept.py", "demo/__pycache__", "demo/__pycache__/kept.cpython-311.pyc"),
        *("demo-1.dist-info", "demo-1.dist-info/RECORD"),
        *("other-1.dist-info", "other-1.dist-info/RECORD", "other.py"),
    }


def test_a_compiled_file_does_not_keep_its_folder(site: Path) -> None:
    prune(site, '"demo/*.py" = "because; imports"\n"*/tests/*" = "because; imports"\n')
    assert not [name for name in there(site) if name.split("/")[0] == "demo"]


def test_their_rows_and_those_of_compiled_files_are_taken_out(site: Path) -> None:
    prune(site)
    record = (site / "demo-1.dist-info/RECORD").read_text()
    assert record == "demo/kept.py,sha256=a,1\ndemo-1.dist-info/RECORD,,\n"


def test_a_name_with_a_comma_is_the_same_name_afterwards(site: Path) -> None:
    record = site / "demo-1.dist-info/RECORD"
    record.write_text(f'"demo/a,b.py",sha256=e,1\n{record.read_text()}')
    prune(site)
    assert record.read_text().splitlines()[0] == '"demo/a,b.py",sha256=e,1'


def test_a_record_that_needs_no_change_is_not_written(site: Path) -> None:
    record = site / "other-1.dist-info/RECORD"
    os.utime(record, (1, 1))
    before = record.read_bytes(), record.stat().st_ino
    prune(site)
    assert (record.read_bytes(), record.stat().st_ino) == before
    assert record.stat().st_mtime == 1


def test_a_second_run_changes_nothing(site: Path) -> None:
    prune(site)
    record = site / "demo-1.dist-info/RECORD"
    os.utime(record, (1, 1))
    names, before = there(site), record.read_bytes()
    prune(site)
    assert (there(site), record.read_bytes(), record.stat().st_mtime) == (names, before, 1)


def test_a_program_beside_site_packages_is_left_alone(site: Path) -> None:
    record = site / "other-1.dist-info/RECORD"
    record.write_text("../../../bin/tests/other,sha256=f,1\nother-1.dist-info/RECORD,,\n")
    program = site.parent / "bin/tests/other"
    program.parent.mkdir(parents=True)
    program.touch()
    prune(site, '"other/tests/*" = "because; imports"\n')
    assert program.exists()
    assert record.read_text().startswith("../../../bin/tests/other,")


# the rules of this repository


@pytest.mark.parametrize("pattern", RULES)
def test_every_rule_names_its_reason_and_the_check_that_would_notice(pattern: str) -> None:
    reason, _, checks = RULES[pattern].rpartition("; ")
    assert len(reason.split()) >= 3
    assert checks and {check.strip() for check in checks.split(",")} <= CHECKS


# One of each kind of file that an environment cannot do without.
NEEDED = (
    *("six.py", "torch/__init__.py", "torch/testing/__init__.py", "rollout/cli.py"),
    *("torch/lib/libtorch_cuda.so", "vllm/_C.abi3.so", "ray/_raylet.so", "tests.py"),
    *("cuda/bindings/driver.cpython-311-x86_64-linux-gnu.so", "ray/core/src/ray/gcs/gcs_server"),
    *("nvidia/cublas/lib/libcublas.so.12", "nvidia/cusolver/lib/libcusolver.so.11"),
    *("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.8"),
    *("nvidia/cu13/bin/nvcc", "nvidia/cu13/nvvm/bin/cicc", "nvidia/cu13/lib/libcudart.so.13"),
    *("nvidia/cu13/nvvm/libdevice/libdevice.10.bc", "nvidia/cu13/include/cuda_runtime.h"),
    *("demo-1.dist-info/RECORD", "demo-1.dist-info/METADATA", "demo-1.dist-info/licenses/LICENSE"),
    *("../../../bin/torchrun", "a", "a/b", "__editable__.pth"),
)


@pytest.mark.parametrize("pattern", RULES)
def test_no_rule_reaches_what_an_environment_needs(pattern: str) -> None:
    assert [name for name in NEEDED if fnmatch.fnmatchcase(name, pattern)] == []


@pytest.mark.parametrize("pattern", ["*", "*/*", "*.py", "nvidia/*", "*.so.*", "*RECORD"])
def test_a_rule_that_reaches_too_far_would_be_found(pattern: str) -> None:
    assert [name for name in NEEDED if fnmatch.fnmatchcase(name, pattern)]

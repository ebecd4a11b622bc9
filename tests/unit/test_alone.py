"""Slurm's and MPI's variables in an image of TensorRT-LLM: set for real, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import added, startup

from .conftest import SITE, install

TAKEN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NODELIST": "a[1-2]\nPMI_NOT=a variable",  # a value of several lines
    "MPI_LOCALRANKID": "0",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_btl": "tcp",
    "OMPI_": "",
}
# Names that only look like these.
LEFT = {
    "SLURM": "a",
    "SLURMD_NODENAME": "b",
    "PMI2_RANK": "c",
    "PRTE_MCA_x": "d",
    "I_MPI_ROOT": "e",
    "MY_SLURM_JOB_ID": "f",
    "slurm_job_id": "g",
    "UCX_TLS": "h",
    "MPICC": "i",
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
# As an engine that looks for the job it was started by, when it is imported.
MPI4PY = b"import os\nfound = sorted(n for n in os.environ if n.startswith(('SLURM_', 'PMIX_')))\n"


@pytest.fixture
def prefix_of(prefix: Path) -> Path:
    """An environment with mpi4py, of an image of TensorRT-LLM."""
    install(prefix, "mpi4py", "4.1", {"mpi4py.py": MPI4PY})
    backend(prefix, "tensorrt-llm")
    return prefix


def backend(prefix: Path, name: str) -> None:
    """Make it an image of this backend."""
    facts = {"backend": name, "framework": None}
    (prefix / "share/rollout/image.json").write_text(json.dumps(facts))
    with (prefix / "pyvenv.cfg").open("a") as stream:
        stream.write("include-system-site-packages = false\n")
    added.install(prefix)


def run(prefix: Path, *arguments: str, **more: str) -> dict[str, str]:
    """What a Python of the environment prints as JSON, started with all of these variables."""
    env = {**TAKEN, **LEFT, "TORCH_CUDA_ARCH_LIST": "8.0+PTX", **more}
    argv = [str(prefix / "bin/python"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, cwd=prefix)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, str] = json.loads(done.stdout)
    return {name: value for name, value in found.items() if name not in ("LC_CTYPE", "PWD", "_")}


@pytest.mark.parametrize("options", [(), ("-I",)], ids=["as jobs start", "isolated"])
def test_a_python_has_exactly_what_is_no_launchers(prefix_of: Path, options: tuple[str]) -> None:
    assert run(prefix_of, *options, "-c", SHOW) == {**LEFT, **AS_ROOT}


def test_they_are_gone_before_an_engine_is_imported(prefix_of: Path) -> None:
    code = "import mpi4py, json; print(json.dumps({'found': mpi4py.found}))"
    assert run(prefix_of, "-c", code) == {"found": []}


def test_a_program_that_it_becomes_has_none_of_them(prefix_of: Path) -> None:
    # As `rollout COMMAND` does.
    again = [sys.executable, "-I", "-c", SHOW]
    code = f"import os; os.execv({again[0]!r}, {again!r})"
    assert run(prefix_of, "-c", code) == {**LEFT, **AS_ROOT}


@pytest.mark.parametrize("given", [{}, TAKEN], ids=["inherited", "given anew"])
def test_a_child_has_none_of_them_even_if_it_is_given_them(
    prefix_of: Path, given: dict[str, str]
) -> None:
    """So Ray starts its workers: a Python of the image, with an environment of the job's."""
    python = str(prefix_of / "bin/python")
    code = (
        "import os, subprocess\n"
        f"env = {{**os.environ, **{given!r}, 'TORCH_CUDA_ARCH_LIST': '9.0'}}\n"
        f"subprocess.run([{python!r}, '-c', {SHOW!r}], env=env, check=True)"
    )
    assert run(prefix_of, "-c", code) == {**LEFT, **AS_ROOT}


def test_a_spawned_worker_has_none_of_them(prefix_of: Path) -> None:
    (prefix_of / "job.py").write_text(
        "import json, multiprocessing, os\n"
        "def show(): print(json.dumps(dict(os.environ)), flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    os.environ.update({TAKEN!r})\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=show)\n"
        "    worker.start(); worker.join()\n"
    )
    assert run(prefix_of, "job.py") == {**LEFT, **AS_ROOT}


@pytest.mark.parametrize("value", ["1", "yes"])
def test_one_variable_keeps_them(prefix_of: Path, value: str) -> None:
    found = run(prefix_of, "-c", SHOW, **{startup.KEEP: value})
    assert found == {**LEFT, **TAKEN, **AS_ROOT, startup.KEEP: value}


@pytest.mark.parametrize("value", ["", "0"])
def test_it_keeps_nothing_where_it_says_no(prefix_of: Path, value: str) -> None:
    found = run(prefix_of, "-c", SHOW, **{startup.KEEP: value})
    assert found == {**LEFT, **AS_ROOT, startup.KEEP: value}


def test_what_somebody_answers_mpi_about_root_is_kept_with_the_rest(prefix_of: Path) -> None:
    found = run(prefix_of, "-c", SHOW, **{startup.KEEP: "1", "OMPI_ALLOW_RUN_AS_ROOT": "0"})
    assert found["OMPI_ALLOW_RUN_AS_ROOT"] == "0"


@pytest.mark.parametrize("uid", [0, 1000, 12345])
def test_mpi_is_answered_for_any_uid(prefix_of: Path, uid: int) -> None:
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    for folder in (prefix_of, *prefix_of.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    # The Python of these tests may lie where nobody else can read: what is imported is there first.
    become = f"import __future__, json, os, site; os.setgid(0); os.setuid({uid}); "
    argv = [str(prefix_of / "bin/python"), "-S", "-c"]
    line = (prefix_of / SITE / added.STARTS).read_text()
    code = f"{become}import sys; sys.path.append({str(prefix_of / SITE)!r}); exec({line!r}); {SHOW}"
    done = subprocess.run([*argv, code], capture_output=True, text=True, env=TAKEN, check=False)
    assert done.returncode == 0, done.stderr
    assert AS_ROOT.items() <= json.loads(done.stdout).items()


@pytest.mark.parametrize("name", ["vllm", "sglang", "transformers"])
def test_images_of_other_engines_leave_the_environment_as_it_is(prefix: Path, name: str) -> None:
    backend(prefix, name)
    assert run(prefix, "-c", SHOW) == {**TAKEN, **LEFT, "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}

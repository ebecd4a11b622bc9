"""What docs/adding.md says is done here as it says it: its Dockerfiles, and pip in a container.

There is no network: pip finds wheels that are made on the spot, by a pip.conf of the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from images import catalog
from images.building import builder
from images.building.buildah import Buildah
from images.catalog import ROOT
from images.locking import lock
from images.proving import report_file

from .conftest import Container, Result, Sealed, lines

pytestmark = pytest.mark.image

PAGE = ROOT / "docs" / "adding.md"
DOCKERFILES = re.findall(r"^```dockerfile\n(.*?)^```$", PAGE.read_text("utf-8"), re.S | re.M)
PACKAGE, VERSION = "math-verify", "0.8.0"
LOCKED = {e.name: e.version for e in lock.read(catalog.find(catalog.DEFAULT, catalog.load()))}


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str], needs: str = "") -> None:
    """A wheel of these files, with a program of its name; it needs one requirement or none."""
    stem = f"{name.replace('-', '_')}-{version}"
    program = f"{name} = {next(iter(files)).removesuffix('.py')}:main"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = {
        **files,
        f"{stem}.dist-info/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/entry_points.txt": f"[console_scripts]\n{program}\n",
    }
    record = ""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{path},sha256={digest.rstrip(b'=').decode()},{len(text)}\n"
        archive.writestr(f"{stem}.dist-info/RECORD", record + f"{stem}.dist-info/RECORD,,\n")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Wheels of what the page installs, and of what must not be installed."""
    folder = tmp_path / "wheels"
    code = "import sys, tqdm\ndef main():\n    print(sys.executable, tqdm.__version__)\n"
    wheel(folder, PACKAGE, VERSION, {"math_verify.py": code}, "tqdm")
    wheel(folder, "greedy", "1.0", {"greedy.py": ""}, "transformers<5")
    wheel(folder, "tqdm", "99.0", {"tqdm.py": ""})
    wheel(folder, "transformers", "4.57.3", {"transformers.py": ""})
    wheel(folder, "tqdm-fork", "1.0", {"tqdm_fork.py": "", "tqdm/__init__.py": ""})
    return folder


@pytest.fixture
def pip_conf(tmp_path: Path) -> Path:
    """pip's settings of the site: no index, and the folder of the wheels."""
    path = tmp_path / "pip.conf"
    path.write_text("[global]\nno-index = true\nfind-links = /mnt/wheels\n")
    return path


@pytest.fixture
def derive(
    tool: Buildah,
    built: builder.Built,  # noqa: ARG001 - an image on top needs the image
    wheels: Path,
    pip_conf: Path,
    tmp_path: Path,
) -> Iterator[Callable[[str], Container]]:
    """Builds a Dockerfile on top of the image, and enters the result; ``mine`` is its context."""
    made: list[tuple[str, str]] = []
    context = tmp_path / "mine"
    context.mkdir()

    def make(dockerfile: str) -> Container:
        name = f"test-adding-{uuid.uuid4().hex[:12]}"
        made.append((name, f"{name}-entered"))
        file = tmp_path / "Dockerfile"
        file.write_text(dockerfile.replace("FROM ", f"FROM {tool.local}"))
        argv = ["buildah", "bud", "--isolation", "chroot", "--pull-never", "--tag", name]
        argv += [f"--volume={wheels}:/mnt/wheels:ro", f"--volume={pip_conf}:/etc/pip.conf:ro"]
        ran(*argv, "--file", str(file), str(context))
        ran("buildah", "from", "--pull-never", "--name", f"{name}-entered", tool.local + name)
        root = ran("buildah", "mount", f"{name}-entered").stdout.strip()
        return Container(f"{name}-entered", Path(root), tool)

    yield make
    for name, entered in made:
        subprocess.run(["buildah", "rm", entered], check=False, capture_output=True)
        subprocess.run(["buildah", "rmi", tool.local + name], check=False, capture_output=True)


def ran(*argv: str) -> Result:
    """A command that has to succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def verified(here: Container, *env: str) -> tuple[int, str, list[dict[str, str]]]:
    """``rollout verify``: its exit code, what it said, and the additions of its report."""
    path = "/var/cache/rollout/report.json"
    done = here.run("env", *env, "rollout", "verify", "--report", path)
    data = json.loads((here.root / path.lstrip("/")).read_text())
    assert report_file.validate(data) == []
    return done.returncode, "\n".join(lines(done)), data["added"]


# Images on top -----------------------------------------------------------------------------------


def test_the_page_s_dockerfile_has_three_lines_and_its_image_is_proved(
    derive: Callable[[str], Container],
) -> None:
    text = DOCKERFILES[0]
    assert len(text.splitlines()) == 1 + 3
    here = derive(text)
    # Root has left nothing there that other users could not write.
    assert list((here.root / "var/cache/rollout").iterdir()) == []
    code, said, added = verified(here)
    assert code == 0, said
    assert f"added to the image: {PACKAGE} {VERSION} (/opt/added)" in said
    assert added == [{"name": PACKAGE, "version": VERSION, "place": "/opt/added"}]
    # Its program is on PATH, runs in the sealed environment and sees the locked version.
    ran = here.run(PACKAGE, user="1000:0")
    assert ran.stdout.split() == ["/opt/rollout/bin/python", LOCKED["tqdm"]]


def test_the_page_s_editable_checkout_is_proved_and_runs_from_its_folder(
    derive: Callable[[str], Container], tmp_path: Path
) -> None:
    (tmp_path / "mine/mine").mkdir()
    (tmp_path / "mine/mine/__init__.py").write_text("")
    (tmp_path / "mine/pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "mine"\nversion = "0.1"\ndependencies = ["transformers<5"]\n'
    )
    here = derive(DOCKERFILES[1])
    code, said, added = verified(here)
    assert code == 0, said
    assert added == [{"name": "mine", "version": "0.1", "place": "/opt/mine"}]
    for options in ([], ["-I"]):
        where = here.run("python3", *options, "-c", "import mine; print(mine.__file__)")
        assert where.stdout.strip() == "/opt/mine/mine/__init__.py", where.stderr


def test_the_page_s_wheel_of_flash_attn_is_added_and_no_longer_lacking(
    derive: Callable[[str], Container], tmp_path: Path
) -> None:
    """The default image has no framework, so what it lacks is written into it first."""
    files = {"flash_attn_program.py": "", "flash_attn/__init__.py": ""}
    wheel(tmp_path / "mine", "flash-attn", "2.8.3", files, "torch")
    text = DOCKERFILES[2]
    assert "pip install --no-index" in text
    reference = catalog.DEFAULT
    here = derive(re.sub(r"^FROM .*", f"FROM {reference}", text))
    path = here.root / "opt/rollout/share/rollout/image.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "lacks": {"flash-attn": "add it", "other": "add it"}}))
    said = lines(here.run("rollout", "info"))
    assert [line.split()[:2] for line in said if line.startswith(("lacks", "added"))] == [
        ["lacks", "other:"],
        ["added", "flash-attn"],
    ]


@pytest.mark.parametrize(
    ("step", "named"),
    [
        pytest.param(
            "RUN pip install --no-deps --target /opt/mine /mnt/wheels/tqdm_fork-*.whl\n"
            "ENV PYTHONPATH=/opt/mine",
            "tqdm: a module of this name was added in /opt/mine, and the lock has it as a part of",
            id="a module, on PYTHONPATH",
        ),
        pytest.param(
            # Not through pip, which keeps to the lock.
            "RUN python3 -m zipfile -e /mnt/wheels/tqdm-99.0-py3-none-any.whl"
            " /opt/added/lib/python3.11/site-packages",
            "tqdm: 99.0 was added in /opt/added, and the lock has",
            id="a distribution, in the place of additions",
        ),
    ],
)
def test_an_image_that_hides_what_is_locked_is_not_proved(
    derive: Callable[[str], Container], step: str, named: str
) -> None:
    here = derive(f"FROM verl-rollout:transformers-cpu\nUSER 0:0\n{step}\nUSER 1000:0\n")
    code, said, _ = verified(here)
    assert code == 1, said
    assert named in said
    assert "distributions            failed" in said


def test_a_path_that_hides_what_is_locked_is_warned_of_before_a_command(
    container: Callable[[], Container],
) -> None:
    here = container()
    (here.root / "opt/mine/torch").mkdir(parents=True)
    (here.root / "opt/mine/torch/__init__.py").write_text("")
    done = here.run("env", "PYTHONPATH=/opt/mine", "rollout", "python3", "-c", "print('ran')")
    assert done.stdout == "ran\n"
    (line,) = [line for line in done.stderr.splitlines() if "PYTHONPATH" in line]
    assert line.startswith("rollout: warning: PYTHONPATH: /opt/mine holds torch, which the lock")


# pip keeps to the lock ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", ["greedy", "transformers==4.57.3", "--upgrade tqdm>=99", "--no-deps tqdm==99.0"]
)
def test_what_would_replace_a_locked_version_is_refused(
    container: Callable[[], Container], wheels: Path, pip_conf: Path, wanted: str
) -> None:
    here = container()
    for command in (("pip",), ("python3", "-m", "pip")):
        argv = (*command, "install", *wanted.split())
        volumes = {str(wheels): "/mnt/wheels:ro", str(pip_conf): "/etc/pip.conf:ro"}
        done = here.execute(builder.Command("", argv, "0:0", volumes))
        assert done.returncode != 0
        assert "ResolutionImpossible" in done.stderr
        name = "tqdm" if "tqdm" in wanted else "transformers"
        assert f"{name}=={LOCKED[name]}" in done.stdout + done.stderr
    assert not (here.root / "opt/added/lib").exists()


def test_root_cannot_remove_what_is_sealed_by_pip(container: Callable[[], Container]) -> None:
    here = container()
    done = here.run("pip", "uninstall", "--yes", "tqdm", user="0:0")
    assert "outside environment /opt/added" in done.stdout
    assert verified(here)[0] == 0


# In a running container --------------------------------------------------------------------------


def test_any_user_adds_to_a_running_container_with_a_read_only_root(
    sealed: Sealed, wheels: Path
) -> None:
    sealed.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/var/cache/rollout/wheels"}
    wheels.rename(sealed.cache / "wheels")
    done = sealed.run("rollout", "pip", "install", PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    done = sealed.run("rollout", PACKAGE)
    assert done.stdout.split() == ["/opt/rollout/bin/python", LOCKED["tqdm"]], done.stderr
    done = sealed.run("rollout", "verify", "--report", "/var/cache/rollout/report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    added = json.loads((sealed.cache / "report.json").read_text())["added"]
    assert added == [{"name": PACKAGE, "version": VERSION, "place": "/var/cache/rollout/added"}]
    done = sealed.run("rollout", "pip", "uninstall", "--yes", PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sealed.run("python3", "-c", "import math_verify").returncode != 0

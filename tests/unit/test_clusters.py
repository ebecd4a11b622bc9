"""What docs/clusters gives to copy is right as far as this machine can tell.

Scripts by a shell and shellcheck, the manifest by the fields that it uses. No Slurm and no
Kubernetes is here: that they start is not shown.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from images import catalog
from images.building import export
from images.catalog import RECIPES, ROOT
from images.locking import lock
from rollout import cli, preflight

CLUSTERS = ROOT / "docs/clusters"
SCRIPTS = sorted(p for p in CLUSTERS.glob("*/*") if p.suffix in (".sh", ".sbatch"))
MANIFEST = CLUSTERS / "kubernetes/raycluster.yaml"
FILES = {path: path.read_text("utf-8") for path in sorted(CLUSTERS.rglob("*")) if path.is_file()}
FOLDERS = sorted(path for path in CLUSTERS.iterdir() if path.is_dir())
IMAGES = catalog.load()


def named(path: Path) -> str:
    return str(path.relative_to(CLUSTERS))


def test_there_is_a_folder_for_each_way_with_a_page_and_a_file_to_copy() -> None:
    names = ["apptainer", "kubernetes", "ray-by-hand", "slurm-launcher", "slurm-pyxis"]
    assert [path.name for path in FOLDERS] == names
    for folder in FOLDERS:
        others = [path for path in folder.iterdir() if path.name != "README.md"]
        assert len((folder / "README.md").read_text("utf-8").splitlines()) <= 45
        assert len(others) == 1 and f"]({others[0].name})" in FILES[folder / "README.md"]


# scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_a_shell_can_read_a_script(path: Path, shell: str) -> None:
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def inner(text: str) -> list[str]:
    """The scripts that a script hands to a shell elsewhere, which shellcheck takes for texts."""
    return re.findall(r"(?ms)^\w+='\n(.+?)^'$", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_shellcheck_finds_nothing_in_a_script_and_in_those_inside_it(
    path: Path, tmp_path: Path
) -> None:
    found = inner(FILES[path])
    assert len(found) >= 2 or path.suffix == ".sh"
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip(
            "shellcheck is not installed, only a shell has read it; `nox -s lint` brings it"
        )
    files = [path]
    for number, text in enumerate(found):
        files.append(tmp_path / f"inner{number}.sh")
        files[-1].write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
    argv = [tool, "--severity=warning", *map(str, files)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Each does what its name says as far as a script can tell: it drops its options and goes on.
STUBS = {
    "scontrol": "echo n1; echo n2",
    "srun": """
while :; do
    case $1 in
        --overlap | --no-container-mount-home) shift ;;
        --*) shift 2 ;;
        *) exec "$@" ;;
    esac
done
""",
    "run": """
while :; do
    case $1 in
        --cache | --bind) shift 2 ;;
        *) exec "$@" ;;
    esac
done
""",
    "apptainer": """
env | grep ^APPTAINERENV_ | sort >> "$LOG"
shift
while :; do
    case $1 in
        --nv | --cleanenv) shift ;;
        --bind) shift 2 ;;
        *) shift; exec "$@" ;;
    esac
done
""",
    "ray": 'echo "ray $*" >> "$LOG"',
    # The real one waits for the nodes too.
    "rollout": """
left=100
while [ "$SLURM_JOB_NUM_NODES" = 2 ] && [ "$left" -gt 0 ] && ! grep -q block "$LOG"; do
    sleep 0.1
    left=$((left - 1))
done
echo "rollout $* by ${RAY_ADDRESS-}" >> "$LOG"; exit "${FLEET:-0}"
""",
    "job": 'printf "job <%s>\\n" "$@" >> "$LOG"',
    "docker": 'printf "%s\\n" "$@"',
}


def played(
    path: Path, tmp_path: Path, *argv: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script of the cluster with stubs for what is not here; what they were told."""
    for name, text in STUBS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        file.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    given = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "LOG": str(log),
        "CACHE": f"{tmp_path}/cache",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "IMAGE": f"{tmp_path}/bin",
        "SHARED": "/shared",
    }
    argv = ("sh", str(path), *argv)
    done = subprocess.run(
        argv, env=given | env, capture_output=True, text=True, check=False, timeout=60
    )
    return done, log.read_text(encoding="utf-8").splitlines()


BATCH = [path for path in SCRIPTS if path.suffix == ".sbatch"]


@pytest.mark.parametrize("path", BATCH, ids=named)
def test_a_job_starts_ray_on_every_node_proves_them_and_runs_the_command(
    path: Path, tmp_path: Path
) -> None:
    done, log = played(path, tmp_path, "job", "a b", "$c")
    assert done.returncode == 0, done.stderr
    assert "ray start --head --port 6379 --disable-usage-stats" in log
    at = log.index("rollout fleet smoke --nodes 2 --report /shared/fleet-7.json by n1:6379")
    assert log[at + 1 : at + 3] == ["job <a b>", "job <$c>"]
    assert "ray health-check --address n1:6379" in log[:at]
    assert "ray start --address n1:6379 --disable-usage-stats --block" in log[:at]


@pytest.mark.parametrize("path", BATCH, ids=named)
def test_a_job_on_a_fleet_that_is_not_proved_does_not_start(path: Path, tmp_path: Path) -> None:
    done, log = played(path, tmp_path, "job", FLEET="1", PROVE="verify")
    assert done.returncode == 1
    assert any(line.startswith("rollout fleet verify ") for line in log)
    assert not any(line.startswith("job") for line in log)


@pytest.mark.parametrize("path", BATCH, ids=named)
def test_a_job_of_one_node_waits_for_no_other(path: Path, tmp_path: Path) -> None:
    done, log = played(path, tmp_path, SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 0, done.stderr
    assert not any("--block" in line or "health-check" in line for line in log)


@pytest.mark.parametrize("path", [p for p in SCRIPTS if "launcher" not in named(p)], ids=named)
def test_no_kernels_are_loaded_from_a_folder_that_somebody_else_made(
    path: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder somebody else's")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, 12345)
    done, log = played(path, tmp_path, "head", SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 3
    assert "not yours; say CACHE=" in done.stderr
    assert log == []
    assert done.stdout == ""  # nor does docker start anything


@pytest.mark.parametrize("given", ["/local/kept", ""])
def test_the_launcher_chooses_its_cache_unless_the_job_names_one(
    given: str, tmp_path: Path
) -> None:
    path = CLUSTERS / "slurm-launcher/ray.sbatch"
    (tmp_path / "run").mkdir()
    spy = tmp_path / "run/run"
    spy.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$LOG"\n', encoding="utf-8")
    spy.chmod(0o755)
    image = str(tmp_path / "run")
    done, log = played(path, tmp_path, CACHE=given, IMAGE=image, SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 0, done.stderr
    assert log[: 2 if given else 1] == (["--cache", given] if given else ["--bind"])


@pytest.mark.parametrize("gpus", ["0,1", ""])
def test_apptainer_is_told_the_gpus_of_the_job_where_slurm_names_any(
    gpus: str, tmp_path: Path
) -> None:
    path = CLUSTERS / "apptainer/ray.sbatch"
    _, log = played(path, tmp_path, CUDA_VISIBLE_DEVICES=gpus, SLURM_JOB_NUM_NODES="1")
    told = [line for line in log if line.startswith("APPTAINERENV_CUDA")]
    assert told == ([f"APPTAINERENV_CUDA_VISIBLE_DEVICES={gpus}"] if gpus else [])


def test_a_node_by_hand_is_one_container_on_the_network_of_its_machine(tmp_path: Path) -> None:
    path = CLUSTERS / "ray-by-hand/ray.sh"
    done, _ = played(path, tmp_path, "join", "n1", IMAGE="verl-rollout:vllm-0.12")
    words = done.stdout.splitlines()
    command = words[words.index("verl-rollout:vllm-0.12") + 1 :]
    assert command == ["ray", "start", "--address", "n1:6379", "--disable-usage-stats", "--block"]
    assert words[:3] == ["run", "--detach", "--name"] and "host" in words
    done, _ = played(path, tmp_path)
    assert (done.returncode, done.stderr) == (2, "ray.sh: say head, join HEAD or stop\n")


# what the files name exists


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_image_that_a_file_names_is_in_the_catalog(path: Path) -> None:
    references = {image.reference for image in IMAGES}
    stems = {export.stem(image) for image in IMAGES}
    tags = {image.tag for image in IMAGES}
    text = FILES[path]
    assert set(re.findall(r"[a-z][a-z-]*-rollout:[a-z0-9.-]*[a-z0-9]", text)) <= references
    assert set(re.findall(r"images/([a-z][a-z-]*-rollout-[a-z0-9.-]*[a-z0-9])", text)) <= stems
    found = re.findall(r"([a-z]+-[0-9.]+)\.(?:sqsh|sif|oci\.tar|rootfs\.tar)", text)
    assert set(found) <= tags


def test_the_files_name_images() -> None:
    assert any("verl-rollout:vllm-0.12" in text for text in FILES.values())
    assert any("images/verl-rollout-vllm-0.12" in text for text in FILES.values())


def used(pattern: str) -> list[list[str]]:
    """The words behind a command, wherever a file has it; variables stand as they are."""
    found = []
    for text in FILES.values():
        joined = text.replace("\\\n", " ")
        calls = re.findall(pattern + r"((?: +[^\s|&;#`)]+)+)", joined)
        found += [[word.strip("\"'") for word in call.split()] for call in calls]
    return found


def test_every_option_of_the_launcher_exists() -> None:
    text = (RECIPES / "launcher").read_text("utf-8")
    known = set(re.findall(r"(?m)^#   (--[a-z]+)", text)) | {"--help"}
    calls = used(r"(?:[\w.]/|`|\(`)run\"?")
    assert len(calls) >= 4
    for words in calls:
        # Of what stands behind its command the command knows.
        ours: list[str] = []
        waiting = [*words]
        while waiting and waiting[0].startswith("--"):
            ours.append(waiting[0])
            waiting = waiting[2:]
        assert set(ours) <= known, words


def test_every_call_of_the_fleet_is_one_that_it_takes() -> None:
    calls = used(r"rollout fleet(?= [-\"sv])")
    assert len(calls) >= 5
    for words in calls:
        values = {"$prove": "smoke", "$nodes": "2", "$report": "fleet.json", "N": "2"}
        cli.parser().parse_args(["fleet", *(values.get(word, word) for word in words)])


def test_every_export_is_one_that_nox_takes() -> None:
    calls = used(r"nox -s export --")
    assert len(calls) >= 4
    for words in calls:
        export.parser().parse_args(["verl-rollout:vllm-0.12", *words[1:]])


# the manifest


def manifest() -> Any:
    return yaml.safe_load(FILES[MANIFEST])


def schema() -> Any:
    """The fields that the manifest uses, with their types in KubeRay 1.7.0's own definition.

    That has 900 KB; the manifest was held against it once, unknown fields forbidden.
    """
    return json.loads((Path(__file__).parent / "raycluster.schema.json").read_text("utf-8"))


def test_the_manifest_has_the_fields_of_a_raycluster_and_no_others() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(manifest())) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rayStartParams:", "rayStartParameters:"),
        ("mountPath:", "mountpath:"),
        ("runAsUser: 12345", "runAsUser: me"),
        ('disable-usage-stats: "true"', "disable-usage-stats: true"),
        ("timeoutSeconds: 5", "timeout: 5"),
    ],
)
def test_a_slip_in_the_manifest_would_be_found(old: str, new: str) -> None:
    assert old in FILES[MANIFEST]
    slipped = yaml.safe_load(FILES[MANIFEST].replace(old, new))
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(slipped)) != []


def pods() -> list[Any]:
    spec = manifest()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_ray_of_the_manifest_is_that_of_its_image() -> None:
    (reference,) = {pod["containers"][0]["image"].rpartition("/")[2] for pod in pods()}
    image = catalog.find(reference, IMAGES)
    (ray,) = (entry.version for entry in lock.read(image) if entry.name == "ray")
    assert manifest()["spec"]["rayVersion"] == ray


def test_a_pod_has_what_the_image_needs_of_its_host() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(places.values()) == set(volumes)
        assert volumes[places["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert preflight.CACHE in places and "/tmp" in places  # the root is read-only
        assert pod["securityContext"]["runAsGroup"] == pod["securityContext"]["fsGroup"] == 0
        assert pod["securityContext"]["runAsUser"] != 0
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


class Node(BaseHTTPRequestHandler):
    """The agent of a Ray node, as far as a probe asks it."""

    said = b"success"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/local_raylet_healthz" else 404)
        self.end_headers()
        self.wfile.write(type(self).said)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def agent() -> Iterator[int]:
    """The port of an agent."""
    server = HTTPServer(("127.0.0.1", 0), Node)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def probed(command: list[str], port: int) -> int:
    assert command[0] == "python3"
    argv = [sys.executable, *(word.replace("52365", str(port)) for word in command[1:])]
    # A cluster behind a proxy; the probe must not ask it.
    env = {"http_proxy": "http://127.0.0.1:1", "PATH": ""}
    return subprocess.run(argv, env=env, capture_output=True, check=False, timeout=30).returncode


def test_the_probes_ask_ray_by_what_the_image_has(
    agent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tomllib.loads((RECIPES / "packages.toml").read_text("utf-8"))
    assert "python3" in packages
    assert not {"wget", "curl"} & set(packages), "KubeRay's own probes would work: mend the pages"
    for pod in pods():
        for name in ("readinessProbe", "livenessProbe"):
            command = pod["containers"][0][name]["exec"]["command"]
            monkeypatch.setattr(Node, "said", b"success")
            assert probed(command, agent) == 0
            monkeypatch.setattr(Node, "said", b"the raylet is gone")
            assert probed(command, agent) != 0
            assert probed(command, 1) != 0

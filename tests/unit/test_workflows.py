"""What the workflows promise beyond their linters, and their scripts run against stand-ins.

They never ran on GitHub. What a script says to git is said to a real one here; docker, skopeo,
cosign, gh and nox are stand-ins that write down what they were asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from nox import registry

import noxfile
from images import catalog
from images.catalog import ROOT
from images.locking import lock
from images.publishing import provenance, publish, verify_published

from ..conftest import sha256

FOLDER = ROOT / ".github" / "workflows"
# Comments are in the text alone; all else is read as YAML, where the key `on` is True.
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
TEXT = "".join(FILES.values())
WORKFLOWS = {file: yaml.safe_load(text) for file, text in FILES.items()}
IMAGES = catalog.load()
# Jobs that only carry, sign or name what sessions have made: in them there is nothing to run here.
CARRIERS = {
    "fill.yml/prove": "the image's own commands, as docs/new-image.md gives them for a GPU host",
    "prove.yml/prove": "the image's own commands, as the README gives them for docker",
    "publish.yml/sign-staged": "cosign has the identity, and nothing of this repository",
    "publish.yml/sign-released": "the same",
    "publish.yml/key": "has a token that writes to the release, and nothing of this repository",
    "relock.yml/propose": "has a token that writes, so nothing of this repository runs in it",
}

Step = dict[str, Any]
Job = dict[str, Any]
JOBS: dict[str, Job] = {
    f"{file}/{key}": job for file, whole in WORKFLOWS.items() for key, job in whole["jobs"].items()
}
STEPS = [(path, step) for path, job in JOBS.items() for step in job.get("steps", [])]
SCRIPTS = [(path, step) for path, step in STEPS if "run" in step]
IN_DEBIAN = {path: job for path, job in JOBS.items() if "container" in job}
EVERY_JOB = pytest.mark.parametrize("path", JOBS)


def scripts(path: str) -> list[Step]:
    """The steps of a job that run a script."""
    return [step for at, step in SCRIPTS if at == path]


def said(path: str) -> str:
    """All scripts of a job."""
    return "\n".join(step["run"] for step in scripts(path))


def step_of(path: str, words: str) -> Step:
    """The step of a job with this name, or with these words in its script."""
    return next(s for s in scripts(path) if s["name"] == words or words in s["run"])


def asked(text: str) -> list[str]:
    """The sessions that a text runs."""
    return re.findall(r"-m nox --session ([a-z-]+)", text)


# what runs, and with which rights


@pytest.mark.parametrize("file", FILES)
def test_a_workflow_has_no_right_of_its_own_and_says_what_happens_to_two_of_it(file: str) -> None:
    assert WORKFLOWS[file]["permissions"] == {}
    assert set(WORKFLOWS[file]["concurrency"]) == {"group", "cancel-in-progress"}


@EVERY_JOB
def test_a_job_names_its_rights_and_its_end(path: str) -> None:
    assert "permissions" in JOBS[path]
    # A job that calls a workflow takes the time that its jobs have.
    assert ("timeout-minutes" in JOBS[path]) != ("uses" in JOBS[path])


def test_an_action_has_one_commit_everywhere_with_its_version_beside() -> None:
    used = {step["uses"] for _, step in STEPS if "uses" in step}
    assert len(used) == len({use.partition("@")[0] for use in used}) > 1
    lines = {line.partition("uses: ")[2] for line in TEXT.splitlines() if "uses: " in line}
    own = {f"$/.github/workflows/{file}" for file in FILES}
    assert {job["uses"] for job in JOBS.values() if "uses" in job} <= own
    assert sorted(line.partition(" # ")[0] for line in lines - own) == sorted(used)
    for line in lines - own:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_a_checkout_leaves_no_credentials_behind() -> None:
    checkouts = [s for _, s in STEPS if s.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("word", ["pull_request_target", "workflow_run", "secrets.", "inherit"])
def test_a_stranger_s_pull_request_meets_no_secret(word: str) -> None:
    assert [file for file, text in FILES.items() if word in text] == []


def test_a_pull_request_gets_no_token_that_writes_and_no_machine_of_ours() -> None:
    files = [file for file, whole in WORKFLOWS.items() if "pull_request" in whole[True]]
    assert files == ["checks.yml"]
    for job in WORKFLOWS["checks.yml"]["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert "self-hosted" not in str(job)
        assert "uses" not in job


def test_the_proof_runs_on_our_label_and_neither_it_nor_a_resolver_may_write() -> None:
    assert JOBS["prove.yml/prove"]["runs-on"] == ["self-hosted", "linux", "x64", "gpu"]
    ours = ["fill.yml/prove", "prove.yml/prove"]
    assert [path for path in JOBS if "self-hosted" in str(JOBS[path])] == ours
    assert JOBS["fill.yml/prove"]["runs-on"] == JOBS["prove.yml/prove"]["runs-on"]
    assert [path for path in JOBS if "relock" in asked(said(path))] == ["relock.yml/relock"]
    for path in (*ours, "relock.yml/relock"):
        assert "write" not in str(JOBS[path]["permissions"])


def test_a_lock_is_filled_where_its_index_is_a_variable_and_nothing_is_pushed() -> None:
    job = JOBS["fill.yml/fill"]
    assert asked(said("fill.yml/fill")) == ["lock"]
    assert job["permissions"] == {"contents": "read"}
    assert job["env"]["UV_INDEX"] == "${{ vars.ENGINE_INDEX }}"
    assert set(WORKFLOWS["fill.yml"][True]) == {"workflow_dispatch"}, "a person starts it"
    rights = [job["permissions"] for job in WORKFLOWS["fill.yml"]["jobs"].values()]
    assert all(set(one) <= {"contents"} and "write" not in str(one) for one in rights)


def test_a_filled_lock_is_built_recorded_proved_and_taken_in_in_this_order() -> None:
    jobs = ["build", "prove", "keep"]
    assert [JOBS[f"fill.yml/{name}"]["needs"] for name in jobs] == ["fill", "build", "prove"]
    assert asked(said("fill.yml/build")) == ["build", "export", "build"]
    assert asked(said("fill.yml/keep")) == ["prove", "docs"]
    env = JOBS["fill.yml/build"]["env"]
    assert env["UV_INDEX"] == JOBS["fill.yml/fill"]["env"]["UV_INDEX"]
    # What one job leaves, the next one takes.
    parts = [
        (s["uses"].partition("@")[0], s["with"]["name"])
        for p, s in STEPS
        if p.startswith("fill.yml/") and "artifact" in s.get("uses", "")
    ]
    left = [name for action, name in parts if action.endswith("upload-artifact")]
    taken = [name for action, name in parts if action.endswith("download-artifact")]
    assert left == ["filled-lock", "recorded-lock", "image", "reports", "proved"]
    assert taken == ["filled-lock", "image", "recorded-lock", "reports"]


LAUNCHER = """#!/bin/bash
echo "run $*" >>"{log}"
[ "$1" = --bind ] || exit 1
echo '{{}}' >"${{2%:/report}}/${{5#/report/}}"
"""


def test_the_proof_of_a_filled_image_runs_its_own_commands_and_leaves_their_reports(
    runner: Runner,
) -> None:
    temporary = Path(runner.env["RUNNER_TEMP"])
    files = runner.folder / "verl-rollout-x-1.0"
    files.mkdir()
    (files / "run").write_text(LAUNCHER.format(log=runner.folder / "log"))
    (files / "run").chmod(0o755)
    (temporary / "image").mkdir()
    archive = temporary / "image/x-1.0.rootfs.tar.zst"
    argv = ["tar", "--create", "--zstd", "--file", str(archive), "-C", str(runner.folder)]
    subprocess.run([*argv, files.name], check=True)
    runner.good(step_of("fill.yml/prove", "tar --extract"))
    reports = {path.name for path in (temporary / "report").iterdir()}
    assert reports == {"verify.json", "smoke.json"}
    assert [line.split()[3] for line in runner.asked] == ["verify", "smoke"]
    runner.good(step_of("fill.yml/prove", "Give the disk back"))
    assert list(temporary.iterdir()) == []


def test_no_expression_stands_in_a_script() -> None:
    assert {path.partition("/")[0] for path, _ in SCRIPTS} == set(FILES)
    assert [step for _, step in SCRIPTS if "${{" in step["run"]] == []


# their linters


@pytest.mark.parametrize(
    ("sound", "bad", "finding"),
    [
        ("", "", ""),
        ("run: .ci/run", "run: ${{ github.event.pull_request.title }}", "template-injection"),
        ("timeout-minutes: 15", "timeout: 15", "'timeout' was unexpected"),
    ],
    ids=["nothing", "an injection", "a key that GitHub does not know"],
)
def test_the_linters_pass_what_is_sound_and_find(
    sound: str, bad: str, finding: str, tmp_path: Path
) -> None:
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    path = tmp_path / ".github" / "workflows" / "bad.yml"
    path.parent.mkdir(parents=True)
    path.write_text(FILES["checks.yml"].replace(sound, bad, 1), encoding="utf-8")
    found = []
    for program, *options in noxfile.WORKFLOW_LINTERS:
        argv = [shutil.which(program, path=beside) or program, *options, str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        found += [done.stdout] if done.returncode else []
    assert len(found) == bool(finding), found
    assert finding in "".join(found)


# what they say comes from the catalog and from nox


def test_every_pull_request_is_linted_and_tested() -> None:
    events = WORKFLOWS["checks.yml"][True]
    assert events == {"pull_request": None, "push": {"branches": ["main"]}}, "no filter by path"
    assert "if" not in {**JOBS["checks.yml/lint"], **JOBS["checks.yml/tests"]}
    assert asked(said("checks.yml/lint")) == ["lint"]
    assert JOBS["checks.yml/tests"]["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_session_that_a_workflow_names_exists() -> None:
    wanted = set(asked(TEXT))
    assert {"build", "lint", "matrix", "publish", "relock", "reproduce"} <= wanted
    assert wanted <= set(registry.get())


@EVERY_JOB
def test_a_job_runs_sessions_that_anybody_can_run(path: str) -> None:
    runs = bool(asked(said(path))) or ".ci/run" in said(path) or "uses" in JOBS[path]
    assert runs != (path in CARRIERS)


def test_a_changed_image_is_built_verified_and_reproduced() -> None:
    order = r"--session build.*rollout verify.*--session reproduce"
    assert re.search(order, said("checks.yml/image"), re.DOTALL)


def test_a_matrix_is_what_a_session_computed_and_without_an_image_it_is_skipped() -> None:
    found = {path: job for path, job in JOBS.items() if "matrix" in job.get("strategy", {})}
    assert len(found) > 1
    for path, job in found.items():
        given = f"needs.{job['needs']}.outputs.references"
        assert job["strategy"]["matrix"] == {"reference": f"${{{{ fromJSON({given}) }}}}"}
        assert job["if"] == f"{given} != '[]'"
        assert asked(said(f"{path.partition('/')[0]}/{job['needs']}")) == ["matrix"]


def test_no_workflow_names_an_image_or_a_version_of_an_engine() -> None:
    names = {image.tag for image in IMAGES} | {image.reference for image in IMAGES}
    for image in IMAGES:
        versions = {entry.name: entry.version for entry in lock.read(image)}
        names |= {versions[image.engine], versions["torch"], *image.expect.values()}
    assert names
    assert [n for n in names if re.search(rf"(?<![\w.@]){re.escape(n)}(?![\w.])", TEXT)] == []


def test_the_registry_is_a_variable_and_no_name() -> None:
    assert set(re.findall(r"REGISTRY: (.*)", TEXT)) == {"${{ vars.REGISTRY }}"}
    pushed = re.findall(r'--(?:to|from) "([^"]*)"', TEXT)
    assert len(pushed) > 2
    assert all(place.startswith("$REGISTRY") for place in pushed)


def test_the_workflow_that_builds_names_itself_as_the_builder() -> None:
    """GitHub's own variable names release.yml where that calls it; cosign certifies this file."""
    builder = WORKFLOWS["publish.yml"]["env"][provenance.WORKFLOW]
    assert builder == ".github/workflows/publish.yml"


# disks, and the machine that layers are promised for


def test_every_build_runs_on_the_machine_that_digests_are_promised_for() -> None:
    makers = {"audit", "build", "reproduce", "relock"}
    builders = {p for p in JOBS if makers & set(asked(said(p))) or ".ci/run" in said(p)}
    assert set(IN_DEBIAN) == builders
    first, *others = [(job["container"], job["steps"][:2]) for job in IN_DEBIAN.values()]
    assert re.fullmatch(r"debian:12@sha256:[0-9a-f]{64}", first[0]["image"])
    assert all(other == first for other in others), "made ready in one way"


def test_room_is_made_on_hosted_runners_alone_and_told_before_and_after() -> None:
    for job in IN_DEBIAN.values():
        first = job["steps"][0]
        assert first["if"] == "runner.environment == 'github-hosted'"
        assert [line.split()[0] for line in first["run"].splitlines()] == ["df", "find", "df"]
        mounted = [volume.split(":")[1] for volume in job["container"]["volumes"]]
        # What is deleted lies below /host, and what builds need does not.
        assert [p for p in mounted if not p.startswith("/host/")] == ["/var/lib/containers"]
    assert IN_DEBIAN


# their scripts, run


@pytest.mark.parametrize(
    ("path", "step"), SCRIPTS, ids=[f"{p}: {s.get('name')}" for p, s in SCRIPTS]
)
def test_a_script_has_a_name_and_is_one_that_bash_reads(path: str, step: Step) -> None:
    assert step["name"], path
    done = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


DIGEST = "sha256:" + "5" * 64
STAGED = f"staging/verl-rollout@{DIGEST}"
PUBLIC = "public\n"  # the key of a run, and what is signed of it
SIGNED = sha256(PUBLIC)
BROKEN = "#!/bin/bash\nexit 1\n"
# What stand-ins answer; all of them write down what they were asked.
ANSWERS = {
    "skopeo": f'if [ "$1" = inspect ]; then echo "${{RELEASED-@{DIGEST}}}"; fi',
    "docker": 'if [ "$1" = image ] && [ "$2" = inspect ]; then echo sha256:a,sha256:b; fi',
    "cosign": "",
    "gh": 'if [ "$2" = list ]; then echo "$OPEN"; fi',
    "python3": f"""case "$*" in
      *"--session matrix"*) echo; echo '["x:y"]' ;;
      *"--new-key"*) for file; do :; done; echo secret >"$file"; echo public >"$file.pub" ;;
      *"--to"*) echo "x: published as r/x@{DIGEST}" ;;
    esac""",
}


@dataclass
class Runner:
    """A machine that runs steps as GitHub does, among stand-ins."""

    folder: Path
    env: dict[str, str]

    def run(self, step: Step, **env: str) -> subprocess.CompletedProcess[str]:
        script = self.folder / "script"
        script.write_text(step["run"], encoding="utf-8")
        argv = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        work, env = self.folder / "work", {**self.env, **env}
        return subprocess.run(argv, env=env, cwd=work, capture_output=True, text=True, check=False)

    def good(self, step: Step, **env: str) -> None:
        done = self.run(step, **env)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def outputs(self) -> dict[str, str]:
        """What steps have left for the next ones."""
        text = Path(self.env["GITHUB_OUTPUT"]).read_text(encoding="utf-8")
        return dict(line.split("=", 1) for line in text.splitlines())

    def public_key(self, text: str) -> None:
        """The public key, as an artifact brings it."""
        key = self.folder / "work" / "build" / "key" / "key.pub"
        key.parent.mkdir(parents=True)
        key.write_text(text)

    @property
    def asked(self) -> list[str]:
        """Everything the stand-ins were asked, a line each."""
        log = self.folder / "log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    for name in ("bin", "work", "temp"):
        (tmp_path / name).mkdir()
    for name, answer in ANSWERS.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/log"\n{answer}\n')
        path.chmod(0o755)
    env = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "RUNNER_TEMP": str(tmp_path / "temp"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_ACTOR": "someone",
        "GITHUB_REPOSITORY": "owner/images",
        "GITHUB_SHA": "c" * 40,
        "TOKEN": "a-token",
        "REGISTRY": "registry.example/owner",
        "REFERENCE": "verl-rollout:x-1.0",
        "STAGING": "staging",
        "UNPROVED": "",
    }
    return Runner(tmp_path, env)


@pytest.mark.parametrize("path", ["checks.yml/changed", "release.yml/proved"])
def test_the_list_of_images_becomes_an_output_or_ends_the_job(runner: Runner, path: str) -> None:
    step = step_of(path, "--session matrix")
    runner.good(step, BEFORE="HEAD^1")
    assert runner.outputs["references"] == '["x:y"]'
    Path(runner.env["GITHUB_OUTPUT"]).unlink()
    (runner.folder / "bin" / "python3").write_text(BROKEN)
    assert runner.run(step, BEFORE="HEAD^1").returncode != 0
    assert not Path(runner.env["GITHUB_OUTPUT"]).exists()


STAGE = "publish.yml/stage"
LOG_IN, KEY = "Log in to the registry", "Make a key for this run alone"
PUBLISH, NOTE = "Publish to staging", "Note the digest that everything after this is about"


def stage(runner: Runner, **env: str) -> dict[str, str]:
    """Stage as the workflow does; returns what every later job is given."""
    (runner.folder / "work" / "build").mkdir()
    steps = [s for s in scripts(STAGE) if s["name"] in (LOG_IN, KEY, PUBLISH, NOTE)]
    assert [step["name"] for step in steps] == [LOG_IN, KEY, PUBLISH, NOTE]
    for step in steps:
        runner.good(step, **env)
    left = {name: f"${{{{ steps.{steps[-1]['id']}.outputs.{name} }}}}" for name in runner.outputs}
    assert JOBS[STAGE]["outputs"] == left
    return runner.outputs


@pytest.fixture
def released(runner: Runner) -> Runner:
    """What was asked for one image, from its build to its public tag."""
    outputs = stage(runner, RELEASED="@sha256:another")
    assert outputs == {"image": STAGED, "hex": DIGEST.removeprefix("sha256:"), "key": SIGNED}
    runner.public_key(PUBLIC)
    given = {"STAGED": STAGED, "IMAGE": STAGED, "KEY": SIGNED, "RELEASED": DIGEST}
    for name in ("sign-staged", "prove", "promote", "sign-released"):
        for step in scripts("prove.yml/prove" if name == "prove" else f"publish.yml/{name}"):
            runner.good(step, **given)
    return runner


def test_what_is_staged_signed_proved_promoted_and_signed_again_is_one_digest(
    released: Runner,
) -> None:
    said = "\n".join(released.asked)
    place, signed = "registry.example/owner", f"rollout.key={SIGNED}"
    for line in (
        f"nox --session publish -- verl-rollout:x-1.0 --to {place}/staging --authfile",
        f"cosign sign --yes --annotations {signed} {place}/{STAGED}\n",
        f"pull {place}/{STAGED}\n",
        f"cosign verify {place}/{STAGED} --annotations {signed} ",
        f"nox --session publish -- verl-rollout:x-1.0 --to {place} --promote "
        f"--from {place}/{STAGED} --trust build/key/key.pub ",
        f"nox --session verify-published -- {place}/verl-rollout:x-1.0 --key build/key/key.pub ",
        f"cosign sign --yes --annotations {signed} {place}/verl-rollout@{DIGEST}",
    ):
        assert said.count(line) == 1, line
    assert "--session build" not in said
    assert "--unproved" not in said
    assert "a-token" not in said, "a token travels by standard input, where no process list has it"


def test_sessions_know_the_options_that_they_are_given(released: Runner) -> None:
    parsers = {"publish": publish.parser(), "verify-published": verify_published.parser()}
    given = re.findall(r"nox --session (\S+) -- (.*)", "\n".join(released.asked))
    assert [session for session, _ in given] == [*["publish"] * 3, "verify-published"]
    for session, options in given:
        parsers[session].parse_args(options.split())


def test_the_key_of_a_run_ends_with_the_job_and_its_public_half_stays(runner: Runner) -> None:
    assert stage(runner)["key"] == SIGNED
    assert list((runner.folder / "temp").iterdir()) == []
    assert (runner.folder / "work" / "build" / "key.pub").read_text() == PUBLIC
    kept = [step["with"] for step in JOBS[STAGE]["steps"] if "upload-artifact" in str(step)]
    assert [given["path"] for given in kept] == ["build/key.pub"]


def test_another_public_key_than_the_signed_one_ends_the_job(runner: Runner) -> None:
    runner.public_key("another\n")
    step = step_of("publish.yml/promote", "See that this workflow signed it, and its key")
    assert runner.run(step, STAGED=STAGED, KEY=SIGNED).returncode != 0
    assert runner.run(step, STAGED=STAGED, KEY=sha256("another\n")).returncode == 0


def test_a_release_that_ended_half_way_is_finished_by_the_next_run() -> None:
    # Nothing is skipped for what is there already: its key ended with the run that made it.
    jobs = WORKFLOWS["publish.yml"]["jobs"]
    assert {name: (job.get("needs"), job.get("if")) for name, job in jobs.items()} == {
        "stage": (None, None),
        "sign-staged": ("stage", None),
        "prove": (["stage", "sign-staged"], None),
        "promote": (["stage", "prove"], "${{ !inputs.candidate }}"),
        "sign-released": (["stage", "promote"], None),
        "key": (["stage", "promote"], "github.event_name == 'release'"),
    }


def test_who_signs_keyless_passes_an_environment_and_stands_on_main_or_a_tag() -> None:
    signing = {p: job for p, job in JOBS.items() if "id-token" in job["permissions"]}
    signers = {path: job["environment"] for path, job in signing.items() if "uses" not in job}
    assert signers == {
        "publish.yml/sign-staged": "staging",
        "publish.yml/sign-released": "release",
    }
    step = step_of("publish.yml/promote", "cosign verify")
    pattern = step["env"]["SIGNER"].replace("${{ github.repository }}", "some/project")
    place = "https://github.com/some/project/.github/workflows/publish.yml"
    for ref in ("refs/tags/2026.1", "refs/heads/main"):
        assert re.search(pattern, f"{place}@{ref}")
    for other in (
        f"{place}@refs/heads/mine",
        f"{place}@refs/heads/main2",
        f"{place.replace('some', 'other')}@refs/heads/main",
        f"{place.replace('publish', 'checks')}@refs/heads/main",
    ):
        assert not re.search(pattern, other)


def test_where_nothing_was_published_the_job_ends(runner: Runner) -> None:
    (runner.folder / "bin" / "python3").write_text(BROKEN)
    (runner.folder / "work" / "build").mkdir()
    for name in (KEY, PUBLISH, NOTE):
        assert runner.run(step_of(STAGE, name)).returncode != 0


def test_a_candidate_says_that_it_is_unproved(runner: Runner) -> None:
    # And it is never promoted: see the conditions of the jobs above.
    staged = stage(runner, UNPROVED="--unproved", STAGING="candidates")["image"]
    assert staged == f"candidates/verl-rollout@{DIGEST}"
    assert any(line.endswith(" --unproved") for line in runner.asked)


def test_the_public_key_goes_to_the_release_under_the_name_of_its_image(runner: Runner) -> None:
    runner.public_key(PUBLIC)
    (step,) = scripts("publish.yml/key")
    runner.good(step, GITHUB_REF_NAME="v1")
    assert runner.asked == ["gh release upload v1 verl-rollout-x-1.0.pub --clobber"]


def test_another_digest_under_the_public_tag_ends_the_job(runner: Runner) -> None:
    step = step_of("publish.yml/promote", "See that the public tag is the digest that was proved")
    assert runner.run(step, STAGED=STAGED, RELEASED=DIGEST).returncode == 0
    assert runner.run(step, STAGED=STAGED, RELEASED=f"sha256:{'6' * 64}").returncode != 0


@pytest.mark.parametrize(
    "image",
    ["verl-rollout:x-1.0", f"verl-rollout:x@{DIGEST}", f"a b@{DIGEST}", DIGEST, f"x@{DIGEST}0"],
)
def test_a_gpu_runs_nothing_that_is_not_named_by_its_digest(runner: Runner, image: str) -> None:
    assert runner.run(JOBS["prove.yml/prove"]["steps"][0], IMAGE=image).returncode == 2
    assert runner.asked == []


@pytest.mark.parametrize("path", [STAGE, "publish.yml/promote", "prove.yml/prove"])
def test_a_repository_without_a_registry_is_told(runner: Runner, path: str) -> None:
    done = runner.run(step_of(path, "${REGISTRY:?"), REGISTRY="", IMAGE=f"x@{DIGEST}")
    assert done.returncode != 0
    assert "set the variable REGISTRY of this repository to HOST/PREFIX" in done.stderr
    assert runner.asked == []


SMOKE = step_of("prove.yml/prove", "Verify and smoke, as the README's user would")


def test_a_proof_runs_both_commands_of_the_image_and_names_its_layers(runner: Runner) -> None:
    runner.good(SMOKE, IMAGE=f"staging/x@{DIGEST}")
    ran = [line for line in runner.asked if line.startswith("docker run ")]
    assert [line.split()[-3] for line in ran] == ["verify", "smoke"]
    for line in ran:
        assert " --gpus all " in line
        assert " --env ROLLOUT_LAYERS=sha256:a,sha256:b " in line
        assert f" registry.example/owner/staging/x@{DIGEST} " in line
    assert oct((runner.folder / "temp" / "report").stat().st_mode)[-3:] == "777"


def test_a_proof_whose_first_command_fails_has_failed(runner: Runner) -> None:
    path = runner.folder / "bin" / "docker"
    path.write_text(path.read_text() + 'case "$*" in *" verify "*) exit 1 ;; esac\n')
    assert runner.run(SMOKE, IMAGE=f"staging/x@{DIGEST}").returncode == 1
    assert not [line for line in runner.asked if " smoke " in line]


# the weekly relock, with a real git


def git(folder: Path, *arguments: str) -> str:
    argv = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


BEFORE = {
    ".gitignore": "/build/\n",
    "lockfiles/some/a.lock": "a==1\n",
    "README.md": "1\n",
    ".github/workflows/x.yml": "1\n",
}


def write(work: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)


@pytest.fixture
def relocked(runner: Runner) -> Runner:
    """A checkout with a remote, in which locks can move, and as much else as could."""
    work = runner.folder / "work"
    git(runner.folder, "init", "--quiet", "--bare", "remote")
    git(runner.folder, "init", "--quiet", "--initial-branch", "main", "work")
    write(work, BEFORE)
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--message", "before")
    git(work, "remote", "add", "origin", "../remote")
    git(work, "push", "--quiet", "origin", "main")
    write(work, {"build/relock/moved.md": "| a.lock | a | 1 | 2 |\n"})
    return runner


def keep(runner: Runner, files: dict[str, str]) -> Path:
    """The patch of the first job, as the second one finds it; the checkout is fresh again."""
    work = runner.folder / "work"
    write(work, files)
    runner.good(step_of("relock.yml/relock", "Keep it as a patch"))
    (work / "build/relock").rename(runner.folder / "temp/relock")
    git(work, "reset", "--quiet", "--hard")
    git(work, "clean", "--quiet", "--force", "-d")
    return runner.folder / "temp/relock/moved.patch"


def propose(runner: Runner, number: str = "") -> list[str]:
    """What is asked of GitHub where a proposal of this number is open."""
    step = step_of("relock.yml/propose", "Push a branch and open a pull request")
    runner.good(step, BASE="main", GH_TOKEN="a-token", OPEN=number)  # noqa: S106 - a stand-in
    return [line.removeprefix("gh pr ") for line in runner.asked if line.startswith("gh pr ")]


def moved(runner: Runner) -> dict[str, str]:
    """What the pushed branch changes: file to content."""
    remote = runner.folder / "remote"
    names = git(remote, "diff", "--name-only", "main", "relock").split()
    return {name: git(remote, "show", f"relock:{name}") for name in names}


@pytest.mark.parametrize(
    ("number", "said"),
    [("", "create --base main --head relock "), ("7", "edit 7 ")],
    ids=["a new one", "the one that is open"],
)
def test_what_moved_is_pushed_to_a_branch_and_proposed(
    relocked: Runner, number: str, said: str
) -> None:
    changed = {f"lockfiles/some/{name}.lock": "a==2\n" for name in ("a", "new")}
    changed["README.md"] = "2\n"
    keep(relocked, changed)
    assert relocked.outputs["moved"] == "yes"
    listed, proposed = propose(relocked, number)
    assert listed.startswith("list --head relock ")
    assert proposed.startswith(said)
    assert moved(relocked) == changed
    body = (relocked.folder / "temp/body.md").read_text()
    assert body.endswith("\n\n| a.lock | a | 1 | 2 |\n")


def test_where_nothing_moved_nothing_is_proposed(relocked: Runner) -> None:
    assert keep(relocked, {}).read_text() == ""
    assert relocked.outputs["moved"] == "no"
    assert JOBS["relock.yml/propose"]["if"] == "needs.relock.outputs.moved == 'yes'"


def test_a_patch_that_reaches_for_a_workflow_does_not_get_there(relocked: Runner) -> None:
    # The first job runs what a resolver brings; this is what that could do to its patch.
    files = {"lockfiles/some/a.lock": "a==2\n", ".github/workflows/x.yml": "2\n"}
    write(relocked.folder / "work", files)
    patch = git(relocked.folder / "work", "diff", "--binary")
    assert ".github" in patch
    keep(relocked, files).write_text(patch)
    propose(relocked)
    assert moved(relocked) == {"lockfiles/some/a.lock": "a==2\n"}

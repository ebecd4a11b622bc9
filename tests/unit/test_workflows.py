"""What the workflows promise beyond their linter, and their scripts run against stand-ins.

They never ran on GitHub. What a script says to git is said to a real one here; docker, skopeo,
cosign, gh and nox are stand-ins that write down what they were asked.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from images import catalog
from images.catalog import ROOT
from images.locking import lock
from images.publishing import provenance, publish, verify_published

from ..conftest import sha256

FOLDER = ROOT / ".github" / "workflows"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
IMAGES = catalog.load()
EXPRESSION = "${{"
# Jobs that only carry, sign or name what sessions have made: in them there is nothing to run here.
CARRIERS = {
    "prove.yml/prove": "the image's own commands, as the README gives them for docker",
    "publish.yml/sign-staged": "cosign has the identity, and nothing of this repository",
    "publish.yml/sign-released": "the same",
    "publish.yml/key": "has a token that writes to the release, and nothing of this repository",
    "relock.yml/propose": "has a token that writes, so nothing of this repository runs in it",
}


# A reader of the YAML that these files are written in: two blanks a level, no anchors.


@dataclass(frozen=True)
class Step:
    """One step: its text, and the script that it runs if it runs one."""

    text: str

    @property
    def name(self) -> str:
        found = re.search(r"^ +(?:- )?name: (.+)$", self.text, re.MULTILINE)
        return found[1] if found else ""

    @property
    def script(self) -> str:
        found = re.search(r"^( +)(- )?run: (.*)\n((?:\1 .*\n|\n)*)", self.text, re.MULTILINE)
        if not found:
            return ""
        return textwrap.dedent(found[4]) if found[3] == "|" else found[3] + "\n"


@dataclass(frozen=True)
class Job:
    """One job, and the file that it stands in."""

    file: str
    key: str
    text: str

    @property
    def path(self) -> str:
        return f"{self.file}/{self.key}"

    @property
    def steps(self) -> list[Step]:
        _, _, tail = self.text.partition("    steps:\n")
        return [Step(part) for part in re.split(r"^(?=      - )", tail, flags=re.MULTILINE) if part]

    def has(self, key: str) -> bool:
        return re.search(rf"^    {key}:", self.text, re.MULTILINE) is not None

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)


def jobs(file: str, text: str) -> Iterator[Job]:
    _, _, tail = text.partition("\njobs:\n")
    parts = re.split(r"^  ([a-z-]+):\n", tail, flags=re.MULTILINE)
    for key, body in zip(parts[1::2], parts[2::2], strict=True):
        yield Job(file, key, body)


JOBS = {job.path: job for file, text in FILES.items() for job in jobs(file, text)}
STEPS = [(job, step) for job in JOBS.values() for step in job.steps]
EVERY_FILE = pytest.mark.parametrize("file", FILES)
EVERY_JOB = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


def test_the_reader_sees_everything_there_is() -> None:
    assert set(FILES) == {"checks.yml", "prove.yml", "publish.yml", "release.yml", "relock.yml"}
    whole = "".join(FILES.values())
    assert len(re.findall(r"^    runs-on: |^    uses: ", whole, re.MULTILINE)) == len(JOBS)
    assert len(re.findall(r"\brun: ", whole)) == len([s for _, s in STEPS if s.script])
    assert len(re.findall(r"^      - ", whole, re.MULTILINE)) >= len(STEPS)
    assert all(step.script or "uses: " in step.text for _, step in STEPS)
    sample = "x:\n\njobs:\n  a:\n    steps:\n      - run: |\n          one\n\n          two\n"
    (job,) = jobs("file", sample)
    assert [step.script for step in job.steps] == ["one\n\ntwo\n"]


# what runs, and with which rights


@EVERY_FILE
def test_a_workflow_has_no_right_but_what_a_job_asks_for(file: str) -> None:
    assert re.findall(r"^permissions:.*$", FILES[file], re.MULTILINE) == ["permissions: {}"]


@EVERY_FILE
def test_a_workflow_says_what_happens_to_two_of_it(file: str) -> None:
    block = re.search(r"^concurrency:\n((?:  .*\n)+)", FILES[file], re.MULTILINE)
    assert block
    assert "group: " in block[1]
    assert "cancel-in-progress: " in block[1]


@EVERY_JOB
def test_a_job_names_its_rights_and_its_end(job: Job) -> None:
    assert job.has("permissions")
    # A job that calls a workflow takes the time that its jobs have.
    assert job.has("timeout-minutes") != job.has("uses")


@EVERY_FILE
def test_an_action_is_named_by_its_commit_with_its_version_beside(file: str) -> None:
    for line in re.findall(r"uses: .*", FILES[file]):
        own = re.fullmatch(r"uses: \$/\.github/workflows/([a-z]+\.yml)", line)
        if own:
            assert own[1] in FILES
            continue
        assert re.fullmatch(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_commit_everywhere() -> None:
    used: dict[str, set[str]] = {}
    for name, rest in re.findall(r"uses: ([\w-]+/[\w-]+)@(.*)", "".join(FILES.values())):
        used.setdefault(name, set()).add(rest)
    assert len(used) > 1
    assert {name: found for name, found in used.items() if len(found) > 1} == {}


def test_a_checkout_leaves_no_credentials_behind() -> None:
    checkouts = [step for _, step in STEPS if "uses: actions/checkout@" in step.text]
    assert checkouts
    for step in checkouts:
        assert "          persist-credentials: false\n" in step.text


@pytest.mark.parametrize("word", ["pull_request_target", "workflow_run", "secrets.", "inherit"])
def test_a_stranger_s_pull_request_meets_no_secret(word: str) -> None:
    assert [file for file, text in FILES.items() if word in text] == []


def test_a_pull_request_gets_no_token_that_writes_and_no_machine_of_ours() -> None:
    files = [file for file, text in FILES.items() if "\n  pull_request:" in text]
    assert files == ["checks.yml"]
    for job in (job for job in JOBS.values() if job.file in files):
        assert re.findall(r"^      [a-z-]+: (?:write|read)\b.*$", job.text, re.MULTILINE) == [
            "      contents: read # to check out"
        ]
        assert "self-hosted" not in job.text
        assert not job.has("uses")


@EVERY_FILE
def test_no_right_to_write_stands_in_a_job_that_a_resolver_or_a_gpu_runs_in(file: str) -> None:
    for job in (job for job in JOBS.values() if job.file == file):
        if "self-hosted" in job.text or "--session relock" in job.text:
            assert ": write" not in job.text


def test_the_proof_on_a_gpu_runs_on_a_label_of_ours() -> None:
    assert "    runs-on: [self-hosted, linux, x64, gpu]\n" in JOBS["prove.yml/prove"].text
    others = [path for path, job in JOBS.items() if "self-hosted" in job.text]
    assert others == ["prove.yml/prove"]


@EVERY_FILE
def test_no_expression_stands_in_a_script(file: str) -> None:
    scripts = [step.script for job, step in STEPS if job.file == file and step.script]
    assert [script for script in scripts if EXPRESSION in script] == []
    assert scripts or file == "release.yml"


# their linter

LINTER = re.search(r"zizmor = (\(.*?\))", (ROOT / "noxfile.py").read_text("utf-8"), re.DOTALL)
BAD = """\
name: Bad
on: pull_request
permissions: {}
concurrency: { group: bad, cancel-in-progress: true }
jobs:
  job:
    name: Job
    runs-on: ubuntu-24.04
    permissions:
      contents: read # to check out
    steps:
      - name: Step
        run: echo SAID
"""


@pytest.mark.parametrize(
    ("said", "finding"),
    [("hello", ""), ("${{ github.event.pull_request.title }}", "template-injection")],
    ids=["without", "with"],
)
def test_the_linter_passes_what_is_sound_and_finds_an_injection(
    said: str, finding: str, tmp_path: Path
) -> None:
    assert LINTER
    program, *options = ast.literal_eval(LINTER[1])
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    path = tmp_path / ".github" / "workflows" / "bad.yml"
    path.parent.mkdir(parents=True)
    path.write_text(BAD.replace("SAID", said), encoding="utf-8")
    argv = [shutil.which(program, path=beside) or program, *options, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == bool(finding), done.stdout + done.stderr
    assert finding in done.stdout


# what they say comes from the catalog and from nox


def test_every_pull_request_is_linted_and_tested() -> None:
    head, _, _ = FILES["checks.yml"].partition("\njobs:\n")
    assert "\n  pull_request:\n  push:\n" in head, "no filter by path or branch"
    assert not JOBS["checks.yml/lint"].has("if")
    assert not JOBS["checks.yml/tests"].has("if")
    assert "--session lint" in JOBS["checks.yml/lint"].text
    assert JOBS["checks.yml/tests"].steps[-1].script == ".ci/run\n"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def sessions() -> set[str]:
    """The names of the sessions in noxfile.py."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name.replace("_", "-") for f in functions if f.decorator_list} | {
        keyword.value.value
        for f in functions
        for call in f.decorator_list
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
    }


def asked(text: str) -> list[str]:
    """The sessions that a text runs."""
    return re.findall(r"-m nox --session ([a-z-]+)", text)


def test_every_session_that_a_workflow_names_exists() -> None:
    wanted = set(asked("".join(FILES.values())))
    assert {"build", "lint", "matrix", "publish", "relock", "reproduce"} <= wanted
    assert wanted <= sessions()


@EVERY_JOB
def test_a_job_runs_sessions_that_anybody_can_run(job: Job) -> None:
    runs = bool(asked(job.text)) or ".ci/run" in job.text or job.has("uses")
    assert runs != (job.path in CARRIERS)


def test_a_changed_image_is_built_verified_and_reproduced() -> None:
    text = JOBS["checks.yml/image"].text
    order = ["--session build", "rollout verify", "--session reproduce"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_a_matrix_is_what_a_session_computed() -> None:
    found = re.findall(
        r"^      matrix:\n((?:        .*\n)+)", "".join(FILES.values()), re.MULTILINE
    )
    assert len(found) > 1
    for block in found:
        derived = r"        reference: \${{ fromJSON\(needs\.([a-z]+)\.outputs\.references\) }}\n"
        match = re.fullmatch(derived, block)
        assert match, block
        producers = [job for job in JOBS.values() if job.key == match[1]]
        assert [asked(job.text) for job in producers] == [["matrix"]]


def test_a_matrix_without_an_image_is_skipped_not_an_error() -> None:
    for job in JOBS.values():
        if "      matrix:\n" in job.text:
            assert re.search(r"^    if: needs\.\w+\.outputs\.references != '\[\]'$", job.text, re.M)


def test_no_workflow_names_an_image_or_a_version_of_an_engine() -> None:
    names = {image.tag for image in IMAGES} | {image.reference for image in IMAGES}
    for image in IMAGES:
        versions = {entry.name: entry.version for entry in lock.read(image)}
        names |= {versions[image.engine], versions["torch"], *image.expect.values()}
    words = "".join(FILES.values())
    found = [n for n in names if re.search(rf"(?<![\w.@]){re.escape(n)}(?![\w.])", words)]
    assert names
    assert found == []


def test_the_registry_is_a_variable_and_no_name() -> None:
    text = "".join(FILES.values())
    assert set(re.findall(r"REGISTRY: (.*)", text)) == {"${{ vars.REGISTRY }}"}
    pushed = re.findall(r'--(?:to|from) "([^"]*)"', text)
    assert len(pushed) > 2
    assert all(place.startswith("$REGISTRY") for place in pushed)


# disks, and the machine that layers are promised for


def in_debian() -> list[Job]:
    return [job for job in JOBS.values() if job.has("container")]


def test_every_build_runs_on_the_machine_that_digests_are_promised_for() -> None:
    builders = {
        job.path
        for job in JOBS.values()
        if {"build", "reproduce", "relock"} & set(asked(job.text)) or ".ci/run" in job.text
    }
    assert {job.path for job in in_debian()} == builders


def test_that_machine_is_named_by_its_digest_and_made_ready_in_one_way() -> None:
    blocks = set()
    for job in in_debian():
        block = re.search(r"^    container:\n(?:      .*\n)+", job.text, re.MULTILINE)
        assert block
        assert re.search(r"image: debian:12@sha256:[0-9a-f]{64}\n", block[0])
        blocks.add((block[0], *(step.text for step in job.steps[:2])))
    assert len(blocks) == 1


def test_room_is_made_on_hosted_runners_alone_and_told_before_and_after() -> None:
    for job in in_debian():
        first = job.steps[0]
        assert "if: runner.environment == 'github-hosted'\n" in first.text
        assert [line.split()[0] for line in first.script.splitlines()] == ["df", "find", "df"]
        mounted = re.findall(r"- /\S+:(/\S+)", job.text)
        # What is deleted lies below /host, and what builds need does not.
        assert [path for path in mounted if not path.startswith("/host/")] == [
            "/var/lib/containers"
        ]
    assert in_debian()


# their scripts, run


@pytest.mark.parametrize(
    ("job", "step"),
    [(job, step) for job, step in STEPS if step.script],
    ids=[f"{job.path}: {step.name}" for job, step in STEPS if step.script],
)
def test_a_script_is_one_that_bash_reads(job: Job, step: Step) -> None:
    assert step.name, f"{job.path}: what does it do?"
    done = subprocess.run(["bash", "-n"], input=step.script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


DIGEST = "sha256:" + "5" * 64
# What stand-ins answer; all of them write down what they were asked.
ANSWERS = {
    "skopeo": f'if [ "$1" = inspect ]; then echo "${{RELEASED-@{DIGEST}}}"; fi',
    "docker": 'if [ "$1" = image ] && [ "$2" = inspect ]; then echo sha256:a,sha256:b; fi',
    "cosign": "",
    "gh": "",
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
        script.write_text(step.script, encoding="utf-8")
        argv = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        return subprocess.run(
            argv,
            env={**self.env, **env},
            cwd=self.folder / "work",
            capture_output=True,
            text=True,
            check=False,
        )

    def output(self, name: str) -> str:
        """What a step has left for the next ones."""
        lines = Path(self.env["GITHUB_OUTPUT"]).read_text(encoding="utf-8").splitlines()
        return next(
            value for key, _, value in (line.partition("=") for line in lines) if key == name
        )

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
        log = f'echo "{name} $*" >>"{tmp_path}/log"'
        path.write_text(f"#!/bin/bash\n{log}\n{answer}\n", encoding="utf-8")
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


def good(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["checks.yml/changed", "release.yml/proved"])
def test_the_list_of_images_becomes_an_output(runner: Runner, path: str) -> None:
    step = next(step for step in JOBS[path].steps if "--session matrix" in step.script)
    good(runner.run(step, BEFORE="HEAD^1"))
    assert runner.output("references") == '["x:y"]'


@pytest.mark.parametrize("path", ["checks.yml/changed", "release.yml/proved"])
def test_a_list_that_cannot_be_made_ends_the_job(runner: Runner, path: str) -> None:
    (runner.folder / "bin" / "python3").write_text("#!/bin/bash\nexit 1\n")
    step = next(step for step in JOBS[path].steps if "--session matrix" in step.script)
    assert runner.run(step, BEFORE="HEAD^1").returncode != 0
    assert not Path(runner.env["GITHUB_OUTPUT"]).exists()


def scripts(path: str) -> Iterator[Step]:
    """The steps of a job that run a script."""
    return (step for step in JOBS[path].steps if step.script)


def stage(runner: Runner, **env: str) -> dict[str, str]:
    """Stage as the workflow does; returns what every later job is given."""
    job = JOBS["publish.yml/stage"]
    (runner.folder / "work" / "build").mkdir()
    names = ["Log in to the registry", "Make a key for this run alone", "Publish to staging"]
    names.append("Note the digest that everything after this is about")
    assert [step.name for step in job.steps if step.name in names] == names
    for name in names:
        good(runner.run(job.step(name), **env))
    outputs = {name: runner.output(name) for name in ("image", "hex", "key")}
    assert all(
        f"      {name}: ${{{{ steps.staged.outputs.{name} }}}}" in job.text for name in outputs
    )
    return outputs


def test_what_is_staged_signed_proved_promoted_and_signed_again_is_one_digest(
    runner: Runner,
) -> None:
    outputs = stage(runner, RELEASED="@sha256:another")
    staged = outputs["image"]
    assert staged == f"staging/verl-rollout@{DIGEST}"
    assert outputs["hex"] == DIGEST.removeprefix("sha256:")
    key = runner.folder / "work" / "build" / "key"
    key.mkdir()
    key.with_suffix(".pub").rename(key / "key.pub")  # by way of the artifact
    given = {"STAGED": staged, "IMAGE": staged, "KEY": outputs["key"], "RELEASED": DIGEST}
    order = ("publish.yml/sign-staged", "prove.yml/prove", "publish.yml/promote")
    for path in (*order, "publish.yml/sign-released"):
        for step in scripts(path):
            good(runner.run(step, **given))
    said = "\n".join(runner.asked)
    place, signed = "registry.example/owner", outputs["key"]
    for line in (
        f"nox --session publish -- verl-rollout:x-1.0 --to {place}/staging --authfile",
        f"cosign sign --yes --annotations rollout.key={signed} {place}/{staged}\n",
        f"pull {place}/{staged}\n",
        f"cosign verify {place}/{staged} --annotations rollout.key={signed} ",
        f"nox --session publish -- verl-rollout:x-1.0 --to {place} --promote "
        f"--from {place}/{staged} --trust build/key/key.pub ",
        f"nox --session verify-published -- {place}/verl-rollout:x-1.0 --key build/key/key.pub ",
        f"cosign sign --yes --annotations rollout.key={signed} {place}/verl-rollout@{DIGEST}",
    ):
        assert said.count(line) == 1, line
    assert "--session build" not in said
    assert "--unproved" not in said
    assert "a-token" not in said, "a token travels by standard input, where no process list has it"


def test_the_key_of_a_run_ends_with_the_job_and_its_public_half_stays(runner: Runner) -> None:
    outputs = stage(runner)
    assert list((runner.folder / "temp").iterdir()) == []
    public = runner.folder / "work" / "build" / "key.pub"
    assert public.read_text() == "public\n"
    assert outputs["key"] == sha256("public\n")
    kept = [step for step in JOBS["publish.yml/stage"].steps if "upload-artifact" in step.text]
    assert [re.findall(r"path: (.*)", step.text) for step in kept] == [["build/key.pub"]]


def test_another_public_key_than_the_signed_one_ends_the_job(runner: Runner) -> None:
    key = runner.folder / "work" / "build" / "key" / "key.pub"
    key.parent.mkdir(parents=True)
    key.write_text("another\n")
    step = JOBS["publish.yml/promote"].step("See that this workflow signed it, and its key")
    staged = f"staging/x@{DIGEST}"
    assert runner.run(step, STAGED=staged, KEY=sha256("public\n")).returncode != 0
    assert runner.run(step, STAGED=staged, KEY=sha256("another\n")).returncode == 0


def test_a_release_that_ended_half_way_is_finished_by_the_next_run() -> None:
    # Nothing is skipped for what is there already: its key ended with the run that made it.
    for name in ("sign-staged", "prove", "promote", "sign-released", "key"):
        text = JOBS[f"publish.yml/{name}"].text.partition("    steps:")[0]
        conditions = re.findall(r"^    if: (.*)$", text, re.MULTILINE)
        assert conditions in ([], ["${{ !inputs.candidate }}"], ["github.event_name == 'release'"])
    order = (("prove", "[stage, sign-staged]"), ("promote", "[stage, prove]"))
    for name, needs in (*order, ("sign-released", "[stage, promote]"), ("key", "[stage, promote]")):
        assert f"    needs: {needs}\n" in JOBS[f"publish.yml/{name}"].text


def test_who_signs_keyless_passes_an_environment_and_stands_on_main_or_a_tag() -> None:
    signers = [
        job for job in JOBS.values() if "id-token: write" in job.text and not job.has("uses")
    ]
    assert {job.path for job in signers} == {"publish.yml/sign-staged", "publish.yml/sign-released"}
    for job in signers:
        assert re.search(r"^    environment: (staging|release)$", job.text, re.MULTILINE), job.path
    signer = re.search(r"SIGNER: (.*)", JOBS["publish.yml/promote"].text)
    assert signer
    pattern = signer[1].replace("${{ github.repository }}", "some/project")
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
    (runner.folder / "bin" / "python3").write_text("#!/bin/bash\nexit 1\n")
    (runner.folder / "work" / "build").mkdir()
    job = JOBS["publish.yml/stage"]
    for name in ("Make a key for this run alone", "Publish to staging"):
        assert runner.run(job.step(name)).returncode != 0
    step = job.step("Note the digest that everything after this is about")
    assert runner.run(step).returncode != 0


def test_a_candidate_says_that_it_is_unproved_and_is_never_promoted(runner: Runner) -> None:
    staged = stage(runner, UNPROVED="--unproved", STAGING="candidates")["image"]
    assert staged == f"candidates/verl-rollout@{DIGEST}"
    assert any(line.endswith(" --unproved") for line in runner.asked)
    assert "    if: ${{ !inputs.candidate }}\n" in JOBS["publish.yml/promote"].text


def test_the_public_key_goes_to_the_release_under_the_name_of_its_image(runner: Runner) -> None:
    key = runner.folder / "work" / "build" / "key" / "key.pub"
    key.parent.mkdir(parents=True)
    key.write_text("public\n")
    (step,) = scripts("publish.yml/key")
    good(runner.run(step, GITHUB_REF_NAME="v1"))
    assert runner.asked == ["gh release upload v1 verl-rollout-x-1.0.pub --clobber"]
    assert "    if: github.event_name == 'release'\n" in JOBS["publish.yml/key"].text


def test_another_digest_under_the_public_tag_ends_the_job(runner: Runner) -> None:
    step = JOBS["publish.yml/promote"].step("See that the public tag is the digest that was proved")
    staged = f"staging/verl-rollout@{DIGEST}"
    assert runner.run(step, STAGED=staged, RELEASED=DIGEST).returncode == 0
    assert runner.run(step, STAGED=staged, RELEASED=f"sha256:{'6' * 64}").returncode != 0


def test_sessions_know_the_options_that_they_are_given(runner: Runner) -> None:
    stage(runner)
    for step in scripts("publish.yml/promote"):
        if "nox" in step.script:
            good(runner.run(step, STAGED=f"staging/x@{DIGEST}"))
    parsers = {"publish": publish.parser(), "verify-published": verify_published.parser()}
    parsed = []
    for line in runner.asked:
        found = re.search(r"nox --session (\S+) -- (.*)", line)
        if found:
            parsers[found[1]].parse_args(found[2].split())
            parsed.append(found[1])
    assert parsed == ["publish", "publish", "publish", "verify-published"]


@pytest.mark.parametrize(
    "image",
    [
        "verl-rollout:x-1.0",
        f"verl-rollout:x@{DIGEST}",
        f"a b@{DIGEST}",
        f"{DIGEST}",
        f"x@{DIGEST}0",
    ],
)
def test_a_gpu_runs_nothing_that_is_not_named_by_its_digest(runner: Runner, image: str) -> None:
    assert runner.run(JOBS["prove.yml/prove"].steps[0], IMAGE=image).returncode == 2
    assert runner.asked == []


@pytest.mark.parametrize("path", ["publish.yml/stage", "publish.yml/promote", "prove.yml/prove"])
def test_a_repository_without_a_registry_is_told(runner: Runner, path: str) -> None:
    step = next(step for step in JOBS[path].steps if "${REGISTRY:?" in step.script)
    done = runner.run(step, REGISTRY="", IMAGE=f"x@{DIGEST}")
    assert done.returncode != 0
    assert "set the variable REGISTRY of this repository to HOST/PREFIX" in done.stderr
    assert runner.asked == []


def test_a_proof_runs_both_commands_of_the_image_and_names_its_layers(runner: Runner) -> None:
    step = JOBS["prove.yml/prove"].step("Verify and smoke, as the README's user would")
    good(runner.run(step, IMAGE=f"staging/x@{DIGEST}"))
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
    step = JOBS["prove.yml/prove"].step("Verify and smoke, as the README's user would")
    assert runner.run(step, IMAGE=f"staging/x@{DIGEST}").returncode == 1
    assert not [line for line in runner.asked if " smoke " in line]


# the weekly relock, with a real git


def git(folder: Path, *arguments: str) -> str:
    argv = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def relocked(runner: Runner) -> Runner:
    """A checkout with a remote, in which locks have moved, and as much else as could."""
    work = runner.folder / "work"
    git(runner.folder, "init", "--quiet", "--bare", "remote")
    git(runner.folder, "init", "--quiet", "--initial-branch", "main", "work")
    before: Mapping[str, str] = {
        ".gitignore": "/build/\n",
        "lockfiles/some/a.lock": "a==1\n",
        "README.md": "1\n",
        ".github/workflows/x.yml": "1\n",
    }
    for name, text in before.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--message", "before")
    git(work, "remote", "add", "origin", "../remote")
    git(work, "push", "--quiet", "origin", "main")
    (work / "build/relock").mkdir(parents=True)
    (work / "build/relock/moved.md").write_text("| a.lock | a | 1 | 2 |\n")
    return runner


def keep(runner: Runner) -> Path:
    """The patch of the first job, as the second one finds it; the checkout is fresh again."""
    good(runner.run(JOBS["relock.yml/relock"].step("Keep it as a patch")))
    work = runner.folder / "work"
    (work / "build/relock").rename(runner.folder / "temp/relock")
    git(work, "reset", "--quiet", "--hard")
    git(work, "clean", "--quiet", "--force", "-d")
    return runner.folder / "temp/relock/moved.patch"


def propose(runner: Runner) -> None:
    step = JOBS["relock.yml/propose"].step("Push a branch and open a pull request")
    good(runner.run(step, BASE="main", GH_TOKEN="a-token"))  # noqa: S106 - a stand-in


def moved(runner: Runner) -> dict[str, str]:
    """What the pushed branch changes: file to content."""
    remote = runner.folder / "remote"
    names = git(remote, "diff", "--name-only", "main", "relock").split()
    return {name: git(remote, "show", f"relock:{name}") for name in names}


def test_what_moved_is_pushed_to_a_branch_and_proposed(relocked: Runner) -> None:
    work = relocked.folder / "work"
    (work / "lockfiles/some/a.lock").write_text("a==2\n")
    (work / "lockfiles/some/new.lock").write_text("b==1\n")
    (work / "README.md").write_text("2\n")
    keep(relocked)
    assert relocked.output("moved") == "yes"
    propose(relocked)
    expected = {
        "README.md": "2\n",
        "lockfiles/some/a.lock": "a==2\n",
        "lockfiles/some/new.lock": "b==1\n",
    }
    assert moved(relocked) == expected
    created = [line for line in relocked.asked if line.startswith("gh pr create")]
    assert len(created) == 1
    assert "--base main --head relock" in created[0]
    body = (relocked.folder / "temp/body.md").read_text()
    assert body.endswith("\n\n| a.lock | a | 1 | 2 |\n")


def test_a_second_week_renews_the_proposal_that_is_open(relocked: Runner) -> None:
    path = relocked.folder / "bin" / "gh"
    path.write_text(path.read_text() + 'if [ "$2" = list ]; then echo 7; fi\n')
    (relocked.folder / "work/lockfiles/some/a.lock").write_text("a==2\n")
    keep(relocked)
    propose(relocked)
    assert [line.split()[1:4] for line in relocked.asked if line.startswith("gh pr ")] == [
        ["pr", "list", "--head"],
        ["pr", "edit", "7"],
    ]


def test_where_nothing_moved_nothing_is_proposed(relocked: Runner) -> None:
    assert keep(relocked).read_text() == ""
    assert relocked.output("moved") == "no"
    assert "    if: needs.relock.outputs.moved == 'yes'\n" in JOBS["relock.yml/propose"].text


def test_a_patch_that_reaches_for_a_workflow_does_not_get_there(relocked: Runner) -> None:
    # The first job runs what a resolver brings; this is what that could do to its patch.
    work = relocked.folder / "work"
    (work / "lockfiles/some/a.lock").write_text("a==2\n")
    (work / ".github/workflows/x.yml").write_text("2\n")
    patch = git(work, "diff", "--binary")
    keep(relocked).write_text(patch)
    assert ".github" in patch
    propose(relocked)
    assert moved(relocked) == {"lockfiles/some/a.lock": "a==2\n"}


def test_the_workflow_that_builds_names_itself_as_the_builder() -> None:
    """GitHub's own variable names release.yml where that calls it; cosign certifies this file."""
    assert f"\n  {provenance.WORKFLOW}: .github/workflows/publish.yml" in FILES["publish.yml"]

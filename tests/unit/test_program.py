"""What decides a result has an identity by meaning: real edits of the real files show which."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from images import catalog
from images.building import payload
from images.catalog import ROOT
from images.locking import lock
from images.proving import standing
from rollout import program, smoke, verify

PACKAGE = ROOT / "entrypoints" / "rollout"
IMAGES = catalog.load()
Identity = dict[str, dict[str, str]]


def identities(root: Path) -> Identity:
    """Of every image of the catalog the identity of its checks, from sources in a folder."""
    sources = program.Sources(root)
    found = {}
    for image in IMAGES:
        facts = image.smoke.facts
        found[image.reference] = program.identity(
            image.backend,
            verify.CHECKS,
            smoke.promised(facts),
            program.settings(facts),
            framework=image.framework.name if image.framework else "",
            sources=sources,
        )
    return found


@cache
def today() -> Identity:
    return identities(PACKAGE)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package for a test to edit."""
    copied = tmp_path / "rollout"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return copied


def edit(package: Path, name: str, before: str, after: str) -> None:
    """Change a file of the copy, at exactly one place."""
    path = package / name
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
    path.write_text(text.replace(before, after), encoding="utf-8")


def changed(package: Path) -> dict[str, set[str]]:
    """The checks of each image that ask something else than today's, where there are any."""
    found = {}
    for reference, checks in identities(package).items():
        other = {name for name, value in checks.items() if today()[reference].get(name) != value}
        if other:
            found[reference] = other
    return found


def images_with(check: str, backend: str = "") -> set[str]:
    """The images that promise a check."""
    return {
        image.reference
        for image in IMAGES
        if check in standing.promised(image) and backend in ("", image.backend)
    }


# what changes nothing


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (
            *(
                "checks.py",
                '"control: the engine had the weights before they were sent", metrics)\n',
            ),
            '"control: it had them before", metrics)\n',
        ),
        (
            *(
                "checks.py",
                "f\"sleep freed only {metrics['freed_fraction']:.0%} of what was held\"",
            ),
            '"sleep freed too little"',
        ),
        ("checks.py", "    # The weights are what is copied; a KV cache is dropped.\n", ""),
        (
            *("checks.py", '    """sha256 of the bytes of a tensor."""\n'),
            '    """What a tensor\'s bytes hash to."""\n',
        ),
        ("checks.py", "def digest(tensor: torch.Tensor) -> str:", "def digest(tensor):"),
        ("smoke.py", 'f"not run: {broken} failed before it"', '"an earlier check failed"'),
        ("smoke.py", 'f"the engine reports: {error}"', 'f"the engine says: {error}"'),
        ("cli.py", 'help="the proof: generation, sleep, wake, refit"', 'help="the GPU proof"'),
        (
            "cli.py",
            '    four = commands.add_parser("doctor",',
            '    two.add_argument("--quick", action="store_true", help="a new option")\n'
            '    four = commands.add_parser("doctor",',
        ),
        ("faults.py", '"one tensor is never sent"', '"a tensor is lost"'),
        ("report.py", "SHOWN_METRICS = 4", "SHOWN_METRICS = 5"),
        ("oracle.py", "# 700: exp of more is no float64", "# exp of more is no number"),
        ("probe.py", "import math\n", "import math  # for logarithms\n"),
        ("verify.py", 'f"cannot be imported: {failure}"', 'f"does not import: {failure}"'),
    ],
    ids=[
        *(
            "sentence",
            "f-string",
            "comment",
            "docstring",
            "annotation",
            "not run",
            "reason",
            "help",
        ),
        *("option of another command", "what a fault is called", "terminal", "comment on a line"),
        *("comment behind a line", "finding"),
    ],
)
def test_what_is_reworded_changes_no_identity(
    package: Path, name: str, before: str, after: str
) -> None:
    path = package / name
    if before not in path.read_text(encoding="utf-8"):
        before = before.replace("\n", "")
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    assert changed(package) == {}


def test_every_sentence_of_every_error_may_be_another(package: Path) -> None:
    """Not those alone that a test thought of: all texts of all ``raise Failed(...)`` at once."""
    path = package / "checks.py"
    text = path.read_text(encoding="utf-8")
    words = text.replace("control: ", "control, which fails: ")
    assert words.count("control, which fails: ") > 10
    path.write_text(words, encoding="utf-8")
    assert changed(package) == {}


def test_what_another_formatter_writes_is_the_same(package: Path) -> None:
    import ast

    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        path.write_text(ast.unparse(tree), encoding="utf-8")
    assert changed(package) == {}


def test_a_call_that_says_not_there_is_the_one_that_raises(package: Path) -> None:
    path = "backends/vllm_interface.py"
    edit(
        package,
        path,
        "from rollout.presence import find_spec",
        "from importlib.util import find_spec",
    )
    assert changed(package) == {}
    edit(
        package,
        path,
        "from importlib.util import find_spec",
        "from rollout.installed import find_spec",
    )
    assert all(checks == {"interface"} for checks in changed(package).values())
    assert changed(package)


def test_another_backend_changes_its_own_images_alone(package: Path) -> None:
    edit(package, "backends/sglang_worker.py", "IDLE = 30.0", "IDLE = 31.0")
    found = changed(package)
    assert set(found) == {image.reference for image in IMAGES if image.backend == "sglang"}
    assert all(not set(verify.CHECKS) & checks for checks in found.values())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("long.py", "ANSWER = 32", "ANSWER = 33"),
        ("long_oracle.py", "TAIL = 64", "TAIL = 63"),
        ("backends/long_transformers.py", "CHUNK = 512", "CHUNK = 513"),
    ],
)
def test_long_sequences_stand_on_modules_of_their_own(
    package: Path, name: str, before: str, after: str
) -> None:
    edit(package, name, before, after)
    # The reference engine schedules many requests at once as it does long ones.
    shared = {"pressure"} if name.startswith("backends/") else set()
    assert changed(package) == {reference: {"long", *shared} for reference in images_with("long")}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pressure.py", "ENOUGH = 16", "ENOUGH = 17"),
        ("rush.py", "BEGUN = 16", "BEGUN = 15"),
        ("ledger.py", 'entry.end = "finished"', 'entry.end = "done"'),
        ("backends/crowd.py", "/fd", "/fdinfo"),
    ],
)
def test_many_requests_at_once_stand_on_modules_of_their_own(
    package: Path, name: str, before: str, after: str
) -> None:
    edit(package, name, before, after)
    assert changed(package) == {reference: {"pressure"} for reference in images_with("pressure")}


def test_how_a_backend_takes_many_requests_and_its_faults_are_no_part_of_another_check(
    package: Path,
) -> None:
    edit(package, "pressure_faults.py", "half = asked[::2]", "half = asked[::3]")
    assert changed(package) == {}
    edit(package, "backends/pressure_vllm.py", "SLOTS = 128", "SLOTS = 64")
    found = changed(package)
    assert set(found) == {i.reference for i in IMAGES if i.smoke.pressure and i.backend == "vllm"}
    assert all(checks == {"pressure"} for checks in found.values())


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_how_an_engine_is_set_for_long_sequences_is_part_of_that_check_alone(
    package: Path, name: str
) -> None:
    before = program.identity(name, (), ("long", "cycle"), sources=program.Sources(package))
    edit(package, f"backends/long_{name}.py", "CHUNK = 2048", "CHUNK = 1024")
    after = program.identity(name, (), ("long", "cycle"), sources=program.Sources(package))
    assert before["cycle"] == after["cycle"]
    assert before["long"] != after["long"]


def test_a_new_check_changes_no_other(package: Path) -> None:
    edit(
        package,
        "checks.py",
        "# In the order in which they run",
        'def novel(trial: Trial) -> Metrics:\n    """Nothing."""\n    return {"one": 1}\n\n\n'
        "# In the order in which they run",
    )
    edit(
        package, "checks.py", '    "refit": refit,\n', '    "refit": refit,\n    "novel": novel,\n'
    )
    edit(
        package,
        "smoke.py",
        '    "refit",\n    "generation"',
        '    "refit",\n    "novel",\n    "generation"',
    )
    assert changed(package) == {}


# what changes the checks that stand on it


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("backends/lora_transformers.py", "if number != self.number:", "if number:"),
        ("backends/adapters.py", "NONE = 0 ", "NONE = -1 "),
        ("adapter.py", "ALPHA = 16", "ALPHA = 32"),
        ("lora.py", "CALM = 0.5", "CALM = 0.25"),
    ],
)
def test_what_drives_an_engine_with_adapters_counts_for_their_check_alone(
    package: Path, name: str, before: str, after: str
) -> None:
    edit(package, name, before, after)
    assert changed(package) == {one: {"lora"} for one in images_with("lora")}
    assert images_with("lora") == {"verl-rollout:transformers-cpu"}


def test_an_engine_with_adapters_of_another_backend_counts_for_none_that_promises_none(
    package: Path,
) -> None:
    for name in ("lora_vllm", "lora_vllm_worker", "lora_sglang", "lora_sglang_worker"):
        path = package / "backends" / f"{name}.py"
        path.write_text(path.read_text() + "\n\nNOVEL = 1\n")
    assert changed(package) == {}


def test_another_bound_changes_exactly_the_images_that_have_its_check(package: Path) -> None:
    edit(package, "oracle.py", "BOUND_FP8 = 1.080", "BOUND_FP8 = 1.081")
    wanted = {reference: {"fp8"} for reference in images_with("fp8")}
    for reference in images_with("fp8-kv"):
        wanted[reference] = wanted.get(reference, set()) | {"fp8-kv"}
    assert changed(package) == wanted
    assert images_with("fp8") not in (set(), {image.reference for image in IMAGES})


def test_another_bound_of_two_gpus_changes_the_images_that_promise_them(package: Path) -> None:
    edit(package, "checks.py", "IMBALANCE = 0.3 ", "IMBALANCE = 0.31 ")
    wanted = images_with("tensor-parallel")
    assert wanted
    assert changed(package) == {reference: {"tensor-parallel"} for reference in wanted}


@pytest.mark.parametrize(
    ("name", "before", "after", "check"),
    [
        (
            "checks.py",
            "return before - asleep >= FREED * held",
            "return before > asleep",
            "sleep-1",
        ),
        ("training.py", "BOUND = 0.003", "BOUND = 0.004", "training"),
        ("checks.py", "ROLLOUT = 128", "ROLLOUT = 64", "partial-rollout"),
        ("checks.py", "TURNS = 3", "TURNS = 2", "multi-turn"),
        ("smoke.py", "CALM = 0.25", "CALM = 0.5", "fp8"),
        ("smoke.py", 'status = "failed" if reason else "passed"', 'status = "passed"', "refit"),
        ("smoke.py", "SEED, OTHER_SEED = 20260708", "SEED, OTHER_SEED = 20260707", "generation"),
        ("oracle.py", "BOUND_BF16 = 1.043", "BOUND_BF16 = 1.05", "generation"),
        ("transport.py", "_ALIGNMENT = 64", "_ALIGNMENT = 128", "refit"),
        ("verify.py", "IMPORT_LIMIT_S = 600", "IMPORT_LIMIT_S = 60", "imports"),
        ("hashes.py", "_LARGE = ", "_LARGE = 1 + ", "files"),
    ],
)
def test_what_is_asked_otherwise_is_another_program(
    package: Path, name: str, before: str, after: str, check: str
) -> None:
    edit(package, name, before, after)
    found = changed(package)
    assert found
    assert any(check in checks for checks in found.values())


def test_another_probe_changes_every_check_of_the_smoke_test_and_none_of_verify(
    package: Path,
) -> None:
    text = (package / "probe.py").read_text(encoding="utf-8")
    assert "_SIZES" in text
    path = package / "probe.py"
    path.write_text(
        text.replace("def prompts(", "def _unused() -> int:\n    return 1\n\n\ndef prompts(", 1)
    )
    assert changed(package) == {}, "what nothing uses decides nothing"
    path.write_text(text.replace('"vocab_size": ', '"vocab_size": 2 * ', 1), encoding="utf-8")
    found = changed(package)
    assert set(found) == {image.reference for image in IMAGES}
    for image in IMAGES:
        driven = set(smoke.promised(image.smoke.facts)) - {"training", "moe"}
        assert found[image.reference] == driven, "those two have models of their own"


def test_an_adapter_of_a_framework_is_part_of_its_own_check_alone(package: Path) -> None:
    path = package / "frameworks" / "verl_settings.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\nMORE = 1\n", encoding="utf-8")
    wanted = {
        image.reference: {"framework", *(["training"] if image.smoke.training else [])}
        for image in IMAGES
        if image.framework and image.framework.name == "verl"
    }
    assert wanted and changed(package) == wanted


def test_what_trains_with_a_checkout_counts_for_the_check_training_alone(package: Path) -> None:
    def roll(root: Path) -> dict[str, str]:
        sources = program.Sources(root)
        checks = ("framework",), ("training", "generation")
        return program.identity("vllm", *checks, framework="roll", sources=sources)

    before = roll(package)
    edit(package, "frameworks/training_roll_settings.py", "BUCKET = 2 ", "BUCKET = 3 ")
    after = roll(package)
    assert {name for name in before if before[name] != after[name]} == {"training"}


def test_a_transport_is_part_of_the_images_whose_engine_has_it(package: Path) -> None:
    edit(package, "cuda_ipc.py", "BUCKET_BYTES = 256 << 20", "BUCKET_BYTES = 128 << 20")
    found = changed(package)
    assert set(found) == {i.reference for i in IMAGES if i.backend != "transformers"}


def test_what_an_image_promises_of_how_its_checks_run_is_part_of_their_identity() -> None:
    facts: dict[str, Any] = {"sleep_levels": [1, 2], "refit": ["disk", "nccl"]}

    def of(wanted: Mapping[str, Any]) -> dict[str, str]:
        return program.identity("sglang", ["files"], ["cycle"], program.settings(wanted))

    one, other = of(facts), of(facts | {"reuse": "prompts"})
    assert one["files"] == other["files"]
    assert one["cycle"] != other["cycle"]
    assert of(facts | {"refit": ["disk"]}) == one, "a transport more is one check's, if any's"
    assert of(facts | {"refit": ["nccl"]})["cycle"] != one["cycle"], "all checks are served by it"


# the host, the image, and other versions of Python


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.reference)
def test_an_image_says_the_same_of_itself_as_the_host(image: catalog.Image, tmp_path: Path) -> None:
    """It has its own copy of the modules, without those of other backends."""
    files = payload.files(image, lock.read(image))
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    code = (
        "import json, sys; from rollout import program, verify; from pathlib import Path\n"
        "data, asked = json.loads(Path('image.json').read_text()), sys.argv[1:]\n"
        "found = program.of_image(data, verified=verify.available(data), smoked=asked)\n"
        "print(json.dumps(found))"
    )
    asked = [*smoke.promised(image.smoke.facts), *standing.asked(image)]
    argv = [sys.executable, "-c", code, *asked]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == standing.program_of(image)


def pythons() -> list[str]:
    """Other versions of Python that are installed here."""
    places = [shutil.which(f"python3.{minor}") or "" for minor in range(11, 16)]
    places += map(
        str,
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(
            "versions/3.1[1-9]*/bin/python"
        ),
    )
    found = {}
    for place in filter(None, places):
        code = "import sys; print(sys.version_info[:2])"
        done = subprocess.run([place, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), place)
    return list(found.values())


def test_every_version_of_python_computes_the_same() -> None:
    checks = smoke.promised(next(i for i in IMAGES if i.backend == "vllm").smoke.facts)
    wanted = program.identity("vllm", (), checks)
    argv = ["-m", "rollout.program", "vllm", *checks]
    tried = pythons()
    assert tried, "not even the one that runs this"
    for python in tried:
        done = subprocess.run(
            [python, *argv], cwd=ROOT / "entrypoints", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (python, done.stderr)
        assert json.loads(done.stdout) == wanted, python


def test_what_versions_of_python_see_differently_is_one_form(tmp_path: Path) -> None:
    """Empty fields, pieces of f-strings and the like are not part of it."""
    texts = [
        'def fp8(trial):\n    """One."""\n    return f"a{trial!r:>{4}}b" "c"\n',
        'def fp8(trial: "Trial") -> str:\n    return f"a{trial!r:>{4}}" f"bc"\n',
    ]
    forms = []
    for text in texts:
        (tmp_path / "checks.py").write_text(text)
        forms.append(program.Sources(tmp_path).form("rollout.checks.fp8", "fp8")[0])
    assert forms[0] == forms[1]


HELPERS = """
def told(what, x):
    raise Failed(what)


def judge(x, key):
    return x[key]


"""


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("return x > 1", "return x >= 1"),
        ('return x == "a b"', 'return x == "a c"'),
        ('return {"a b": 1}[x]', 'return {"a c": 1}[x]'),
        ('reason = x == "a b"\n    return reason', 'reason = x == "a c"\n    return reason'),
        ("raise Failed(x)", "raise Other(x)"),
        ('raise Problem("a b", 2)', 'raise Problem("a b", 3)'),
        ("return x + 1", "return x - 1"),
        ("return (lambda y: y)(x)", "return (lambda y: x)(x)"),
        ("return [y for y in x if y]", "return [y for y in x]"),
        ("assert x", "pass"),
        ("with x:\n        return 1", "with x:\n        return 2"),
        ("if x:\n        return 1\n    return 2", "if x:\n        return 1\n    return 1"),
        ('text = "a b"\n    return text', 'text = "a c"\n    return text'),
        ('what = "ab"\n    return what', 'what = "ac"\n    return what'),
        ('judge(x, "a b")', 'judge(x, "a c")'),
    ],
)
def test_a_change_of_meaning_is_another_form(tmp_path: Path, one: str, two: str) -> None:
    forms = []
    for body in (one, two):
        (tmp_path / "checks.py").write_text(f"{HELPERS}def fp8(x):\n    {body}\n")
        forms.append(program.Sources(tmp_path).form("rollout.checks.fp8", "fp8")[0])
    assert forms[0] != forms[1]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ('raise Failed("a b", x)', 'raise Failed("other", x)'),
        ('raise Failed(f"a {x}", x)', 'raise Failed("other", x)'),
        (
            'what = "a" if x else "b"\n    raise Failed(what)',
            'what = f"c{x}"\n    raise Failed(what)',
        ),
        ('print("a b")', 'print("c")'),
        ('assert x, "a"', 'assert x, "b"'),
        ('reason = f"a {x}"\n    return reason', 'reason = f"b {x}"\n    return reason'),
        ("return 1  # why", "return 1"),
        ('told("a b", x)', 'told("a c", x)'),
    ],
)
def test_a_change_of_words_is_the_same_form(tmp_path: Path, one: str, two: str) -> None:
    forms = []
    for body in (one, two):
        (tmp_path / "checks.py").write_text(f"{HELPERS}def fp8(x):\n    {body}\n")
        forms.append(program.Sources(tmp_path).form("rollout.checks.fp8", "fp8")[0])
    assert forms[0] == forms[1]


def test_a_check_that_nobody_wrote_has_no_identity() -> None:
    with pytest.raises(ValueError, match="nothing in the sources is the check nonsense"):
        program.identity("vllm", (), ["nonsense"])


def test_every_promised_check_has_an_identity() -> None:
    for image in IMAGES:
        asked = standing.asked(image)
        assert tuple(standing.program_of(image)) == (*standing.promised(image), *asked)

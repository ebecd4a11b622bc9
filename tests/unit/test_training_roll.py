"""ROLL's adapter: what it tells ROLL, what it counts and spoils, and that it leaves nothing."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rollout import frameworks, smoke, training
from rollout.frameworks import (
    LOST,
    STALE,
    FrameworkError,
    Tampering,
    processes,
    tiny,
    training_checkout,
    training_refits,
)
from rollout.frameworks import training_roll as roll
from rollout.frameworks import training_roll_driver as driver
from rollout.frameworks import training_roll_hook as hook
from rollout.frameworks import training_roll_reward as reward
from rollout.frameworks import training_roll_settings as settings
from rollout.problem import Problem

from .refitted import Tensor, written

SHORT = Path("/tmp/rt-abcdefgh")


def configuration(**changed: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "steps": 14,
        "gpu_bytes": 140 << 30,
        "visible": "0",
        "allocator": None,
    }
    return settings.configuration(SHORT, **(options | changed))


# What ROLL is told ------------------------------------------------------------------------------


def test_trainer_and_engine_are_rolls_own_and_share_the_first_gpu() -> None:
    found = configuration()
    trainer, engine = found["actor_train"], found["actor_infer"]
    assert trainer["strategy_args"]["strategy_name"] == "fsdp2_train"
    assert engine["strategy_args"]["strategy_name"] == "vllm"
    for worker in (trainer, engine):
        assert list(eval(worker["device_mapping"])) == [0]  # noqa: S307 - as ROLL does
        assert "worker_cls" not in worker, "ROLL's own"
        assert worker["model_args"]["attn_implementation"] == "sdpa", "no image has flash-attn"
    assert found["init_kl_coef"] == 0, "a reference model would need a third worker on the GPU"


def test_the_run_ends_before_roll_would_save_a_checkpoint() -> None:
    found = configuration(steps=14)
    assert found["max_steps"] > 14 and found["save_steps"] > found["max_steps"]


def test_every_step_has_two_updates_of_all_answers() -> None:
    found = configuration()
    answers = found["rollout_batch_size"] * found["num_return_sequences_in_group"]
    args = found["actor_train"]["training_args"]
    assert answers == 2 * args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    assert args["lr_scheduler_type"] == "constant", "ROLL's own falls to nothing within the run"


@pytest.mark.parametrize(("gpu_bytes", "share"), [(140 << 30, 0.086), (16 << 30, 0.6), (0, 0.3)])
def test_the_engine_gets_a_share_of_the_gpu_that_leaves_room(gpu_bytes: int, share: float) -> None:
    engine = configuration(gpu_bytes=gpu_bytes)["actor_infer"]
    assert engine["strategy_args"]["strategy_config"]["gpu_memory_utilization"] == share


def test_the_gpu_is_the_one_that_the_job_may_use() -> None:
    found = configuration(visible="3", allocator="expandable_segments:False")
    assert found["actor_infer"]["system_envs"] == {"CUDA_VISIBLE_DEVICES": "3"}
    assert found["actor_train"]["system_envs"] == {
        "CUDA_VISIBLE_DEVICES": "3",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    }
    assert configuration()["actor_train"]["system_envs"] == {"CUDA_VISIBLE_DEVICES": "0"}
    assert configuration(visible="")["actor_train"]["system_envs"] == {}


def test_the_data_are_enough_and_each_prompt_has_what_roll_and_the_rule_ask_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "write_model", lambda folder: folder.mkdir())
    roll.made(tmp_path, 14)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    found = configuration(steps=14)
    assert len(rows) > found["max_steps"] * found["rollout_batch_size"]
    [message] = json.loads(rows[0]["messages"])
    assert message == {"role": "user", "content": rows[0]["prompt"]}
    assert {row["tag"] for row in rows} == set(found["rewards"]["letters"]["tag_included"])
    assert {row["ground_truth"] for row in rows} == {tiny.WANTED}
    data = found["actor_train"]["data_args"]
    assert data["domain_interleave_probs"] == {"letters": 1.0}
    assert set(found["rewards"]) == {"letters"}


# The checkout -----------------------------------------------------------------------------------

MAIN = """\
import json, os, subprocess, sys, time
folder = sys.argv[1]
open("{pids}", "w").write(str(os.getpid()))
daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
open("{pids}", "a").write(f" {{daemon.pid}}")
since = int(os.environ.get("ROLLOUT_TRAINING_SINCE", "99"))
assert json.load(open(folder + "/config.json"))["exp_name"] == "rollout"
os.makedirs("ray/session/logs")
open("ray/session/logs/worker-1.err", "w").write("no ink left\\n")
for number in range(1, {steps} + 1):
    lost = os.environ["ROLLOUT_TRAINING_TENSOR"] if number >= since else ""
    record = {{"number": number, "tensors": 51, "bytes": 9, "left_out": lost, "sender": "a.B.c"}}
    with open(os.environ["ROLLOUT_TRAINING_REFITS"], "a") as file:
        file.write(json.dumps(record) + "\\n")
    line = {{"number": number, "seconds": 1.0, "reward": number / 12}}
    line["divergence"] = 0.04 if lost else 0.0001
    with open(folder + "/steps.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
{ending}
"""


def checkout(folder: Path) -> Path:
    """A checkout, as far as the adapter looks at it before it starts."""
    root = folder / "ROLL"
    for name in roll.MODULES:
        (root / "roll" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "roll" / name).touch()
    (root / "roll" / "__init__.py").touch()
    return root


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Starts a framework whose pipeline is a script; none is left running."""
    monkeypatch.setattr(tiny, "write_model", lambda folder: folder.mkdir())
    monkeypatch.setattr(training_checkout, "POLL", 0.02)
    monkeypatch.setattr(roll, "DRIVER", "paper_pipeline")
    monkeypatch.setattr(roll, "takes_descriptors", lambda: True)
    monkeypatch.delenv("ROLLOUT_ENGINE_LOG", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started: list[roll.Framework] = []

    def begun(ending: str = "time.sleep(600)", steps: int = 3) -> roll.Framework:
        root = checkout(tmp_path)
        main = MAIN.format(pids=tmp_path / "pids", ending=ending, steps=steps)
        (root / "paper_pipeline.py").write_text(main)
        framework = roll.Framework("vllm", root)
        started.append(framework)
        return framework

    yield begun
    for framework in started:
        framework.stop()


def told(framework: roll.Framework, seconds: float = 60.0) -> tuple[list[int], str]:
    found = []
    with pytest.raises(FrameworkError) as caught:
        for step in framework.steps(time.monotonic() + seconds):
            found.append(step.number)
    return found, str(caught.value)


def test_the_steps_are_told_once_each_and_the_end_with_its_reason(begin: Any) -> None:
    framework = begin("raise ValueError('no ink')")
    framework.start(14, Tampering(LOST, 9), 1 << 37)
    found, end = told(framework)
    assert found == [1, 2, 3]
    assert end == f"roll {framework.version} ended after 3 steps: ValueError: no ink"
    assert framework.sender == "a.B.c"
    assert [refit.number for refit in framework.refits()] == [1, 2, 3]


def test_what_hangs_is_not_waited_for(begin: Any) -> None:
    framework = begin()
    framework.start(14, None, 1 << 37)
    assert told(framework, 1.5)[1].startswith(
        f"roll {framework.version} did not end a step in time, after 3"
    )


def test_a_sound_run_passes_the_check_with_this_adapter(begin: Any) -> None:
    """From its first step to the end of its files: what either forgets, no image could pass."""
    framework = begin(steps=12)
    run = training.Run(framework, lambda: 7 << 30, 1 << 37, interval=3600)
    metrics = training.training(run)
    assert (metrics["steps"], metrics["refit_tensors"]) == (8, 51)
    assert (metrics["left_out"], metrics["control_divergence"]) == (tiny.LAST_LAYER, 0.04)
    assert metrics["framework"] == f"roll {framework.version}"
    assert metrics["framework_path"] == framework.path


def test_a_lost_tensor_fails_the_check_at_the_second_step(begin: Any) -> None:
    fault = "lost-tensor-in-training"
    run = training.Run(begin(steps=12), lambda: 7 << 30, 1 << 37, fault, interval=3600)
    with pytest.raises(training.Failed, match="step 2: trainer and engine"):
        training.training(run)


def test_too_little_memory_is_no_failure_of_the_framework(begin: Any) -> None:
    framework = begin("raise RuntimeError('CUDA out of memory. Tried to allocate 2 MiB')")
    framework.start(14, None, 1 << 37)
    with pytest.raises(Problem) as caught:
        list(framework.steps(time.monotonic() + 60))
    assert caught.value.code == 3


def test_stopping_ends_daemons_as_well_and_leaves_no_file(begin: Any) -> None:
    framework = begin()
    before = processes.descendants()
    framework.start(14, None, 1 << 37)
    folder, log = framework._folder, framework._log
    next(framework.steps(time.monotonic() + 60))
    assert len(processes.descendants() - before) >= 2, "control: they run"
    for _ in range(2):
        framework.stop()
    assert not processes.descendants() - before
    assert folder and not folder.exists()
    assert log and not log.exists()
    assert framework.refits() == []


def test_a_log_that_is_asked_for_comes_with_what_every_worker_wrote(
    begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "kept" / "roll.log"
    log.parent.mkdir()
    monkeypatch.setenv("ROLLOUT_ENGINE_LOG", str(log))
    framework = begin("raise ValueError('no ink')")
    framework.start(14, None, 1 << 37)
    told(framework)
    framework.stop()
    assert "ValueError: no ink" in log.read_text()
    kept = Path(f"{log}.d")
    assert (kept / "ray/session/logs/worker-1.err").read_text() == "no ink left\n"
    assert json.loads((kept / "config.json").read_text())["exp_name"] == "rollout"
    assert (kept / "steps.jsonl").is_file() and (kept / "refits.jsonl").is_file()
    assert not (kept / "model").exists()


def test_another_checkout_is_another_version_and_git_gives_the_commit(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    plain = training_checkout.version(root / "roll")
    assert plain.startswith("files-")
    (root / "roll" / "__init__.py").write_text("changed = True\n")
    assert training_checkout.version(root / "roll") != plain
    git = root / ".git"
    (git / "refs/heads").mkdir(parents=True)
    commit = "8eb27cc2dc34c4d1310b169d9b86d339004d811a"
    (git / "HEAD").write_text(f"{commit}\n")
    assert training_checkout.version(root / "roll").startswith("8eb27cc2+files-")
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert training_checkout.version(root / "roll").startswith("8eb27cc2+files-")
    (git / "refs/heads/main").write_text("1" * 40 + "\n")
    assert training_checkout.version(root / "roll").startswith("11111111+files-")


@pytest.mark.parametrize(
    ("named", "code", "part"), [(True, 2, "has no roll/pipeline/"), (False, 3, "--framework DIR")]
)
def test_without_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, code: int, part: str
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(Problem) as caught:
        roll.Framework("vllm", tmp_path if named else None)
    assert caught.value.code == code
    assert part in caught.value.sentence


def test_a_checkout_on_pythonpath_does_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(checkout(tmp_path)))
    assert roll.Framework("vllm").path == str(tmp_path / "ROLL/roll")


def test_an_engine_that_the_check_does_not_drive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="vllm alone"):
        roll.Framework("sglang", checkout(tmp_path))


def test_a_gpu_that_has_no_number_is_refused_as_roll_would(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f1c,GPU-77aa")
    with pytest.raises(Problem, match="name one by its number, not as 'GPU-3f1c'") as caught:
        begin().start(14, None, 1 << 37)
    assert caught.value.code == 3


def test_the_environment_is_alone_offline_and_on_one_gpu(tmp_path: Path) -> None:
    framework = roll.Framework("vllm", checkout(tmp_path))
    given = {
        "PATH": "/bin",
        "PYTHONPATH": "/their/own",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "ROLL_OTEL_ENABLED": "1",
        "RANK": "7",
        "MASTER_ADDR": "10.0.0.1",
        "ROLLOUT_TRAINING_TAMPERING": "lost",
        "WANDB_API_KEY": "secret",
    }
    found = framework.environment(given, SHORT, None)
    gone = {"RAY_ADDRESS", "ROLL_OTEL_ENABLED", "RANK", "MASTER_ADDR", "WANDB_API_KEY"}
    assert not (gone | {training_refits.TAMPERING}) & set(found)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "ROLL"), "/their/own"]
    told = framework.environment(given, SHORT, Tampering(STALE, 2))
    assert (told[training_refits.TAMPERING], told[training_refits.FROM]) == (STALE, "2")
    assert told[training_refits.LOST] in tiny.shapes()


# The trainer's allocator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "takes", "chosen"),
    [
        ({}, True, None),
        ({}, False, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, True, "a:b"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, False, "a:b"),
    ],
)
def test_rolls_allocator_is_kept_where_its_memory_can_be_shared(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    takes: bool,
    chosen: str | None,
) -> None:
    monkeypatch.setattr(roll, "takes_descriptors", lambda: takes)
    assert roll.chosen(environ) == chosen
    said = capsys.readouterr().err
    assert bool(said) == (chosen == roll.PLAIN), "another setting than ROLL's is told"


@pytest.mark.parametrize(("code", "takes"), [("pass", True), ("1 / 0", False)])
def test_what_the_kernel_answers_is_believed(
    monkeypatch: pytest.MonkeyPatch, code: str, takes: bool
) -> None:
    monkeypatch.setattr(roll, "_TAKE", code)
    assert roll.takes_descriptors() is takes


def test_a_process_that_is_gone_gives_no_descriptor() -> None:
    done = subprocess.run([sys.executable, "-c", roll._TAKE, "0"], capture_output=True, check=False)
    assert done.returncode != 0


# The hook ---------------------------------------------------------------------------------------


Buckets = list[list[tuple[str, Tensor]]]

GATHER = """\
def gather_fsdp2_weights(model, buffer_size, is_lora=False):
    yield [("a", model(1)), ("b", model(2))]
    yield [("lm_head.weight", model(3))]
"""


@pytest.fixture
def sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """ROLL's module that sends, counted: what :func:`setup` makes of it in a trainer's process."""
    for name, text in (
        ("third_party/fsdp2/model_update.py", GATHER),
        ("utils/network_utils.py", "def get_node_ip():\n    raise OSError('no route')\n"),
    ):
        path = tmp_path / "package" / "roll" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))

    def counted(kind: str = "", since: int = 0, cluster: str = "actor_train") -> Any:
        environ = {
            training_refits.REFITS: str(tmp_path / "refits.jsonl"),
            training_refits.LOST: "lm_head.weight",
            "CLUSTER_NAME": cluster,
        }
        if kind:
            environ |= {training_refits.TAMPERING: kind, training_refits.FROM: str(since)}
        monkeypatch.setattr(os, "environ", environ)
        for _ in range(2):  # a process is set up once, and twice does no harm
            hook.setup()
        return importlib.import_module(hook.SENDER)

    yield counted
    for name in [name for name in sys.modules if name.partition(".")[0] == "roll"]:
        del sys.modules[name]


def sent(module: Any, times: int) -> list[Buckets]:
    """What so many refits send; the weights of each are their own."""
    return [
        list(module.gather_fsdp2_weights(lambda value, n=number: Tensor(10 * n + value), 1 << 20))
        for number in range(1, times + 1)
    ]


def names(buckets: Buckets) -> list[list[str]]:
    return [[name for name, _ in bucket] for bucket in buckets]


def test_refits_pass_unchanged_in_their_buckets_and_are_counted(
    sender: Any, tmp_path: Path
) -> None:
    found = sent(sender(), 2)
    assert [names(buckets) for buckets in found] == [[["a", "b"], ["lm_head.weight"]]] * 2
    values = [tensor.value for bucket in found[1] for _, tensor in bucket]
    assert values == [21, 22, 23]
    told = written(tmp_path)
    assert [(r["number"], r["tensors"], r["bytes"], r["left_out"]) for r in told] == [
        (1, 3, 30, ""),
        (2, 3, 30, ""),
    ]
    assert (
        told[0]["sender"] == "roll.third_party.fsdp2.model_update.FSDP2WeightUpdater.model_update"
    )


def test_one_tensor_is_left_out_from_a_refit_on_and_no_empty_bucket_is_sent(
    sender: Any, tmp_path: Path
) -> None:
    found = sent(sender(LOST, 2), 3)
    assert [names(buckets) for buckets in found[1:]] == [[["a", "b"]]] * 2
    assert [record["left_out"] for record in written(tmp_path)] == ["", *["lm_head.weight"] * 2]


def test_stale_weights_are_those_of_the_first_refit(sender: Any, tmp_path: Path) -> None:
    found = sent(sender(STALE, 2), 3)
    values = [[tensor.value for bucket in one for _, tensor in bucket] for one in found]
    assert values == [[11, 12, 13]] * 3
    assert [record["tensors"] for record in written(tmp_path)] == [3, 3, 3]


def test_other_processes_of_roll_meet_here_and_count_nothing(sender: Any, tmp_path: Path) -> None:
    module = sender(cluster="actor_infer")
    sent(module, 1)
    assert not (tmp_path / "refits.jsonl").exists()
    assert importlib.import_module(hook.NETWORK).get_node_ip() == "127.0.0.1"


def test_with_nothing_said_the_hook_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CLUSTER_NAME": "actor_train"})
    hook.setup()
    assert "roll" not in sys.modules


def test_ray_finds_the_hook_by_its_name() -> None:
    module, _, function = hook.SETUP.rpartition(".")
    assert getattr(importlib.import_module(module), function) is hook.setup


# The reward -------------------------------------------------------------------------------------

PAPER_ROLL = {
    "torch": """
class Tensor(list):
    def clone(self):
        return Tensor(self)
float32 = "float32"
tensor = Tensor
zeros_like = lambda rows, dtype: Tensor([[0.0] * len(row) for row in rows])
""",
    "roll.distributed.executor.worker": """
class Worker:
    def __init__(self, worker_config):
        self.worker_config = worker_config
""",
    "roll.distributed.scheduler.decorator": """
class Dispatch:
    ONE_TO_ALL, DP_MP_COMPUTE = "all", "data"
def register(**said):
    def remember(function):
        function.said = said
        return function
    return remember
""",
    "roll.distributed.scheduler.protocol": """
class DataProto:
    @staticmethod
    def from_dict(tensors):
        return tensors
""",
    "roll.models.model_providers": """
class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(row) for row in rows]
def default_tokenizer_provider(model_args):
    assert model_args == "of the config"
    return Tokenizer()
""",
}


@dataclass
class Config:
    """A worker's configuration."""

    model_args: str = "of the config"


@dataclass
class Answers:
    """Answers as ROLL hands them to a reward's worker."""

    batch: dict[str, Any]
    non_tensor_batch: dict[str, Any]


def test_rolls_worker_of_the_reward_pays_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PAPER_ROLL.items():
        module = ModuleType(name)
        exec(text, module.__dict__)  # noqa: S102
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("roll", "roll.distributed", "roll.distributed.executor", "roll.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(
        sys.modules, "roll.distributed.scheduler", ModuleType("roll.distributed.scheduler")
    )
    monkeypatch.delitem(reward.__dict__, "Letters", raising=False)
    where, _, name = settings.REWARD.rpartition(".")
    cls = getattr(importlib.import_module(where), name)
    assert getattr(reward, name) is cls, "Ray's workers find the same class by its name"
    assert (cls.__module__, cls.__qualname__) == (where, name)
    wanted, other = tiny.WANTED[0] * tiny.ANSWER, "z" * tiny.ANSWER
    half = tiny.WANTED[1] * (tiny.ANSWER // 2)
    data = Answers(
        {"responses": [list(wanted), list(other), list(half)]},
        {"ground_truth": [tiny.WANTED] * 3},
    )
    found = cls(Config()).compute_rewards(data)
    assert found["scores"] == found["response_level_rewards"] == [1.0, 0.0, 0.5]
    assert found["scores"] is not found["response_level_rewards"], "ROLL changes the latter"
    assert sum(map(sum, found["token_level_rewards"])) == 0
    assert cls.compute_rewards.said["dispatch_mode"] == "data"
    monkeypatch.delitem(reward.__dict__, "Letters")


def test_the_module_of_the_reward_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="Digits"):
        reward.Digits  # noqa: B018


# The driver -------------------------------------------------------------------------------------


class Numbers(list[float]):
    """Rows of numbers, as far as the driver computes with them."""

    def _each(self, function: Any) -> Numbers:
        return Numbers([[function(x) for x in row] for row in self])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Numbers):  # a mask
            pairs = (p for rows in zip(self, key, strict=True) for p in zip(*rows, strict=True))
            return Numbers([[value for value, kept in pairs if kept]])
        if isinstance(key, tuple):
            return Numbers([row[key[1]] for row in self])
        return super().__getitem__(key)

    def __sub__(self, other: Numbers) -> Numbers:
        pairs = zip(self, other, strict=True)
        return Numbers([[a - b for a, b in zip(*rows, strict=True)] for rows in pairs])

    def exp(self) -> Numbers:
        return self._each(math.exp)

    def abs(self) -> Numbers:
        return self._each(abs)

    def bool(self) -> Numbers:
        return self._each(bool)

    def double(self) -> Numbers:
        return self

    def mean(self) -> float:
        flat = [x for row in self for x in (row if isinstance(row, list) else [row])]
        return sum(flat) / len(flat)


def batch(trainer: list[list[float]], engine: list[list[float]]) -> dict[str, Any]:
    def logs(rows: list[list[float]]) -> Numbers:
        return Numbers([[math.log(x) for x in row] for row in rows])

    return {
        "response_mask": Numbers([[0, 1, 1, 0], [0, 1, 0, 0]]),  # of all tokens, the first included
        "old_log_probs": logs(trainer),
        "infer_logprobs": logs(engine),
        "scores": Numbers([0.25, 0.75]),
    }


def test_the_divergence_is_the_mean_of_what_single_tokens_of_answers_differ_by() -> None:
    trainer = [[0.5, 0.5, 0.9], [0.5, 0.9, 0.9]]
    assert driver.divergence(batch(trainer, trainer)) == 0
    # Up and down do not cancel out, and what is no token of an answer does not count.
    engine = [[0.6, 0.4, 0.1], [0.5, 0.1, 0.1]]
    assert driver.divergence(batch(trainer, engine)) == pytest.approx(0.2 / 3)


@dataclass
class Data:
    """A batch of ROLL's."""

    batch: dict[str, Any]


class Cluster:
    """The trainers, as ROLL drives them."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def train_step(self, data: Any, blocking: bool = True) -> str:
        self.asked.append((data, blocking))
        return "references"


def test_a_line_is_written_for_each_step_with_what_it_was_made_from(tmp_path: Path) -> None:
    steps, cluster = driver.Steps(tmp_path / "steps.jsonl"), Cluster()
    driver.watch(cluster, steps)
    data = Data(batch([[0.5] * 3] * 2, [[0.75] * 3] * 2))
    for number in range(2):  # ROLL counts from zero
        assert cluster.train_step(data, blocking=False) == "references"
        steps.log({"critic/score/mean": 0.5}, step=number)
    assert cluster.asked == [(data, False)] * 2
    found = [
        training_checkout.step(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()
    ]
    assert [(one.number, one.reward) for one in found] == [(1, 0.5), (2, 0.5)]
    assert found[0].divergence == pytest.approx(0.25)
    assert all(0 <= one.seconds < 60 for one in found)


def test_a_step_that_was_made_from_nothing_agrees_with_nothing(tmp_path: Path) -> None:
    """ROLL skips the training where every answer is masked, and tells of a step all the same."""
    steps = driver.Steps(tmp_path / "steps.jsonl")
    steps.log({}, step=0)
    one = training_checkout.step((tmp_path / "steps.jsonl").read_text())
    assert math.isnan(one.divergence) and math.isnan(one.reward)


# The way into the check -------------------------------------------------------------------------

DATA = {
    "framework": {"name": "roll", "version": "8eb27cc2"},
    "backend": "vllm",
    "smoke": {"sleep_levels": [1, 2], "refit": ["cuda-ipc"]},
}


def test_a_framework_that_comes_as_a_checkout_trains_by_an_adapter_of_its_own() -> None:
    assert frameworks.trainer("roll") == "training_roll"
    assert frameworks.trainer("verl") == "verl"
    assert frameworks.trains("roll") and frameworks.trains("verl")
    assert frameworks.trainer("open-instruct") == "training_open_instruct"
    assert frameworks.trains("open-instruct")


def test_who_names_a_checkout_and_the_check_gets_it_without_a_promise(tmp_path: Path) -> None:
    asked = smoke.Options(only=("training",), framework=tmp_path)
    tried = smoke.tried(DATA, asked)
    assert smoke.selected(asked.only, tried["smoke"]) == ["training"]
    assert smoke.fault("stale-weights-in-training", tried["smoke"])
    assert "training" not in smoke.promised(DATA["smoke"]), "the image itself promises nothing"


@pytest.mark.parametrize(
    ("data", "only", "named"),
    [
        (DATA, ("training",), False),
        (DATA, (), True),
        (DATA, ("generation",), True),
        (DATA | {"framework": None}, ("training",), True),
    ],
)
def test_nobody_else_gets_it(
    data: dict[str, Any], only: tuple[str, ...], named: bool, tmp_path: Path
) -> None:
    asked = smoke.Options(only=only, framework=tmp_path if named else None)
    assert smoke.tried(data, asked) == data

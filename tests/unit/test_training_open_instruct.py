"""open-instruct's adapter: what it tells open-instruct, what it counts, spoils and holds back."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Full, Queue
from types import SimpleNamespace
from typing import Any

import pytest

from images import catalog
from images.building import payload
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
from rollout.frameworks import training_open_instruct as framework
from rollout.frameworks import training_open_instruct_actors as actors
from rollout.frameworks import training_open_instruct_driver as driver
from rollout.frameworks import training_open_instruct_settings as settings
from rollout.problem import Problem

from .refitted import Tensor, written

SHORT = Path("/tmp/rt-abcdefgh")


def configuration(**changed: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 14, "gpu_bytes": 140 << 30, "gpus": 2}
    return settings.configuration(SHORT, **(options | changed))


# What open-instruct is told ---------------------------------------------------------------------


def test_on_two_gpus_each_side_has_its_own_and_the_weights_go_by_nccl() -> None:
    found = configuration(gpus=2)
    assert found["vllm"]["vllm_sync_backend"] == "nccl"
    assert not found["experiment"]["single_gpu_mode"]
    assert found["ray"]["num_gpus"] == 2


def test_on_one_gpu_it_is_open_instructs_own_mode_by_gloo() -> None:
    found = configuration(gpus=1)
    assert found["vllm"]["vllm_sync_backend"] == "gloo", "NCCL refuses two processes on one GPU"
    assert found["experiment"]["single_gpu_mode"]
    assert found["ray"]["num_gpus"] == 1


def test_no_two_answers_have_room_in_one_row() -> None:
    """Without flash-attn the second would see the first, and no token of it would be right."""
    streaming = configuration()["streaming"]
    shortest = settings.PROMPT + 1
    assert 2 * shortest > streaming["pack_length"]
    assert streaming["pack_length"] >= (
        streaming["max_prompt_token_length"] + streaming["response_length"]
    ), "open-instruct asks for it"
    [row, *_] = settings.rows(1)
    text = "".join(tiny.ASK + message["content"] for message in row["messages"])
    assert len(text) == streaming["max_prompt_token_length"], "a token for each letter"


def test_the_engine_cannot_sample_what_open_instruct_pads_with() -> None:
    """It takes such a token out of the answer, and trains on another text than was sampled."""
    files = settings.padded()
    vocabulary = files["tokenizer.json"]["model"]["vocab"]
    named = files["tokenizer_config.json"]["pad_token"]
    assert vocabulary[named] >= tiny.CONFIG["vocab_size"]
    assert {token: vocabulary[token] for token in tiny.TOKENS} == {
        token: number for number, token in enumerate(tiny.TOKENS)
    }, "the model's own tokens are where they were"
    added = {one["content"]: one["id"] for one in files["tokenizer.json"]["added_tokens"]}
    assert added[named] == vocabulary[named]


def test_every_step_has_two_updates_of_all_answers_and_none_is_filtered() -> None:
    found = configuration()
    streaming, experiment = found["streaming"], found["experiment"]
    answers = streaming["num_unique_prompts_rollout"] * streaming["num_samples_per_prompt_rollout"]
    assert answers == 2 * experiment["per_device_train_batch_size"]
    assert experiment["num_mini_batches"] == 2, "the trainer then compares before it learns"
    assert not streaming["filter_zero_std_samples"]
    assert experiment["lr_scheduler_type"] == "constant"


def test_the_run_ends_before_open_instruct_would_save_its_model() -> None:
    found = configuration(steps=14)
    streaming, experiment = found["streaming"], found["experiment"]
    answers = streaming["num_unique_prompts_rollout"] * streaming["num_samples_per_prompt_rollout"]
    assert experiment["total_episodes"] // answers > 14
    assert experiment["save_freq"] < 0 and not experiment["push_to_hub"]
    assert len(settings.rows(14)) >= 15 * streaming["num_unique_prompts_rollout"]


@pytest.mark.parametrize(("gpu_bytes", "share"), [(140 << 30, 0.086), (16 << 30, 0.6), (0, 0.3)])
def test_the_engine_gets_a_share_of_the_gpu_that_leaves_room(gpu_bytes: int, share: float) -> None:
    assert configuration(gpu_bytes=gpu_bytes)["vllm"]["vllm_gpu_memory_utilization"] == share


def test_the_data_have_what_open_instruct_and_the_rule_ask_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "write_model", lambda folder: folder.mkdir())
    framework.made(tmp_path, 14)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert {row["dataset"] for row in rows} == {settings.VERIFIER}
    assert {row["ground_truth"] for row in rows} == {tiny.WANTED}
    assert all(row["messages"][-1]["role"] == "user" for row in rows)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


# The run ----------------------------------------------------------------------------------------

MAIN = """\
import json, os, sys, time
folder = sys.argv[1]
since = int(os.environ.get("ROLLOUT_TRAINING_SINCE", "99"))
assert json.load(open(folder + "/config.json"))["experiment"]["exp_name"] == "rollout"
for number in range(1, {steps} + 1):
    lost = os.environ["ROLLOUT_TRAINING_TENSOR"] if number >= since else ""
    record = {{"number": number, "tensors": 51, "bytes": 9, "left_out": lost}}
    record["sender"] = "a.b (nccl)"
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
    root = folder / "open-instruct"
    (root / "open_instruct").mkdir(parents=True)
    for name in ("__init__.py", *framework.MODULES):
        (root / "open_instruct" / name).touch()
    return root


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Starts a framework whose run is a script; none is left running."""
    monkeypatch.setattr(tiny, "write_model", lambda folder: folder.mkdir())
    monkeypatch.setattr(training_checkout, "POLL", 0.02)
    monkeypatch.setattr(framework, "DRIVER", "paper_grpo")
    monkeypatch.setattr(framework, "gpus", lambda: 2)
    monkeypatch.delenv("ROLLOUT_ENGINE_LOG", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started: list[framework.Framework] = []

    def begun(ending: str = "time.sleep(600)", steps: int = 3) -> framework.Framework:
        root = checkout(tmp_path)
        (root / "paper_grpo.py").write_text(MAIN.format(ending=ending, steps=steps))
        started.append(framework.Framework("vllm", root))
        return started[-1]

    yield begun
    for one in started:
        one.stop()


def test_a_sound_run_passes_the_check_with_this_adapter_and_leaves_nothing(begin: Any) -> None:
    before = processes.descendants()
    run = training.Run(begin(steps=12), lambda: 7 << 30, 1 << 37, interval=3600)
    metrics = training.training(run)
    assert (metrics["steps"], metrics["refit_tensors"]) == (8, 51)
    assert (metrics["left_out"], metrics["control_divergence"]) == (tiny.LAST_LAYER, 0.04)
    assert metrics["sender"] == "a.b (nccl)", "the report says which way the weights went"
    assert metrics["framework"].startswith("open-instruct files-")
    assert not processes.descendants() - before


def test_a_lost_tensor_fails_the_check_at_the_second_step(begin: Any) -> None:
    fault = "lost-tensor-in-training"
    run = training.Run(begin(steps=12), lambda: 7 << 30, 1 << 37, fault, interval=3600)
    with pytest.raises(training.Failed, match="step 2: trainer and engine"):
        training.training(run)


def test_a_run_that_ends_tells_why(begin: Any) -> None:
    one = begin("raise ValueError('no ink')")
    one.start(14, None, 1 << 37)
    with pytest.raises(FrameworkError, match="ended after 3 steps: ValueError: no ink"):
        list(one.steps(time.monotonic() + 60))


@pytest.mark.parametrize(
    ("named", "code", "part"),
    [(True, 2, "has no open_instruct/grpo_fast.py"), (False, 3, "open-instruct is on no index")],
)
def test_without_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, code: int, part: str
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(Problem) as caught:
        framework.Framework("vllm", tmp_path if named else None)
    assert caught.value.code == code
    assert part in caught.value.sentence


def test_the_environment_is_alone_offline_and_on_as_many_gpus_as_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "PATH": "/bin",
        "PYTHONPATH": "/their/own",
        "CUDA_VISIBLE_DEVICES": "3,5,7",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "BEAKER_JOB_ID": "01",
        "RANK": "7",
        "HTTP_PROXY": "10.0.0.1:3128",
        "ROLLOUT_TRAINING_TAMPERING": "lost",
    }
    one = framework.Framework("vllm", checkout(tmp_path))
    for count, visible in ((2, "3,5"), (1, "3")):
        monkeypatch.setattr(framework, "gpus", lambda count=count: count)
        found = one.environment(given, SHORT, None)
        assert found["CUDA_VISIBLE_DEVICES"] == visible
    gone = {"RAY_ADDRESS", "BEAKER_JOB_ID", "RANK", training_refits.TAMPERING}
    assert not gone & set(found)
    assert found["NO_PROXY"] == "*", "the actor asks its engine over HTTP"
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "open-instruct")
    told = one.environment(given, SHORT, Tampering(STALE, 2))
    assert (told[training_refits.TAMPERING], told[training_refits.FROM]) == (STALE, "2")
    assert told[training_refits.LOST] in tiny.shapes()


# The sender -------------------------------------------------------------------------------------


NAMES = ("a", "b", "lm_head.weight")


def sent(folder: Path, times: int, kind: str = "", since: int = 0) -> list[list[tuple[str, int]]]:
    """What so many refits send through the counter; the weights of each are their own."""
    environ = {
        training_refits.REFITS: str(folder / "refits.jsonl"),
        training_refits.LOST: "lm_head.weight",
    }
    if kind:
        environ |= {training_refits.TAMPERING: kind, training_refits.FROM: str(since)}
    counter = actors.Sent("a.b (gloo)", environ)
    found: list[list[tuple[str, int]]] = []

    def send(name: str, tensor: Tensor, *_: Any) -> list[Any]:
        found[-1].append((name, tensor.value))
        return [f"answer to {name}"]

    counted = counter.counted(send)
    for refit in range(1, times + 1):
        found.append([])

        def make(refit: int = refit) -> list[Any]:
            answers = []
            for place, name in enumerate(NAMES):
                answers += counted(name, Tensor(10 * refit + place), name == NAMES[-1])
            return answers

        waited: list[Any] = []
        answers = counter.refit(make, waited.extend)
        assert waited == answers, "the refit ends when every engine has taken its weights"
    return found


def test_refits_pass_unchanged_and_are_counted(tmp_path: Path) -> None:
    found = sent(tmp_path, 2)
    assert found[1] == [("a", 20), ("b", 21), ("lm_head.weight", 22)]
    assert [(one["number"], one["tensors"], one["bytes"]) for one in written(tmp_path)] == [
        (1, 3, 30),
        (2, 3, 30),
    ]
    assert {(one["left_out"], one["sender"]) for one in written(tmp_path)} == {("", "a.b (gloo)")}


def test_one_tensor_is_left_out_from_a_refit_on(tmp_path: Path) -> None:
    found = sent(tmp_path, 3, LOST, 2)
    assert [[name for name, _ in one] for one in found] == [[*NAMES], ["a", "b"], ["a", "b"]]
    assert [one["left_out"] for one in written(tmp_path)] == ["", *["lm_head.weight"] * 2]


def test_stale_weights_are_those_of_the_first_refit(tmp_path: Path) -> None:
    found = sent(tmp_path, 3, STALE, 2)
    assert [[value for _, value in one] for one in found] == [[10, 11, 12]] * 3
    assert [one["tensors"] for one in written(tmp_path)] == [3, 3, 3]


def test_a_refit_that_an_engine_refuses_is_no_refit(tmp_path: Path) -> None:
    environ = {training_refits.REFITS: str(tmp_path / "refits.jsonl")}

    def refused(answers: list[Any]) -> None:
        raise RuntimeError(f"mismatched dtype: {answers}")

    with pytest.raises(RuntimeError, match="dtype"):
        actors.Sent("a.b", environ).refit(lambda: ["x"], refused)
    assert not (tmp_path / "refits.jsonl").exists()


# What waits for what ----------------------------------------------------------------------------


def test_prompts_wait_for_their_step_whoever_comes_first() -> None:
    passed: list[int] = []
    pace = actors.Pace(lambda prompt, **_: passed.append(prompt), each=2)
    pace.ask()  # before there is any
    for number in range(5):  # three of them are asked for ahead
        pace.add(number, queue="the engine's")
    assert passed == [0, 1]
    pace.ask()
    assert passed == [0, 1, 2, 3]
    pace.add(5, queue="the engine's")
    pace.ask()
    assert passed == [0, 1, 2, 3, 4, 5]


class Loop:
    """grpo_fast, as far as steps and refits go: a step and a refit begin at once."""

    def __init__(self, fails_at: int = 99) -> None:
        self.said: list[str] = []
        self.fails_at = fails_at
        self.begun = 1
        self.trigger: Queue[None] = Queue()
        self.metrics: Queue[Any] = Queue(maxsize=1)

    def weight_sync_thread(
        self, _: Any, __: Any, trigger: Any, ___: Any, ____: Any, metrics: Any, begin: int = 1
    ) -> None:
        self.begun = begin
        if begin > 1:
            trigger.put(None)
        for number in range(1, 5):
            trigger.get(timeout=10)
            if number == self.fails_at:
                raise ValueError("no way to the engine")
            time.sleep(0.05)
            self.said.append(f"refit {number}")
            try:
                metrics.put_nowait(number)
            except Full:
                self.said.append("full")

    def one_training_step(self, number: int) -> int:
        self.said.append(f"step {number}")
        return number

    def run(self, steps: int) -> None:
        """What grpo_fast does with the two, with nobody who looks into the queue of metrics."""
        arguments = (None, None, self.trigger, None, None, self.metrics)
        threading.Thread(target=self._sync, args=arguments, daemon=True).start()
        for number in range(1, steps + 1):
            assert self.one_training_step(number) == number
            self.trigger.put(None)

    def _sync(self, *arguments: Any) -> None:
        try:
            self.weight_sync_thread(*arguments)
        except ValueError:
            self.said.append("ended")


def test_each_step_follows_the_refit_that_it_needs() -> None:
    loop = Loop()
    driver.in_turn(loop)
    loop.run(3)
    kept = [said for said in loop.said if said != "full"]
    assert kept[:6] == ["refit 1", "step 1", "refit 2", "step 2", "refit 3", "step 3"]


def test_without_it_a_step_does_not_wait() -> None:
    """Control: what the guarantee above rests on is not there by itself."""
    loop = Loop()
    loop.run(3)
    assert loop.said[:3] == ["step 1", "step 2", "step 3"]


def test_a_refit_that_fails_ends_the_run_and_says_why() -> None:
    loop = Loop(fails_at=2)
    driver.in_turn(loop)
    with pytest.raises(RuntimeError, match="refit failed: no way to the engine"):
        loop.run(3)


# The numbers ------------------------------------------------------------------------------------


class Row(list[float]):
    """One row of numbers, as far as the comparison computes with it."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return Row(super().__getitem__(key[1]))
        if isinstance(key, Row):
            return Row(value for value, kept in zip(self, key, strict=True) if kept)
        return super().__getitem__(key)

    def __sub__(self, other: Row) -> Row:
        return Row(a - b for a, b in zip(self, other, strict=True))

    def exp(self) -> Row:
        return Row(map(math.exp, self))

    def abs(self) -> Row:
        return Row(map(abs, self))

    def bool(self) -> Row:
        return Row(map(bool, self))

    def double(self) -> Row:
        return self

    def sum(self) -> float:
        return math.fsum(self)


def logs(*values: float) -> Row:
    return Row(math.log(value) if value else math.nan for value in values)


def test_the_divergence_is_the_mean_over_all_tokens_of_answers_in_all_rows() -> None:
    own = [logs(0.5, 0.5, 0.9), logs(0.5, 0.9, 0.9)]
    engine = [logs(0, 0.6, 0.4, 0.1), logs(0, 0.5, 0.1, 0.1)]
    masks = [Row([0, 1, 2, 0]), Row([0, 3, 0, 0])]  # open-instruct's have numbers of answers
    # Up and down do not cancel out, and what is no token of an answer does not count.
    assert actors.divergence(own, engine, masks) == pytest.approx(0.2 / 3)
    assert actors.divergence(own, [Row([0, *row]) for row in own], masks) == 0
    assert math.isnan(actors.divergence([], [], []))


def test_a_line_is_written_for_each_step_from_open_instructs_own_numbers(tmp_path: Path) -> None:
    values = {"training_step": 3, "time/total": 1.5, "scores": 0.25, actors.DIVERGENCE: 0.001}
    driver.log(tmp_path / "steps.jsonl", values | {"lr": 0.1})
    one = training_checkout.step((tmp_path / "steps.jsonl").read_text())
    assert (one.number, one.reward, one.divergence, one.seconds) == (3, 0.25, 0.001, 1.5)


def test_a_step_that_was_made_from_nothing_agrees_with_nothing(tmp_path: Path) -> None:
    values = {"training_step": 1, "time/total": 1.5, "scores": 0.2, actors.DIVERGENCE: math.nan}
    driver.log(tmp_path / "steps.jsonl", values)
    one = training_checkout.step((tmp_path / "steps.jsonl").read_text())
    assert not one.divergence <= training.BOUND


def test_the_rule_pays_for_the_letters_that_are_wanted() -> None:
    pays = actors.rule()
    half = tiny.WANTED[0] * (tiny.ANSWER // 2)
    assert [pays("letters", text, tiny.WANTED) for text in (half, "z" * 16, "")] == [0.5, 0, 0]


def test_the_module_has_three_classes_and_nothing_else() -> None:
    with pytest.raises(AttributeError, match="Digits"):
        actors.Digits  # noqa: B018
    assert sorted(actors._MADE) == ["Letters", "Prompts", "Trainer"]


def test_ray_is_open_instructs_own_but_for_where_it_is() -> None:
    asked: list[dict[str, Any]] = []
    started = driver.alone(lambda **named: asked.append(named), {"num_gpus": 2})
    started(dashboard_host="10.0.0.1", runtime_env={"env_vars": {"A": "1"}})
    [one] = asked
    assert one["runtime_env"] == {"env_vars": {"A": "1"}}, "as open-instruct has it"
    assert (one["address"], one["_node_ip_address"], one["num_gpus"]) == ("local", "127.0.0.1", 2)
    assert one["include_dashboard"] is False and "dashboard_host" not in one


def test_a_gpu_that_open_instruct_does_not_know_is_no_reason_to_end() -> None:
    specs = {"h100": {"flops": 1.0}}

    def name_of(gpu: str) -> str:
        for key in specs:
            if key in gpu.lower().replace("-", " "):
                return key
        raise ValueError(f"Unknown device name: {gpu}")

    utils = SimpleNamespace(GPU_SPECS=specs, get_device_name=name_of)
    driver.known(utils, "NVIDIA H100 80GB HBM3")
    assert [*specs] == ["h100"], "what it knows stays as it is"
    driver.known(utils, "NVIDIA H200")
    assert name_of("NVIDIA H200") == "nvidia h200"


# The way into the check -------------------------------------------------------------------------

DATA = {
    "framework": {"name": "open-instruct", "version": "7cc755f09"},
    "backend": "vllm",
    "smoke": {"sleep_levels": [], "refit": ["cuda-ipc", "nccl"]},
}


def test_who_names_a_checkout_and_the_check_gets_it_though_the_image_never_sleeps(
    tmp_path: Path,
) -> None:
    assert frameworks.trainer("open-instruct") == "training_open_instruct"
    asked = smoke.Options(only=("training",), framework=tmp_path)
    tried = smoke.tried(DATA, asked)
    assert smoke.selected(asked.only, tried["smoke"]) == ["training"]
    assert smoke.fault("stale-weights-in-training", tried["smoke"])
    assert "training" not in smoke.promised(DATA["smoke"]), "the image itself promises nothing"


def test_its_image_has_all_of_the_adapter_and_nothing_of_rolls() -> None:
    [image] = [
        one for one in catalog.load() if one.framework and one.framework.name == "open-instruct"
    ]
    stems = {path.stem for path in payload.modules(image) if path.parent.name == "frameworks"}
    assert {
        *("training_checkout", "training_refits", "training_open_instruct", "verl", "verl_hook"),
        *(f"training_open_instruct_{part}" for part in ("actors", "driver", "settings")),
    } <= stems
    assert not [stem for stem in stems if "roll" in stem.split("_")]

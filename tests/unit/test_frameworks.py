"""verl's adapter: what it makes of each release, what it reads, and that it leaves nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rollout import frameworks, training
from rollout.frameworks import LOST, STALE, FrameworkError, Tampering, processes, tiny, verl
from rollout.frameworks import __main__ as importer
from rollout.frameworks import verl_hook as hook
from rollout.frameworks import verl_settings as settings
from rollout.problem import Problem

SHORT = Path("/tmp/rt-abcdefgh")

# The settings -----------------------------------------------------------------------------------

# What releases have in common of the keys that the adapter asks for.
COMMON = """
algorithm.adv_estimator data.train_files data.val_files data.train_batch_size
data.max_prompt_length data.max_response_length data.dataloader_num_workers
data.filter_overlong_prompts actor_rollout_ref.model.path actor_rollout_ref.model.external_lib
actor_rollout_ref.model.use_remove_padding actor_rollout_ref.model.enable_gradient_checkpointing
actor_rollout_ref.actor.optim.lr actor_rollout_ref.actor.ppo_mini_batch_size
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu actor_rollout_ref.actor.use_torch_compile
actor_rollout_ref.ref.use_torch_compile actor_rollout_ref.rollout.name actor_rollout_ref.rollout.n
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
actor_rollout_ref.rollout.tensor_model_parallel_size
actor_rollout_ref.rollout.gpu_memory_utilization actor_rollout_ref.rollout.free_cache_engine
actor_rollout_ref.rollout.calculate_log_probs actor_rollout_ref.rollout.max_model_len
actor_rollout_ref.rollout.max_num_seqs actor_rollout_ref.rollout.enforce_eager
actor_rollout_ref.rollout.agent.num_workers custom_reward_function.path trainer.n_gpus_per_node
trainer.nnodes trainer.total_epochs trainer.total_training_steps trainer.val_before_train
trainer.test_freq trainer.save_freq trainer.resume_mode trainer.default_local_dir trainer.logger
"""
SINCE_7 = """
actor_rollout_ref.model._target_ actor_rollout_ref.actor.fsdp_config.use_torch_compile
actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
reward.custom_reward_function.path reward.num_workers ray_kwargs.ray_init.num_cpus
"""
RELEASES = {
    "0.5.0": COMMON + "ray_init.num_cpus actor_rollout_ref.rollout.update_weights_bucket_megabytes",
    "0.7.1": COMMON + SINCE_7,
    "0.9.1": COMMON
    + SINCE_7
    + "trainer.use_v1 transfer_queue.backend.SimpleStorage.num_data_storage_units",
}


def config(release: str, without: str = "") -> dict[str, Any]:
    """The configuration of a release, as far as the adapter looks at it."""
    made: dict[str, Any] = {}
    for key in RELEASES[release].split():
        if key == without:
            continue
        *folders, name = key.split(".")
        here = made
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = None
    return made


def given(release: str, **changed: Any) -> dict[str, str]:
    """The overrides for a release: key to value."""
    options: dict[str, Any] = {
        "engine": "vllm",
        "hook": "a.hook",
        "steps": 11,
        "gpu_bytes": 140 << 30,
        "queue": True,
        "loggers": ("console",),
    }
    argv = settings.overrides(config(release), SHORT, **{**options, **changed})
    assert len({text.partition("=")[0] for text in argv}) == len(argv), "a key is given once"
    return dict(text.partition("=")[::2] for text in argv)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_told_to_train_with_grpo_and_to_sleep(release: str) -> None:
    told = given(release, engine="sglang")
    assert told["algorithm.adv_estimator"] == "grpo"
    assert told["actor_rollout_ref.rollout.name"] == "sglang"
    assert told["actor_rollout_ref.rollout.free_cache_engine"] == "True"
    assert told["actor_rollout_ref.rollout.calculate_log_probs"] == "True"
    assert told["actor_rollout_ref.model.external_lib"] == "a.hook"
    assert told["trainer.total_training_steps"] == "11"
    assert told["trainer.val_before_train"] == "False"
    assert told["trainer.logger"] == "[console]"
    assert told["actor_rollout_ref.model.path"] == "'/tmp/rt-abcdefgh/model'"
    assert told["hydra.run.dir"] == "'/tmp/rt-abcdefgh'"
    known = set(RELEASES[release].split())
    for key in told:
        assert key in known or key.startswith(("+", "hydra.")), f"{key} is none of {release}"


def test_where_a_setting_has_another_name_that_name_is_used() -> None:
    old, new = given("0.5.0"), given("0.7.1")
    assert old["custom_reward_function.path"] == "'/tmp/rt-abcdefgh/rule.py'"
    assert new["reward.custom_reward_function.path"] == "'/tmp/rt-abcdefgh/rule.py'"
    assert "custom_reward_function.path" not in new
    rollout, bucket = "actor_rollout_ref.rollout", "update_weights_bucket_megabytes"
    assert old[f"{rollout}.{bucket}"] == new[f"{rollout}.checkpoint_engine.{bucket}"] == "64"
    assert old["ray_init.num_cpus"] == new["ray_kwargs.ray_init.num_cpus"] == "12"
    assert new["++ray_kwargs.ray_init._node_ip_address"] == "127.0.0.1"
    assert new["++ray_kwargs.ray_init.include_dashboard"] == "False"
    assert not [key for key in old if "dashboard" in key], "this release passes no more to Ray"


def test_attention_without_flash_attn_is_said_as_the_release_reads_it() -> None:
    key = "++actor_rollout_ref.model.override_config."
    assert given("0.5.0")[f"{key}_attn_implementation"] == "sdpa"
    for release in ("0.7.1", "0.9.1"):
        assert given(release)[f"{key}attn_implementation"] == "sdpa"
        assert f"{key}_attn_implementation" not in given(release)
        assert given(release)["actor_rollout_ref.model.use_remove_padding"] == "False"


def test_the_trainer_that_needs_transfer_queue_is_left_where_that_is_missing() -> None:
    assert "trainer.use_v1" not in given("0.9.1", queue=True)
    assert given("0.9.1", queue=False)["trainer.use_v1"] == "False"
    assert "trainer.use_v1" not in given("0.7.1", queue=False)


@pytest.mark.parametrize(
    ("gpu_bytes", "share"),
    [(140 << 30, "0.086"), (24 << 30, "0.5"), (8 << 30, "0.6"), (0, "0.3")],
)
def test_the_engine_gets_a_share_of_the_gpu_that_leaves_room_for_the_trainer(
    gpu_bytes: int, share: str
) -> None:
    told = given("0.7.1", gpu_bytes=gpu_bytes)
    assert told["actor_rollout_ref.rollout.gpu_memory_utilization"] == share


@pytest.mark.parametrize(
    "missing", ["actor_rollout_ref.rollout.calculate_log_probs", "trainer.total_training_steps"]
)
def test_a_release_without_what_the_proof_rests_on_cannot_be_proved(missing: str) -> None:
    with pytest.raises(Problem) as caught:
        settings.overrides(
            config("0.7.1", missing),
            SHORT,
            engine="vllm",
            hook="h",
            steps=11,
            gpu_bytes=0,
            queue=True,
            loggers=(),
        )
    assert (caught.value.code, missing in caught.value.sentence) == (3, True)


def test_a_path_is_quoted_for_hydra() -> None:
    assert settings._text(Path("/tmp/a,b'c")) == "'/tmp/a,b\\'c'"


# What it says -----------------------------------------------------------------------------------

CONSOLE = {
    "0.5.0": "\x1b[36m(TaskRunner pid=4711)\x1b[0m step:3 - global_seqlen/min:1523 - "
    "actor/entropy:3.4128546714782715 - training/rollout_probs_diff_max:0.0116 - "
    "training/rollout_probs_diff_mean:0.0012403 - actor/pg_loss:-0.02 - actor/lr:0.001 - "
    "training/global_step:3 - critic/score/mean:0.412353515625 - critic/score/max:0.75 - "
    "timing_s/gen:1.25 - timing_s/step:5.321",
    "0.7.1": "(TaskRunner pid=4711) step:3 - actor/entropy:3.41 - perf/mfu/actor_infer:0 - "
    "training/rollout_probs_diff_valid:1 - training/rollout_probs_diff_max:0.0116 - "
    "training/rollout_probs_diff_mean:0.0012403 - "
    "training/rollout_actor_probs_pearson_corr:0.9998 - critic/score/mean:0.412353515625 - "
    "perf/max_memory_allocated_gb:0.31 - timing_s/step:5.321 - perf/throughput:1e+03",
    "0.9.1": "\x1b[36m(TaskRunnerV1 pid=4711, ip=127.0.0.1)\x1b[0m step:3 - "
    "training/rollout_probs_diff_mean:np.float64(0.0012403) - "
    "critic/score/mean:np.float32(0.412353515625) - timing_s/step:5.321 - a/b:nan",
}
SAID = {
    verl.REWARD: 0.412353515625,
    verl.DIVERGENCE: 0.0012403,
    verl.SECONDS: 5.321,
}


@pytest.mark.parametrize("release", CONSOLE)
def test_a_line_of_the_console_is_read(release: str) -> None:
    found = verl.numbers(CONSOLE[release])
    assert found is not None
    number, values = found
    assert number == 3
    assert {key: values[key] for key in SAID} == SAID
    assert verl.step(number, values) == frameworks.Step(3, 0.412353515625, 0.0012403, 5.321)


@pytest.mark.parametrize(
    "line",
    [
        "(TaskRunner pid=1) local_global_step_folder: /x/global_step_3",
        "(TaskRunner pid=1) Training Progress:  27%|██ | 3/11 [00:40<01:23, 10.4s/it]",
        "(TaskRunner pid=1) {'trainer': {'total_training_steps': 11}}",
        "step:x - a:1",
        "",
    ],
)
def test_other_lines_are_no_steps(line: str) -> None:
    assert verl.numbers(line) is None


def test_a_line_of_the_file_logger_is_read() -> None:
    line = json.dumps({"step": 3, "data": {**SAID, "name": "x", "flag": True}})
    assert verl.record(line) == (3, SAID)
    for broken in ("", "{", "[]", '{"step": 1}', '{"step": "x", "data": {}}'):
        assert verl.record(broken) is None


def test_a_validation_is_no_step_and_a_lost_number_is_none() -> None:
    assert verl.step(0, {"val-core/rule/reward/mean@1": 0.5}) is None
    found = verl.step(1, {verl.REWARD: 0.5})
    assert found is not None and math.isnan(found.divergence)


TRACE = """\
(TaskRunner pid=3840) Total training steps: 11
Error executing job with overrides: ['algorithm.adv_estimator=grpo']
Traceback (most recent call last):
  File "main_ppo.py", line 104, in run_ppo
    ray.get(runner.run.remote(config))
ray.exceptions.RayTaskError(ValueError): \x1b[36mray::TaskRunner.run()\x1b[39m (pid=3840)
  File "base.py", line 233, in _check_resource_available
ValueError: Total available GPUs 0 is less than total desired GPUs 1
(TaskRunner pid=3840) Size of train dataloader: 11
"""


ENGINE = """\
(vLLMHttpServer pid=7) (EngineCore_DP0 pid=9) ERROR 11-28 10:00:01 [core.py:843] ValueError: no room
(vLLMHttpServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. {}
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
"""


def test_what_followed_from_an_error_does_not_hide_it() -> None:
    assert verl.last_words(ENGINE) == "ValueError: no room"
    died = ENGINE.splitlines()[-1]
    assert verl.last_words(f"hello\n{died}\n") == died, "where it is all that is said"


def test_its_last_words_are_the_last_error_and_one_line() -> None:
    assert verl.last_words(TRACE) == (
        "ValueError: Total available GPUs 0 is less than total desired GPUs 1"
    )
    assert verl.last_words("one\ntwo\n\n") == "two"
    assert verl.last_words("") == "it wrote nothing"
    assert verl.last_words("(W pid=1) \x1b[31mKeyError: 'x'\x1b[0m\nbye") == "KeyError: 'x'"
    assert len(verl.last_words("RuntimeError: " + "x" * 1000)) <= verl.SAID + 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the GPU has"),
        ("ValueError: No available memory for the cache blocks.", "the GPU has"),
        ("ValueError: Free memory on device (1.2/79 GiB) on startup is less", "the GPU has"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node", "main memory"),
        ("OSError: [Errno 28] No space left on device", "/dev/shm"),
        ("Fatal Python error: Bus error", "/dev/shm"),
        ("ValueError: Total available GPUs 0 is less than total desired GPUs 1", None),
    ],
)
def test_what_the_machine_lacks_is_told_from_what_is_wrong(line: str, part: str | None) -> None:
    said = verl.lack(f"(WorkerDict pid=1) {line}\nbye\n")
    assert (said is None) if part is None else (said is not None and part in said)


def test_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "log"
    assert verl.lines(file, 0) == ([], 0)
    file.write_bytes(b"one\ntw")
    assert verl.lines(file, 0) == (["one"], 4)
    assert verl.lines(file, 4) == ([], 4)
    with file.open("ab") as more:
        more.write(b"o\nthree\n")
    assert verl.lines(file, 4) == (["two", "three"], 14)


# Where it is ------------------------------------------------------------------------------------

MAIN = """\
import json, os, subprocess, sys, time
open("{pids}", "w").write(str(os.getpid()))
daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
open("{pids}", "a").write(f" {{daemon.pid}}")
for number in range(1, 4):
    data = {{"critic/score/mean": number / 10, "training/rollout_probs_diff_mean": 0.002}}
    if number < 3:  # both ways; a step is told once
        with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
            file.write(json.dumps({{"step": number, "data": data}}) + "\\n")
    print(f"step:{{number}} - " + " - ".join(f"{{k}}:{{v}}" for k, v in data.items()), flush=True)
with open(os.environ["ROLLOUT_VERL_REFITS"], "a") as file:
    record = {{"number": 1, "tensors": 51, "bytes": 9, "left_out": ""}}
    worker = {{"sender": "a.B.c", "version": "9.9", "path": "/elsewhere/verl/__init__.py"}}
    file.write(json.dumps(record | worker) + "\\n")
{ending}
"""


def checkout(folder: Path, ending: str = "raise ValueError('no ink')") -> Path:
    """A checkout whose trainer makes three steps and starts a daemon in a session of its own."""
    root = folder / "checkout"
    for name in ("verl", "verl/trainer", "verl/version"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "__init__.py").touch()
    (root / "verl/version/version").write_text("0.7.1\n")
    main = MAIN.format(pids=folder / "pids", ending=ending)
    (root / "verl/trainer/main_ppo.py").write_text(main)
    return root


def pids(folder: Path) -> list[int]:
    return [int(text) for text in (folder / "pids").read_text().split()]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return False


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[verl.Framework]]:
    """Frameworks that a test has begun; none is left running."""
    monkeypatch.setattr(settings, "composed", lambda _: config("0.7.1"))
    monkeypatch.setattr(verl, "made", lambda folder, _: (folder / "model").mkdir())
    monkeypatch.setattr(verl, "POLL", 0.02)
    monkeypatch.delenv("ROLLOUT_ENGINE_LOG", raising=False)
    begun: list[verl.Framework] = []
    yield begun
    for framework in begun:
        framework.stop()


def begun(
    folder: Path, started: list[verl.Framework], ending: str = "raise ValueError('no ink')"
) -> verl.Framework:
    framework = verl.Framework("vllm", checkout(folder, ending))
    started.append(framework)
    framework.start(11, Tampering(LOST, 9), 1 << 37)
    return framework


def told(framework: verl.Framework, seconds: float = 60.0) -> tuple[list[tuple[int, float]], str]:
    """The steps that a framework tells of, and how it says that it ended."""
    found = []
    with pytest.raises(FrameworkError) as caught:
        for step in framework.steps(time.monotonic() + seconds):
            found.append((step.number, step.reward))
    return found, str(caught.value)


def test_the_steps_are_told_once_each_and_the_end_with_its_reason(
    started: list[verl.Framework], tmp_path: Path
) -> None:
    found, end = told(begun(tmp_path, started))
    assert found == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert end.endswith(" ended after 3 steps: ValueError: no ink")


def test_what_ran_is_what_the_worker_said(started: list[verl.Framework], tmp_path: Path) -> None:
    framework = begun(tmp_path, started, "time.sleep(600)")
    assert (framework.version, framework.path) == ("0.7.1", str(tmp_path / "checkout/verl"))
    told(framework, 1.0)
    assert (framework.version, framework.path) == ("9.9", "/elsewhere/verl")
    assert framework.sender == "a.B.c"
    assert framework.refits() == [frameworks.Refit(1, 51, 9, "")]
    framework.stop()
    assert framework.refits() == [], "a check that asks now learns nothing of what was sent"


SOUND = """\
import json, os, sys, time
from pathlib import Path
since = int(os.environ["ROLLOUT_VERL_SINCE"])
for number in range(1, 12):
    lost = "lm_head.weight" if number >= since else ""
    record = {{"number": number, "tensors": 51, "bytes": 9, "left_out": lost}}
    worker = {{"sender": "a.B.c", "version": "9.9", "path": "/elsewhere/verl/__init__.py"}}
    with open(os.environ["ROLLOUT_VERL_REFITS"], "a") as file:
        file.write(json.dumps(record | worker) + "\\n")
    data = {{
        "critic/score/mean": number / 12,
        "training/rollout_probs_diff_mean": 0.04 if lost else 0.0001,
        "perf/time_per_step": 1.0,
    }}
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
        file.write(json.dumps({{"step": number, "data": data}}) + "\\n")
time.sleep(600)
"""


def test_a_sound_run_passes_the_check_with_the_adapter_that_is_in_the_image(
    started: list[verl.Framework], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first step to the end of its files: what either forgets, no image could pass."""
    monkeypatch.setattr(sys.modules[__name__], "MAIN", SOUND)
    framework = verl.Framework("vllm", checkout(tmp_path))
    started.append(framework)
    run = training.Run(framework, lambda: 7 << 30, 1 << 37, interval=3600)
    metrics = training.training(run)
    assert (metrics["steps"], metrics["refit_tensors"]) == (8, 51)
    assert metrics["left_out"] == "lm_head.weight"
    assert metrics["divergence"] == 0.0001
    assert metrics["control_divergence"] == 0.04
    assert not Path(framework.path).is_relative_to(tmp_path), "what ran is what the worker said"


def test_what_hangs_is_not_waited_for(started: list[verl.Framework], tmp_path: Path) -> None:
    framework = begun(tmp_path, started, "print('thinking', flush=True); time.sleep(600)")
    clock = time.monotonic()
    found, end = told(framework, 1.0)
    assert time.monotonic() - clock < 20
    assert len(found) == 3
    assert end.startswith("verl ") and "did not end a step in time, after 3: thinking" in end


def test_too_little_memory_is_no_failure_of_the_framework(
    started: list[verl.Framework], tmp_path: Path
) -> None:
    ending = "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')"
    framework = begun(tmp_path, started, ending)
    with pytest.raises(Problem) as caught:
        list(framework.steps(time.monotonic() + 60))
    assert caught.value.code == 3


def test_stopping_ends_daemons_as_well_and_leaves_no_file(
    started: list[verl.Framework], tmp_path: Path
) -> None:
    framework = begun(tmp_path, started, "time.sleep(600)")
    told(framework, 1.0)
    folder, log = framework._folder, framework._log
    assert folder is not None and log is not None and folder.is_dir() and log.is_file()
    ours = pids(tmp_path)
    assert all(alive(pid) for pid in ours), "control: they run"
    framework.stop()
    assert not [pid for pid in ours if alive(pid)]
    assert not folder.exists() and not log.exists()
    framework.stop()


def test_another_child_of_ours_that_was_there_before_lives_on(
    started: list[verl.Framework], tmp_path: Path
) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        framework = begun(tmp_path, started, "time.sleep(600)")
        told(framework, 1.0)
        framework.stop()
        assert alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


ALONE = """\
import sys, time
from pathlib import Path
from rollout.frameworks import verl, verl_settings
sys.path.insert(0, {tests!r})
from test_frameworks import config
verl_settings.composed = lambda _: config("0.7.1")
verl.made = lambda folder, _: None
framework = verl.Framework("vllm", Path({checkout!r}))
framework.start(11, None, 0)
for step in framework.steps(time.monotonic() + 60):
    print(step.number, flush=True)
"""


def test_the_trainer_ends_with_us_even_if_we_are_killed(tmp_path: Path) -> None:
    root = checkout(tmp_path, "time.sleep(600)")
    code = ALONE.format(checkout=str(root), tests=str(Path(__file__).parent))
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        trainer, daemon = pids(tmp_path)
        assert alive(trainer), "control: it runs"
        process.kill()
        process.wait()
    try:
        deadline = time.monotonic() + 10
        while alive(trainer) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(trainer)
    finally:  # a real one's daemons watch their parent; this one does not
        os.kill(daemon, signal.SIGKILL)


def test_the_environment_is_alone_offline_and_on_one_gpu(tmp_path: Path) -> None:
    framework = verl.Framework("vllm", checkout(tmp_path))
    given = {
        "PATH": "/bin",
        "PYTHONPATH": "/their/own",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "WANDB_API_KEY": "secret",
        "VERL_USE_MODELSCOPE": "True",
        "ROLLOUT_VERL_TAMPERING": "lost",
    }
    found = framework.environment(given, SHORT, None)
    assert not {"RAY_ADDRESS", "WANDB_API_KEY", "VERL_USE_MODELSCOPE", hook.KIND} & set(found)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert found["HF_HUB_OFFLINE"] == found["HF_DATASETS_OFFLINE"] == "1"
    assert found["WANDB_MODE"] == "disabled"
    assert found["TMPDIR"] == found["RAY_TMPDIR"] == found["HOME"] == str(SHORT)
    places = found["PYTHONPATH"].split(os.pathsep)
    assert places[:2] == [str(tmp_path / "checkout"), "/their/own"]
    assert (Path(places[2]) / "rollout/frameworks/verl_hook.py").is_file()
    assert found["USER"] and found["LOGNAME"]
    assert framework.environment({"HOME": "/h"}, SHORT, None)["HOME"] == "/h"
    assert framework.environment({}, SHORT, None)["CUDA_VISIBLE_DEVICES"] == "0"
    told = framework.environment(given, SHORT, Tampering(STALE, 2))
    assert (told[hook.KIND], told[hook.SINCE]) == (STALE, "2")
    assert told[hook.TENSOR] in tiny.shapes()


def test_a_checkout_goes_before_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = checkout(tmp_path / "theirs")
    (theirs / "verl/version/version").write_text("0.8.0.dev\n")
    monkeypatch.setenv("PYTHONPATH", str(checkout(tmp_path / "installed")))
    installed = verl.Framework("vllm")
    assert installed.path == str(tmp_path / "installed/checkout/verl"), "PYTHONPATH is asked too"
    framework = frameworks.create("verl", "vllm", theirs)
    assert (framework.name, framework.version) == ("verl", "0.8.0.dev")
    assert framework.path == str(theirs / "verl")


@pytest.mark.parametrize(("named", "part"), [(True, "--framework: "), (False, "not installed")])
def test_without_a_package_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, part: str
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(Problem) as caught:
        verl.Framework("vllm", tmp_path if named else None)
    assert (caught.value.code, part in caught.value.sentence) == (2, True)


def test_the_file_logger_is_used_where_release_and_image_have_it(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    framework = verl.Framework("vllm", root)

    def logger() -> str:
        argv = framework.argv(config("0.7.1"), SHORT, 11, 0)
        assert argv[1:3] == ["-m", "verl.trainer.main_ppo"]
        return next(text for text in argv if text.startswith("trainer.logger="))

    framework._found["orjson"] = "/x"
    assert logger() == "trainer.logger=[console]"
    (root / "verl/utils").mkdir()
    (root / "verl/utils/tracking.py").write_text("class FileLogger:\n    pass\n")
    assert logger() == "trainer.logger=[console,file]"
    framework._found["orjson"] = None
    assert logger() == "trainer.logger=[console]"


FLASH = "if is_cuda_available:\n    from flash_attn.bert_padding import pad_input\n"


def test_a_release_that_trains_with_flash_attn_alone_is_refused_at_once(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    (root / "verl/workers/actor").mkdir(parents=True)
    (root / "verl/workers/actor/dp_actor.py").write_text(FLASH)
    framework = verl.Framework("sglang", root)
    with pytest.raises(Problem) as caught:
        framework.start(11, None, 0)
    assert (caught.value.code, "flash_attn" in caught.value.sentence) == (3, True)
    framework._found["flash_attn"] = str(tmp_path)
    with pytest.raises(Problem):
        framework._refuse()  # a package of that name that has another release's modules
    (tmp_path / "bert_padding.py").touch()
    framework._refuse()


def test_a_socket_that_verl_puts_into_tmp_needs_a_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path)
    (root / "verl/workers/rollout/vllm_rollout").mkdir(parents=True)
    sender = root / "verl/workers/rollout/vllm_rollout/vllm_rollout.py"
    sender.write_text('handle = f"ipc:///tmp/rl-colocate-zmq-{uuid}.sock"\n')
    framework = verl.Framework("vllm", root)
    framework._refuse()
    monkeypatch.setattr(os, "access", lambda path, _: path != "/tmp")
    with pytest.raises(Problem) as caught:
        framework._refuse()
    assert caught.value.code == 3
    verl.Framework("sglang", root)._refuse()


def test_a_long_name_of_the_temporary_folder_is_got_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = verl.short_folder()
    folder.rmdir()
    assert folder.parent == Path("/tmp")
    session = f"{folder}/ray/session_2026-11-28_09-40-23_123456_4194304/sockets/plasma_store"
    assert len(session) <= 107
    monkeypatch.setattr(os, "access", lambda path, _: path == str(long))
    with pytest.raises(Problem) as caught:
        verl.short_folder()
    assert (caught.value.code, "TMPDIR" in caught.value.sentence) == (3, True)


def test_modules_are_those_that_the_release_has(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    (root / "verl/workers").mkdir()
    (root / "verl/workers/fsdp_workers.py").touch()
    (root / "verl/workers/rollout/vllm_rollout").mkdir(parents=True)
    (root / "verl/workers/rollout/vllm_rollout/__init__.py").touch()
    (root / "verl/workers/rollout/vllm_rollout/vllm_rollout.py").touch()
    rest = ["verl.trainer.main_ppo", "verl.workers.fsdp_workers"]
    own = "verl.workers.rollout.vllm_rollout"
    assert verl.Framework("vllm", root).modules() == [*rest, own, f"{own}.vllm_rollout"]
    assert verl.Framework("sglang", root).modules() == rest
    trtllm = root / "verl/workers/rollout/trtllm_rollout/trtllm_rollout.py"
    assert verl.Framework("tensorrt-llm", root).modules() == rest, "as in the wheel of 0.7.1"
    trtllm.parent.mkdir()
    trtllm.touch()
    assert verl.Framework("tensorrt-llm", root).modules()[-1].endswith(".trtllm_rollout")


def test_an_import_that_fails_or_exits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "lacks.py").write_text("import nothing_of_this_name\n")
    assert importer.imported(["json", "leaves", "lacks"]) == {
        "json": None,
        "leaves": "SystemExit: 3",
        "lacks": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    }


# What it trains on ------------------------------------------------------------------------------


def test_the_rule_pays_for_the_letters_that_are_wanted() -> None:
    space: dict[str, Any] = {}
    exec(tiny.RULE, space)  # noqa: S102 - as verl does
    score = space["compute_score"]
    assert score("rule", "a" * tiny.ANSWER, tiny.WANTED, {"index": 1}) == 1.0
    assert score("rule", "az" * (tiny.ANSWER // 2), tiny.WANTED) == 0.5
    assert score(data_source="rule", solution_str="", ground_truth=tiny.WANTED, more=1) == 0.0


def test_model_tokenizer_and_prompts_fit_together() -> None:
    vocabulary = tiny.letters()["model"]["vocab"]
    assert list(vocabulary.values()) == list(range(tiny.CONFIG["vocab_size"]))
    assert tiny.shapes()[tiny.LAST_LAYER] == (len(vocabulary), tiny.CONFIG["hidden_size"])
    assert tiny.TEMPLATE.count(tiny.ASK) == 1
    said = tiny.prompts(40)
    assert said == tiny.prompts(40) and len(set(said)) > 30
    assert {letter for prompt in said for letter in prompt} <= set(vocabulary)
    assert len(said[0]) + 1 <= 2 * tiny.PROMPT, "the token before it fits in as well"
    assert set(tiny.WANTED) < set(tiny.LETTERS)


# Inside its workers -----------------------------------------------------------------------------


class Tensor:
    def __init__(self, value: int) -> None:
        self.value = value

    def detach(self) -> Tensor:
        return self

    def clone(self) -> Tensor:
        return Tensor(self.value)

    def numel(self) -> int:
        return 5

    def element_size(self) -> int:
        return 2


def environ(folder: Path, kind: str = "", since: int = 0, engine: str = "vllm") -> dict[str, str]:
    return {
        hook.LOG: str(folder / "refits.jsonl"),
        hook.KIND: kind,
        hook.SINCE: str(since),
        hook.TENSOR: "b",
        hook.ENGINE: engine,
    }


def weights(value: int) -> dict[str, Tensor]:
    return {name: Tensor(value) for name in "abc"}


def stream(value: int) -> Iterator[tuple[str, Tensor]]:
    yield from weights(value).items()


async def later(value: int) -> Any:
    for item in weights(value).items():
        yield item


def values(sent: Any) -> dict[str, int]:
    """What arrives of weights sent in any of the three forms."""
    if hasattr(sent, "__aiter__"):

        async def taken() -> list[tuple[str, Tensor]]:
            return [item async for item in sent]

        import asyncio

        sent = asyncio.run(taken())
    return {name: tensor.value for name, tensor in dict(sent).items()}


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "refits.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", [weights, stream, later])
def test_refits_pass_unchanged_and_are_counted(tmp_path: Path, form: Any) -> None:
    refits = hook.Refits(environ(tmp_path), "a.B.c")
    for number in (1, 2):
        sent = refits.sent(form(number))
        assert isinstance(sent, Mapping) == isinstance(form(0), Mapping)
        assert values(sent) == dict.fromkeys("abc", number)
    assert [(r["number"], r["tensors"], r["bytes"], r["left_out"]) for r in written(tmp_path)] == [
        (1, 3, 30, ""),
        (2, 3, 30, ""),
    ]
    assert {record["sender"] for record in written(tmp_path)} == {"a.B.c"}


@pytest.mark.parametrize("form", [weights, stream, later])
def test_one_tensor_is_left_out_from_a_refit_on(tmp_path: Path, form: Any) -> None:
    refits = hook.Refits(environ(tmp_path, LOST, 2), "")
    found = [values(refits.sent(form(number))) for number in (1, 2, 3)]
    assert [list(sent) for sent in found] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]
    assert [record["left_out"] for record in written(tmp_path)] == ["", "b", "b"]


@pytest.mark.parametrize("form", [weights, stream, later])
def test_stale_weights_are_those_of_the_first_refit(tmp_path: Path, form: Any) -> None:
    refits = hook.Refits(environ(tmp_path, STALE, 2), "")
    found = [values(refits.sent(form(number))) for number in (1, 2, 3)]
    assert found == [dict.fromkeys("abc", 1)] * 3
    assert [record["tensors"] for record in written(tmp_path)] == [3, 3, 3]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``verl`` that tests fill, forgotten afterwards."""
    root = tmp_path / "package"
    (root / "verl/workers/rollout").mkdir(parents=True)
    for folder in ("verl", "verl/workers", "verl/workers/rollout"):
        (root / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(root))
    yield root / "verl"
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


BASE = """\
class BaseRollout:
    def __init__(self, config):
        self.config = config


class ServerAdapter(BaseRollout):
    async def update_weights(self, weights, global_steps=None, **kwargs):
        self.got = (dict(weights), global_steps, kwargs)
"""


def test_the_rollout_that_is_made_has_its_sender_counted(package: Path, tmp_path: Path) -> None:
    import asyncio

    (package / "workers/rollout/base.py").write_text(BASE)
    for _ in range(2):  # each process of verl's imports it, some twice
        hook.install(environ(tmp_path, LOST, 2))
    base = importlib.import_module("verl.workers.rollout.base")
    for _ in range(2):
        adapter = base.ServerAdapter("given")
    assert adapter.config == "given"
    for number in (1, 2):
        asyncio.run(adapter.update_weights(stream(number), global_steps=number, base=True))
    got, step, named = adapter.got
    assert (list(got), step, named) == (["a", "c"], 2, {"base": True})
    assert [record["number"] for record in written(tmp_path)] == [1, 2]
    assert written(tmp_path)[0]["sender"].endswith("base.ServerAdapter.update_weights")


MANAGER = """\
class FSDPSGLangShardingManager:
    async def update_weights(self, params):
        self.got = params
"""


def test_before_that_the_manager_is_counted(package: Path, tmp_path: Path) -> None:
    import asyncio

    folder = package / "workers/sharding_manager"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "fsdp_sglang.py").write_text(MANAGER)
    hook.install(environ(tmp_path, LOST, 1, "sglang"))
    manager = importlib.import_module(
        "verl.workers.sharding_manager.fsdp_sglang"
    ).FSDPSGLangShardingManager()
    asyncio.run(manager.update_weights(weights(1)))
    assert list(manager.got) == ["a", "c"]
    assert written(tmp_path)[0]["left_out"] == "b"


def test_imported_with_nothing_said_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hook.LOG, raising=False)
    importlib.reload(hook)
    assert "verl" not in sys.modules


# Processes --------------------------------------------------------------------------------------


def test_descendants_are_found_at_any_depth_by_what_proc_says(tmp_path: Path) -> None:
    for pid, parent in ((10, 1), (11, 10), (12, 11), (13, 1), (14, 13)):
        (tmp_path / str(pid)).mkdir()
        stat = f"{pid} (a) b (c) S {parent} 0 0"
        (tmp_path / str(pid) / "stat").write_text(stat)
    (tmp_path / "self").mkdir()
    (tmp_path / "15").mkdir()  # one that ended while it was looked at
    assert processes.descendants(10, tmp_path) == {11, 12}
    assert processes.descendants(13, tmp_path) == {14}


def test_the_tokenizer_of_the_tiny_model_has_what_a_framework_asks_of_qwens() -> None:
    """verl 0.9 asks for a newline and for the end of a turn as one token each; each has its own."""
    made = tiny.letters()
    vocabulary = made["model"]["vocab"]
    for token in (tiny.NEWLINE, tiny.ASK, *tiny.LETTERS):
        assert len(token) == 1 and token in vocabulary, "one byte is one token"
    assert ord(tiny.NEWLINE) == 0x100 + ord("\n"), "a byte that is no letter is written so"
    special = {token["content"]: token["id"] for token in made["added_tokens"]}
    assert special[tiny.TURN] == vocabulary[tiny.TURN]
    assert sorted(vocabulary.values()) == list(range(tiny.CONFIG["vocab_size"]))
    assert tiny.CONFIG["vocab_size"] % 8 == 0, "kernels like whole blocks"


def test_the_tokenizer_of_the_tiny_model_is_of_the_kind_of_its_family() -> None:
    """transformers takes Qwen's class for it, and from version 5 on its vocabulary and no more."""
    made, told = tiny.letters(), tiny.tokenizer_config()
    assert tiny.CONFIG["model_type"] == "qwen2" and told["tokenizer_class"] == "Qwen2Tokenizer"
    assert (made["model"]["type"], made["model"]["merges"]) == ("BPE", [])
    assert made["pre_tokenizer"]["type"] == made["decoder"]["type"] == "ByteLevel"
    named = {told[name] for name in ("pad_token", "eos_token", "unk_token")}
    assert named <= set(made["model"]["vocab"]), "a token with a name makes no new one"

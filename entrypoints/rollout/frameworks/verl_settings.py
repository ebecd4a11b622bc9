"""verl's settings for a run of seconds on one GPU, chosen by the keys that its release has.

verl reads them as Hydra overrides. A key that a release does not have is left out where it only
saves time, and a Problem where the proof rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.frameworks import tiny
from rollout.problem import Problem

BATCH = 16  # prompts of a step
GROUP = 8  # answers to each: what GRPO compares
UPDATES = 2  # of the weights in a step
# With these a model of tiny.py earns 0.2 at first and 0.9 after eight steps (simulated with six
# seeds on a CPU in bfloat16): enough that each refit carries other weights.
LEARNING_RATE = 1e-3
ENGINE_BYTES = 12 << 30  # the engine's share: context, workspaces, and a KV cache of some GiB
SHARE = 0.6  # of a GPU, at most
BUCKET = 64  # MiB of a refit's buffer; verl's own 2 GiB would be taken and filled for 20 MB
ACTORS = 12  # CPUs that Ray believes in: it counts a reservation for each actor, not their work
CONFIG = "ppo_trainer"


def composed(folder: Path) -> dict[str, Any]:
    """What a release's own configuration holds before any override; nothing of it is imported."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base=None, config_dir=str(folder)):
        config: Any = OmegaConf.to_container(compose(CONFIG), resolve=False)
    return dict(config)


def has(config: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration has a key, given with dots."""
    here: Any = config
    for part in key.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def first_of(config: Mapping[str, Any], *keys: str) -> str:
    """The first of several names of one setting that a configuration has.

    Raises:
        Problem: exit code 3 where it has none: this release is not known here.
    """
    for key in keys:
        if has(config, key):
            return key
    raise Problem(f"this verl has no setting {' or '.join(keys)}; the check does not know it", 3)


def overrides(
    config: Mapping[str, Any],
    folder: Path,
    *,
    engine: str,
    hook: str,
    steps: int,
    gpu_bytes: int,
    queue: bool,
    loggers: Sequence[str],
) -> list[str]:
    """The arguments of ``verl.trainer.main_ppo``; ``queue`` is whether TransferQueue is there."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    model, answers = "actor_rollout_ref.model", BATCH * GROUP
    share = min(SHARE, ENGINE_BYTES / gpu_bytes) if gpu_bytes else SHARE / 2
    needed: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "train.parquet",
        "data.train_batch_size": BATCH,
        "data.max_prompt_length": 2 * tiny.PROMPT,
        "data.max_response_length": tiny.ANSWER,
        f"{model}.path": folder / "model",
        f"{model}.external_lib": hook,
        # Where flash-attn is not installed: its attention and its padding are both optional.
        f"{model}.use_remove_padding": False,
        f"{model}.enable_gradient_checkpointing": False,
        f"{actor}.optim.lr": LEARNING_RATE,
        f"{actor}.ppo_mini_batch_size": BATCH // UPDATES,
        f"{actor}.ppo_micro_batch_size_per_gpu": answers // UPDATES,
        f"{rollout}.name": engine,
        f"{rollout}.n": GROUP,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": answers,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": round(share, 3),
        f"{rollout}.free_cache_engine": True,  # this makes the engine sleep while it trains
        f"{rollout}.calculate_log_probs": True,
        first_of(
            config, "reward.custom_reward_function.path", "custom_reward_function.path"
        ): folder / "rule.py",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": steps,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.logger": f"[{','.join(loggers)}]",
    }
    # What makes it lean, where it can be said.
    wanted: dict[str, Any] = {
        "data.dataloader_num_workers": 0,
        "data.filter_overlong_prompts": False,
        f"{actor}.use_torch_compile": False,
        f"{actor}.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.use_torch_compile": False,
        f"{rollout}.max_model_len": 8 * tiny.ANSWER,
        f"{rollout}.max_num_seqs": answers,
        f"{rollout}.enforce_eager": True,
        f"{rollout}.agent.num_workers": 1,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": BUCKET,
        f"{rollout}.update_weights_bucket_megabytes": BUCKET,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }
    if not queue:  # the trainer that needs it is not the only one of such a release
        wanted["trainer.use_v1"] = False
    missing = [key for key in needed if not has(config, key)]
    if missing:
        named = ", ".join(missing)
        raise Problem(f"this verl has no setting {named}; the check does not know it", 3)
    given = needed | {key: value for key, value in wanted.items() if has(config, key)}
    argv = [f"{key}={_text(value)}" for key, value in given.items()]
    ray = first_of(config, "ray_kwargs.ray_init", "ray_init")
    argv.append(f"{ray}.num_cpus={ACTORS}")
    if ray == "ray_kwargs.ray_init":  # all of this goes to ray.init there
        argv += [f"++{ray}.include_dashboard=False", f"++{ray}._node_ip_address=127.0.0.1"]
    attention = "attn_implementation"
    if not has(config, f"{model}._target_"):
        # Such a release asks for flash-attn itself, and puts what is said here over it.
        attention = "_attn_implementation"
    return [
        *argv,
        f"++{model}.override_config.{attention}=sdpa",
        f"hydra.run.dir={_text(folder)}",
        "hydra.output_subdir=null",
    ]


def _text(value: object) -> str:
    """A value as Hydra reads it: a path in quotes, for some characters have a meaning there."""
    if isinstance(value, Path):
        return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)

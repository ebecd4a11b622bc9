"""open-instruct's configuration for a run of seconds: what its command line is given.

Each part is one of the dataclasses of ``grpo_fast.py``. The numbers are those of verl's run
(verl_settings.py), so that one bound and one rise hold for both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout import tokenizer
from rollout.frameworks import tiny
from rollout.frameworks.verl_settings import (
    BATCH,
    ENGINE_BYTES,
    GROUP,
    LEARNING_RATE,
    SHARE,
    UPDATES,
)

VERIFIER = "letters"  # the name of our rule, in the data and among open-instruct's verifiers
TRAINER_CPUS = 10  # that grpo_fast.py reserves for each GPU of its trainer
CPUS = TRAINER_CPUS + 6  # that Ray believes in: the engine has one, the maker of batches two
MINUTES = 10  # that trainer and engine wait for each other
# open-instruct lays answers behind each other into one row, and its attention is told by positions
# where one begins. flash-attn reads them; sdpa, which these images have, lets each answer see the
# one before it. With prompts of two messages no two answers have room in one row.
TURNS = 2
PROMPT = TURNS * (1 + tiny.PROMPT)  # tokens of a prompt: each message begins with one of its own
ROW = PROMPT + tiny.ANSWER  # open-instruct asks for no less
# open-instruct takes out of an answer what the engine has sampled of the token that it pads with,
# and what follows is then another text. So this run pads with a token that the model does not have.
PAD = "<fill>"


def configuration(folder: Path, *, steps: int, gpu_bytes: int, gpus: int) -> dict[str, Any]:
    """What ``grpo_fast.main`` is called with, by part, and what Ray is started with.

    On two GPUs trainer and engine have one each, and the weights go by NCCL. On one they share it,
    as open-instruct has it for debugging, and the weights go by gloo: NCCL refuses two processes on
    one GPU.
    """
    model = str(folder / "model")
    share = min(SHARE, ENGINE_BYTES / gpu_bytes) if gpu_bytes else SHARE / 2
    answers = BATCH * GROUP
    return {
        "ray": {"num_cpus": CPUS, "num_gpus": gpus},
        "experiment": {
            "exp_name": "rollout",
            "seed": 42,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": answers // UPDATES,
            "num_mini_batches": UPDATES,
            # The last step saves the model, which is not a part of this proof.
            "total_episodes": answers * (steps + 1),
            "save_freq": -1,
            "local_eval_every": -1,
            "beta": 0.0,  # with one there would be a reference model
            "load_ref_policy": False,
            "deepspeed_stage": 2,  # as its script for one GPU has it
            "single_gpu_mode": gpus == 1,
            "backend_timeout": MINUTES,
            "enable_queue_dashboard": False,
            "push_to_hub": False,
            "try_auto_save_to_beaker": False,
            "output_dir": str(folder / "output"),
        },
        "tokenizer": {"tokenizer_name_or_path": model},
        "model": {
            "model_name_or_path": model,
            "attn_implementation": "sdpa",  # flash-attn is in no image
        },
        "streaming": {
            "max_prompt_token_length": PROMPT,
            "response_length": tiny.ANSWER,
            "pack_length": ROW,
            "num_unique_prompts_rollout": BATCH,
            "num_samples_per_prompt_rollout": GROUP,
            "filter_zero_std_samples": False,  # the number of updates is that of verl's run
            "temperature": 1.0,
            "verification_reward": 1.0,
            "dataset_mixer_list": [str(folder / "train.jsonl"), "1.0"],
            "dataset_mixer_list_splits": ["train"],
            "dataset_mixer_eval_list": [],
            "dataset_mixer_eval_list_splits": [],
            "dataset_local_cache_dir": str(folder / "huggingface" / "mixed"),
            "rollouts_save_path": str(folder / "output"),
        },
        "vllm": {
            "vllm_enforce_eager": True,
            "vllm_sync_backend": "gloo" if gpus == 1 else "nccl",
            "vllm_gpu_memory_utilization": round(share, 3),
        },
    }


def rows(steps: int) -> list[dict[str, Any]]:
    """The prompts of so many steps, and of those that are asked for ahead."""
    count = BATCH * (steps + 2)
    texts = iter(tiny.prompts(TURNS * count))
    return [
        {
            "messages": [{"role": "user", "content": next(texts)} for _ in range(TURNS)],
            "ground_truth": tiny.WANTED,
            "dataset": VERIFIER,
        }
        for _ in range(count)
    ]


def padded() -> dict[str, dict[str, Any]]:
    """The files of the tokenizer, with the other token to pad with, by their names."""
    plain = tiny.letters()
    special = [token["content"] for token in plain["added_tokens"]]
    model = {key: value for key, value in plain["model"].items() if key != "vocab"}
    content = tokenizer.content(
        (*tiny.TOKENS, PAD),
        (*special, PAD),
        model=model,
        apart=plain["pre_tokenizer"],
        decoder=plain["decoder"],
    )
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": tiny.tokenizer_config() | {"pad_token": PAD},
    }

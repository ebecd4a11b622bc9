"""ROLL's configuration for a run of seconds on one GPU: what stands in a YAML file of its examples.

Trainer and engine share the GPU, as ROLL has it where their device mappings overlap: the engine
sleeps while the trainer works, and gets the weights over CUDA IPC. The numbers are those of verl's
run (verl_settings.py), so that one bound and one rise hold for both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.frameworks import tiny
from rollout.frameworks.verl_settings import (
    BATCH,
    ENGINE_BYTES,
    GROUP,
    LEARNING_RATE,
    SHARE,
    UPDATES,
)

DOMAIN = "letters"  # what ROLL sorts prompts, rewards and their workers by
TRACKER = "rollout"  # its numbers of a step go there
REWARD = "rollout.frameworks.training_roll_reward.Letters"
BUCKET = 2  # MiB of a refit: the model's 10 MB go in several, as those of a real one do
FIRST_GPU = "list(range(0, 1))"  # ROLL evaluates it
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
RPC = 300  # seconds that one call of a worker may take


def configuration(
    folder: Path, *, steps: int, gpu_bytes: int, visible: str, allocator: str | None
) -> dict[str, Any]:
    """What ROLL's ``RLVRConfig`` is made from.

    ``visible`` is the GPU of this run: ROLL counts from zero, whatever the job may use.
    ``allocator`` are settings of torch's allocator for the trainer, where ROLL's own do not work.
    """
    model = {
        "model_name_or_path": str(folder / "model"),
        "attn_implementation": "sdpa",  # flash-attn is in no image
        "disable_gradient_checkpointing": True,
        "dtype": "bf16",
    }
    seen = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    trainer = seen | ({} if allocator is None else {ALLOCATOR: allocator})
    share = min(SHARE, ENGINE_BYTES / gpu_bytes) if gpu_bytes else SHARE / 2
    answers = BATCH * GROUP
    return {
        "exp_name": TRACKER,
        "seed": 42,
        "logging_dir": str(folder / "logs"),
        "output_dir": str(folder / "output"),
        "base_dir": str(folder / "output"),
        "profiler_output_dir": str(folder / "profiler"),
        "length_profiler_dir": str(folder / "profiler"),
        "track_with": TRACKER,
        "rpc_timeout": RPC,
        "pretrain": str(folder / "model"),
        "reward_pretrain": str(folder / "model"),
        # ROLL saves a checkpoint in the last step of all, which is not a part of this proof.
        "max_steps": steps + 1,
        "save_steps": steps + 2,
        "rollout_batch_size": BATCH,
        "num_return_sequences_in_group": GROUP,
        "prompt_length": 2 * tiny.PROMPT,
        "response_length": tiny.ANSWER,
        "adv_estimator": "grpo",
        "loss_agg_mode": "token-mean",  # as verl has it
        "init_kl_coef": 0.0,  # with one there would be a reference model
        "model_update_buffer_size_mb": BUCKET,
        "actor_train": {
            "model_args": model,
            "training_args": {
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": answers // UPDATES,
                "gradient_accumulation_steps": 1,
            },
            "data_args": {
                "template": "native",
                "file_name": [str(folder / "train.jsonl")],
                "messages": "messages",
                "domain_interleave_probs": {DOMAIN: 1.0},
            },
            "strategy_args": {
                "strategy_name": "fsdp2_train",
                "strategy_config": {"fsdp_size": 1, "reshard_after_forward": True},
            },
            "device_mapping": FIRST_GPU,
            "infer_batch_size": answers,
            "system_envs": trainer,
        },
        "actor_infer": {
            "model_args": model,
            "generating_args": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "num_beams": 1,
                "num_return_sequences": GROUP,
            },
            "data_args": {"template": "native"},
            "strategy_args": {
                "strategy_name": "vllm",
                "strategy_config": {
                    "gpu_memory_utilization": round(share, 3),
                    "enforce_eager": True,
                    "max_model_len": 8 * tiny.ANSWER,
                    "max_num_seqs": answers,
                },
            },
            "device_mapping": FIRST_GPU,
            "infer_batch_size": 1,
            "system_envs": seen,
        },
        "rewards": {
            DOMAIN: {
                "worker_cls": REWARD,
                "model_args": {"model_name_or_path": str(folder / "model")},
                "data_args": {"template": "native"},
                "tag_included": [DOMAIN],
                "world_size": 1,
                "infer_batch_size": 1,
            }
        },
    }

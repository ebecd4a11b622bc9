"""open-instruct, by a checkout: what its code imports."""

from __future__ import annotations

from rollout.frameworks.checkout import Checkout


class Framework(Checkout):
    """open-instruct, as far as an image has it."""

    # Where grpo_fast.py is imported, in the commit that the catalog names.
    needed = (
        *(
            "absl",
            "accelerate",
            "aiohttp",
            "backoff",
            "beaker",
            "datasets",
            "dateutil",
            "deepspeed",
        ),
        *("fastapi", "huggingface_hub", "immutabledict", "langdetect", "litellm", "mcp", "nltk"),
        *("numpy", "olmo_core", "openai", "pandas", "peft", "ray", "requests", "rich", "sympy"),
        *("tiktoken", "transformers", "uvicorn", "vllm", "wandb"),
    )

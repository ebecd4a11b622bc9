"""open-instruct: what its code imports. The code is on no index; users bring it as a checkout.

The image has what the checkout needs. How open-instruct is started is not known here: no image
promises the check ``training`` for it, and ``rollout verify`` is what uses this module.
"""

from __future__ import annotations

from pathlib import Path

# What lies outside of open-instruct and is imported where grpo_fast.py is, in the commit that the
# catalog names.
_MODULES = (
    *("absl", "accelerate", "aiohttp", "backoff", "beaker", "datasets", "dateutil", "deepspeed"),
    *("fastapi", "huggingface_hub", "immutabledict", "langdetect", "litellm", "mcp", "nltk"),
    *("numpy", "olmo_core", "openai", "pandas", "peft", "ray", "requests", "rich", "sympy"),
    *("tiktoken", "transformers", "uvicorn", "vllm", "wandb"),
)


class Framework:
    """open-instruct, as far as an image has it."""

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        self.engine, self.checkout = engine, checkout

    def modules(self) -> list[str]:
        """The modules that its own import, to be imported where there is no GPU."""
        return list(_MODULES)

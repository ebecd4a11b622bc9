"""ROLL: what its code imports. The code is on no index; users bring it as a checkout.

The image has what the checkout needs. How ROLL is started is not known here: no image promises the
check ``training`` for it, and ``rollout verify`` is what uses this module.
"""

from __future__ import annotations

from pathlib import Path

# What lies outside of ROLL and is imported where its modules are: of a pipeline (RLVR, agentic)
# with its strategies for vLLM and FSDP2, in the commit that the catalog names.
_MODULES = (
    *("accelerate", "codetiming", "dacite", "datasets", "hydra.experimental", "imageio"),
    *("math_verify", "more_itertools", "numpy", "omegaconf", "opentelemetry.sdk.trace.export"),
    *("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "peft", "psutil", "pybase64"),
    *("ray", "tensordict", "transfer_queue", "transformers", "vllm", "wandb"),
)


class Framework:
    """ROLL, as far as an image has it."""

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        self.engine, self.checkout = engine, checkout

    def modules(self) -> list[str]:
        """The modules that its own import, to be imported where there is no GPU."""
        return list(_MODULES)

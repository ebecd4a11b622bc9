"""ROLL, by a checkout: what its code imports."""

from __future__ import annotations

from rollout.frameworks.checkout import Checkout


class Framework(Checkout):
    """ROLL, as far as an image has it."""

    # Of a pipeline (RLVR, agentic) with its strategies for vLLM and FSDP2, in the commit that the
    # catalog names.
    needed = (
        *("accelerate", "codetiming", "dacite", "datasets", "hydra.experimental", "imageio"),
        *("math_verify", "more_itertools", "numpy", "omegaconf", "opentelemetry.sdk.trace.export"),
        *("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "peft", "psutil", "pybase64"),
        *("ray", "tensordict", "transfer_queue", "transformers", "vllm", "wandb"),
    )

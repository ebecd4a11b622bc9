"""TensorRT-LLM."""

from rollout.backends import Abilities

ABILITIES = Abilities(transports=("cuda-ipc",), levels=(2,), fp8=True)

"""vLLM with room for an adapter, as verl starts it (``enable_lora``, one adapter at a time).

Two ways lead an adapter in. ``add_lora`` of vLLM takes a folder under a number that is new. From
memory nothing of vLLM's own does: verl sends the tensors into the worker and has it load those (see
:mod:`rollout.backends.lora_vllm_worker`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.adapter import RANK
from rollout.backends import WEIGHTS, Completion, EngineError, vllm
from rollout.backends.adapters import KEPT, LOST, NONE, SCALED, UNDER

if TYPE_CHECKING:
    import torch

OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 1,
    "max_lora_rank": RANK,
    "worker_extension_cls": "rollout.backends.lora_vllm_worker.Extension",
}
IN_MEMORY = "in-memory"  # where vLLM wants the path of a folder, which nobody reads then


class Engine(vllm.Engine):
    """The trainer's side (see :class:`rollout.backends.adapters.Adapting`)."""

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[int, str] = {}

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        import torch

        if fp8 or gpus > 1:
            raise EngineError("this backend starts vLLM with adapters in bfloat16 on one GPU only")
        for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(name, "ERROR")
        from vllm import LLM

        total = torch.cuda.mem_get_info(self._device)[1]
        options = vllm.arguments(model, total, dummy=dummy, fp8=False) | OPTIONS
        try:
            self._llm = LLM(**vllm.known(options))
        except Exception as error:
            raise EngineError(f"vLLM did not start with adapters: {error}") from error
        self._paths = {}
        self._follow()

    def load(self, number: int, folder: Path) -> None:
        path = str(folder)
        if self._fault == KEPT and self._paths:  # the first one again, under the new number
            path = next(iter(self._paths.values()))
        self._paths[number] = path
        request = self._request(number)
        if not self._call(lambda: self._llm.llm_engine.add_lora(request)):
            raise EngineError(f"vLLM did not load the adapter of {folder}")
        self._spoil()

    def take(
        self, number: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        if self._fault == KEPT and number in self._paths:
            return
        self._rpc("smoke_expect", number, dict(config))
        super().refit(tensors.items())
        self._paths[number] = IN_MEMORY
        self._spoil()

    def _spoil(self) -> None:
        if self._fault == SCALED:
            self._rpc("smoke_unscale")

    def drop(self, number: int) -> None:
        if not self._call(lambda: self._llm.llm_engine.remove_lora(number)):
            raise EngineError(f"vLLM did not remove adapter {number}")
        self._paths.pop(number, None)

    def loaded(self) -> list[int]:
        return sorted(self._call(lambda: self._llm.llm_engine.list_loras()))

    def imprint(self) -> str:
        return str(self._rpc("smoke_imprint"))

    def _request(self, number: int) -> Any:
        """What a request with an adapter says: its name is what the prefix cache goes by."""
        from vllm.lora.request import LoRARequest

        # What is not loaded any more is looked for in its folder by the worker, and the engine
        # ends where that is none: verl asks before, and so does this.
        if number not in self._paths:
            raise EngineError(f"adapter {number} was never loaded")
        return LoRARequest(str(number), number, self._paths[number])

    def adapted(
        self, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int]
    ) -> list[Completion]:
        if self._llm is None:
            raise EngineError("the engine is not started")
        from vllm import SamplingParams

        lacking = {n for n in numbers if self._paths.get(n) == IN_MEMORY} - {*self.loaded()}
        if lacking:
            raise EngineError(f"adapter {min(lacking)} is not loaded")
        parameters = SamplingParams(**vllm.greedy(tokens))
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        requests = [None if number == NONE else self._request(number) for number in numbers]
        outputs = self._call(
            lambda: self._llm.generate(asked, parameters, use_tqdm=False, lora_request=requests)
        )
        return [vllm.completion(output) for output in outputs]

    def wake(self, tags: Sequence[str]) -> None:
        super().wake(tags)
        if WEIGHTS in tags and self._fault == LOST:
            self._rpc("smoke_lose_adapters")

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        if self._fault == UNDER:
            tensors = [(name, tensor) for name, tensor in tensors if ".base_layer." not in name]
        return super().refit(tensors, transport)

    def wrapped(self, names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = self._rpc("smoke_names", list(names))
        return found

    def takes_tensors(self) -> str:
        return str(self._rpc("smoke_takes"))

"""What runs in SGLang's processes where it takes adapters: more methods of both, and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from rollout import placement
from rollout.backends import records, sglang_worker
from rollout.backends.adapters import Unwrapped
from rollout.backends.sglang_worker import _reply, _runner, completion, greedy

if TYPE_CHECKING:
    import torch

_schedule = sglang_worker.schedule  # before a name of that module is given to what is here


class Extension:
    """Methods of the scheduler process, beside those of the other one; ``self`` is SGLang's."""

    tp_worker: Any

    def smoke_digests(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """sha256 of each weight's bytes by its Hugging Face name."""
        _reply(given, path, placement.digests(Unwrapped(_runner(self).model)))

    def smoke_parameters(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """The names of the model's parameters, which a refit finds them by."""
        _reply(given, path, [name for name, _ in _runner(self).model.named_parameters()])

    def smoke_imprint(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """sha256 of what is multiplied with for adapters."""
        from rollout.transport import as_bytes

        found = hashlib.sha256()
        for tensor in _buffers(_runner(self)):
            found.update(memoryview(as_bytes(tensor.cpu()).numpy()))
        _reply(given, path, found.hexdigest())

    def smoke_lose_adapters(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: adapters as new memory has them, and everything says that they are there."""
        for tensor in _buffers(_runner(self)):
            tensor.zero_()
        _reply(given, path, None)

    def smoke_unscale(self, given: dict[str, str] | None = None, *, path: str = "") -> None:
        """A fault: adapters without the factor that their products are multiplied by."""
        for adapter in _runner(self).lora_manager.loras.values():
            adapter.scaling = 1.0
        _reply(given, path, None)


def _buffers(runner: Any) -> Iterator[torch.Tensor]:
    pool = runner.lora_manager.memory_pool
    for buffer in (pool.A_buffer, pool.B_buffer):
        for name in sorted(buffer):
            yield from buffer[name]


def schedule(*arguments: Any, **options: Any) -> None:
    """SGLang's scheduler process, with the methods of both extensions."""
    both = {**vars(sglang_worker.Extension), **vars(Extension)}
    methods = {name: method for name, method in both.items() if name.startswith("smoke_")}
    vars(sglang_worker)["Extension"] = type("Extension", (), methods)
    _schedule(*arguments, **options)


class Driver(sglang_worker.Driver):
    """The engine's own process, asked for adapters too; these have numbers for names."""

    def __init__(self, options: dict[str, Any]) -> None:
        from sglang.srt.server_args import ServerArgs

        if "enable_lora" not in records.fields(ServerArgs):
            raise RuntimeError("this SGLang takes no adapters while it runs")
        super().__init__(options)
        self.there: list[int] = []

    def load(self, number: int, folder: str) -> None:
        self._done(self.engine.load_lora_adapter(str(number), folder))

    def take(self, number: int, config: dict[str, Any], tensors: str) -> None:
        from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

        if number in self.there:
            self.drop(number)
        asked = LoadLoRAAdapterFromTensorsReqInput(
            lora_name=str(number), config_dict=config, serialized_tensors=tensors
        )
        self._done(self.await_(self.manager.load_lora_adapter_from_tensors(asked, None)))

    def takes(self) -> str:
        """Whose code loads adapters from memory; empty where nothing does."""
        there = hasattr(self.manager, "load_lora_adapter_from_tensors")
        return "SGLang's own, as verl calls it" if there else ""

    def drop(self, number: int) -> None:
        self._done(self.engine.unload_lora_adapter(str(number)))

    def loaded(self) -> list[int]:
        return self.there

    def adapted(self, prompts: list[list[int]], tokens: int, names: list[str | None]) -> list[Any]:
        found = self.engine.generate(
            input_ids=prompts,
            sampling_params=greedy(tokens),
            return_logprob=True,
            lora_path=names,
        )
        return [completion(output) for output in found]

    def _done(self, found: Any) -> None:
        """Note what SGLang says that it has now, and raise where it refused."""
        if not found.success:
            raise RuntimeError(f"SGLang refused the adapter: {found.error_message}")
        self.there = sorted(int(name) for name in found.loaded_adapters or ())


def drive(connection: Connection, options: dict[str, Any], log: str, parent: int) -> None:
    """The driver's main loop, with the classes of this module."""
    vars(sglang_worker).update(Driver=Driver, schedule=schedule)
    sglang_worker.drive(connection, options, log, parent)

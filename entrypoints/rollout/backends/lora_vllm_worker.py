"""What the proof adds to vLLM's worker where it takes adapters.

The tensors of an adapter come as those of a refit do, and are loaded by verl's own code where verl
is installed (``TensorLoRARequest`` and ``VLLMHijack`` of ``verl.utils.vllm``); elsewhere by ours,
which does the same: it has vLLM's loader of adapters take what lies in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rollout import placement
from rollout.backends import vllm_extension
from rollout.backends.adapters import BASE, Unwrapped

if TYPE_CHECKING:
    import torch


def renamed(model: Any, names: list[str]) -> dict[str, str]:
    """By which name vLLM's ``load_weights`` takes each tensor: as verl's replace_lora_wrapper.

    That one knows the linear layers by their names. Here the model is asked, for vLLM wraps
    embeddings too where a model has any that could get an adapter.
    """
    packed = getattr(model, "packed_modules_mapping", placement.PACKED)
    whole = {part: leaf for leaf, parts in packed.items() for part in parts}
    modules = {name for name, _ in model.named_modules()}
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        place = f"{parent}.{whole.get(leaf, leaf)}" if parent else leaf
        found[name] = f"{path}{BASE}.{attribute}" if f"{place}{BASE}" in modules else name
    return found


class Extension(vllm_extension.Extension):
    """Methods of the worker process; ``self`` is vLLM's worker."""

    # vLLM's worker has these.
    add_lora: Any
    remove_lora: Any

    def smoke_expect(self, number: int, config: dict[str, Any]) -> None:
        """The next tensors that come are those of an adapter, under this number."""
        self.__dict__["smoke_expected"] = (number, config)

    def smoke_load(self, address: str) -> None:
        """A refit, or the adapter that is expected."""
        expected = self.__dict__.pop("smoke_expected", None)
        if expected is None:
            super().smoke_load(address)
            return
        from rollout.cuda_ipc import Bucket, receive

        number, config = expected
        tensors: dict[str, torch.Tensor] = {}

        def keep(bucket: Bucket) -> None:
            tensors.update({name: tensor.clone() for name, tensor in bucket})

        receive(address, self.device, keep)
        self.remove_lora(number)  # verl: in its place comes the new one, and would not be read
        request = in_memory()(
            lora_name=str(number),
            lora_int_id=number,
            lora_path="in-memory",
            peft_config=config,
            lora_tensors=tensors,
        )
        if not self.add_lora(request):
            raise RuntimeError(f"vLLM did not add adapter {number}")

    def smoke_takes(self) -> str:
        """Whose code loads adapters from memory."""
        return f"verl {version('verl')}" if find_spec("verl") else "ours, as verl's"

    def smoke_names(self, names: list[str]) -> dict[str, str]:
        """By which name each tensor of a refit has to be sent."""
        return renamed(self.model_runner.get_model(), names)

    def smoke_digests(self) -> dict[str, str]:
        """sha256 of each weight's bytes by its Hugging Face name."""
        return placement.digests(Unwrapped(self.model_runner.get_model()))

    def smoke_imprint(self) -> str:
        """sha256 of what the layers multiply with for adapters."""
        from rollout.transport import as_bytes

        found = hashlib.sha256()
        for tensor in stacked(self.model_runner, "a", "b"):
            found.update(memoryview(as_bytes(tensor.cpu()).numpy()))
        return found.hexdigest()

    def smoke_lose_adapters(self) -> None:
        """A fault: adapters as new memory has them, with everything that tells of them."""
        for tensor in stacked(self.model_runner, "a", "b"):
            tensor.zero_()

    def smoke_unscale(self) -> None:
        """A fault: adapters without the factor that vLLM multiplies them by when it loads them."""
        from rollout.adapter import SCALE

        for tensor in stacked(self.model_runner, "b"):
            tensor.div_(SCALE)


def stacked(runner: Any, *which: str) -> Iterator[torch.Tensor]:
    """What the layers of a runner's model hold for adapters: of "a" and "b" those asked for."""
    for _, module in sorted(runner.lora_manager._adapter_manager.modules.items()):
        for letter in which:
            found = getattr(module, f"lora_{letter}_stacked", ())
            # A tuple for the slices of a packed layer, one tensor for an embedding.
            yield from found if isinstance(found, list | tuple) else (found,)


def in_memory() -> Any:
    """The class of a request for an adapter that lies in memory, and vLLM made to take it."""
    if find_spec("verl"):
        module = import_module("verl.utils.vllm")
        module.VLLMHijack.hijack()
        return module.TensorLoRARequest
    return _ours()


_made: list[Any] = []  # once for a process: what takes the place of vLLM's method calls that one


def _ours() -> Any:
    if _made:
        return _made[0]
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class TensorLoRARequest(LoRARequest):  # type: ignore[misc]
        peft_config: Any = None
        lora_tensors: Any = None

    before = LRUCacheWorkerLoRAManager._load_adapter

    def load(manager: Any, request: Any) -> Any:
        if not isinstance(request, TensorLoRARequest):
            return before(manager, request)
        helper = PEFTHelper.from_dict(request.peft_config)
        helper.validate_legal(manager.lora_config)
        return manager._lora_model_cls.from_lora_tensors(
            lora_model_id=request.lora_int_id,
            tensors=request.lora_tensors,
            peft_helper=helper,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None),
        )

    LRUCacheWorkerLoRAManager._load_adapter = load
    _made.append(TensorLoRARequest)
    return TensorLoRARequest

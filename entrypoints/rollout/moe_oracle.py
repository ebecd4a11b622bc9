"""The oracle of a mixture of experts: which experts its router chooses, and how clearly.

An engine computes the router's logits from rounded numbers. Where two experts are nearly tied it
may choose the other one, and its answer is another one then without being wrong. So the probe of
the check `moe` is made without such ties, and this measures that there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollout import experts
from rollout.oracle import Oracle

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Routes:
    """What the routers chose for some tokens.

    ``chosen``: of each layer, how many tokens chose each expert. ``margin``: the least by which a
    logit of a chosen expert leads one of an expert that was not, over all layers and tokens.
    """

    chosen: tuple[tuple[int, ...], ...]
    margin: float

    @property
    def never(self) -> list[str]:
        """The experts that no token chose, as ``layer.expert``."""
        layers = enumerate(self.chosen)
        return [f"{n}.{e}" for n, counts in layers for e, count in enumerate(counts) if not count]


class MoeOracle(Oracle):
    """transformers' own Qwen3-MoE in float32, of a checkpoint's tensors; see :class:`Oracle`."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str = "cpu"
    ) -> None:
        # eager: expert by expert, by plain matrix products. transformers 5 would take a grouped
        # kernel where it finds one; version 4 does not know the key, and has nothing else.
        super().__init__(
            {**config, "experts_implementation": "eager"}, experts.arranged(weights), device
        )
        self._top = int(config["num_experts_per_tok"])
        self.logits: list[torch.Tensor] = []  # of each router, of the last question alone
        hooked(self._model, self.logits)

    def scores(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        scale: float = 1.0,
    ) -> list[tuple[list[float], list[float]]]:
        self.logits.clear()
        return super().scores(prompts, completions, scale)

    def routes(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Routes:
        """What the routers choose for every token of these prompts and completions."""
        import torch

        counts: list[torch.Tensor] = []
        margin = float("inf")
        for prompt, completion in zip(prompts, completions, strict=True):
            self.scores([prompt], [completion])  # one by one: nothing is filled up
            for layer, logits in enumerate(self.logits):
                ordered = logits.sort(-1, descending=True)
                chosen, values = ordered.indices[:, : self._top], ordered.values
                lead = (values[:, self._top - 1] - values[:, self._top]).min()
                margin = min(margin, float(lead))
                if len(counts) == layer:
                    counts.append(torch.zeros(logits.shape[-1], dtype=torch.long))
                counts[layer] += torch.bincount(chosen.reshape(-1).cpu(), minlength=len(counts[0]))
        return Routes(tuple(tuple(layer.tolist()) for layer in counts), margin)


def hooked(model: Any, logits: list[torch.Tensor]) -> None:
    """Have each router of a model of transformers note its logits: (tokens, experts), in order."""

    def note(_module: Any, _given: Any, answer: Any) -> None:
        # Version 5 gives the logits with what follows from them, version 4 the logits alone.
        found = answer[0] if isinstance(answer, tuple) else answer
        logits.append(found.detach().reshape(-1, found.shape[-1]))

    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(note)

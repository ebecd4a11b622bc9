"""Calibrates the instrument of the check `moe`: `python -m rollout.moe_calibrate [--size tiny]`.

What :mod:`rollout.calibrate` measures of the dense probe is measured of the mixture of experts, by
the same guarantees: the noise of bfloat16, the loss of every single tensor (of one expert's, too),
and the leads of the tokens. Beside that its routing:

- ``margin``: the least lead of a chosen expert in the oracle, in units of a router's logit;
- ``moved``: the most by which rounding to bfloat16 moves a logit;
- ``turned``: the choices of a set of experts that are another one in bfloat16;
- ``least_chosen``: by how many tokens the expert was chosen that was chosen least.

Exit code 0 when all guarantees are met, 1 when not, 2 for wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rollout import calibrate, experts, moe_probe, probe
from rollout.moe import CLEAR, PROMPTS, SEED
from rollout.moe_oracle import MoeOracle, hooked

if TYPE_CHECKING:
    import torch

# What rounding moves a router's logit by, in the least lead of a chosen expert. Other kernels round
# otherwise, so there is room for three times as much.
ROBUST = 0.1


class Engine(calibrate.Engine):
    """The mixture as an engine runs it: bfloat16, by transformers' own choice of kernels."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str = "cpu"
    ) -> None:
        super().__init__(config, experts.arranged(weights), device)
        self._parameters = experts.taken_apart(self._model.named_parameters())
        self.logits: list[torch.Tensor] = []
        hooked(self._model, self.logits)


# As many prompts as the check has: a lost expert is heard by the tokens alone that chose it.
INSTRUMENT = calibrate.Instrument(moe_probe, MoeOracle, Engine, PROMPTS)


def routing(config: Mapping[str, Any], seed: int, device: str = "cpu") -> dict[str, Any]:
    """How the routers of the probe choose in float32 and in bfloat16, for the check's prompts."""
    import torch

    weights = moe_probe.weights(config, seed)
    oracle, engine = MoeOracle(config, weights, device), Engine(config, weights, device)
    layers, top = config["num_hidden_layers"], config["num_experts_per_tok"]
    asked = probe.prompts(config, seed, PROMPTS)
    answers = []
    moved, turned, total = 0.0, 0, 0
    for prompt in asked:
        engine.logits.clear()
        tokens, _ = engine.generate([prompt], calibrate._TOKENS)[0]
        answers.append(tokens)
        oracle.scores([prompt], [tokens])
        for layer in range(layers):
            # The engine computed the prompt at once, then token by token, and never the last one.
            found = torch.cat(engine.logits[layer::layers]).float()
            right = oracle.logits[layer][:-1]
            moved = max(moved, float((found - right).abs().max()))
            one, two = (x.topk(top).indices.sort().values for x in (found, right))
            turned += int((one != two).any(-1).sum())
            total += len(right)
    routes = oracle.routes(asked, answers)
    return {
        "margin": routes.margin,
        "moved": moved,
        "turned": turned,
        "choices": total,
        "least_chosen": min(map(min, routes.chosen)),
        "chosen": [list(layer) for layer in routes.chosen],
    }


def measure(
    config: Mapping[str, Any], seed: int, repeats: int, device: str = "cpu"
) -> dict[str, Any]:
    """The calibration report of the mixture: that of the dense probe, and ``routing``."""
    report = calibrate.measure(config, seed, repeats, device, INSTRUMENT)
    return report | {"routing": routing(config, seed, device)}


def margins_hold(report: Mapping[str, Any]) -> list[str]:
    """The guarantees that a calibration report breaks, a sentence each; none when all hold."""
    return calibrate.margins_hold(report, moe_probe) + routes_hold(report["routing"])


def routes_hold(found: Mapping[str, Any]) -> list[str]:
    """The same of ``routing`` alone."""
    broken = []
    if found["turned"]:
        broken.append(
            f"In bfloat16 {found['turned']} of {found['choices']} choices of experts are others."
        )
    if not found["margin"] >= CLEAR:
        broken.append(
            f"A chosen expert leads by {found['margin']:.2f} only: at least {CLEAR} is wanted."
        )
    if not found["moved"] <= ROBUST * found["margin"]:
        broken.append(
            f"Rounding moves a router's logit by {found['moved']:.3f}, and the least lead is "
            f"{found['margin']:.2f}: at most {ROBUST:.0%} of it is wanted."
        )
    if not found["least_chosen"]:
        broken.append("An expert is chosen by no token.")
    return broken


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    routes = report["routing"]
    return (
        f"{calibrate.table(report)}\n"
        f"routing  {routes['turned']} of {routes['choices']} choices turned; least lead "
        f"{routes['margin']:.3f}, moved by {routes['moved']:.4f} at most; every expert chosen "
        f"by {routes['least_chosen']} tokens at least"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = calibrate.command_line("rollout.moe_calibrate", __doc__, "tiny or gpu")
    parser.set_defaults(seed=SEED)
    options = parser.parse_args(arguments)

    def configured() -> dict[str, Any]:
        return moe_probe.config(options.size)

    return calibrate.run(parser, options, configured, measure, table, margins_hold)


if __name__ == "__main__":
    sys.exit(main())

"""Calibrates the proof's instrument: `python -m rollout.calibrate [--size tiny] [--report FILE]`.

The probe model and the oracle are an instrument, and its bound (`rollout.oracle.BOUND_BF16`) is
worth something only if working software stays well under it and broken software goes far over it.
Three distributions show that, all of divergences as `rollout.oracle.divergence` defines them:

- noise: the right weights in bfloat16, tokens generated with a KV cache, one request at a time and
  in batches of varying company, against the float32 oracle;
- loss: the same with one tensor lost, for every tensor and every way of losing it. The engine
  generates its own tokens with the faulty weights, the oracle has the right ones;
- margin: by how much the likeliest token leads the second, against what rounding moves.

Exit code 0 when the guarantees of `margins_hold` are met, 1 when not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import info, probe
from rollout.oracle import BOUND_BF16, Oracle, divergence
from rollout.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

SCHEMA = "rollout-calibration/1"
SEED = 20260708  # of the probe that `rollout smoke` makes
WAYS = ("zeros", "default", "other seed")  # of losing a tensor

# What is guaranteed, beside the bound of 1.043.
TENFOLD = 10.0  # the loss of any tensor exceeds 1 by so many times what the bound does
NOISE_LIMIT = 1.0215  # half of what the bound allows: room for an engine's own kernels
CLEAR = 10.0  # the median lead of the top token, in units of the mean |difference|
VARIED = 4  # distinct tokens in the average completion: one repeated token would test one state

_PROMPTS = 8  # a repeat of the noise: as many prompts as a check of the smoke test has
_ALONE = 2  # of them, how many make a request of their own
_TOKENS = 12  # generated for each
_LOSS_PROMPTS = 4


class Engine:
    """The probe as an engine runs it: bfloat16, greedy, with a KV cache; by transformers."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str = "cpu"
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        make: Any = AutoModelForCausalLM.from_config  # some versions have types for it
        # The type comes from the config. Model.to(bfloat16) would round the rotary frequencies as
        # well, which no engine does and which doubles the noise (seen: 1.024 instead of 1.013).
        known = AutoConfig.for_model(**{**config, "torch_dtype": "bfloat16"})
        model = make(known, attn_implementation="sdpa")
        model.load_state_dict(dict(weights))
        self._torch = torch
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._parameters = dict(self._model.named_parameters())
        if {p.dtype for p in self._parameters.values()} != {torch.bfloat16}:
            raise RuntimeError("this version of transformers ignores the config's type")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrites one parameter."""
        self._parameters[name].copy_(tensor)

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[tuple[list[int], list[float]]]:
        """(`tokens` greedy tokens, their natural log-probabilities) of each prompt, as one batch.

        Shorter prompts are filled up before their beginning and masked there.
        """
        torch = self._torch
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(rows, device=self._device)
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._device)
        columns = torch.arange(longest + tokens, device=self._device)
        seen = (columns[None] >= pads[:, None]).long()  # attention mask up to the last token
        places = (columns[None] - pads[:, None]).clamp(min=0)
        cache = None
        begin, end = 0, longest
        chosen: list[Any] = []
        reported: list[Any] = []
        with torch.no_grad():
            for _ in range(tokens):
                out = self._model(
                    input_ids=ids,
                    attention_mask=seen[:, :end],
                    position_ids=places[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                top, ids = out.logits[:, -1].float().log_softmax(-1).max(-1, keepdim=True)
                chosen.append(ids[:, 0])
                reported.append(top[:, 0])
                begin, end = end, end + 1
        lists = zip(torch.stack(chosen, 1).tolist(), torch.stack(reported, 1).tolist(), strict=True)
        return list(lists)


@dataclass(frozen=True)
class Instrument:
    """What is calibrated: the module of a probe, its oracle, and the probe as an engine runs it."""

    probe: Any = probe
    oracle: type[Oracle] = Oracle
    engine: type[Engine] = Engine
    prompts: int = _LOSS_PROMPTS  # that each lost tensor is heard by


def measure(
    config: Mapping[str, Any],
    seed: int,
    repeats: int,
    device: str = "cpu",
    instrument: Instrument | None = None,
) -> dict[str, Any]:
    """The calibration report of the probe of `config` and `seed`: see the module's docstring.

    `repeats` is the number of noise measurements; the dense probe is the instrument where none is
    named. Raises ValueError for less than one.
    """
    if repeats < 1:
        raise ValueError("a calibration needs at least one repeat")
    import torch
    import transformers

    start = time.perf_counter()
    one = instrument or Instrument()
    weights = one.probe.weights(config, seed)
    oracle, engine = one.oracle(config, weights, device), one.engine(config, weights, device)
    noise, margin, text = _noise(config, seed, repeats, engine, oracle)
    loss = _loss(config, seed, weights, engine, oracle, one)
    weakest = min(loss, key=lambda name: min(loss[name].values()))
    least = min(loss[weakest].values())
    return {
        "schema": SCHEMA,
        "config": dict(config),
        "seed": seed,
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bound": BOUND_BF16,
        "noise": noise,
        "loss": {"min": least, "weakest": weakest, "tensors": loss},
        "margin": margin,
        "text": text,
        "ratio": (least - 1.0) / (BOUND_BF16 - 1.0),
        "seconds": round(time.perf_counter() - start, 1),
    }


def margins_hold(report: Mapping[str, Any], made: Any = probe) -> list[str]:
    """The guarantees that a calibration report breaks, a sentence each; none when all hold.

    `made` is the module of the probe that was measured.
    """
    found = []
    noise, loss, margin = report["noise"], report["loss"], report["margin"]
    if not noise["max"] <= NOISE_LIMIT:
        found.append(
            f"Correct weights diverged by {noise['max']:.4f}, which leaves no room under the bound "
            f"of {report['bound']}: at most {NOISE_LIMIT} is wanted."
        )
    least = 1.0 + TENFOLD * (report["bound"] - 1.0)
    for name in made.shapes(report["config"]):
        ways = loss["tensors"].get(name, {})
        found += [
            f"The loss of {name} as {way} was not measured." for way in WAYS if way not in ways
        ]
        found += [
            f"The loss of {name} ({way}) diverges by {value:.3f} only: at least {least:.2f}, "
            "tenfold the bound, is wanted."
            for way, value in ways.items()
            if not value >= least
        ]
    if not margin["median_in_noise"] >= CLEAR:
        found.append(
            f"The top token leads by {margin['median_in_noise']:.1f} times the noise only "
            f"(median): at least {CLEAR:.0f} is wanted."
        )
    if not report["text"]["distinct_mean"] >= VARIED:
        found.append(
            f"A completion holds {report['text']['distinct_mean']:.1f} distinct tokens on average: "
            f"at least {VARIED} are wanted."
        )
    return found


def _noise(
    config: Mapping[str, Any], seed: int, repeats: int, engine: Engine, oracle: Oracle
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(noise, margin, text) sections of the report, from the right weights."""
    divergences: list[float] = []
    deltas: list[float] = []
    margins: list[float] = []
    distinct: list[int] = []
    for repeat in range(repeats):
        prompts, batches = _company(config, seed, repeat)
        answers = [answer for batch in batches for answer in engine.generate(batch, _TOKENS)]
        scores = oracle.scores(prompts, [tokens for tokens, _ in answers])
        ours = [value for _, logprobs in answers for value in logprobs]
        theirs = [value for logprobs, _ in scores for value in logprobs]
        divergences.append(divergence(ours, theirs))
        deltas += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        margins += [value for _, leads in scores for value in leads]
        distinct += [len(set(tokens)) for tokens, _ in answers]
    unit = statistics.fmean(deltas)
    noise = {
        "repeats": repeats,
        "divergences": divergences,
        "mean": statistics.fmean(divergences),
        "max": max(divergences),
        "delta": {
            "tokens": len(deltas),
            "mean": unit,
            "p99": _part(deltas, 0.99),
            "max": max(deltas),
        },
    }
    margin = {
        "min": min(margins),
        "p01": _part(margins, 0.01),
        "median": statistics.median(margins),
        "min_in_noise": min(margins) / unit,
        "median_in_noise": statistics.median(margins) / unit,
        "share_within_noise": sum(lead < unit for lead in margins) / len(margins),
    }
    text = {
        "tokens": _TOKENS,
        "distinct_mean": statistics.fmean(distinct),
        "distinct_min": min(distinct),
    }
    return noise, margin, text


def _company(
    config: Mapping[str, Any], seed: int, repeat: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of a repeat, and the same in the batches they are sent in.

    New prompts each time; the first ones alone, at full length, the others cut to different
    lengths and divided at random, so that each meets other requests and other padding.
    """
    source = random.Random(f"{seed}/company/{repeat}")  # noqa: S311 - reproducible, not secret
    prompts = probe.prompts(config, seed + 1 + repeat, _PROMPTS)
    least = len(prompts[0]) // 3
    prompts[_ALONE:] = [p[: source.randint(least, len(p))] for p in prompts[_ALONE:]]
    batches = [[prompt] for prompt in prompts[:_ALONE]]
    cut = source.randint(_ALONE + 1, _PROMPTS)
    batches += [batch for batch in (prompts[_ALONE:cut], prompts[cut:]) if batch]
    return prompts, batches


def _loss(
    config: Mapping[str, Any],
    seed: int,
    weights: Mapping[str, torch.Tensor],
    engine: Engine,
    oracle: Oracle,
    one: Instrument,
) -> dict[str, dict[str, float]]:
    """For each tensor and each way of losing it, the divergence of the engine without it."""
    import torch

    prompts = probe.prompts(config, seed, one.prompts)
    defaults = one.probe.dummy(config)
    found: dict[str, dict[str, float]] = {}
    for name, right in weights.items():
        lost = (torch.zeros_like(right), defaults[name], one.probe.tensor(config, seed + 1, name))
        found[name] = {}
        for way, wrong in zip(WAYS, lost, strict=True):
            if way == "default" and torch.equal(wrong, lost[0]):
                found[name][way] = found[name]["zeros"]  # biases: the same by definition
                continue
            engine.put(name, wrong)
            answers = engine.generate(prompts, _TOKENS)
            scores = oracle.scores(prompts, [tokens for tokens, _ in answers])
            ours = [value for _, logprobs in answers for value in logprobs]
            theirs = [value for logprobs, _ in scores for value in logprobs]
            # strict JSON has no infinity
            found[name][way] = min(divergence(ours, theirs), sys.float_info.max)
        engine.put(name, right)
    return found


def _part(values: Sequence[float], part: float) -> float:
    """The value that `part` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def table(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    noise, loss, margin, text = (report[key] for key in ("noise", "loss", "margin", "text"))
    delta = noise["delta"]
    weakest = sorted(loss["tensors"].items(), key=lambda item: min(item[1].values()))[:5]
    lines = [
        f"noise    mean {noise['mean']:.4f}, max {noise['max']:.4f} in {noise['repeats']} repeats; "
        f"bound {report['bound']}",
        f"         per token {delta['mean']:.4f} in the mean, {delta['max']:.4f} at most",
        f"loss     min {loss['min']:.3f} of {len(loss['tensors'])} tensors, "
        f"{report['ratio']:.1f} times the bound; the weakest:",
        *(f"         {min(ways.values()):9.3f}  {name}" for name, ways in weakest),
        f"margin   median {margin['median']:.3f}, {margin['median_in_noise']:.1f} times the noise; "
        f"min {margin['min_in_noise']:.2f}; {margin['share_within_noise']:.1%} within it",
        f"text     {text['distinct_mean']:.1f} distinct tokens of {text['tokens']} on average, "
        f"{text['distinct_min']} at least",
        f"seconds  {report['seconds']}",
    ]
    return "\n".join(lines)


def command_line(module: str, about: str | None, sizes: str) -> argparse.ArgumentParser:
    """The command line of a calibration; ``sizes`` are those of its probe, for the help."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", default="tiny", help=f"size of the probe: {sizes}")
    parser.add_argument("--repeats", type=int, default=50, help="measurements of the noise")
    parser.add_argument("--seed", type=int, default=SEED, help="of the probe and its prompts")
    parser.add_argument("--device", default="cpu", help="where both models run: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="more slow a tiny model down")
    parser.add_argument("--report", type=Path, help="write the report as JSON to this file")
    return parser


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    configured: Callable[[], dict[str, Any]],
    measured: Callable[[Mapping[str, Any], int, int, str], dict[str, Any]],
    told: Callable[[Mapping[str, Any]], str],
    guarantees: Callable[[Mapping[str, Any]], list[str]],
) -> int:
    """Measure, print the table, write the report, and name broken guarantees; the exit code."""
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads take numbers from 1")
    try:
        config = configured()
        import torch

        torch.set_num_threads(options.threads)
        report = measured(config, options.seed, options.repeats, options.device)
        report |= of_image(info.prefix())
        print(told(report))
        if options.report is not None:
            _write(options.report, report)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.code
    broken = guarantees(report)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = command_line("rollout.calibrate", __doc__, "tiny or 1b")
    parser.add_argument("--no-mlp-bias", action="store_true", help="the probe for SGLang")
    options = parser.parse_args(arguments)

    def configured() -> dict[str, Any]:
        return probe.config(options.size, mlp_bias=not options.no_mlp_bias)

    return run(parser, options, configured, measure, table, margins_hold)


def of_image(prefix: Path) -> dict[str, str]:
    """Which image this is, so that no calibration is taken for another's; outside nothing."""
    try:
        found = {"lock_sha256": info.lock_sha256(prefix)}
        return {"image": str(info.image(prefix)["reference"]), **found}
    except (Problem, KeyError):
        return {}


def _write(file: Path, report: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Problem(
            f"The report cannot be written to {file} ({error}): name another.", 2
        ) from error


if __name__ == "__main__":
    sys.exit(main())

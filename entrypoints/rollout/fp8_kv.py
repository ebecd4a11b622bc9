"""The check `fp8-kv`: keys and values in 8 bits, and what becomes of their scales.

It starts an engine of its own on a checkpoint that has scales, as llm-compressor writes them, and
once more where the engine calculates them itself. Answers are judged by an oracle that rounds keys
and values by the same scales (:mod:`rollout.fp8_kv_oracle`). The scales are read from the engine
after each start, refit and wake, and compared to the bit.

The scales matter. Of a cache in floating point most factors change no more than a last bit, and a
probe with keys and values near 1 would answer the same by no scale at all. So this one has keys 64
times as large, and values 4096 times as small; what multiplies them is smaller and larger by as
much. In floating point that is the same model to the bit, and without scales its keys saturate and
its values vanish.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollout import fp8_kv_faults, probe
from rollout.backends import KV_CACHE, WEIGHTS, apart
from rollout.backends.scales import KEYS, VALUES, Scaled, Scales, side
from rollout.checks import FREED, Failed, Metrics, Trial, agree, mean_of, named, timed
from rollout.fp8_kv_oracle import KvOracle, calibrated
from rollout.oracle import BOUND_FP8

if TYPE_CHECKING:
    import torch

CHECK = "fp8-kv"
KEPT, PUT_BACK = "kept", "put-back"  # what a catalog file promises of a wake
SEED, OTHER_SEED = 20261201, 20261202
PROMPTS, SAMPLE = 8, 16
# By so much smaller logits, log-probabilities differ by so much less. As they are, right engines
# are over the bound; by a half, lost scales are not ten times over it (1.76). Measured on a CPU:
# right ones 1.040 in the worst request (tiny); 1.059 (1b) where queries and probabilities are
# rounded to 8 bits, too, played as FlashAttention 3 does it. Scales at 1.0: 2.14 and 1.87.
CALM = 0.5625
KEY_GAIN, VALUE_GAIN = 2.0**6, 2.0**-12
TENFOLD = 10.0
OLD = 8.0  # by how much the scales are others while the blocks are not: a power of two, all exact
GIVE_BACK = (
    "put the scales of every attention layer back after each wake of the KV cache, by"
    " collective_rpc, before anything is generated (docs/engines/vllm.md says how)"
)


def gained(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The probe with large keys, small values and small logits; else the same model, exactly."""
    factors = {
        ".q_proj.": 1 / KEY_GAIN,
        ".k_proj.": KEY_GAIN,
        ".v_proj.": VALUE_GAIN,
        ".o_proj.weight": 1 / VALUE_GAIN,
        "lm_head.weight": CALM,
    }
    return {
        name: next((tensor * f for part, f in factors.items() if part in name), tensor)
        for name, tensor in weights.items()
    }


def scheme() -> dict[str, Any]:
    """What llm-compressor writes into config.json where it gave scales to the KV cache alone."""
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "config_groups": {},
        "kv_cache_scheme": cache | {"dynamic": False, "observer": "minmax"},
    }


def as_tensors(scales: Scales) -> dict[str, torch.Tensor]:
    """Scales as a checkpoint has them."""
    import torch

    return {
        f"{name}.{which}_scale": torch.tensor([value], dtype=torch.bfloat16)
        for name, found in scales.items()
        for which, value in found.items()
    }


@contextmanager
def prepared(
    facts: Mapping[str, Any], transports: Sequence[str], fault: str | None
) -> Iterator[Trial]:
    """Probe, oracles, and an engine that is not started yet; it is stopped at the end.

    ``facts`` is the image.json, ``transports`` those of its refits that can be shown here.
    """
    import torch

    device = "cuda" if facts["cuda"] else "cpu"
    engine = fp8_kv_faults.wrapped(apart("fp8_kv", facts["backend"]), fault)
    config = probe.config("1b" if facts["cuda"] else "tiny", mlp_bias=engine.mlp_bias)
    if not facts["cuda"]:
        torch.set_num_threads(1)  # as in the engine's process: for a tiny model more is slower

    with tempfile.TemporaryDirectory(prefix="rollout-fp8-kv-") as folder:
        trial = made(engine, config, Path(folder), device)
        trial.sleep_levels = facts["smoke"]["sleep_levels"]
        trial.transports = transports
        try:
            yield trial
        finally:
            trial.engine.stop()


def made(engine: Scaled, config: dict[str, Any], folder: Path, device: str) -> Trial:
    """What the check works on; two checkpoints are in the folder, one of them without scales."""
    from safetensors.torch import load_file, save_file

    def weights(seed: int) -> dict[str, torch.Tensor]:
        found = gained(probe.weights(config, seed))
        return {name: tensor.to(device) for name, tensor in found.items()}

    ours, others = weights(SEED), weights(OTHER_SEED)
    oracle, other_oracle = KvOracle(config, ours, device), KvOracle(config, others, device)
    sample = probe.prompts(config, OTHER_SEED, SAMPLE)
    for one in (oracle, other_oracle):
        one.scales = calibrated(one, sample)
    probe.save(bare(folder), config, {name: tensor.cpu() for name, tensor in ours.items()})
    probe.save(folder, config | {"quantization_config": scheme()}, {})
    save_file(
        load_file(bare(folder) / "model.safetensors") | as_tensors(oracle.scales),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return Trial(
        engine=engine,
        model=folder,
        weights=ours,
        others=others,
        oracle=oracle,
        other_oracle=other_oracle,
        prompts=probe.prompts(config, SEED, PROMPTS),
        cycles=1,
        bound=BOUND_FP8,
        sleep_levels=(),
        device=device,
    )


def bare(folder: Path) -> Path:
    """Where the checkpoint without scales lies."""
    return folder / "bare"


def check(trial: Trial, promised: str) -> Metrics:
    """Scales that come with a checkpoint, then those that the engine calculates, where it can.

    ``promised`` says what the image promises of a wake: that scales are ``KEPT``, or that answers
    are right once they have been ``PUT_BACK``.
    """
    metrics = Metrics(bound=trial.bound)
    engine = cast("Scaled", trial.engine)
    level = max(trial.sleep_levels)
    metrics["start_seconds"] = timed(
        lambda: engine.start(trial.model, dummy=False, level=level),
    )
    loaded(trial, metrics)
    matter(trial, metrics)
    replaced(trial, metrics)
    for each in sorted(trial.sleep_levels):
        slept(trial, metrics, each, promised, "")
    if engine.calculates():
        calculated(trial, metrics, promised)
    return metrics


def scales_of(trial: Trial) -> Scales:
    return cast("Scaled", trial.engine).scales()


def put(trial: Trial, scales: Mapping[str, Mapping[str, float]]) -> Scales:
    """Replace the keys' and values' scales, with every copy of them; returns what is to be held."""
    wanted = {
        name: {key: scales[name].get(side(key), value) for key, value in there.items()}
        for name, there in scales_of(trial).items()
    }
    cast("Scaled", trial.engine).put(wanted)
    return wanted


def wrong(wanted: Mapping[str, Mapping[str, float]], found: Scales) -> list[str]:
    """Which of these scales an engine does not hold to the bit, and what it has instead."""
    return [
        f"{name} {key} {found.get(name, {}).get(key)}, not {value}"
        for name, there in wanted.items()
        for key, value in there.items()
        if found.get(name, {}).get(key) != value
    ]


def judge(trial: Trial, scales: Mapping[str, Mapping[str, float]], *, other: bool = False) -> Any:
    """The oracle of the first weights, or of the others, rounding by these scales."""
    found: Any = trial.other_oracle if other else trial.oracle
    found.scales = {
        name: {key: there[key] for key in (KEYS, VALUES)} for name, there in scales.items()
    }
    return found


def sides(scales: Scales, factor: float = 1.0) -> Scales:
    """The keys' and values' scales alone, times a factor."""
    return {
        name: {key: there[key] * factor for key in (KEYS, VALUES)} for name, there in scales.items()
    }


def loaded(trial: Trial, metrics: Metrics) -> None:
    """The scales of the checkpoint are in the engine, and its answers are those of the oracle.

    Raises:
        Failed: they are not.
    """
    wanted = sides(trial.oracle.scales)  # type: ignore[attr-defined]
    differing = wrong(wanted, scales_of(trial))
    metrics["layers"] = len(wanted)
    if differing:
        raise Failed(
            f"started, the engine has other scales than its checkpoint: {named(differing)}", metrics
        )
    what = "with keys and values in fp8, answers diverge from the oracle that rounds them alike"
    agree(trial.judged(trial.fresh(), judge(trial, wanted)), trial.bound, what, metrics)
    # For whoever reads the report: how far the same answers are from a cache that does not round.
    trial.oracle.scales = {}  # type: ignore[attr-defined]
    metrics["unrounded_divergence"] = trial.divergence(trial.fresh(), trial.oracle)
    judge(trial, wanted)


def matter(trial: Trial, metrics: Metrics) -> None:
    """Scales are used, and blocks are read by the scales of now.

    Controls: blocks of other scales must be seen to be stale where nobody resets the prefix cache;
    with all scales at 1.0 answers must be ten times over the bound.

    Raises:
        Failed: they are not, or with a reset answers are those of the old blocks still.
    """
    first = sides(scales_of(trial))
    expected = trial.fresh()
    others = sides(first, OLD)
    held(trial, put(trial, others), "put into the engine, scales", metrics)
    metrics["stale_divergence"] = trial.divergence(trial.alone(), judge(trial, others))
    if metrics["stale_divergence"] <= trial.bound:
        raise Failed("control: blocks of other scales were not read, or changed nothing", metrics)
    what = "with other scales and the prefix cache reset, answers are of the old ones still"
    agree(trial.judged(trial.fresh(), judge(trial, others)), trial.bound, what, metrics, "moved_")
    held(trial, put(trial, none(first)), "put into the engine, scales of 1.0", metrics)
    metrics["control_divergence"] = trial.divergence(trial.fresh(), judge(trial, first))
    least = 1 + TENFOLD * (trial.bound - 1)
    if not metrics["control_divergence"] >= least:
        raise Failed(f"control: without scales answers are not over {least:.2f}", metrics)
    held(trial, put(trial, first), "put back, scales", metrics)
    if trial.fresh() != expected:
        raise Failed("with the first scales back the output is another", metrics)


def none(scales: Scales) -> Scales:
    """Scales that are none."""
    return {name: {KEYS: 1.0, VALUES: 1.0} for name in scales}


def held(trial: Trial, wanted: Scales, what: str, metrics: Metrics) -> None:
    """Hold what the engine has to what it was given.

    Raises:
        Failed: it has something else.
    """
    differing = wrong(wanted, scales_of(trial))
    if differing:
        raise Failed(f"{what} are not held: {named(differing)}", metrics)


def replaced(trial: Trial, metrics: Metrics) -> None:
    """New weights with scales of their own, and the first ones again.

    Control: the oracle of the weights before must disagree.

    Raises:
        Failed: a scale is not held, answers diverge, or the first ones do not come back.
    """
    before, expected = scales_of(trial), trial.fresh()
    metrics["refit_seconds"] = timed(lambda: trial.send(trial.weights))
    after = scales_of(trial)
    metrics["refit"] = changed(before, after) or KEPT
    if metrics["refit"] != KEPT:
        held(trial, put_all(trial, before), "put back after a refit, scales", metrics)
    if trial.fresh() != expected:
        raise Failed("the same weights, sent again, give another output", metrics)
    theirs = sides(trial.other_oracle.scales)  # type: ignore[attr-defined]
    trial.send(trial.others)
    held(trial, put(trial, theirs), "in a refit, scales that were sent", metrics)
    found = trial.fresh()
    what = "refitted, answers diverge from the oracle that rounds alike"
    agree(
        trial.judged(found, judge(trial, theirs, other=True)), trial.bound, what, metrics, "other_"
    )
    metrics["stranger_divergence"] = mean_of(trial.judged(found, judge(trial, sides(before))))
    if metrics["stranger_divergence"] <= trial.bound:
        raise Failed("control: with other weights sent, the first explain the output", metrics)
    trial.send(trial.weights)
    held(trial, put_all(trial, before), "in a refit, the first scales", metrics)
    if trial.fresh() != expected:
        raise Failed("the first weights and scales do not bring the first output back", metrics)


def put_all(trial: Trial, scales: Scales) -> Scales:
    """Put everything back as it was read."""
    cast("Scaled", trial.engine).put(scales)
    return scales


def slept(trial: Trial, metrics: Metrics, level: int, promised: str, form: str) -> None:
    """Sleep, wake as trainers do, look at the scales, and judge the answers.

    From level 2 the weights are sent between the two wakes, and no scales: they are the engine's.

    Raises:
        Failed: scales are others, where the image promises that they are not; they cannot be put
            back; or answers are others.
    """
    engine, at = cast("Scaled", trial.engine), f"{form}level {level}"
    before, expected = engine.scales(), trial.fresh()
    held_bytes = engine.held()
    engine.sleep(level)
    trial.train(int(FREED * held_bytes))
    engine.wake((WEIGHTS,))
    if level == 2:
        trial.send(trial.weights)
    engine.wake((KV_CACHE,))
    what = changed(before, engine.scales())
    key = f"{form.strip().replace(' ', '_')}_wake_{level}".strip("_")
    metrics[key] = what or KEPT
    if what:
        what += " by the sleep, the refit and the wake" if level == 2 else " by the wake"
        if promised == KEPT:
            raise Failed(f"{at}: {what} in this version; {GIVE_BACK}", metrics)
        held(trial, put_all(trial, before), f"{at}: {what}, and put back scales", metrics)
    found = trial.fresh()
    why = (
        f"{at}: awake, with the scales of before, answers diverge from the oracle that rounds alike"
    )
    agree(trial.judged(found, judge(trial, before)), trial.bound, why, metrics, f"{key}_")
    if found != expected:
        raise Failed(f"{at}: awake, with the scales of before, the output is another", metrics)


def changed(before: Scales, after: Scales) -> str:
    """What became of scales, in words; empty where each is what it was to the bit."""
    differing = {
        key: {after[name].get(key) for name in before}
        for there in before.values()
        for key in there
        if any(after[name].get(key) != before[name].get(key) for name in before)
    }
    if not differing:
        return ""
    names = ", ".join(sorted(differing))
    values = set().union(*(differing[key] for key in differing if key in (KEYS, VALUES)))
    if values == {1.0}:
        return f"calibrated scales are reset to 1.0 ({names})"
    if values == {0.0}:
        return f"calibrated scales are lost, and 0.0 ({names})"
    rest = sorted(str(value) for found in differing.values() for value in found)
    return f"scales are changed ({names}: {named(rest)})"


def calculated(trial: Trial, metrics: Metrics, promised: str) -> None:
    """A second start, on a checkpoint without scales: the engine calculates them.

    Raises:
        Failed: it did not, its answers diverge, or what :func:`slept` says.
    """
    engine = cast("Scaled", trial.engine)
    engine.stop()
    engine.calculate()
    level = max(trial.sleep_levels)
    engine.start(bare(trial.model), dummy=False, level=level)
    engine.generate(trial.prompts[:1], 1)  # what they are calculated from
    found = engine.scales()
    values = [there[key] for there in found.values() for key in (KEYS, VALUES)]
    if not all(math.isfinite(value) and value > 0 for value in values) or 1.0 in values:
        raise Failed(f"scales were not calculated: {named([str(v) for v in values])}", metrics)
    metrics["calculated"] = values
    what = "with scales that it calculated, answers diverge from the oracle that rounds alike"
    agree(
        trial.judged(trial.fresh(), judge(trial, found)), trial.bound, what, metrics, "calculated_"
    )
    trial.send(trial.weights)
    metrics["calculated_refit"] = changed(found, engine.scales()) or KEPT
    if metrics["calculated_refit"] != KEPT:
        held(trial, put_all(trial, found), "put back after a refit, scales", metrics)
    for each in sorted(trial.sleep_levels):
        slept(trial, metrics, each, promised, "calculated ")

"""flash-attn, where it was added: its attention and its gradient against torch's own.

    rollout python3 -m rollout.attention [--report FILE] [--only TEXT]

No image has flash-attn (docs/adding.md says how to add it). verl takes four things of it: attention
of whole batches, attention of packed sequences, the padding around those, and a cross entropy that
its log-probabilities come from. Each is compared here with torch in float32 on the same numbers.

How far apart they may be is measured too: the same formula in the short type has an error of its
own, which no kernel can be asked to undercut. A kernel may have twice that error in its output and
three times in its gradients (what flash-attn's own tests ask of it), and one rounding of the
largest number. Comparisons that must not hold come first: a mask that is forgotten, heads that are
grouped otherwise, a sequence that is cut one token too late, gradients of keys and values that are
exchanged, labels that are shifted.

Exit codes: 0 all hold, 1 one does not, or a wrong one went unnoticed; 3 there is nothing to compare
(no flash-attn, no GPU).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OUTPUT, GRADIENT = 2.0, 3.0  # times the error of the same formula in the short type
SLACK = 1e-5  # where that error is nothing: sums of zeros
TENSORS = ("out", "dq", "dk", "dv")
# Every kernel that is compiled has a dimension of heads of its own; 80 is padded to one.
DIMENSIONS = (32, 64, 80, 96, 128, 192, 256)
TYPES = ("bfloat16", "float16")
LENGTHS = (1, 63, 64, 129, 500)  # of packed sequences, around the blocks of the kernels
VOCABULARY = 5003  # no multiple of any block


@dataclass(frozen=True)
class Case:
    """One comparison: what is asked of flash-attn."""

    type: str
    dimension: int
    causal: bool = True
    heads: int = 4
    groups: int = 4  # heads of keys and values
    queries: int = 257
    keys: int = 257
    packed: bool = False

    @property
    def name(self) -> str:
        """For a report."""
        kind = "packed" if self.packed else f"{self.queries}x{self.keys}"
        mask = "causal" if self.causal else "full"
        return f"{self.type} {self.dimension} {mask} {self.heads}/{self.groups} {kind}"


@dataclass
class Compared:
    """How one comparison ended: per tensor the error, and what it may be."""

    name: str
    errors: dict[str, float]
    bounds: dict[str, float]
    wrong: str = ""  # what was made wrong on purpose

    @property
    def holds(self) -> bool:
        """Whether every error is within its bound; what is not a number is in none."""
        return all(self.errors[name] <= bound for name, bound in self.bounds.items())


@dataclass
class Report:
    """What is written: every number, so that a reader can judge the bounds too."""

    versions: dict[str, str]
    device: str
    only: str = ""  # what was asked for, where that is not everything
    compared: list[Compared] = field(default_factory=list)
    controls: list[Compared] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Each comparison that does not hold, and each control that does."""
        broken = [
            f"{one.name}: {name} is {one.errors[name]:.2e} off, and may be {bound:.2e}"
            for one in self.compared
            for name, bound in one.bounds.items()
            if not one.errors[name] <= bound
        ]
        return broken + [
            f"{one.name}: nobody notices {one.wrong}" for one in self.controls if one.holds
        ]


def cases() -> Iterator[Case]:
    """What is compared: each dimension, type and mask; then groups, lengths, packed sequences."""
    for type_ in TYPES:
        for dimension in DIMENSIONS:
            for causal in (True, False):
                yield Case(type_, dimension, causal)
                yield Case(type_, dimension, causal, packed=True, groups=2)
        for groups in (1, 2):
            yield Case(type_, 128, True, groups=groups)
            yield Case(type_, 64, False, groups=groups)
        yield Case(
            type_, 128, True, queries=65, keys=513
        )  # a part of an answer: the mask is at its end
        yield Case(type_, 128, True, queries=2048, keys=2048, heads=8, groups=2)


# The formula --------------------------------------------------------------------------------------


def mask(case: Case, queries: int, keys: int, torch: Any, device: str) -> Any:
    """Which keys a query sees; the last query sees the last key."""
    if not case.causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    rows = torch.arange(queries, device=device)[:, None] + keys - queries
    return torch.arange(keys, device=device)[None, :] <= rows


def grouped(x: Any, heads: int) -> Any:
    """Keys or values (batch, sequence, groups, dimension) for each head: neighbours share one."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def formula(q: Any, k: Any, v: Any, seen: Any, torch: Any) -> Any:
    """Attention as it is written down, every step in the type of its arguments."""
    k, v = grouped(k, q.shape[2]), grouped(v, q.shape[2])
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def own(q: Any, k: Any, v: Any, seen: Any, torch: Any) -> Any:
    """torch's own attention, by its exact way: a fast one may round float32 on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    k, v = grouped(k, q.shape[2]), grouped(v, q.shape[2])
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=seen)
    return found.transpose(1, 2)


def differentiated(
    attend: Callable[..., Any], leaves: Sequence[Any], weight: Any, torch: Any
) -> dict[str, Any]:
    """An output and its gradients, in float32; ``weight`` is the gradient that comes in."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, weight.to(out.dtype))
    return {name: x.float() for name, x in zip(TENSORS, (out.detach(), *gradients), strict=True)}


def distances(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each tensor."""
    return {name: (x - reference[name]).abs().max().item() for name, x in found.items()}


def bounds(short: dict[str, float], largest: dict[str, float], step: float) -> dict[str, float]:
    """What each error may be: ``short`` is that of the formula in the short type.

    ``step`` is the distance of that type's numbers at 1, ``largest`` what a tensor reaches.
    """
    times = {name: OUTPUT if name == TENSORS[0] else GRADIENT for name in short}
    return {
        name: times[name] * error + step / 2 * largest[name] + SLACK
        for name, error in short.items()
    }


# Attention ----------------------------------------------------------------------------------------


def numbers(case: Case, torch: Any, device: str) -> tuple[list[Any], Any]:
    """Queries, keys and values of a case, and the gradient that comes in: from a seed."""
    generator = torch.Generator(device="cpu").manual_seed(case.dimension * 1009 + case.groups)
    type_ = getattr(torch, case.type)
    queries = sum(LENGTHS) if case.packed else case.queries
    keys = queries if case.packed else case.keys
    batch = 1 if case.packed else 2
    shapes = (
        *((batch, queries, case.heads, case.dimension), (batch, keys, case.groups, case.dimension)),
        *((batch, keys, case.groups, case.dimension), (batch, queries, case.heads, case.dimension)),
    )
    *leaves, weight = (
        torch.randn(shape, generator=generator).to(device=device, dtype=type_) for shape in shapes
    )
    return leaves, weight


def by_flash(
    case: Case, flash: Any, torch: Any, device: str, lengths: Sequence[int] = LENGTHS
) -> Callable[..., Any]:
    """flash-attn's function for a case, with the arguments of :func:`own`'s order."""
    if not case.packed:
        return lambda q, k, v: flash.flash_attn_func(q, k, v, causal=case.causal)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)

    def attend(q: Any, k: Any, v: Any) -> Any:
        arguments = (q[0], k[0], v[0], ends, ends, longest, longest)
        return flash.flash_attn_varlen_func(*arguments, causal=case.causal)[None]

    return attend


def by_torch(case: Case, attend: Callable[..., Any], torch: Any, device: str) -> Callable[..., Any]:
    """The same by a function of torch: packed sequences one by one."""

    def whole(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, mask(case, q.shape[1], k.shape[1], torch, device), torch)

    if not case.packed:
        return whole

    def each(q: Any, k: Any, v: Any) -> Any:
        parts = zip(*(x.split(list(LENGTHS), dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([whole(*part) for part in parts], dim=1)

    return each


def judged(case: Case, found: dict[str, Any], torch: Any, device: str, wrong: str = "") -> Compared:
    """What was found, against torch in float32, within what the short type costs."""
    leaves, weight = numbers(case, torch, device)
    reference = differentiated(
        by_torch(case, own, torch, device), [leaf.float() for leaf in leaves], weight.float(), torch
    )
    short = differentiated(by_torch(case, formula, torch, device), leaves, weight, torch)
    largest = {name: x.abs().max().item() for name, x in reference.items()}
    step = torch.finfo(getattr(torch, case.type)).eps
    allowed = bounds(distances(short, reference), largest, step)
    return Compared(case.name, distances(found, reference), allowed, wrong)


def compare(case: Case, flash: Any, torch: Any, device: str) -> Compared:
    """flash-attn's answer to a case, judged."""
    attend = by_flash(case, flash, torch, device)
    found = differentiated(attend, *numbers(case, torch, device), torch)
    return judged(case, found, torch, device)


def controls(flash: Any, torch: Any, device: str) -> Iterator[Compared]:
    """Comparisons that must not hold, each of them wrong in one thing."""
    plain = Case("bfloat16", 128, groups=2)
    packed = Case("bfloat16", 64, groups=2, packed=True)
    right = by_flash(plain, flash, torch, device)
    blind = by_flash(replace(plain, causal=False), flash, torch, device)
    late = by_flash(
        packed, flash, torch, device, (LENGTHS[0], LENGTHS[1] + 1, LENGTHS[2] - 1, *LENGTHS[3:])
    )
    order = [0, 2, 1, 3]

    def mixed(q: Any, k: Any, v: Any) -> Any:
        return right(q[:, :, order], k, v)[:, :, order]

    for case, attend, wrong in (
        (plain, blind, "a mask that is forgotten"),
        (plain, mixed, "heads that are grouped otherwise"),
        (packed, late, "a sequence that is cut one token too late"),
        (plain, right, "gradients of keys and values that are exchanged"),
    ):
        found = differentiated(attend, *numbers(case, torch, device), torch)
        if attend is right:
            found["dk"], found["dv"] = found["dv"], found["dk"]
        yield judged(case, found, torch, device, wrong)


# What verl takes of it beside attention -----------------------------------------------------------


def padding(package: Any, torch: Any, device: str) -> Compared:
    """Padding out and in again: what is not masked comes back, in its place, with its gradient."""
    generator = torch.Generator(device="cpu").manual_seed(11)
    x = torch.randn(5, 70, 3, 8, generator=generator).to(device).requires_grad_()
    lengths = torch.tensor([70, 1, 33, 64, 7], device=device)
    # verl pads prompts on the left and answers on the right; the first two rows are the former.
    place = torch.arange(70, device=device)[None]
    left = torch.arange(5, device=device)[:, None] < 2
    kept = torch.where(left, place >= 70 - lengths[:, None], place < lengths[:, None])
    rows, indices, ends, longest, *_ = package.unpad_input(x, kept)
    again = package.pad_input(rows, indices, 5, 70)
    weight = torch.randn(again.shape, generator=generator).to(device)
    (gradient,) = torch.autograd.grad(again, x, weight)
    wanted = kept[..., None, None].float()
    flat = package.rearrange(x, "b s h d -> (b s) h d")
    errors = {
        "padded": (again - x * wanted).abs().max().item(),
        "gradient": (gradient - weight * wanted).abs().max().item(),
        "rows": (rows - package.index_first_axis(flat, indices)).abs().max().item(),
        "ends": (ends - torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])).abs().max().item(),
        "longest": abs(int(longest) - 70),
    }
    return Compared("padding", {k: float(v) for k, v in errors.items()}, dict.fromkeys(errors, 0.0))


def cross_entropy(
    function: Callable[..., Any], type_: str, torch: Any, device: str, shift: int = 0
) -> Compared:
    """Log-probabilities of labels and their gradient, as verl computes them where flash-attn is."""
    generator = torch.Generator(device="cpu").manual_seed(7)
    logits = (4 * torch.randn(97, VOCABULARY, generator=generator)).to(
        device=device, dtype=getattr(torch, type_)
    )
    labels = torch.randint(VOCABULARY, (97,), generator=generator).to(device)
    weight = torch.randn(97, generator=generator).to(device)

    def differentiate(logits: Any, compute: Callable[[Any], Any]) -> tuple[Any, Any]:
        leaf = logits.detach().clone().requires_grad_()
        out = compute(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, weight.to(out.dtype))
        return out.detach().float(), gradient.float()

    def plain(leaf: Any) -> Any:
        return torch.log_softmax(leaf.float(), dim=-1).gather(-1, labels[:, None])[:, 0]

    def fast(leaf: Any) -> Any:
        losses, *_ = function(leaf, labels.roll(shift))
        return -losses

    reference, found = differentiate(logits, plain), differentiate(logits, fast)
    names = ("log-probabilities", "gradient")
    errors = {
        name: (a - b).abs().max().item() for name, a, b in zip(names, found, reference, strict=True)
    }
    # The first is a number in float32. The second goes back into the type of the logits.
    steps = torch.finfo(getattr(torch, type_)).eps * weight.abs().max().item()
    allowed = {names[0]: 1e-4, names[1]: steps}
    wrong = "labels that are shifted" if shift else ""
    return Compared(f"cross entropy {type_}", errors, allowed, wrong)


# The whole ----------------------------------------------------------------------------------------


def run(
    torch: Any,
    flash: Any,
    package: Any,
    entropy: Callable[..., Any],
    device: str,
    say: Callable[[str], None],
    only: str = "",
) -> Report:
    """Everything: controls first, since a comparison that finds nothing says nothing."""
    import importlib.metadata as metadata

    torch.backends.cuda.matmul.allow_tf32 = False  # torch's default; float32 is to be float32 here
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    try:
        versions["flash-attn"] = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        versions["flash-attn"] = str(getattr(flash, "__version__", "unknown"))
    name = "cpu"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    report, started = Report(versions, name, only), time.monotonic()
    shifted = cross_entropy(entropy, TYPES[0], torch, device, shift=1)
    for control in (*controls(flash, torch, device), shifted):
        report.controls.append(control)
        seen = "goes UNNOTICED" if control.holds else "is found"
        say(f"control   {control.name}: {control.wrong} {seen}")

    def note(one: Compared) -> None:
        report.compared.append(one)
        numbers = " ".join(f"{k} {v:.1e}/{one.bounds[k]:.1e}" for k, v in one.errors.items())
        say(f"{'holds' if one.holds else 'FAILS':<10}{one.name}: {numbers}")

    for case in cases():
        if only in case.name:
            note(compare(case, flash, torch, device))
    note(padding(package, torch, device))
    for type_ in TYPES:
        note(cross_entropy(entropy, type_, torch, device))
    report.seconds = round(time.monotonic() - started, 1)
    return report


def written(report: Report) -> dict[str, Any]:
    """The report as JSON values. A part of the comparisons alone proves nothing."""
    failures = report.failures
    verdict = "failed" if failures else "unproved" if report.only else "passed"
    found = {"schema": "rollout-attention/1", "verdict": verdict, "failures": failures}
    return {**found, **asdict(report)}


def main(arguments: Sequence[str]) -> int:
    """``rollout python3 -m rollout.attention [--report FILE] [--only TEXT]``."""
    parser = argparse.ArgumentParser(
        prog="rollout.attention", description="flash-attn against torch"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write every number as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tests")
    given = parser.parse_args(list(arguments))
    try:
        import flash_attn
        import torch
        from flash_attn import bert_padding
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    except ImportError as error:
        why = f"flash-attn cannot be imported ({error})"
        print(f"attention: {why}; docs/adding.md says how to add it", file=sys.stderr)
        return 3
    if given.device == "cuda" and not torch.cuda.is_available():
        print("attention: there is no GPU here; give the container one", file=sys.stderr)
        return 3
    report = run(
        torch,
        flash_attn,
        bert_padding,
        cross_entropy_loss,
        given.device,
        lambda line: print(line, flush=True),
        given.only,
    )
    data = written(report)
    if given.report:
        given.report.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for line in data["failures"]:
        print(line, file=sys.stderr)
    count = f"{len(report.compared)} comparisons, {len(report.controls)} controls"
    print(
        f"attention: {data['verdict']} ({count}) in {report.seconds} s on {report.device}",
        flush=True,
    )
    return 1 if data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the checks promise of themselves: what they ask for, and what they refuse to pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rollout import checks
from rollout.backends import Completion
from rollout.checks import Failed, Trial
from rollout.oracle import BOUND_FP8
from rollout.transport import as_bytes

HEAD = "lm_head.weight"
WEIGHTS = {"body": 2.0, HEAD: 4.0}
OTHERS = {"body": 3.0, HEAD: 4.0}


class Toy:
    """An engine whose weights are two numbers and whose log-probability is their product."""

    device = "paper"
    transports = ("paper",)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.begins = {"body": 0.0, HEAD: 0.0}  # dummy weights
        self.weights: dict[str, Any] | None = None
        self.noise = 0.0
        self.takes = 9  # so many refits; those that follow do nothing
        self.asleep = False

    def start(self, _: Path, *, dummy: bool, fp8: bool = False) -> None:
        self.calls.append(f"start dummy={dummy} fp8={fp8}")
        self.weights = dict(self.begins)

    def generate(self, prompts: Sequence[Sequence[int]], _: int) -> list[Completion]:
        assert self.weights is not None and not self.asleep
        value = -self.weights["body"] * self.weights[HEAD] + self.noise
        return [Completion((1,), (value,)) for _ in prompts]

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.asleep = True
        if level == 2:
            self.weights = dict(self.begins)

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        self.asleep = False

    def refit(self, tensors: Iterable[tuple[str, Any]]) -> int:
        self.calls.append("refit")
        if self.takes > 0:
            self.weights = dict(tensors)
        self.takes -= 1
        return 8

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def digests(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.weights or {}).items()}

    def held(self) -> int:
        return 100

    def memory(self) -> int:
        return 0 if self.asleep else 100

    def stop(self) -> None:
        self.calls.append("stop")
        self.weights = None


class Judge:
    """The oracle of the toy."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def logprobs(self, _: object, completion: Sequence[int], scale: float = 1.0) -> list[float]:
        return [-self.weights["body"] * self.weights[HEAD] * scale] * len(completion)


def trial(engine: Any, others: dict[str, float] = OTHERS, **changes: Any) -> Trial:
    """Like the proof's own, on two numbers; ``Any`` stands for tensors."""
    weights: Any = dict(WEIGHTS)
    second: Any = dict(others)
    judges: Any = (Judge(weights), Judge(second))
    settings: dict[str, Any] = {"sleep_levels": [1, 2], "calm": 0.25} | changes
    return Trial(engine, Path("/m"), weights, second, *judges, [[1], [2]], 4, 1.043, **settings)


# which tensors differ


def test_the_trainers_digests_are_computed_once_for_each_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(checks, "digest", lambda value: asked.append(value) or str(value))
    toy = Toy()
    toy.weights = dict(WEIGHTS)
    here = trial(toy)
    for _ in range(3):
        assert here.differing(here.weights) == []
        assert here.differing(here.others) == ["body"]
    assert sorted(asked) == sorted([*WEIGHTS.values(), *OTHERS.values()])


def test_what_the_engine_holds_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "digest", str)
    toy = Toy()
    here = trial(toy)
    assert here.differing(here.weights) == ["body", HEAD], "an engine without weights has none"
    toy.weights = {"body": 2.0, "more": 1.0}
    assert here.differing(here.weights) == [HEAD]
    toy.weights = {**WEIGHTS, "more": 1.0}
    assert here.differing(here.weights) == []


# weights in fp8


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each training step, which is none."""
    sizes: list[int] = []
    monkeypatch.setattr(checks.Trial, "train", lambda _, size: sizes.append(size))
    return sizes


def test_an_engine_in_fp8_is_started_refitted_put_to_sleep_and_refitted(
    trained: list[int],
) -> None:
    toy = Toy()
    metrics = checks.fp8(trial(toy))
    assert [call for call in toy.calls if call != "reset"] == [
        *("stop", "start dummy=True fp8=True", "refit", "refit"),
        *("sleep 2", "wake weights", "refit", "wake kv_cache"),
    ]
    assert toy.calls[-1] == "reset", "what a cache holds is of no weights that are there now"
    assert toy.weights == {"body": 2.0, HEAD: 1.0}, "the lm_head is sent smaller"
    assert trained == [90]
    assert metrics["divergence"] == metrics["other_divergence"] == 1.0
    assert metrics["freed_fraction"] == 1.0
    assert metrics["stranger_divergence"] > metrics["bound"] == BOUND_FP8


def test_the_bound_is_asked_of_the_model_that_was_sent() -> None:
    here = trial(Toy(), calm=1.0)
    assert here.calmed(here.weights) == WEIGHTS
    here = trial(Toy(), calm=0.25)
    assert here.calmed(here.weights) == {"body": 2.0, HEAD: 1.0}
    assert here.weights == WEIGHTS, "the other checks have their own"
    answer = [Completion((1,), (-2.0,))] * 2
    assert here.divergence(answer, here.oracle, here.calm) == 1.0
    assert here.divergence(answer, here.oracle) > 100


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("change", "others", "reason"),
    [
        ({"begins": {"body": 2.0, HEAD: 1.0}}, OTHERS, "control: the engine had the weights"),
        ({}, WEIGHTS, "control: the oracle of other weights agrees"),
        ({"noise": 0.1}, OTHERS, "weights in fp8 diverge"),
        ({"takes": 0}, OTHERS, "weights in fp8 diverge"),
        ({"takes": 1}, OTHERS, "weights in fp8 diverge"),
        ({"takes": 2}, OTHERS, "after sleeping and a refit the output is another"),
    ],
    ids=[
        *("filled before", "one set twice", "too coarse", "no refit", "no second refit"),
        "no refit after sleep",
    ],
)
def test_an_engine_in_fp8_that_is_wrong_is_not_passed(
    change: dict[str, Any], others: dict[str, float], reason: str
) -> None:
    toy = Toy()
    vars(toy).update(change)
    with pytest.raises(Failed, match=f"^{reason}"):
        checks.fp8(trial(toy, others))


# tensors (with torch: inside the images)


def test_a_digest_is_of_the_bytes_in_their_order(torch: Any) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(torch.bfloat16)
    expected = hashlib.sha256(bytes(as_bytes(tensor).numpy())).hexdigest()
    assert checks.digest(tensor) == expected
    turned = tensor.t()
    assert checks.digest(turned) != expected
    assert checks.digest(turned.t()) == expected
    assert checks.digest(torch.nn.Parameter(tensor)) == expected


def test_the_size_of_weights_is_in_bytes(torch: Any) -> None:
    weights = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}
    assert checks.size_of(weights) == 3 * 5 * 2 + 7 * 4


def test_a_training_step_fills_what_it_takes_and_gives_it_back(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    full, made = torch.full, []

    def remembers(*arguments: Any, **options: Any) -> Any:
        tensor = full(*arguments, **options)
        assert tensor.ne(0).all()
        made.append((tensor.numel() * tensor.element_size(), tensor.device.type))
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "full", remembers)
    trial(Toy(), device="cpu").train(1000)
    assert made[0] == (1000, "cpu")
    assert made[1]() is None


@pytest.mark.usefixtures("torch")
def test_the_yardsticks_of_copies_are_measured_where_the_weights_lie() -> None:
    rates = [checks.copy_bandwidth("cpu", 1 << 16), *checks.host_bandwidths("cpu", 1 << 16)]
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates)

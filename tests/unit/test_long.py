"""What the check of long sequences promises: where it looks, what it finds, and what it names."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import backends, checks, faults, long, probe
from rollout.backends import Completion
from rollout.checks import Failed
from rollout.faults import FAULTS, Faulty
from rollout.long import ANSWER, Judged
from rollout.oracle import BOUND_BF16
from rollout.problem import Problem

LONGEST = st.integers(1024, 1 << 17)

# where it looks


@given(LONGEST)
def test_the_bands_cover_every_position_once_and_each_begins_at_twice_the_one_before(
    longest: int,
) -> None:
    found = long.edges(longest)
    assert (found[0], found[-1]) == (0, longest)
    assert all(low < high for low, high in pairwise(found))
    assert all(high == 2 * low for low, high in pairwise(found[1:-1]))


@given(LONGEST)
def test_every_band_has_answers_inside_and_across_each_of_its_bounds(longest: int) -> None:
    edges, found = long.edges(longest), long.lengths(longest)
    spans = [(length, length + ANSWER) for length in found]
    for low, high in pairwise(edges):
        inside = sum(max(0, min(end, high) - max(begin, low)) for begin, end in spans)
        assert inside >= ANSWER, "no band is judged by a few tokens"
    for bound in edges[1:-1]:
        assert any(begin < bound < end for begin, end in spans)
    assert found[0] == max(found) == longest - ANSWER - long.SPARE


def test_answers_begin_at_no_multiple_of_a_block_in_the_middle_of_a_band() -> None:
    assert [length for length in long.lengths(16384) if length % 2] == [
        *(12289, 6145, 3073, 1537, 769, 257)
    ]


@given(st.integers(1024, 1 << 17), st.integers(1, 64))
def test_what_is_asked_for_at_once_fits_into_the_cache(longest: int, requests: int) -> None:
    asked = long.lengths(longest)
    capacity = longest + longest // 8
    found = long.groups(asked, capacity, requests)
    assert sorted(number for group in found for number in group) == list(range(len(asked)))
    for group in found:
        assert len(group) <= requests
        need = sum(asked[number] + ANSWER + long.ROUNDED for number in group)
        assert len(group) == 1 or need <= capacity


@given(st.integers(4096, 1 << 20), st.integers(2, 64))
def test_a_crowd_begins_together_and_then_needs_more_than_there_is(
    capacity: int, requests: int
) -> None:
    prompts, tokens = long.pressure(capacity, requests)
    assert len(prompts) == requests
    assert min(prompts) >= 1
    assert sum(prompts) <= 0.9 * capacity + requests, "all of them fit side by side"
    # Before the first ends, each has all tokens but one, and some of them are too many.
    assert sum(prompts) + (tokens - 1) * requests > capacity


@pytest.mark.parametrize("name", ["transformers", "vllm", "sglang"])
def test_what_each_engine_is_set_to_makes_chunks_and_a_crowd(name: str) -> None:
    module = importlib.import_module(f"rollout.backends.long_{name}")
    assert module.CHUNK * 4 <= module.LONGEST
    assert module.CHUNK in long.edges(module.LONGEST), "what begins behind a chunk begins a band"
    assert module.LONGEST // 4 in long.edges(module.LONGEST)
    assert module.CACHE_TOKENS > module.LONGEST, "the longest request fits"
    requests = getattr(module, "REQUESTS", 16)
    prompts, tokens = long.pressure(module.CACHE_TOKENS, requests)
    assert max(prompts) + tokens < module.LONGEST
    overflow = sum(prompts) + tokens * requests - module.CACHE_TOKENS
    assert overflow > max(prompts) + tokens, "more than one request is preempted"
    rounded = sum(-(-prompt // 64) * 64 for prompt in prompts)
    assert rounded <= module.CACHE_TOKENS, "whatever the size of a block, up to 64"


def test_every_backend_that_can_has_its_module_and_says_so() -> None:
    for name in ("transformers", "vllm", "sglang"):
        can = backends.abilities(name)
        assert can and can.long
        assert importlib.util.find_spec(f"rollout.backends.long_{name}")


# what it names


def answer(begin: int, off: Sequence[float], shifted: float = 5.0) -> Judged:
    """An answer that is so far off, token by token."""
    ours = [-1.0 - value for value in off]
    return Judged(begin, ours, [-1.0] * len(ours), [-1.0 - shifted] * len(ours))


def test_tokens_are_judged_in_the_band_of_their_own_position() -> None:
    found = long.bands([answer(510, [0.0, 0.0, 3.0, 3.0])], 4096)
    assert [(band.low, band.high, band.tokens) for band in found] == [(0, 512, 2), (512, 1024, 2)]
    assert [band.within(BOUND_BF16) for band in found] == [True, False]


def test_one_wrong_request_among_many_right_ones_is_seen() -> None:
    right = [answer(600, [0.0] * 512) for _ in range(99)]
    found = long.bands([*right, answer(600, [0.5] * 8)], 1024)
    assert found[0].mean < BOUND_BF16 < found[0].worst


def test_a_token_that_is_no_number_is_in_no_band() -> None:
    found = long.bands([answer(100, [0.0, math.nan])], 1024)
    assert not found[0].within(BOUND_BF16)
    assert long.told(found, found)[0]["divergence"] is None, "a report holds numbers alone"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), ""),
        ((2048,), "positions 2048 to 4095 differ by 2.718, where 1.043 is the most; "),
        (
            (512, 2048),
            "positions 512 to 1023 differ by 2.718, positions 2048 to 4095 differ by 2.718, ",
        ),
    ],
)
def test_a_fault_is_named_by_the_positions_that_differ(wrong: tuple[int, ...], said: str) -> None:
    begins = (0, 512, 1024, 2048)
    answers = [answer(begin, [1.0 if begin in wrong else 0.0] * 8) for begin in begins]
    found = long.named(long.bands(answers, 4096), BOUND_BF16)
    assert found.startswith(said) if wrong else found == ""
    right = [f"{low} to {2 * (low or 256) - 1}" for low in begins if low not in wrong]
    assert found.endswith(f"; {', '.join(right)} agree" if wrong else "")


def test_where_no_position_agrees_that_is_said() -> None:
    found = long.named(long.bands([answer(0, [1.0] * 8)], 512), BOUND_BF16)
    assert found == "positions 0 to 511 differ by 2.718, where 1.043 is the most; none agree"


# what it finds, on an engine of paper

CONFIG = probe.config("tiny")


def logprob(token: int, position: int) -> float:
    """What the right model says of a token at a position."""
    return -1.0 - (hash((token, position)) % 1000) / 500


class Paper:
    """An engine that knows the right answers. Its attributes below are ways to be wrong."""

    def __init__(self) -> None:
        self.longest, self.chunk, self.requests = 4096, 512, 8
        self.filled = False
        self.count = 0
        # ---
        self.frozen = self.behind = self.window = 1 << 30  # positions from which on it is wrong
        self.resumes = 0.0  # how wrong a preempted request goes on
        self.roomy = False
        self.jumpy = False  # preempts what fits
        self.full = False  # has its weights before they are sent
        self.deaf = False
        self.short = 0
        self.nan = False

    def capacity(self) -> int:
        return 4608

    def preemptions(self) -> int:
        return self.count

    def refit(self, tensors: Any, transport: str) -> int:
        assert (dict(tensors), transport) == ({"a": 1}, "paper")
        self.filled = not self.deaf
        return 1

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        need = sum(len(prompt) + tokens for prompt in prompts)
        crowded = need > self.capacity()
        if (crowded and not self.roomy) or self.jumpy:
            self.count += 1
        found = []
        for number, prompt in enumerate(prompts):
            ids = [(len(prompt) + i) % 1000 for i in range(tokens - self.short)]
            values = [logprob(token, len(prompt) + i) for i, token in enumerate(ids)]
            for i in range(len(values)):
                place = len(prompt) + i
                wrong = place >= min(self.frozen, self.behind, self.window)
                wrong = wrong or not (self.filled or self.full)
                values[i] -= 1.0 if wrong else 0.001
                if crowded and number == len(prompts) - 1 and i >= tokens // 2:
                    values[i] -= self.resumes
                if self.nan and place > 4000:
                    values[i] = math.nan
            found.append(Completion(tuple(ids), tuple(values)))
        return found


class Judge:
    """The oracle; one whose positions are off by one disagrees, unless it is told not to."""

    blind = False

    def __init__(self, _: object) -> None:
        pass

    def both(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        right = [logprob(token, len(prompt) + i) for i, token in enumerate(tokens)]
        return right, right if self.blind else [value - 1.0 for value in right]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Paper], dict[str, Any]]:
    monkeypatch.setattr(long, "LongOracle", Judge)
    trial: Any = SimpleNamespace(
        oracle=None, weights={"a": 1}, transport="paper", bound=BOUND_BF16, fault=None
    )
    return lambda engine: long.measured(trial, engine, CONFIG)  # type: ignore[arg-type]


def test_a_sound_engine_passes_and_every_band_was_judged(
    run: Callable[[Paper], dict[str, Any]],
) -> None:
    found = run(Paper())
    assert [band["positions"] for band in found["bands"]] == [
        *([0, 511], [512, 1023], [1024, 2047], [2048, 4095])
    ]
    assert all(band["tokens"] >= ANSWER for band in found["bands"])
    assert all(band["control"] > BOUND_BF16 > band["worst"] for band in found["bands"])
    assert found["preemptions"] == 1
    assert found["crowd_tokens"] > found["cache_tokens"]
    assert list(found)[:4] == ["positions", "chunk", "preemptions", "worst_request"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frozen": 1024}, "long answers .*: positions 1024 to 2047 differ .* 512 to 1023 agree"),
        ({"window": 2048}, "long answers .*: positions 2048 to 4095 differ .* 1024 to 2047 agree"),
        ({"behind": 512}, "long answers .*: positions 512 to 1023 differ .*; 0 to 511 agree"),
        ({"behind": 0}, "long answers .*: positions 0 to 511 differ .*; none agree"),
        ({"nan": True}, "long answers .*: positions 2048 to 4095 differ by inf"),
        ({"resumes": 1.0}, "preempted and resumed, answers .* positions 512 to 1023 differ by"),
        ({"roomy": True}, "control: 57.. tokens in a cache of 4608, and .* preempted nothing"),
        ({"jumpy": True}, "control: requests that fit count as preempted"),
        ({"full": True}, "control: the engine had the weights before they were sent"),
        ({"deaf": True}, "long answers diverge .*; none agree"),
        ({"short": 1}, "asked for 32 tokens behind 257, the engine gave 31"),
        ({"chunk": 4096}, "control: the longest prompt is computed in one chunk"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_that_is_wrong_in_one_way_is_found_by_it(
    run: Callable[[Paper], dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    engine = Paper()
    for name, value in changes.items():
        assert hasattr(engine, name)
        setattr(engine, name, value)
    with pytest.raises(Failed, match=said) as caught:
        run(engine)
    json.dumps(caught.value.metrics, allow_nan=False)


def test_an_oracle_that_would_not_see_positions_off_by_one_proves_nothing(
    run: Callable[[Paper], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "blind", True)
    with pytest.raises(Failed, match="control: positions 0 to 511, each taken for the next one"):
        run(Paper())


# the engine that it starts


@dataclasses.dataclass
class Started:
    """A trial whose backend's long engine is this one."""

    calls: list[str] = dataclasses.field(default_factory=list)
    longest: int = 4096
    chunk: int = 512
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: set[str] = dataclasses.field(default_factory=set)

    def inject(self, fault: str) -> None:
        self.calls.append(f"inject {fault}")

    def start(self, model: Path, *, dummy: bool, level: int) -> None:
        self.calls.append(f"start dummy={dummy} level={level}")
        self.config = json.loads((model / "config.json").read_text())
        self.files = {path.name for path in model.iterdir()}
        self.model = model

    def stop(self) -> None:
        self.calls.append("stop")


def trial(model: Path, fault: str | None, stopped: list[str]) -> Any:
    own = SimpleNamespace(stop=lambda: stopped.append("own"))
    return SimpleNamespace(
        engine=own, model=model, sleep_levels=[1, 2], fault=fault, device="cpu", bound=BOUND_BF16
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, weights included."""
    for name in ("tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("fault", [None, "frozen-rotary", "flipped-byte"])
def test_it_starts_an_engine_of_its_own_when_the_other_has_ended(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    engine, stopped = Started(), list[str]()
    monkeypatch.setattr(backends, "lengthy", lambda _: engine)
    monkeypatch.setattr(long, "measured", lambda *_: {"positions": 7})
    found = checks.CHECKS["long"](trial(model, fault, stopped))
    assert found["positions"] == 7
    assert found["start_seconds"] >= 0
    injected = ["inject frozen-rotary"] if fault == "frozen-rotary" else []
    assert engine.calls == [*injected, "start dummy=True level=2", "stop"]
    assert stopped == ["own"]
    assert engine.config == CONFIG | {"max_position_embeddings": 4096}
    assert engine.files == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not engine.model.exists(), "nothing is left behind"
    assert json.loads((model / "config.json").read_text()) == CONFIG, "the probe stays as it is"


def test_its_engine_is_stopped_whatever_ends_the_check(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise Failed("no", {})

    engine = Started()
    monkeypatch.setattr(backends, "lengthy", lambda _: engine)
    monkeypatch.setattr(long, "measured", fails)
    with pytest.raises(Failed):
        long.check(trial(model, None, []))
    assert engine.calls[-1] == "stop"


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 4096),
        ({"rope_scaling": {"type": "linear"}, "max_position_embeddings": 9999}, 4096),
    ],
)
def test_a_model_that_stretches_its_rotations_is_asked_for_no_more_than_it_has(
    changes: dict[str, Any], longest: int
) -> None:
    assert long.reach(CONFIG | changes, 4096) == longest


def test_a_model_of_few_positions_is_refused_with_what_it_lacks(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = CONFIG | {"rope_scaling": {"type": "linear"}, "max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(few))
    monkeypatch.setattr(backends, "lengthy", lambda _: Started())
    with pytest.raises(Problem, match="its 512 positions are none that 'long' looks at") as caught:
        long.check(trial(model, None, []))
    assert caught.value.code == 2


def test_the_long_engine_is_of_the_same_backend_with_or_without_a_fault() -> None:
    from rollout.backends import long_transformers, transformers

    engine = transformers.Engine()
    assert isinstance(backends.lengthy(engine), long_transformers.Engine)
    assert isinstance(backends.lengthy(Faulty(engine, "frozen-rotary")), long_transformers.Engine)


# the faults


def test_every_fault_of_it_is_made_by_the_reference_engine() -> None:
    from rollout.backends import long_transformers

    of_it = {name for name, fault in FAULTS.items() if fault.check == "long"}
    assert of_it == set(long_transformers.FAULTS)
    for name in of_it:
        assert FAULTS[name].reason in ("long answers diverge from the float32 oracle",) or (
            name == "wrong-blocks"
        )


def test_a_fault_of_a_table_alone_is_none_of_a_preempted_request() -> None:
    failed = {"long": "long answers diverge from the float32 oracle: positions 512 to 1023 differ"}
    known = ["start", "long"]
    assert faults.unseen("shifted-chunk", failed, known) == ""
    assert faults.unseen("wrong-blocks", failed, known)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("fault", ["wrong-blocks", "nothing-known"])
def test_a_fault_that_an_engine_does_not_let_be_made_is_refused(name: str, fault: str) -> None:
    kind = importlib.import_module(f"rollout.backends.long_{name}").Engine
    engine = kind.__new__(kind)
    with pytest.raises(Problem, match=f"{fault} is not made in ") as caught:
        engine.inject(fault)
    assert caught.value.code == 2

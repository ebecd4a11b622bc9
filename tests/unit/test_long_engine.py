"""The reference engine for long sequences and its oracle, made small: they need torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout import probe

SEED = 7
SMALL = probe.config("tiny") | {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 128,
}
# Of these an engine makes chunks, and preempts.
LONGEST, CHUNK, REQUESTS, CACHE = 256, 32, 4, 288


@pytest.fixture(scope="module")
def transformers() -> Any:
    """transformers, where it is: inside an image (tests/image/test_inside.py)."""
    pytest.importorskip("torch", reason="torch is in the images, not in the host's tools")
    return pytest.importorskip("transformers", reason="transformers is in the images")


def oracle(config: dict[str, Any], seed: int = SEED) -> Any:
    from rollout.oracle import Oracle

    return Oracle(config, probe.weights(config, seed))


# the oracle


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("prompt", [1, 5, 63, 64, 65, 100, 200])
@pytest.mark.parametrize("answer", [1, 2, 40])
def test_block_by_block_the_oracle_says_what_it_says_at_once(
    monkeypatch: pytest.MonkeyPatch, prompt: int, answer: int
) -> None:
    from rollout import long_oracle

    monkeypatch.setattr(long_oracle, "ROWS", 16)
    asked = probe.prompts(SMALL, SEED, 2, prompt + answer)[1]
    whole = oracle(SMALL)
    right, shifted = long_oracle.LongOracle(whole).both(asked[:prompt], asked[prompt:])
    expected = whole.logprobs(asked[:prompt], asked[prompt:])
    assert right == pytest.approx(expected, abs=1e-4)
    assert len(shifted) == answer
    # Where all tokens move together, and none before them stays, rotations say the same.
    if prompt <= long_oracle.TAIL:
        assert shifted == pytest.approx(expected, abs=1e-4)
    else:
        assert shifted != pytest.approx(expected, abs=1e-2)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 2000.0}, {"rope_theta": 500.0}],
    ids=["rotations twice as slow", "twice as fast"],
)
def test_an_oracle_of_other_rotations_agrees_nowhere(changes: dict[str, Any]) -> None:
    from rollout.long import Judged, bands
    from rollout.long_oracle import LongOracle
    from rollout.oracle import BOUND_BF16

    config = probe.config("tiny")
    right, wrong = LongOracle(oracle(config)), LongOracle(oracle(config | changes))
    answers = []
    for length in (300, 600):
        asked = probe.prompts(config, SEED, 2, length + 16)[1]
        values = [one.both(asked[:length], asked[length:])[0] for one in (right, wrong)]
        answers.append(Judged(length, *values, values[1]))
    found = bands(answers, 1024)
    assert len(found) == 2
    assert not any(band.within(BOUND_BF16) for band in found)


@pytest.mark.usefixtures("transformers")
def test_nothing_is_judged_behind_nothing() -> None:
    from rollout.long_oracle import LongOracle

    judge = LongOracle(oracle(SMALL))
    for prompt, answer in (([], [5]), ([5], [])):
        with pytest.raises(ValueError, match="is empty"):
            judge.both(prompt, answer)


# the engine


@pytest.fixture
def worker(transformers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    assert transformers
    from rollout.backends import long_transformers

    monkeypatch.setattr(long_transformers, "LONGEST", LONGEST)
    monkeypatch.setattr(long_transformers, "CHUNK", CHUNK)
    monkeypatch.setattr(long_transformers, "REQUESTS", REQUESTS)
    monkeypatch.setattr(long_transformers, "CACHE_TOKENS", CACHE)
    probe.save(tmp_path, SMALL, probe.weights(SMALL, SEED))
    return long_transformers.Worker(tmp_path, False)


def asked(*lengths: int) -> list[list[int]]:
    return [probe.prompts(SMALL, SEED + i, 2, n)[1] for i, n in enumerate(lengths)]


def off(prompts: list[list[int]], found: Any) -> list[float]:
    """How far each answer is from the oracle."""
    from rollout.oracle import divergence

    judge = oracle(SMALL)
    return [
        divergence(values, judge.logprobs(prompt, tokens))
        for prompt, (tokens, values, _) in zip(prompts, found, strict=True)
    ]


def test_a_prompt_of_many_chunks_is_answered_rightly(worker: Any) -> None:
    prompts = asked(5, 31, 32, 33, 200)
    found = [worker.generate([prompt], 20)[0] for prompt in prompts]
    assert all(len(tokens) == len(values) == 20 for tokens, values, _ in found)
    assert max(off(prompts, found)) < 1.06
    assert worker.preemptions() == 0


def test_more_than_the_cache_holds_is_preempted_and_answered_rightly(worker: Any) -> None:
    assert worker.capacity() == CACHE
    prompts = asked(60, 70, 50, 80, 40, 30)
    found = worker.generate(prompts, 40)
    assert worker.preemptions() >= 1
    assert max(off(prompts, found)) < 1.06
    assert sorted(worker.free) == list(range(CACHE // 16)), "every block is free again"


def test_what_fits_is_not_preempted(worker: Any) -> None:
    worker.generate(asked(60, 60, 60), 20)
    assert worker.preemptions() == 0


def test_a_request_that_can_never_fit_is_refused(worker: Any) -> None:
    from rollout.backends import EngineError

    with pytest.raises(EngineError, match="are too many"):
        worker.generate(asked(LONGEST), 1)


def test_it_can_be_stopped_half_way(worker: Any) -> None:
    counts: list[int] = []

    def enough(count: int) -> bool:
        counts.append(count)
        return count >= 3

    found = worker.generate(asked(100, 20), 30, enough)
    assert counts[0] == 0, "it tells of every step"
    assert min(len(tokens) for tokens, _, _ in found) == 3


@pytest.mark.parametrize("fault", ["frozen-rotary", "halved-window", "shifted-chunk"])
def test_a_fault_of_positions_spoils_what_is_behind_them_alone(worker: Any, fault: str) -> None:
    begins = {"frozen-rotary": LONGEST // 4, "halved-window": LONGEST // 2, "shifted-chunk": CHUNK}
    worker.inject(fault)
    before, behind = asked(begins[fault] - 12, 200)
    found = [worker.generate([prompt], 10)[0] for prompt in (before, behind)]
    apart = off([before, behind], found)
    assert apart[0] < 1.06 < 1.1 < apart[1]


def test_a_fault_of_preemption_spoils_what_was_preempted_alone(worker: Any) -> None:
    worker.inject("wrong-blocks")
    few, many = asked(60, 60), asked(60, 70, 50, 80, 40, 30)
    assert max(off(few, worker.generate(few, 20))) < 1.06
    apart = off(many, worker.generate(many, 40))
    assert 1 <= sum(value > 1.1 for value in apart) <= worker.preemptions()


@pytest.mark.usefixtures("transformers")
def test_the_engines_own_process_answers_and_counts(tmp_path: Path) -> None:
    from rollout.backends import EngineError, long_transformers

    probe.save(tmp_path, SMALL, probe.weights(SMALL, SEED))
    engine = long_transformers.Engine()
    with pytest.raises(EngineError, match="no fault 'nothing'"):
        engine.inject("nothing")
    engine.inject("frozen-rotary")
    engine.start(tmp_path, dummy=False)
    try:
        assert engine.capacity() == long_transformers.CACHE_TOKENS
        assert engine.preemptions() == 0
        answer = engine.generate(asked(20), 4)[0]
        assert (len(answer.tokens), answer.cached) == (4, 0)
        kept = engine.interrupt(asked(20, 30), 40, 5)
        assert all(5 <= len(part.tokens) < 40 for part in kept)
    finally:
        engine.stop()
    with pytest.raises(EngineError, match="fp8"):
        engine.start(tmp_path, dummy=True, fp8=True)


# faults in a table of rotations, as vLLM and SGLang have it


def model(torch: Any, rows: int = 8, shared: bool = True) -> Any:
    """Two layers, each with a rotary embedding, of one table or of two."""

    class Rotary(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, table: Any) -> None:
            super().__init__()
            self.register_buffer("cos_sin_cache", table, persistent=False)

    tables = [torch.arange(rows * 2.0).reshape(rows, 2) for _ in range(2)]
    return torch.nn.ModuleList([Rotary(tables[0]), Rotary(tables[0 if shared else 1])])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("fault", "rows"),
    [
        ("frozen-rotary", [0, 1, 2, 3, 3, 3, 3, 3]),
        ("shifted-chunk", [0, 1, 2, 4, 5, 6, 7, 7]),
    ],
)
def test_a_table_is_changed_where_it_lies_and_once(
    torch: Any, fault: str, rows: list[int], shared: bool
) -> None:
    from rollout import rotary

    made = model(torch, shared=shared)
    before = [module.cos_sin_cache.data_ptr() for module in made]
    rotary.spoil(made, fault, 3)
    for module, place in zip(made, before, strict=True):
        assert module.cos_sin_cache.data_ptr() == place, "compiled graphs read this memory"
        assert module.cos_sin_cache[:, 0].tolist() == [2.0 * row for row in rows]


@pytest.mark.parametrize(
    ("fault", "place", "said"),
    [
        ("frozen-rotary", 7, "a table of 8 rotations has no position 7"),
        ("halved-window", 3, "no fault of a table of rotations"),
    ],
)
def test_a_table_that_cannot_be_spoilt_so_is_no_fault_made(
    torch: Any, fault: str, place: int, said: str
) -> None:
    from rollout import rotary

    with pytest.raises(ValueError, match=said):
        rotary.spoil(model(torch), fault, place)
    with pytest.raises(ValueError, match="no table of rotations"):
        rotary.spoil(torch.nn.Linear(1, 1), "frozen-rotary", 1)

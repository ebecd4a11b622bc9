"""Hundreds of requests at once: what is asked, what came of it, and what of that is held against.

The engine here is a toy that schedules, samples and answers as it should, or not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import pressure, probe, rush
from rollout.backends import Completion, crowd
from rollout.backends.crowd import LEAKED, Asked, Said, Usage
from rollout.checks import CHECKS, Failed
from rollout.faults import FAULTS, unseen
from rollout.ledger import Disorder, Ledger
from rollout.oracle import BOUND_BF16
from rollout.pressure_faults import FAULTS as OURS
from rollout.pressure_faults import crossed, spoiled

VOCABULARY = 1024


def score(weights: str, before: Sequence[int], token: int) -> float:
    """The log-probability of a token behind others, by a model that is nothing but its name."""
    return -random.Random(f"{weights}/{list(before)}/{token}").uniform(0.5, 9.5)  # noqa: S311


class Tensor(str):
    """Weights that are nothing but their name."""

    def numel(self) -> int:
        return 1

    def element_size(self) -> int:
        return 2


class Judge:
    """The oracle of such a model."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def scores(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[list[float], list[float]]]:
        return [
            ([score(self.weights, [*p, *c[:n]], token) for n, token in enumerate(c)], [])
            for p, c in zip(prompts, completions, strict=True)
        ]


class Toy:
    """An engine of requests that wait, run, and hold a block each."""

    device, transports = "a toy", ("paper",)
    crowd, slots, answers = 64, 8, (16, 40)

    def __init__(self) -> None:
        self.weights = "dummy"
        self.waiting: list[Asked] = []
        self.running: dict[str, tuple[Asked, list[int]]] = {}
        self.chance = random.Random(1)  # noqa: S311 - reproducible, not secret
        self.leaking, self.leaked = False, 0
        self.grown: dict[str, int] = {}
        self.usages = 0
        self.log: list[str] = []

    def start(self, model: Path, *, dummy: bool, level: int) -> None:
        self.log.append(f"start {model.name} {dummy} {level}")

    def stop(self) -> None:
        self.log.append("stop")

    def inject(self, fault: str) -> None:
        assert fault == LEAKED
        self.leaking = True

    def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
        assert not self.running
        assert not self.waiting
        ((_, self.weights),) = list(tensors)
        self.log.append(f"refit {self.weights} by {transport}")
        return 1

    def reset_prefix_cache(self) -> None:
        self.log.append("reset")

    def submit(self, asked: Sequence[Asked]) -> None:
        self.waiting += asked

    def token(self) -> int:
        return self.chance.randrange(VOCABULARY)

    def listen(self) -> list[Said]:
        while self.waiting and len(self.running) < self.slots:
            one = self.waiting.pop(0)
            self.running[one.name] = (one, [])
        found = []
        for name, (asked, tokens) in list(self.running.items()):
            new = self.token()
            value = score(self.weights, [*asked.prompt, *tokens], new)
            tokens.append(new)
            ended = len(tokens) == asked.tokens
            found.append(Said(name, (new,), (value,), ended))
            if ended:
                del self.running[name]
        return found

    def abort(self, names: Sequence[str]) -> list[Said]:
        self.waiting = [one for one in self.waiting if one.name not in names]
        for name in names:
            self.leaked += self.leaking and name in self.running
            self.running.pop(name, None)
        return []

    def usage(self) -> Usage:
        self.usages += 1
        more = {key: step * self.usages for key, step in self.grown.items()}
        requests = len(self.waiting) + len(self.running)
        held = Usage(requests, len(self.running) + self.leaked, 0, 9, 0)
        return Usage(**{**vars(held), **{key: vars(held)[key] + n for key, n in more.items()}})

    def plain(self, asked: Sequence[Asked]) -> list[Completion]:
        self.submit(asked)
        found: dict[str, list[Said]] = {}
        while said := self.listen():
            for one in said:
                found.setdefault(one.name, []).append(one)
        return [
            Completion(
                tuple(token for said in found[one.name] for token in said.tokens),
                tuple(value for said in found[one.name] for value in said.logprobs),
            )
            for one in asked
        ]


def trial(folder: Path, **changes: Any) -> Any:
    config = probe.config("tiny")
    (folder / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {
        "model": folder,
        "weights": {"all": Tensor("first")},
        "others": {"all": Tensor("second")},
        "oracle": Judge("first"),
        "other_oracle": Judge("second"),
        "bound": BOUND_BF16,
        "transport": "paper",
        "sleep_levels": (1, 2),
        "device": "cpu",
        "fault": None,
        "engine": Toy(),
    }
    return SimpleNamespace(**given | changes)


def failure(folder: Path, engine: Any, **changes: Any) -> str:
    with pytest.raises(Failed) as caught:
        pressure.measured(trial(folder, **changes), engine)
    return caught.value.reason


# a sound engine


def test_a_sound_engine_passes_and_each_control_is_noted(tmp_path: Path) -> None:
    toy: Any = Toy()
    metrics = pressure.measured(trial(tmp_path), toy)
    assert metrics["divergence"] == metrics["worst_request"] == 1.0
    for control in ("control_divergence", "stranger_divergence", "crossed_divergence"):
        assert metrics[control] > 2
    kinds = metrics["kinds"]
    assert sum(kinds.values()) == toy.crowd
    assert kinds["aborted"] == toy.crowd // 2 == metrics["aborted"]
    assert min(kinds.values()) >= toy.crowd // pressure.FEW
    assert metrics["growth_bytes"] == metrics["growth_files"] == metrics["growth_shared"] == 0
    assert metrics["tokens_per_s"] > 0
    assert metrics["plain_tokens_per_s"] > 0


def test_weights_change_in_the_middle_of_both_rounds_and_are_the_first_ones_again(
    tmp_path: Path,
) -> None:
    toy: Any = Toy()
    pressure.measured(trial(tmp_path), toy)
    sent = [line for line in toy.log if line != "reset"]
    assert sent == [f"refit {name} by paper" for name in ("first", "second", "first")]
    assert toy.log[1::2] == ["reset"] * 3, "the cache belongs to the weights of its time"


def test_the_check_has_an_engine_of_its_own_and_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, own = Toy(), Toy()
    monkeypatch.setattr(pressure, "apart", lambda *_: own)
    metrics = CHECKS["pressure"](trial(tmp_path, engine=SimpleNamespace(within=toy, stop=toy.stop)))
    assert toy.log == ["stop"]
    assert own.log[0] == f"start {tmp_path.name} True 1"
    assert own.log[-1] == "stop"
    assert "start_seconds" in metrics


def test_a_group_of_requests_has_one_prompt_and_both_rounds_are_of_one_shape() -> None:
    toy: Any = Toy()
    first, second = (pressure.requests(toy, probe.config("tiny"), name) for name in ("a", "b"))
    assert [(one.prompt, one.tokens) for one in first] == [(o.prompt, o.tokens) for o in second]
    assert not {one.name for one in first} & {one.name for one in second}
    prompts = [one.prompt for one in first]
    assert len(set(prompts)) == toy.crowd // pressure.SAMPLES
    assert prompts[0] == prompts[pressure.SAMPLES - 1] != prompts[pressure.SAMPLES]
    assert {one.tokens for one in first} <= set(range(16, 41))
    assert min(toy.answers) >= pressure.ENOUGH, "each answer is judged by itself"


@pytest.mark.parametrize("backend", ["transformers", "vllm", "sglang"])
def test_no_backend_asks_for_an_answer_too_short_to_be_judged(backend: str) -> None:
    module = pytest.importorskip(f"rollout.backends.pressure_{backend}")
    assert module.ANSWERS[0] >= pressure.ENOUGH
    assert module.REQUESTS % pressure.SAMPLES == 0


# faults


@pytest.mark.parametrize("fault", OURS)
def test_each_fault_is_found_for_its_own_reason(tmp_path: Path, fault: str) -> None:
    toy: Any = Toy()
    why = failure(tmp_path, spoiled(toy, fault))
    assert unseen(fault, {"pressure": why}, ["start", "pressure"]) == ""
    assert FAULTS[fault].check == "pressure"


def test_a_fault_of_this_check_is_made_in_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "apart", lambda *_: Toy())
    with pytest.raises(Failed, match="never answered"):
        pressure.pressure(trial(tmp_path, fault="lost-request"))
    pressure.pressure(trial(tmp_path, fault="deaf-server"))  # another check's


def test_answers_of_one_length_and_two_prompts_are_crossed() -> None:
    asked = [
        *(Asked("a", (1,), 5), Asked("b", (1,), 5), Asked("c", (2,), 5)),
        *(Asked("d", (3,), 9), Asked("e", (4,), 8)),
    ]
    assert crossed(asked) == {"a": "c", "c": "a"}
    with pytest.raises(ValueError, match="of one length"):
        crossed(asked[3:])


# engines that are wrong in other ways


def test_an_engine_that_had_the_weights_before_they_were_sent_is_found(tmp_path: Path) -> None:
    toy: Any = Toy()
    toy.weights = "first"
    assert "before they were sent" in failure(tmp_path, toy)


def test_an_engine_that_does_not_sample_is_found(tmp_path: Path) -> None:
    class Greedy(Toy):
        def token(self) -> int:
            return 7

    assert "none was sampled" in failure(tmp_path, Greedy())


def test_an_engine_that_keeps_its_old_weights_is_found(tmp_path: Path) -> None:
    class Deaf(Toy):
        def refit(self, tensors: Iterable[tuple[str, Any]], transport: str = "") -> int:
            return super().refit(tensors, transport) if self.weights == "dummy" else 1

    why = failure(tmp_path, Deaf())
    assert why.startswith("interrupted, and continued with new weights, requests diverge")


def test_an_engine_that_answers_all_before_anything_is_aborted_shows_nothing(
    tmp_path: Path,
) -> None:
    class Quick(Toy):
        def listen(self) -> list[Said]:
            found: list[Said] = []
            while said := super().listen():
                found += said
            return found

    assert failure(tmp_path, Quick()).startswith("control: 0 requests were ")


def test_an_answer_that_is_too_short_is_found(tmp_path: Path) -> None:
    class Short(Toy):
        def plain(self, asked: Sequence[Asked]) -> list[Completion]:
            return [Completion(c.tokens[1:], c.logprobs[1:]) for c in super().plain(asked)]

    assert "the engine gave" in failure(tmp_path, Short())


@pytest.mark.parametrize(
    ("grown", "what"),
    [
        ({"memory": pressure.GROWTH_CPU + 1}, "bytes of memory"),
        ({"files": pressure.FILES + 1}, "open files"),
        ({"shared": pressure.SHARED + 1}, "bytes of shared memory"),
    ],
)
def test_what_grows_from_round_to_round_is_found(
    tmp_path: Path, grown: dict[str, int], what: str
) -> None:
    # The engine is looked at twice in a round.
    toy: Any = Toy()
    toy.grown = {key: -(-value // 2) for key, value in grown.items()}
    assert what in failure(tmp_path, toy)


def test_on_a_gpu_an_allocator_may_take_some_pieces_more() -> None:
    first, second = Usage(0, 0, 0, 9, 0), Usage(0, 0, pressure.GROWTH, 9, 0)
    pressure.steady(first, second, "cuda", {})
    with pytest.raises(Failed):
        pressure.steady(first, second, "cpu", {})


def test_one_request_that_is_wrong_is_found_among_all() -> None:
    ledger = Ledger()
    ledger.ask([Asked(f"r{n}", (n,), 16) for n in range(64)])
    for name in ledger.entries:
        ledger.hear([Said(name, (1,) * 16, (-1.0,) * 16, True)])
    answers = [rush.Answer(entry) for entry in ledger.entries.values()]
    judged: list[Any] = [(answer.logprobs, [-1.0] * 16) for answer in answers]
    metrics = {"worst_request": 1.0}
    pressure.agree(answers, judged, BOUND_BF16, "sometimes", metrics)
    judged[5] = (answers[5].logprobs, [-1.05] * 16)
    with pytest.raises(Failed, match=r"sometimes, requests diverge .* \(r5: 1.051, where 1.043"):
        pressure.agree(answers, judged, BOUND_BF16, "sometimes", metrics)


# the ledger


def test_a_ledger_adds_up_what_is_said_of_each_request() -> None:
    ledger = Ledger()
    ledger.ask([Asked("a", (1,), 3), Asked("b", (1,), 2)])
    ledger.hear([Said("a", (5, 6), (-1.0, -2.0), False), Said("b", (7,), (-1.0,), False)])
    assert ledger.open == ["a", "b"]
    ledger.hear([Said("a", (8,), (-3.0,), True)])
    assert (ledger.open, ledger.tokens, ledger.finished) == (["b"], 4, 1)
    assert ledger.entries["a"].tokens == (5, 6, 8)
    ledger.abort(["b"], [])
    assert ledger.entries["b"].end == "aborted"
    with pytest.raises(ValueError, match="asked for already"):
        ledger.ask([Asked("a", (1,), 3)])


def test_a_request_that_ends_with_its_abort_is_finished() -> None:
    ledger = Ledger()
    ledger.ask([Asked("a", (1,), 1)])
    ledger.abort(["a"], [Said("a", (5,), (-1.0,), True)])
    assert ledger.entries["a"].end == "finished"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (Said("c", (1,), (-1.0,), False), "nobody asked for it"),
        (Said("ended", (1,), (-1.0,), False), "again after it was finished"),
        (Said("aborted", (), (), True), "again after it was aborted"),
        (Said("a", (1,), (), False), "without a log-probability"),
        (Said("a", (1,), (-1.0,), True), "has 1 tokens, and was asked for 2"),
        (Said("a", (1, 2, 3), (-1.0,) * 3, False), "has 3 tokens, and was asked for 2"),
    ],
)
def test_what_does_not_fit_is_named(said: Said, why: str) -> None:
    ledger = Ledger()
    ledger.ask([Asked("a", (1,), 2), Asked("ended", (1,), 1), Asked("aborted", (1,), 1)])
    ledger.hear([Said("ended", (1,), (-1.0,), True)])
    ledger.abort(["aborted"], [])
    with pytest.raises(Disorder, match=why):
        ledger.hear([said])


# what an engine holds


def test_open_files_and_shared_memory_are_counted(tmp_path: Path) -> None:
    import os

    before = crowd.files({os.getpid()})
    with (tmp_path / "file").open("w"):
        assert crowd.files({os.getpid()}) == before + 1


def test_shared_memory_counts_as_what_these_processes_have_mapped_each_piece_once() -> None:
    import mmap
    import os
    import tempfile

    mine = {os.getpid()}
    before = crowd.shared(mine)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(3 << 20)
        assert crowd.shared(mine) == before, "nobody has mapped it"
        with mmap.mmap(file.fileno(), 3 << 20), mmap.mmap(file.fileno(), 3 << 20):
            assert crowd.shared(mine) == before + (3 << 20)

"""What runs in SGLang's processes: methods of our own, and no answer of SGLang's taken on trust."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import placement
from rollout.backends import sglang_worker as worker
from rollout.backends.sglang_worker import Driver, Extension, completion

from . import fake_sglang

# methods of the scheduler


class Tensor:
    """A tensor that has a size, and may be zeroed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.zeroed = False

    def numel(self) -> int:
        return self.size // 2

    def element_size(self) -> int:
        return 2

    def zero_(self) -> None:
        self.zeroed = True


class Scheduler(Extension):
    """SGLang's scheduler with our methods, on one of its ranks."""

    def __init__(self, *, wrapped: bool = False) -> None:
        self.parameters, self.buffers = [Tensor(100), Tensor(20)], [Tensor(6)]
        runner = SimpleNamespace(
            model=SimpleNamespace(
                parameters=lambda: iter(self.parameters), buffers=lambda: iter(self.buffers)
            ),
            token_to_kv_pool=SimpleNamespace(
                k_buffer=[Tensor(1000), Tensor(1000)], v_buffer=[Tensor(1000), Tensor(1000)]
            ),
        )
        inner = SimpleNamespace(model_runner=runner)
        self.tp_worker = SimpleNamespace(worker=inner) if wrapped else inner


def newer(scheduler: Any, method: str, given: dict[str, str]) -> None:
    """As ``handle_rpc_request`` calls a method from 0.5 on."""
    getattr(scheduler, method)(**given)


def older(scheduler: Any, method: str, given: dict[str, str]) -> None:
    """As it did in 0.4.6."""
    getattr(scheduler, method)(given)


HELD = 100 + 20 + 6 + 4000


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "digests", lambda model: {"a": f"of {len([*model.buffers()])}"})


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last of these is the rank that torch gives this process."""
    given = [0]
    torch = ModuleType("torch")
    vars(torch)["distributed"] = SimpleNamespace(get_rank=lambda: given[-1])
    monkeypatch.setitem(sys.modules, "torch", torch)
    return given


@pytest.fixture
def leaked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a leak takes."""
    made: list[Any] = []

    def ones(size: int, *, dtype: str, device: str) -> object:
        made.append((size, dtype, device))
        return made[-1]

    monkeypatch.setattr(sys.modules["torch"], "ones", ones, raising=False)
    monkeypatch.setattr(sys.modules["torch"], "uint8", "uint8", raising=False)
    return made


def test_every_name_is_one_that_no_scheduler_has() -> None:
    names = [name for name in vars(Extension) if not name.startswith("__")]
    assert names
    assert [name for name in names if not name.startswith("smoke_")] == []


@pytest.mark.usefixtures("digested", "leaked")
@pytest.mark.parametrize("call", [newer, older])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("smoke_held", HELD),
        ("smoke_digests", {"a": "of 1"}),
        ("smoke_leak", None),
        ("smoke_lose_buffers", None),
    ],
)
def test_an_answer_goes_through_a_file_however_the_method_is_called(
    tmp_path: Path,
    call: Callable[[Any, str, dict[str, str]], None],
    wrapped: bool,
    method: str,
    answer: object,
) -> None:
    path = tmp_path / "answer.json"
    call(Scheduler(wrapped=wrapped), method, {"path": str(path)})
    assert json.loads(path.read_text()) == answer


@pytest.mark.usefixtures("digested")
@pytest.mark.parametrize("call", [newer, older])
def test_one_rank_answers_for_all_and_each_does_what_it_is_asked(
    tmp_path: Path,
    leaked: list[Any],
    ranks: list[int],
    call: Callable[[Any, str, dict[str, str]], None],
) -> None:
    path = tmp_path / "answer.json"
    second = Scheduler()
    ranks.append(1)
    for method in ("smoke_held", "smoke_digests", "smoke_leak", "smoke_lose_buffers"):
        call(second, method, {"path": str(path)})
    assert not path.exists()
    assert len(leaked) == 1
    assert second.buffers[0].zeroed


def test_a_leak_is_kept_and_lost_buffers_are_buffers_alone(
    tmp_path: Path, leaked: list[Any]
) -> None:
    scheduler = Scheduler()
    for _ in range(2):
        scheduler.smoke_leak(path=str(tmp_path / "x"))
    assert leaked == [(worker.LEAK_BYTES, "uint8", "cuda")] * 2
    assert vars(scheduler)["smoke_leaks"] == leaked
    scheduler.smoke_lose_buffers(path=str(tmp_path / "x"))
    assert [tensor.zeroed for tensor in (*scheduler.parameters, *scheduler.buffers)] == [
        *(False, False, True)
    ]


@pytest.fixture
def parents(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would end this very process with its parent."""
    told: list[str] = []
    monkeypatch.setattr(worker, "die_with_parent", lambda: told.append("dies with its parent"))
    return told


def test_sglangs_scheduler_runs_with_our_methods(
    monkeypatch: pytest.MonkeyPatch, parents: list[str]
) -> None:
    ran: list[Any] = []

    class Theirs:
        def generate(self) -> str:
            return "theirs"

    module = {
        "Scheduler": Theirs,
        "run_scheduler_process": lambda *given, **more: ran.append((given, more)),
    }
    fake_sglang.install(monkeypatch, {"managers.scheduler": module})
    worker.schedule("server_args", 1, gpu_id=0)
    assert ran == [(("server_args", 1), {"gpu_id": 0})]
    assert parents == ["dies with its parent"]
    names = {name for name in vars(Extension) if name.startswith("smoke_")}
    assert names <= vars(Theirs).keys()
    assert Theirs().generate() == "theirs"


def test_a_name_that_sglangs_scheduler_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, parents: list[str]
) -> None:
    class Theirs:
        def smoke_held(self) -> None:
            """Another one."""

    ran: list[Any] = []
    module = {"Scheduler": Theirs, "run_scheduler_process": lambda *given: ran.append(given)}
    fake_sglang.install(monkeypatch, {"managers.scheduler": module})
    with pytest.raises(RuntimeError, match="has a method 'smoke_held' of its own"):
        worker.schedule()
    assert (ran, len(parents)) == ([], 1)


# an SGLang that is none

Script = list[Any]  # what an answer does next: tokens so far, an exception, or "hangs"


class Manager:
    """The engine's manager of requests; ``scripts`` say how each answer grows."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.asked: list[Any] = []
        self.aborted: dict[str, asyncio.Event] = {}
        self.aborts: list[str] = []
        self.deaf: set[int] = set()  # answers that never end once they are aborted
        self.cancelled: list[int] = []
        self.answer: Any = (True, "Success")

    async def generate_request(self, asked: Any, request: object) -> AsyncIterator[Any]:
        assert request is None
        number = len(self.asked)
        self.asked.append(asked)
        aborted = self.aborted.setdefault(asked.rid, asyncio.Event())
        try:
            for step in self.scripts[number]:
                await asyncio.sleep(0)
                if aborted.is_set():
                    break
                if isinstance(step, Exception):
                    raise step
                yield output(step)
            else:
                if self.scripts[number][-1:] != [128]:
                    return
            if number in self.deaf:
                await asyncio.Event().wait()
            yield output(step + 1)
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    def abort_request(self, name: str) -> None:
        self.aborts.append(name)
        self.aborted.setdefault(name, asyncio.Event()).set()

    async def update_weights_from_tensor(self, asked: Any, request: object) -> Any:
        await asyncio.sleep(0)
        assert request is None
        self.asked.append(asked)
        return self.answer


class Checking(Manager):
    """One with a weights checker."""

    async def check_weights(self, asked: Any, request: object) -> Any:
        await asyncio.sleep(0)
        assert request is None
        self.asked.append(asked)
        return self.answer


def output(count: int) -> dict[str, Any]:
    chosen = [(-0.5 * place, 100 + place, None) for place in range(count)]
    return {"meta_info": {"output_token_logprobs": chosen, "cached_tokens": 3}}


class Older:
    """SGLang 0.4.6: no tags, no names of groups, one tensor at a time, no loop of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.tokenizer_manager: Manager = Manager()
        self.scheduler = Scheduler(wrapped=True)
        self.calls: list[Any] = []
        self.busy = 0
        self.success = True
        self.lost = ""  # what the scheduler says of a call that it could not make

    def did(self, *call: Any) -> Any:
        self.calls.append(call)
        return self.success, "Success" if self.success else "no such tensor"

    def release_memory_occupation(self) -> None:
        self.did("release")

    def resume_memory_occupation(self) -> None:
        self.did("resume")

    def flush_cache(self) -> Any:
        self.did("flush")
        self.busy -= 1
        return SimpleNamespace(success=self.busy < 0)

    def generate(self, *, input_ids: Any, sampling_params: Any, return_logprob: bool) -> Any:
        assert return_logprob is True
        self.did("generate", input_ids, sampling_params)
        return [output(sampling_params["max_new_tokens"]) for _ in input_ids]

    def collective_rpc(self, method: str, **given: Any) -> None:
        if self.lost:
            raise AssertionError(self.lost)
        older(self.scheduler, method, given)

    def update_weights_from_disk(self, path: str, *, load_format: str) -> Any:
        return self.did("disk", path, load_format)

    def init_weights_update_group(self, **given: Any) -> Any:
        return self.did("join", given)

    def update_weights_from_distributed(self, name: str, dtype: str, shape: list[int]) -> Any:
        return self.did("take", name, dtype, shape)

    def shutdown(self) -> None:
        self.did("shutdown")


class Newer(Older):
    """SGLang 0.5."""

    run_scheduler_process_func: Any = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.loop = asyncio.new_event_loop()
        self.tokenizer_manager = Checking()
        self.scheduler = Scheduler()

    def release_memory_occupation(self, tags: list[str] | None = None) -> None:
        self.did("release", tags)

    def resume_memory_occupation(self, tags: list[str] | None = None) -> None:
        self.did("resume", tags)

    def collective_rpc(self, method: str, **given: Any) -> None:
        if self.lost:
            raise AssertionError(self.lost)
        newer(self.scheduler, method, given)

    def update_weights_from_distributed(  # type: ignore[override]
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
    ) -> Any:
        return self.did("take", names, dtypes, shapes, group_name, flush_cache)

    def destroy_weights_update_group(self, group_name: str) -> Any:
        return self.did("leave", group_name)


Make = Callable[..., tuple[Driver, Any]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A driver and its engine, of either kind."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # where 0.4.6 has its own
    made: list[Any] = []

    def start(kind: type[Older] = Newer, **options: Any) -> tuple[Driver, Any]:
        old = kind is Older
        fake_sglang.install(
            monkeypatch,
            {
                "entrypoints.engine": {"Engine": kind, "run_scheduler_process": "theirs"},
                "server_args": fake_sglang.server_args(old=old),
                "managers.io_struct": fake_sglang.io_struct(old=old),
            },
        )
        driver = Driver({"model_path": "/m", "enable_weights_cpu_backup": False} | options)
        made.append(driver.engine)
        return driver, driver.engine

    yield start
    for engine in made:
        if hasattr(engine, "loop"):
            engine.loop.close()
    asyncio.set_event_loop(None)
    loop.close()


KINDS = pytest.mark.parametrize("kind", [Newer, Older], ids=["newer", "0.4.6"])


# how it is started


def test_options_that_a_version_has_not_are_left_out(make: Make) -> None:
    given = {"enable_weights_cpu_backup": True, "nccl_port": 5, "unheard_of": 1}
    driver, engine = make(Newer, **given)
    assert engine.options == {
        "model_path": "/m",
        "enable_weights_cpu_backup": True,
        "nccl_port": 5,
    }
    assert driver.backup is True
    driver, engine = make(Older, **given)
    assert engine.options == {"model_path": "/m"}
    assert driver.backup is False, "it keeps none, whatever was asked for"


def test_the_scheduler_is_ours_in_every_version(make: Make) -> None:
    import sys

    _, engine = make(Newer)
    assert engine.run_scheduler_process_func is worker.schedule
    assert Newer.run_scheduler_process_func is None, "and SGLang's own class is left alone"
    _, engine = make(Older)
    module: Any = sys.modules["sglang.srt.entrypoints.engine"]
    assert module.run_scheduler_process is worker.schedule
    assert type(engine) is Older


@pytest.mark.parametrize(
    ("kind", "backup", "levels"), [(Newer, True, (1,)), (Newer, False, (2,)), (Older, True, (2,))]
)
def test_an_engine_can_sleep_to_the_one_level_that_it_was_started_for(
    make: Make, kind: type[Older], backup: bool, levels: tuple[int, ...]
) -> None:
    facts = make(kind, enable_weights_cpu_backup=backup)[0].facts()
    assert (facts["held"], facts["levels"], facts["witness"]) == (HELD, levels, kind is Newer)


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        (None, "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "0"),
        (SimpleNamespace(SGLANG_OTHER=1), "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "0"),
        (
            SimpleNamespace(SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK=1),
            "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK",
            "1",
        ),
    ],
    ids=["0.4.6", "0.5.6", "0.5.12"],
)
def test_the_variable_that_insists_on_balance_is_the_one_this_version_reads(
    make: Make, monkeypatch: pytest.MonkeyPatch, environ: Any, name: str, value: str
) -> None:
    driver, _ = make()
    if environ is not None:
        fake_sglang.install(monkeypatch, {"environ": {"envs": environ}})
    assert driver.facts()["insisting"] == {name: value}


# calls of the scheduler's methods


@KINDS
@pytest.mark.usefixtures("digested")
def test_a_method_is_called_by_name_and_its_file_does_not_stay(
    make: Make, kind: type[Older], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    driver, engine = make(kind)
    assert driver.rpc("smoke_digests") == {"a": "of 1"}
    assert driver.rpc("smoke_lose_buffers") is None
    engine.lost = "'Scheduler' object has no attribute 'smoke_x'"
    with pytest.raises(AssertionError, match="no attribute 'smoke_x'"):
        driver.rpc("smoke_x")
    assert list(tmp_path.iterdir()) == []


# answers


@pytest.mark.parametrize(
    ("meta", "cached"),
    [({"cached_tokens": 4}, 4), ({"cached_tokens": None}, 0), ({}, 0)],
)
def test_an_answer_is_tokens_log_probabilities_and_what_was_cached(
    meta: dict[str, Any], cached: int
) -> None:
    # What stands behind a token is its text, where SGLang knows one.
    chosen = [(-0.5, 7, None), [-0.25, 8]]
    found = completion({"meta_info": meta | {"output_token_logprobs": chosen}})
    assert found == ((7, 8), (-0.5, -0.25), cached)
    assert completion({"meta_info": meta | {"output_token_logprobs": []}})[:2] == ((), ())


@KINDS
def test_tokens_are_asked_for_greedily(make: Make, kind: type[Older]) -> None:
    driver, engine = make(kind)
    assert driver.generate([[1, 2], [3]], 2) == [((100, 101), (-0.0, -0.5), 3)] * 2
    ((_, prompts, settings),) = engine.calls
    assert prompts == [[1, 2], [3]]
    assert settings == {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True}


GROWS: Script = list(range(1, 129))


@KINDS
def test_rollouts_are_aborted_once_each_has_enough(make: Make, kind: type[Older]) -> None:
    driver, engine = make(kind)
    manager = engine.tokenizer_manager
    manager.scripts = [GROWS, GROWS[3:], [1, 1, 1, *GROWS]]
    found = driver.interrupt([[1], [2], [3]], 128, 4)
    assert all(4 <= len(tokens) < 20 for tokens, _, _ in found)
    assert [asked.input_ids for asked in manager.asked] == [[1], [2], [3]]
    for asked in manager.asked:
        assert asked.stream is asked.return_logprob is True
        assert asked.sampling_params["max_new_tokens"] == 128
    names = [asked.rid for asked in manager.asked]
    assert (manager.aborts, len(set(names))) == (names, 3)
    assert manager.cancelled == []


@KINDS
def test_an_aborted_request_that_never_ends_is_left(
    make: Make, kind: type[Older], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ABORTED", 0.05)
    driver, engine = make(kind)
    manager = engine.tokenizer_manager
    manager.scripts, manager.deaf = [GROWS, GROWS, GROWS], {1}
    found = driver.interrupt([[1], [2], [3]], 128, 4)
    assert all(len(tokens) >= 4 for tokens, _, _ in found)
    manager.scripts.append(GROWS)
    assert len(driver.interrupt([[1]], 128, 4)) == 1, "the next one is asked as if nothing had been"
    assert manager.cancelled == [1]


@pytest.mark.parametrize("place", [0, 2])
def test_an_error_in_one_rollout_aborts_all_and_is_raised(make: Make, place: int) -> None:
    driver, engine = make()
    manager = engine.tokenizer_manager
    manager.scripts = [GROWS, [*GROWS[:place], ValueError("out of vocabulary")], GROWS]
    with pytest.raises(ValueError, match="out of vocabulary"):
        driver.interrupt([[1], [2], [3]], 128, 4)
    assert len(manager.aborts) == 3


@pytest.mark.parametrize("script", [[], [1], [1, 2, 3]], ids=["no token", "one", "three"])
def test_a_rollout_that_ends_early_is_an_error(make: Make, script: Script) -> None:
    driver, engine = make()
    engine.tokenizer_manager.scripts = [GROWS, script, GROWS]
    with pytest.raises(RuntimeError, match="before it had 4 tokens"):
        driver.interrupt([[1], [2], [3]], 128, 4)


def test_rollouts_that_end_before_anybody_aborts_them_are_whole(make: Make) -> None:
    driver, engine = make()
    engine.tokenizer_manager.scripts = [[1, 2, 3, 4]]
    ((tokens, _, _),) = driver.interrupt([[1]], 4, 4)
    assert len(tokens) == 4


# the prefix cache, sleep and wake


@KINDS
def test_a_cache_is_emptied_as_soon_as_the_engine_is_idle(make: Make, kind: type[Older]) -> None:
    driver, engine = make(kind)
    engine.busy = 3
    driver.flush()
    assert engine.calls == [("flush",)] * 4


def test_a_version_that_does_not_say_whether_it_did_is_believed(make: Make) -> None:
    driver, engine = make()
    engine.flush_cache = lambda: None
    driver.flush()


def test_an_engine_that_is_never_idle_is_an_error_and_does_not_sleep(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "IDLE", 0.02)
    driver, engine = make()
    engine.busy = 1 << 20
    for call in (driver.flush, lambda: driver.sleep(2)):
        with pytest.raises(RuntimeError, match="did not empty its prefix cache for 0 s"):
            call()
    assert {call[0] for call in engine.calls} == {"flush"}, "it would have ended the scheduler"


@pytest.mark.parametrize(("backup", "level", "kept"), [(True, 2, "with"), (False, 1, "without")])
def test_a_sleep_that_the_engine_was_not_started_for_is_refused(
    make: Make, backup: bool, level: int, kept: str
) -> None:
    driver, engine = make(enable_weights_cpu_backup=backup)
    with pytest.raises(RuntimeError) as caught:
        driver.sleep(level)
    assert str(caught.value) == f"started {kept} a copy of the weights, it has no level {level}"
    assert engine.calls == []


@pytest.mark.parametrize(("backup", "level"), [(True, 1), (False, 2)])
def test_an_engine_sleeps_when_it_is_idle_and_wakes_by_tags(
    make: Make, backup: bool, level: int
) -> None:
    driver, engine = make(enable_weights_cpu_backup=backup)
    driver.wake(("weights",))
    assert engine.calls == [], "what is awake is not woken: it would end the scheduler"
    engine.busy = 1
    driver.sleep(level)
    driver.wake(("weights",))
    driver.wake(("weights", "kv_cache"))
    driver.wake(("kv_cache",))
    assert engine.calls == [
        *(("flush",), ("flush",), ("release", ["kv_cache", "weights"])),
        *(("resume", ["weights"]), ("resume", ["kv_cache"])),
    ]


def test_an_engine_that_knows_no_tags_wakes_as_a_whole(make: Make) -> None:
    driver, engine = make(Older)
    for tags in (("weights",), ("kv_cache",)):
        driver.sleep(2)
        driver.wake(tags)
        driver.wake(("weights", "kv_cache"))
    assert engine.calls == [("flush",), ("release",), ("resume",)] * 2


# weights


@KINDS
def test_handles_are_passed_on_and_no_cache_is_emptied_behind_the_trainers_back(
    make: Make, kind: type[Older]
) -> None:
    driver, engine = make(kind)
    driver.from_tensors([b"1", b"2"], "flattened_bucket")
    (asked,) = engine.tokenizer_manager.asked
    assert asked.serialized_named_tensors == [b"1", b"2"]
    assert (asked.load_format, asked.flush_cache) == ("flattened_bucket", False)


@KINDS
def test_a_folder_is_read_as_whatever_lies_in_it(make: Make, kind: type[Older]) -> None:
    driver, engine = make(kind)
    driver.from_disk("/checkpoint")
    # It empties the cache itself, and ends itself where it cannot: it has to be idle before.
    assert engine.calls == [("flush",), ("disk", "/checkpoint", "auto")]


@KINDS
def test_a_group_is_joined_behind_the_trainer(make: Make, kind: type[Older]) -> None:
    driver, engine = make(kind)
    driver.join_group("127.0.0.1", 999, 3, "g")
    assert engine.calls == [
        (
            "join",
            {
                "master_address": "127.0.0.1",
                "master_port": 999,
                "rank_offset": 1,
                "world_size": 3,
                "group_name": "g",
                "backend": "nccl",
            },
        )
    ]


def test_a_group_is_left_where_that_is_known(make: Make) -> None:
    driver, engine = make(Newer)
    driver.leave_group("g")
    assert engine.calls == [("leave", "g")]
    driver, engine = make(Older)
    driver.leave_group("g")
    assert engine.calls == []


TAKEN = [("a", "bfloat16", [2, 3]), ("b", "float32", [])]


def test_broadcasts_are_taken_together_where_that_is_known_and_else_one_by_one(make: Make) -> None:
    driver, engine = make(Newer)
    driver.from_group(TAKEN, "g")
    names, dtypes, shapes = ["a", "b"], ["bfloat16", "float32"], [[2, 3], []]
    assert engine.calls == [("take", names, dtypes, shapes, "g", False)]
    driver, engine = make(Older)
    driver.from_group(TAKEN, "g")
    # It empties its cache after each, and ends itself where it cannot: it has to be idle before.
    first, second = ("take", "a", "bfloat16", [2, 3]), ("take", "b", "float32", [])
    assert engine.calls == [("flush",), first, second]


@KINDS
@pytest.mark.parametrize(
    "call",
    [
        lambda driver: driver.from_tensors([b""], None),
        lambda driver: driver.from_disk("/checkpoint"),
        lambda driver: driver.join_group("127.0.0.1", 1, 2, "g"),
        lambda driver: driver.from_group(TAKEN, "g"),
        lambda driver: driver.leave_group("g"),
    ],
    ids=["handles", "a folder", "a group", "broadcasts", "the end of a group"],
)
def test_what_sglang_says_it_did_not_do_is_an_error(
    make: Make, kind: type[Older], call: Callable[[Driver], None]
) -> None:
    driver, engine = make(kind)
    engine.success = False
    engine.tokenizer_manager.answer = (False, "no such tensor")
    try:
        call(driver)
    except RuntimeError as error:
        assert str(error) == "SGLang refused the weights: no such tensor"
    else:
        assert (kind, engine.calls) == (Older, []), "a group that 0.4.6 cannot leave"


def test_broadcasts_end_with_the_first_that_is_refused(make: Make) -> None:
    driver, engine = make(Older)
    engine.success = False
    with pytest.raises(RuntimeError, match="refused"):
        driver.from_group(TAKEN, "g")
    assert [call[0] for call in engine.calls] == ["flush", "take"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((True, "Success"), (True, "Success")),
        ((False, "differs"), (False, "differs")),
        ((True, "Success", [{"rank": 0}]), (True, "Success")),  # 0.5.12 has more to say
    ],
)
def test_the_engines_own_checker_is_asked(make: Make, answer: Any, told: tuple[bool, str]) -> None:
    driver, engine = make()
    engine.tokenizer_manager.answer = answer
    assert driver.check("compare") == told
    assert engine.tokenizer_manager.asked[0].action == "compare"


def test_an_engine_is_shut_down(make: Make) -> None:
    driver, engine = make()
    driver.stop()
    assert engine.calls == [("shutdown",)]


# its process


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one line\nand the last one\n\n"), "and the last one"),
        (KeyError("a"), "'a'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_is_told_in_words_that_every_process_can_read(error: Exception, told: str) -> None:
    found = worker._told(error)
    assert type(found) is RuntimeError
    assert str(found) == told


def test_a_driver_whose_trainer_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    log = tmp_path / "log"
    gone = os.getppid()  # a process that did not start the driver
    driver = fork.Process(target=worker.drive, args=(theirs, {}, str(log), gone))
    driver.start()
    theirs.close()
    driver.join(10)
    assert driver.exitcode == 0
    assert not log.exists()
    with pytest.raises(EOFError):
        ours.recv()

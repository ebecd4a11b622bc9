"""What the driver's library tells of the GPUs before an engine starts."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.preflight import gpu, library
from rollout.preflight.finding import Finding, Host
from tests.unit import hosts
from tests.unit.hosts import BUSY, FIRST, FULL, SECOND, SLICE, Nvml, install, libcuda

READS_NUMBERS = "        return int(physical_device_id)\n"
ANOTHER = ("H200", SECOND, 141 << 30, 140 << 30)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    hosts.tree(tmp_path)
    install(tmp_path, "580.65.06")
    libcuda(tmp_path, "/usr/lib64", "580.65.06")
    return tmp_path


@pytest.fixture
def asked(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All findings of a machine whose NVML is given."""

    def of(nvml: Nvml, visible: str | None = None, *, proof: bool = True, **more: str) -> Any:
        environ = more if visible is None else {"CUDA_VISIBLE_DEVICES": visible, **more}
        monkeypatch.setattr(gpu, "nvml", lambda: nvml)
        found = list(gpu.look(Host(machine, environ, "12.8", proof)))
        assert nvml.open == 0  # every session was closed
        return found

    return of


def only(found: list[Finding]) -> tuple[str, bool, str]:
    (finding,) = found
    assert finding.kind == "gpu"
    return finding.name, finding.stops, finding.sentence


# memory


def test_a_gpu_that_another_process_fills_is_said_with_numbers(asked: Any) -> None:
    numbers = "3.0 of 141.0 GiB free, 24 needed"
    change = "stop the other process on it, or choose another GPU by CUDA_VISIBLE_DEVICES"
    said = only(asked(Nvml(BUSY, FULL)))
    assert said == ("gpu-memory-short", True, f"GPU 0 has {numbers}; {change}")
    assert only(asked(Nvml(FULL, BUSY), SECOND))[2] == f"GPU {SECOND} has {numbers}; {change}"


@pytest.mark.parametrize("total", [16 << 30, 22 << 30, (24 << 30) - 1, 24 << 30])
def test_a_gpu_that_is_too_small_is_not_blamed_on_another_process(asked: Any, total: int) -> None:
    """A card of 24 GB has less than 24 GiB free, whatever runs on it."""
    name, stops, sentence = only(asked(Nvml(("L4", FIRST, total, total - (400 << 20)))))
    assert (name, stops) == ("gpu-too-small", True)
    assert sentence.startswith(f"GPU 0 has {total / 2**30:.1f} GiB in all, too small for the proof")
    assert "engines with a smaller model may run here" in sentence
    assert "stop the other process" not in sentence


def test_a_larger_gpu_beside_a_small_one_can_be_chosen(asked: Any) -> None:
    small = ("L4", FIRST, 22 << 30, 22 << 30)
    assert "choose a larger GPU by CUDA_VISIBLE_DEVICES" in only(asked(Nvml(small, small)))[2]


def test_a_gpu_with_just_enough_memory_is_not_remarked_on(asked: Any) -> None:
    needed = gpu.GPU_NEEDED
    assert asked(Nvml(("A", FIRST, needed, needed))) == []
    assert len(asked(Nvml(("A", FIRST, needed, needed - 1)))) == 1


def test_another_process_on_a_gpu_with_room_is_a_warning(asked: Any) -> None:
    name, stops, _ = only(asked(Nvml(("H200", FIRST, 141 << 30, 100 << 30))))
    assert (name, stops) == ("gpu-shared", False)


def test_memory_is_not_looked_at_for_another_command(asked: Any) -> None:
    assert asked(Nvml(BUSY), proof=False) == []


@pytest.mark.parametrize("visible", ["0", "0,1", " 0", FIRST, f"{FIRST},{SECOND}", None])
def test_only_the_first_visible_gpu_is_asked_about_its_memory(
    asked: Any, visible: str | None
) -> None:
    assert asked(Nvml(FULL, BUSY), visible) == []
    assert len(asked(Nvml((*BUSY[:1], FIRST, *BUSY[2:]), ANOTHER), visible)) == 1


@pytest.mark.parametrize("visible", [None, "0", SLICE, SLICE[:12]])
def test_a_slice_of_a_gpu_is_asked_about_its_own_memory(asked: Any, visible: str | None) -> None:
    nvml = Nvml(FULL, parts=[(SLICE, 16 << 30, 16 << 30)])
    name, _, sentence = only(asked(nvml, visible))
    assert name == "gpu-too-small"
    assert sentence.startswith(f"GPU {visible or 0} has 16.0 GiB in all")


def test_of_unlike_gpus_a_number_means_one_only_where_cuda_counts_by_slot(asked: Any) -> None:
    """CUDA's GPU 0 is the fastest by default, NVML's the one in the first slot."""
    nvml = Nvml(("T400", SECOND, 4 << 30, 4 << 30), FULL)
    assert asked(nvml, "0") == []
    assert len(asked(nvml, "0", CUDA_DEVICE_ORDER="PCI_BUS_ID")) == 1
    assert len(asked(nvml, SECOND)) == 1


# CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles", ","])
def test_a_setting_that_hides_every_gpu_is_named(asked: Any, visible: str) -> None:
    assert only(asked(Nvml(FULL), visible)) == (
        "gpu-all-hidden",
        True,
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU; unset it, or name one",
    )


def test_a_gpu_that_does_not_exist_is_named(asked: Any) -> None:
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER), "2,0"))
    assert (name, stops) == ("gpu-number-unknown", True)
    assert "names GPU 2, but this container has 2, counted from 0;" in sentence
    name, stops, sentence = only(asked(Nvml(FULL), SECOND))
    assert (name, stops) == ("gpu-uuid-unknown", True)
    assert "nvidia-smi -L" not in sentence  # that lists UUIDs, which not every engine takes
    assert only(asked(Nvml(FULL), SECOND[:12]))[0] == "gpu-uuid-unknown"


@pytest.mark.parametrize(
    ("visible", "end", "left"),
    [
        ("0,2", "2", "0"),
        ("1,-1,0", "-1", "1"),
        ("0,x", "x", "0"),
        (f"0,{SECOND}", SECOND, "0"),
        (f"{FIRST},1", "1", FIRST),
        (f"{FIRST},GPU-00000000-0000-0000-0000-000000000000", "GPU-0000", FIRST),
    ],
)
def test_every_entry_of_the_list_is_looked_at(
    asked: Any, visible: str, end: str, left: str
) -> None:
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER), visible))
    assert (name, stops) == ("gpus-cut-off", False)
    assert f"CUDA ends the list at '{end}" in sentence
    assert f"it sees 1: set CUDA_VISIBLE_DEVICES={left}, or" in sentence


@pytest.mark.parametrize("visible", ["0,0", "1,0,1", "0,00", f"{FIRST},{FIRST}"])
def test_a_gpu_that_is_named_twice_leaves_none(asked: Any, visible: str) -> None:
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER), visible))
    assert (name, stops) == ("gpu-named-twice", True)
    assert "CUDA sees no GPU then" in sentence


@pytest.mark.parametrize(
    ("visible", "more", "whole"),
    [
        (SECOND, {}, "CUDA_VISIBLE_DEVICES=1"),
        (f"{SECOND},{FIRST}", {}, "CUDA_VISIBLE_DEVICES=1,0"),
        (SECOND[:12], {}, "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_an_engine_that_takes_numbers_alone_is_told_the_numbers(
    asked: Any, machine: Path, visible: str, more: dict[str, str], whole: str
) -> None:
    assert asked(Nvml(FULL, ANOTHER), visible, **more) == []  # no image, no engine
    hosts.image(machine, "vllm", READS_NUMBERS)
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER), visible, **more))
    assert (name, stops) == ("gpu-named-by-uuid", True)
    assert sentence.endswith(f"takes numbers alone; set {whole}")
    assert asked(Nvml(FULL, ANOTHER), "1,0") == []


def test_of_unlike_gpus_the_number_is_said_with_the_order_it_counts_in(
    asked: Any, machine: Path
) -> None:
    hosts.image(machine, "vllm", READS_NUMBERS)
    found = only(asked(Nvml(("T400", SECOND, 4 << 30, 4 << 30), FULL), FIRST))[2]
    assert found.endswith("set CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1")


def test_a_slice_has_no_number_to_be_named_by(asked: Any, machine: Path) -> None:
    hosts.image(machine, "vllm", READS_NUMBERS)
    nvml = Nvml(FULL, parts=[(SLICE, 70 << 30, 70 << 30)])
    found = only(asked(nvml, SLICE))[2]
    assert found.endswith(
        "start the container with that instance alone, and unset CUDA_VISIBLE_DEVICES"
    )


def test_a_vllm_that_takes_uuids_is_not_blamed(asked: Any, machine: Path) -> None:
    hosts.image(machine, "vllm", "        return resolve(physical_device_id)\n")
    assert asked(Nvml(FULL, ANOTHER), SECOND) == []


def test_sglang_takes_one_uuid_and_not_several(asked: Any, machine: Path) -> None:
    hosts.image(machine, "sglang")
    assert asked(Nvml(FULL, ANOTHER), SECOND) == []
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER), f"{FIRST},{SECOND}"))
    assert (name, stops) == ("gpus-named-by-uuid", False)
    assert sentence.endswith("set CUDA_VISIBLE_DEVICES=0,1")


# NVML that does not answer


@pytest.mark.parametrize(
    ("code", "name", "remedy"),
    [
        (18, "gpu-driver-mismatch", "start the container anew, and restart the host first"),
        (999, "gpu-driver-silent", "start the container anew, and by CDI"),
        (9, "gpu-driver-silent", "start the container anew, and by CDI"),
    ],
)
def test_an_nvml_that_does_not_start_is_said_by_its_code(
    asked: Any, code: int, name: str, remedy: str
) -> None:
    found, stops, sentence = only(asked(Nvml(FULL, init=code)))
    assert (found, stops) == (name, True)
    assert f"(NVML code {code})" in sentence
    assert remedy in sentence


def test_a_container_without_nvml_is_told_of_the_capability(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    for load in (missing, SimpleNamespace):  # and a library without its functions
        monkeypatch.setattr(gpu, "nvml", load)
        found = only(list(gpu.look(Host(machine, {}, "12.8"))))
        assert found[0] == "gpu-nvml-missing"


def test_a_driver_that_never_answers_is_not_waited_for() -> None:
    never = threading.Event()
    assert library.ask(never.wait, 0.01) == library.Answer(library.HANGS)
    never.set()


def test_a_driver_that_never_answers_is_a_warning_and_holds_up_no_other_command(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def ask(_: Any, limit: float) -> library.Answer:
        waited.append(limit)
        return library.Answer(library.HANGS)

    monkeypatch.setattr(library, "ask", ask)
    name, stops, _ = only(list(gpu.look(Host(machine, {}, "12.8"))))
    assert (name, stops) == ("gpu-driver-hangs", False)
    # Without persistence a healthy driver takes some seconds to wake the GPUs.
    assert list(gpu.look(Host(machine, {}, "12.8", proof=False))) == []
    assert waited == [10.0, 1.0]


@pytest.mark.parametrize("name", ["Count_v2", "MemoryInfo", "UUID", "Name"])
def test_of_what_nvml_does_not_tell_there_is_no_finding(asked: Any, name: str) -> None:
    broken = Nvml(BUSY if name != "Name" else FULL)
    setattr(broken, f"nvmlDeviceGet{name}", lambda *_: 999)
    assert asked(broken, "GPU-1" if name == "UUID" else "0") == []


# health

ILL = {
    "gpu-fabric-not-ready": (True, {"Fabric": (2, 0)}, "systemctl start nvidia-fabricmanager"),
    "gpu-fabric-failed": (False, {"Fabric": (3, 999)}, "(NVML code 999)"),
    "gpu-prohibited": (True, {"DeviceGetComputeMode": (2,)}, "'nvidia-smi -i 0 -c DEFAULT'"),
    "gpu-exclusive": (True, {"DeviceGetComputeMode": (3,)}, "'nvidia-smi -i 0 -c DEFAULT'"),
    "gpu-mig-empty": (True, {"DeviceGetMigMode": (1, 1)}, "'nvidia-smi -i 0 -mig 0'"),
    "gpu-memory-bad": (False, {"DeviceGetRemappedRows": (0, 9, 1, 1)}, "replaced"),
    "gpu-reset-pending": (False, {"DeviceGetRemappedRows": (0, 1, 1, 0)}, "--gpu-reset -i 0"),
    "gpu-memory-errors": (False, {"DeviceGetTotalEccErrors": (3,)}, "had 3 memory errors"),
    "gpu-ecc-changes": (False, {"DeviceGetEccMode": (1, 0)}, "turns its ECC off"),
}


@pytest.mark.parametrize("name", ILL)
def test_an_ill_gpu_is_said_with_what_to_do(asked: Any, name: str) -> None:
    stops, says, part = ILL[name]
    nvml = Nvml(FULL, ANOTHER, says=says)
    found = only(asked(nvml))
    assert found[:2] == (name, stops)
    assert part in found[2]
    # It is said of a GPU that the job sees, and of no other.
    assert only(asked(nvml, "0", proof=False))[0] == name
    assert asked(nvml, "1") == []


def test_a_gpu_that_is_lost_is_said(asked: Any) -> None:
    name, stops, sentence = only(asked(Nvml(FULL, ANOTHER, lost=1)))
    assert (name, stops) == ("gpu-lost", True)
    assert sentence.startswith("GPU 1 fell off the bus (NVML code 15);")
    assert asked(Nvml(FULL, ANOTHER, lost=1), "0") == []


def test_the_second_gpu_that_has_no_fabric_yet_is_said(asked: Any) -> None:
    assert only(asked(Nvml(FULL, ANOTHER, says={"Fabric": (1, 0)}, of=1)))[2].startswith(
        "GPU 1 has"
    )


@pytest.mark.parametrize("pipe", [None, "/mps"])
def test_an_exclusive_gpu_with_mps_is_as_it_has_to_be(
    asked: Any, machine: Path, pipe: str | None
) -> None:
    nvml = Nvml(FULL, says={"DeviceGetComputeMode": (3,)})
    folder = machine / (pipe or "/tmp/nvidia-mps").lstrip("/")
    folder.mkdir(parents=True)
    (folder / "control").touch()
    assert asked(nvml, None, **({"CUDA_MPS_PIPE_DIRECTORY": pipe} if pipe else {})) == []


def test_a_healthy_gpu_of_a_host_with_nvswitch_is_not_remarked_on(asked: Any) -> None:
    says = {
        "Fabric": (3, 0),
        "DeviceGetComputeMode": (0,),
        "DeviceGetMigMode": (0, 0),
        "DeviceGetEccMode": (1, 1),
        "DeviceGetRemappedRows": (1, 0, 0, 0),  # corrected ones are no harm
        "DeviceGetTotalEccErrors": (0,),
        "SystemGetCudaDriverVersion_v2": (13000,),
    }
    assert asked(Nvml(FULL, ANOTHER, says=says)) == []
    assert asked(Nvml(FULL, says={"Fabric": (0, 0)})) == []  # a card without NVLink

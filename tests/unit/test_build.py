"""What a build promises: a layer for every distribution, a name, and no trace of the host."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from images import catalog, host
from images.building import (
    budget,
    build,
    builder,
    builders,
    context,
    dockerfile,
    fetching,
    interpreter,
    labels,
    layering,
    payload,
    release,
)
from images.building.buildah import Buildah
from images.building.contents import Summary
from images.building.docker import Docker
from images.building.layers import Layer, Measured, Record
from images.catalog import Image
from images.locking import base, lock
from images.locking.lock import Locked
from images.schema import BACKENDS
from rollout.problem import Problem

from ..conftest import ABOVE, VERSIONS, Checkout, sha256

TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
SHA = sha256("lock")
# A lock with a distribution for each layer, and the catalog file that says which one is a source.
WHOLE = VERSIONS | {
    "nvidia-cublas-cu12": "12.8.4.1",
    "nvidia-cuda-nvcc": "13.0.88",
    "flashinfer-python": "0.2.5",
}
SOURCES = {"source-distributions": '{ flashinfer-python = "no wheel" }'}


def locked(versions: Mapping[str, str] = VERSIONS, above: Mapping[str, str] = {}) -> list[Locked]:
    below = [Locked(name, version, sha256(name)) for name, version in versions.items()]
    return below + [Locked(n, v, sha256(n), above=True) for n, v in above.items()]


# layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("nvidia-cublas-cu12", "mathlibs"),
        ("nvidia-cusparselt-cu12", "mathlibs"),
        ("nvidia-nvjitlink-cu12", "mathlibs"),
        ("nvidia-nccl-cu12", "nvidia"),
        ("nvidia-cudnn-cu12", "nvidia"),
        ("nvidia-cuda-runtime-cu12", "nvidia"),
        # as torch names them since CUDA 13: some with a suffix, some without
        ("nvidia-cublas", "mathlibs"),
        ("nvidia-cusparselt-cu13", "mathlibs"),
        ("nvidia-cudnn-cu13", "nvidia"),
        ("nvidia-cuda-runtime", "nvidia"),
        ("nvidia-nvtx", "nvidia"),
        ("nvidia-cuda-nvcc", "toolchain"),
        ("nvidia-cuda-nvcc-cu12", "toolchain"),
        ("nvidia-cuda-cccl", "toolchain"),
        ("nvidia-cuda-crt", "toolchain"),
        ("nvidia-nvvm", "toolchain"),
        # by their names alone of the same kind
        ("nvidia-ml-py", "dependencies"),
        ("nvidia-cutlass-dsl", "dependencies"),
        ("nvidia-cudnn-frontend", "dependencies"),
        ("torch", "torch"),
        ("triton", "torch"),
        ("torchvision", "torch"),
        ("torchao", "dependencies"),
        ("ray", "dependencies"),
        ("vllm", "engine"),
    ],
)
def test_a_distribution_lies_where_what_changes_as_often_lies(name: str, layer: str) -> None:
    assert layer_of(name, "vllm") == layer


def layer_of(
    name: str, engine: str, names: Collection[str] = (), sources: Collection[str] = ()
) -> str:
    """The layer of a distribution of the engine's part of a lock."""
    return layering.layer_of(lock.Locked(name, "1", SHA), engine, names, sources)


def test_what_trains_lies_above_the_engine_whatever_it_is_called() -> None:
    for name in ("verl", "nvidia-nccl-cu12", "torch", "vllm"):
        entry = lock.Locked(name, "1", SHA, above=True)
        assert layering.layer_of(entry, "vllm", [name], [name]) == "framework"
    assert layering.LAYERS[-1] == "framework"


def test_a_second_cuda_runtime_is_the_toolchains() -> None:
    plain, suffixed = "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"
    both = [plain, suffixed, "torch"]
    assert layer_of(plain, "vllm", both) == "toolchain"
    assert layer_of(suffixed, "vllm", both) == "nvidia"
    assert layer_of(plain, "vllm", [plain, "nvidia-cudnn-cu13", "torch"]) == "nvidia"


def test_a_source_distribution_lies_above_what_it_is_built_with() -> None:
    names = ["ray", "setuptools", "triton"]
    assert [layer_of(name, "vllm", names, ["ray"]) for name in names] == [
        *("sources", "dependencies", "torch")
    ]
    assert layering.LAYERS.index("sources") > layering.LAYERS.index("dependencies")


def test_an_engine_by_any_name_is_the_engine() -> None:
    assert layer_of("nvidia-engine", "nvidia-engine") == "engine"


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.reference)
def test_layers_hold_every_distribution_of_a_lock_once(image: Image) -> None:
    entries = lock.read(image)
    texts = layering.layers(entries, image.engine, image.sources)
    found = Counter(e.text for text in texts.values() for e in lock.parse(text, image.lock))
    assert found == Counter(entry.text for entry in entries)
    assert list(texts) == [layer for layer in layering.LAYERS if layer in texts]
    assert [e.name for e in lock.parse(texts["engine"], image.lock)] == [image.engine]


def test_a_layer_does_not_depend_on_the_order_of_the_lock() -> None:
    assert layering.layers(locked(), "vllm") == layering.layers(locked()[::-1], "vllm")


def test_a_layer_that_would_be_empty_is_none() -> None:
    versions = {"torch": "2.9.0+cpu", "vllm": "0.12.0"}
    assert list(layering.layers(locked(versions), "vllm")) == ["torch", "engine"]


def test_a_framework_changes_no_layer_of_the_engine() -> None:
    alone, beside = (layering.layers(locked(above=above), "vllm") for above in ({}, ABOVE))
    assert beside.pop("framework")
    assert alone == beside


def test_what_has_to_be_built_stands_in_a_list_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "context"
    texts = layering.layers(locked(above=ABOVE), "vllm", ["antlr4-python3-runtime"])
    context.prepare(folder, "", texts, {}, [], ["antlr4-python3-runtime"])
    lists = {path.name: path.read_text() for path in (folder / "layers").iterdir()}
    assert "antlr4-python3-runtime==4.9.3" in lists["framework.sources.txt"]
    assert "antlr4" not in lists["framework.wheels.txt"]
    assert {"verl==0.7.1", "pip==26.0"} <= set(
        re.findall(r"\S+==\S+", lists["framework.wheels.txt"])
    )
    assert "torch.sources.txt" not in lists


def test_every_layer_of_an_image_has_a_name_in_the_order_of_the_dockerfiles(
    checkout: Checkout,
) -> None:
    image = checkout.image(SOURCES, versions=WHOLE)
    assert layering.layer_names(image, locked(WHOLE, ABOVE)) == [
        "base",
        *layering.LAYERS,
        "entrypoints",
    ]
    few = {"torch": "2.9.0+cpu", "vllm": "0.12.0"}
    assert layering.layer_names(image, locked(few)) == ["base", "torch", "engine", "entrypoints"]


# names


@pytest.mark.parametrize(
    ("versions", "tag"),
    [
        (VERSIONS, f"vllm-0.12.0-cu128-py311-{SHA[:8]}"),
        ({"torch": "2.9.0", "vllm": "0.12.0+cpu"}, f"vllm-0.12.0-cpu-cpu-py311-{SHA[:8]}"),
        (
            {"vllm": "0.12.0rc1.post1.dev3+g0a1"},
            f"vllm-0.12.0rc1.post1.dev3-g0a1-cpu-py311-{SHA[:8]}",
        ),
    ],
)
def test_the_immutable_tag_is_one_that_a_registry_takes(
    checkout: Checkout, versions: dict[str, str], tag: str
) -> None:
    found = labels.immutable_tag(checkout.image(), locked(versions), SHA)
    assert found == tag
    assert TAG.fullmatch(found)


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.reference)
def test_every_name_of_the_catalog_is_one_that_a_registry_takes(image: Image) -> None:
    assert TAG.fullmatch(image.tag)
    assert TAG.fullmatch(labels.immutable_tag(image, lock.read(image), SHA))
    assert re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", image.repository)


def test_labels_are_the_row_of_the_catalog(checkout: Checkout) -> None:
    found = labels.of_image(checkout.image(), locked(), SHA, "base:1")
    assert {k: v for k, v in found.items() if k.startswith("rollout.")} == {
        "rollout.backend": "vllm",
        "rollout.base": "base:1",
        "rollout.cuda": "12.8",
        "rollout.engine.version": "0.12.0",
        "rollout.framework": "verl",
        "rollout.framework.version": "0.7.1",
        "rollout.lock.sha256": SHA,
        "rollout.python": base.python("3.11"),
        "rollout.ray": "2.52.1",
        "rollout.resolved-as-of": "2025-12-20",
        "rollout.torch": "2.9.0",
    }
    assert found["org.opencontainers.image.title"] == "verl-rollout:vllm-0.12"
    assert found["org.opencontainers.image.version"] == labels.immutable_tag(
        checkout.image(), locked(), SHA
    )


def test_an_image_without_cuda_says_so(checkout: Checkout) -> None:
    versions = {"torch": "2.9.0+cpu", "vllm": "0.12.0"}
    found = labels.of_image(checkout.image(), locked(versions), SHA, "")
    assert (found["rollout.cuda"], found["rollout.ray"]) == ("none", "none")
    assert payload.facts(checkout.image(), locked(versions))["cuda"] is None


# the Dockerfile's end


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.reference)
def test_an_image_with_cuda_asks_every_container_engine_for_the_gpu(image: Image) -> None:
    text = build.recipe_text(image, lock.read(image))
    asked = 'NVIDIA_DRIVER_CAPABILITIES="compute,utility"' in text
    assert asked == ('NVIDIA_VISIBLE_DEVICES="all"' in text) == ("cuda" in image.expect)


def test_a_catalog_file_may_ask_for_another_part_of_the_driver(checkout: Checkout) -> None:
    mine = checkout.image({"env": '{ NVIDIA_DRIVER_CAPABILITIES = "all" }'})
    assert labels.variables(mine, locked()) == {
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "all",
    }


# what decides a layer


def test_parts_are_told_apart_by_more_than_their_bytes_in_a_row() -> None:
    assert context.digest("ab", "c") != context.digest("a", "bc") != context.digest("abc")
    assert context.digest("a") == context.digest(b"a")


@pytest.fixture
def own(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the scripts of a build step and entrypoints of its own."""
    (checkout.root / "entrypoints/backends").mkdir(parents=True)
    for name in ("cli.py", "backends/vllm.py", "backends/notes.txt"):
        (checkout.root / "entrypoints" / name).write_text(f"# {name}\n")
    scripts = [checkout.root / script.name for script in context.SCRIPTS]
    for script in scripts:
        script.write_text("#!/bin/sh\n")
    monkeypatch.setattr(payload, "ENTRYPOINTS", checkout.root / "entrypoints")
    monkeypatch.setattr(context, "SCRIPTS", scripts)
    last = checkout.root / "entrypoints.sh"
    last.write_text("#!/bin/sh\n")
    monkeypatch.setattr(context, "LAST", last)
    return checkout.root


def arguments(image: Image) -> dict[str, str]:
    entries = lock.read(image)
    texts = layering.layers(entries, image.engine, image.sources)
    return context.arguments(texts, "base:1", payload.files(image, entries))


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if before[key] != after[key]}


def test_there_is_an_argument_for_each_layer_and_the_base(checkout: Checkout) -> None:
    values = arguments(checkout.image(SOURCES, versions=WHOLE, above=ABOVE))
    assert list(values) == ["BASE", *(layer.upper() for layer in layering.LAYERS), "ENTRYPOINTS"]
    assert values["BASE"] == "base:1"


@pytest.mark.parametrize("name", [script.name for script in context.SCRIPTS])
def test_a_byte_of_what_a_step_runs_changes_every_layer(
    checkout: Checkout, own: Path, name: str
) -> None:
    before = arguments(checkout.image())
    (own / name).write_text("#!/bin/sh \n")
    assert changed(before, arguments(checkout.image())) == set(before) - {"BASE", "ENTRYPOINTS"}


def test_a_byte_of_the_last_step_changes_that_layer_alone(checkout: Checkout, own: Path) -> None:
    before = arguments(checkout.image())
    (own / "entrypoints.sh").write_text("#!/bin/sh \n")
    assert changed(before, arguments(checkout.image())) == {"ENTRYPOINTS"}


def test_a_byte_of_an_entrypoint_changes_that_layer_alone(checkout: Checkout, own: Path) -> None:
    before = arguments(checkout.image())
    (own / "entrypoints/backends/notes.txt").write_text("not a module\n")
    assert changed(before, arguments(checkout.image())) == set()
    (own / "entrypoints/backends/vllm.py").write_text("# backends/vllm.pi\n")
    assert changed(before, arguments(checkout.image())) == {"ENTRYPOINTS"}


def test_how_another_engine_is_driven_is_no_part_of_an_image(checkout: Checkout, own: Path) -> None:
    before = arguments(checkout.image())
    for name in ("sglang.py", "sglang_worker.py", "tensorrt_llm.py", "transformers.py"):
        (own / "entrypoints/backends" / name).write_text("# another engine\n")
        assert changed(before, arguments(checkout.image())) == set(), name
    for name in ("vllm_extension.py", "served.py", "__init__.py", "vllmish.py"):
        (own / "entrypoints/backends" / name).write_text("# for every engine, or for this one\n")
        after = arguments(checkout.image())
        assert changed(before, after) == {"ENTRYPOINTS"}, name
        before = after


@pytest.mark.parametrize("image", catalog.load(), ids=lambda image: image.tag)
def test_an_image_has_the_modules_of_its_backend_and_of_all(image: Image) -> None:
    found = {
        Path(name).stem
        for name in payload.files(image, lock.read(image))
        if name.startswith("rollout/backends/")
    }
    assert {"__init__", image.backend.replace("-", "_")} <= found
    others = {name.replace("-", "_") for name in BACKENDS if name != image.backend}
    assert not [name for name in found if re.search(rf"(^|_)({'|'.join(others)})(_|$)", name)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("nvidia-cublas-cu12", "MATHLIBS"),
        ("nvidia-nccl-cu12", "NVIDIA"),
        ("triton", "TORCH"),
        ("nvidia-cuda-nvcc", "TOOLCHAIN"),
        ("ray", "DEPENDENCIES"),
        ("flashinfer-python", "SOURCES"),
        ("vllm", "ENGINE"),
    ],
)
def test_another_version_changes_its_layer_and_the_last_one(
    checkout: Checkout, name: str, layer: str
) -> None:
    before = arguments(checkout.image(SOURCES, versions=WHOLE))
    after = arguments(checkout.image(SOURCES, versions=WHOLE | {name: "99"}))
    assert changed(before, after) == {layer, "ENTRYPOINTS"}  # the last one holds the lock


def test_the_inputs_of_an_image_change_with_its_dockerfile_and_its_base(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = checkout.image()
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    before = build.inputs(image)
    assert build.inputs(image) == before
    monkeypatch.setattr(build, "base_name", lambda *_: "base:2")
    other_base = build.inputs(image)
    image.dockerfile.write_text(image.dockerfile.read_text() + "\nUSER 1000:0\n")
    assert len({before, other_base, build.inputs(image)}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"env": '{ VLLM_WORKER_MULTIPROC_METHOD = "fork" }'},
        {"env": '{ VLLM_WORKER_MULTIPROC_METHOD = "spawn", ANOTHER = "1" }'},
        {"env": None},
    ],
    ids=["value", "another", "none"],
)
def test_the_inputs_of_an_image_change_with_its_variables(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]
) -> None:
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    assert build.inputs(checkout.image(changes)) != build.inputs(checkout.image())


def test_neither_labels_nor_our_own_package_are_inputs_of_the_layers_below(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or every reworded sentence would ask for two builds of every image from nothing."""
    image = checkout.image()
    text = image.dockerfile.read_text()
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    before = build.inputs(image)
    monkeypatch.setattr(labels, "of_image", lambda *_: {"rollout.torch": "another"})
    monkeypatch.setattr(payload, "files", lambda *_: {"rollout/checks.py": b"other"})
    monkeypatch.setattr(context, "LAST", Path(__file__))
    image.dockerfile.write_text(
        text.replace("context/entrypoints", "context/other").replace("# our", "# new")
    )
    assert build.inputs(image) == before
    image.dockerfile.write_text(text.replace("1000:0", "1001:0"))
    assert build.inputs(image) != before


def test_what_an_image_may_weigh_is_no_input_of_it(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    changes = {"size": '{ compressed = "9 GB", largest-layer = "9 GB" }', "reproducible": '"R1"'}
    assert build.inputs(checkout.image(changes)) == build.inputs(checkout.image())


def test_the_dockerfile_that_is_built_has_the_variables_and_labels(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    image = checkout.image()
    text = build.recipe_text(image, lock.read(image))
    stamped = labels.of_image(image, lock.read(image), host.sha256(image.lock), "base:1")
    set_to = labels.variables(image, lock.read(image))
    names = layering.layer_names(image, lock.read(image))[1:-1]
    steps = dockerfile.steps(image.dockerfile.read_text(), names)
    assert text == dockerfile.stamped(steps, set_to, stamped)
    assert '    VLLM_WORKER_MULTIPROC_METHOD="spawn"' in text
    assert 'rollout.base="base:1"' in text


def test_the_last_layer_holds_our_package_the_lock_and_what_the_image_is(
    checkout: Checkout, own: Path
) -> None:
    image = checkout.image()
    files = payload.files(image, lock.read(image))
    assert sorted(files) == [
        *("image.json", "launcher", "python", "requirements.lock"),
        *("rollout/backends/vllm.py", "rollout/cli.py"),
    ]
    assert files["rollout/cli.py"] == (own / "entrypoints/cli.py").read_bytes()
    assert files["requirements.lock"] == image.lock.read_bytes()
    assert files["python"] == b"3.11"
    assert json.loads(files["image.json"]) == payload.facts(image, lock.read(image))


def test_the_image_knows_what_it_has_to_prove(checkout: Checkout) -> None:
    image = structs.replace(checkout.image(), backend="tensorrt-llm")
    found = payload.facts(image, locked())
    assert found["reference"] == "verl-rollout:vllm-0.12"
    assert found["engine"] == {"name": "tensorrt-llm", "distribution": "tensorrt-llm"}
    assert found["imports"] == ["torch", "tensorrt_llm"]
    assert found["smoke"] == {
        "sleep_levels": [1, 2],
        "refit": ["cuda-ipc"],
        "fp8": False,
        "server": False,
    }
    assert found["optional_libraries"] == []
    assert (found["cuda"], found["resolved_as_of"]) == ("12.8", "2025-12-20")


def test_what_a_file_says_of_fp8_and_libraries_is_in_the_image(checkout: Checkout) -> None:
    changes = {
        "backend": '"sglang"',
        "requirements": '["sglang"]',
        "smoke": "{ sleep-levels = [1], refit = ['nccl'], server = true, tensor-parallel = 2 }",
        "optional-libraries": '{ "libucp.so.0" = "UCX", "libmpi.so.40" = "MPI" }',
    }
    found = payload.facts(checkout.image(changes), locked())
    assert found["smoke"] == {
        "sleep_levels": [1],
        "refit": ["nccl"],
        "fp8": False,
        "server": True,
        "tensor_parallel": 2,
    }
    assert found["optional_libraries"] == ["libmpi.so.40", "libucp.so.0"]


# the host's settings


def exported(settings: Mapping[str, str], *, wheels: bool = False) -> dict[str, str]:
    """The settings as the shell in the build container reads them."""
    words = shlex.split(context.indexes(settings, wheels))
    assert words[::2] == ["export"] * (len(words) // 2)
    return dict(word.split("=", 1) for word in words[1::2])


def test_the_steps_know_the_indexes_by_name_whatever_is_in_it() -> None:
    settings = {
        "UV_DEFAULT_INDEX": "https://mirror.example/a b$c'd",
        "UV_INDEX": "a=https://x/ https://y/",
    }
    assert exported(settings) == settings


@pytest.mark.parametrize(
    "name",
    [
        *("no_proxy", "https_proxy", "SSL_CERT_FILE", "UV_SYSTEM_CERTS", "UV_HTTP_TIMEOUT"),
        *("UV_INDEX_MINE_USERNAME", "UV_INDEX_MINE_PASSWORD", "UV_INSECURE_HOST", "NETRC"),
    ],
)
def test_the_steps_know_no_way_to_an_index_and_no_credentials(name: str) -> None:
    assert exported({name: "x"}) == {}


@pytest.mark.parametrize("login", ["me:secret@", "token@", "me:p%40ss@"])
def test_an_index_has_no_credentials_in_its_name(login: str) -> None:
    settings = {
        "UV_DEFAULT_INDEX": f"https://{login}mirror.example/simple",
        "UV_INDEX": f"a=https://{login}one.example/ https://{login}two.example/",
        "UV_FIND_LINKS": f"https://{login}three.example/x",
    }
    assert exported(settings) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "a=https://one.example/ https://two.example/",
        "UV_FIND_LINKS": "https://three.example/x",
    }


def test_the_hosts_cache_is_not_the_builds() -> None:
    assert exported({"UV_CACHE_DIR": "/home/me", "UV_LINK_MODE": "hardlink"}) == {}


@pytest.mark.parametrize("folder", ["/home/me/wheels", "wheels", "file:///home/me/wheels"])
def test_a_folder_of_the_host_is_not_looked_for_in_the_build(folder: str) -> None:
    links = f"{folder},https://wheels.example/x"
    assert exported({"UV_FIND_LINKS": folder}) == {}
    assert exported({"UV_FIND_LINKS": links}) == {"UV_FIND_LINKS": "https://wheels.example/x"}


@pytest.mark.parametrize("name", ["CONFIG_FILE", "CONSTRAINT", "PROJECT", "WORKING_DIRECTORY"])
def test_a_file_of_the_host_is_not_looked_for_in_the_build(name: str) -> None:
    # uv ends with an error for each of these that is not there, with --no-config too.
    assert exported({f"UV_{name}": "/home/me/x", "UV_NO_INDEX": "1"}) == {"UV_NO_INDEX": "1"}


def test_wheels_of_the_host_are_found_in_the_context() -> None:
    found = exported({"UV_FIND_LINKS": "/home/me/wheels,https://wheels.example/x"}, wheels=True)
    assert found == {"UV_FIND_LINKS": "https://wheels.example/x,/mnt/context/wheels"}


def test_a_wheel_of_the_host_is_taken_at_the_locked_version_alone(tmp_path: Path) -> None:
    for name in ("torch-2.9.0", "torch-2.9.1", "vllm-0.12.0", "Other-1"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    found = context.own_wheels(locked({"torch": "2.9.0", "ray": "1", "other": "2"}), str(tmp_path))
    assert [wheel.name for wheel in found] == ["torch-2.9.0-py3-none-any.whl"]


def test_the_clock_of_a_build_is_the_hosts_unless_a_test_asks_for_another() -> None:
    assert context.clock({}) == {}
    assert context.clock({"FAKETIME": "+1h", "TZ": "UTC", "LD_PRELOAD": "/x.so"}) == {}
    found = context.clock({context.CLOCK: "+25h"})
    assert found["FAKETIME"] == "+25h"
    assert found["LD_PRELOAD"].startswith("/mnt/context/tools/libfaketime")


def test_too_little_disk_is_said_with_numbers_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=3 << 29)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: free)
    build.check_disk(tmp_path, 3 << 29)
    with pytest.raises(Problem) as caught:
        build.check_disk(tmp_path / "not/there", 4 << 30)
    assert caught.value.code == 3
    numbers = "1.5 GiB free, about 4 GiB needed"
    assert caught.value.sentence == f"no disk space for a build in {tmp_path}: {numbers}; free some"


# a whole build, with a builder that builds nothing


class Looks:
    """Looks at what it is given to build."""

    def __init__(self, *, interrupted: bool = False) -> None:
        self.seen: dict[str, Any] = {}
        self.pulled: list[str] = []
        self.interrupted = interrupted

    def storage(self) -> Path:
        return build.BUILD.parent

    def sweep(self) -> None:
        """There is nothing."""

    def pull(self, image: str) -> None:
        self.pulled.append(image)

    def own(self) -> Path:
        return build.BUILD / "own"

    def copies(self) -> int:
        return 1

    def build(self, recipe: builder.Recipe) -> str:
        files = {str(p.relative_to(recipe.context)) for p in recipe.context.rglob("*.*")}
        self.seen = {
            "recipe": recipe,
            "files": files,
            "context": {p: p.read_bytes() for p in recipe.context.rglob("*") if p.is_file()},
            "settings": (recipe.context / "indexes.env").read_text(),
        }
        if self.interrupted:
            raise KeyboardInterrupt
        return BUILT.id

    def inspect(self, name: str) -> builder.Built | None:
        return BUILT if self.seen and name == BUILT.id else None


class Fake(Looks, Buildah):
    """The builder whose digests count."""

    def version(self) -> str:
        return "buildah 1.28.2"


class FakeDocker(Looks, Docker):
    """The other one."""


BUILT = builder.Built("0" * 64, {}, ("sha256:a",), "sha256:manifest")
NAMES = ["base", "nvidia", "torch", "dependencies", "engine", "entrypoints"]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What builds are held against their budgets with; all of them keep theirs."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(budget, "check", lambda *arguments: made.append(arguments))
    return made


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is fetched, without an index."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fetching, "fetch", lambda *arguments: made.append(arguments))
    return made


@pytest.fixture
def image(
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    fetched: list[tuple[Any, ...]],
    checked: list[tuple[Any, ...]],  # noqa: ARG001 - there are no layers to look at
) -> Image:
    """An image, on a host with an index of its own, credentials and a CA bundle."""
    monkeypatch.setattr(build, "base_image", lambda *_, **__: "localhost/base:1")
    monkeypatch.setattr(build, "check_disk", lambda *_: None)
    assert fetched == []
    (checkout.root / "uv").write_text("uv")
    (checkout.root / "ca.pem").write_text("the company's root")
    monkeypatch.setattr(host, "uv", lambda: str(checkout.root / "uv"))
    monkeypatch.setenv("SSL_CERT_FILE", str(checkout.root / "ca.pem"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://me:xyzzy-password@mirror.example/simple")
    monkeypatch.setenv("UV_FIND_LINKS", "")
    monkeypatch.delenv(context.CLOCK, raising=False)
    return checkout.image()


def test_a_build_gets_the_files_and_neither_credentials_nor_certificates(image: Image) -> None:
    tool = Fake()
    build.build(image, tool)
    seen = tool.seen
    assert "export UV_DEFAULT_INDEX=https://mirror.example/simple\n" in seen["settings"]
    for path, data in seen["context"].items():
        assert b"xyzzy-password" not in data, path
        assert b"the company's root" not in data, path
    assert "layers/nvidia.wheels.txt" in seen["files"]
    assert {script.name for script in (*context.SCRIPTS, context.LAST)} <= {
        path.name for path in seen["context"]
    }
    assert seen["recipe"].name == "localhost/verl-rollout:vllm-0.12"
    assert seen["recipe"].timestamp == build.TIMESTAMP
    assert seen["recipe"].arguments["BASE"] == "localhost/base:1"
    assert seen["recipe"].fetched == fetching.cache()


def test_the_files_are_fetched_with_the_hosts_credentials_before_anything_is_built(
    image: Image, fetched: list[tuple[Any, ...]]
) -> None:
    tool = Fake()
    build.build(image, tool)
    [(entries, python, sources, here, settings, folder, _)] = fetched
    assert (entries, python, set(sources), here) == (lock.read(image), "3.11", set(), set())
    assert settings["UV_DEFAULT_INDEX"] == "https://me:xyzzy-password@mirror.example/simple"
    assert folder == tool.seen["recipe"].context / "sources"


def test_an_image_with_a_python_of_its_own_gets_its_file_and_is_built_on_its_own_base(
    checkout: Checkout, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert image.interpreter is None
    content = b"a Python"
    file = "cpython-3.12.1+20260101-x86_64-unknown-linux-gnu-install_only_stripped.tar.gz"
    place = checkout.root / "mirror/20260101" / file
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    monkeypatch.setenv(interpreter.MIRROR, str(checkout.root / "mirror"))
    monkeypatch.setattr(host, "cache", lambda: checkout.root / "cache")
    bases: list[str] = []

    def base_image(_: object, one: Image, **__: object) -> str:
        bases.append(one.reference)
        return "localhost/base:2"

    monkeypatch.setattr(build, "base_image", base_image)
    monkeypatch.setattr(build, "base_name", lambda one=None: f"base:{one.tag if one else ''}")
    sha256 = hashlib.sha256(content).hexdigest()
    table = f'{{ file = "{file}", sha256 = "{sha256}", source = "uv" }}'
    tool, own = Fake(), checkout.image({"python": '"3.12"', "interpreter": table})
    build.build(own, tool)
    seen, arguments = tool.seen["context"], tool.seen["recipe"].arguments
    files = {path.name: data for path, data in seen.items()}
    assert files[interpreter.FILE] == content
    assert files["python"] == b"3.12"  # of the payload, which the step reads too
    assert (arguments["BASE"], bases) == ("localhost/base:2", [own.reference])
    # The same lock without it has the same arguments otherwise.
    plain = Fake()
    build.build(image, plain)
    less = {k: v for k, v in arguments.items() if k not in ("PYTHON", "ENTRYPOINTS")}
    others = plain.seen["recipe"].arguments
    assert less == {k: v for k, v in others.items() if k != "ENTRYPOINTS"}
    assert interpreter.FILE not in {path.name for path in plain.seen["context"]}


@pytest.mark.usefixtures("image")
def test_a_build_on_a_release_image_pulls_it_and_fetches_what_may_be_added_alone(
    checkout: Checkout, fetched: list[tuple[Any, ...]]
) -> None:
    digest = f"sha256:{hashlib.sha256(b'image').hexdigest()}"
    said = f'digest = "{digest}", source = "s", torch = "2.10", torch-source = "t"'
    table = f'{{ image = "v/engine", {said} }}'
    own = checkout.image({"release": table}, above=ABOVE)
    # What nobody could lock is in that image, so nobody asks for it here.
    text = re.sub(r"(vllm==0\.12\.0) .*\n.*\n", r"\1\n    # not locked: x\n", own.lock.read_text())
    own.lock.write_text(text)
    assert [entry.name for entry in lock.unlocked(lock.read(own))] == ["vllm"]
    tool = Fake()
    build.build(own, tool, registry="registry.example/mirror")
    assert tool.pulled == [f"registry.example/mirror/v/engine@{digest}"]
    assert {entry.name for entry in fetched[0][0]} == set(ABOVE)
    files = {path.name: data for path, data in tool.seen["context"].items()}
    assert files["additions"] == release.SCRIPTS[0].read_bytes()
    asked = json.loads(files["release.json"])
    assert asked["engine"] == ["vllm", "0.12.0"]
    assert set(asked["candidates"]) == set(ABOVE)
    recipe = tool.seen["recipe"]
    assert recipe.name == f"localhost/{own.reference}-release"
    assert set(recipe.arguments) == {"REGISTRY", "ADDITIONS", "ENTRYPOINTS"}
    assert f"FROM ${{REGISTRY}}/v/engine@{digest}".encode() in files["Dockerfile"]
    # It is no build of this image: neither `prove` nor `export` takes it for one.
    with pytest.raises(Problem, match=r"is not built here|is here, but built from other"):
        build.current(own, tool)


def test_nothing_is_built_of_files_that_cannot_be_had(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise Problem("the index does not answer")

    monkeypatch.setattr(fetching, "fetch", gone)
    tool = Fake()
    with pytest.raises(Problem, match="the index does not answer"):
        build.build(image, tool)
    assert tool.seen == {}


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_build_leaves_no_credentials_behind(image: Image, interrupted: bool) -> None:
    tool = Fake(interrupted=interrupted)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            build.build(image, tool)
    else:
        build.build(image, tool)
    left = [p for p in build.BUILD.rglob("*") if p.is_file()]
    assert [p for p in left if b"xyzzy-password" in p.read_bytes()] == []


def test_what_lies_over_other_files_is_in_a_list_of_its_own(
    checkout: Checkout, tmp_path: Path
) -> None:
    """Installed at once with the others, its files would be there or not as it happens."""
    versions = WHOLE | {"nvidia-cutlass-dsl-libs-cu13": "4"}
    image = checkout.image(versions=versions)
    texts = layering.layers(lock.read(image), image.engine, image.sources)
    context.prepare(tmp_path / "context", "FROM x\n", texts, {}, [])
    lists = tmp_path / "context/layers"
    names = {path.name: path.read_text() for path in lists.iterdir()}
    assert "nvidia-cutlass-dsl-libs-cu13" in names["dependencies.last.txt"]
    assert "nvidia-cutlass-dsl-libs-cu13" not in names["dependencies.wheels.txt"]
    assert "ray" in names["dependencies.wheels.txt"]
    assert [name for name in names if "last" in name] == ["dependencies.last.txt"]


def test_a_build_without_its_image_is_a_failure(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "inspect", lambda *_: None)
    with pytest.raises(Problem, match="finished, but localhost/mine:1 is not in its storage"):
        build.build(image, Fake(), tag="mine:1")


def test_what_buildah_built_is_held_against_its_budget(
    image: Image, checked: list[tuple[Any, ...]]
) -> None:
    tool = Fake()
    assert build.build(image, tool, tag="mine:1") == BUILT
    assert checked == [(image, tool, BUILT, NAMES)]


def test_a_build_over_its_budget_fails(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def over(*_: object) -> None:
        raise Problem("it takes too much")

    monkeypatch.setattr(budget, "check", over)
    with pytest.raises(Problem, match="it takes too much"):
        build.build(image, Fake())


def test_a_budget_is_left_alone_where_that_is_asked_for(
    image: Image, checked: list[tuple[Any, ...]]
) -> None:
    build.build(image, Fake(), check=False)
    assert checked == []


def test_docker_gives_no_layers_to_be_held_against_a_budget(
    image: Image, checked: list[tuple[Any, ...]]
) -> None:
    assert build.build(image, FakeDocker()) == BUILT
    assert checked == []


def test_a_build_has_the_hosts_own_clock(image: Image) -> None:
    tool = Fake()
    build.build(image, tool)
    assert "FAKETIME" not in tool.seen["settings"]
    assert "LD_PRELOAD" not in tool.seen["settings"]
    assert not [name for name in tool.seen["files"] if "faketime" in name]


def test_a_build_with_a_turned_clock_has_what_turns_it(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libfaketime.so.1"
    library.write_bytes(b"turns clocks")
    required: list[str] = []
    monkeypatch.setattr(context, "FAKETIME", library)
    monkeypatch.setattr(host, "require", required.append)
    monkeypatch.setenv(context.CLOCK, "+25h")
    tool = Fake()
    build.build(image, tool)
    assert "export FAKETIME=+25h\n" in tool.seen["settings"]
    preloaded = re.search(r"LD_PRELOAD=/mnt/context/(\S+)", tool.seen["settings"])
    assert preloaded
    assert tool.seen["context"][tool.seen["recipe"].context / preloaded[1]] == b"turns clocks"
    assert required == [str(library)]
    assert tool.seen["recipe"].timestamp == build.TIMESTAMP
    values = tool.seen["recipe"].arguments
    assert values == arguments(image) | {"BASE": "localhost/base:1"}, "no layer is told of it"


def test_what_turns_clocks_can_be_installed() -> None:
    assert str(context.FAKETIME) in host.PACKAGES


# what is recorded

LAYERS = tuple(
    Layer(name, f"sha256:{name[0]}", 2, 1, Summary({}, "o", "m", "x", "r"))
    for name in ("base", "entrypoints")
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What layers are measured with; they break no rule."""
    made: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> Measured:
        made.append(arguments)
        return Measured(LAYERS, ())

    monkeypatch.setattr(build, "measure", measure)
    monkeypatch.setattr(build, "base_name", lambda *_: "base:1")
    monkeypatch.setattr(budget, "remembered", lambda: {"sha256:b": LAYERS[0]})
    return made


def test_a_record_holds_for_the_inputs_and_the_builder_and_ends_below_our_own_package(
    checkout: Checkout, measured: list[tuple[Any, ...]]
) -> None:
    image, tool = checkout.image(), Fake()
    found = build.record(image, tool, BUILT)
    assert found == Record(build.inputs(image), "buildah 1.28.2", LAYERS[:1])
    known = {"sha256:b": LAYERS[0]}
    assert measured == [(tool, BUILT.id, NAMES, known)]


@pytest.mark.usefixtures("measured")
def test_an_image_that_breaks_a_rule_is_not_recorded(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Measured(LAYERS, ("logs: a log: var/log/x", "twice: in two layers: etc/x"))
    monkeypatch.setattr(build, "measure", lambda *_: broken)
    with pytest.raises(Problem) as caught:
        build.record(checkout.image(), Fake(), BUILT)
    why = "logs: a log: var/log/x; twice: in two layers: etc/x"
    assert caught.value.sentence == f"verl-rollout:vllm-0.12 is not recorded: {why}"


# the session's arguments


@pytest.mark.parametrize(
    ("arguments", "references", "options"),
    [
        ([], ["transformers-cpu"], {}),
        (["verl-rollout:vllm-0.12", "transformers-cpu"], ["vllm-0.12", "transformers-cpu"], {}),
        (["verl-rollout:vllm-0.12", "--no-check"], ["vllm-0.12"], {"check": False}),
        (["verl-rollout:vllm-0.12", "--no-cache"], ["vllm-0.12"], {"cache": False}),
        (["verl-rollout:vllm-0.12", "--tag", "mine:1"], ["vllm-0.12"], {"tag": "mine:1"}),
    ],
)
def test_a_build_is_made_as_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    references: list[str],
    options: dict[str, Any],
) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(builders, "detect", lambda _: Fake())
    monkeypatch.setattr(build, "build", lambda i, _, **given: made.append((i.tag, given)))
    monkeypatch.setattr(build, "compare", lambda *_: None)
    assert build.main(arguments) == 0
    usual = {"tag": "", "cache": True, "check": True, "registry": ""}
    assert made == [(reference, usual | options) for reference in references]


@pytest.mark.parametrize("builder_version", ["buildah 9", "buildah 8"])
def test_a_build_that_gives_other_layers_than_the_recorded_ones_fails(
    monkeypatch: pytest.MonkeyPatch, builder_version: str
) -> None:
    """Another builder may write other tars, and that is said; the same one may not."""
    image = catalog.find(catalog.DEFAULT, catalog.load())
    record = SimpleNamespace(inputs=build.inputs(image), builder=builder_version, diff_ids=("x",))
    built = builder.Built("0" * 64, {}, ("sha256:a", "sha256:own"), "sha256:manifest")
    monkeypatch.setattr(builders, "detect", lambda _: Fake())
    monkeypatch.setattr(Fake, "version", lambda _: "buildah 9")
    monkeypatch.setattr(build, "build", lambda *_, **__: built)
    monkeypatch.setattr(build.layers_of, "read", lambda _: record)
    said: list[str] = []
    monkeypatch.setattr(build.host, "say", said.append)
    if builder_version == "buildah 9":
        with pytest.raises(Problem, match=r"NOT the recorded layers: .*that is a bug") as caught:
            build.main([image.reference])
        assert caught.value.code == 1
        assert build.main([image.reference, "--no-check"]) == 0
    else:
        assert build.main([image.reference]) == 0
        assert "they were recorded with buildah 8, and this is buildah 9" in said[-1]


def test_what_was_built_is_recorded_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[tuple[str, object]] = []
    monkeypatch.setattr(builders, "detect", lambda _: Fake())
    monkeypatch.setattr(build, "build", lambda *_, **__: BUILT)
    monkeypatch.setattr(build, "compare", lambda *_: None)
    monkeypatch.setattr(build, "keep", lambda i, _, built: recorded.append((i.tag, built)))
    assert build.main(["verl-rollout:vllm-0.12"]) == 0
    assert recorded == []
    assert build.main(["verl-rollout:vllm-0.12", "--record"]) == 0
    assert recorded == [("vllm-0.12", BUILT)]


def test_an_image_of_another_name_is_not_recorded_as_the_released_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builders, "detect", lambda _: Fake())
    monkeypatch.setattr(build, "build", lambda *_, **__: pytest.fail("built before it was checked"))
    with pytest.raises(Problem, match="--record needs buildah and the image's own name") as caught:
        build.main(["verl-rollout:vllm-0.12", "--record", "--tag", "mine:1"])
    assert caught.value.code == 2

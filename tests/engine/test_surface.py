"""What the reader of sources promises: what it says of an engine is what Python says of it.

Held against everything that a real vLLM has loaded, and the libraries below it. What a run alone
decides, the reader has to say so itself; where both differ without that, a name stands here with
its reason, and nothing else may differ.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from images.catalog import ROOT
from tests.surface import introspected, kept, sources
from tests.surface.agreement import Agreement, agreement
from tests.surface.surface import Surface

pytestmark = pytest.mark.engine

LOADED = (
    *("vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.llm_engine"),
    *("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
    "vllm.model_executor.models.llama",
)
# Of torch and of transformers a part: all of them takes a minute.
PARTS = {
    "vllm": ("vllm",),
    "fastapi": ("fastapi",),
    "starlette": ("starlette",),
    "pydantic": ("pydantic",),
    "huggingface_hub": ("huggingface_hub",),
    "torch": ("torch.nn", "torch.ao", "torch.autograd", "torch.distributions", "torch.cpu"),
    "transformers": ("transformers.generation", "transformers.models.llama"),
}
OTHERWISE = {
    "vllm.model_executor.models.interfaces:SupportsMultiModalEmbeddings.embed_input_ids": "nothing "
    "but overloads, of which Python keeps a function that nobody can call",
    "pydantic.main:BaseModel": "pydantic's own base: the reader knows it by its name as another's",
}


@pytest.fixture(scope="module")
def told(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Python says, in the environment of the real vLLM."""
    folder = tmp_path_factory.mktemp("surface")
    found = folder / "told.json"
    command = [str(prefix / "bin" / "python"), introspected.__file__, str(found), *LOADED]
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "VLLM_NO_USAGE_STATS": "1"}
    environ |= {"HF_HUB_OFFLINE": "1", "USER": "rollout", "LANG": "C.UTF-8"}
    done = subprocess.run(
        [*command, "--", *PARTS], env=environ, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(found.read_text())
    assert answer["failed"] == {}
    modules: dict[str, Any] = answer["modules"]
    return modules


Both = Callable[[str], Agreement]


@pytest.fixture(scope="module")
def both(prefix: Path, told: dict[str, Any]) -> Both:
    """Both sides of a package, compared once."""
    return functools.cache(lambda package: compared(prefix, told, package))


def compared(prefix: Path, told: dict[str, Any], package: str) -> Agreement:
    """Both sides of a package."""
    (site,) = prefix.glob("lib/python3.*/site-packages")
    wanted = {
        name: about
        for name, about in told.items()
        if any(f"{name}.".startswith(f"{part}.") for part in PARTS[package])
    }
    return agreement(Surface(sources.opened(site, package)), wanted)


@pytest.mark.parametrize("package", PARTS)
def test_the_reader_and_python_agree(both: Both, package: str) -> None:
    found = both(package)
    assert [(where, what) for where, what in found.differences if where not in OTHERWISE] == []
    assert found.compared.total() > 200
    # It may not save itself by doubting: less than a tenth.
    assert len(found.doubted) < found.compared.total() / 10


def test_nothing_is_excused_that_agrees(both: Both) -> None:
    differ = {where for p in ("vllm", "pydantic") for where, _ in both(p).differences}
    assert differ == set(OTHERWISE)


def test_vllm_is_looked_at_as_a_whole(both: Both) -> None:
    found = both("vllm").compared
    assert found["signatures"] > 10_000
    assert found["fields"] > 500
    assert found["re-exports"] > 6_000


def test_the_backend_finds_in_the_sources_what_it_finds_in_the_engine(
    prefix: Path, tmp_path: Path
) -> None:
    """The comparison of ``rollout verify``: on the engine itself, and on one made of a record."""
    command = [str(prefix / "bin" / "python"), "-m", "tests.surface.asked", "vllm"]
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VLLM_NO_USAGE_STATS": "1"}
    environ["PYTHONPATH"] = f"{ROOT / 'entrypoints'}:{ROOT}"
    done = subprocess.run(
        [*command, *kept.PROMISES["vllm"]],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    real = json.loads(done.stdout)
    (site,) = prefix.glob("lib/python3.*/site-packages")
    _, read = kept.made(Surface(sources.opened(site, "vllm")), "vllm")
    assert sum(read["looked_at"].values()) > 100
    # This build of vLLM has no allocator that could sleep: both say so.
    assert [where for where, _ in real["problems"]] == ["vllm.cumem_allocator"]
    assert {**read, "asked": set(read["asked"])} == {**real, "asked": set(real["asked"])}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("def sleep(self, level: int = 1", "def sleep(self, deep: int = 1", "signatures"),
        ("    def wake_up(self", "    async def wake_up(self", "kinds"),
        ("    def reset_prefix_cache(", "    def reset_the_prefix_cache(", "methods"),
    ],
)
def test_sources_that_differ_by_one_word_are_found(
    prefix: Path, told: dict[str, Any], old: str, new: str, what: str
) -> None:
    (site,) = prefix.glob("lib/python3.*/site-packages")
    real = sources.opened(site, "vllm")

    def text(path: str) -> str:
        found = real.text(path)
        if path == "vllm/entrypoints/llm.py":
            assert found.count(old) == 1
            return found.replace(old, new)
        return found

    other = sources.Sources(real.release, real.origin, real.paths, text)
    module = "vllm.entrypoints.llm"
    differences = agreement(Surface(other), {module: told[module]}).differences
    assert differences
    assert all(found.startswith(what) for _, found in differences), differences

"""A vLLM that has something under another name is given the name that the backend knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from rollout import vllm_names

Make = Callable[[dict[str, str]], None]
LOADER = "model_executor/model_loader"
PROCESS = "process_weights_after_loading"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A vLLM of these files alone."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)

    def make(files: dict[str, str]) -> None:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "vllm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            for folder in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_a_module_that_moved_is_found_under_the_name_that_is_known(engine: Make) -> None:
    engine({"entrypoints/common/cli_args.py": "found = 1", "entrypoints/openai/__init__.py": ""})
    vllm_names.adapt()
    vllm_names.adapt()  # once is enough
    assert sum(isinstance(finder, vllm_names._Moved) for finder in sys.meta_path) == 1
    assert "vllm" not in sys.modules  # nothing of it is imported before it is asked for
    assert import_module("vllm.entrypoints.openai.cli_args").found == 1
    with pytest.raises(ModuleNotFoundError, match=r"vllm\.entrypoints\.openai\.protocol"):
        import_module("vllm.entrypoints.openai.protocol")


def test_a_module_that_is_there_is_taken_itself(engine: Make) -> None:
    engine(
        {
            "entrypoints/common/cli_args.py": "found = 'moved'",
            "entrypoints/openai/cli_args.py": "found = 'itself'",
        }
    )
    vllm_names.adapt()
    assert import_module("vllm.entrypoints.openai.cli_args").found == "itself"


@pytest.mark.parametrize(("there", "found"), [("", "older"), (f"{PROCESS} = 'own'", "own")])
def test_an_older_vllm_gets_a_function_that_it_has_elsewhere(
    engine: Make, there: str, found: str
) -> None:
    engine({f"{LOADER}/loader.py": f"_{PROCESS} = 'older'", f"{LOADER}/utils.py": there})
    vllm_names.adapt()
    assert getattr(import_module("vllm.model_executor.model_loader.utils"), PROCESS) == found


def test_nothing_is_imported_of_a_vllm_that_has_every_name(engine: Make) -> None:
    engine({f"{LOADER}/utils.py": f"{PROCESS} = 'own'"})
    vllm_names.adapt()
    assert "vllm" not in sys.modules


def test_without_a_vllm_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(vllm_names, "find_spec", lambda _: None)
    vllm_names.adapt()

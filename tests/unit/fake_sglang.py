"""SGLang where there is none: the modules that the proof imports, of newer and older kind."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OPTIONS = (
    *("model_path", "skip_tokenizer_init", "dtype", "load_format", "enable_memory_saver"),
    *("mem_fraction_static", "max_total_tokens", "context_length", "chunked_prefill_size"),
    *("max_running_requests", "cuda_graph_max_bs", "random_seed", "tp_size", "log_level"),
)
NEWER = ("enable_weights_cpu_backup", "nccl_port")


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Modules by their names below ``sglang.srt``, and all packages above them."""
    for name, names in modules.items():
        parts = f"sglang.srt.{name}".split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        module = ModuleType(".".join(parts))
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)


def server_args(*, old: bool = False) -> dict[str, Any]:
    """``ServerArgs``, with the options of its time."""
    names = OPTIONS if old else (*OPTIONS, *NEWER)
    made = make_dataclass("ServerArgs", [(name, Any, field(default=None)) for name in names])
    return {"ServerArgs": made}


@dataclass
class Request:
    """Any request of ``io_struct``: what it was made with."""

    given: dict[str, Any]


def io_struct(*, old: bool = False) -> dict[str, Any]:
    """Requests, which keep what they were made with."""
    tags = [] if old else [("tags", Any, field(default=None))]
    names = ("GenerateReqInput", "UpdateWeightsFromTensorReqInput", "CheckWeightsReqInput")
    return {
        "ReleaseMemoryOccupationReqInput": make_dataclass("ReleaseMemoryOccupationReqInput", tags),
        **{name: lambda **given: SimpleNamespace(**given) for name in names},
    }


ENGINE = """\
import json, os, sys
from pathlib import Path


class Engine:
    run_scheduler_process_func = None

    def __init__(self, **options):
        print("loading", flush=True)
        kind = options["model_path"].rpartition("/")[2]
        if kind == "raises":
            raise RuntimeError("one line\\nand the last one")
        if kind == "killed":  # as a failing scheduler does to the process that started it
            print("Scheduler hit an exception: Traceback", file=sys.stderr)
            print("ValueError: The memory capacity is unbalanced.", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        self.options = options
        self.tokenizer_manager = object()

    def release_memory_occupation(self, tags=None):
        pass

    def collective_rpc(self, method, **given):
        Path(given["path"]).write_text(json.dumps(5 if method == "smoke_held" else method))

    def generate(self, *, input_ids, sampling_params, return_logprob):
        print("generating", flush=True)
        if not input_ids:
            raise KeyError("no prompt")
        count = sampling_params["max_new_tokens"]
        return [
            {
                "meta_info": {
                    "output_token_logprobs": [[-0.5, len(ids) + n, None] for n in range(count)],
                    "cached_tokens": 1,
                }
            }
            for ids in input_ids
        ]

    def flush_cache(self):
        os._exit(3)  # what a caller cannot catch

    def shutdown(self):
        print("shut down", flush=True)
"""


def package(folder: Path) -> Path:
    """A package ``sglang`` on disk, for processes of their own; returns its folder."""
    arguments = "".join(f"    {name}: object = None\n" for name in (*OPTIONS, *NEWER))
    files = {
        "entrypoints/engine.py": ENGINE,
        "server_args.py": "from dataclasses import dataclass\n\n\n@dataclass\nclass ServerArgs:\n"
        + arguments,
    }
    for name, text in files.items():
        path = folder / "sglang/srt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder

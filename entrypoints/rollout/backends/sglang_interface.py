"""What :mod:`rollout.backends.sglang` and its processes use of SGLang, to be compared with it.

All of it is asked of the installed SGLang: options of the backend's own making, signatures, records
of requests, the routes of its server. A version in which something has moved or gone is found here,
without a GPU.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rollout.backends import records, sglang, sglang_worker
from rollout.backends.interface import Comparison

ENGINE = "sglang.srt.entrypoints.engine:Engine"
OPTIONS = "sglang.srt.server_args:ServerArgs"
REQUESTS = "sglang.srt.managers.io_struct"
MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
SCHEDULER = "sglang.srt.managers.scheduler"
LLAMA = "sglang.srt.models.llama:LlamaForCausalLM"
LINEAR = "sglang.srt.layers.linear"
BUCKETS = (  # moved within 0.5
    "sglang.srt.weight_sync.tensor_bucket:FlattenedTensorBucket",
    "sglang.srt.model_executor.model_runner:FlattenedTensorBucket",
)
# Options that older versions lack: without the first a sleep of level 1 is not offered, without the
# second SGLang takes a port at random.
DISPENSABLE = frozenset({"enable_weights_cpu_backup", "nccl_port"})
PATHS = (
    *("/health", "/health_generate", "/generate", "/abort_request", "/flush_cache"),
    *("/release_memory_occupation", "/resume_memory_occupation"),
    *("/update_weights_from_tensor", "/update_weights_from_disk"),
)
NAMES = ("/server_info", "/get_server_info")
PAUSING = ("/pause_generation", "/continue_generation")
SHAPE = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 2}


def compare(seen: Comparison) -> None:
    """Look at everything."""
    as_on_a_gpu()
    parts = [arguments, engine, requests, scheduler, model, transports]
    parts += [server] if "server" in seen.promised else []
    for part in parts:
        with seen.part(part.__name__):
            part(seen)


def as_on_a_gpu() -> None:
    """Without a GPU SGLang takes other ways when it is imported: before 0.5.12 by way of vLLM."""
    import torch

    if not torch.cuda.is_available():
        one = SimpleNamespace(name="", major=9, minor=0, total_memory=80 << 30)
        one.multi_processor_count = 132
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda *_, **__: (one.major, one.minor)
        torch.cuda.get_device_properties = lambda *_, **__: one
        torch.cuda.device_count = lambda: 1
        torch.cuda.current_device = lambda: 0


def _given() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rollout-interface-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        options = sglang.arguments(Path(folder), dummy=True, level=1, gpus=2)
    return options | {"nccl_port": 1}


def arguments(seen: Comparison) -> None:
    """What it is started with; an option may have another name in newer versions."""
    kind = seen.thing(OPTIONS)
    options = _given()
    there = records.fields(kind)
    for name in options:
        newer = sglang_worker.RENAMED.get(name, name)
        if name in DISPENSABLE and name not in there:
            seen.without.append(name)
            continue
        seen.look("arguments", OPTIONS, {name, newer} & there != set(), f"has no option {name!r}")
    seen.called(OPTIONS, **sglang_worker.known(options, kind))


def engine(seen: Comparison) -> None:
    """The calls of the process that drives the engine."""
    seen.assigned(ENGINE, ["tokenizer_manager"])
    seen.called(f"{ENGINE}.generate", input_ids=[], sampling_params={}, return_logprob=True)
    seen.called(f"{ENGINE}.collective_rpc", "method", path="")
    seen.called(f"{ENGINE}.flush_cache")
    for name in ("release_memory_occupation", "resume_memory_occupation"):
        found = seen.thing(f"{ENGINE}.{name}")
        tagged = len(records.fields(found)) > 1  # beside self
        seen.called(f"{ENGINE}.{name}", **({"tags": []} if tagged else {}))
    seen.called(f"{ENGINE}.update_weights_from_disk", "folder", load_format="auto")
    group: dict[str, object] = {"master_address": "", "master_port": 1, "rank_offset": 1}
    seen.called(
        f"{ENGINE}.init_weights_update_group", **group, world_size=2, group_name="", backend="nccl"
    )
    update = f"{ENGINE}.update_weights_from_distributed"
    if "names" in records.fields(seen.thing(update)):
        seen.called(update, "names", "dtypes", "shapes", group_name="", flush_cache=False)
    else:
        seen.called(update, "name", "dtype", "shape")
    seen.called(f"{ENGINE}.shutdown")
    kind = seen.thing(ENGINE)
    for name in ("begin_weight_update", "end_weight_update"):
        if hasattr(kind, name):
            seen.called(f"{ENGINE}.{name}")
        else:
            seen.without.append(name)


def requests(seen: Comparison) -> None:
    """What the engine's own manager is asked for, where the engine has no method of its own."""
    seen.called(f"{MANAGER}.generate_request", "asked", "request")
    seen.called(f"{MANAGER}.abort_request", "name")
    seen.called(f"{MANAGER}.update_weights_from_tensor", "asked", "request")
    asked: dict[str, object] = dict.fromkeys(("input_ids", "sampling_params", "return_logprob"))
    seen.called(f"{REQUESTS}:GenerateReqInput", **asked, stream=True, rid="")
    update: dict[str, object] = {"load_format": None, "flush_cache": False}
    name = f"{REQUESTS}:UpdateWeightsFromTensorReqInput"
    seen.called(name, serialized_named_tensors=[], **update)
    if hasattr(seen.thing(MANAGER), "check_weights"):
        seen.called(f"{MANAGER}.check_weights", "asked", "request")
        seen.called(f"{REQUESTS}:CheckWeightsReqInput", action="snapshot")
    else:
        seen.without.append("check_weights")
    sampling = "sglang.srt.sampling.sampling_params:SamplingParams"
    seen.called(sampling, **sglang_worker.greedy(1))


def scheduler(seen: Comparison) -> None:
    """The process that our extension becomes a part of."""
    kind = seen.thing(f"{SCHEDULER}:Scheduler")
    for name in vars(sglang_worker.Extension):
        if name.startswith("smoke_"):
            what = f"has {name!r} itself"
            seen.look("names", SCHEDULER, not hasattr(kind, name), what)
    seen.thing(f"{SCHEDULER}:run_scheduler_process")
    assigned = "self.tp_worker = " in Path(seen.thing(SCHEDULER).__file__).read_text("utf-8")
    seen.look("attributes", SCHEDULER, assigned, "assigns no 'tp_worker'")
    replaced = hasattr(seen.thing(ENGINE), "run_scheduler_process_func") or hasattr(
        seen.thing("sglang.srt.entrypoints.engine"), "run_scheduler_process"
    )
    seen.look("names", ENGINE, replaced, "starts its scheduler by a function of another name")


def model(seen: Comparison) -> None:
    """The probe's model, and what digests take apart."""
    seen.called(f"{LLAMA}.load_weights", "weights")
    for layer in ("QKVParallelLinear", "MergedColumnParallelLinear"):
        seen.assigned(f"{LINEAR}:{layer}", ["output_sizes"])
    embedding = "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding"
    seen.assigned(embedding, ["org_vocab_size"])


def transports(seen: Comparison) -> None:
    """What weights are packed with. Without the first no image promises flattened buckets."""
    bucket = next((name for name in BUCKETS if Comparison().thing(name) is not None), "")
    if bucket:
        seen.called(bucket, named_tensors=[])
    else:
        seen.without.append("FlattenedTensorBucket")
    seen.thing("sglang.srt.utils:init_custom_process_group")
    seen.thing("torch_memory_saver")


def server(seen: Comparison) -> None:
    """Which paths the server has."""
    app = seen.thing("sglang.srt.entrypoints.http_server:app")
    paths = {getattr(route, "path", "") for route in app.routes}
    for path in PATHS:
        seen.look("routes", "the server", path in paths, f"has no path {path}")
    known = any(name in paths for name in NAMES)
    seen.look("routes", "the server", known, f"has no path {NAMES[0]}")
    for pair in (PAUSING, (sglang.BEGIN, sglang.END)):
        some = [path for path in pair if path in paths]
        if some:
            whole = len(some) == len(pair)
            seen.look("routes", "the server", whole, f"has {some[0]} alone of {' and '.join(pair)}")
        else:
            seen.without.extend(pair)

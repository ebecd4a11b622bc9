"""What :mod:`rollout.backends.vllm` and its worker extension use of vLLM, to be compared with it.

All of it is asked of the installed vLLM: arguments of the backend's own making, signatures, the
routes of its server. A version in which something has moved or gone is found here, without a GPU.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from rollout.backends import vllm
from rollout.backends.interface import Comparison
from rollout.backends.vllm_extension import Extension
from rollout.placement import PACKED
from rollout.presence import find_spec

MODEL = Path("model")
ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
RUNNERS = (  # the second one is chosen by newer versions for some models
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
)
LAYERS = "vllm.model_executor.layers"
FP8 = f"{LAYERS}.quantization.fp8:Fp8LinearMethod"
ALLOCATOR = "vllm.device_allocator.cumem"
PROTOCOLS = ("vllm.entrypoints.openai.completion.protocol", "vllm.entrypoints.openai.protocol")
MODELS = ("vllm.entrypoints.openai.engine.protocol", "vllm.entrypoints.openai.models.protocol")
GIB = 1 << 30


def compare(seen: Comparison) -> None:
    """Look at everything."""
    os.environ[vllm.DEVELOPMENT] = "1"  # before vLLM is imported: it reads it once
    parts = [arguments, engine, answers, worker, refit, model, allocator]
    parts += [fp8] if "fp8" in seen.promised else []
    parts += [server, command] if "server" in seen.promised else []
    for part in parts:
        with seen.part(part.__name__):
            part(seen)


def arguments(seen: Comparison) -> None:
    """What it is started with, and the variables that are read."""
    options = vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=True)
    seen.fields(("vllm.engine.arg_utils:EngineArgs",), sorted(options), vllm.DISPENSABLE)
    seen.called("vllm:LLM.__init__", **options)
    seen.fields(("vllm.config:ParallelConfig",), ["worker_extension_cls"])
    read = seen.thing("vllm.envs:environment_variables")
    for name in (vllm.DEVELOPMENT, "VLLM_LOGGING_LEVEL"):
        seen.look("variables", "vllm.envs", name in (read or ()), f"does not read {name}")


def engine(seen: Comparison) -> None:
    """The calls on the trainer's side."""
    seen.assigned("vllm:LLM", ["llm_engine"])
    seen.called("vllm:LLM.generate", "prompts", "parameters", use_tqdm=False)
    seen.called("vllm:LLM.collective_rpc", "method", args=())
    seen.called("vllm:LLM.sleep", level=1)
    seen.called("vllm:LLM.wake_up", tags=[])
    seen.called("vllm:LLM.reset_prefix_cache")
    seen.called(f"{ENGINE}.add_request", "name", "prompt", "parameters")
    seen.called(f"{ENGINE}.has_unfinished_requests")
    seen.called(f"{ENGINE}.step")
    seen.called(f"{ENGINE}.abort_request", "names")
    seen.assigned(ENGINE, ["engine_core"])
    seen.called("vllm.v1.engine.core_client:SyncMPClient.shutdown")
    parameters = seen.thing("vllm:SamplingParams")
    if parameters is not None:
        seen.called("vllm:SamplingParams", **vllm.greedy(1))
        with seen.part("vllm:SamplingParams"):
            parameters(**vllm.greedy(1))


def answers(seen: Comparison) -> None:
    """What answers are read for."""
    wanted = ["request_id", "outputs", "num_cached_tokens"]
    seen.fields(("vllm.outputs:RequestOutput",), wanted)
    seen.fields(("vllm.outputs:CompletionOutput",), ["token_ids", "logprobs"])
    seen.fields(("vllm.logprobs:Logprob", "vllm.sequence:Logprob"), ["logprob"])


def worker(seen: Comparison) -> None:
    """The worker that our extension becomes a part of."""
    kind = seen.thing(WORKER)
    for name in dir(Extension):
        if not name.startswith("__"):
            what = f"has {name!r} itself, and refuses an extension that has it"
            seen.look("names", WORKER, not hasattr(kind, name), what)
    seen.assigned(WORKER, ["model_runner", "model_config", "vllm_config", "device"])
    seen.called(f"{WORKER}.sleep", level=1)
    seen.called(f"{WORKER}.wake_up", tags=[])
    seen.fields(("vllm.config:CacheConfig",), ["block_size"])
    seen.called(f"{RUNNERS[0]}.get_model")
    if find_spec(RUNNERS[1].partition(":")[0]) is not None:
        seen.called(f"{RUNNERS[1]}.get_model")


def refit(seen: Comparison) -> None:
    """What a refit calls in the worker."""
    seen.called("vllm.config:set_current_vllm_config", "config")
    process = "vllm.model_executor.model_loader.utils:process_weights_after_loading"
    seen.called(process, "model", "config", "device")


def fp8(seen: Comparison) -> None:
    """How a layer in 8 bits is made anew: these are vLLM's insides, and change without notice."""
    sizes = ("input_size_per_partition", "output_partition_sizes", "input_size", "output_size")
    given: dict[str, object] = dict.fromkeys((*sizes, "params_dtype", "weight_loader"))
    seen.called(f"{FP8}.create_weights", layer=None, **given)
    seen.called(f"{FP8}.process_weights_after_loading", "layer")
    seen.assigned(FP8, ["logical_widths", "orig_dtype", "input_size_per_partition"])
    text = _source(FP8.partition(":")[0])
    scale = '"weight_scale_inv"' in text
    seen.look("names", FP8, scale, "makes no factors called 'weight_scale_inv'")
    for layer in ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"):
        name = f"{LAYERS}.linear:{layer}"
        wanted = ["weight_loader_v2", "input_size", "output_size", "input_size_per_partition"]
        seen.assigned(name, wanted)


def model(seen: Comparison) -> None:
    """The probe's model: how it packs tensors, and what digests take apart."""
    llama = "vllm.model_executor.models.llama:LlamaForCausalLM"
    seen.called(f"{llama}.load_weights", "weights")
    kind = seen.thing(llama)
    found = getattr(kind, "packed_modules_mapping", {})
    packed = {name: tuple(parts) for name, parts in found.items()}
    seen.look("names", llama, packed == PACKED, f"packs {packed}, not {PACKED}")
    for layer in ("QKVParallelLinear", "MergedColumnParallelLinear"):
        seen.assigned(f"{LAYERS}.linear:{layer}", ["output_sizes"])
    embedding = f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding"
    seen.assigned(embedding, ["org_vocab_size"])


def allocator(seen: Comparison) -> None:
    """The pool that sleeping gives back. Its library needs a driver, so its source is read."""
    classes = {
        node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        for node in ast.parse(_source(ALLOCATOR)).body
        if isinstance(node, ast.ClassDef)
    }
    methods = classes.get("CuMemAllocator", set())
    for name in ("get_instance", "get_current_usage"):
        there = name in methods
        seen.look("calls", f"{ALLOCATOR}:CuMemAllocator", there, f"has no method {name!r}")
    built = find_spec("vllm.cumem_allocator") is not None
    seen.look("names", "vllm.cumem_allocator", built, "is not built: this vLLM cannot sleep")


def server(seen: Comparison) -> None:
    """What the OpenAI endpoint is asked for, and which paths the server has."""
    fields = {
        "CompletionRequest": vllm.asked([], 1, stream=True),
        "CompletionResponseChoice": ["index", "logprobs", "token_ids"],
        "CompletionResponseStreamChoice": ["logprobs", "token_ids"],
        "CompletionResponse": ["choices"],
    }
    for kind, wanted in fields.items():
        seen.fields(tuple(f"{module}:{kind}" for module in PROTOCOLS), wanted)
    named = tuple(f"{module}:CompletionLogProbs" for module in PROTOCOLS)
    seen.fields(named, ["token_logprobs"])
    seen.fields(tuple(f"{module}:ModelCard" for module in (*MODELS, PROTOCOLS[1])), ["root"])
    build = seen.thing("vllm.entrypoints.openai.api_server:build_app")
    app = build(_parsed(seen))
    paths = {getattr(route, "path", "") for route in app.routes}
    for path in vllm.PATHS:
        seen.look("routes", "the server", path in paths, f"has no path {path}")
    pausing = [path for path in vllm.PAUSING if path in paths]
    if pausing:
        for path in vllm.PAUSING:
            seen.look("routes", "the server", path in paths, f"has {pausing[0]}, and not {path}")
    else:
        seen.without.extend(vllm.PAUSING)


def command(seen: Comparison) -> None:
    """The arguments of the server's command, by its own parser."""
    given = vllm.served(MODEL, vllm.known(vllm.arguments(MODEL, 80 * GIB, dummy=True, fp8=False)))
    parsed = vars(_parsed(seen, given))
    seen.looked_at["arguments"] += sum(word.startswith("--") for word in given)
    for name, value in {"enable_sleep_mode": True, "load_format": "dummy"}.items():
        found = parsed.get(name)
        seen.look("arguments", "the server", found == value, f"takes {name} as {found!r}")


def _parsed(seen: Comparison, given: list[str] | None = None) -> Any:
    platform = seen.thing("vllm.platforms:current_platform")
    if not platform.device_type:  # no GPU here: the parser's defaults ask for a device, unused
        platform.device_type = "cuda"
    module: Any = seen.thing("vllm.entrypoints.openai.cli_args")
    parser = module.make_arg_parser(module.FlexibleArgumentParser())
    return parser.parse_args(given or [])


def _source(module: str) -> str:
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return Path(found.origin).read_text(encoding="utf-8")

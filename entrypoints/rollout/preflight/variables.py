"""Variables that a site or a job sets, and that break what the image needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from rollout.environment import printable
from rollout.preflight import files, health, image, interfaces, interpreter
from rollout.preflight.files import below
from rollout.preflight.finding import Finding, Host

_KIND = "variables"
# What engines, Ray and torch read, and a Service of Kubernetes named vllm, ray or master sets for
# every pod of its namespace. A Service of another name sets others, which nobody reads.
_PORTS = frozenset(
    {
        *("VLLM_PORT", "VLLM_DP_MASTER_PORT", "VLLM_NIXL_SIDE_CHANNEL_PORT"),
        *("SGLANG_PORT", "SGLANG_GRPC_PORT", "RAY_PORT", "MASTER_PORT"),
    }
)
_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")
# Triton, FlashInfer and torch compile with these while an engine starts.
_COMPILERS = ("CC", "CXX", "CUDAHOSTCXX", "NVCC_CCBIN", "CUDACXX", "TRITON_PTXAS_PATH")
# Libraries that the locked wheels bring, each in a folder of its own.
_LOCKED = re.compile(
    r"lib(?:cudart|cublas|cublasLt|cudnn\w*|nccl|nvrtc|cufft|torch\w*)\.so(?:\.\d+)*"
)
_LOCAL = ("localhost", "127.0.0.1")


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first."""
    yield from allocator(host.environ)
    yield from ports(host)
    if host.cuda is not None:
        yield from gloo(host)
        yield from libraries(host)
        yield from nccl(host)
        yield from debugging(host)
        yield from proxies(host.environ)
    yield from programs(host)
    yield from interpreter.look(host)
    yield from text(host.environ)


def allocator(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Settings of torch's allocator that break sleeping (vLLM and SGLang assert on them)."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            sentence = f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
            yield Finding(_KIND, "allocator-excludes-sleep", sentence)
            return


def ports(host: Host) -> Iterator[Finding]:
    """Variables that Kubernetes sets for a Service, and that an engine takes for its own."""
    for name, value in sorted(host.environ.items()):
        if name not in _PORTS or not _ADDRESS.match(value):
            continue
        what = f"{name} is {printable(value)}: Kubernetes sets it for a Service of that name"
        change = f"set 'enableServiceLinks: false' in the pod's spec, or run 'env -u {name} …'"
        if name == "VLLM_PORT" and image.backend(host) == "vllm":
            sentence = f"{what}, and vLLM does not start with it; {change}"
            yield Finding(_KIND, "engine-port-is-address", sentence)
        else:
            sentence = f"{what}, and who reads it expects a number; {change}"
            yield Finding(_KIND, "port-is-address", sentence, stops=False)


def gloo(host: Host) -> Iterator[Finding]:
    """Whether Gloo finds its interface: engines make a group of it on one GPU, too."""
    present = interfaces.present(host.root)
    value = host.environ.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in value.split(",") if name not in present] if value else []
    if present and missing:
        sentence = (
            f"GLOO_SOCKET_IFNAME is {printable(value)}, and there is no interface "
            f"{printable(missing[0])} in this container, so no engine starts; name one of "
            f"{', '.join(present)}, or start the container with the host's network"
        )
        yield Finding(_KIND, "gloo-interface-missing", sentence)


def libraries(host: Host) -> Iterator[Finding]:
    """Whether processes find the libraries of the image, and no others of the same name."""
    home, folders = image.cuda_home(host), image.library_folders(host)
    if home and f"{home}/lib64" not in folders:
        sentence = (
            f"LD_LIBRARY_PATH lacks {home}/lib64, so sleeping may free nothing and compiled "
            f"kernels may not load; {image.library_path(host)}"
        )
        yield Finding(_KIND, "library-path-replaced", sentence, stops=False)
    own = image.prefix(host) + "/"
    for folder in folders:
        held = [] if folder.startswith(own) else files.names(below(host.root, folder))
        found = [name for name in held if _LOCKED.fullmatch(name)]
        if found:
            sentence = (
                f"LD_LIBRARY_PATH has {printable(folder)}, which holds {found[0]}: processes may "
                f"load it in place of the locked one; {image.library_path(host, less=folder)}"
            )
            yield Finding(_KIND, "libraries-replaced", sentence, stops=False)
    given = host.environ.get("CUDA_HOME")
    if home and given != home:
        said = f"is {printable(given)}" if given else "is not set"
        sentence = (
            f"CUDA_HOME {said}, and kernels are compiled with the image's own nvcc; set "
            f"CUDA_HOME={home}"
        )
        yield Finding(_KIND, "cuda-home-replaced", sentence, stops=False)


def nccl(host: Host) -> Iterator[Finding]:
    """NCCL's settings that a refit, a sleep or a divided model suffers from."""
    environ = host.environ
    slow = {"NCCL_P2P_DISABLE": "NVLink and PCIe", "NCCL_SHM_DISABLE": "shared memory"}
    for name, way in slow.items():
        if _on(environ.get(name)):
            sentence = (
                f"{name} is {environ[name]}, so NCCL sends weights and results of GPUs not by "
                f"{way} but a slower way; unset it, or leave it where that way is broken"
            )
            yield Finding(_KIND, "nccl-way-off", sentence, stops=False)
    if _on(environ.get("NCCL_CUMEM_ENABLE")):
        sentence = (
            "NCCL_CUMEM_ENABLE is 1, and buffers of this kind survive no sleep; set "
            "NCCL_CUMEM_ENABLE=0, as the image does"
        )
        yield Finding(_KIND, "nccl-cumem-on", sentence, stops=False)
    present = interfaces.present(host.root)
    value = environ.get("NCCL_SOCKET_IFNAME", "")
    if value and present and not interfaces.matching(value, present):
        sentence = (
            f"NCCL_SOCKET_IFNAME is {printable(value)}, which leaves none of this container's "
            f"interfaces ({', '.join(present)}), so NCCL does not start; name one of these, or "
            "start the container with the host's network"
        )
        yield Finding(_KIND, "nccl-interface-missing", sentence, stops=False)


def _on(value: str | None) -> bool:
    """As NCCL reads a switch: a number other than 0."""
    return bool(value and re.match(r"\s*[+]?0*[1-9]", value))


def debugging(host: Host) -> Iterator[Finding]:
    """What makes CUDA another than the one that a job has."""
    if _on(host.environ.get("CUDA_LAUNCH_BLOCKING")):
        sentence = (
            "CUDA_LAUNCH_BLOCKING is set: every kernel is waited for, which is for finding errors "
            "and not for work; unset it"
        )
        yield Finding(_KIND, "launches-block", sentence, stops=False)
    folder = host.environ.get(health.MPS_PIPE)
    if folder and not health.mps(host):
        sentence = (
            f"{health.MPS_PIPE} is {printable(folder)}, where no daemon of MPS listens, so "
            "processes run without MPS; mount that folder of the host, or unset the variable"
        )
        yield Finding(_KIND, "mps-not-there", sentence, stops=False)


def programs(host: Host) -> Iterator[Finding]:
    """Whether the image's programs are found, and those that the job names."""
    environ, own = host.environ, f"{image.prefix(host)}/bin"
    path = environ.get("PATH", "").split(os.pathsep)
    first = next((f for f in path if f == own or files.exists(host.root, f"{f}/python3")), "")
    if files.exists(host.root, own) and first != own:
        whole = os.pathsep.join([own, *(folder for folder in path if folder not in ("", own))])
        what = f"has {first} before {own}" if own in path else f"lacks {own}"
        sentence = f"PATH {what}, so python3 is not the image's; set PATH={printable(whole)}"
        yield Finding(_KIND, "path-replaced", sentence, stops=False)
    for name in _COMPILERS if host.cuda is not None else ():
        words = environ.get(name, "").split()
        if words and not _found(host, words[0], path):
            sentence = (
                f"{name} is {printable(environ[name])}, which is not in this container, and "
                f"engines compile with it; run 'env -u {name} …'"
            )
            yield Finding(_KIND, "compiler-missing", sentence, stops=False)
    for item in re.split(r"[:\s]+", environ.get("LD_PRELOAD", "")):
        if item.startswith("/") and not files.exists(host.root, item):
            sentence = (
                f"LD_PRELOAD names {printable(item)}, which is not in this container, and every "
                "process complains of it; mount it, or unset LD_PRELOAD"
            )
            yield Finding(_KIND, "preload-missing", sentence, stops=False)


def _found(host: Host, program: str, path: list[str]) -> bool:
    folders = [""] if "/" in program else [f"{folder}/" for folder in path if folder]
    return any(files.exists(host.root, folder + program) for folder in folders)


def proxies(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether an engine's calls of itself would go to a proxy. The proxy is not printed."""
    names = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    proxy = next((name for name in names if environ.get(name)), None)
    given = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    but = [part for part in re.split(r"[,\s]+", given) if part]
    local = {*but} | {"127.0.0.1" for part in but if part.startswith("127.") and "/" in part}
    missing = [name for name in _LOCAL if name not in local]
    if proxy and missing and "*" not in but:
        whole = ",".join([*but, *missing])
        sentence = (
            f"{proxy} is set, and no_proxy lacks {' and '.join(missing)}, so calls of an engine's "
            f"own server go to the proxy; set no_proxy={printable(whole)} and NO_PROXY to the same"
        )
        yield Finding(_KIND, "proxy-takes-local", sentence, stops=False)


def text(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables with bytes that are no UTF-8: who writes them as text dies of them (Ray, JSON)."""
    for name, value in environ.items():
        if not _is_text(name + value):
            sentence = (
                f"{_escaped(name)} holds bytes that are no UTF-8 ({_escaped(value)}), and who "
                "sends the variables on as text ends with UnicodeEncodeError; unset it, or write "
                "it in UTF-8"
            )
            yield Finding(_KIND, "not-utf8", sentence, stops=False)


def _escaped(value: str) -> str:
    """The bytes of a variable as a shell's $'…' has them."""
    return repr(os.fsencode(value))[2:-1]


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

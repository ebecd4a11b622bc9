"""Variables that a site or a job sets, and that break what the image needs.

PYTHONPATH and PYTHONHOME are looked at by ``rollout.added``, which knows what the lock has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from rollout.environment import printable
from rollout.preflight import health, image, interfaces
from rollout.preflight.finding import Finding, Host
from rollout.preflight.image import below

_KIND = "variables"
# Bytes of a UNIX socket's path, less what is put behind the temporary folder: by Ray
# (/ray/session_<date and process>/sockets/plasma_store), and by engines: a UUID by vLLM
# (get_open_zmq_ipc_path), a temporary file's name by SGLang (PortArgs).
_SOCKET = 107
_OF_RAY = 72
_OF_ENGINES = {"vllm": 37, "sglang": 12}
# What a Service of Kubernetes named vllm, ray or master sets for every pod of its namespace.
_PORTS = re.compile(r"(?:(?:VLLM|SGLANG|SGL|RAY)_(?:[A-Z0-9_]+_)?|MASTER_)PORT")
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
    yield from temporary(host)
    yield from ports(host)
    if host.cuda is not None:
        yield from gloo(host)
        yield from libraries(host)
        yield from nccl(host)
        yield from debugging(host)
    yield from programs(host)
    yield from proxies(host.environ)
    yield from text(host.environ)


def allocator(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Settings of torch's allocator that break sleeping (vLLM and SGLang assert on them)."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            sentence = f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
            yield Finding(_KIND, "allocator-excludes-sleep", sentence)
            return


def temporary(host: Host) -> Iterator[Finding]:
    """Whether files and sockets can be made where TMPDIR says."""
    folder = host.environ.get("TMPDIR")
    if not folder:
        return
    shown, length = printable(folder), len(os.fsencode(folder))
    if not os.access(below(host.root, folder), os.W_OK | os.X_OK):
        sentence = (
            f"TMPDIR is {shown}, which is not there or cannot be written; mount it, or set "
            "TMPDIR=/tmp"
        )
        yield Finding(_KIND, "tmpdir-not-writable", sentence, stops=False)
    needed = _OF_ENGINES.get(image.backend(host), 0)
    if length > _SOCKET - needed:
        sentence = (
            f"TMPDIR is {shown}, too long for the engine's sockets ({_SOCKET - needed} bytes at "
            "most); set TMPDIR=/tmp"
        )
        yield Finding(_KIND, "tmpdir-too-long", sentence)
    elif needed and length > _SOCKET - _OF_RAY and not host.environ.get("RAY_TMPDIR"):
        sentence = (
            f"TMPDIR is {shown}, too long for Ray's sockets ({_SOCKET - _OF_RAY} bytes at most); "
            "set RAY_TMPDIR=/tmp"
        )
        yield Finding(_KIND, "tmpdir-too-long-for-ray", sentence, stops=False)


def ports(host: Host) -> Iterator[Finding]:
    """Variables that Kubernetes sets for a Service, and that an engine takes for its own."""
    for name, value in sorted(host.environ.items()):
        if not _PORTS.fullmatch(name) or not _ADDRESS.match(value):
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
        path = below(host.root, folder)
        held = [] if folder.startswith(own) else _names(path)
        found = sorted(name for name in held if _LOCKED.fullmatch(name))
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


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


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
    if below(host.root, own).is_dir() and own not in path:
        whole = os.pathsep.join([own, *filter(None, path)])
        sentence = f"PATH lacks {own}, so python3 is not the image's; set PATH={printable(whole)}"
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
        if item.startswith("/") and not below(host.root, item).exists():
            sentence = (
                f"LD_PRELOAD names {printable(item)}, which is not in this container, and every "
                "process complains of it; mount it, or unset LD_PRELOAD"
            )
            yield Finding(_KIND, "preload-missing", sentence, stops=False)


def _found(host: Host, program: str, path: list[str]) -> bool:
    folders = [""] if "/" in program else [f"{folder}/" for folder in path if folder]
    return any(below(host.root, folder + program).exists() for folder in folders)


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
                f"{printable(name)} holds bytes that are no UTF-8 ({printable(value)}), and who "
                "sends the variables on as text ends with UnicodeEncodeError; unset it, or write "
                "it in UTF-8"
            )
            yield Finding(_KIND, "not-utf8", sentence, stops=False)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

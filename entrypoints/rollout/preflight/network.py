"""What a job of many nodes, or one without a network, needs of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rollout.environment import printable
from rollout.preflight import files, image, interfaces, loader
from rollout.preflight.finding import Finding, Host

_KIND = "network"
# What openai-harmony, the vocabulary of gpt-oss, reads from the folder (tiktoken_ext).
_VOCABULARY = "o200k_base.tiktoken"
_COUNTS = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "PET_NNODES", "NNODES")
# AWS' network adapter, by the names that its driver and udev give it.
_EFA = ("efa", "rdmap")
# NCCL's plugin for it under the names that NCCL looks for, and where AWS' installer puts it.
_PLUGINS = ("libnccl-net-ofi.so", "libnccl-net.so", "libnccl-net-aws-ofi.so")
_LIBFABRIC = "libfabric.so.1"
_OF_PLUGIN = ("/opt/amazon/ofi-nccl/lib", "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu")
_OF_PLUGIN_BEFORE = ("/opt/aws-ofi-nccl/lib", "/opt/amazon/aws-ofi-nccl/lib")
_OF_LIBFABRIC = ("/opt/amazon/efa/lib", "/opt/amazon/efa/lib64")


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first."""
    yield from vocabulary(host)
    if host.cuda is None:
        return
    many = nodes(host.environ) > 1
    if many:
        yield from choice(host)
    # One node does without; who asks for all that is wrong is told of it.
    if many or host.all:
        yield from adapters(host)


def nodes(environ: Mapping[str, str]) -> int:
    """On how many nodes the job runs, by what its scheduler or launcher says."""
    counts = [int(environ[name]) for name in _COUNTS if environ.get(name, "").isdigit()]
    world, local = environ.get("WORLD_SIZE", ""), environ.get("LOCAL_WORLD_SIZE", "")
    if world.isdigit() and local.isdigit() and int(local):
        counts.append(int(world) // int(local))
    return max(counts, default=1)


def vocabulary(host: Host) -> Iterator[Finding]:
    """Whether the folder of vocabularies holds the one that gpt-oss needs."""
    folder = host.environ.get("TIKTOKEN_ENCODINGS_BASE", "")
    if not folder.startswith("/") or files.exists(host.root, f"{folder}/{_VOCABULARY}"):
        return
    sentence = (
        f"TIKTOKEN_ENCODINGS_BASE is {printable(folder)}, where {_VOCABULARY} is not to be found, "
        "so gpt-oss does not start; put that file there, or unset the variable where there is a "
        "network"
    )
    yield Finding(_KIND, "vocabulary-missing", sentence, stops=False)


def choice(host: Host) -> Iterator[Finding]:
    """Whether every node takes the same network, where there are several."""
    set_ = [n for n in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if host.environ.get(n)]
    found = interfaces.outward(host.root)
    if set_ or len(found) < 2:
        return
    sentence = (
        f"the job runs on {nodes(host.environ)} nodes, and each chooses among {', '.join(found)} "
        "by itself; set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the one that leads to the "
        "other nodes"
    )
    yield Finding(_KIND, "interface-not-chosen", sentence, stops=False)


def adapters(host: Host) -> Iterator[Finding]:
    """Whether the host's fast network is in the container: InfiniBand, RoCE or EFA."""
    found = files.names(host.root / "sys/class/infiniband")
    efa = [name for name in found if name.startswith(_EFA)]
    if found and not interfaces.verbs(host.root):
        kind = "EFA" if efa else "InfiniBand or RoCE"
        sentence = (
            f"the host has {kind} ({', '.join(found)}), and /dev/infiniband is not in this "
            "container, so NCCL between nodes goes over TCP; start it with '--device "
            "/dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1' (docker), or with the "
            "network's resource in the pod's limits (Kubernetes)"
        )
        yield Finding(_KIND, "fast-network-not-in-container", sentence, stops=False)
    elif found and host.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0") and not efa:
        sentence = (
            f"NCCL_IB_DISABLE is {printable(host.environ['NCCL_IB_DISABLE'])}, so NCCL between "
            f"nodes goes over TCP and not over {', '.join(found)}; unset it"
        )
        yield Finding(_KIND, "fast-network-off", sentence, stops=False)
    elif efa:
        yield from _plugin(host, efa)


def _plugin(host: Host, efa: list[str]) -> Iterator[Finding]:
    """Whether NCCL finds what it needs for EFA, which it does not know by itself."""
    searched = [
        *image.library_folders(host),
        *loader.configured(host.root),
        *loader.FOLDERS,
    ]
    missing, folders = [], []
    wanted = {
        "NCCL's plugin for it (aws-ofi-nccl)": (_PLUGINS, (*_OF_PLUGIN, *_OF_PLUGIN_BEFORE)),
        f"libfabric ({_LIBFABRIC})": ((_LIBFABRIC,), _OF_LIBFABRIC),
    }
    for what, (names, places) in wanted.items():
        if not _first(host.root, searched, names):
            missing.append(what)
            folders.append(_first(host.root, places, names))
    if not missing:
        return
    known = [folder for folder in folders if folder]
    mounted = len(known) == len(missing)
    use = known if mounted else ["/opt/amazon/ofi-nccl/lib", "/opt/amazon/efa/lib"]
    change = image.library_path(host, more=use)
    sentence = (
        f"the host has EFA ({', '.join(efa)}), and {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not found, so NCCL between nodes goes over TCP; "
        f"{'' if mounted else 'mount /opt/amazon of the host and '}{change}"
    )
    yield Finding(_KIND, "efa-without-plugin", sentence, stops=False)


def _first(root: Path, folders: list[str] | tuple[str, ...], names: tuple[str, ...]) -> str:
    """The first of some folders that holds one of some files; empty where none does."""
    for folder in folders:
        if any(loader.file_name(root, f"{folder}/{name}") for name in names):
            return folder
    return ""

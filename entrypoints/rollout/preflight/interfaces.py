"""The network interfaces of a container, and how NCCL chooses among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rollout.preflight import files

# Bridges, tunnels and ends of containers: no way to another node.
_INNER = re.compile(
    r"lo|docker.*|br-.*|virbr.*|veth.*|cni.*|cali.*|flannel.*|vxlan.*|tunl.*|kube-.*|nodelocaldns"
    r"|dummy.*|podman.*|lxc.*|cilium.*|sit.*|ip6tnl.*|gre.*|erspan.*|tun.*|tap.*|wg.*|nerdctl.*"
)


def present(root: Path) -> list[str]:
    """Every interface; empty where the kernel tells of none."""
    # Beside them may lie a file, bonding_masters.
    folder = root / "sys/class/net"
    return [name for name in files.names(folder) if (folder / name).is_dir()]


def outward(root: Path) -> list[str]:
    """Those that may lead to other nodes: no inner one, and none that is down."""
    names = (name for name in present(root) if not _INNER.fullmatch(name))
    return [name for name in names if _state(root, name) != "down"]


def verbs(root: Path) -> bool:
    """Whether processes can reach an adapter of InfiniBand, RoCE or EFA: its node is there."""
    return any(name.startswith("uverbs") for name in files.names(root / "dev/infiniband"))


def _state(root: Path, name: str) -> str:
    return files.text(root / "sys/class/net" / name / "operstate").strip()


def matching(value: str, names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME leaves.

    Entries are beginnings of names; with = in front they are whole names; with ^ they exclude.
    """
    without = value.startswith("^")
    value = value.removeprefix("^")
    whole = value.startswith("=")
    # A port may stand behind a name.
    entries = [part.split(":")[0] for part in value.removeprefix("=").split(",") if part]

    def named(name: str) -> bool:
        return any(name == entry if whole else name.startswith(entry) for entry in entries)

    return [name for name in names if named(name) != without]

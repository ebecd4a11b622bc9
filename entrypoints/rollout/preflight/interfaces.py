"""The network interfaces of a container, and how NCCL chooses among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Bridges, tunnels and ends of containers: no way to another node.
_INNER = re.compile(
    r"lo|docker.*|br-.*|virbr.*|veth.*|cni.*|cali.*|flannel.*|vxlan.*|tunl.*|kube-.*|nodelocaldns"
    r"|dummy.*|podman.*|lxc.*|cilium.*|sit.*|ip6tnl.*|gre.*|erspan.*|tun.*|tap.*|wg.*|nerdctl.*"
)


def present(root: Path) -> list[str]:
    """Every interface; empty where the kernel tells of none."""
    try:
        return sorted(path.name for path in (root / "sys/class/net").iterdir() if path.is_dir())
    except OSError:
        return []


def outward(root: Path) -> list[str]:
    """Those that may lead to other nodes: no inner one, and none that is down."""
    names = (name for name in present(root) if not _INNER.fullmatch(name))
    return [name for name in names if _state(root, name) != "down"]


def _state(root: Path, name: str) -> str:
    try:
        return (root / "sys/class/net" / name / "operstate").read_text(encoding="ascii").strip()
    except OSError:
        return ""


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

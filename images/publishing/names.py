"""What registries, repositories and images are called, as people and docker write it."""

from __future__ import annotations

import re

from images.catalog import TAG
from images.host import web
from images.publishing import oci
from rollout.problem import Problem

_PORTS = 65535
_LONGEST = 255  # of a name, HOST included: what docker and containers/image take
_HOST = re.compile(
    r"(localhost|\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*)(:[0-9]{1,5})?"
)
_COMPONENT = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")


def parse_target(text: str) -> tuple[str, str]:
    """HOST and PREFIX of ``--to HOST[/PREFIX]``.

    Raises:
        Problem: exit code 2 for what no registry takes as a name.
    """
    bare = text.removeprefix("docker://").rstrip("/")
    name, _, prefix = bare.partition("/")
    if (
        "://" in bare
        or not _HOST.fullmatch(name)
        or not (web.local(name) or re.search("[.:]", name))
    ):
        raise Problem(
            f"{text!r} does not begin with the host of a registry; say it like "
            "'registry.example.com/team' or '127.0.0.1:5000'",
            2,
        )
    port = name.rpartition("]")[2].partition(":")[2]
    if port and not 0 < int(port) <= _PORTS:
        raise Problem(f"{text!r} has a port that there is not; the last one is {_PORTS}", 2)
    for component in prefix.split("/") if prefix else ():
        if not _COMPONENT.fullmatch(component):
            raise Problem(
                f"{text!r} is no name that a registry takes, because of {component!r}; between "
                "slashes stand lower-case letters and digits, joined by '.', '_', '__' or '-'",
                2,
            )
    if len(bare) > _LONGEST:
        raise Problem(f"{text!r} is longer than {_LONGEST} characters; take a shorter prefix", 2)
    return name, prefix


def parse_reference(text: str) -> tuple[str, str, str]:
    """``HOST[/PREFIX]``, ``REPOSITORY`` and the tag or digest of a reference in full.

    Raises:
        Problem: exit code 2 for what is no such reference.
    """
    bare = text.removeprefix("docker://")
    name, at, reference = bare.partition("@")
    if not at:
        name, _, reference = bare.rpartition(":")
    target, _, repository = name.rpartition("/")
    if at and target and ":" in repository:
        raise Problem(f"{text!r} has both; say a tag or a digest, not both", 2)
    fine = oci.is_digest(reference) if at else is_tag(reference)
    if not fine or not target or "/" in reference:
        raise Problem(
            f"{text!r} is no image of a registry; say HOST[/PREFIX]/REPOSITORY:TAG, or @sha256:… "
            "in place of :TAG",
            2,
        )
    parse_target(name)
    return target, repository, reference


def is_tag(text: str) -> bool:
    """Whether a registry takes this as a tag."""
    return TAG.fullmatch(text) is not None

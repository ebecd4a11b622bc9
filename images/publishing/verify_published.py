"""Check a published image: from what a registry gives, and a public key.

``nox -s verify-published -- HOST[/PREFIX]/REPOSITORY:TAG|@DIGEST --key FILE.pub [--layers]``. Of
the checkout nothing is used but this code: whoever has the key and the registry can tell whether
what is there is what was built, proved and signed. A registry, and whoever can write to it, is
believed in nothing; a registry that cannot be asked is no verdict on any image.

Each check ends as ``passed``, ``failed``, or ``unproved`` where something is missing that only the
caller can bring (a key), or that the publisher says is missing (a proof), or where it stands on a
check that failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from images import host
from images.publishing import evidence, keys, oci, published, unpacking
from images.publishing.failures import Unreachable
from images.publishing.published import Metrics, Published
from images.publishing.registry import Registry, parse_reference
from rollout import report
from rollout.environment import printable
from rollout.problem import Problem
from rollout.report import Check

CHECKS: dict[str, Callable[[Published], Metrics]] = {
    "manifest": published.check_manifest,
    "config": published.check_config,
    "tags": published.check_tags,
    "signature": published.check_signature,
    "attestations": evidence.check_attestations,
    "provenance": evidence.check_provenance,
    "report": evidence.check_report,
    "sbom": evidence.check_sbom,
    "layers": published.check_layers,
    "contents": unpacking.check_contents,  # with --layers
}
# What a check stands on. Where one of those has failed, it is not run: nothing may pass on
# attestations that nobody vouches for, and what nobody has signed is not unpacked.
NEEDS = {
    "config": ("manifest",),
    "tags": ("config",),
    "signature": ("manifest",),
    "attestations": ("manifest",),
    "provenance": ("config", "attestations"),
    "report": ("config", "attestations", "provenance"),
    "sbom": ("config", "attestations", "provenance"),
    "layers": ("manifest",),
    "contents": ("signature", "layers", "sbom"),
}


def names(*, layers: bool) -> list[str]:
    """The checks that a verification consists of."""
    return [name for name in CHECKS if layers or name != "contents"]


def verify(
    image: Published, *, layers: bool = False, show: Callable[[str], None] = host.say
) -> list[Check]:
    """Check an image of a registry, each check shown as it ends. The image gets its digest.

    Raises:
        Unreachable: the registry cannot be asked, or no longer: that is no verdict.
    """
    # Asked first: a registry that lets nobody in is told of before there is a table.
    image.registry.blob_size(image.repository, oci.digest(oci.EMPTY_DATA))
    show(report.header())
    done: list[Check] = []
    broken: dict[str, str] = {}  # check -> the one that has failed, itself or below it
    for name in names(layers=layers):
        cause = next((broken[need] for need in NEEDS.get(name, ()) if need in broken), "")
        if cause:
            done.append(Check(name, "unproved", 0.0, reason=f"not run: {cause} failed"))
        else:
            done.append(_checked(name, image))
            cause = name if done[-1].status == "failed" else ""
        if cause:
            broken[name] = cause
        show(report.row(done[-1]))
    return done


def _checked(name: str, image: Published) -> Check:
    start = time.perf_counter()
    status, metrics, reason = "passed", {}, None
    try:
        metrics = CHECKS[name](image)
    except Unreachable:
        raise
    except Problem as problem:
        status = "unproved" if problem.code == published.UNPROVED else "failed"
        reason = printable(problem.sentence)
    # Labels, names and reasons are the registry's words, and a terminal takes some for commands.
    shown = {k: printable(v) if isinstance(v, str) else v for k, v in metrics.items()}
    return Check(name, status, time.perf_counter() - start, shown, reason)


def parser() -> argparse.ArgumentParser:
    """What ``nox -s verify-published --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s verify-published --",
        description="Check a published image and its attestations, from the registry alone.",
    )
    found.add_argument("image", metavar="HOST[/PREFIX]/REPOSITORY:TAG|@DIGEST")
    found.add_argument("--key", type=Path, metavar="FILE.pub", help="the publisher's public key")
    found.add_argument("--layers", action="store_true", help="download and unpack every layer")
    found.add_argument("--authfile", type=Path, help="credentials, as skopeo's")
    found.add_argument("--cert-dir", type=Path, help="certificates of the registry, as skopeo's")
    return found


def main(arguments: Sequence[str]) -> int:
    """``nox -s verify-published -- IMAGE [--key FILE.pub] [--layers]``."""
    given = parser().parse_args(list(arguments))
    target, repository, reference = parse_reference(given.image)
    key = keys.read_public(given.key) if given.key else None
    registry = Registry(target, authfile=given.authfile, cert_dir=given.cert_dir)
    image = Published(registry, repository, reference, key)
    host.say(f"{registry.reference(repository, reference)}: verify-published")
    checks = verify(image, layers=given.layers)
    verdict = report.verdict(checks, names(layers=given.layers))
    host.say(f"{registry.reference(repository, image.digest or reference)}: {verdict}")
    return report.exit_code(verdict)


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""Which image is for which release of a framework: what users ask first.

The catalog says it, and `nox -s lock` has asked a resolver about each release
(images/locking/resolution.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from packaging.version import InvalidVersion, Version

from images.catalog import Image
from images.locking import lock
from images.proving import proofs, standing
from images.schema import Framework
from images.telling import markdown

HEAD = ("release", "image", "engine", "torch", "CUDA", "why")


def of(framework: Framework | None) -> str:
    """A framework with its release, and others that fit, for a cell; a dash where there is none."""
    if framework is None:
        return "—"
    others = f" (fits {', '.join(framework.fits)})" if framework.fits else ""
    return f"{framework.name} {framework.version}{others}"


def reason(image: Image, framework: Framework, release: str) -> str:
    """Why a release is for an image."""
    if not framework.packaged:
        told = "what it needs is in the image; its code comes as a checkout of this commit"
        return f"{told}, which trained in the kept proof" if trained(image) else told
    if release == framework.version:
        proof = ", and the proof runs it" if image.smoke.training else "; the proof does not run it"
        return f"it is in the image{proof}"
    bound = f", with its extra `{framework.extra}`" if framework.extra else ""
    return f"its own metadata takes the engine{bound}; install it on top"


def trained(image: Image) -> bool:
    """Whether the kept report shows by today's check that a checkout of the framework trains."""
    kept, asked = proofs.kept_report(image), standing.asked(image)
    if kept is None or not asked:
        return False
    passed = {check["name"] for check in kept["checks"] if check["status"] == "passed"}
    worth = standing.judge(kept, proofs.today(image))
    return worth.good and set(asked) <= passed - set(worth.outgrown)


def row(image: Image, framework: Framework, release: str) -> tuple[str, ...]:
    """One release and one image."""
    versions = lock.versions(lock.read(image))
    return (
        f"{framework.name} {release}",
        f"`{image.reference}`",
        f"{image.backend} {versions[image.engine]}",
        versions["torch"],
        lock.cuda(versions) or "none",
        reason(image, framework, release),
    )


def table(images: Sequence[Image]) -> str:
    """Every release that the catalog names with its image, the newest release first."""
    found = [
        (image, image.framework, release)
        for image in images
        if image.framework
        for release in (image.framework.version, *image.framework.fits)
    ]
    found.sort(key=lambda each: (each[1].name, _newest_first(each[2]), each[0].reference))
    return markdown.table(HEAD, [row(*each) for each in found])


def _newest_first(release: str) -> tuple[int, ...]:
    try:
        return tuple(-part for part in (*Version(release).release, 0, 0, 0)[:4])
    except InvalidVersion:  # a commit, of what has no releases
        return ()

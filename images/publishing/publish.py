"""Last station: from a proved image to a registry.

``nox -s publish -- REF --to HOST[/PREFIX]`` publishes what buildah holds (publication.py). With
``--promote`` the source is a registry (promotion.py), and with ``--new-key`` nothing is published
and a key is made (keys.py). Here stands what may be asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from images import catalog, host
from images.building import builders
from images.building.buildah import Buildah
from images.publishing import keys
from images.publishing.names import parse_reference
from images.publishing.packing import PACKINGS
from images.publishing.promotion import promote
from images.publishing.publication import publish_image
from images.publishing.registry import Registry
from rollout.problem import Problem


def parser() -> argparse.ArgumentParser:
    """What ``nox -s publish --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s publish --", description="Publish a proved image, with its attestations."
    )
    found.add_argument("ref", metavar="REF", nargs="?")
    found.add_argument("--to", metavar="HOST[/PREFIX]", help="the registry")
    found.add_argument("--key", type=Path, metavar="FILE", help="sign with this key (PEM)")
    found.add_argument("--unproved", action="store_true", help="without a passing report")
    found.add_argument(
        "--layers", choices=sorted(PACKINGS), default="zstd", help="gzip: for tools before zstd"
    )
    found.add_argument("--promote", action="store_true", help="from a registry; see --from")
    found.add_argument(
        "--from", dest="origin", metavar="HOST[/PREFIX]/REPOSITORY@DIGEST", help="or :TAG"
    )
    found.add_argument(
        "--trust", type=Path, metavar="FILE.pub", help="the key that signed what is promoted"
    )
    found.add_argument("--new-key", type=Path, metavar="FILE", help="make a key, and FILE.pub")
    found.add_argument("--authfile", type=Path, help="credentials; default: those of skopeo login")
    found.add_argument("--cert-dir", type=Path, help="certificates of the registry (ca.crt)")
    return found


def _refuse(given: argparse.Namespace) -> None:
    """See that the arguments fit together.

    Raises:
        Problem: exit code 2, with what to change.
    """
    for wrong, sentence in (
        (not given.ref or not given.to, "say what to publish and where: REF --to HOST[/PREFIX]"),
        (
            given.promote != bool(given.origin),
            "--promote and --from HOST[/PREFIX]/REPOSITORY@DIGEST go together",
        ),
        (
            given.promote and given.unproved,
            "what is unproved is not promoted; leave out --unproved",
        ),
        (
            given.promote and given.layers != "zstd",
            "what is promoted keeps its layers; leave out --layers",
        ),
        (
            given.trust and not given.promote,
            "--trust is for --promote: publish signs with --key, and trusts nobody",
        ),
        (
            given.promote and not given.trust,
            "--promote needs --trust FILE.pub, the public key that signed what is promoted: "
            "without it nobody knows whose attestations these are",
        ),
    ):
        if wrong:
            raise Problem(sentence, 2)


def main(arguments: Sequence[str]) -> int:
    """``nox -s publish -- REF --to HOST[/PREFIX] [--key FILE --unproved --layers gzip]``.

    With ``--promote`` the source is a registry.

    ``--new-key FILE`` makes a key and publishes nothing.
    """
    options = parser()
    given = options.parse_args(list(arguments))
    if given.new_key:
        others = {name: value for name, value in vars(given).items() if name != "new_key"}
        if any(value != options.get_default(name) for name, value in others.items()):
            raise Problem("--new-key FILE stands alone: it makes a key and publishes nothing", 2)
        public = keys.new(given.new_key)
        host.say(f"{given.new_key} signs, and is for you alone; {public} is for everybody")
        return 0
    _refuse(given)
    image = catalog.find(given.ref, catalog.load())
    registry = Registry(given.to, authfile=given.authfile, cert_dir=given.cert_dir)
    registry.name(image.repository)  # a name that is not allowed is told before anything runs
    key = keys.read(given.key) if given.key else None
    if given.promote:
        target, repository, reference = parse_reference(given.origin)
        origin = Registry(target, authfile=given.authfile, cert_dir=given.cert_dir)
        trusted = keys.read_public(given.trust)
        host.require("skopeo", "zstd")
        promote(image, origin, repository, reference, registry, trusted=trusted, key=key)
        return 0
    host.require("skopeo", "zstd")
    tool = builders.detect()
    if not isinstance(tool, Buildah):
        raise Problem("only images of buildah are published", 2)
    how = PACKINGS[given.layers]
    publish_image(image, tool, registry, key=key, unproved=given.unproved, how=how)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""skopeo, which carries the layers: it uploads several at once and skips what is there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from images import host
from images.host import leash
from images.publishing import failures


def copy_argv(
    source: str,
    destination: str,
    *,
    plain: tuple[bool, bool] = (False, False),
    authfile: Path | None = None,
    cert_dir: Path | None = None,
) -> list[str]:
    """The command that copies an image without changing a byte of it.

    ``plain`` says of source and destination whether they are registries without TLS.
    """
    sides = {"src": source, "dest": destination}
    remote = [side for side, name in sides.items() if name.startswith("docker://")]
    return [
        *("skopeo", "copy", "--preserve-digests"),
        *(
            f"--{side}-tls-verify=false"
            for side, without in zip(sides, plain, strict=True)
            if without
        ),
        *(word for s in remote if cert_dir for word in (f"--{s}-cert-dir", str(cert_dir))),
        *(["--authfile", str(authfile)] if authfile else []),
        *(source, destination),
    ]


def copy(
    argv: Sequence[str],
    name: str,
    tick: Callable[[], None] = lambda: None,
    seconds: float = 1.0,
) -> None:
    """Run one copy to ``name`` (HOST/PREFIX/REPOSITORY); ``tick`` is called every now and then.

    Raises:
        Broken: the connection broke; what was uploaded in whole blobs stays in the registry.
        Problem: another attempt would end in the same way.
    """
    host.require("skopeo")
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with leash.leashed(argv, stdout=output, stderr=subprocess.STDOUT) as process:
            while True:
                try:
                    code = process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        if code:
            output.seek(0)
            raise failures.meaning_of_skopeo(output.read(), code, name)

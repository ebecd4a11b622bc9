"""Variables that a site or a job sets, and that break what the image needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rollout.preflight.finding import Finding, Host

_KIND = "variables"


def look(host: Host) -> Iterator[Finding]:
    """Every finding of this kind, most fundamental first."""
    yield from allocator(host.environ)


def allocator(environ: Mapping[str, str]) -> list[Finding]:
    """Settings of torch's allocator that break sleeping (vLLM and SGLang assert on them)."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            sentence = f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
            return [Finding(_KIND, "allocator-excludes-sleep", sentence)]
    return []

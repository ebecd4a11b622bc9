"""A checkout of a toy: catalog file, lock and Dockerfile in a temporary folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from images.catalog import Image

KEYS = {
    "backend": '"vllm"',
    "framework": '{ name = "verl", version = "0.7.1", resolved-as-of = 2026-03-20 }',
    "python": '"3.11"',
    "resolved-as-of": "2025-12-20",
    "requirements": '["vllm==0.12.0", "ray[default]>=2.41"]',
    "expect": '{ torch = "2.9.0", cuda = "12.8" }',
    "env": '{ VLLM_WORKER_MULTIPROC_METHOD = "spawn" }',
    "smoke": '{ sleep-levels = [1, 2], refit = ["cuda-ipc"] }',
    "size": '{ compressed = "3.6 GB", largest-layer = "1.5 GB" }',
    "reproducible": '"R4"',
}
VERSIONS = {
    "nvidia-cuda-runtime-cu12": "12.8.90",
    "nvidia-nccl-cu12": "2.27.5",
    "ray": "2.52.1",
    "torch": "2.9.0",
    "triton": "3.5.0",
    "vllm": "0.12.0",
}
# What stands above the engine: the second part of a lock.
ABOVE = {"verl": "0.7.1", "antlr4-python3-runtime": "4.9.3", "pip": "26.0"}


def sha256(text: str) -> str:
    """A sha256 that looks like one."""
    return hashlib.sha256(text.encode()).hexdigest()


DOCKERFILE = """\
ARG BASE
FROM ${BASE}

# Rendered for each layer.
ARG LAYER
RUN --mount=type=bind,target=/mnt/context sh /mnt/context/install layer

# Rendered behind the layer toolchain.
ENV CUDA_HOME=/cuda

# our own files
ARG ENTRYPOINTS
RUN --mount=type=bind,target=/mnt/context sh /mnt/context/entrypoints

USER 1000:0
"""


@dataclass(frozen=True)
class Checkout:
    """What the stations take for the repository."""

    root: Path

    def file(
        self,
        changes: Mapping[str, str | None] | None = None,
        tag: str = "vllm-0.12",
        repository: str = "verl-rollout",
    ) -> Path:
        """A catalog file; a change to None leaves the key out."""
        keys = KEYS | dict(changes or {})
        path = self.root / "images" / "catalog" / repository / f"{tag}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{k} = {v}\n" for k, v in keys.items() if v is not None))
        return path

    def image(
        self,
        changes: Mapping[str, str | None] | None = None,
        tag: str = "vllm-0.12",
        repository: str = "verl-rollout",
        versions: Mapping[str, str] = VERSIONS,
        above: Mapping[str, str] | None = None,
    ) -> Image:
        """An image with its lock and its Dockerfile; ``above`` stands above its engine."""
        from images import catalog
        from images.locking import lock

        found = catalog.parse(self.file(changes, tag, repository))
        texts = [
            "".join(lock.Locked(n, v, sha256(n + v)).text for n, v in sorted(part.items()))
            for part in (versions, above or {})
        ]
        found.lock.parent.mkdir(parents=True, exist_ok=True)
        head = lock.header(f"nox -s lock -- {found.reference}", "of a test")
        title = f"{lock.ABOVE}of a test\n" if above else ""
        found.lock.write_text(head + texts[0] + title + texts[1])
        found.dockerfile.parent.mkdir(parents=True, exist_ok=True)
        found.dockerfile.write_text(DOCKERFILE)
        return found


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """The stations work on a folder of the test instead of this repository."""
    from images import catalog
    from images.building import build
    from images.proving import proofs
    from images.telling import docs, pages, tables

    for module in (catalog, docs, pages, proofs, tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(catalog, "RECIPES", tmp_path / "images" / "recipes")
    monkeypatch.setattr(catalog, "CATALOG", tmp_path / "images" / "catalog")
    monkeypatch.setattr(catalog.load, "__defaults__", (catalog.CATALOG,))
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(proofs, "REPORTS", tmp_path / "build" / "reports")
    return Checkout(tmp_path)

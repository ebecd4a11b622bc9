"""A real registry, and small images that stand for what buildah holds.

What cannot be installed here skips these tests, with the sentence that says why.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from images import catalog, host
from images.publishing import attestations, copies, failures, oci, provenance, publication
from images.publishing.attestations import Attestation
from images.publishing.copies import Copy
from images.publishing.packing import Layer, Source
from images.publishing.registry import Registry
from images.publishing.tags import Tags
from rollout.problem import Problem

from .server import Certificate, Server

REPOSITORY = "verl-rollout"
IMAGE = catalog.find(catalog.DEFAULT, catalog.load())
NAMES = Tags("toy-1.0-cpu-py311-00000000", "toy-1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a registry."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.registry)


@pytest.fixture(scope="session")
def tools() -> None:
    """The registry and its client, installed where that is possible."""
    try:
        host.require("docker-registry", "skopeo", "htpasswd", "zstd")
    except Problem as problem:
        pytest.skip(problem.sentence)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, certificates or layers of this machine; and nobody waits for long."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(failures, "WAITS", (0.01, 0.02))


@pytest.fixture
def servers(tools: None, tmp_path: Path) -> Iterator[Callable[..., Server]]:  # noqa: ARG001
    """Starts registries, and ends them."""
    made: list[Server] = []

    def start(**options: Any) -> Server:
        server = Server(tmp_path / f"registry{len(made)}", **options)
        made.append(server)
        return server.start()

    yield start
    for server in made:
        server.kill()


@pytest.fixture
def server(servers: Callable[..., Server]) -> Server:
    """A registry without TLS and without credentials, as on a developer's machine."""
    return servers()


@pytest.fixture
def here(server: Server) -> Registry:
    """The way to that registry."""
    return Registry(server.address)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """A certificate of an authority that nobody knows."""
    return Certificate.make(tmp_path / "certificate")


def tar(seed: str, size: int) -> bytes:
    """A layer with one file of bytes that do not compress; the same seed gives the same layer."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(seed)
        info.size = size
        archive.addfile(info, io.BytesIO(random.Random(seed).randbytes(size)))  # noqa: S311
    return stream.getvalue()


@dataclass
class Toy:
    """An image as buildah would hold it; counts how often its layers are read."""

    folder: Path
    seeds: Sequence[str]
    size: int = 100_000
    labels: Mapping[str, str] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tars = {}
        layers = []
        for seed in self.seeds:
            data = tar(seed, self.size)
            diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
            self._tars[diff_id] = self.folder / diff_id.removeprefix("sha256:")
            self._tars[diff_id].write_bytes(data)
            layers.append(Layer(seed, diff_id))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": dict(self.labels)},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        # With a blank after each colon: another program's bytes, which have to stay as they are.
        self.config = json.dumps(config).encode()
        self.source = Source(self.config, tuple(layers), self.opened)

    @contextmanager
    def opened(self, wanted: Collection[str]) -> Iterator[Mapping[str, Path]]:
        """The tars of these layers."""
        self.read += sorted(wanted)
        yield {diff_id: self._tars[diff_id] for diff_id in wanted}

    def copy(self, annotations: Mapping[str, str] | None = None) -> Copy:
        """It, compressed and ready for a registry."""
        return copies.of_source(self.source, annotations or {})


Make = Callable[..., Toy]


@pytest.fixture
def toy(tmp_path: Path) -> Make:
    """Makes images: the same seed is the same layer."""

    def make(*seeds: str, **options: Any) -> Toy:
        return Toy(tmp_path / "tars", seeds, **options)

    return make


def attestation(name: str, kind: str, data: bytes) -> Attestation:
    """An attestation whose media type is what it is."""
    return Attestation(name, kind, kind, data)


def attestations_of(copy: Copy, text: str = "proved") -> list[Attestation]:
    """A report, and a provenance that names it."""
    proof = attestation("report.json", attestations.REPORT, json.dumps({"is": text}).encode())
    said = provenance.make(IMAGE, copy.descriptor.digest, [proof], "0" * 40, {})
    return [proof, attestation("provenance.json", attestations.STATEMENT, said)]


def published(copy: Copy, there: Registry, names: Tags = NAMES) -> bool:
    """Bring it into a registry with its attestations; whether there was anything to do."""
    return publication.publish(copy, there, REPOSITORY, names, attestations_of(copy))


def whole(there: Registry, repository: str = REPOSITORY, *, killed: bool = False) -> set[str]:
    """The tags of a repository; every blob that they lead to is there, or this fails.

    It asks the registry as a stranger would: each manifest, and each blob for its size. A registry
    that was ``killed`` may have made the folder of a tag and not yet what is in it: then the tag
    leads to nothing, which is no half image, and it is none of the tags.
    """
    tags = set()
    for tag in there.tags(repository):
        found = there.manifest(repository, tag)
        if not found and killed:
            continue
        assert found, f"tag {tag} leads to nothing"
        tags.add(tag)
        manifests = [found]
        if found[1].media_type == oci.INDEX:
            listed = [there.manifest(repository, e.digest) for e in oci.parse_index(found[0])]
            manifests = [m for m in listed if m]
            assert len(manifests) == len(listed), (
                f"tag {tag} lists an attestation that is not there"
            )
        for data, _ in manifests:
            for blob in oci.parse(data).blobs:
                size = there.blob_size(repository, blob.digest)
                assert size == blob.size, f"tag {tag} leads to {blob.digest} of {size} bytes"
    return tags


def damage(server: Server, digest: str, word: bytes = b"sha256") -> None:
    """Other bytes of the same size, in the storage of a registry: a word in capitals."""
    value = digest.removeprefix("sha256:")
    path = server.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"
    data = path.read_bytes()
    assert data != data.replace(word, word.upper())
    path.write_bytes(data.replace(word, word.upper()))

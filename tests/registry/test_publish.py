"""What publishing promises, shown at a real registry: each layer once, and no tag on half an image.

The images are small stand-ins for what buildah holds; that the real one goes the same way is shown
by `nox -s publish` itself.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from images import host
from images.building import build, builder, builders, labels, layers
from images.building.buildah import Buildah
from images.building.contents import Summary
from images.locking import lock
from images.proving import proofs
from images.publishing import (
    attach,
    attestations,
    copies,
    failures,
    keys,
    oci,
    packing,
    promotion,
    provenance,
    publication,
    publish,
    signatures,
    skopeo,
    tags,
    verify_published,
)
from images.publishing.attestations import Attestation
from images.publishing.copies import Copy
from images.publishing.published import Published
from images.publishing.registry import Registry
from images.publishing.tags import Tags
from rollout import report
from rollout.problem import Problem
from tests import layout, reports

from .conftest import (
    IMAGE,
    NAMES,
    REPOSITORY,
    Make,
    Toy,
    attestation,
    attestations_of,
    damage,
    published,
    whole,
)
from .server import Server

AGAIN = 5  # seconds for an image that is there already
KILLS = 10  # of the registry, and as many of the publisher


# What is published


def test_layers_configuration_and_attestations_arrive_to_the_byte(
    toy: Make, here: Registry, tmp_path: Path
) -> None:
    image = toy("base", "engine")
    copy = image.copy()
    assert published(copy, here)
    digest = copy.descriptor.digest
    assert here.resolve(REPOSITORY, NAMES.immutable) == digest
    assert here.resolve(REPOSITORY, NAMES.moving) == digest
    manifest = copy.manifest
    assert here.blob(REPOSITORY, manifest.config.digest) == image.config, "the image id is kept"
    for layer, described in zip(image.source.layers, manifest.layers, strict=True):
        assert described.media_type == oci.LAYER
        file = tmp_path / "layer"
        here.download(REPOSITORY, described.digest, file)
        tar = subprocess.run(["zstd", "-dcq", "--long=27", file], capture_output=True, check=True)
        assert oci.digest(tar.stdout) == layer.diff_id
    there = attach.attached(here, REPOSITORY, digest)
    assert [attestation.data for attestation in there] == [
        attestation.data for attestation in attestations_of(copy)
    ]
    assert oci.fallback_tag(digest) in whole(here)


def test_skopeo_pulls_what_was_published(toy: Make, here: Registry, tmp_path: Path) -> None:
    image = toy("base", "engine")
    copy = image.copy()
    published(copy, here)
    name = f"docker://{here.reference(REPOSITORY, copy.descriptor.digest)}"
    argv = skopeo.copy_argv(name, f"oci:{tmp_path / 'pulled'}", plain=(True, False))
    skopeo.copy(argv, here.name(REPOSITORY))
    data, found = layout.read(tmp_path / "pulled")
    assert data == copy.data
    assert found.digest == copy.descriptor.digest


def test_a_attestation_is_read_by_skopeo_alone(toy: Make, here: Registry, tmp_path: Path) -> None:
    copy = toy("base").copy()
    published(copy, here)
    for entry in here.referrers(REPOSITORY, copy.descriptor.digest):
        name = f"docker://{here.reference(REPOSITORY, entry.digest)}"
        folder = tmp_path / entry.digest.removeprefix("sha256:")
        skopeo.copy(
            skopeo.copy_argv(name, f"dir:{folder}", plain=(True, False)), here.name(REPOSITORY)
        )
        (layer,) = oci.parse(folder.joinpath("manifest.json").read_bytes()).layers
        data = (folder / layer.digest.removeprefix("sha256:")).read_bytes()
        assert data in [attestation.data for attestation in attestations_of(copy)]


def test_an_image_that_is_published_unproved_says_so_in_its_manifest(
    toy: Make, here: Registry
) -> None:
    copy = toy("base").copy({oci.UNPROVED: "true"})
    published(copy, here, Tags("toy-unproved", ""))
    found = here.manifest(REPOSITORY, "toy-unproved")
    assert found and oci.parse(found[0]).annotations == {oci.UNPROVED: "true"}
    assert copy.descriptor.digest != toy("base").copy().descriptor.digest


# The least that has to be sent


def test_images_that_share_layers_upload_each_of_them_once(
    toy: Make, server: Server, here: Registry
) -> None:
    images = [toy("base", "torch", "one"), toy("base", "torch", "two"), toy("base", "three")]
    copies = [image.copy() for image in images]
    for number, copy in enumerate(copies):
        published(copy, here, Tags(f"toy-{number}", ""))
    wanted = {layer.digest: layer.size for copy in copies for layer in copy.manifest.layers}
    assert len(wanted) == 5, "eight layers, five of them different"
    held = server.blobs()
    assert {digest: held[digest] for digest in wanted} == wanted
    assert {server.uploads()[digest] for digest in wanted} == {1}
    heavy = sum(size for size in held.values() if size >= min(wanted.values()))
    assert heavy == sum(wanted.values()), "nothing else of that size was stored"
    assert whole(here) >= {"toy-0", "toy-1", "toy-2"}


def test_a_layer_of_another_repository_of_the_registry_is_mounted_not_sent(
    toy: Make, server: Server, here: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = toy("base", "engine").copy()
    copies.push(copy, here, "other")
    sent = server.uploads()
    capsys.readouterr()
    mounting = Copy(copy.data, copy.names, copy.upload, (here.path("other"),))
    copies.push(mounting, here, REPOSITORY)
    assert server.uploads() == sent
    assert capsys.readouterr().out.count("mounted") == len(copy.manifest.blobs)
    assert copies.complete(copy, here, REPOSITORY)


def test_publishing_an_unchanged_image_again_reads_and_sends_nothing(
    toy: Make, server: Server, here: Registry
) -> None:
    image = toy("base", "engine", size=2_000_000)
    assert published(image.copy(), here)
    sent, read = len(server.requests("PUT")), list(image.read)
    # Not even the compressed layers are needed: the registry has them.
    for layer in image.source.layers:
        packing.packed(layer.diff_id).unlink()
    assert not published(image.copy(), here)
    assert len(server.requests("PUT")) == sent
    assert image.read == read


def bytes_read() -> int:
    """What this process has read so far, from wherever."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


def test_publishing_a_large_image_again_takes_seconds_and_does_not_read_its_layers(
    toy: Make, here: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "zstd_argv", lambda: ["cat"])  # these bytes do not compress
    image = toy("base", "engine", size=150_000_000)
    published(image.copy(), here)
    size = sum(layer.size for layer in image.copy().manifest.layers)
    begun, before = time.monotonic(), bytes_read()
    assert not published(image.copy(), here)
    assert time.monotonic() - begun <= AGAIN
    assert bytes_read() - before < size / 100


def test_a_layer_that_was_compressed_is_not_compressed_again(
    toy: Make, servers: Callable[..., Server]
) -> None:
    image = toy("base", "engine")
    for _ in range(2):
        published(image.copy(), Registry(servers().address))
    assert len(image.read) == 2


def test_a_registry_that_lost_a_layer_gets_it_again(
    toy: Make, server: Server, here: Registry
) -> None:
    image = toy("base", "engine")
    copy = image.copy()
    published(copy, here)
    lost = copy.manifest.layers[0].digest
    link = server.storage / "docker/registry/v2/repositories" / REPOSITORY / "_layers/sha256"
    (link / lost.removeprefix("sha256:") / "link").unlink()
    server.kill()
    server.start()
    with pytest.raises(AssertionError, match=lost):
        whole(here)
    # Its file is gone here too, so it is compressed anew: into the same bytes.
    packing.packed(image.source.layers[0].diff_id).unlink()
    assert published(image.copy(), here)
    assert NAMES.immutable in whole(here)


def test_each_layer_has_a_line_with_its_name_digest_size_and_fate(
    toy: Make, here: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    published(toy("base", "one").copy(), here)
    capsys.readouterr()
    copy = toy("base", "two").copy()
    published(copy, here, Tags("toy-two", ""))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for layer, fate in zip(copy.manifest.layers, ("already there", "uploaded"), strict=True):
        name = copy.names[layer.digest]
        assert f"{name} {layer.digest[:19]} {layer.size:,} bytes {fate}" in said


# Tags


def test_a_tag_with_another_digest_is_never_overwritten(
    toy: Make, server: Server, here: Registry
) -> None:
    first, second = toy("base", "one").copy(), toy("base", "two").copy()
    published(first, here)
    before = server.blobs()
    with pytest.raises(Problem, match="never overwritten") as caught:
        published(second, here)
    assert first.descriptor.digest in caught.value.sentence
    assert second.descriptor.digest in caught.value.sentence
    assert here.resolve(REPOSITORY, NAMES.immutable) == first.descriptor.digest
    assert here.resolve(REPOSITORY, NAMES.moving) == first.descriptor.digest
    assert server.blobs() == before, "it is refused before anything is sent"


def test_the_same_image_compressed_otherwise_is_told_from_another_image(
    toy: Make, here: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = toy("base")
    published(image.copy(), here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    other = layers.zstd_argv(1)
    monkeypatch.setattr(layers, "zstd_argv", lambda: other)
    with pytest.raises(Problem, match="the same image"):
        published(image.copy(), here)


def test_the_alias_moves_on_and_the_immutable_tag_stays(toy: Make, here: Registry) -> None:
    first, second = toy("one").copy(), toy("two").copy()
    published(first, here)
    published(second, here, Tags("toy-2.0", NAMES.moving))
    assert here.resolve(REPOSITORY, NAMES.immutable) == first.descriptor.digest
    assert here.resolve(REPOSITORY, NAMES.moving) == second.descriptor.digest


def test_of_two_publishers_in_one_moment_the_one_who_loses_the_tag_is_told(
    toy: Make, here: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol has no write on condition: the later one wins, and the other must not say ok."""
    ours, theirs = toy("ours").copy(), toy("theirs").copy()
    copies.push(theirs, here, REPOSITORY)
    put = Registry.push_manifest

    def overtaken(self: Registry, repository: str, reference: str, *rest: object) -> bool:
        found = put(self, repository, reference, *rest)  # type: ignore[arg-type]
        if reference == NAMES.immutable:
            put(self, repository, reference, theirs.data, oci.MANIFEST)
        return found

    monkeypatch.setattr(Registry, "push_manifest", overtaken)
    with pytest.raises(Problem, match="never overwritten"):
        published(ours, here)
    assert here.resolve(REPOSITORY, NAMES.moving) is None, "the alias does not follow a lost race"


def test_two_publishers_of_one_image_do_not_disturb_each_other(toy: Make, here: Registry) -> None:
    copy = toy("base", "engine", size=1_000_000).copy()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            published(copy, here)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert NAMES.immutable in whole(here)
    assert not published(copy, here)


# Interruptions


def sound(copy: Copy, there: Registry, names: Tags, *, killed: bool = False) -> None:
    """No tag leads to anything unfinished: to half an image, or to one without attestations."""
    if names.immutable in whole(there, killed=killed):
        assert there.resolve(REPOSITORY, names.immutable) == copy.descriptor.digest
        found = attach.attached(there, REPOSITORY, copy.descriptor.digest)
        assert [attestation.data for attestation in found] == [
            attestation.data for attestation in attestations_of(copy)
        ]


def undisturbed(toy: Make, here: Registry, size: int) -> float:
    """The seconds that a whole publication takes."""
    begun = time.monotonic()
    published(toy("calm", "calmer", size=size).copy(), here, Tags("calm", ""))
    return time.monotonic() - begun


def test_a_registry_that_is_killed_at_any_moment_of_a_push_never_shows_half_an_image(
    toy: Make, server: Server, here: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "WAITS", (0.1,) * 50)
    size = 4_000_000
    copies = [toy("base", f"top {n}", size=size).copy() for n in range(KILLS)]
    length = undisturbed(toy, here, size)
    chance = random.Random(6)  # noqa: S311
    for number, copy in enumerate(copies):
        names = Tags(f"toy-{number}", "toy")
        failed: list[BaseException] = []

        def run(
            copy: Copy = copy, names: Tags = names, failed: list[BaseException] = failed
        ) -> None:
            try:
                published(copy, here, names)
            except BaseException as error:
                failed.append(error)

        pushing = threading.Thread(target=run)
        pushing.start()
        time.sleep(chance.uniform(0, length))
        server.kill()
        server.start()
        sound(copy, here, names, killed=True)
        pushing.join()
        assert not failed, failed
        assert {names.immutable, "toy"} <= whole(here)
        assert here.resolve(REPOSITORY, "toy") == copy.descriptor.digest


def test_a_publisher_that_is_killed_at_any_moment_is_only_to_be_run_again(
    toy: Make, here: Registry
) -> None:
    size = 4_000_000
    copies = [toy("base", f"top {n}", size=size).copy() for n in range(KILLS)]
    length = undisturbed(toy, here, size)
    chance = random.Random(7)  # noqa: S311
    fork = multiprocessing.get_context("fork")
    cut = 0
    for number, copy in enumerate(copies):
        names = Tags(f"toy-{number}", "toy")
        # By connections of its own: an answer to who was killed is for nobody else.
        process = fork.Process(target=published, args=(copy, Registry(here.target), names))
        process.start()
        time.sleep(chance.uniform(0, length))
        process.kill()
        process.join()
        sound(copy, here, names)
        cut += published(copy, here, names)
        assert {names.immutable, "toy"} <= whole(here)
        assert not published(copy, here, names)
    assert cut, "every process had finished before it was killed: nothing was shown"


def test_a_compression_that_is_killed_leaves_nothing_that_is_believed(toy: Make) -> None:
    image = toy("base", size=3_000_000)
    (layer,) = image.source.layers
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=image.copy)
    process.start()
    while not list(packing.store().glob(".*")):
        time.sleep(0.001)
    process.kill()
    process.join()
    if packing.remembered(layer.diff_id) is None:
        assert packing.kept(layer.diff_id, oci.Descriptor(oci.LAYER, "", 0)) is None
    copy = image.copy()
    assert host.sha256(packing.packed(layer.diff_id)) == copy.manifest.layers[0].digest[7:]
    assert not list(packing.store().glob(".*"))


# The session: from buildah's storage to a registry, and from one registry to another


class Store(Buildah):
    """A storage that holds one image."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy

    @property
    def built(self) -> builder.Built:
        config = json.loads(self.toy.config)
        return builder.Built("0" * 64, config["config"], tuple(config["rootfs"]["diff_ids"]))


@pytest.fixture
def built(toy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The default image in buildah's storage, in small, and a report that proves it."""
    sha256 = host.sha256(IMAGE.lock)
    stamps = labels.of_image(IMAGE, lock.read(IMAGE), sha256, build.base_name())
    image = toy("base", "engine", labels=stamps)
    diff_ids = [layer.diff_id for layer in image.source.layers]
    monkeypatch.setattr(proofs, "REPORTS", tmp_path / "reports")
    host.write(proofs.report_path(IMAGE), json.dumps(reports.of(IMAGE, diff_ids)))
    nothing = Summary({}, "owner", "mtime", "xattr", "order")
    below = tuple(layers.Layer("base", diff_id, 2, 1, nothing) for diff_id in diff_ids[:-1])
    record = layers.Record(build.inputs(IMAGE), "buildah", below)
    monkeypatch.setattr(layers, "read", lambda _: record)
    monkeypatch.setattr(builders, "detect", lambda *_: Store(image))
    monkeypatch.setattr(build, "current", lambda _, tool: tool.built)
    monkeypatch.setattr(packing, "source", lambda *_: image.source)
    monkeypatch.setattr(provenance, "checkout_commit", lambda: "0" * 40)
    return image


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; the public one lies beside it."""
    assert publish.main(["--new-key", str(tmp_path / "key")]) == 0
    return tmp_path / "key"


def digest_of(there: Registry, tag: str) -> str:
    found = there.resolve(IMAGE.repository, tag)
    assert found
    return found


@pytest.mark.usefixtures("built")
def test_the_session_publishes_once_and_then_has_nothing_to_do(
    here: Registry, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [IMAGE.tag, "--to", here.target, "--key", str(key)]
    assert publish.main(arguments) == 0
    names = tags.of_image(IMAGE)
    digest = digest_of(here, names.immutable)
    assert digest_of(here, IMAGE.tag) == digest
    assert here.reference(IMAGE.repository, digest) in capsys.readouterr().out
    assert publish.main(arguments) == 0
    assert f"nothing to do, {here.reference(IMAGE.repository, digest)}" in capsys.readouterr().out


def test_without_a_passing_report_nothing_is_sent(
    built: Toy, here: Registry, server: Server
) -> None:
    proofs.report_path(IMAGE).unlink()
    with pytest.raises(Problem, match="has no passing report") as caught:
        publish.main([IMAGE.tag, "--to", here.target])
    assert caught.value.code == 1
    assert f"nox -s prove -- {IMAGE.reference}" in caught.value.sentence
    assert not server.requests("POST") and not built.read


def test_what_no_commit_holds_is_published_as_unproved_alone(
    built: Toy, here: Registry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "checkout_commit", lambda: "0" * 40 + provenance.DIRTY)
    with pytest.raises(Problem, match="changes that are in no commit") as caught:
        publish.main([IMAGE.tag, "--to", here.target])
    assert caught.value.code == 2
    assert not server.requests("POST") and not built.read
    assert publish.main([IMAGE.tag, "--to", here.target, "--unproved"]) == 0


def test_the_report_that_is_attached_is_the_one_that_was_looked_at(
    built: Toy, here: Registry
) -> None:
    """Between the look and the attestations lie the minutes in which layers are compressed."""
    looked_at = proofs.report_path(IMAGE).read_bytes()
    opened = built.source.opened

    def slow(wanted: Collection[str]) -> AbstractContextManager[Mapping[str, Path]]:
        host.write(proofs.report_path(IMAGE), '{"verdict": "failed"}')
        return opened(wanted)

    built.source = replace(built.source, opened=slow)
    assert publish.main([IMAGE.tag, "--to", here.target]) == 0
    assert built.read, "the report was never exchanged"
    there = attach.attached(here, IMAGE.repository, digest_of(here, IMAGE.tag))
    assert [p.data for p in there if p.entry.artifact_type == attestations.REPORT] == [looked_at]


def test_what_is_unproved_says_so_everywhere_and_leaves_the_names_of_the_proved_one(
    built: Toy, here: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    proofs.report_path(IMAGE).unlink()
    assert publish.main([IMAGE.tag, "--to", here.target, "--unproved"]) == 0
    assert "UNPROVED" in capsys.readouterr().out
    names = tags.of_image(IMAGE, unproved=True)
    assert {names.immutable, names.moving} < set(here.tags(IMAGE.repository))
    assert not {tags.of_image(IMAGE).immutable, IMAGE.tag} & set(here.tags(IMAGE.repository))
    found = here.manifest(IMAGE.repository, names.immutable)
    assert found and oci.parse(found[0]).annotations == {oci.UNPROVED: "true"}
    kinds = {e.artifact_type for e in here.referrers(IMAGE.repository, found[1].digest)}
    assert kinds == {attestations.SBOM, attestations.STATEMENT}
    assert built.read


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("other", [True, False], ids=["another registry", "the same registry"])
def test_promotion_gives_the_same_digest_and_its_attestations_the_public_tags(
    servers: Callable[..., Server], key: Path, other: bool
) -> None:
    first = servers()
    second = servers() if other else first
    staging, public = Registry(f"{first.address}/staging"), Registry(second.address)
    publish.main([IMAGE.tag, "--to", staging.target, "--key", str(key)])
    digest = digest_of(staging, IMAGE.tag)
    sent = first.uploads()
    trust = ["--trust", f"{key}.pub"]
    source = staging.reference(IMAGE.repository, digest)
    arguments = [IMAGE.tag, "--to", public.target, "--promote", "--from", source, *trust]
    assert publish.main(arguments) == 0
    assert digest_of(public, tags.of_image(IMAGE).immutable) == digest
    assert digest_of(public, IMAGE.tag) == digest
    both = [attach.attached(r, IMAGE.repository, digest) for r in (staging, public)]
    assert both[0] == both[1]
    assert len(both[0]) == 3
    assert oci.signature_tag(digest) in whole(public, IMAGE.repository)
    if not other:
        found = staging.manifest(IMAGE.repository, digest)
        assert found
        layers = [layer.digest for layer in oci.parse(found[0]).layers]
        assert [first.uploads()[name] for name in layers] == [sent[name] for name in layers]
    before = len(second.requests("PUT"))
    assert publish.main(arguments) == 0
    assert len(second.requests("PUT")) == before, "promoting again has nothing to do"


@pytest.mark.usefixtures("built")
def test_an_image_for_older_tools_stands_beside_the_usual_one(
    servers: Callable[..., Server], key: Path
) -> None:
    """The same image id and attestations, layers of gzip, and names of its own, promoted too."""
    first, second = servers(), servers()
    staging, public = Registry(f"{first.address}/staging"), Registry(second.address)
    usual, names = tags.of_image(IMAGE), tags.of_image(IMAGE, gzip=True)
    arguments = [IMAGE.tag, "--to", staging.target, "--key", str(key)]
    assert publish.main(arguments) == 0
    assert publish.main([*arguments, "--layers", "gzip"]) == 0
    both = [staging.manifest(IMAGE.repository, tag) for tag in (usual.moving, names.moving)]
    zstd, gzip = (oci.parse(found[0]) for found in both if found)
    assert gzip.config == zstd.config
    assert {layer.media_type for layer in gzip.layers} == {oci.GZIP_LAYER}
    assert {layer.media_type for layer in zstd.layers} == {oci.LAYER}
    digest = digest_of(staging, names.immutable)
    trust = ["--trust", f"{key}.pub"]
    source = staging.reference(IMAGE.repository, digest)
    promotion = [IMAGE.tag, "--to", public.target, "--promote", "--from", source, *trust]
    assert publish.main(promotion) == 0
    assert public.resolve(IMAGE.repository, usual.moving) is None, "that is another manifest"
    trusted = keys.read_public(Path(f"{key}.pub"))
    for tag in (names.moving, names.immutable):
        found = Published(public, IMAGE.repository, tag, trusted)
        assert {check.status for check in verify_published.verify(found)} == {"passed"}


@pytest.mark.usefixtures("built")
def test_what_is_promoted_keeps_its_layers(here: Registry, key: Path) -> None:
    source = here.reference(IMAGE.repository, f"sha256:{'0' * 64}")
    arguments = [IMAGE.tag, "--to", here.target, "--promote", "--from", source]
    with pytest.raises(Problem, match="what is promoted keeps its layers; leave out --layers"):
        publish.main([*arguments, "--trust", f"{key}.pub", "--layers", "gzip"])


@pytest.mark.usefixtures("built")
def test_what_fails_a_check_or_is_unproved_is_not_promoted(
    server: Server, key: Path, tmp_path: Path
) -> None:
    staging, public = Registry(f"{server.address}/staging"), Registry(server.address)
    options = [IMAGE.tag, "--to", staging.target]
    publish.main([*options, "--key", str(key)])
    publish.main([*options, "--unproved"])
    keys.new(tmp_path / "other")
    promote = [IMAGE.tag, "--to", public.target, "--promote", "--from"]
    proved = staging.reference(IMAGE.repository, digest_of(staging, IMAGE.tag))
    unproved = digest_of(staging, tags.of_image(IMAGE, unproved=True).immutable)
    with pytest.raises(Problem, match="is not promoted: see signature"):
        publish.main([*promote, proved, "--trust", f"{tmp_path / 'other'}.pub"])
    trust = ["--trust", f"{key}.pub"]
    with pytest.raises(Problem, match="is not promoted: it was published as unproved"):
        publish.main([*promote, staging.reference(IMAGE.repository, unproved), *trust])
    with pytest.raises(Problem, match="there is no"):
        publish.main([*promote, staging.reference(IMAGE.repository, "no-tag"), *trust])
    with pytest.raises(Problem, match="needs --trust") as caught:
        publish.main([*promote, proved])
    assert caught.value.code == 2
    assert public.tags(IMAGE.repository) == []


@dataclass
class Staged:
    """An image in one registry that is to be promoted to another."""

    origin: Registry
    public: Registry
    server: Server  # of the other
    digest: str
    key: Path

    def promote(self) -> int:
        given = self.origin.reference(IMAGE.repository, self.digest)
        return publish.main(
            [
                *(IMAGE.tag, "--to", self.public.target, "--promote"),
                *("--from", given, "--trust", f"{self.key}.pub"),
            ]
        )

    @property
    def subject(self) -> oci.Descriptor:
        found = self.origin.manifest(IMAGE.repository, self.digest)
        assert found
        return found[1]

    def attestations(self, there: Registry) -> list[attach.Attached]:
        return attach.attached(there, IMAGE.repository, self.digest)

    def add(self, there: Registry, *given: Attestation) -> None:
        """Attach attestations beside those that are there."""
        for one in given:
            for data in (oci.EMPTY_DATA, one.data):
                there.push_blob(IMAGE.repository, data)
        manifests = [oci.artifact(one, self.subject) for one in given]
        attach.refer(there, IMAGE.repository, self.digest, manifests)

    def verifies(self, by: Path) -> bool:
        found = Published(
            *(self.public, IMAGE.repository, IMAGE.tag),
            keys.read_public(by.with_name(f"{by.name}.pub")),
        )
        return {check.status for check in verify_published.verify(found)} == {"passed"}


@pytest.fixture
def staged(built: Toy, servers: Callable[..., Server], key: Path) -> Staged:  # noqa: ARG001
    """The default image, published where nobody looks for it yet."""
    first, second = servers(), servers()
    staging = Registry(f"{first.address}/staging")
    publish.main([IMAGE.tag, "--to", staging.target, "--key", str(key)])
    digest = digest_of(staging, IMAGE.tag)
    return Staged(staging, Registry(second.address), second, digest, key)


def test_promotion_adds_its_signatures_to_those_of_the_destination(
    staged: Staged, tmp_path: Path
) -> None:
    keys.new(tmp_path / "other")
    other = keys.read(tmp_path / "other")
    assert attach.sign(staged.public, IMAGE.repository, staged.digest, other)
    assert staged.promote() == 0
    assert staged.verifies(staged.key)
    layers = attach.signatures(staged.public, IMAGE.repository, staged.digest)
    blobs = [staged.public.blob(IMAGE.repository, layer.digest) for layer in layers]
    for signer in (other, keys.read(staged.key)):
        signed = [
            signatures.signed_digest(blob, layer.annotations, signer.public)
            for blob, layer in zip(blobs, layers, strict=True)
        ]
        assert sorted(filter(None, signed)) == [staged.digest]


def test_promotion_replaces_attestations_of_ours_and_leaves_those_of_others(
    staged: Staged, tmp_path: Path
) -> None:
    keys.new(tmp_path / "other")
    other = keys.read(tmp_path / "other")
    earlier = publication.attested(
        IMAGE, digest=staged.digest, report=b'{"is": "earlier"}', key=other, commit="1" * 40
    )
    scan = attestation("scan.json", "application/vnd.example.scan+json", b"{}")
    staged.add(staged.public, *earlier, scan)
    assert staged.promote() == 0
    assert staged.verifies(staged.key)
    there = {p.data for p in staged.attestations(staged.public)}
    assert there == {p.data for p in staged.attestations(staged.origin)} | {scan.data}


def test_only_attestations_that_were_verified_are_promoted(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of others, and none that came after the look: a list is open to many."""
    wanted = {p.data for p in staged.attestations(staged.origin)}
    scan = attestation("scan.json", "application/vnd.example.scan+json", b"{}")
    staged.add(
        staged.origin,
        scan,
        attestation("x.json", attestations.STATEMENT, b'{"predicateType": "x"}'),
    )
    verify = verify_published.verify

    def overtaken(found: Published, **options: Any) -> list[report.Check]:
        checks = verify(found, **options)
        if found.registry is not staged.public and found.registry.target == staged.origin.target:
            staged.add(
                staged.origin, attestation("late.json", attestations.REPORT, b'{"is": "late"}')
            )
        return checks

    monkeypatch.setattr(verify_published, "verify", overtaken)
    assert staged.promote() == 0
    assert b'{"is": "late"}' in {p.data for p in staged.attestations(staged.origin)}
    assert {p.data for p in staged.attestations(staged.public)} == wanted


def test_what_would_not_verify_at_the_destination_gets_no_tag_there(staged: Staged) -> None:
    found = staged.origin.manifest(IMAGE.repository, staged.digest)
    assert found
    config = oci.parse(found[0]).config
    staged.public.push_blob(IMAGE.repository, staged.origin.blob(IMAGE.repository, config.digest))
    damage(staged.server, config.digest)  # of the right size, so nobody sends it again
    with pytest.raises(Problem, match="gets no tags, it fails the check config there") as caught:
        staged.promote()
    assert caught.value.code == 1
    assert config.digest in caught.value.sentence
    names = tags.of_image(IMAGE)
    assert not {names.immutable, names.moving} & set(staged.public.tags(IMAGE.repository))


def test_an_outage_at_the_destination_gives_no_tag(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it say anything of the image: the sentence and the exit code are the outage's."""
    carry = promotion.carry

    def then_it_ends(*given: Any) -> bool:
        carried = carry(*given)
        staged.server.kill()
        return carried

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "carry", then_it_ends)
        with pytest.raises(failures.Unreachable, match="times in a row") as caught:
            staged.promote()
    assert caught.value.code == 3
    staged.server.start()
    assert not {IMAGE.tag} & set(staged.public.tags(IMAGE.repository))
    assert staged.promote() == 0
    assert staged.verifies(staged.key)

"""Attestations and signatures at a real registry: nothing whole is lost, nothing broken stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from images.publishing import (
    attach,
    attestations,
    copies,
    failures,
    keys,
    oci,
    publication,
    signatures,
)
from images.publishing.attestations import Attestation
from images.publishing.registry import Registry

from .conftest import (
    NAMES,
    REPOSITORY,
    Make,
    attestation,
    attestations_of,
    damage,
    published,
    whole,
)
from .server import Server


def test_attestations_of_a_later_proof_do_not_replace_those_of_the_publication(
    toy: Make, here: Registry
) -> None:
    copy = toy("base").copy()
    published(copy, here)
    later = attestations_of(copy, "proved again")
    assert not publication.publish(copy, here, REPOSITORY, NAMES, later)
    there = attach.attached(here, REPOSITORY, copy.descriptor.digest)
    assert [attestation.data for attestation in there] == [
        attestation.data for attestation in attestations_of(copy)
    ]


def test_attestations_that_were_lost_or_that_contradict_each_other_are_attached_anew(
    toy: Make, here: Registry
) -> None:
    copy = toy("base").copy()
    published(copy, here)
    digest, wanted = copy.descriptor.digest, attestations_of(copy)
    tag = oci.fallback_tag(digest)
    # lost: the list names none
    here.push_manifest(REPOSITORY, tag, oci.index([]), oci.INDEX)
    assert attach.attach(here, REPOSITORY, copy.descriptor, wanted) == [p.name for p in wanted]
    # exchanged: a report that the provenance does not name
    forged = [attestation("report.json", attestations.REPORT, b'{"is": "forged"}')]
    other = oci.artifact(forged[0], copy.descriptor)
    here.push_blob(REPOSITORY, oci.EMPTY_DATA)
    here.push_blob(REPOSITORY, forged[0].data)
    (genuine, _) = here.referrers(REPOSITORY, digest)
    attach.refer(here, REPOSITORY, digest, [other], {genuine.digest})
    assert [p.name for p in wanted] == attach.attach(here, REPOSITORY, copy.descriptor, wanted)
    assert [p.data for p in attach.attached(here, REPOSITORY, digest)] == [p.data for p in wanted]


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_an_outage_while_a_attestation_is_read_delists_none(
    toy: Make, here: Registry, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A registry that does not answer has said nothing of one, and gets it right again."""
    copy = toy("base").copy()
    published(copy, here)
    digest = copy.descriptor.digest
    before = here.referrers(REPOSITORY, digest)
    asked = getattr(Registry, what)
    wanted = {e.digest for e in before} | {oci.digest(p.data) for p in attestations_of(copy)}

    def out_of_order(self: Registry, repository: str, reference: str, **rest: int) -> object:
        if reference in wanted:
            raise failures.Unreachable("it does not answer")
        return asked(self, repository, reference, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, what, out_of_order)
        later = attestations_of(copy, "proved again")
        for run in (
            lambda: publication.publish(copy, here, REPOSITORY, NAMES, later),
            lambda: attach.attach(here, REPOSITORY, copy.descriptor, later, exactly=True),
        ):
            with pytest.raises(failures.Unreachable, match="it does not answer") as caught:
                run()
            assert caught.value.code == 3
    assert here.referrers(REPOSITORY, digest) == before
    assert not published(copy, here)


def test_a_attestation_that_the_storage_has_damaged_is_replaced(
    toy: Make, server: Server, here: Registry
) -> None:
    copy = toy("base").copy()
    published(copy, here)
    digest = copy.descriptor.digest
    damage(server, here.referrers(REPOSITORY, digest)[0].digest, b"report.json")
    damage(server, oci.digest(attestations_of(copy)[1].data))
    assert attach.attached(here, REPOSITORY, digest) == []
    later = attestations_of(copy, "proved again")
    assert publication.publish(copy, here, REPOSITORY, NAMES, later)
    there = attach.attached(here, REPOSITORY, digest)
    assert [p.data for p in there] == [p.data for p in later]


def test_attestations_that_others_attached_stay(toy: Make, here: Registry) -> None:
    copy = toy("base").copy()
    copies.push(copy, here, REPOSITORY)
    theirs = [
        attestation("scan.json", "application/vnd.example.scan+json", b"{}\n"),
        attestation("attested.json", attestations.STATEMENT, b'{"predicateType": "theirs"}'),
    ]
    manifests = [oci.artifact(one, copy.descriptor) for one in theirs]
    for one in theirs:
        here.push_blob(REPOSITORY, one.data)
    here.push_blob(REPOSITORY, oci.EMPTY_DATA)
    attach.refer(here, REPOSITORY, copy.descriptor.digest, manifests)
    published(copy, here)
    found = attach.attached(here, REPOSITORY, copy.descriptor.digest)
    assert [p.data for p in found] == [p.data for p in [*theirs, *attestations_of(copy)]]
    assert not published(copy, here)


def test_a_key_given_later_signs_what_was_published_without_one(
    toy: Make, here: Registry, tmp_path: Path
) -> None:
    copy = toy("base").copy()
    digest = copy.descriptor.digest
    published(copy, here)
    assert oci.signature_tag(digest) not in here.tags(REPOSITORY)
    keys.new(tmp_path / "key")
    key = keys.read(tmp_path / "key")
    proof, said = attestations_of(copy)
    sealed = signatures.envelope(said.data, key)
    wanted = [proof, Attestation("p.json", attestations.STATEMENT, attestations.ENVELOPE, sealed)]
    assert publication.publish(copy, here, REPOSITORY, NAMES, wanted, key)
    assert not publication.publish(copy, here, REPOSITORY, NAMES, wanted, key)
    found = attach.attached(here, REPOSITORY, digest)
    assert [p.data for p in found] == [proof.data, sealed]
    got = here.manifest(REPOSITORY, oci.signature_tag(digest))
    assert got
    (layer,) = oci.parse(got[0]).layers
    payload = here.blob(REPOSITORY, layer.digest)
    assert signatures.signed_digest(payload, layer.annotations, key.public) == digest
    assert oci.signature_tag(digest) in whole(here)
    # A second key adds its own beside it.
    keys.new(tmp_path / "other")
    assert attach.sign(here, REPOSITORY, digest, keys.read(tmp_path / "other"))
    got = here.manifest(REPOSITORY, oci.signature_tag(digest))
    assert got and len(oci.parse(got[0]).layers) == 2

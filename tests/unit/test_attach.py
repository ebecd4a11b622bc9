"""Which attestations are enough for an image: what is said counts, not where a word stands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from images.publishing import attach, attestations, keys, oci, provenance, signatures

from ..conftest import sha256


def statement(**changes: Any) -> dict[str, Any]:
    """A provenance of ours, in small: of SUBJECT, with a report and an SBOM."""
    inputs = [{"name": "checkout", "digest": {"gitCommit": "0"}, "annotations": {"dirty": False}}]
    named = [
        {"mediaType": kind, "digest": {"sha256": sha256(kind)}}
        for kind in (attestations.REPORT, attestations.SBOM)
    ]
    definition = {
        "buildType": provenance.BUILD_TYPE,
        "externalParameters": {"reference": "a:b"},
        "internalParameters": {
            "promised": {
                "checks": [],
                "asked": [],
                "trained": "",
                "transports": [],
                "program": {},
            }
        },
        "resolvedDependencies": inputs,
    }
    details = {"builder": {"id": provenance.LOCAL_BUILDER}, "byproducts": named}
    whole = {
        "_type": provenance.STATEMENT_TYPE,
        "subject": [{"name": "a:b", "digest": {"sha256": sha256("image")}}],
        "predicateType": provenance.PREDICATE_TYPE,
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }
    return whole | changes


SUBJECT = oci.Descriptor(oci.MANIFEST, f"sha256:{sha256('image')}", 1)
KINDS = {attestations.REPORT, attestations.SBOM, attestations.STATEMENT}


def attached(kind: str, data: bytes, media_type: str = "") -> attach.Attached:
    """An attestation as a registry has it."""
    manifest = oci.artifact(
        attestations.Attestation("an attestation", kind, media_type or kind, data), SUBJECT
    )
    return attach.Attached(oci.referrer(manifest), manifest, data)


def complete(said: dict[str, Any]) -> list[attach.Attached]:
    """Attestations of each kind, with this statement."""
    named = [attached(kind, kind.encode()) for kind in (attestations.REPORT, attestations.SBOM)]
    return [*named, attached(attestations.STATEMENT, json.dumps(said).encode())]


def test_attestations_that_name_each_other_are_enough_until_a_key_asks_for_a_signature() -> None:
    there, digest = complete(statement()), SUBJECT.digest
    assert attach.sufficient(there, KINDS, digest)
    assert not attach.sufficient(there[1:], KINDS, digest)
    key, other = (keys.Key(ec.generate_private_key(ec.SECP256R1())) for _ in range(2))
    assert not attach.sufficient(there, KINDS, digest, key)
    signed = signatures.envelope(there[-1].data, key)
    there[-1] = attached(attestations.STATEMENT, signed, attestations.ENVELOPE)
    assert attach.sufficient(there, KINDS, digest, key)
    assert attach.sufficient(there, KINDS, digest)
    assert not attach.sufficient(there, KINDS, digest, other)


def test_a_provenance_that_has_the_digests_of_its_attestations_elsewhere_is_not_enough() -> None:
    said = statement()
    details = said["predicate"]["runDetails"]
    details["metadata"], details["byproducts"] = details["byproducts"], []
    assert not attach.sufficient(complete(said), KINDS, SUBJECT.digest)


def test_a_provenance_of_another_image_is_not_enough() -> None:
    assert not attach.sufficient(complete(statement()), KINDS, f"sha256:{sha256('other')}")


@pytest.mark.parametrize(
    "said",
    [
        {"predicateType": "theirs", "predicate": {"buildType": provenance.BUILD_TYPE}},
        statement(predicateType=f"theirs, of {provenance.BUILD_TYPE}"),
        statement(predicate={"comment": provenance.BUILD_TYPE}),
        statement(predicate=[provenance.BUILD_TYPE]),
        {"x": provenance.BUILD_TYPE},
    ],
)
def test_a_statement_that_only_mentions_ours_is_somebody_elses(said: dict[str, Any]) -> None:
    theirs = attached(attestations.STATEMENT, json.dumps(said).encode())
    (own,) = attach.ours([theirs, complete(statement())[-1]], KINDS)[-1:]
    assert attach.ours([theirs], KINDS) == []
    assert own.data == json.dumps(statement()).encode()

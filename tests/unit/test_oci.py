"""Documents of the OCI specifications: what is written is what is read, and the same every time."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from images.publishing import oci
from images.publishing.oci import Damaged, Descriptor
from tests import layout

CONFIG = b'{"rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2"]}}'
LAYERS = [oci.describe(data, oci.LAYER) for data in (b"one", b"two")]
IMAGE = oci.manifest(oci.describe(CONFIG, oci.CONFIG), LAYERS)
SUBJECT = oci.describe(IMAGE, oci.MANIFEST)


@dataclass(frozen=True)
class Stand:
    """An attestation."""

    name: str = "report.json"
    artifact_type: str = "application/x"
    media_type: str = "application/x+json"
    data: bytes = b"{}\n"


def test_a_manifest_reads_back_as_what_was_written() -> None:
    found = oci.parse(oci.manifest(oci.describe(CONFIG, oci.CONFIG), LAYERS, {"a": "b"}))
    assert found.layers == tuple(LAYERS)
    assert found.config == oci.describe(CONFIG, oci.CONFIG)
    assert found.annotations == {"a": "b"}
    assert found.subject is None


def test_a_manifest_is_the_same_bytes_every_time_and_says_what_it_is() -> None:
    assert oci.manifest(oci.describe(CONFIG, oci.CONFIG), LAYERS) == IMAGE
    document = json.loads(IMAGE)
    assert (document["schemaVersion"], document["mediaType"]) == (2, oci.MANIFEST)
    assert "annotations" not in document, "an empty table would be another digest"


def test_a_blob_that_is_named_twice_has_to_be_there_once() -> None:
    twice = oci.parse(oci.manifest(oci.describe(CONFIG, oci.CONFIG), [*LAYERS, LAYERS[0]]))
    assert len(twice.layers) == 3
    assert [blob.digest for blob in twice.blobs] == [
        *(layer.digest for layer in LAYERS),
        oci.digest(CONFIG),
    ]


def test_a_attestation_names_its_image_as_the_specification_asks() -> None:
    document = json.loads(oci.artifact(Stand(), SUBJECT))
    assert document["artifactType"] == "application/x"
    assert document["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": oci.digest(b"{}"),
        "size": 2,
    }
    assert document["layers"] == [
        {
            "mediaType": "application/x+json",
            "digest": oci.digest(b"{}\n"),
            "size": 3,
            "annotations": {"org.opencontainers.image.title": "report.json"},
        }
    ]
    assert document["subject"] == SUBJECT.plain


def test_what_else_is_said_of_an_image_does_not_change_its_attestations() -> None:
    told = Descriptor(SUBJECT.media_type, SUBJECT.digest, SUBJECT.size, {"x": "y"}, "z")
    assert oci.artifact(Stand(), told) == oci.artifact(Stand(), SUBJECT)


def test_a_list_of_attestations_says_of_which_kind_each_is() -> None:
    entry = oci.referrer(oci.artifact(Stand(), SUBJECT))
    assert entry.artifact_type == "application/x"
    assert oci.parse_index(oci.index([entry])) == [entry]


def test_a_attestation_without_a_kind_of_its_own_is_of_its_configurations() -> None:
    assert oci.parse(IMAGE).artifact_type == oci.CONFIG


def test_tags_of_attestations_and_signatures_are_made_of_the_digest() -> None:
    assert oci.fallback_tag("sha256:ab") == "sha256-ab"
    assert oci.signature_tag("sha256:ab") == "sha256-ab.sig"


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        (oci.digest(b""), True),
        (oci.digest(b"").upper(), False),
        (oci.digest(b"")[:-1], False),
        (oci.digest(b"") + "\n", False),
        ("sha512:" + "0" * 128, False),
    ],
)
def test_only_a_whole_sha256_is_a_digest(text: str, fine: bool) -> None:
    assert oci.is_digest(text) is fine


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"manifests": []}',
        b'{"config": {}, "layers": []}',
        b'{"config": 1, "layers": []}',
        IMAGE.replace(b'"size":3', b'"size":-3'),
        IMAGE.replace(b"sha256:", b"sha255:"),
        IMAGE.replace(b'"layers":[', b'"layers":[7,'),
        IMAGE.replace(b'"size":3', b'"size":1e999'),
        IMAGE.replace(b'"size":3', b'"size":-1e999'),
        IMAGE.replace(b'"size":3', b'"size":NaN'),
        IMAGE.replace(b'"size":3', b'"size":3.0'),
        IMAGE.replace(b'"size":3', b'"size":"3"'),
        IMAGE.replace(b'"size":3', b'"size":true'),
        IMAGE.replace(b'"size":3', b'"size":' + b"9" * 30),
        IMAGE.replace(b'"size":3', b'"size":' + b"9" * 5000),
        IMAGE.replace(b'"size":3', b'"size":3,"annotations":7'),
        IMAGE.replace(b'"size":3', b'"size":3,"annotations":"ab"'),
        IMAGE.replace(b'"size":3', b'"size":3,"annotations":["ab"]'),
        IMAGE.replace(b'"size":3', b'"size":3,"annotations":{"a":1}'),
        IMAGE.replace(b'"size":3', b'"size":3,"annotations":{"a":"\\ud800"}'),
        IMAGE.replace(b'"size":3', b'"size":3,"artifactType":{}'),
        IMAGE.replace(b"tar+zstd", b"tar\\u001b[2J"),
        IMAGE.replace(b"sha256:", b"sha256:\\u001b[2J"),
        IMAGE[:-1] + b',"annotations":7}',
        IMAGE[:-1] + b',"annotations":{"a":null}}',
        IMAGE[:-1] + b',"artifactType":7}',
        IMAGE[:-1] + b',"subject":7}',
        IMAGE[:-1] + b',"subject":[]}',
        b"[" * 200_000,
        b'{"config":' + b"[" * 200_000,
    ],
    ids=itertools.count(),
)
def test_what_is_no_manifest_is_one_sentence(data: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        oci.parse(data)
    assert caught.value.sentence.isprintable()
    assert caught.value.code == 1, "it is a verdict on an image"


def test_what_is_no_list_and_what_names_no_layers_is_one_sentence() -> None:
    deep = b"[" * 200_000
    for data in (b"", b"{}", b'{"manifests": {}}', b'{"manifests": [{}]}', deep):
        with pytest.raises(Damaged):
            oci.parse_index(data)
    rootfs = (b"7", b'"a"', b"[7]", b'["\\u001b[2J"]', b"null", b'{"a": 1}', deep)
    for data in (b"", b"{}", b"[]", *(b'{"rootfs": {"diff_ids": %b}}' % ids for ids in rootfs)):
        with pytest.raises(Damaged, match="names no layers"):
            oci.diff_ids(data)
    assert oci.diff_ids(CONFIG) == ("sha256:1", "sha256:2")


def test_text_of_a_registry_is_shown_on_one_line_and_not_without_end() -> None:
    assert oci.shown("caf\u00e9 \\") == "caf\u00e9 \\"
    assert oci.shown("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    assert oci.shown("\ud800") == "\\ud800"
    assert oci.shown("x" * 10, 4) == "xxxx..."


def test_signatures_have_the_configuration_that_cosign_writes() -> None:
    document = json.loads(oci.signature_config(LAYERS))
    assert document["rootfs"] == {"type": "layers", "diff_ids": [x.digest for x in LAYERS]}


# A folder


def test_a_layout_holds_its_layers_without_a_second_copy(tmp_path: Path) -> None:
    file = tmp_path / "layer"
    file.write_bytes(b"one")
    oci.write_layout(tmp_path / "layout", IMAGE, CONFIG, {LAYERS[0].digest: file})
    blobs = tmp_path / "layout/blobs/sha256"
    assert (blobs / LAYERS[0].digest[7:]).samefile(file)
    assert {b.name for b in blobs.iterdir()} == {
        d[7:] for d in (LAYERS[0].digest, oci.digest(IMAGE), oci.digest(CONFIG))
    }
    assert layout.read(tmp_path / "layout") == (IMAGE, SUBJECT)


def test_a_layout_that_is_written_again_keeps_nothing_of_the_first(tmp_path: Path) -> None:
    oci.write_layout(tmp_path, b"{}", b"first", {})
    oci.write_layout(tmp_path, IMAGE, CONFIG, {})
    assert not (tmp_path / "blobs/sha256" / oci.digest(b"first")[7:]).exists()
    assert layout.read(tmp_path)[0] == IMAGE

"""What a registry is asked with, and where it may send to: nothing here needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from images.publishing import connection, names, oci
from images.publishing.failures import Unreachable
from images.publishing.registry import Registry
from rollout.problem import Problem

DIGEST = oci.digest(b"")


# Names


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
@pytest.mark.parametrize("name", ["localhost", "registry.example.com", "[::1]"])
def test_a_port_that_there_is_not_is_wrong_usage(name: str, port: str) -> None:
    with pytest.raises(Problem, match="a port that there is not") as caught:
        names.parse_target(f"{name}:{port}/team")
    assert caught.value.code == 2


def test_a_port_that_there_is_is_taken() -> None:
    for name in ("localhost:1", "registry.example.com:65535", "[::1]:5000", "[::1]"):
        assert names.parse_target(f"{name}/team") == (name, "team")


def test_a_port_of_other_digits_is_none() -> None:
    with pytest.raises(Problem, match="host of a registry"):
        names.parse_target("localhost:\u0665\u0660\u0660\u0660")


def test_a_tag_and_a_digest_in_one_are_wrong_usage() -> None:
    with pytest.raises(Problem, match="say a tag or a digest, not both") as caught:
        names.parse_reference(f"localhost:5000/team/image:tag@{DIGEST}")
    assert caught.value.code == 2
    found = names.parse_reference(f"localhost:5000/team/image@{DIGEST}")
    assert found == ("localhost:5000/team", "image", DIGEST)


# Credentials


@pytest.mark.parametrize("kind", ["missing", "a folder", "below a file"])
def test_a_file_of_credentials_that_cannot_be_read_is_wrong_usage(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    names = {"missing": "nowhere.json", "a folder": "folder", "below a file": "file/x"}
    file = tmp_path / names[kind]
    with pytest.raises(Problem, match=r"--authfile .* cannot be read: [A-Z]") as caught:
        Registry("localhost:5000", authfile=file)
    assert caught.value.code == 2


# Where a registry may send to


@pytest.mark.parametrize(
    ("address", "url", "whole"),
    [
        ("https://r.example.com", "/v2/x", "https://r.example.com/v2/x"),
        ("https://r.example.com", "//s.example.com/x", "https://s.example.com/x"),
        ("https://r.example.com", "https://s.example.com/a b", "https://s.example.com/a%20b"),
        ("http://127.0.0.1:5000", "http://localhost:9000/x", "http://localhost:9000/x"),
        ("http://127.0.0.1:5000", "https://s.example.com/x", "https://s.example.com/x"),
        ("https://r.example.com", "http://r.example.com/x", None),
        ("https://127.0.0.1:5000", "http://127.0.0.1:5000/x", None),
        ("http://127.0.0.1:5000", "http://s.example.com/x", None),
        ("http://127.0.0.1:5000", "http://127.0.0.1.example.com/x", None),
        ("http://127.0.0.1:5000", "http://127.0.0.1@s.example.com/x", None),
        ("https://r.example.com", "file:///x", None),
        ("https://r.example.com", "FILE:///x", None),
        ("https://r.example.com", "\x1bjavascript:x", None),
        ("https://r.example.com", "x\x1b[2J", "https://r.example.com/x%1B[2J"),
    ],
)
def test_a_registry_sends_on_with_tls_or_within_this_machine(
    address: str, url: str, whole: str | None
) -> None:
    if whole:
        assert connection.onward(address, url, "r") == whole
        return
    with pytest.raises(Unreachable, match="not safe") as caught:
        connection.onward(address, url, "r")
    assert caught.value.sentence.isprintable()

"""What a registry is asked with, and what is made of it: nothing here needs one."""

from __future__ import annotations

import http.client
import itertools
import json
import ssl
import urllib.error
from pathlib import Path

import pytest

from images import oci, registry
from images.registry import Broken, Registry, Unreachable
from rollout.problem import Problem

DIGEST = oci.digest(b"")


# Names


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
@pytest.mark.parametrize("name", ["localhost", "registry.example.com", "[::1]"])
def test_a_port_that_there_is_not_is_wrong_usage(name: str, port: str) -> None:
    with pytest.raises(Problem, match="a port that there is not") as caught:
        registry.parse_target(f"{name}:{port}/team")
    assert caught.value.code == 2


def test_a_port_that_there_is_is_taken() -> None:
    for name in ("localhost:1", "registry.example.com:65535", "[::1]:5000", "[::1]"):
        assert registry.parse_target(f"{name}/team") == (name, "team")


def test_a_port_of_other_digits_is_none() -> None:
    with pytest.raises(Problem, match="host of a registry"):
        registry.parse_target("localhost:\u0665\u0660\u0660\u0660")


def test_a_tag_and_a_digest_in_one_are_wrong_usage() -> None:
    with pytest.raises(Problem, match="say a tag or a digest, not both") as caught:
        registry.parse_reference(f"localhost:5000/team/image:tag@{DIGEST}")
    assert caught.value.code == 2
    found = registry.parse_reference(f"localhost:5000/team/image@{DIGEST}")
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


@pytest.mark.parametrize("text", ["", "[]", '{"auths": 7}', "[" * 200_000], ids=itertools.count())
def test_a_damaged_file_of_credentials_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "auth.json"
    file.write_text(text)
    with pytest.raises(Problem, match="no file of credentials") as caught:
        registry.credentials("localhost:5000/a", [file])
    assert caught.value.code == 2


def test_a_place_without_credentials_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"localhost": {"auth": "YTpi"}}}))
    files = [tmp_path / "folder", tmp_path / "nowhere", tmp_path / "auth.json"]
    assert registry.credentials("localhost/a", files) == ("a", "b")


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_logged_in_is_told_to_log_in(status: int) -> None:
    problem = registry.meaning(status, b"", "localhost:5000/a", login=False)
    assert problem.sentence.startswith(
        "localhost:5000 asks for a login, and none is known for localhost:5000/a; log in with"
    )
    assert "refuses these credentials" in registry.meaning(status, b"", "localhost/a").sentence


# What is no verdict on an image


def test_what_cannot_be_asked_has_an_exit_code_of_its_own() -> None:
    found = [
        registry.unreachable(ssl.SSLError(1, "alert"), "x:1"),
        registry.unreachable(ConnectionRefusedError(111, ""), "x:1"),
        registry.unreachable(UnicodeError("label too long"), "x:1"),
        registry.meaning(401, b"", "x:1/a"),
        registry.meaning(403, b"", "x:1/a"),
        registry.meaning(503, b"", "x:1/a"),
        *(
            registry.meaning_of_skopeo(f'level=fatal msg="{text}"', 1, "x:1/a")
            for text in ("x509: unknown", "no such host", "unauthorized", "EOF")
        ),
    ]
    assert [problem.code for problem in found] == [3] * len(found)
    assert all(isinstance(problem, Unreachable) for problem in found)
    assert not isinstance(registry.meaning(400, b"", "x:1/a"), Unreachable)


def test_patience_ends_in_what_is_no_verdict() -> None:
    def fails() -> None:
        raise Broken("it broke")

    with pytest.raises(Unreachable, match="it broke, 2 times in a row") as caught:
        registry.patiently(fails, (0,))
    assert caught.value.code == 3


def test_no_failure_writes_to_the_terminal() -> None:
    reset = "\x1b[2J\nlevel=fatal\x9b"
    for problem in (
        registry.unreachable(http.client.BadStatusLine(reset), "x:1"),
        registry.unreachable(urllib.error.URLError(reset), "x:1"),
        registry.meaning_of_skopeo(reset, 1, "x:1/a"),
        registry.meaning_of_skopeo(f'level=fatal msg="x509: {reset[:4]}"', 1, "x:1/a"),
        registry.meaning(503, reset.encode(), "x:1/a"),
    ):
        assert problem.sentence.isprintable()


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
        assert registry.onward(address, url, "r") == whole
        return
    with pytest.raises(Unreachable, match="not safe") as caught:
        registry.onward(address, url, "r")
    assert caught.value.sentence.isprintable()

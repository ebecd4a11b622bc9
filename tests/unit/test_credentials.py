"""Where credentials and certificates are looked for, and what is said of damaged ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from images.publishing import credentials
from rollout.problem import Problem


@pytest.mark.parametrize("text", ["", "[]", '{"auths": 7}', "[" * 200_000], ids=itertools.count())
def test_a_damaged_file_of_credentials_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "auth.json"
    file.write_text(text)
    with pytest.raises(Problem, match="no file of credentials") as caught:
        credentials.credentials("localhost:5000/a", [file])
    assert caught.value.code == 2


def test_a_place_without_credentials_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"localhost": {"auth": "YTpi"}}}))
    files = [tmp_path / "folder", tmp_path / "nowhere", tmp_path / "auth.json"]
    assert credentials.credentials("localhost/a", files) == ("a", "b")


def test_a_folder_without_certificates_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="holds no certificate") as caught:
        credentials.tls("registry.example.com", tmp_path)
    assert caught.value.code == 2

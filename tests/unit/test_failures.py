"""What is made of a failure: one sentence, and whether another attempt may help."""

from __future__ import annotations

import http.client
import ssl

import pytest
from urllib3.exceptions import LocationParseError, ProtocolError

from images.publishing import failures
from images.publishing.failures import Broken, Unreachable


def test_what_cannot_be_asked_has_an_exit_code_of_its_own() -> None:
    found = [
        failures.unreachable(ssl.SSLError(1, "alert"), "x:1"),
        failures.unreachable(ConnectionRefusedError(111, ""), "x:1"),
        failures.unreachable(LocationParseError("label too long"), "x:1"),
        failures.meaning(401, b"", "x:1/a"),
        failures.meaning(403, b"", "x:1/a"),
        failures.meaning(503, b"", "x:1/a"),
        *(
            failures.meaning_of_skopeo(f'level=fatal msg="{text}"', 1, "x:1/a")
            for text in ("x509: unknown", "no such host", "unauthorized", "EOF")
        ),
    ]
    assert [problem.code for problem in found] == [3] * len(found)
    assert all(isinstance(problem, Unreachable) for problem in found)
    assert not isinstance(failures.meaning(400, b"", "x:1/a"), Unreachable)


def test_patience_ends_in_what_is_no_verdict() -> None:
    def fails() -> None:
        raise Broken("it broke")

    with pytest.raises(Unreachable, match="it broke, 2 times in a row") as caught:
        failures.patiently(fails, (0,))
    assert caught.value.code == 3


def test_a_registry_is_not_asked_before_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    pauses = iter([60.0, 0.5])

    def busy() -> str:
        problem = Broken("too many requests")
        problem.after = next(pauses)
        raise problem

    with pytest.raises(StopIteration):
        failures.patiently(busy, (1.0, 2.0, 4.0))
    assert slept == [60.0, 2.0]


def test_a_registry_that_asks_for_hours_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures.time, "sleep", lambda _: pytest.fail("it waits"))

    def busy() -> None:
        problem = Broken("too many requests")
        problem.after = 6 * 3600.0
        raise problem

    with pytest.raises(Unreachable, match="left alone for 360 minutes; run this again then"):
        failures.patiently(busy)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("60", 60), ("0", 0), ("", 0), ("soon", 0), ("-5", 0), ("1e9", 0)),
        *(("9" * 400, 10**9), ("9" * 5000, 0)),
        ("Sat, 28 Nov 2026 12:01:00 GMT", 60),
        ("Sat, 28 Nov 2026 11:00:00 GMT", 0),
        ("Sat, 28 Nov 99999999 11:00:00 GMT", 0),
    ],
)
def test_when_to_come_back_is_read_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, header: str, seconds: float
) -> None:
    noon = 1795867200.0  # of 2026-11-28
    monkeypatch.setattr("urllib3.util.retry.time.time", lambda: noon)
    assert failures.seconds(header) == seconds


def test_no_failure_writes_to_the_terminal() -> None:
    reset = "\x1b[2J\nlevel=fatal\x9b"
    for problem in (
        failures.unreachable(http.client.BadStatusLine(reset), "x:1"),
        failures.unreachable(ProtocolError("aborted", OSError(reset)), "x:1"),
        failures.meaning_of_skopeo(reset, 1, "x:1/a"),
        failures.meaning_of_skopeo(f'level=fatal msg="x509: {reset[:4]}"', 1, "x:1/a"),
        failures.meaning(503, reset.encode(), "x:1/a"),
    ):
        assert problem.sentence.isprintable()


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_logged_in_is_told_to_log_in(status: int) -> None:
    problem = failures.meaning(status, b"", "localhost:5000/a", login=False)
    assert problem.sentence.startswith(
        "localhost:5000 asks for a login, and none is known for localhost:5000/a; log in with"
    )
    assert "refuses these credentials" in failures.meaning(status, b"", "localhost/a").sentence

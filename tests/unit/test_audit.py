"""``nox -s audit`` against played tools: what is new is said, and silence is never "all fine"."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from images import catalog, host
from images.locking import base, rootfs
from images.locking.debian import Deb
from images.telling import audit
from images.telling.audit import Accepted, Finding
from rollout.problem import Problem

DAY = date(2026, 11, 29)
# Says of each requirement what the index would: KNOWN has a weakness, everything else none.
PIP_AUDIT = """\
import json, sys
entries = []
for line in open(sys.argv[sys.argv.index("--requirement") + 1]):
    name, version = line.strip().split("==")
    if name in {unknown!r}:
        entries.append({{"name": name, "skip_reason": "not found"}})
        continue
    vulns = [{{"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": []}}] if name == "weak" else []
    entries.append({{"name": name, "version": version, "vulns": vulns}})
print(json.dumps({{"dependencies": entries, "fixes": []}}))
sys.exit(any(entry.get("vulns") for entry in entries))
"""
BROKEN = "import sys; sys.exit('ERROR: connection refused')\n"
DEBSECAN = "CVE-2026-1 libc6 (remotely exploitable, high urgency)\nCVE-2026-2 libc6 (fixed)\n"
STATUS = "Package: libc6\nStatus: install ok installed\nVersion: 2.36\n"


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A checkout with one lock and a base, and played tools that a test can change."""
    folder = tmp_path / "lockfiles"
    folder.mkdir()
    (folder / "a.lock").write_text("fine==1.0+cu128 \\\n    --hash=…\nweak==1.5 \\\n    --hash=…\n")
    (folder / "base.lock").touch()
    (folder / "accepted.toml").touch()
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT.format(unknown=()))
    (tmp_path / "answer").write_text(DEBSECAN)
    (tmp_path / "debsecan").write_text(f"#!/bin/sh\ncat '{tmp_path}/answer'\n")
    (tmp_path / "debsecan").chmod(0o755)
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "LOCKFILES", folder)
    monkeypatch.setattr(audit, "PAGE", folder / "AUDIT.md")
    monkeypatch.setattr(audit, "PIP_AUDIT", (sys.executable, str(tmp_path / "pip_audit.py")))
    monkeypatch.setattr(audit, "DEBSECAN", str(tmp_path / "debsecan"))
    monkeypatch.setattr(base, "LOCK", folder / "base.lock")
    monkeypatch.setattr(host, "require", lambda *_: None)
    monkeypatch.setattr(base, "tarball", lambda: tmp_path)
    monkeypatch.setattr(rootfs, "status", lambda _: STATUS)
    debs = SimpleNamespace(debs=[Deb("libc6", "2.36", "0" * 64, "pool/x.deb")])
    monkeypatch.setattr(base, "read", lambda: debs)
    accepted = folder / "accepted.toml"
    read = audit.read_accepted
    monkeypatch.setattr(audit, "read_accepted", lambda: read(accepted))
    return SimpleNamespace(top=tmp_path, accepted=accepted, page=folder / "AUDIT.md")


def accept(name: str, package: str, until: date) -> str:
    reason = "nothing here calls it"
    return f'[{name}]\npackages = ["{package}"]\nreason = "{reason}"\nuntil = {until}\n'


def test_what_is_new_ends_it_with_1_and_stands_in_the_page_of_the_day(
    locked: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([]) == 1
    said = capsys.readouterr().out
    assert "weak 1.5: PYSEC-1, fixed in 2.0\n" in said
    assert "libc6 2.36: CVE-2026-2, fixed in a newer package\n" in said
    assert "2 new, 0 accepted, 1 without a fix in Debian" in said
    page = locked.page.read_text()
    assert f"as of {datetime.now(UTC).date()}" in page
    assert "| PYSEC-1 | weak | 1.5 | 2.0 | " in page
    assert "| libc6 | CVE-2026-1 |" in page


def test_what_was_accepted_stays_with_its_reason_and_nothing_is_new(
    locked: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    later = datetime.now(UTC).date() + timedelta(days=30)
    entries = (("PYSEC-1", "weak"), ("CVE-2026-2", "libc6"), ("PYSEC-0", "gone"))
    locked.accepted.write_text("".join(accept(*entry, later) for entry in entries))
    assert audit.main([]) == 0
    assert f"nothing here calls it (until {later}) |" in locked.page.read_text()
    assert "[PYSEC-0] is found no more, or its day is over; remove it" in capsys.readouterr().out


def test_a_distribution_that_the_index_does_not_know_is_named(locked: SimpleNamespace) -> None:
    (locked.top / "pip_audit.py").write_text(PIP_AUDIT.format(unknown=("fine",)))
    assert audit.main([]) == 1
    assert "a.lock` | 1 | fine | 1 |" in locked.page.read_text()


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("pip_audit.py", BROKEN, "pip-audit gave no answer: ERROR: connection refused"),
        ("pip_audit.py", "print('{}')", "pip-audit gave no answer"),
        ("pip_audit.py", "print('{\"dependencies\": [{}]}')", "pip-audit gave no answer"),
        (
            "pip_audit.py",
            PIP_AUDIT.format(unknown=("fine", "weak")),
            "the index tells nothing of vulnerabilities",
        ),
        (
            "debsecan",
            "#!/bin/sh\necho 'error: cannot open' >&2; exit 1\n",
            "debsecan gave no answer: error: cannot open",
        ),
        ("answer", "<html>\n", "debsecan said what this audit cannot read: '<html>'"),
    ],
)
def test_no_answer_is_exit_code_3_and_leaves_the_last_page(
    locked: SimpleNamespace, file: str, text: str, sentence: str
) -> None:
    locked.page.write_text("the last one")
    (locked.top / file).write_text(text)
    with pytest.raises(Problem) as caught:
        audit.main([])
    assert caught.value.code == 3
    assert sentence in caught.value.sentence
    assert locked.page.read_text() == "the last one"


@pytest.mark.parametrize(
    "text",
    [
        "[A]\nreason = 'x'\nuntil = 2027-01-01\n",
        "[A]\npackages = []\nreason = 'x'\nuntil = 2027-01-01\n",
        "[A]\npackages = ['a']\nreason = ' '\nuntil = 2027-01-01\n",
        "[A]\npackages = ['a']\nreason = 'x'\nuntil = 'soon'\n",
        "[A]\npackages = ['a']\nreason = 'x'\nuntil = 2027-01-01\nalso = 1\n",
        "A = 1\n",
        "[A\n",
    ],
)
def test_an_entry_without_packages_reason_and_day_is_wrong_usage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "accepted.toml"
    path.write_text(text)
    with pytest.raises(Problem) as caught:
        audit.read_accepted(path)
    assert caught.value.code == 2
    assert "accepted.toml" in caught.value.sentence


def test_the_file_that_is_kept_can_be_read() -> None:
    assert isinstance(audit.read_accepted(), list)


FOUND = Finding("a.lock", "weak", "1.5", "PYSEC-1", "2.0")
ENTRY = Accepted("PYSEC-1", frozenset(["weak"]), "why", DAY)


@pytest.mark.parametrize(
    ("finding", "today", "new"),
    [
        (FOUND, DAY, False),
        (FOUND, DAY + timedelta(days=1), True),
        (replace(FOUND, package="other"), DAY, True),
        (replace(FOUND, id="PYSEC-2"), DAY, True),
    ],
    ids=["accepted", "its day is over", "another package", "another id"],
)
def test_an_entry_holds_for_its_packages_and_until_its_day(
    finding: Finding, today: date, new: bool
) -> None:
    judged = audit.judge([finding, finding], [ENTRY], today)
    assert judged.new == ([finding] if new else [])
    assert judged.idle == (["PYSEC-1"] if new else [])


def test_a_name_that_a_lock_has_twice_is_asked_about_twice() -> None:
    pairs = [("a", "1"), ("b", "2+cpu"), ("b", "2"), ("a", "3")]
    assert audit.rounds(pairs) == [{"a": "1", "b": "2"}, {"a": "3"}]


def test_every_python_lock_is_asked_about() -> None:
    named = {path.name for path in audit.locks()}
    assert "dev.lock" in named and "base.lock" not in named
    assert {image.lock for image in catalog.load()} < set(audit.locks())

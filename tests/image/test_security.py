"""What an image gives nobody: another user's files to write, a port, a right more than it needs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from images import host
from images.building import builder

from .conftest import Container, Sealed

pytestmark = pytest.mark.image
# As `docker run --cap-drop ALL --security-opt no-new-privileges` starts a command.
WITHOUT_RIGHTS = (
    *("setpriv", "--reuid", "12345", "--regid", "0", "--clear-groups", "--no-new-privs"),
    *("--bounding-set", "-all", "--inh-caps", "-all"),
)
# TCP sockets that listen are in state 0A; UDP ones that are bound in 07.
LISTENING = """
import torch, transformers
from pathlib import Path
for name, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
    for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
        if line.split()[3] == state:
            print(name, line.split()[1])
"""


def entries(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in an image but links, by its path in there."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            found = path.lstat()
            if not stat.S_ISLNK(found.st_mode):
                yield str(path.relative_to(root)), found


def test_no_file_gives_more_rights_than_its_caller_has(
    container: Callable[[], Container],
) -> None:
    found = [
        path
        for path, s in entries(container().root)
        if stat.S_ISREG(s.st_mode) and s.st_mode & (stat.S_ISUID | stat.S_ISGID)
    ]
    assert found == []


def test_every_user_may_write_in_sticky_folders_alone(container: Callable[[], Container]) -> None:
    found = [
        (path, oct(s.st_mode))
        for path, s in entries(container().root)
        if s.st_mode & stat.S_IWOTH
        and not stat.S_ISCHR(s.st_mode)
        and not (stat.S_ISDIR(s.st_mode) and s.st_mode & stat.S_ISVTX)
    ]
    assert found == []


def test_the_config_holds_no_proxy_no_certificate_and_no_port(built: builder.Built) -> None:
    names = {pair.partition("=")[0] for pair in built.config["Env"]}
    # TOKENIZERS_PARALLELISM is no token.
    words = "token|password|secret|credentials?"
    foreign = re.compile(rf"(?i)(.*_)?({words})(_.*)?|.*proxy|UV_.*|PIP_.*")
    assert not [name for name in names if foreign.fullmatch(name)]
    assert not names & {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
    assert not built.config.get("ExposedPorts")


def test_the_certificates_are_debian_s_and_none_of_this_host(
    container: Callable[[], Container],
) -> None:
    root = container().root
    assert not list(root.glob("usr/local/share/ca-certificates/*"))
    mine = host.ca_bundle(os.environ)
    bundle = (root / "etc/ssl/certs/ca-certificates.crt").read_text(encoding="ascii")
    listed = (root / "etc/ca-certificates.conf").read_text(encoding="utf-8").split()
    shipped = "".join(
        (root / "usr/share/ca-certificates" / name).read_text(encoding="ascii")
        for name in listed
        if name.endswith(".crt")
    )
    pattern = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
    inside = {"".join(block.split()) for block in pattern.findall(bundle)}
    debian = {"".join(block.split()) for block in pattern.findall(shipped)}
    assert inside and inside <= debian, f"{len(inside - debian)} of {mine} or of another"


def test_nothing_listens_where_nobody_asked(sealed: Sealed) -> None:
    done = sealed.run("rollout", "python3", "-c", LISTENING)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_it_works_without_capabilities_and_without_new_privileges(sealed: Sealed) -> None:
    rights = "grep -E '^(Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs)' /proc/self/status"
    done = sealed.run(*WITHOUT_RIGHTS, "rollout", "sh", "-c", rights, uid=0)
    assert done.returncode == 0, done.stderr
    assert [int(line.split()[1], 16) for line in done.stdout.splitlines()] == [0, 0, 0, 0, 1]
    for command in (("verify",), ("smoke", "--only", "start,generation")):
        done = sealed.run(*WITHOUT_RIGHTS, "rollout", *command, uid=0)
        # Some checks alone are no proof (3), and none of them failed (1).
        assert done.returncode == (0 if command == ("verify",) else 3), done.stdout + done.stderr
        assert "failed" not in done.stdout

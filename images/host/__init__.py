"""The machine that builds: its tools, its package settings, and how commands are run on it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from images.host import owner
from rollout.problem import Problem

# Command, or file by its whole path -> the Debian package that has it.
PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "buildah": "buildah",
    "docker": "docker.io",
    "docker-registry": "docker-registry",
    "debsecan": "debsecan",
    "dpkg-deb": "dpkg",
    "htpasswd": "apache2-utils",
    "mksquashfs": "squashfs-tools",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "skopeo": "skopeo",
    "zstd": "zstd",
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1": "libfaketime",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
# pip's variables and uv's names for the same settings. uv does not read pip's, and a host that is
# set up for pip (a mirror, a folder of wheels) must not need a second set-up for us.
_PIP_TO_UV = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_NO_INDEX": "UV_NO_INDEX",
    "PIP_TRUSTED_HOST": "UV_INSECURE_HOST",
    "PIP_DEFAULT_TIMEOUT": "UV_HTTP_TIMEOUT",
}
# Older names of two of them, which uv still reads.
_OLD_NAMES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


def say(text: str) -> None:
    """Tell the person in front of the terminal what is going on."""
    print(text, flush=True)


def cache() -> Path:
    """Where downloads are kept between builds: outside the checkout and outside every image."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "verl-rollout"


def scratch() -> Path:
    """Where large files lie for a while: on the disk, because /tmp may be memory."""
    folder = cache() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name: the file gets its own when it is whole, and is removed if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, because only a rename within one file system is all or nothing.
    temporary = path.with_name(f".{path.name}.{owner.this()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interrupted run leaves the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Replace a file with JSON for people and programs, in one step."""
    write(path, json.dumps(data, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_debian(os_release: str) -> bool:
    """Whether /etc/os-release describes Debian, Ubuntu or a child of theirs."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    names = f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".replace('"', "").split()
    return bool({"debian", "ubuntu"} & set(names))


def install_argv(packages: Sequence[str]) -> list[str]:
    """The command that installs Debian packages without a question."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def require(*commands: str) -> None:
    """See that commands, or files named in PACKAGES, exist; install them where that is allowed.

    Raises:
        Problem: exit code 3, with the packages that are missing.
    """
    there = {c: Path(c).exists() if c.startswith("/") else shutil.which(c) for c in commands}
    missing = sorted({PACKAGES[c] for c in commands if not there[c]})
    if not missing:
        return
    release = Path("/etc/os-release")
    debian = release.exists() and is_debian(release.read_text(encoding="utf-8"))
    names = " ".join(missing)
    if not debian or os.geteuid() != 0 or not shutil.which("apt-get"):
        how = f"run 'sudo apt-get install {names}'" if debian else "install them for your system"
        raise Problem(f"building needs {names}, not found on this machine; {how}", 3)
    say(f"installing with apt-get: {names}")
    for argv in (["apt-get", "update", "-qq"], [*install_argv(missing), "-qq"]):
        run(argv, quiet=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def uv_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that make uv see the package settings of this host, pip's included."""
    settings = {k: v for k, v in environ.items() if k.startswith("UV_")}
    for pip, uv in _PIP_TO_UV.items():
        if environ.get(pip) and not environ.get(_OLD_NAMES.get(uv, uv)):
            value = environ[pip]
            # pip separates folders by blanks, uv by commas.
            settings.setdefault(uv, ",".join(value.split()) if uv == "UV_FIND_LINKS" else value)
    for name in _PROXIES:
        for key in (name, name.lower()):
            if environ.get(key):
                settings[key] = environ[key]
    bundle = ca_bundle(environ)
    if bundle:
        settings["SSL_CERT_FILE"] = str(bundle)
        # uv brings its own roots, which do not know a company's proxy.
        settings["UV_SYSTEM_CERTS"] = "1"
    return settings


def ca_bundle(environ: Mapping[str, str]) -> Path | None:
    """The host's CA bundle: what its variables name, else where distributions keep it."""
    candidates = [environ.get(v) for v in _CA_VARIABLES] + list(_CA_BUNDLES)
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def uv() -> str:
    """The pinned uv of the development environment.

    Raises:
        Problem: uv is not installed beside this interpreter.
    """
    try:
        from uv import find_uv_bin
    except ImportError:
        message = "the pinned uv is missing; run this through nox (README, first command)"
        raise Problem(message, 3) from None
    return str(find_uv_bin())


def run(
    argv: Sequence[str],
    *,
    quiet: bool = False,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
    umask: int = -1,
) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is shown as it comes, or with ``quiet`` kept and returned.

    With ``quiet`` nobody sees a question, so the command has no input either.

    Raises:
        Problem: the command failed (with ``check``); the sentence holds its last line of output.
    """
    try:
        done = subprocess.run(
            list(argv),
            env=None if env is None else dict(env),
            cwd=cwd,
            umask=umask,
            check=False,
            text=True,
            errors="replace",  # names of files, and what a server says, may be in any encoding
            stdin=subprocess.DEVNULL if quiet else None,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.PIPE if quiet else None,
        )
    except (FileNotFoundError, PermissionError):  # PATH may hold folders that are closed to us
        raise Problem(f"command {argv[0]!r} is not installed", 3) from None
    if check and done.returncode:
        said = (done.stderr or done.stdout or "").strip().splitlines()
        tail = f": {said[-1]}" if said else ""
        command = shlex.join(argv)
        short = command if len(command) < 120 else command[:117] + "..."
        raise Problem(f"'{short}' exited with {done.returncode}{tail}")
    return done


def guarded(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call a station's ``main`` and turn its problems into one sentence and an exit code."""
    # Without these, a cancelled CI job skips every 'finally', and secrets and containers stay.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        return main(arguments)
    except Problem as problem:
        print(f"error: {problem.sentence}", file=sys.stderr, flush=True)
        return problem.code
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.errno not in (28, 122):  # ENOSPC, EDQUOT
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: no disk space left{where}; free some and run it again", file=sys.stderr)
        return 1

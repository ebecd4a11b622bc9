"""How the base is made of its packages: what is left out, cleared away, and added.

The packages are joined with no network at all and nothing of this machine, so that the same ones
give the same bytes every time.

Commands needed: mmdebstrap and dpkg-deb. No root is needed where user namespaces are allowed.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from images import host
from images.host import leftovers
from images.locking import debian
from images.locking.apt_sources import ARCHITECTURE
from images.locking.debian import RELOCK, Deb, parse_stanzas
from rollout.problem import Problem

# The release of Debian 12. Every file made or shipped later gets this time. Every builder's clock
# has to be past it, because a file that is older keeps its own time.
EPOCH = 1686355200

# What dpkg does not unpack. Licences stay (Debian's terms ask for them).
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    # 57 MB that no JIT compiler opens: a debugging tool of GCC's and Python as a static library.
    "path-exclude=/usr/bin/*lto-dump*",
    "path-exclude=/usr/lib/python3.11/config-3.11-*/libpython3.11*.a",
)

# Before the first package: /bin and its like are links from the start, as usr-is-merged demands (or
# it refuses to install), and dpkg does not wait for the disk after each file (the tree is thrown
# away if anything fails; waiting doubles the time).
_SETUP = """
for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done
echo force-unsafe-io > "$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
"""

# After the last package: out with whatever depends on this machine or this minute.
_CUSTOMIZE = r"""
set -eu
umask 022
# apt is not in the image; its sources would name a folder of this machine.
rm -rf "$1/etc/apt" "$1/var/lib/apt" "$1/var/cache/apt" "$1/var/log/apt"
rm -f "$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
# Back-up copies hold whatever state came one step before, locks hold nothing.
rm -f "$1"/var/lib/dpkg/*-old "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/lock*
rm -f "$1"/etc/passwd- "$1"/etc/group- "$1"/etc/shadow- "$1"/etc/gshadow- "$1"/etc/.pwd.lock
# The loader's own cache remembers inode numbers.
rm -rf "$1/var/cache/ldconfig"
find "$1/var/log" -type f -delete
# mmdebstrap copied this machine's. Empty files stay as places to mount on where the root is
# read-only; without hosts, "localhost" would be asked of a name server.
rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/machine-id"
for f in hostname resolv.conf; do : > "$1/etc/$f"; done
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > "$1/etc/hosts"
# The user of the images, written by hand because useradd stamps /etc/shadow with the day. Here and
# not in a later layer, which would hold passwd a second time. Group 0 owns what has to be written,
# so that any UID that a cluster assigns (with group 0) can write it too.
echo 'rollout:x:1000:0:rollout:/var/cache/rollout:/bin/sh' >> "$1/etc/passwd"
install --directory --owner=1000 --group=0 --mode=2775 "$1/var/cache/rollout"
install --directory --mode=0755 "$1/opt/rollout"
# Debian compiles Python's library with time stamps in each file, or, for our SOURCE_DATE_EPOCH,
# with a hash that every import compares with the source. Unchecked is as reproducible and reads
# no source; no bytecode at all would slow every start of a user who may not write there.
find "$1/usr" "$1/etc" -name __pycache__ -prune -exec rm -rf {} +
# -B and -f, or the modules that the compiler itself imports get time stamps first and are skipped.
chroot "$1" env PYTHONHASHSEED=0 python3.11 -B -m compileall -q -f -j 1 \
  --invalidation-mode unchecked-hash /usr/lib/python3.11
"""


def recipe() -> str:
    """All that decides what is made of given packages: caches tell bases apart by it."""
    return "\0".join([*_DPKG_OPTIONS, _SETUP, _CUSTOMIZE, str(EPOCH)])


def make(debs: Iterable[Deb], names: Iterable[str], cached: Path, tar: Path) -> None:
    """Make a root file system's tar from the packages, ``<sha256>.deb`` each in ``cached``.

    Raises:
        Problem: a file is not the package that it is locked as, or mmdebstrap fails.
    """
    with leftovers.temporary("base") as temporary:
        repository = temporary / "debs"
        _repository(debs, cached, repository)
        # Without root, another user id inside the namespace has to read it.
        temporary.chmod(0o755)
        argv = mmdebstrap_argv(repository, tar, names)
        debian.run(argv, env=build_environment(os.environ))
    _add_dev(tar)


def status(tar: Path) -> str:
    """What dpkg says inside a tar of its packages."""
    with tarfile.open(tar) as made:
        file = made.extractfile("./var/lib/dpkg/status")
        return file.read().decode() if file else ""


def differences(locked: Iterable[Deb], status: str) -> list[str]:
    """How the packages that dpkg says are installed differ from the locked ones."""
    wanted = {f"{deb.name}={deb.version}" for deb in locked}
    stanzas = parse_stanzas(status)
    installed = {
        f"{s['Package']}={s['Version']}" for s in stanzas if s["Status"] == "install ok installed"
    }
    broken = {s["Package"] for s in stanzas if s["Status"] != "install ok installed"}
    return [
        *(f"{p} is locked but not installed" for p in sorted(wanted - installed)),
        *(f"{p} is installed but not locked" for p in sorted(installed - wanted)),
        *(f"{p} is half installed" for p in sorted(broken)),
    ]


def mmdebstrap_argv(repository: Path, destination: Path, names: Iterable[str]) -> list[str]:
    """The command that makes the tar from a folder of packages and nothing else."""
    return [
        "mmdebstrap",
        # Also for root: its mounts then live in a namespace and end with it, however it ends.
        "--mode=unshare",
        "--format=tar",
        "--variant=essential",
        f"--architectures={ARCHITECTURE}",
        f"--include={','.join(sorted(names))}",
        # The hook removes all of apt, so mmdebstrap would find nothing to clean; device nodes
        # cannot be unpacked without root, and every runtime brings its own.
        "--skip=cleanup/apt,cleanup/mmdebstrap,output/dev",
        *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
        f"--setup-hook={_SETUP}",
        f"--customize-hook={_CUSTOMIZE}",
        "",  # no suite: a folder of packages has none
        str(destination),
        # "copy", because dpkg inside the new root cannot see this machine's folders. Trusted,
        # because every file was compared with the lock a moment ago.
        f"deb [trusted=yes] copy:{repository} ./",
    ]


def build_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the packages' scripts get to see: nothing of this machine but where its commands are."""
    kept = {k: environ[k] for k in ("TMPDIR", "HOME") if environ.get(k)}
    return {
        **kept,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive",
        "SOURCE_DATE_EPOCH": str(EPOCH),
    }


def _repository(debs: Iterable[Deb], cached: Path, repository: Path) -> None:
    """Lay the locked files out as a folder that apt can install from."""
    repository.mkdir(mode=0o755)
    stanzas = []
    for deb in debs:
        file = repository / f"{deb.name}_{deb.sha256[:12]}.deb"
        shutil.copyfile(cached / f"{deb.sha256}.deb", file)
        file.chmod(0o644)
        if host.sha256(file) != deb.sha256:
            raise Problem(f"{deb.name}: the cached file changed while it was copied; run it again")
        control = debian.run(["dpkg-deb", "--field", str(file)])
        fields = parse_stanzas(control)[0]
        if (fields["Package"], fields["Version"]) != (deb.name, deb.version):
            raise Problem(
                f"the file locked as {deb.name} {deb.version} is {fields['Package']} "
                f"{fields['Version']}; remake the lock with '{RELOCK}'"
            )
        stanzas.append(index_stanza(control, deb, file.name, file.stat().st_size))
    packages = repository / "Packages"
    packages.write_text("\n".join(stanzas), encoding="utf-8")
    packages.chmod(0o644)


def index_stanza(control: str, deb: Deb, file: str, size: int) -> str:
    """The package's entry in the index of our folder."""
    return f"{control.strip()}\nFilename: ./{file}\nSize: {size}\nSHA256: {deb.sha256}\n"


def _add_dev(path: Path) -> None:
    """Put an empty /dev in the tar: a read-only root has to have the place to mount it."""
    entry = tarfile.TarInfo("./dev")
    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, EPOCH
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry)

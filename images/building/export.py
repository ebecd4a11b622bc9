"""From an image to one file, for hosts without a container engine.

``nox -s export -- REF --format FORMAT`` writes build/exports/<repository>/<tag>.<format>:

- ``oci``: an archive for Apptainer, podman and docker,
- ``rootfs``: the files themselves and a launcher (images/recipes/launcher), which needs util-linux,
- ``sqsh``: a squashfs file for enroot and pyxis.

Pure functions compute names, arguments and texts; :func:`export` runs them. The same image gives
the same rootfs and the same sqsh to the byte, as long as zstd and mksquashfs are the same.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from images import catalog, host
from images.building import build, builders
from images.building.build import TIMESTAMP
from images.building.buildah import Buildah
from images.building.builder import Built
from images.building.layers import LEVEL, zstd_argv
from images.catalog import RECIPES, ROOT, Image, shown
from images.host import leftovers
from rollout.problem import Problem

EXPORTS = ROOT / "build" / "exports"
LAUNCHER = RECIPES / "launcher"
# Format -> ending of the file, and the command that makes it.
FORMATS = {
    "oci": ("oci.tar", "buildah"),
    "rootfs": ("rootfs.tar.zst", "zstd"),
    "sqsh": ("sqsh", "mksquashfs"),
}


def stem(image: Image) -> str:
    """The folder that a rootfs unpacks into."""
    return f"{image.repository}-{image.tag}"


def target(image: Image, kind: str, folder: Path) -> Path:
    """The file that an export writes."""
    return folder / f"{image.tag}.{FORMATS[kind][0]}"


def oci_argv(identity: str, file: Path, reference: str, layers: str) -> list[str]:
    """The command that writes an OCI archive.

    zstd is smaller and opens faster. An Apptainer made with an umoci older than 0.5 (2025) reads
    gzip alone.
    """
    return [
        *("buildah", "push", "--quiet", "--format", "oci", "--compression-format", layers),
        *(identity, f"oci-archive:{file}:{reference}"),
    ]


def sqsh_argv(root: Path, file: Path, level: int) -> list[str]:
    """The command that writes a squashfs file, all files root's, as ``enroot import`` has it."""
    moment = str(TIMESTAMP)
    return [
        *("mksquashfs", str(root), str(file), "-noappend", "-no-progress", "-quiet"),
        *("-comp", "zstd", "-Xcompression-level", str(level), "-all-root", "-no-xattrs"),
        *("-mkfs-time", moment, "-all-time", moment, "-wildcards", "-e", "dev/*"),
    ]


def environment(config: Mapping[str, Any], diff_ids: Sequence[str]) -> str:
    """The variables of an image, a line each, and its layers: a report can name them then.

    Raises:
        Problem: a variable does not fit into one line.
    """
    pairs = config.get("Env") or []
    broken = [pair.split("=")[0] for pair in pairs if "\n" in pair]
    if broken:
        raise Problem(f"the value of {broken[0]} has a line break, which no export can hold", 2)
    return "".join(f"{pair}\n" for pair in (*pairs, f"ROLLOUT_LAYERS={','.join(diff_ids)}"))


def enroot_files(config: Mapping[str, Any], diff_ids: Sequence[str]) -> dict[str, str]:
    """The files that ``enroot import`` adds to an image: its settings, in the files enroot reads.

    As enroot 3 writes them (its docker.sh). enroot itself never ran where this was made; what is
    tested is that the files are there and that /etc/rc, run by a shell, starts ``rollout``.
    """
    labels = config.get("Labels") or {}
    comments = [f"# {key} {value}\n" for key, value in sorted(labels.items()) if "\n" not in value]
    folder = shlex.quote(config.get("WorkingDir") or "/")
    entry, default = config.get("Entrypoint") or [], config.get("Cmd") or []
    again = " ".join(["exec", *([shlex.join(entry)] if entry else []), '"$@"'])
    rc = f"""
mkdir -p {folder} 2> /dev/null
cd {folder} && unset OLDPWD || exit 1

if [ -s /etc/rc.local ]; then
    . /etc/rc.local
fi

if [ $# -gt 0 ]; then
    {again}
else
    exec {shlex.join([*entry, *default] or ["/bin/sh"])}
fi
"""
    volumes = sorted(config.get("Volumes") or {})
    mounts = [
        f"${{ENROOT_ROOTFS}}{v} {v} none x-create=dir,bind,rw,nosuid,nodev\n" for v in volumes
    ]
    return {
        "etc/rc": "".join(comments) + rc,
        "etc/rc.local": "# Sourced by /etc/rc when the container starts.\n",
        # Some of these make enroot's hook give a container the driver.
        "etc/environment": environment(config, diff_ids),
        "etc/fstab": "".join(mounts),
    }


def tree(root: Path) -> Iterator[Path]:
    """Everything below the root of an image in one fixed order, parents first.

    /dev stays empty (its contents are the host's), and sockets are left out: they are nothing
    without their process.
    """
    return _below(root, root / "dev")


def _below(folder: Path, empty: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name)):
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield path
            if path != empty:
                yield from _below(path, empty)
        elif not stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
            yield path


def size(root: Path) -> int:
    """Bytes of all files below a folder."""
    found = {(s.st_dev, s.st_ino): s.st_size for s in map(os.lstat, tree(root))}
    return sum(found.values())


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime = TIMESTAMP
    info.uname = info.gname = ""
    return info


def write_tar(stream: IO[bytes], root: Path, top: str, variables: str) -> None:
    """Write the archive of a rootfs: launcher, variables and files, all below one folder."""
    options: dict[str, Any] = {"format": tarfile.PAX_FORMAT, "copybufsize": 1 << 20}
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20, **options) as tar:
        own = {"run": LAUNCHER.read_bytes(), "environment": variables.encode()}
        for name in ("", "/environment", "/run", "/rootfs"):
            info = _plain(tarfile.TarInfo(top + name))
            info.mode = 0o644 if name == "/environment" else 0o755
            data = own.get(name[1:])
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data) if data else None)
        for path in tree(root):
            info = _plain(tar.gettarinfo(path, f"{top}/rootfs/{path.relative_to(root)}"))
            if info.isreg():
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)


def pack(argv: Sequence[str], file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Pipe what ``write`` writes through a command into a file: no second copy on the disk.

    Raises:
        Problem: the command failed.
    """
    with file.open("wb") as out:
        process = subprocess.Popen(list(argv), stdin=subprocess.PIPE, stdout=out)
        assert process.stdin is not None  # noqa: S101 - for mypy: it was asked for
        try:
            write(process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended early, and has said why
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    if code:
        raise Problem(
            f"'{argv[0]}' exited with {code} while it wrote {shown(file.parent)}; see above"
        )


@contextmanager
def mounted(tool: Buildah, identity: str) -> Iterator[Path]:
    """The files of an image, in a working container that is removed at the end.

    Raises:
        Problem: exit code 3 for a user who may not mount.
    """
    if os.geteuid() != 0:
        raise Problem(
            "buildah mounts images for root alone; run it as root, or take --format oci", 3
        )
    with tool.container(identity) as container:
        yield Path(host.run(["buildah", "mount", container], quiet=True).stdout.strip())


def rootfs(image: Image, tool: Buildah, built: Built, file: Path, level: int) -> None:
    """Write the files of an image and the launcher."""
    with mounted(tool, built.id) as root:
        _check_disk(file.parent, root)
        variables = environment(built.config, built.diff_ids)
        pack(zstd_argv(level), file, lambda out: write_tar(out, root, stem(image), variables))


def sqsh(tool: Buildah, built: Built, file: Path, level: int) -> None:
    """Write a squashfs file. What enroot needs goes into the container, not into the image."""
    with mounted(tool, built.id) as root:
        _check_disk(file.parent, root)
        for name, text in enroot_files(built.config, built.diff_ids).items():
            (root / name).write_text(text, encoding="utf-8")
            (root / name).chmod(0o644)
        # mksquashfs takes this variable or the options of that meaning, not both.
        env = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
        host.run(sqsh_argv(root, file, level), quiet=True, env=env)


def _check_disk(folder: Path, root: Path) -> None:
    # zstd leaves about half of it.
    build.check_disk(folder, size(root) * 2 // 3)


def export(
    image: Image,
    tool: Buildah,
    kind: str,
    folder: Path,
    *,
    level: int = LEVEL,
    layers: str = "zstd",
) -> Path:
    """Write one image as one file, whole or not at all. Returns the file."""
    built = build.current(image, tool)
    file = target(image, kind, folder)
    with host.replacing(file) as temporary:
        if kind == "oci":
            argv = oci_argv(built.id, temporary, image.reference, layers)
            build.check_disk(folder)
            # buildah lays the whole image out below TMPDIR first, and leaves it where it is killed.
            with leftovers.temporary("export", host.scratch()) as place:
                host.run(argv, quiet=True, env={**os.environ, "TMPDIR": str(place)})
        elif kind == "rootfs":
            rootfs(image, tool, built, temporary, level)
        else:
            sqsh(tool, built, temporary, level)
    return file


def parser() -> argparse.ArgumentParser:
    """What ``nox -s export --`` takes."""
    found = argparse.ArgumentParser(
        prog="nox -s export --", description="Write an image as a file."
    )
    found.add_argument("ref", metavar="REF")
    found.add_argument("--format", choices=FORMATS, required=True)
    found.add_argument("--output", type=Path, help="folder; default: build/exports/<repository>")
    found.add_argument("--level", type=int, default=LEVEL, help="of zstd, 1 to 19 (rootfs, sqsh)")
    found.add_argument("--layers", choices=("zstd", "gzip"), default="zstd", help="(oci)")
    found.add_argument("--builder", help="buildah: no other has its own way to an image's files")
    return found


def main(arguments: Sequence[str]) -> int:
    """``nox -s export -- REF --format oci|rootfs|sqsh [--output DIR --level N --layers gzip]``."""
    given = parser().parse_args(list(arguments))
    if not 1 <= given.level <= 19:
        raise Problem(f"--level {given.level}: zstd has 1 to 19", 2)
    image = catalog.find(given.ref, catalog.load())
    folder = (given.output or EXPORTS / image.repository).resolve()
    if given.format == "oci" and ":" in str(folder):
        raise Problem(f"--output {folder}: buildah takes no colon in the name of an archive", 2)
    tool = builders.detect(given.builder)
    if not isinstance(tool, Buildah):
        raise Problem("only images of buildah are exported; leave out --builder docker", 2)
    host.require(FORMATS[given.format][1])
    host.say(f"{image.reference}: export as {given.format}")
    file = export(image, tool, given.format, folder, level=given.level, layers=given.layers)
    host.say(f"{shown(file)}: {file.stat().st_size:,} bytes, sha256 {host.sha256(file)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

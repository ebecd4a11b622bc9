"""Level R1: every input of an image is pinned by its bytes, and no build step fetches another.

Everything is fetched before a build: by uv, from a lock with a sha256 for each file, and for the
base by apt, from such a lock too. The steps of a build have no network. These functions look at the
texts that decide it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from images.building import build, context, release
from images.catalog import Image, shown
from images.locking import base, lock
from rollout.problem import Problem

# What could bring something from a network, as a word of a shell's command.
_FETCHERS = {
    *("apt", "apt-get", "aptitude", "conda", "curl", "docker", "git", "mamba", "npm", "pip"),
    *("pip3", "pipx", "rsync", "scp", "ssh", "uvx", "wget"),
}
_UV_NAMES = ("uv", "$uv", "${uv}")
_UV = ("--no-deps", "--require-hashes", "--requirements")
# An image of somebody else's, by its digest: what is built on it says that it is (release.py).
_RELEASE = re.compile(r"\$\{REGISTRY\}/[a-z0-9._/-]+@sha256:[0-9a-f]{64}")
_MOVING = re.compile(r"\blatest\b|\b(dist-|full-)?upgrade\b|\$\(date|`date")


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, in order."""
    bare = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", bare).splitlines() if line.strip()]
    # A line of one word would be part of a text (RUN <<EOF); ours have no such text.
    parts = [[*line.split(None, 1), ""] for line in lines]
    return [(part[0].upper(), part[1]) for part in parts]


def dockerfile(text: str) -> list[str]:
    """What a Dockerfile takes that no lock has; empty where everything is pinned."""
    found = []
    for name, value in instructions(text):
        if name == "FROM" and value not in ("scratch", "${BASE}") and not _RELEASE.fullmatch(value):
            found.append(f"FROM {value}: an image that was not made from our locks")
        if name in ("ADD", "COPY") and value != "base.tar /":
            found.append(f"{name} {value}: a file that no lock has")
        if name == "RUN":
            words = [w for w in shlex.split(value) if not w.startswith("--mount=")]
            last = words in (["sh", "/mnt/context/entrypoints"], ["sh", "/mnt/context/python"])
            step = words[-1].rpartition("/")[2]
            called = words[:2] == ["sh", "/mnt/context/install"] and len(words) == 3
            called = (called and words[2].isalpha()) or words == ["sh", "/mnt/context/additions"]
            if not last and not called:
                found.append(f"RUN {shlex.join(words)}: not a call of a build script")
            elif re.search(r"--mount=\S*\bfrom=(?!fetched,)", value):
                what = "a mount from an image that was not made from our locks"
                found.append(f"RUN … {step}: {what}")
            elif re.search(r"type=(cache|secret|ssh)", value):
                what = "files are fetched before a build, and code of wheels could read this mount"
                found.append(f"RUN … {step}: {what}")
            elif last and "from=" in value:
                found.append(f"RUN … {step}: it needs no package, so it gets none")
    return found


def script(text: str) -> list[str]:
    """What a shell script of a build step fetches past the lock; empty where it does not."""
    found = []
    joined = re.sub(r"\\\n", " ", re.sub(r"(^|\s)#.*", "", text))
    for line in joined.splitlines():
        if _MOVING.search(line):
            found.append(f"{line.strip()}: depends on the day of the build")
        # What stands in quotes or in $(…) may be a command too.
        for command in re.split(r"[;&|()`]+|\bthen\b|\bdo\b", re.sub("[\"']", "", line)):
            words = [word for word in command.split() if not re.match(r"\w+=", word)]
            tools = [word.rpartition("/")[2] for word in words]
            uv = next((n for n, tool in enumerate(tools, 1) if tool in _UV_NAMES), 0)
            if uv:
                lacking = [option for option in _UV if option not in words]
                venv = words[uv : uv + 1] == ["venv"] and "--seed" not in words
                if not venv and (words[uv : uv + 2] != ["pip", "install"] or lacking):
                    found.append(f"{command.strip()}: without {', '.join(lacking) or 'a lock'}")
            elif _FETCHERS & set(tools):
                found.append(f"{command.strip()}: fetches past the lock")
    return found


def locked(text: str, path: Path) -> list[str]:
    """What a lock of wheels leaves open: it is none, or more than one file fits an entry."""
    try:
        entries = lock.parse(text, path)
    except Problem as problem:
        return [problem.sentence]
    hashes = re.findall(r"--hash=", text)
    several = len(hashes) != len(entries)
    return [f"{shown(path)} has {len(hashes)} hashes for {len(entries)} files"] if several else []


def problems(image: Image) -> list[str]:
    """Every input of an image that is not pinned, with its place; empty is level R1."""
    found = [
        f"{shown(image.dockerfile)}: {p}" for p in dockerfile(image.dockerfile.read_text("utf-8"))
    ]
    if image.release and image.release.digest:
        text = release.recipe_text(image)
        found += [f"{shown(release.DOCKERFILE)}: {p}" for p in dockerfile(text)]
        found += [
            f"{shown(release.SCRIPTS[0])}: {p}"
            for p in script(release.SCRIPTS[0].read_text("utf-8"))
        ]
    bottom = build.BASE_DOCKERFILE
    found += [f"{shown(bottom)}: {p}" for p in dockerfile(bottom.read_text("utf-8"))]
    for step in (context.SCRIPTS[0], context.PYTHON, context.LAST):
        found += [f"{shown(step)}: {p}" for p in script(step.read_text("utf-8"))]
    found += locked(image.lock.read_text("utf-8"), image.lock)
    try:
        base.read(base.lock_of(image))  # a line without a sha256 is none
    except Problem as problem:
        found.append(problem.sentence)
    return found

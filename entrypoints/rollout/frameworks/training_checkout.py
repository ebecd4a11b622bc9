"""What adapters for the check ``training`` share whose framework users bring as a checkout.

What the checkout is, a process of its own that trains, the files by which it tells of its steps,
and the end of all of it. What differs, the adapter says: which package and modules, which settings,
which environment, which module makes the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rollout.backends.served import LOG, discard, log_file
from rollout.frameworks import FrameworkError, Refit, Step, Tampering, processes, training_refits
from rollout.frameworks.verl import STORE, lack, last_words, lines, python_path, short_folder
from rollout.problem import Problem

CONFIG = "config.json"  # in the folder of a run: what it is to do
STEPS = "steps.jsonl"  # a line for each step
REFITS = "refits.jsonl"  # a line for each refit
HERE = "127.0.0.1"
POLL = 0.2  # seconds between two looks at what has been written
COMMIT = 8  # characters of one that are shown
_TEXT = (".log", ".out", ".err", ".json", ".jsonl", ".txt")
_AWAY = ("model", "huggingface", "output")  # folders of a run that are large and tell nothing
_ASK = """
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
print(list(spec.submodule_search_locations)[0] if spec else "")
"""
# Somebody's cluster, somebody's account, somebody's rank.
_THEIRS = ("RAY_", "WANDB_", "HYDRA_", training_refits.OURS)
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Source:
    """A framework's code: what it is called, its package, and files that a run needs of it."""

    called: str
    package: str
    needed: tuple[str, ...]

    def located(self, checkout: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
        """The package that a run imports.

        Raises:
            Problem: exit code 2 where what was named is no checkout that this adapter knows, and 3
                where none was: what else an image promises can be proved without one.
        """
        if checkout is not None:
            package = checkout / self.package
            named = f"--framework: {checkout}"
        else:
            done = subprocess.run(
                [sys.executable, "-c", _ASK, self.package],
                capture_output=True,
                text=True,
                cwd="/",
                env=dict(environ) | {"PYTHONPATH": python_path(None, environ)},
                check=False,
            )
            found = done.stdout.strip().splitlines()
            if not found:
                hint = "name a checkout of it: --framework DIR"
                raise Problem(f"{self.called} is on no index; {hint}", 3)
            package, named = Path(found[-1]), self.called
        missing = [name for name in self.needed if not (package / name).is_file()]
        if missing:
            hint = f"name a checkout of {self.called}"
            raise Problem(f"{named} has no {self.package}/{missing[0]}; {hint}", 2)
        return package


def version(package: Path) -> str:
    """What a checkout is: its commit where git says it, and the digest of its Python files.

    A commit alone would not tell of what somebody changed in it.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    files = f"files-{digest.hexdigest()[:12]}"
    commit = _commit(package.parent / ".git")
    return f"{commit[:COMMIT]}+{files}" if commit else files


def _commit(git: Path) -> str:
    """The commit that a repository's folder names; empty where it names none."""
    with contextlib.suppress(OSError):
        said = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not said.startswith("ref: "):
            return said
        name = said.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return line.split(" ")[0]
    return ""


def step(line: str) -> Step:
    """A step from the line that the driver wrote of it."""
    told = json.loads(line)
    return Step(
        told["number"],
        told.get("reward", math.nan),
        told.get("divergence", math.nan),
        told["seconds"],
    )


def visible(environ: Mapping[str, str], count: int = 1) -> str:
    """The GPUs of the run, as the job counts them: the first so many of those that it may use."""
    given = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return ",".join(name.strip() for name in given.split(",")[:count])


def alone(
    environ: Mapping[str, str],
    folder: Path,
    checkout: Path | None,
    tampering: Tampering | None,
    theirs: tuple[str, ...],
) -> dict[str, str]:
    """The environment of a run: this one, alone on this machine, without a network.

    ``theirs`` are beginnings of more variables that the framework reads, which the job may have for
    another run.
    """
    home = str(folder)
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith((*_THEIRS, *theirs)) and name not in _RANKS
    }
    return (
        kept
        | training_refits.told(folder / REFITS, tampering)
        | {
            "PYTHONPATH": python_path(checkout, environ),
            "PYTHONUNBUFFERED": "1",
            "HOME": environ.get("HOME") or home,  # where engines keep what they compiled
            "TMPDIR": home,
            "USER": environ.get("USER") or "rollout",  # a UID that no passwd file knows has no name
            "LOGNAME": environ.get("LOGNAME") or "rollout",
            "HF_HOME": f"{home}/huggingface",
            "HF_DATASETS_CACHE": f"{home}/huggingface/datasets",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as the driver's library counts them
            "RAY_TMPDIR": home,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE),
            "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
            # Python processes made ahead of any actor: each one imports, and none is used.
            "RAY_prestart_worker_first_driver": "0",
            # Without a network there is no other interface.
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": HERE,
            "WANDB_MODE": "disabled",
        }
    )


def keep(folder: Path, target: Path) -> None:
    """Keep what a run wrote but its model and caches: Ray has a file for each of its processes."""
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder)
        away = where.parts[0] in _AWAY
        if path.suffix in _TEXT and not away and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # what cannot be read is not to hide why it ended
                (target / where).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / where)


class Trained:
    """A framework from a checkout, its trainer in a process of its own.

    See :class:`rollout.frameworks.Framework`. An adapter's class says what is its own.
    """

    name: ClassVar[str]
    source: ClassVar[Source]

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        if engine != "vllm":
            raise Problem(f"the check drives {self.source.called} with vllm alone, not {engine}", 2)
        self._checkout = checkout
        self._package = self.source.located(checkout)
        self.path = str(self._package)
        self.version = version(self._package)
        self.sender = ""
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._before: set[int] = set()

    def driver(self) -> str:
        """The module that makes the run, given the folder of it."""
        raise NotImplementedError

    def environment(
        self, environ: Mapping[str, str], folder: Path, tampering: Tampering | None
    ) -> dict[str, str]:
        """The environment of the run."""
        raise NotImplementedError

    def configuration(self, folder: Path, steps: int, gpu_bytes: int) -> dict[str, Any]:
        """What the driver is told of the run."""
        raise NotImplementedError

    def made(self, folder: Path, steps: int) -> None:
        """Make model and data of a run, in a folder."""
        raise NotImplementedError

    def refuse(self, environ: Mapping[str, str]) -> None:
        """Say at once what would be found after a minute: what cannot run here."""

    def modules(self) -> list[str]:
        """The modules that a run touches: with the package that is there."""
        names = [name.removesuffix(".py").replace("/", ".") for name in self.source.needed]
        return [f"{self.source.package}.{name}" for name in names]

    def start(self, steps: int, tampering: Tampering | None, gpu_bytes: int) -> None:
        self.refuse(os.environ)
        self._folder = folder = short_folder()
        self._log = log_file()
        self.made(folder, steps)
        config = self.configuration(folder, steps, gpu_bytes)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self._before = processes.descendants()
        processes.adopt(True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.driver(), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self.environment(os.environ, folder, tampering),
                start_new_session=True,  # the terminal's Ctrl-C is for us to pass on
                preexec_fn=processes.end_with_parent,
            )

    def steps(self, deadline: float) -> Iterator[Step]:
        assert self._process is not None and self._folder  # noqa: S101
        taken = seen = 0
        while True:
            ended = self._process.poll() is not None  # asked before the file is read
            new, taken = lines(self._folder / STEPS, taken)
            for line in new:
                seen += 1
                self._look()
                yield step(line)
            if ended:
                raise self._ended(f"ended after {seen} steps")
            if time.monotonic() > deadline:
                raise self._ended(f"did not end a step in time, after {seen}")
            time.sleep(POLL)

    def _ended(self, how: str) -> FrameworkError:
        assert self._log is not None  # noqa: S101
        text = self._log.read_text(encoding="utf-8", errors="replace")
        sentence = lack(text)
        if sentence:
            raise Problem(sentence, 3)
        return FrameworkError(f"{self.name} {self.version} {how}: {last_words(text)}")

    def _records(self) -> list[dict[str, Any]]:
        if self._folder is None:
            return []
        return [json.loads(line) for line in lines(self._folder / REFITS, 0)[0]]

    def _look(self) -> None:
        """Take over what the trainer's process said of its sender."""
        for told in self._records()[:1]:
            self.sender = told["sender"]

    def refits(self) -> list[Refit]:
        return [
            Refit(told["number"], told["tensors"], told["bytes"], told["left_out"])
            for told in self._records()
        ]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            processes.end(self._before)
            processes.adopt(False)
            self._process = None
        if self._folder is not None:
            kept = os.environ.get(LOG)
            if kept:
                keep(self._folder, Path(f"{kept}.d"))
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._log is not None:
            discard(self._log)
            self._log = None

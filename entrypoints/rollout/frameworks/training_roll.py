"""ROLL: its own RLVR pipeline from a checkout, and what it says of each step.

Ray, ROLL's schedulers and workers, its strategies ``fsdp2_train`` and ``vllm`` on one GPU, its own
update of the model between them. The class is apart from the one in roll.py, which knows what
``rollout verify`` imports: this is for the check ``training`` alone.
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
from pathlib import Path
from typing import Any

from rollout.backends.served import LOG, discard, log_file
from rollout.frameworks import FrameworkError, Refit, Step, Tampering, processes, tiny
from rollout.frameworks import training_roll_driver as driver
from rollout.frameworks import training_roll_hook as hook
from rollout.frameworks import training_roll_settings as settings
from rollout.frameworks.verl import STORE, lack, last_words, lines, python_path, short_folder
from rollout.frameworks.verl_settings import BATCH
from rollout.problem import Problem

PACKAGE = "roll"
DRIVER = "rollout.frameworks.training_roll_driver"
MODULES = ("pipeline/rlvr/rlvr_pipeline.py", "third_party/fsdp2/model_update.py")
POLL = 0.2  # seconds between two looks at what has been written
COMMIT = 8  # characters of one that are shown
# Of the trainer's allocator: what its refit by CUDA IPC needs where a process may not take a file
# descriptor of another.
PLAIN = "expandable_segments:False"
ALLOCATOR = settings.ALLOCATOR
_TAKE = """
import ctypes, os, sys
number = 438  # pidfd_getfd, which Python has no name for
sys.exit(ctypes.CDLL(None).syscall(number, os.pidfd_open(int(sys.argv[1])), 0, 0) < 0)
"""
_ASK = """
import importlib.util
spec = importlib.util.find_spec("roll")
print(list(spec.submodule_search_locations)[0] if spec else "")
"""


def located(checkout: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The package of ROLL that a run imports.

    Raises:
        Problem: exit code 2 where what was named is no checkout that this adapter knows, and 3
            where none was: what else an image promises can be proved without one.
    """
    if checkout is not None:
        package = checkout / PACKAGE
        named = f"--framework: {checkout}"
    else:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            cwd="/",
            env=dict(environ) | {"PYTHONPATH": python_path(None, environ)},
            check=False,
        )
        found = done.stdout.strip().splitlines()
        if not found:
            raise Problem("ROLL is on no index; name a checkout of it: --framework DIR", 3)
        package, named = Path(found[-1]), "ROLL"
    missing = [name for name in MODULES if not (package / name).is_file()]
    if missing:
        raise Problem(f"{named} has no {PACKAGE}/{missing[0]}; name a checkout of ROLL", 2)
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


def takes_descriptors() -> bool:
    """Whether a process may take a file descriptor of another one that is not its child.

    Torch does so for memory of ``expandable_segments:True``, which ROLL sets for its trainer, when
    it is opened in the engine. Containers often forbid it.
    """
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as other:
        # A sibling asks, as trainer and engine are siblings.
        asked = subprocess.run(
            [sys.executable, "-c", _TAKE, str(other.pid)], capture_output=True, check=False
        )
        other.kill()
    return asked.returncode == 0


def chosen(environ: Mapping[str, str]) -> str | None:
    """The settings of the trainer's allocator: the job's, where it has any; None for ROLL's own."""
    given = environ.get(ALLOCATOR)
    if given is not None or takes_descriptors():
        return given
    why = "no process may take a file descriptor of another one here (CAP_SYS_PTRACE)"
    print(f"rollout: ROLL's trainer gets {ALLOCATOR}={PLAIN}: {why}", file=sys.stderr, flush=True)
    return PLAIN


def step(line: str) -> Step:
    """A step from the line that the driver wrote of it."""
    told = json.loads(line)
    return Step(
        told["number"],
        told.get("reward", math.nan),
        told.get("divergence", math.nan),
        told["seconds"],
    )


class Framework:
    """ROLL's RLVR pipeline with GRPO (see :class:`rollout.frameworks.Framework`)."""

    name = "roll"

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        if engine != "vllm":
            raise Problem(f"the check drives ROLL with vllm alone, not with {engine}", 2)
        self._checkout = checkout
        self._package = located(checkout)
        self.path = str(self._package)
        self.version = version(self._package)
        self.sender = ""
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._before: set[int] = set()

    def modules(self) -> list[str]:
        """The modules that a run touches: with the package that is there."""
        return [
            f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.')}"
            for name in (*MODULES, "distributed/strategy/fsdp2_strategy.py")
        ]

    def environment(
        self, environ: Mapping[str, str], folder: Path, tampering: Tampering | None
    ) -> dict[str, str]:
        """The environment of the command: this one, alone on this machine, without a network."""
        # Somebody's cluster, somebody's account, somebody's rank: ROLL reads all of them.
        theirs = ("RAY_", "WANDB_", "ROLLOUT_ROLL_", "ROLL_", "roll_", "OTEL_", "HYDRA_")
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "WORKER_NAME", "CLUSTER_NAME")
        kept = {
            name: value
            for name, value in environ.items()
            if not name.startswith(theirs) and name not in (*ranks, "MASTER_ADDR", "MASTER_PORT")
        }
        home = str(folder)
        found = kept | {
            "PYTHONPATH": python_path(self._checkout, environ),
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
            "CUDA_VISIBLE_DEVICES": _visible(environ),
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
            "VLLM_HOST_IP": hook.HERE,
            "WANDB_MODE": "disabled",
            "ROLL_LOG_DIR": f"{home}/logs",
            hook.REFITS: f"{home}/refits.jsonl",
            hook.LOST: tiny.LAST_LAYER,
        }
        if tampering is not None:
            found |= {hook.TAMPERING: tampering.kind, hook.FROM: str(tampering.since)}
        return found

    def start(self, steps: int, tampering: Tampering | None, gpu_bytes: int) -> None:
        visible = _visible(os.environ)
        if visible and not visible.isdigit():  # as ROLL's own resource manager has it
            raise Problem(f"ROLL counts GPUs; name one by its number, not as {visible!r}", 3)
        allocator = chosen(os.environ)
        self._folder = folder = short_folder()
        self._log = log_file()
        made(folder, steps)
        config = settings.configuration(
            folder,
            steps=steps,
            gpu_bytes=gpu_bytes,
            visible=visible,
            allocator=allocator,
        )
        text = json.dumps(config, indent=1) + "\n"
        (folder / driver.CONFIG).write_text(text, encoding="utf-8")
        self._before = processes.descendants()
        processes.adopt(True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", DRIVER, str(folder)],
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
            new, taken = lines(self._folder / driver.STEPS, taken)
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
        return [json.loads(line) for line in lines(self._folder / "refits.jsonl", 0)[0]]

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


def _visible(environ: Mapping[str, str]) -> str:
    """The GPU of the run, as the job counts them."""
    return environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def keep(folder: Path, target: Path) -> None:
    """Keep what a run wrote but its model and caches: Ray has a file for each of its processes."""
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder)
        text = path.suffix in (".log", ".out", ".err", ".json", ".jsonl", ".txt")
        away = where.parts[0] in ("model", "huggingface", "output")
        if text and not away and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # what cannot be read is not to hide why it ended
                (target / where).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / where)


def made(folder: Path, steps: int) -> None:
    """Model and data of a run, in a folder."""
    tiny.write_model(folder / "model")
    rows = [
        {
            "id": str(number),
            "messages": json.dumps([{"role": "user", "content": prompt}]),
            "tag": settings.DOMAIN,
            "domain": settings.DOMAIN,
            "prompt": prompt,
            "ground_truth": tiny.WANTED,
        }
        # ROLL asks for more than one step needs, and begins anew at the end.
        for number, prompt in enumerate(tiny.prompts(BATCH * (steps + 2)))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")

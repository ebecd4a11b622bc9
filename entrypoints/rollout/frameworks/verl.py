"""verl: its own trainer, started as its users start it, and what it says of each step.

What differs between releases is found by looking at what is installed: the keys of its
configuration, the modules of its package, the lines of its files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollout.backends.served import discard, log_file
from rollout.frameworks import FrameworkError, Refit, Step, Tampering, processes, tiny
from rollout.frameworks import verl_hook as hook
from rollout.frameworks import verl_settings as settings
from rollout.problem import Problem

HOOK = "rollout.frameworks.verl_hook"
MAIN = "verl.trainer.main_ppo"
POLL = 0.2  # seconds between two looks at what has been written
SAID = 300  # characters of a reason
# The kernel's limit for the path of a UNIX socket, less what Ray puts behind its folder
# (/ray/session_<date and process>/sockets/plasma_store).
FOLDER = 107 - 72
STORE = 200 << 20  # bytes of Ray's object store: what passes through it are some MB
# Messages that say what this machine lacks, with what to do.
LACKS = (
    (
        r"CUDA out of memory|OutOfMemoryError: (?:CUDA|Allocation on device)"
        r"|[Nn]o available memory for the cache blocks|Free memory on device",
        "the GPU has too little memory for the training; stop what else runs on it, "
        "or choose a larger one by CUDA_VISIBLE_DEVICES",
    ),
    (
        r"running low on memory|OutOfMemoryError: Task was killed|Cannot allocate memory",
        "there is too little main memory for the training; free some, "
        "or raise the container's limit (--memory)",
    ),
    (
        r"No space left on device|Bus error",
        "there is too little room for the training in /dev/shm or in the temporary folder; "
        "start the container with '--shm-size 1g'",
    ),
)

REWARD = "critic/score/mean"
DIVERGENCE = "training/rollout_probs_diff_mean"
SECONDS = "timing_s/step"

# What a GRPO run with FSDP imports, over all releases; the rollout's own come by engine.
_MODULES = (
    *("verl.trainer.main_ppo", "verl.trainer.main_ppo_v0", "verl.trainer.ppo.ray_trainer"),
    *("verl.trainer.ppo.v1", "verl.trainer.ppo.v1.agent_loop_tq"),
    *("verl.workers.fsdp_workers", "verl.workers.engine_workers", "verl.workers.engine.fsdp"),
    *("verl.workers.actor.dp_actor", "verl.single_controller.ray", "verl.utils.tracking"),
    *("verl.experimental.agent_loop", "verl.experimental.reward_loop"),
    *("verl.workers.reward_manager", "verl.utils.dataset.rl_dataset", "verl.utils.fsdp_utils"),
    *("verl.checkpoint_engine", "verl.trainer.ppo.core_algos"),
    *("verl.workers.rollout.replica", "verl.workers.rollout.llm_server"),
)
_ROLLOUT = {
    "vllm": (
        "verl.workers.rollout.vllm_rollout",
        "verl.workers.rollout.vllm_rollout.vllm_async_server",
        "verl.workers.rollout.vllm_rollout.vllm_rollout",
        "verl.workers.sharding_manager.fsdp_vllm",
    ),
    "sglang": (
        "verl.workers.rollout.sglang_rollout",
        "verl.workers.rollout.sglang_rollout.async_sglang_server",
        "verl.workers.rollout.sglang_rollout.sglang_rollout",
        "verl.workers.sharding_manager.fsdp_sglang",
    ),
}

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Of a line that Ray passes on, and, behind it, of one that an engine's process wrote.
_PREFIX = re.compile(
    r"^(?:\s*\([^()]*\bpid=\d+[^()]*\)\s?)+"
    r"(?:(?:ERROR|WARNING|INFO) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s?)?"
)
# What is said where something else has gone wrong before.
_AFTERMATH = re.compile(
    r"RayTaskError|ActorDiedError|ActorUnavailableError|EngineDeadError|WorkerCrashedError"
    r"|Engine core initialization failed|Engine core proc .* died"
)
_STEP = re.compile(r"(?:^|\s)step:(\d+) - (.+)$")
_NUMBER = re.compile(r"^(?:np\.\w+\()?([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|inf|nan))\)?$", re.IGNORECASE)


def plain(line: str) -> str:
    """A line without colours and without the name of the process that Ray put before it."""
    return _PREFIX.sub("", _ANSI.sub("", line)).rstrip()


def numbers(line: str) -> tuple[int, dict[str, float]] | None:
    """The step that a line of verl's console logger tells of, and its numbers."""
    found = _STEP.search(plain(line))
    if found is None:
        return None
    values = {}
    for part in found[2].split(" - "):
        key, _, text = part.strip().rpartition(":")
        number = _NUMBER.match(text)
        if key and number:
            values[key] = float(number[1])
    return int(found[1]), values


def record(line: str) -> tuple[int, dict[str, float]] | None:
    """The same of a line of its file logger, where a release has one."""
    try:
        data = json.loads(line)
        values = {
            key: float(value)
            for key, value in data["data"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        return int(data["step"]), values
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def step(number: int, values: Mapping[str, float]) -> Step | None:
    """A step from its numbers; None where it tells of no reward, as a validation does not."""
    if REWARD not in values:
        return None
    return Step(
        number,
        values[REWARD],
        values.get(DIVERGENCE, math.nan),
        values.get(SECONDS, math.nan),
    )


def last_words(text: str) -> str:
    """Why it ended, from its own log: its last line that names an exception, or its last one."""
    lines = [line.strip() for line in map(plain, text.splitlines()) if line.strip()]
    named = [
        line
        for line in lines
        if re.match(r"[\w.]*(?:Error|Exception|Interrupt)\b[^:]*:\s*\S", line)
    ]
    named = [line for line in named if not _AFTERMATH.search(line)] or named
    found = (named or lines or ["it wrote nothing"])[-1]
    return found if len(found) <= SAID else found[:SAID] + "…"


def lack(text: str) -> str | None:
    """What this machine has too little of, by the log; None where that is not why it ended."""
    return next((sentence for pattern, sentence in LACKS if re.search(pattern, text)), None)


def lines(path: Path, taken: int) -> tuple[list[str], int]:
    """The whole lines of a file from an offset on, and the offset behind them."""
    try:
        with path.open("rb") as file:
            file.seek(taken)
            content = file.read()
    except FileNotFoundError:
        return [], taken
    whole = content.rpartition(b"\n")[0]
    if not whole:
        return [], taken
    return whole.decode("utf-8", "replace").splitlines(), taken + len(whole) + 1


def short_folder() -> Path:
    """A temporary folder with a name short enough for Ray's sockets.

    Raises:
        Problem: exit code 3 where there is no place for one.
    """
    places = (tempfile.gettempdir(), "/tmp", os.environ.get("XDG_CACHE_HOME", ""))  # noqa: S108
    for place in places:
        # mkdtemp puts a slash, the prefix and eight letters behind it.
        if place and len(place) + len("/rt-") + 8 <= FOLDER and os.access(place, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="rt-", dir=place))
    raise Problem(
        f"no writable temporary folder has a name of at most {FOLDER - 12} characters, as Ray's "
        "sockets need it; set TMPDIR to one",
        3,
    )


# Asked of a Python as the run starts it: ours leaves out what users put beside it.
_ASK = """
import importlib.util, json, sys
found = {}
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    found[name] = (list(places)[0] if places else spec.origin or "") if spec else None
print(json.dumps(found))
"""
_ASKED = ("verl", "orjson", "transfer_queue", "flash_attn")


def located(checkout: Path | None, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Where a run would find verl and what it uses where it is there; None for what is missing.

    Raises:
        Problem: exit code 2 where there is no verl.
    """
    if checkout is not None and not (checkout / "verl" / "__init__.py").is_file():
        raise Problem(f"--framework: {checkout} holds no package verl; name its checkout", 2)
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *_ASKED],
        capture_output=True,
        cwd="/",
        env=dict(environ) | {"PYTHONPATH": python_path(checkout, environ)},
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    if not found.get("verl"):
        raise Problem("verl is not installed here; use an image with it, or --framework DIR", 2)
    return found


def python_path(checkout: Path | None, environ: Mapping[str, str]) -> str:
    """PYTHONPATH of a run: the checkout first, then the user's, and ours, for verl's workers.

    Ours only where no Python has it by itself, as in a checkout of this project: the environment's
    own folder there would go before a release that a user has installed on top.
    """
    parts = [str(checkout.resolve())] if checkout else []
    parts += [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    own = Path(__file__).parents[2]
    return os.pathsep.join([*parts, *([] if own.name == "site-packages" else [str(own)])])


class Framework:
    """verl's PPO trainer with GRPO (see :class:`rollout.frameworks.Framework`)."""

    name = "verl"

    def __init__(self, engine: str, checkout: Path | None = None) -> None:
        self._engine = engine
        self._checkout = checkout
        self._found = located(checkout)
        self._package = Path(self._found["verl"])
        self.path = str(self._package)
        with contextlib.suppress(OSError):
            self.version = (self._package / "version" / "version").read_text().strip()
        self.version = getattr(self, "version", "") or "unknown"
        self.sender = ""
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._before: set[int] = set()
        self._sockets: set[Path] = set()

    def modules(self) -> list[str]:
        """The modules that a run touches, as far as this release has them."""
        names = (*_MODULES, *_ROLLOUT[self._engine])
        return [name for name in names if self._file(name) is not None]

    def _file(self, module: str) -> Path | None:
        path = self._package.parent.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def _source(self, module: str) -> str:
        file = self._file(module)
        return file.read_text(encoding="utf-8", errors="replace") if file else ""

    def argv(
        self, config: Mapping[str, Any], folder: Path, steps: int, gpu_bytes: int
    ) -> list[str]:
        """The command that trains."""
        # A console line passes through Ray's log files; a release with a file logger spares that.
        files = "FileLogger" in self._source("verl.utils.tracking") and bool(
            self._found.get("orjson")
        )
        return [
            sys.executable,
            "-m",
            MAIN,
            *settings.overrides(
                config,
                folder,
                engine=self._engine,
                hook=HOOK,
                steps=steps,
                gpu_bytes=gpu_bytes,
                queue=bool(self._found.get("transfer_queue")),
                loggers=("console", "file") if files else ("console",),
            ),
        ]

    def environment(
        self, environ: Mapping[str, str], folder: Path, tampering: Tampering | None
    ) -> dict[str, str]:
        """The environment of the command: this one, alone on this machine, without a network."""
        kept = {
            name: value
            for name, value in environ.items()
            # Somebody's cluster, somebody's account.
            if not name.startswith(("RAY_", "WANDB_", "ROLLOUT_VERL_", "VERL_", "HYDRA_"))
        }
        visible = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
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
            "CUDA_VISIBLE_DEVICES": visible,
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
            "VLLM_HOST_IP": "127.0.0.1",
            "WANDB_MODE": "disabled",
            "HYDRA_FULL_ERROR": "1",
            "VERL_FILE_LOGGER_PATH": f"{home}/steps.jsonl",
            hook.LOG: f"{home}/refits.jsonl",
            hook.ENGINE: self._engine,
            hook.TENSOR: tiny.LAST_LAYER,
        }
        if tampering is not None:
            found |= {hook.KIND: tampering.kind, hook.SINCE: str(tampering.since)}
        return found

    def start(self, steps: int, tampering: Tampering | None, gpu_bytes: int) -> None:
        self._refuse()
        self._folder = folder = short_folder()
        self._log = log_file()
        made(folder, steps)
        config = settings.composed(self._package / "trainer" / "config")
        self._begin(
            self.argv(config, folder, steps, gpu_bytes),
            self.environment(os.environ, folder, tampering),
        )

    def _begin(self, argv: list[str], environ: Mapping[str, str]) -> None:
        assert self._folder is not None and self._log is not None  # noqa: S101
        self._before, self._sockets = processes.descendants(), set(_sockets())
        processes.adopt(True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=dict(environ),
                start_new_session=True,  # the terminal's Ctrl-C is for us to pass on
                preexec_fn=processes.end_with_parent,
            )

    def _refuse(self) -> None:
        """Say at once what would be found after a minute: what this release cannot do here."""
        actor = self._source("verl.workers.actor.dp_actor")
        asks = re.search(r"^if is_cuda_available:\n    from flash_attn", actor, re.MULTILINE)
        # FlashAttention 4 is called flash_attn as well, and has not what is asked for.
        there = Path(self._found.get("flash_attn") or "/nowhere", "bert_padding.py").is_file()
        if asks and not there:
            raise Problem(
                f"verl {self.version} imports flash_attn wherever it trains, "
                "and this image has none; install it, or use a newer verl",
                3,
            )
        # Both ends of a refit meet in a socket whose name verl has fixed.
        sender = "verl.workers.rollout.vllm_rollout.vllm_rollout"
        fixed = self._engine == "vllm" and "ipc:///tmp/" in self._source(sender)
        if fixed and not os.access("/tmp", os.W_OK | os.X_OK):  # noqa: S108
            raise Problem("verl puts a socket into /tmp, which cannot be written; mount one", 3)

    def steps(self, deadline: float) -> Iterator[Step]:
        assert self._process is not None and self._folder and self._log  # noqa: S101
        sources: list[tuple[Path, Callable[[str], tuple[int, dict[str, float]] | None]]] = [
            (self._folder / "steps.jsonl", record),
            (self._log, numbers),
        ]
        taken = [0, 0]
        seen = 0
        while True:
            ended = self._process.poll() is not None  # asked before the files are read
            found: dict[int, Step] = {}
            for place, (path, read) in enumerate(sources):
                new, taken[place] = lines(path, taken[place])
                for line in new:
                    told = read(line)
                    one = step(*told) if told else None
                    if one is not None:
                        found.setdefault(one.number, one)
            for number in sorted(found):
                if number > seen:
                    seen = number
                    self._look()
                    yield found[number]
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
        """Take over what the worker itself said of the package that it runs."""
        for told in self._records()[:1]:
            self.version = told["version"] or self.version
            self.path = str(Path(told["path"]).parent) if told["path"] else self.path
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
            for socket in set(_sockets()) - self._sockets:  # what was killed leaves them behind
                socket.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._log is not None:
            discard(self._log)
            self._log = None


def _sockets() -> list[Path]:
    """The sockets of refits, where verl puts them."""
    return list(Path("/tmp").glob("rl-colocate-zmq-*.sock"))  # noqa: S108


def made(folder: Path, steps: int) -> None:
    """Model, rule and data of a run, in a folder."""
    import pyarrow
    from pyarrow import parquet

    tiny.write_model(folder / "model")
    (folder / "rule.py").write_text(tiny.RULE, encoding="utf-8")
    rows = [
        {
            "data_source": "rule",
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"style": "rule", "ground_truth": tiny.WANTED},
            "extra_info": {"index": number},
        }
        for number, prompt in enumerate(tiny.prompts(settings.BATCH * steps))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")


# Apart from the table above, on which the proofs of all images with verl stand: no image with this
# engine is proved. Wheels before verl 0.8 do not have these modules.
_ROLLOUT.update(
    {
        "tensorrt-llm": (
            "verl.workers.rollout.trtllm_rollout",
            "verl.workers.rollout.trtllm_rollout.trtllm_async_server",
            "verl.workers.rollout.trtllm_rollout.trtllm_rollout",
            "verl.workers.rollout.trtllm_rollout.trtllm_worker_extension",
        )
    }
)

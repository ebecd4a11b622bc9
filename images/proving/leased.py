"""What runs on a leased machine: it puts images together and runs their proofs, without a network.

``nox -s lease -- pack`` writes this file, a plan and the images in parts (lease.py). The machine
needs Python 3.11 or newer, tar and nothing of this repository:

    python3 leased.py put PART…          take parts in; says which are still missing
    python3 leased.py conduct [--gpus N] put images together as their parts come, run their jobs
    python3 leased.py collect SECONDS    wait so long for the end; reports as $OUT/reports.tar.gz
    python3 leased.py have FOLDER…       the sha256 of what lies there, as $OUT/have.txt

Each job writes its report as it ends, so that a machine that is taken away early has lost no more
than what was running. Beside it JOB.end says how it ended, also where it left no report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLAN = "plan.json"
CHECKOUT = "/checkout"  # where a job finds the framework that trains
# A GPU in shares: what measures memory or time has it alone, small engines share it.
WHOLE = 4
POLL = 0.2
Job = tuple[str, dict[str, Any]]  # the image's name, and what plan.json says of the job
TAIL = 100_000  # bytes of a log that are worth their way back


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Place:
    """The folders of a lease on the machine."""

    root: Path

    @property
    def parts(self) -> Path:
        """Where parts of images wait."""
        return self.root / "parts"

    @property
    def images(self) -> Path:
        """Where images lie, each in a folder of its own."""
        return self.root / "images"

    @property
    def contents(self) -> Path:
        """Every file of all images once; the images link to these."""
        return self.root / "contents"

    @property
    def out(self) -> Path:
        """Where reports lie, below the name of their image."""
        return self.root / "out"

    def plan(self) -> dict[str, Any]:
        """What was packed, and what is to be run."""
        plan: dict[str, Any] = json.loads((HERE / PLAN).read_text(encoding="utf-8"))
        return plan

    def checkout(self, name: str) -> Path:
        """The folder of a framework's checkout, unpacked at its first use.

        Raises:
            RuntimeError: it is another file than was packed, or it was not sent.
        """
        source, folder = HERE / name, self.root / name.removesuffix(".tar.gz")
        if not folder.exists():
            if not source.exists() or sha256(source) != self.plan()["checkouts"][name]:
                raise RuntimeError(f"{source} is damaged, or was not sent")
            # Not by tarfile: its filters came with Python 3.11.4.
            waiting = folder.with_name(f".{folder.name}")
            waiting.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(["tar", "-xzf", str(source), "-C", str(waiting)], check=False)
            if done.returncode:
                raise RuntimeError(f"tar exited with {done.returncode} for {source}")
            waiting.replace(folder)
        return folder

    def missing(self, bundle: dict[str, Any]) -> list[str]:
        """The parts of an image that are not here."""
        return [name for name in bundle["parts"] if not (self.parts / name).exists()]

    def say(self, text: str) -> None:
        """One line for the log of this lease, with its time."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with (self.root / "log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def put(place: Place, files: Sequence[Path]) -> int:
    """Take parts in, each held against its sha256; exit code 1 where one is damaged or unknown."""
    sums = {
        name: sha for bundle in place.plan()["bundles"] for name, sha in bundle["parts"].items()
    }
    place.parts.mkdir(parents=True, exist_ok=True)
    code = 0
    for file in files:
        if sums.get(file.name) != sha256(file):
            print(f"{file.name} is damaged, or no part of this lease; send it again")
            code = 1
            continue
        waiting = place.parts / f".{file.name}"
        shutil.copyfile(file, waiting)
        waiting.replace(place.parts / file.name)  # whole or not there
    for bundle in place.plan()["bundles"]:
        if not (place.images / bundle["name"] / "run").exists():
            found = place.missing(bundle)
            print(f"{bundle['name']}: {len(found)} of {len(bundle['parts'])} parts are missing")
    return code


def assemble(place: Place, bundle: dict[str, Any]) -> None:
    """One image, from its parts and from what earlier ones and the machine have."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(HERE / "tools")}
    zstd = subprocess.Popen(
        [str(HERE / "tools" / "zstd"), "-dcq", "--long=27"],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    place.contents.mkdir(parents=True, exist_ok=True)
    tar = subprocess.Popen(
        ["tar", "-x", "--same-permissions", "-C", str(place.contents)], stdin=zstd.stdout
    )
    assert zstd.stdin and zstd.stdout  # noqa: S101 - for mypy: both were asked for
    zstd.stdout.close()
    for name in bundle["parts"]:
        with (place.parts / name).open("rb") as part:
            shutil.copyfileobj(part, zstd.stdin, 1 << 20)
    zstd.stdin.close()
    codes = zstd.wait(), tar.wait()
    if any(codes):
        raise RuntimeError(f"zstd and tar exited with {codes}")
    top = place.images / f".{bundle['name']}"
    shutil.rmtree(top, ignore_errors=True)
    listed = place.contents / f"{bundle['name']}.json"
    for entry in json.loads(listed.read_text(encoding="utf-8")):
        _lay(place, top, entry)
    top.replace(place.images / bundle["name"])
    for name in bundle["parts"]:
        (place.parts / name).unlink()


def _lay(place: Place, top: Path, entry: dict[str, Any]) -> None:
    """One folder, link or file of an image."""
    path = top / entry["path"]
    if "content" in entry:
        source = place.contents / entry["content"]
        if not source.exists():
            _from_machine(source, entry)
        try:
            os.link(source, path)
        except OSError:  # a file system counts its links, and an empty file is in an image often
            shutil.copy2(source, path)
            os.chown(path, entry["uid"], entry["gid"])
        return
    if "link" in entry:
        path.symlink_to(entry["link"])
    else:
        path.mkdir(parents=True)
        path.chmod(entry["mode"])
    os.chown(path, entry["uid"], entry["gid"], follow_symlinks=False)


def _from_machine(target: Path, entry: dict[str, Any]) -> None:
    """A file that was not sent, because the machine had it when it was asked."""
    if "there" not in entry:
        raise RuntimeError(f"{entry['path']} came with an image before it, which failed")
    source = Path(entry["there"])
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if sha256(target) != entry["content"].split("/")[-1].split("-")[0]:
        target.unlink()
        raise RuntimeError(f"{source} of this machine is another file than it said")
    target.chmod(entry["mode"])
    os.chown(target, entry["uid"], entry["gid"])


@dataclass
class Running:
    """A job that runs, and the shares of GPUs that it holds."""

    job: dict[str, Any]
    name: str
    process: subprocess.Popen[bytes]
    held: list[int]
    begun: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether it has had its time."""
        return time.monotonic() - self.begun > float(self.job["limit"])


def fits(free: Sequence[int], gpus: int, shares: int) -> list[int] | None:
    """The GPUs that a job gets; None while it has to wait.

    Those that have the least left come first, so that whole ones stay whole.
    """
    found = sorted((left, number) for number, left in enumerate(free) if left >= shares)
    return [number for _, number in found[:gpus]] if len(found) >= gpus else None


def chosen(jobs: Sequence[Job], free: Sequence[int]) -> list[tuple[Job, list[int]]]:
    """The jobs that begin now, in their order, each with its GPUs.

    What waits for a GPU is overtaken by no other that needs one: small jobs would keep a whole GPU
    from ever being free. Jobs that share a GPU begin together, on one that nobody is on: an engine
    that starts looks at how much of the GPU is in use, and another one that ends changes that.
    """
    left, found, waits = [count if count == WHOLE else 0 for count in free], [], False
    for name, job in jobs:
        wanted = min(job["gpus"], len(left))
        held = None if waits and wanted else fits(left, wanted, job["shares"])
        if held is None:
            waits = True
            continue
        for number in held:
            left[number] -= job["shares"]
        found.append(((name, job), held))
    return found


def ordered(jobs: Sequence[Job]) -> list[Job]:
    """Proofs of all images before the faults of any: a lease that ends early has the proofs.

    Of one rank what needs several GPUs comes first; behind the others it would find one in use.
    """
    return sorted(jobs, key=lambda one: (one[1]["rank"], -one[1]["gpus"]))


def _begins(one: Job, over: dict[tuple[str, str], bool]) -> bool:
    """Whether the job that another one waits for is over."""
    name, job = one
    return not job["after"] or (name, job["after"]) in over


def start(
    place: Place, name: str, job: dict[str, Any], held: list[int], *, visible: bool
) -> Running:
    """Start one job in its image; what it prints lies beside its report."""
    out, cache = place.out / name, place.root / "cache" / name
    for folder in (out, cache):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # the user in the image writes there, whatever the number
    argv = [str(place.images / name / "run"), "--cache", str(cache), "--bind", f"{out}:/out"]
    if held and visible:
        argv += ["--env", f"CUDA_VISIBLE_DEVICES={','.join(map(str, held))}"]
    if job["checkout"]:
        argv += ["--bind", f"{place.checkout(job['checkout'])}:{CHECKOUT}:ro"]
    argv += [*job["argv"], "--report", f"/out/{job['name']}.json"]
    with (out / f"{job['name']}.log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    place.say(f"{name}: {job['name']} begins" + (f" on GPU {held}" if held else ""))
    return Running(job, name, process, held)


def ended(place: Place, one: Running) -> bool:
    """Whether a job is over; one that had its time is stopped."""
    if one.process.poll() is None:
        if not one.late:
            return False
        os.killpg(one.process.pid, 15)
        try:
            one.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, 9)
            one.process.wait()
        place.say(f"{one.name}: {one.job['name']} had its {one.job['limit']} s and was stopped")
    code, seconds = one.process.returncode, time.monotonic() - one.begun
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    end = {"exit": code, "started": began, "seconds": round(seconds, 1)}
    file = place.out / one.name / f"{one.job['name']}.end"
    file.write_text(json.dumps(end) + "\n", encoding="utf-8")
    word = "as it should" if code == one.job["ends"] else "NOT as it should"
    place.say(f"{one.name}: {one.job['name']} exited with {code} after {seconds:.0f} s, {word}")
    return True


def conduct(place: Place, gpus: int) -> int:
    """Put images together as they come and run their jobs; the exit code 1 tells of a failure."""
    bundles = place.plan()["bundles"]
    ready: dict[str, str] = {}  # image -> "" or why it cannot run
    worker = threading.Thread(target=_assemble_all, args=(place, bundles, ready), daemon=True)
    worker.start()
    waiting: list[Job] = [(b["name"], j) for b in bundles for j in b["jobs"]]
    slots = max(gpus, 1)  # without a GPU one engine at a time runs on the CPU
    free = [WHOLE] * slots
    running: list[Running] = []
    over: dict[tuple[str, str], bool] = {}  # whether each ended as it should
    while waiting or running or worker.is_alive():
        for one in [r for r in running if ended(place, r)]:
            running.remove(one)
            over[one.name, one.job["name"]] = one.process.returncode == one.job["ends"]
            for number in one.held:
                free[number] += one.job["shares"]
        for name, job in [one for one in waiting if ready.get(one[0])]:  # it has no image
            waiting.remove((name, job))
            over[name, job["name"]] = False
        can = [one for one in waiting if one[0] in ready and _begins(one, over)]
        for (name, job), held in chosen(ordered(can), free):
            for number in held:
                free[number] -= job["shares"]
            waiting.remove((name, job))
            try:
                running.append(start(place, name, job, held, visible=bool(gpus)))
            except RuntimeError as error:  # the others may still run
                place.say(f"{name}: {job['name']} cannot run: {error}")
                over[name, job["name"]] = False
                for number in held:
                    free[number] += job["shares"]
        time.sleep(POLL)
    wrong = [f"{name}: {job}" for (name, job), good in over.items() if not good]
    place.say(f"done; not as it should: {', '.join(wrong) or 'none'}")
    (place.root / "done").touch()
    return 1 if wrong else 0


def _assemble_all(place: Place, bundles: Sequence[dict[str, Any]], ready: dict[str, str]) -> None:
    for bundle in bundles:
        while place.missing(bundle):
            time.sleep(POLL)
        begun = time.monotonic()
        try:
            assemble(place, bundle)
        except Exception as error:  # the others may still run
            ready[bundle["name"]] = f"{type(error).__name__}: {error}"
            place.say(f"{bundle['name']} cannot be put together: {ready[bundle['name']]}")
            continue
        ready[bundle["name"]] = ""
        place.say(f"{bundle['name']}: put together in {time.monotonic() - begun:.0f} s")


def collect(place: Place, seconds: float, target: Path) -> int:
    """Wait for the end, at most so long; then pack every report and the end of every log."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (place.root / "done").exists():
        time.sleep(POLL)
    with tarfile.open(target / "reports.tar.gz", "w:gz") as tar:
        for path in sorted([*place.out.glob("*/*"), place.root / "log"]):
            if path.suffix == ".log" and path.stat().st_size > TAIL:
                data = path.read_bytes()[-TAIL:]
                path = path.with_suffix(".tail")
                path.write_bytes(data)
            if path.exists():
                tar.add(path, str(path.relative_to(place.root)))
    log = place.root / "log"
    print(log.read_text(encoding="utf-8")[-4000:] if log.exists() else "nothing has begun")
    return 0


def have(folders: Sequence[Path], target: Path) -> int:
    """Say of all files below some folders what they hold: they need not be sent."""
    with (target / "have.txt").open("w", encoding="utf-8") as file:
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.is_symlink() and path.stat().st_size >= 1 << 16:
                    file.write(f"{sha256(path)}  {path}\n")
    return 0


def count_gpus() -> int:
    """The GPUs of this machine, by their devices."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="leased.py", description="A proof on a leased machine.")
    parser.add_argument("--root", type=Path, default=Path("/stash"), help="where all of it lies")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("put")
    one.add_argument("files", nargs="*", type=Path)
    two = commands.add_parser("conduct")
    two.add_argument("--gpus", type=int, default=count_gpus())
    three = commands.add_parser("collect")
    three.add_argument("seconds", type=float)
    four = commands.add_parser("have")
    four.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args(list(arguments))
    place = Place(given.root)
    given.root.mkdir(parents=True, exist_ok=True)
    target = Path(os.environ.get("OUT", str(given.root)))
    if given.command == "put":
        return put(place, given.files)
    if given.command == "conduct":
        return conduct(place, given.gpus)
    if given.command == "collect":
        return collect(place, given.seconds, target)
    return have(given.folders, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

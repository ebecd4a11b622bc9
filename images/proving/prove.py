"""Fourth station: from an image to a proof.

``nox -s prove``: the lock is what its inputs resolve to, the image is built where needed, ``rollout
verify`` and ``rollout smoke`` run inside it, and their checks end as one report in
build/reports/<repository>/<tag>.json. ``--from FOLDER`` takes in the reports of another machine
(adoption.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from images import catalog, host
from images.building import build, builder, builders
from images.building.buildah import Buildah
from images.catalog import Image, shown
from images.host import leftovers
from images.locking import lock, locks, resolution
from images.proving import adoption, proofs, repeated, runs, standing
from rollout import cli, smoke
from rollout.problem import Problem


def _drift(image: Image) -> None:
    """Whether the lock is what its inputs resolve to; an index that cannot say so is no obstacle.

    Raises:
        Problem: it is not, or its inputs do not resolve at all.
    """
    try:
        difference = locks.drift(image.lock, resolution.resolve(image))
    except resolution.Unanswered as problem:
        host.say(f"not checked: {problem.sentence}; the committed lock is built as it is")
        return
    if difference:
        sys.stdout.write(difference)
        command = f"nox -s lock -- {image.reference}"
        raise Problem(f"{shown(image.lock)} has drifted (diff above); remake it with '{command}'")


def _ready(image: Image, tool: builder.Builder) -> builder.Built:
    """The image of today's inputs, built where it was not."""
    host.say(f"{image.reference}: is the lock what its inputs resolve to?")
    lock.read(image)
    _drift(image)
    host.say(f"{image.reference}: build")
    built = build.build(image, tool)
    if isinstance(tool, Buildah):
        host.say(f"{image.reference}: {build.verdict_on(image, tool, built).sentence}")
    return built


def prove(image: Image, tool: builder.Builder, options: Sequence[str], *, keep: bool) -> int:
    """Prove one image; the options go to ``rollout smoke``. Returns the exit code of the proof.

    With ``keep`` the report of a proof and the layers it holds for stay in the repository.
    """
    built = _ready(image, tool)
    env = {"ROLLOUT_LAYERS": ",".join(built.diff_ids)}
    parts: list[dict[str, Any]] = []
    code = 0
    # A report of an earlier run must not be taken for this one's, however this one ends.
    proofs.report_path(image).unlink(missing_ok=True)
    with leftovers.temporary("report") as folder:
        user = tool.writer(folder)
        smoking, volumes = smoke_options(options, image)
        for command, extra in (("verify", []), ("smoke", smoking)):
            host.say(f"\n{image.reference}: rollout {command}")
            inside = ["rollout", command, "--report", f"/report/{command}.json", *extra]
            # By its id, because another clone may give this name to its own image meanwhile.
            places = {str(folder): "/report", **volumes}
            code = tool.run(builder.Command(built.id, inside, user, places, env))
            path = folder / f"{command}.json"
            if not path.exists():
                host.say(f"rollout {command} exited with {code} and left no report")
                # 1 says that a check failed: none did where the container never started, or
                # something ended it.
                return code if code > 1 else 3
            parts.append(proofs.read(path, f"the report of rollout {command}"))
            if code:
                break
    whole = proofs.merge(parts)
    proofs.leave(image, whole)
    found = standing.judge(whole, proofs.today(image, built.diff_ids))
    if not code and not options:
        code = proofs.told(image, found)
    if keep and not code:
        proofs.keep(image, tool, built)
        host.say(f"kept as {shown(proofs.kept(image))}; 'nox -s docs' renews the README's table")
    return code


def repeat(image: Image, tool: builder.Builder, times: int, *, keep: bool) -> int:
    """Verify one image, then run its whole smoke test so many times; the exit code.

    With ``keep`` the report of all runs stays in the repository, with the layers it holds for.
    """
    if keep and not isinstance(tool, Buildah):  # said now, and not after an hour
        raise Problem("--keep needs buildah: only its layers are recorded", 2)
    built = _ready(image, tool)
    if keep and isinstance(tool, Buildah):
        build.keep(image, tool, built)
    host.say(f"\n{image.reference}: rollout verify")
    code = tool.run(builder.Command(built.id, ["rollout", "verify"]))
    if code:
        host.say(f"rollout verify exited with {code}, so nothing is repeated")
        return code
    host.say(f"\n{image.reference}: rollout smoke, {times} times")
    data = runs.repeat(image, tool, built, times)
    host.say(f"{image.reference}: {repeated.told(data)}; report in {shown(repeated.left(image))}")
    if keep:
        repeated.keep(image, data)
    return repeated.exit_code(data)


def smoke_options(options: Sequence[str], image: Image) -> tuple[list[str], dict[str, str]]:
    """Options for ``rollout smoke``, checked before anything is built, and the volumes they need.

    A folder of this host that ``--model`` names is mounted, and named as the container sees it.

    Raises:
        Problem: exit code 2 for what smoke does not know, and for ``--report``, which is ours.
    """
    if any(o == "--report" or o.startswith("--report=") for o in options):
        raise Problem(
            f"--report is set by prove: the report is {shown(proofs.report_path(image))}", 2
        )
    given = cli.parser().parse_args(["smoke", *options])
    smoke.selected([name for name in given.only.split(",") if name], image.smoke.facts, smoke.ANY)
    smoke.fault(given.inject, image.smoke.facts)
    if given.model is None:
        return list(options), {}
    folder = given.model.resolve()
    if not folder.is_dir():
        raise Problem(f"--model: {folder} is not a folder; name one with config.json in it", 2)
    return [*options, "--model", "/model"], {str(folder): "/model:ro"}


HELP = """\
usage: nox -s prove -- [REF ...] [--keep] [OPTION ...]
       nox -s prove -- [REF ...] --times N [--keep]
       nox -s prove -- REF --from FOLDER [--times N] [--keep]

  --keep         keep the report, and the layers that it holds for, in the repository
  --times N      run the whole smoke test so many times, each in a fresh container, and leave one
                 report of all runs. It goes on after a failure, and ends with 0 where every run
                 was clean. With --from: how many runs repeat-001.json and so on are of
  --from FOLDER  take in the reports that runs on another machine have left there: verify.json,
                 smoke.json and those beside them; nothing is run here. A smoke test that ran in
                 parts (--only) leaves smoke.json and smoke-ANY.json. A folder with
                 fault-NAME.json or repeat-NUMBER.json alone adds these to what is kept

Every OPTION goes to `rollout smoke` in the image:
"""


def times(options: Sequence[str]) -> tuple[int, list[str]]:
    """How often ``--times`` asks for the smoke test, 0 where it does not, and the other options.

    Raises:
        Problem: exit code 2 for what is no number of at least 1.
    """
    rest = [part for option in options for part in _parts(option)]
    if "--times" not in rest:
        return 0, list(options)
    place = rest.index("--times")
    given = rest[place + 1 : place + 2]
    if not given or not given[0].isdecimal() or not 0 < int(given[0]) <= runs.MOST:
        raise Problem(f"--times takes a number of runs from 1 to {runs.MOST} behind it", 2)
    return int(given[0]), [*rest[:place], *rest[place + 2 :]]


def _parts(option: str) -> list[str]:
    return option.split("=", 1) if option.startswith("--times=") else [option]


def main(arguments: Sequence[str]) -> int:
    """``nox -s prove [-- REF … OPTIONS]``, or ``REF --from FOLDER``.

    ``--keep`` keeps the report, the other options are for smoke.
    """
    images = catalog.load()
    chosen, options = catalog.select(arguments, images)
    if {"-h", "--help"} & set(options):
        host.say(HELP)
        cli.parser().parse_args(["smoke", "--help"])
    keeping = "--keep" in options
    options = [option for option in options if option != "--keep"]
    count, options = times(options)
    if "--from" in options:
        if len(options) != 2 or options[0] != "--from" or len(chosen) != 1:
            raise Problem(
                "--from FOLDER takes one REF before it, and --keep and --times alone beside it", 2
            )
        folder = Path(options[1])
        return adoption.adopt(chosen[0], builders.detect(), folder, keep=keeping, times=count)
    if keeping and options:
        raise Problem("--keep takes no other option: what is kept is the whole proof", 2)
    if count and options:
        raise Problem("--times takes no other option: the whole smoke test is repeated", 2)
    chosen = chosen or [catalog.find(catalog.DEFAULT, images)]
    for image in chosen:
        smoke_options(options, image)
    tool = builders.detect()
    code = 0
    for image in chosen:
        if count:
            found = repeat(image, tool, count, keep=keeping)
        else:
            found = prove(image, tool, options, keep=keeping)
        code = code or found
    return code


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

"""Tables of all images: what each is for and what its proof is worth, and the faults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from images import catalog
from images.building import build, layers
from images.building.layers import megabytes
from images.catalog import ROOT, Image
from images.locking import base, lock
from images.proving import proofs, reproduce
from images.proving import standing as rule
from images.telling import features, markdown, releases
from rollout import preflight, smoke
from rollout.faults import FAULTS, aimed

NEVER_BUILT = "locked, not built here, not proved"  # no record of its layers, so no machine of ours


def kept(image: Image) -> features.Kept | None:
    """The kept report of an image, None where none is kept."""
    data = proofs.kept_report(image)
    if data is None:
        return None
    where = str(proofs.kept(image).relative_to(ROOT))
    return features.Kept(where, data, proofs.standing_of(image))


def standing(image: Image) -> str:
    """What the kept report of an image is worth today."""
    found = kept(image)
    if found is None:
        return rule.UNPROVED if layers.read(image) else NEVER_BUILT
    data, worth = found.report, found.standing
    where = f"[{worth.word}]({found.where}) on {data['device']}, {data['started'][:10]}"
    if not worth.good:
        return f"{where}: {worth.sentence}"
    missing = ", ".join(worth.missing)
    return where + (f"; not shown: {missing}" if missing else "")


def reproduced(image: Image) -> str:
    """The level that builds of these inputs reached, and on how many machines."""
    path = reproduce.path(image)
    if not path.exists():
        return "not shown yet"
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["inputs"] != build.inputs(image):
        return f"stale: [{data['runs'][-1]['level']}]({path.relative_to(ROOT)}), of other inputs"
    lowest = min(run["level"] for run in data["runs"])
    count = len(data["runs"])
    return f"[{lowest}]({path.relative_to(ROOT)})" + (f" on {count} machines" if count > 1 else "")


def pull(image: Image) -> str:
    """What a node without any of its layers fetches, as recorded for today's inputs."""
    record = build.recorded(image)
    if record is None:
        return "not recorded yet"
    return megabytes(sum(layer.compressed for layer in record.layers))


def cuda(versions: Mapping[str, str]) -> str:
    """CUDA of an image and the oldest driver that runs it, for a cell."""
    found = lock.cuda(versions)
    if not found:
        return "none (CPU)"
    floor = ".".join(f"{part:02}" for part in preflight.DRIVER_FLOOR[int(found.split(".")[0])])
    return f"{found}, driver ≥ {floor}"


def row(image: Image, versions: Mapping[str, str]) -> list[str]:
    """The table row of an image."""
    ray = f", Ray {versions['ray']}" if "ray" in versions else ""
    return [
        f"[`{image.reference}`](docs/images/{image.repository}/{image.tag}.md)",
        releases.of(image.framework),
        f"{image.backend} {versions[image.engine]}",
        cuda(versions),
        f"{base.python_of(image)}{ray}",
        pull(image),
        standing(image),
        f"`nox -s build -- {image.reference}`",
    ]


def table(images: Sequence[Image]) -> str:
    """The table of all images."""
    head = ("image", "for", "engine", "CUDA", "Python", "to pull", "proof", "how to get it")
    return markdown.table(head, [row(i, lock.versions(lock.read(i))) for i in images])


def kept_faults(image: Image, fault: str, called: str) -> list[str]:
    """Links to the reports of runs of an image that found a fault, with what each is worth."""
    found = []
    for path in proofs.kept_faults(image, fault):
        transport = aimed(path.stem)[1]
        worth = proofs.standing_of_fault(image, path.stem)
        by = f" by {transport}" if transport else ""
        link = f"[{called}{by}]({path.relative_to(ROOT)})"
        found.append(f"{link} ({worth})" if worth else link)
    return found


def fault_table(images: Sequence[Image]) -> str:
    """The faults that can be injected, the check that finds each, and where that was shown.

    On the CPU every run of the tests shows it, where the default image has the check. For a GPU
    image the report of the run is kept.
    """
    default = next((image for image in images if image.reference == catalog.DEFAULT), None)
    # The tests ask for one check by name that the default image does not promise.
    on_cpu = [*smoke.available(default.smoke.facts), smoke.FP8_KV] if default else smoke.CHECKS
    rows = []
    for name, fault in FAULTS.items():
        shown_on = ["CPU (tests)"] if fault.found_by(on_cpu) else []
        for image in images:
            shown_on += kept_faults(image, name, catalog.short(image, images))
        checks = " or ".join(f"`{check}`" for check in (fault.check, fault.otherwise) if check)
        where = ", ".join(shown_on) or "not shown yet"
        rows.append((f"`{name}`", fault.what, checks, where))
    return markdown.table(("fault", "what happens", "found by", "shown on"), rows)

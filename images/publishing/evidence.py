"""What is attached to an image in a registry, and the checks of it: whole, signed, of this image.

The provenance is what everything hangs on: it names the other attestations by their sha256, so that
one signature holds for all of them. Whoever has read published.py knows whose words are believed.
"""

from __future__ import annotations

from images.building import labels
from images.proving import report_file, standing
from images.proving.standing import Today
from images.publishing import oci, provenance, sbom
from images.publishing.attestations import REPORT, SBOM, STATEMENT, Attestation
from images.publishing.oci import Descriptor, Manifest
from images.publishing.provenance import Origin
from images.publishing.published import UNPROVED, Metrics, Published, counted
from rollout.problem import Problem


def check_attestations(image: Published) -> Metrics:
    """Every attestation of ours that is attached is whole, and of this image.

    What else is listed is counted and not read: anybody may attach something, and a list may name
    what is gone. An attestation of ours that is missing is the provenance's to tell.
    """
    listed = image.registry.referrers(image.repository, image.digest)
    if not listed:
        raise Problem("no attestations are attached: the list of referrers is empty, or gone")
    others = 0
    for entry in listed:
        manifest = _attached(image, entry)
        if manifest is None:
            others += 1
            continue
        if manifest.subject is None or manifest.subject.digest != image.digest:
            of = manifest.subject.digest if manifest.subject else "nothing"
            raise Problem(f"the attestation {entry.digest} is listed here, and is of {of}")
        kind = manifest.artifact_type
        for layer in manifest.layers:
            title = layer.annotations.get(oci.TITLE, kind)
            image.attestations.append(Attestation(title, kind, layer.media_type, image.blob(layer)))
    return {"attestations": len(image.attestations), "others": others}


_OURS = (REPORT, SBOM, STATEMENT)


def _attached(image: Published, entry: Descriptor) -> Manifest | None:
    """The manifest of an attestation of ours; None for what is somebody else's, or gone."""
    if entry.media_type != oci.MANIFEST or entry.artifact_type not in ("", *_OURS):
        return None
    found = image.registry.manifest(image.repository, entry.digest)
    if found is None or found[1].media_type != oci.MANIFEST:
        return None
    manifest = oci.parse(found[0])
    return manifest if manifest.artifact_type in _OURS else None


def check_provenance(image: Published) -> Metrics:
    """The key has signed a provenance of this digest, made from the lock that the image names."""
    found = image.of(STATEMENT)
    if not found:
        raise Problem("no provenance is attached")
    ours = [said for one in found if (said := provenance.statement(one, image.key))]
    if not ours:
        whose = "signed by this key" if image.key else "a provenance"
        raise Problem(f"{counted(len(found), 'statement', 'attached')}, and none {whose}")
    image.origins = [provenance.parse(said, image.digest) for said in ours]
    for origin in image.origins:
        commit = origin.commit[:12]
        if origin.reference != image.labels[oci.TITLE]:
            raise Problem(f"it is of {origin.reference}, the image is {image.labels[oci.TITLE]}")
        if origin.lock != image.labels[labels.LOCK]:
            raise Problem(f"it names the lock {origin.lock or '(none)'}, the image another")
        if origin.dirty and not image.unproved:
            raise Problem(f"it was built from commit {commit} and changes that are in no commit")
        if not origin.built_there:
            what = origin.checkout or "no repository"
            raise Problem(f"it names {origin.builder} as its builder, and {what} as what it built")
    if image.key is None:
        who = "--key FILE.pub would check who says so"
        raise Problem(f"it names commit {commit}; {who}", UNPROVED)
    return {"commit": commit, "dirty": origin.dirty, "builder": origin.builder}


def _named(image: Published, kind: str, what: str) -> list[Attestation]:
    """The attestations of a kind, which are exactly those that the provenance names."""
    found = image.of(kind)
    named = {sha256 for origin in image.origins for sha256 in origin.named(kind)}
    foreign = [one.sha256 for one in found if one.sha256 not in named]
    if foreign:
        raise Problem(f"the {what} with sha256 {foreign[0]} is not one that the provenance names")
    missing = named - {one.sha256 for one in found}
    if missing:
        raise Problem(f"the {what} with sha256 {min(missing)}, named in the provenance, is missing")
    return found


def check_report(image: Published) -> Metrics:
    """The smoke report is the one that the provenance names, of these layers, and a proof.

    What a proof has to show the provenance says. What it does not show the manifest has to say.
    """
    found = _named(image, REPORT, "smoke report")
    if not found and image.unproved:
        raise Problem("published without a proof (--unproved): there is no smoke report", UNPROVED)
    if not found:
        raise Problem("no smoke report is attached")
    reports = []
    for one in found:
        try:
            data = report_file.parse(one.data)
        except ValueError as error:
            raise Problem(f"the smoke report {error}") from None
        now = today(image, next(o for o in image.origins if one.sha256 in o.named(REPORT)))
        worth = standing.judge(data, now)
        why = standing.publishable(worth, now)
        if why:
            code = UNPROVED if data["verdict"] == "unproved" else 1
            raise Problem(f"the smoke report is no proof: {why}", code)
        reports.append((data, worth))
    if image.unproved:
        raise Problem("published as unproved (--unproved), whatever is attached", UNPROVED)
    last, worth = max(reports, key=lambda pair: str(pair[0]["started"]))
    metrics: Metrics = {key: last[key] for key in ("device", "started")}
    metrics["checks"] = len(last["checks"])
    if worth.missing:
        metrics["not_shown"] = ", ".join(worth.missing)
    return metrics


def today(image: Published, origin: Origin) -> Today:
    """What a report of an image has to show: by its labels, layers and manifest, and its maker."""
    said = image.labels
    framework = (said[labels.FRAMEWORK], origin.trained or said[labels.FRAMEWORK_VERSION])
    return Today(
        reference=said[oci.TITLE],
        lock_sha256=said[labels.LOCK],
        engine=(said[labels.BACKEND], said[labels.ENGINE]),
        torch=said[labels.TORCH],
        framework=None if framework[0] == "none" else framework,
        layers=image.diff_ids[:-1],
        checks=origin.checks,
        transports=origin.transports,
        program=origin.program,
        not_shown=oci.not_shown(image.manifest.annotations if image.manifest else {}),
        brought=bool(origin.asked),
    )


def check_sbom(image: Published) -> Metrics:
    """The SBOM is the one that the provenance names, of this digest, and made from its locks."""
    found = _named(image, SBOM, "SBOM")
    if not found:
        raise Problem("no SBOM is attached")
    bases = {origin.files.get(provenance.BASE_LOCK) for origin in image.origins}
    for one in found:
        bill = sbom.parse(one)
        if bill.digest != image.digest:
            raise Problem(f"the SBOM is of {bill.digest}, and this is {image.digest}")
        if bill.locks.get(sbom.LOCK_PROPERTY) != image.labels[labels.LOCK]:
            raise Problem("the SBOM was made from another lock than the image")
        if bases and bill.locks.get(sbom.BASE_PROPERTY) not in bases:
            raise Problem("the SBOM was made from another base.lock than the provenance names")
    image.distributions = {p: h for p, h in bill.contents.items() if p.startswith("pkg:pypi/")}
    debs = len(bill.contents) - len(image.distributions)
    return {"distributions": len(image.distributions), "debian_packages": debs}

"""The provenance of an image: from what it was made, by whom, and with which other attestations.

An in-toto Statement v1 with SLSA provenance v1, written and read here; docs/verifying.md describes
its fields. All pure but for the locks and catalog files that it names, and for asking git.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import host
from images.building import build
from images.catalog import ROOT, Image, shown
from images.locking import base
from images.proving import standing
from images.publishing import oci
from images.publishing.attestations import ENVELOPE, STATEMENT, Attestation, encoded
from images.publishing.keys import PublicKey
from images.publishing.oci import Damaged
from images.publishing.signatures import Envelope
from rollout.problem import Problem

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# What the parameters and dependencies of a provenance mean; described in docs/verifying.md.
BUILD_TYPE = "urn:verl-rollout:image:1"
SOURCE = "org.opencontainers.image.source"
# A person's checkout: no platform vouches for what happened in it, only the key.
LOCAL_BUILDER = "urn:verl-rollout:checkout"
# The variable by which a workflow that is called names its own file.
WORKFLOW = "ROLLOUT_WORKFLOW"
BASE_LOCK = "lockfiles/base.lock"  # as a provenance names it
DIRTY = "-dirty"  # behind a commit, as 'git describe --dirty' has it

# Making one


def checkout_commit(folder: Path = ROOT) -> str:
    """The commit of the checkout; ``-dirty`` stands behind it where files are not the commit's.

    Raises:
        Problem: exit code 3 where the folder is no checkout, or git cannot say.
    """
    argv = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    done = host.run(argv, quiet=True, check=False)
    top, _, commit = done.stdout.strip().rpartition("\n")
    # A tree that was unpacked inside another project's checkout would get that project's commit.
    if done.returncode or not top or Path(top).resolve() != folder.resolve():
        said = done.stderr.strip().splitlines()
        why = f" ({said[-1]})" if done.returncode and said else ""
        raise Problem(
            f"{folder} is no checkout of git{why}, and the provenance of an image names the "
            "commit it was built from; publish from a clone of the repository",
            3,
        )
    status = host.run(["git", "-C", str(folder), "status", "--porcelain"], quiet=True)
    return commit + (DIRTY if status.stdout.strip() else "")


def _builder(environ: Mapping[str, str]) -> dict[str, Any]:
    """Who ran the build, as SLSA's ``runDetails`` has it: a workflow, or somebody's checkout."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return {"builder": {"id": LOCAL_BUILDER}}
    server, repository = environ["GITHUB_SERVER_URL"], environ["GITHUB_REPOSITORY"]
    run, attempt = environ["GITHUB_RUN_ID"], environ["GITHUB_RUN_ATTEMPT"]
    # GitHub's own variable names the workflow that called the one that builds. The certificates are
    # of the latter, and both have to name the same.
    workflow = environ["GITHUB_WORKFLOW_REF"]
    if environ.get(WORKFLOW):
        workflow = f"{repository}/{environ[WORKFLOW]}@{environ['GITHUB_REF']}"
    return {
        "builder": {"id": f"{server}/{workflow}"},
        "metadata": {
            "invocationId": f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}"
        },
    }


def repository_of(environ: Mapping[str, str]) -> dict[str, str]:
    """What the manifest of an image says of where its sources are: a workflow knows, nobody else.

    Registries and updaters of dependencies find the repository by it. Commit and base are in the
    provenance instead: a manifest that named the commit would be another one at every commit, and
    the base is in no registry.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return {}
    return {SOURCE: f"{environ['GITHUB_SERVER_URL']}/{environ['GITHUB_REPOSITORY']}"}


def _source(commit: str, environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "checkout",
        "digest": {"gitCommit": commit.removesuffix(DIRTY)},
        "annotations": {"dirty": commit.endswith(DIRTY)},
    }
    if environ.get("GITHUB_ACTIONS") == "true":
        server, repository = environ["GITHUB_SERVER_URL"], environ["GITHUB_REPOSITORY"]
        found["uri"] = f"git+{server}/{repository}@{environ['GITHUB_REF']}"
    return found


def make(
    image: Image,
    digest: str,
    byproducts: Sequence[Attestation],
    commit: str,
    environ: Mapping[str, str],
) -> bytes:
    """The statement: what the image of this digest was made from, and by whom.

    Raises:
        Problem: a lock is missing or malformed.
    """
    files = {shown(path): path for path in image.files}
    files[BASE_LOCK] = base.lock_of(image)
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"reference": image.reference},
        # As lockfiles/<repository>/<tag>.layers records it. And what a proof of it has to show, so
        # that whoever has the image and the key alone can tell whether the report is one.
        "internalParameters": {
            "inputs": build.inputs(image),
            "promised": {
                "checks": list(standing.promised(image)),
                "asked": list(standing.asked(image)),
                "trained": image.framework.named if image.framework else "",
                "transports": list(image.smoke.refit),
                "program": standing.program_of(image),
            },
        },
        "resolvedDependencies": [
            *(
                {"name": name, "digest": {"sha256": host.sha256(path)}}
                for name, path in sorted(files.items())
            ),
            _source(commit, environ),
        ],
    }
    named = [
        {"name": one.name, "mediaType": one.media_type, "digest": {"sha256": one.sha256}}
        for one in byproducts
    ]
    subject = {"name": image.reference, "digest": {"sha256": digest.removeprefix("sha256:")}}
    return encoded(
        {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": definition,
                "runDetails": {**_builder(environ), "byproducts": named},
            },
        }
    )


# Reading one


@dataclass(frozen=True)
class Origin:
    """What the provenance says: of whom, from what, and with which attestations."""

    reference: str
    files: Mapping[str, str]  # name -> sha256
    commit: str
    dirty: bool
    builder: str
    checkout: str  # the address of the repository; empty for a person's own
    byproducts: frozenset[tuple[str, str]]  # media type and sha256
    checks: tuple[str, ...]  # that a proof has to show
    asked: tuple[str, ...]  # that a proof may show: by a checkout of the framework
    trained: str  # the release, or the commit and its files, that trains then
    transports: tuple[str, ...]
    program: Mapping[str, str]  # the identity of each of the checks

    @property
    def lock(self) -> str:
        """The sha256 of the lock."""
        return self.files.get(f"lockfiles/{self.reference.replace(':', '/')}.lock", "")

    @property
    def built_there(self) -> bool:
        """Whether builder and checkout fit: a person's own, or a workflow of that repository."""
        if not self.checkout:
            return self.builder == LOCAL_BUILDER
        repository, _, ref = self.checkout.removeprefix("git+").rpartition("@")
        return self.builder.startswith(f"{repository}/.github/workflows/") and (
            self.builder.endswith(f"@{ref}")
        )

    def named(self, kind: str) -> set[str]:
        """The sha256 of each attestation of a kind."""
        return {sha256 for media_type, sha256 in self.byproducts if media_type == kind}


def statement(attestation: Attestation, key: PublicKey | None) -> dict[str, Any] | None:
    """The statement in an attestation, if it is one of a provenance.

    None where it is another, or not signed by the key (if there is one).
    """
    data = attestation.data
    if attestation.media_type == ENVELOPE or key is not None:
        try:
            envelope = Envelope.parse(data)
        except ValueError:
            return None
        if envelope.kind != STATEMENT or (key and not envelope.signed_by(key)):
            return None
        data = envelope.payload
    found: dict[str, Any] = {}
    with suppress(Damaged):
        found = oci.document(data)
    return found if found.get("predicateType") == PREDICATE_TYPE else None


def parse(said: Mapping[str, Any], digest: str) -> Origin:
    """What a statement says of the image of this digest.

    Raises:
        Problem: it is of another image, or says less than a provenance of ours.
    """
    try:
        if said["_type"] != STATEMENT_TYPE:
            raise ValueError
        subjects = [f"sha256:{subject['digest']['sha256']}" for subject in said["subject"]]
        definition = said["predicate"]["buildDefinition"]
        details = said["predicate"]["runDetails"]
        inputs = definition["resolvedDependencies"]
        promised = definition["internalParameters"]["promised"]
        source = next(entry for entry in inputs if "gitCommit" in entry["digest"])
        origin = Origin(
            reference=str(definition["externalParameters"]["reference"]),
            files={
                str(entry["name"]): str(entry["digest"]["sha256"])
                for entry in inputs
                if "sha256" in entry["digest"]
            },
            commit=str(source["digest"]["gitCommit"]),
            dirty=bool(source["annotations"]["dirty"]),
            builder=str(details["builder"]["id"]),
            checkout=str(source.get("uri", "")),
            byproducts=frozenset(
                (str(entry["mediaType"]), str(entry["digest"]["sha256"]))
                for entry in details["byproducts"]
            ),
            checks=tuple(map(str, promised["checks"])),
            asked=tuple(map(str, promised["asked"])),
            trained=str(promised["trained"]),
            transports=tuple(map(str, promised["transports"])),
            program={
                name: str(promised["program"][name])
                for name in (*promised["checks"], *promised["asked"])
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise Problem("the provenance lacks what one of ours says") from None
    if subjects != [digest]:
        raise Problem(f"the provenance is of {', '.join(subjects)}, and this is {digest}")
    return origin

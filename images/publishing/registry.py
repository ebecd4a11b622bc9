"""The one place that talks to a registry, in the verbs of the OCI distribution specification.

Layers go through skopeo, which uploads several at once and skips what is there. Small questions
and attestations go over HTTP from here: skopeo cannot ask for referrers or for the size of a blob.
What a registry gives is held against its digest and its size, and read no further than it may go.
A broken connection is tried again, with longer and longer waits. An upload then begins anew.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from images import host
from images.publishing import answers, failures, oci
from images.publishing.answers import Answer
from images.publishing.connection import Connection
from images.publishing.failures import Broken, Odd
from images.publishing.names import is_tag
from images.publishing.oci import Damaged, Descriptor
from rollout.problem import Problem

_PIECE = 1 << 20
_PAGES = 1000  # of a list


class Registry(Connection):
    """A registry, asked and changed by what it holds: manifests, blobs, tags and referrers.

    Methods raise Problem also where it gives something else than was asked for.
    """

    def _url(self, repository: str, *parts: str) -> str:
        return "/".join(("/v2", self.path(repository), *parts))

    # Questions

    def manifest(self, repository: str, reference: str) -> tuple[bytes, Descriptor] | None:
        """A manifest or index as the registry has it, by tag or digest; None where it has none.

        Raises:
            Damaged: its bytes are not those of the digest that was asked for, or too many.
        """
        url, what = (
            self._url(repository, "manifests", reference),
            self.reference(repository, reference),
        )
        accept = {"Accept": ", ".join(oci.MANIFESTS)}
        answer = self._ask("GET", url, repository, expected=(200, 404), headers=accept, what=what)
        if answer.status == 404:
            return None
        found = Descriptor(
            oci.shown(answer.headers.get("Content-Type", "").partition(";")[0]),
            oci.digest(answer.body),
            len(answer.body),
        )
        if oci.is_digest(reference) and found.digest != reference:
            raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {found.digest}")
        return answer.body, found

    def resolve(self, repository: str, reference: str) -> str | None:
        """The digest that a tag stands for, None where there is no such tag.

        The digest is of the bytes: what a registry says in a header proves nothing.
        """
        found = self.manifest(repository, reference)
        return found[1].digest if found else None

    def blob_size(self, repository: str, digest: str) -> int | None:
        """The bytes of a blob as the registry counts them, None where it has none."""
        url = self._url(repository, "blobs", digest)

        def once() -> int | None:
            with self._open("HEAD", url, repository) as answer:
                if answer.status == 404:
                    return None
                if answer.status != 200:
                    raise self._meaning(answer.status, b"", repository)
                return answers.length(answer, self.reference(repository, digest)) or 0

        return failures.patiently(once, self.waits)

    def blob(self, repository: str, digest: str, size: int | None = None) -> bytes:
        """A small blob, in memory; ``size`` are the bytes that a manifest announces.

        Raises:
            Damaged: there is none, its bytes are not those of its digest, or they are too many.
        """
        url, what = self._url(repository, "blobs", digest), self.reference(repository, digest)
        if size is not None and size > answers.MOST_OF_A_BLOB:
            raise Damaged(
                f"{what} is announced with {size:,} bytes, which is no attestation's size"
            )
        most = answers.MOST_OF_A_BLOB if size is None else size
        answer = self._ask("GET", url, repository, expected=(200, 404), most=most, what=what)
        if answer.status == 404:
            raise Damaged(f"{what} is not in the registry")
        if oci.digest(answer.body) != digest:
            given = oci.digest(answer.body)
            raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {given}")
        return answer.body

    def download(
        self, repository: str, digest: str, path: Path, *, size: int | None = None
    ) -> None:
        """Write a blob of any size to a file; a broken download goes on where it broke.

        ``size`` are the bytes that a manifest announces: it ends where more come.

        Raises:
            Damaged: there is none, its bytes are not those of its digest, or they are too many; no
                file is left.
        """
        what = self.reference(repository, digest)
        with host.replacing(path) as temporary:
            with temporary.open("w+b") as file:
                failures.patiently(
                    lambda: self._receive(repository, digest, file, size), self.waits
                )
            given = f"sha256:{host.sha256(temporary)}"
            if given != digest:
                raise Damaged(f"{what}: the registry gives other bytes, their sha256 is {given}")

    def _receive(self, repository: str, digest: str, file: IO[bytes], size: int | None) -> None:
        start, what = file.seek(0, os.SEEK_END), self.reference(repository, digest)
        url, headers = self._url(repository, "blobs", digest), {"Range": f"bytes={start}-"}
        with self._open("GET", url, repository, headers if start else {}) as answer:
            if answer.status == 404:
                raise Damaged(f"{what} is not in the registry")
            if answer.status == 416:
                return  # it was whole already, and the end of the connection came too late
            if answer.status not in (200, 206):
                raise self._meaning(answer.status, answers.reason(answer), repository)
            if answer.status == 200:  # from the beginning, whatever was asked for
                start = file.seek(0)
                file.truncate()
            answers.length(answer, what)
            while piece := answer.read(_PIECE):
                start += len(piece)
                if size is not None and start > size:
                    raise Damaged(f"{what} is larger than announced, which is {size:,} bytes")
                file.write(piece)
            file.flush()

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository, sorted; none where there is no such repository.

        Raises:
            Damaged: it is no list of tags, or one without an end.
        """
        found: set[str] = set()
        url, what = self._url(repository, "tags", "list"), f"the tags of {self.name(repository)}"
        for answer in self._pages(url, repository, expected=(200, 404), what=what):
            if answer.status == 404:
                break
            given = oci.document(answer.body).get("tags", [])
            given = [] if given is None else given  # some say null where there are none
            if not isinstance(given, list) or not all(
                isinstance(tag, str) and is_tag(tag) for tag in given
            ):
                raise Damaged(f"{what}: the registry gives something that is no list of tags")
            found.update(given)
        return sorted(found)

    def referrers(self, repository: str, digest: str) -> list[Descriptor]:
        """The attestations of an image: by the referrers API, else by the fallback tag."""
        url, what = self._url(repository, "referrers", digest), f"the attestations of {digest}"
        entries: list[Descriptor] = []
        known = False
        try:
            pages = self._pages(url, repository, expected=(200, 400, 404, 405), what=what)
            for answer in pages:
                fine = answer.status == 200 and answer.headers.get("Content-Type", "").startswith(
                    oci.INDEX
                )
                if known and not fine:
                    raise Damaged(
                        f"{what}: the registry gives some of them, and then {answer.status}"
                    )
                if not fine:
                    break
                known = True
                entries += oci.parse_index(answer.body)
        except Odd:
            if known:
                raise  # some of them are worse than none: the others would be attached again
        if known:
            return entries
        found = self.manifest(repository, oci.fallback_tag(digest))
        return oci.parse_index(found[0]) if found else []

    def _pages(
        self, url: str, repository: str, *, expected: Sequence[int], what: str
    ) -> Iterator[Answer]:
        """The pages of a list, as far as the registry says that there are more.

        Raises:
            Damaged: they have no end.
        """
        for _ in range(_PAGES):
            answer = self._ask("GET", url, repository, expected=expected, what=what)
            yield answer
            more = re.match(r'<([^>]+)>;\s*rel="?next"?', answer.headers.get("Link", ""))
            if not more:
                return
            url = more[1]
        raise Damaged(f"{what} come on more than {_PAGES} pages")

    # Changes

    def push_blob(self, repository: str, data: bytes) -> Descriptor:
        """Upload a small blob, where the registry does not have it; returns what it is."""
        found = Descriptor("application/octet-stream", oci.digest(data), len(data))
        if self.blob_size(repository, found.digest) == len(data):
            return found

        def once() -> None:
            location = self._begin(repository, "")
            joint = "&" if "?" in location else "?"
            url = f"{location}{joint}digest={urllib.parse.quote(found.digest)}"
            headers = {"Content-Type": "application/octet-stream"}
            with self._open("PUT", url, repository, headers, data) as answer:
                if answer.status == 404:  # the upload is gone: the registry was started anew
                    raise Broken(
                        failures.BROKEN.format(host=self.host, why="the upload is unknown")
                    )
                if answer.status != 201:
                    raise self._meaning(answer.status, answers.reason(answer), repository)

        failures.patiently(once, self.waits)
        return found

    def _begin(self, repository: str, query: str, expected: Sequence[int] = (202,)) -> str:
        """Begin an upload; where it goes on, empty where nothing is left to do."""
        url = self._url(repository, "blobs", "uploads", "") + query
        with self._open("POST", url, repository, data=b"") as answer:
            if answer.status not in expected:
                raise self._meaning(answer.status, answers.reason(answer), repository)
            location = answer.headers.get("Location", "")
            if answer.status == 202 and not location:
                raise Odd(f"{self.host} takes an upload, and does not say where it goes on", 202)
            return "" if answer.status == 201 else location

    def mount(self, repository: str, digest: str, origin: str) -> bool:
        """Let a repository have a blob of another one of this registry (``origin``, its path).

        False where the registry does not do that, or the other one has no such blob.
        """
        query = urllib.parse.urlencode({"mount": digest, "from": origin})

        def once() -> bool:
            location = self._begin(repository, f"?{query}", (201, 202))
            if location:
                self._cancel(repository, location)
            return not location

        try:
            return failures.patiently(once, self.waits)
        except Odd:
            return False

    def _cancel(self, repository: str, location: str) -> None:
        with suppress(Problem), self._open("DELETE", location, repository) as answer:
            answers.reason(answer)

    def push_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> bool:
        """Put a manifest under a tag or its digest; whether the registry took note of its subject.

        Raises:
            Problem: the registry refuses; so it does where a blob of it is missing.
        """
        url = self._url(repository, "manifests", reference)
        headers = {"Content-Type": media_type}
        answer = self._ask("PUT", url, repository, expected=(201,), headers=headers, data=data)
        return bool(answer.headers.get("OCI-Subject"))

    def forget(self, repository: str, digest: str) -> bool:
        """Remove a manifest; False where the registry does not do that."""
        url = self._url(repository, "manifests", digest)
        return self._ask("DELETE", url, repository, expected=(202, 404, 405)).status == 202

    def why(self, repository: str) -> Problem | None:
        """What the registry says of a small upload; None where it takes it.

        skopeo keeps to itself what a registry answers beside the status, so a full disk is found
        out like this. Nothing stays: the upload is given up.
        """
        try:
            location = self._begin(repository, "")
            headers = {"Content-Type": "application/octet-stream"}
            try:
                with self._open("PATCH", location, repository, headers, bytes(_PIECE)) as answer:
                    location = answer.headers.get("Location", location)
                    if answer.status not in (202, 204):
                        return self._meaning(answer.status, answers.reason(answer), repository)
            finally:
                self._cancel(repository, location)
        except Problem as problem:
            return problem
        return None

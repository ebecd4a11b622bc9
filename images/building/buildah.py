"""buildah, the builder whose digests count."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from images import host
from images.building import builder, isolation, streaming
from images.building.builder import Builder, Built, Command, Recipe
from images.host import leash, leftovers, owner

# A variable that holds the container's name in each of our containers.
CONTAINER = "ROLLOUT_CONTAINER"
# buildah itself names the containers of a build, so their names tell no owner. But it tells the
# file of mounts that each was made with. Ours is named after the owner; there is no such file.
_MARK = "/nonexistent/rollout-build-"


class Buildah(Builder):
    """buildah: no daemon, no registry, and a timestamp of our choice on every file."""

    name = "buildah"
    local = "localhost/"

    def require(self) -> None:
        host.require("buildah")

    def _store(self) -> Mapping[str, Any]:
        said = host.run(["buildah", "info"], quiet=True).stdout
        found: Mapping[str, Any] = json.loads(said)["store"]
        return found

    def storage(self) -> Path:
        return Path(self._store()["GraphRoot"])

    def copies(self) -> int:
        # vfs holds a copy of all layers below with each layer, and one more while that is made.
        return 3 if self._store()["GraphDriverName"] == "vfs" else 1

    def own(self) -> Path:
        return self.storage() / "verl-rollout"

    def build(self, recipe: Recipe) -> str:
        # buildah works below TMPDIR. What a killed one leaves in this folder is found later.
        own = leftovers.buildah()
        own.mkdir(parents=True, exist_ok=True)
        with leftovers.temporary("id", host.scratch()) as folder:
            file, place = folder / "id", folder / "fetched"
            place.mkdir()
            seen = replace(recipe, fetched=recipe.fetched and isolation.view(place))
            argv = self.build_argv(seen, file)
            env = isolation.environment({"TMPDIR": str(own), **os.environ})
            streaming.run(isolation.command(argv, os.geteuid(), recipe.fetched, place), env)
            return file.read_text(encoding="utf-8").strip().removeprefix("sha256:")

    def build_argv(self, recipe: Recipe, file: Path) -> list[str]:
        """The command that builds a recipe, tags the result, and writes its id into a file."""
        return [
            *("buildah", "--default-mounts-file", f"{_MARK}{owner.this()}", "bud"),
            # chroot: the isolation that needs no OCI runtime and works inside a container too. Its
            # network and processes are those of buildah itself, which is kept apart (isolation.py).
            *("--isolation", "chroot", "--format", "oci", "--network", "host"),
            # A proxy's address may hold a password, and without a network nobody needs it.
            "--http-proxy=false",
            # The identity label would put the version of buildah into every image.
            *("--layers", "--timestamp", str(recipe.timestamp), "--identity-label=false"),
            *("--iidfile", str(file), *builder.build_options(recipe)),
        ]

    def pull_argv(self, image: str) -> list[str]:
        return ["buildah", "pull", "--quiet", image]

    def inspect(self, name: str) -> Built | None:
        done = host.run(["buildah", "inspect", "--type", "image", name], quiet=True, check=False)
        if done.returncode:
            return None
        data = json.loads(done.stdout)
        image = data["OCIv1"]
        about = {key: image.get(key) for key in ("created", "architecture", "os", "history")}
        about["annotations"] = data.get("ImageAnnotations")
        layers = tuple(image["rootfs"]["diff_ids"])
        return Built(data["FromImageID"], image["config"], layers, data["FromImageDigest"], about)

    def version(self) -> str:
        """Name and release: another one may write another manifest of the same layers.

        Without root it may write other layers of the same files, so that is told apart too.
        """
        release = " ".join(host.run(["buildah", "--version"], quiet=True).stdout.split()[::2][:2])
        return release if os.geteuid() == 0 else f"{release} without root"

    def blobs(self, name: str, folder: Path) -> list[Path]:
        """The uncompressed layers of an image, from the lowest up: files named by their sha256."""
        target = folder / "image"
        argv = ["buildah", "push", "--quiet", "--disable-compression", name, f"dir:{target}"]
        host.run(argv, quiet=True)
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        return [target / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A working container of an image; removed at the end, whatever happened."""
        name = builder.container_name()
        try:
            # Inside the try: where a signal interrupts this, the container may be there already.
            host.run(["buildah", "from", "--pull-never", "--name", name, image], quiet=True)
            yield name
        finally:
            self._remove_container(name, name)

    def _remove_container(self, name: str, reference: str) -> None:
        leash.ended(CONTAINER, name)
        host.run(["buildah", "rm", reference], quiet=True, check=False)

    def writer(self, folder: Path) -> str:
        if os.geteuid() != 0:
            return "0:0"  # without root, this host's user is root inside, and only there
        os.chown(folder, 1000, 0)
        return "1000:0"

    def sweep(self) -> None:
        listed = host.run(["buildah", "containers", "--json"], quiet=True).stdout
        for entry in json.loads(listed) or []:
            whose = self.owner_of(entry)
            if whose and owner.dead(whose):
                self._remove_container(entry["containername"], entry["id"])

    def owner_of(self, container: Mapping[str, str]) -> owner.Owner | None:
        """Whose an entry of ``buildah containers --json`` is; None for what is not ours.

        Other people build on this machine too, on our images among others.
        """
        name = container["containername"]
        if name.startswith(builder.CONTAINERS):
            return owner.parse(name)
        if not re.search(r"working-container(-\d+)?$", name):
            return None
        argv = ["buildah", "inspect", "--type", "container", container["id"]]
        done = host.run(argv, quiet=True, check=False)
        if done.returncode:
            return None  # gone in between
        mark = str(json.loads(done.stdout).get("DefaultMountsFilePath", ""))
        return owner.parse(mark) if mark.startswith(_MARK) else None

    def tags(self, repository: str) -> list[str]:
        argv = ["buildah", "images", "--format", "{{.Tag}}", "--filter", f"reference={repository}"]
        return host.run(argv, quiet=True).stdout.split()

    def remove(self, name: str) -> bool:
        return host.run(["buildah", "rmi", name], quiet=True, check=False).returncode == 0

    def run_argv(self, command: Command, container: str) -> list[str]:
        """The command that runs something in a working container."""
        options = builder.run_options(command)
        return ["buildah", "run", "--isolation", "chroot", *options, container, "--", *command.argv]

    def run(self, command: Command) -> int:
        # buildah lays out each run below TMPDIR, and leaves that behind where it is killed.
        with leftovers.temporary("run") as folder, self.container(command.image) as container:
            inside = replace(command, env={**command.env, CONTAINER: container})
            env = {**os.environ, "TMPDIR": str(folder)}
            return leash.run(self.run_argv(inside, container), env=env)

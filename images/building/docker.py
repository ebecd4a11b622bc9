"""docker with BuildKit: it builds the same Dockerfile, where a person prefers it."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

from images import host
from images.building import builder, streaming
from images.building.builder import Builder, Built, Command, Recipe
from images.host import leash, leftovers, owner
from rollout.problem import Problem


@cache
def _say_classic() -> None:
    """Said once, not for base and image each."""
    host.say(
        "docker's classic image store keeps the time of each file: the image will have the same "
        "files as another build's, and another digest; its containerd image store gives the same "
        "digest"
    )


class Docker(Builder):
    """docker with BuildKit: the same Dockerfile, for people who have it already."""

    name = "docker"

    def require(self) -> None:
        if not shutil.which("docker"):
            raise Problem("docker is not installed; install it, or leave out --builder docker", 3)
        for argv, lacking in (
            (["docker", "version"], "no docker engine answers; start it"),
            (["docker", "buildx", "version"], "docker has no buildx; install it"),
        ):
            if host.run(argv, quiet=True, check=False).returncode:
                raise Problem(f"{lacking}, or leave out --builder docker", 3)

    def storage(self) -> Path:
        info = host.run(["docker", "info", "--format", "{{.DockerRootDir}}"], quiet=True)
        return Path(info.stdout.strip())

    def own(self) -> Path:
        return host.cache() / "docker"  # its storage is the engine's, not its users'

    def build_argv(self, recipe: Recipe) -> list[str]:
        """The command that builds a recipe and tags the result."""
        return [*self._build(recipe), "--output", "type=docker", *builder.build_options(recipe)]

    def archive_argv(self, recipe: Recipe, archive: Path) -> list[str]:
        """The command that builds into an archive, which is where BuildKit rewrites times."""
        output = f"type=docker,rewrite-timestamp=true,dest={archive}"
        return [*self._build(recipe), "--output", output, *builder.build_options(recipe)]

    def _build(self, recipe: Recipe) -> list[str]:
        return [
            # Not `docker buildx build`: that takes whichever builder a person has chosen, and one
            # in a container of its own does not see this storage.
            *("docker", "build", "--network", "none", "--provenance=false", "--progress", "plain"),
            *("--build-arg", f"SOURCE_DATE_EPOCH={recipe.timestamp}"),
            # The base is an argument without a default on purpose: it is named by a digest.
            *("--build-arg", "BUILDKIT_DOCKERFILE_CHECK=skip=InvalidDefaultArgInFrom"),
        ]

    def containerd(self) -> bool:
        """Whether its images are in containerd's store; docker's classic one gives no archive."""
        argv = ["docker", "info", "--format", "{{json .DriverStatus}}"]
        return "io.containerd.snapshotter" in host.run(argv, quiet=True).stdout

    def build(self, recipe: Recipe) -> str:
        if not self.containerd():
            _say_classic()
            streaming.run(self.build_argv(recipe))
            return recipe.name
        with leftovers.temporary("docker", host.scratch()) as folder:
            archive = folder / "image.tar"
            streaming.run(self.archive_argv(recipe, archive))
            host.run(["docker", "load", "--quiet", "--input", str(archive)], quiet=True)
        return recipe.name

    def pull_argv(self, image: str) -> list[str]:
        return ["docker", "pull", "--quiet", image]

    def inspect(self, name: str) -> Built | None:
        done = host.run(["docker", "image", "inspect", name], quiet=True, check=False)
        if done.returncode:
            return None
        data = json.loads(done.stdout)[0]
        layers, found = tuple(data["RootFS"]["Layers"]), str(data["Id"])
        # containerd's store calls an image by its manifest, the classic one by its configuration.
        manifest = found if self.containerd() else ""
        return Built(found.removeprefix("sha256:"), data["Config"], layers, manifest)

    def writer(self, folder: Path) -> str:
        return f"{folder.stat().st_uid}:0"

    def sweep(self) -> None:
        """Remove the containers of killed runs; what builds leave the engine removes by itself."""
        argv = [
            "docker",
            "ps",
            "--all",
            "--format",
            "{{.Names}}",
            "--filter",
            f"name={builder.CONTAINERS}",
        ]
        for name in host.run(argv, quiet=True).stdout.split():
            whose = owner.parse(name)
            if whose and owner.dead(whose):
                self._remove_container(name)

    def _remove_container(self, name: str) -> None:
        host.run(["docker", "rm", "--force", name], quiet=True, check=False)

    def tags(self, repository: str) -> list[str]:
        argv = ["docker", "image", "ls", "--format", "{{.Tag}}", repository]
        return host.run(argv, quiet=True).stdout.split()

    def remove(self, name: str) -> bool:
        return host.run(["docker", "image", "rm", name], quiet=True, check=False).returncode == 0

    def run_argv(self, command: Command, container: str) -> list[str]:
        """The command that runs something in a fresh container."""
        entry, *rest = command.argv
        options = ["--name", container, "--entrypoint", entry, *builder.run_options(command)]
        return ["docker", "run", "--rm", *options, command.image, *rest]

    def run(self, command: Command) -> int:
        name = builder.container_name()
        try:
            return leash.run(self.run_argv(command, name))
        finally:
            self._remove_container(name)  # the engine runs it, so it does not end with its client

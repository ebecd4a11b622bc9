"""What every Python of the image does first: what users added comes on its path, behind the lock's.

``site`` runs this at each start, ``python -I`` and Ray's workers included, through one line of a
.pth file in the sealed site-packages. That line imports a copy that lies beside the package
(``python -m rollout.added --seal`` puts it there), since a user may have a package called rollout.
Every start pays for it, so nothing is imported here that is not there already.

In an image of TensorRT-LLM it also takes away what a launcher of MPI jobs left in the environment
(:func:`alone`). Three things follow from the rest:

- Additions stand behind the sealed folder on ``sys.path``, so they cannot take a locked module's
  place. Their .pth files count, which is how ``pip install -e`` works.
- The framework's own modules are the exception: they are looked for everywhere else first, so that
  a release or a checkout of the user's is taken, and the image's own where there is none.
- pip installs beside the sealed environment, within the lock, and removes nothing that is sealed.
"""

from __future__ import annotations

import os
import site
import sys

TYPE_CHECKING = False  # not typing's: importing that would take longer than all that is done here
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
    from typing import Any

# Where additions lie: those of a running container, and those of an image built on top of this one.
# The first can be written by any user; the second by root, and a mounted cache does not hide it.
RUNNING, BUILT = "/var/cache/rollout/added", "/opt/added"
PLACES = (RUNNING, BUILT)

# What Slurm and MPI tell the processes that they start. TensorRT-LLM imports mpi4py: with those of
# a job that did not start it by MPI, MPI looks for the other ranks and ends the process.
LAUNCHERS = ("SLURM_", "MPI_", "PMI_", "PMIX_", "OMPI_")
KEEP = "ROLLOUT_KEEP_MPI"  # who starts ranks by MPI in the container sets it, and nothing is taken
# Open MPI asks root twice whether that is meant.
AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
# For building torch's extensions. FlashInfer reads it too, and refuses to compile for some of it.
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"

_ELSEWHERE = ("-t", "--target", "--prefix", "--root", "--user", "--python")


def folder(place: str) -> str:
    """The folder of a place that modules lie in."""
    return f"{place}/lib/python3.{sys.version_info[1]}/site-packages"


class First:
    """The first of all finders. It finds the framework alone, and sees when pip begins."""

    def __init__(
        self, prefix: str, framework: str, modules: Iterable[str], places: Sequence[str]
    ) -> None:
        """Of a sealed prefix; the framework's distribution (normal name) and its modules."""
        self.prefix = prefix
        self.places = places
        self.sealed = folder(prefix)
        self.framework = framework
        self.modules = frozenset(modules)
        self.guided = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The framework's module outside of the sealed folder; None for all others."""
        if name in self.modules:
            return self._elsewhere(name)
        if name == "pip" and not self.guided and runs_pip(sys.argv, sys.orig_argv):
            self.guided = True
            guide_pip(self.prefix, self.places, sys.argv[1:], os.environ)
        return None

    def _elsewhere(self, name: str) -> Any:
        from importlib.machinery import PathFinder

        for finder in sys.meta_path:
            if finder is self:
                continue
            if finder is PathFinder:
                found = PathFinder.find_spec(name, self._open(sys.path))
            else:  # an editable installation's own
                found = finder.find_spec(name, None, None)
            # A folder of that name without an __init__.py is no package: the folder above a
            # checkout, say, when a job is started there.
            if found and found.loader:
                return found
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """The framework's metadata outside of the sealed folder, so that its version is the one."""
        from importlib.metadata import MetadataPathFinder

        name = getattr(context, "name", None) or ""
        if not self.framework or name.lower().replace("_", "-") != self.framework:
            return iter(())
        kind = type(context)
        return iter(
            MetadataPathFinder.find_distributions(kind(name=name, path=self._open(context.path)))
        )

    def _open(self, path: Sequence[str]) -> list[str]:
        return [entry for entry in path if entry != self.sealed]


def runs_pip(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether this process is pip, and not one that imports it for something else."""
    if not argv:
        return False
    if argv[0] == "-m":  # so it is called until the module has been found
        return "-m" in original and original[original.index("-m") + 1 :][:1] == ["pip"]
    return os.path.basename(argv[0]) in ("pip", "pip3", f"pip3.{sys.version_info[1]}")


def guide_pip(
    prefix: str,
    places: Sequence[str],
    arguments: Sequence[str],
    environ: MutableMapping[str, str],
) -> None:
    """Have pip install into the place that can be written, and keep to the lock.

    It is done here and not by variables of the image: those would reach into virtual environments
    of the user's, which have nothing to do with the lock.
    """
    if any(word.split("=")[0] == "--python" for word in arguments):
        return  # pip works on another environment
    constraint = f"{prefix}/share/rollout/constraints.txt"
    given = environ.get("PIP_CONSTRAINT", "").split()
    environ["PIP_CONSTRAINT"] = " ".join([*given, constraint])
    environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    if chosen(arguments, environ):
        return
    running, built = places
    place = built if os.access(built, os.W_OK) else running
    environ["PIP_PREFIX"] = place
    if place == built:
        # Root's cache would become part of the image, and other users could not write it.
        environ.setdefault("PIP_NO_CACHE_DIR", "1")
    # pip removes what an installation replaces if it lies below sys.prefix: without this it would
    # take files out of the sealed environment. sysconfig has to know the true one: by that, pip
    # keeps what is sealed out of the isolated builds of packages.
    import contextlib
    import sysconfig

    sysconfig.get_paths()
    sys.prefix = sys.exec_prefix = place
    # Of two releases of the framework pip is to see the user's, or it could not remove it again.
    added, sealed = list(map(folder, places)), folder(prefix)
    first = [entry for entry in sys.path if entry in added]
    others = [entry for entry in sys.path if entry not in added]
    at = others.index(sealed) if sealed in others else len(others)
    sys.path[:] = [*others[:at], *first, *others[at:]]
    settings = f"{place}/pyvenv.cfg"
    changes = {"install", "uninstall"}.intersection(arguments)
    if changes and not os.path.exists(settings):  # pip warns where there is none below sys.prefix
        with contextlib.suppress(OSError):  # pip says better than we what cannot be written
            os.makedirs(place, exist_ok=True)
            with open(settings, "w", encoding="utf-8") as stream:
                stream.write("include-system-site-packages = false\n")


def chosen(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether the user says where pip is to install."""
    names = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
    words = {word.split("=")[0] for word in arguments}
    return bool(words.intersection(_ELSEWHERE)) or any(environ.get(name) for name in names)


def alone(environ: MutableMapping[str, str]) -> None:
    """Leave nothing of a launcher's in the environment, and answer MPI's questions about root.

    Every Python of the image does it before it imports anything, so processes that it starts, and
    Ray's workers, do it too, whatever environment they are given.
    """
    if environ.get(KEEP, "0") in ("", "0"):
        for name in [name for name in environ if name.startswith(LAUNCHERS)]:
            del environ[name]
    environ.pop(ARCHITECTURES, None)
    for name in AS_ROOT:
        environ.setdefault(name, "1")


def begin(
    prefix: str,
    framework: str = "",
    modules: Iterable[str] = (),
    places: Sequence[str] = PLACES,
) -> None:
    """Add the places that exist to the path; the .pth file calls it."""
    if any(isinstance(finder, First) for finder in sys.meta_path):
        return  # in a virtual environment, site reads every .pth file twice
    for place in places:
        if os.path.isdir(folder(place)):
            site.addsitedir(folder(place))
    sys.meta_path.insert(0, First(prefix, framework, modules, places))

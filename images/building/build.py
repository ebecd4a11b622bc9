"""Third station: from a lock to an image.

Pure functions compute the context, the arguments and the labels; :func:`build` runs them. The
builder whose digests count is buildah; docker (BuildKit) builds the same Dockerfile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from images import catalog, host
from images.building import budget, builder, dockerfile, fetching, storage
from images.building import layers as layers_of
from images.building.layers import Record, measure
from images.catalog import BACKENDS, FRAMEWORKS, ROOT, Image, shown
from images.host import leftovers
from images.locking import base, lock
from images.locking.lock import Locked
from rollout.problem import Problem

BUILD = ROOT / "build"
ENTRYPOINTS = ROOT / "entrypoints" / "rollout"
# The script of every step that installs and what it reads, in the context under these names; and
# the script of the last step, which decides no other layer.
ORDER = ROOT / "images" / "recipes" / "order.toml"
SCRIPTS = [
    *(ROOT / "images" / "recipes" / name for name in ("install", "prune", "prune.toml", "owners")),
    ORDER,
]
OWN_RULES = ROOT / "images" / "recipes" / "prune-framework.toml"  # for the layer of that name alone
LAST = ROOT / "images" / "recipes" / "entrypoints"
BASE_DOCKERFILE = ROOT / "images" / "recipes" / "base.Dockerfile"
BASE = "verl-rollout-base"
# Layers in the order of the Dockerfiles, from slow to fast changing: images with the same torch
# share the first ones to the byte.
LAYERS = (
    *("mathlibs", "nvidia", "torch", "toolchain", "dependencies", "sources", "engine"),
    "framework",
)
TORCH = ("torch", "torchvision", "torchaudio", "triton")
# What torch pins of CUDA, in two layers: in one it would be the largest by far, and a broken pull
# begins a layer anew.
_MATHLIBS = re.compile(
    r"nvidia-(cublas|cufft|curand|cusolver|cusparse|cusparselt|nvjitlink)(-cu\d+)?"
)
_NVIDIA = re.compile(
    r"nvidia-(cuda-cupti|cuda-nvrtc|cuda-runtime|cudnn|cufile|nccl|nvshmem|nvtx)(-cu\d+)?"
)
# What compiles at run time; the plain runtime wheel is its part where torch's has a suffix.
_TOOLCHAIN = re.compile(r"nvidia-(cuda-(nvcc|cccl|crt)|nvvm)(-cu\d+)?")
# NVIDIA's hooks in container engines give a container the GPU, and of the driver what computes,
# where its image asks for them. docker's --gpus asks by itself; pyxis, enroot and a runtime that is
# the default of a cluster do not, and the image would see no GPU there (enroot 205).
GPU = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
# One moment for every file of every image. A moment of its own for each would give two images with
# the same torch two different torch layers.
TIMESTAMP = base.EPOCH
# Unpacked wheels, their second copy in the builder's cache, and the layers made of them.
DISK_NEEDED = 4 << 30


def layer_of(
    entry: Locked, engine: str, names: Collection[str] = (), sources: Collection[str] = ()
) -> str:
    """The layer that a distribution belongs to, among the names of its lock."""
    # What trains, and all that it brings: none of it may change a layer of the engine.
    if entry.above:
        return "framework"
    # Above the layer that has what they are built with.
    if entry.name in sources:
        return "sources"
    if entry.name == engine:
        return "engine"
    if entry.name in TORCH:
        return "torch"
    if _MATHLIBS.fullmatch(entry.name):
        return "mathlibs"
    second = entry.name == "nvidia-cuda-runtime" and any(
        name.startswith(f"{entry.name}-cu") for name in names
    )
    if second or _TOOLCHAIN.fullmatch(entry.name):
        return "toolchain"
    return "nvidia" if _NVIDIA.fullmatch(entry.name) else "dependencies"


def layers(locked: Sequence[Locked], engine: str, sources: Collection[str] = ()) -> dict[str, str]:
    """The lock, cut into the layers that hold anything: name to requirements text."""
    texts: dict[str, str] = {}
    names = {entry.name for entry in locked}
    for layer in LAYERS:
        entries = [e for e in locked if layer_of(e, engine, names, sources) == layer]
        if entries:
            texts[layer] = "".join(e.text for e in sorted(entries, key=lambda e: e.name))
    return texts


def framework(image: Image) -> dict[str, str] | None:
    """The framework as image.json has it; None in an image that has none."""
    if image.framework is None:
        return None
    found = image.framework
    return {"name": found.name, "distribution": found.name, "version": found.version}


def facts(image: Image, locked: Sequence[Locked]) -> dict[str, object]:
    """What ``rollout`` inside the image has to know of it (share/rollout/image.json)."""
    versions = {entry.name: entry.version for entry in locked}
    return {
        "reference": image.reference,
        "backend": image.backend,
        "framework": framework(image),
        "python": image.python,
        "resolved_as_of": image.resolved_as_of.isoformat(),
        "engine": {"name": image.backend, "distribution": image.engine},
        "cuda": lock.cuda(versions),
        "expect": dict(image.expect),
        "smoke": image.smoke.facts,
        "optional_libraries": sorted(image.optional_libraries),
        "imports": ["torch", image.engine.replace("-", "_")],
    }


def immutable_tag(image: Image, locked: Sequence[Locked], lock_sha256: str) -> str:
    """The tag that never moves: engine version, CUDA, Python and the lock it was built from."""
    versions = {entry.name: entry.version for entry in locked}
    cuda = lock.cuda(versions)
    platform = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = "py" + image.python.replace(".", "")
    # A tag may not hold the plus sign of a local version.
    version = versions[image.engine].replace("+", "-")
    return f"{image.backend}-{version}-{platform}-{python}-{lock_sha256[:8]}"


def variables(image: Image, locked: Sequence[Locked]) -> dict[str, str]:
    """Variables of an image: the catalog's, and with CUDA those that ask for the GPU."""
    cuda = lock.cuda({entry.name: entry.version for entry in locked})
    return {**(GPU if cuda else {}), **image.env}


def labels(image: Image, locked: Sequence[Locked], lock_sha256: str, bottom: str) -> dict[str, str]:
    """Labels of an image: the standard keys, and the catalog row under ``rollout.``.

    Ray compares its own version and all three numbers of Python's, so both are there in full.
    """
    versions = {entry.name: entry.version for entry in locked}
    engine = versions[image.engine]
    trained = f"{image.framework.name} {image.framework.version}" if image.framework else "none"
    purpose = f"for rollout and training with {trained}" if image.framework else "for rollout"
    return {
        "org.opencontainers.image.title": image.reference,
        "org.opencontainers.image.description": (
            f"{image.backend} {engine} {purpose}, with its own proof"
        ),
        "org.opencontainers.image.version": immutable_tag(image, locked, lock_sha256),
        "org.opencontainers.image.licenses": "Apache-2.0 AND LicenseRef-contents",
        "rollout.backend": image.backend,
        "rollout.base": bottom,
        "rollout.cuda": lock.cuda(versions) or "none",
        "rollout.engine.version": engine,
        "rollout.framework": image.framework.name if image.framework else "none",
        "rollout.framework.version": image.framework.version if image.framework else "none",
        "rollout.lock.sha256": lock_sha256,
        "rollout.python": base.python(image.python),
        "rollout.ray": versions.get("ray", "none"),
        "rollout.resolved-as-of": image.resolved_as_of.isoformat(),
        "rollout.torch": versions["torch"],
    }


LAUNCHER = """#!/opt/rollout/bin/python -I
from rollout.cli import main

# The guard matters: the engine's process is spawned, and imports this file once more.
if __name__ == "__main__":
    raise SystemExit(main())
"""


def belongs(module: Path, image: Image) -> bool:
    """Whether a module of the package is for this image: that of another engine alone is not.

    Nor is that of another framework. So a change in how one of them is driven leaves the proofs of
    the others as good as they are.
    """
    framework = image.framework.name if image.framework else ""
    kinds = {"backends": (BACKENDS, image.backend), "frameworks": (FRAMEWORKS, framework)}
    if module.parent.name not in kinds:
        return True
    names, own = kinds[module.parent.name]
    owners = [
        known
        for known in (name.replace("-", "_") for name in names)
        if module.stem == known or module.stem.startswith(f"{known}_")
    ]
    return owners in ([], [own.replace("-", "_")])


def payload(image: Image, locked: Sequence[Locked]) -> dict[str, bytes]:
    """The files of the last layer: our own package, the lock, and what the image is."""
    modules = [path for path in sorted(ENTRYPOINTS.rglob("*.py")) if belongs(path, image)]
    data = json.dumps(facts(image, locked), indent=1, sort_keys=True) + "\n"
    return {
        **{f"rollout/{path.relative_to(ENTRYPOINTS)}": path.read_bytes() for path in modules},
        "requirements.lock": image.lock.read_bytes(),
        "image.json": data.encode(),
        "launcher": LAUNCHER.encode(),
        "python": image.python.encode(),
    }


def digest(*parts: str | bytes) -> str:
    """sha256 over texts and bytes, each with its length, so that no two lists look alike."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(data)}:".encode() + data)
    return whole.hexdigest()


def arguments(texts: Mapping[str, str], bottom: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """Build arguments: the base, and for each layer the sha256 of what it installs and how."""
    parts = [part for name, data in sorted(files.items()) for part in (name, data)]
    return {**below(texts, bottom), "ENTRYPOINTS": digest(LAST.read_bytes(), *parts)}


def below(texts: Mapping[str, str], bottom: str) -> dict[str, str]:
    """Those of the arguments that decide the layers below our own package."""
    scripts = [script.read_bytes() for script in SCRIPTS]
    own = {"framework": [OWN_RULES.read_bytes()]}
    values = {n.upper(): digest(*scripts, *own.get(n, []), text) for n, text in texts.items()}
    return {"BASE": bottom, **values}


def layer_names(image: Image, locked: Sequence[Locked]) -> list[str]:
    """What the layers of an image are called, from the lowest up."""
    texts = layers(locked, image.engine, image.sources)
    return ["base", *texts, "entrypoints"]


def recipe_text(image: Image, locked: Sequence[Locked]) -> str:
    """The Dockerfile as it is rendered for an image, with its variables and labels.

    Raises:
        Problem: exit code 2 where it cannot be rendered.
    """
    found = labels(image, locked, host.sha256(image.lock), base_name())
    return dockerfile.stamped(_steps(image, locked), variables(image, locked), found)


def _steps(image: Image, locked: Sequence[Locked]) -> str:
    try:
        return dockerfile.steps(
            image.dockerfile.read_text("utf-8"), layer_names(image, locked)[1:-1]
        )
    except ValueError as error:
        raise Problem(f"{shown(image.dockerfile)}: {error}", 2) from None


def inputs(image: Image) -> str:
    """sha256 of what decides the layers up to the engine and its framework; needs no build.

    The variables that an engine sees are part of it. Our own package, which is the last layer, and
    the labels are not: what it asks of an engine has an identity of its own (rollout/program.py),
    and no edit there may make a build or a proof of the layers below worth less.
    """
    locked = lock.read(image)
    texts = layers(locked, image.engine, image.sources)
    code = dockerfile.below(_steps(image, locked))
    values = json.dumps(below(texts, base_name()), sort_keys=True)
    return digest(values, dockerfile.stamped(code, variables(image, locked), {}))


# Settings of uv that say where packages come from. The others speak of the host's own projects,
# folders and files, which do not exist in the build container.
_TRAVELS = re.compile(
    "UV_(DEFAULT_INDEX|INDEX(_(URL|STRATEGY))?|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|"
    "CONCURRENT_.*|TORCH_BACKEND)$"
)
_BARE = re.compile(r"(?<=://)[^/@\s]+@")  # credentials in an address


# A test's: how much later the programs of a build step believe it is, as libfaketime reads it.
CLOCK = "ROLLOUT_TEST_CLOCK"
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def clock(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that turn the clock of a build's steps; none but where a test asks for it."""
    if CLOCK not in environ:
        return {}
    return {
        "LD_PRELOAD": f"/mnt/context/tools/{_FAKETIME.name}",
        "FAKETIME": environ[CLOCK],
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # or programs that wait would wait for a day
        "NO_FAKE_STAT": "1",
    }


def indexes(settings: Mapping[str, str], wheels: bool) -> str:
    """The names of the host's indexes, as a file for the shell in the build container.

    By them uv finds what it has in its cache; it keeps them without credentials, and so does this.
    """
    inside = {k: _BARE.sub("", v) for k, v in settings.items() if _TRAVELS.match(k)}
    # Nor is an index that is a folder of the host one in there.
    local = [k for k, v in inside.items() if "INDEX" in k and re.match(r"([^/]+=)?(/|\.|file:)", v)]
    for name in local:
        del inside[name]
    # Folders of the host do not exist in there; their wheels travel in the context.
    links = inside.pop("UV_FIND_LINKS", "").split(",")
    links = [link for link in links if "://" in link and not link.startswith("file:")]
    if wheels:
        links.append("/mnt/context/wheels")
    if links:
        inside["UV_FIND_LINKS"] = ",".join(links)
    return exports(inside)


def exports(values: Mapping[str, str]) -> str:
    """Variables as a shell reads them from a file."""
    return "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(values.items()))


def _place(source: Path, target: Path) -> None:
    """A file in the context without a second copy on the disk, where the file systems allow it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(source.stat().st_mode)


def prepare(
    folder: Path,
    recipe: str,
    texts: Mapping[str, str],
    files: Mapping[str, bytes],
    wheels: Sequence[Path],
    sources: Collection[str] = (),
    settings: str = "",
) -> None:
    """Lay out a build context. ``sources`` are built, so they stand in a list of their own.

    ``settings`` is what :func:`indexes` gives.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tools", "layers", "wheels", "sources", "payload"):
        (folder / name).mkdir(parents=True)
    (folder / "indexes.env").write_text(settings, encoding="utf-8")
    (folder / "Dockerfile").write_text(recipe, encoding="utf-8")
    for script in (*SCRIPTS, OWN_RULES, LAST):
        _place(script, folder / script.name)
    _place(Path(host.uv()), folder / "tools" / "uv")
    last = tomllib.loads(ORDER.read_text("utf-8"))
    for name, text in texts.items():
        lists: dict[str, list[str]] = {}
        for entry in lock.parse(text, folder):
            kind = "sources" if entry.name in sources else "wheels"
            lists.setdefault("last" if entry.name in last else kind, []).append(entry.text)
        for kind, lines in lists.items():
            path = folder / "layers" / f"{name}.{kind}.txt"
            path.write_text("".join(lines), encoding="utf-8")
    for name, data in files.items():
        path = folder / "payload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for wheel in wheels:
        _place(wheel, folder / "wheels" / wheel.name)


def own_wheels(locked: Sequence[Locked], find_links: str) -> list[Path]:
    """The wheels of a lock that lie in folders of this host; uv checks their sha256."""
    versions = {entry.name: entry.version for entry in locked}
    found = []
    for wheel in lock.local_wheels(find_links, versions):
        name, version, *_ = wheel.name.split("-")
        if versions[canonicalize_name(name)] == version:
            found.append(wheel)
    return found


def check_disk(folder: Path, needed: int = DISK_NEEDED) -> None:
    """See that a build has room.

    Raises:
        Problem: exit code 3, with what is free, what is needed and where.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        numbers = f"{free / 2**30:.1f} GiB free, about {needed / 2**30:.0f} GiB needed"
        raise Problem(f"no disk space for a build in {folder}: {numbers}; free some", 3)


def base_name() -> str:
    """The base image's name: a digest of its lock, its recipe and its Dockerfile."""
    return f"{BASE}:{digest(base.identity(base.LOCK), BASE_DOCKERFILE.read_bytes())[:12]}"


def base_needs(uid: int) -> list[str]:
    """What making the base needs of this machine; Ubuntu does not trust Debian's keys by itself."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    needs = ["mmdebstrap", "apt-get", "apt-cache", "dpkg-deb", keyring]
    return needs if uid == 0 else [*needs, "newuidmap"]


def base_image(tool: builder.Builder, *, cache: bool = True) -> str:
    """The base image in the builder's storage; made where it is not there yet."""
    name = tool.local + base_name()
    if not cache or not tool.inspect(name):
        host.require(*base_needs(os.geteuid()))
        tar = base.tarball()
        with leftovers.temporary("context", _contexts()) as place:
            folder = place / "context"
            folder.mkdir()
            _place(tar, folder / "base.tar")
            # The label makes bases of other inputs other images even where their files are the
            # same: else layers cached on one would be taken for the other's, and carry its name and
            # history.
            text = dockerfile(BASE_DOCKERFILE.read_text("utf-8"), {}, {"rollout.base": base_name()})
            (folder / "Dockerfile").write_text(text, encoding="utf-8")
            found = tool.build(builder.Recipe(folder, name, TIMESTAMP, cache=cache))
        if not tool.inspect(found):
            raise Problem(f"{tool.name} finished, but {name} is not in its storage")
    storage.keep_base(tool, name)
    return name


def _contexts() -> Path:
    """Where contexts lie: in the checkout, so that they share its large files."""
    BUILD.mkdir(exist_ok=True)
    return BUILD


def everything(image: Image) -> str:
    """sha256 of all that decides an image, our own package and the labels too; needs no build."""
    locked = lock.read(image)
    texts = layers(locked, image.engine, image.sources)
    values = arguments(texts, base_name(), payload(image, locked))
    return digest(json.dumps(values, sort_keys=True), recipe_text(image, locked))


def current(image: Image, tool: builder.Builder) -> builder.Built:
    """The image of today's inputs in the builder's storage, whatever is called so there by now.

    Raises:
        Problem: exit code 3 where it is not there: never built, or something in it has changed.
    """
    built = storage.find(tool, everything(image))
    if not built:
        other = tool.inspect(tool.local + image.reference)
        what = "is here as built from other inputs than today's" if other else "is not built here"
        raise Problem(
            f"{image.reference} {what}; build it with 'nox -s build -- {image.reference}'", 3
        )
    return built


def build(
    image: Image,
    tool: builder.Builder,
    *,
    tag: str = "",
    cache: bool = True,
    check: bool = True,
) -> builder.Built:
    """Build one image.

    The final tag is given by the builder after the last layer: an interrupted build leaves none.
    """
    locked = lock.read(image)
    if platform.machine() != "x86_64":
        raise Problem(f"the locks are for x86-64, this machine is {platform.machine()}", 3)
    check_disk(tool.storage(), DISK_NEEDED * tool.copies())
    name = tool.local + (tag or image.reference)
    texts = layers(locked, image.engine, image.sources)
    files = payload(image, locked)
    settings = host.uv_environment(os.environ)
    wheels = own_wheels(locked, settings.get("UV_FIND_LINKS", ""))
    backend = lock.torch_backend([f"{e.name}=={e.version}" for e in locked], settings)
    if backend:
        settings["UV_TORCH_BACKEND"] = backend
    leftovers.sweep(BUILD)
    leftovers.prune()
    with storage.alone(tool), leftovers.temporary("context", _contexts()) as place:
        tool.sweep()
        bottom = base_image(tool, cache=cache)
        folder = place / "context"
        told = indexes(settings, bool(wheels)) + exports(clock(os.environ))
        prepare(folder, recipe_text(image, locked), texts, files, wheels, image.sources, told)
        here = {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
        fetching.fetch(locked, image.python, image.sources, here, settings, folder / "sources")
        values = arguments(texts, bottom, files)
        if CLOCK in os.environ:
            host.require(str(_FAKETIME))
            _place(_FAKETIME, folder / "tools" / _FAKETIME.name)
        recipe = builder.Recipe(folder, name, TIMESTAMP, values, fetching.cache(), cache=cache)
        built = tool.inspect(tool.build(recipe))
        if not built:
            raise Problem(f"{tool.name} finished, but {name} is not in its storage")
        storage.remember(tool, everything(image), built.id)
    host.say(f"{name} is {built.id}")
    if check and isinstance(tool, builder.Buildah):  # docker's storage gives no layer away
        budget.check(image, tool, built, layer_names(image, locked))
    return built


def command(image: Image, *options: str) -> list[str]:
    """This station as a command of its own, for who has to build from nothing."""
    return [sys.executable, "-m", "images.building.build", image.reference, "--no-cache", *options]


def record(image: Image, tool: builder.Buildah, built: builder.Built) -> Record:
    """What is recorded of an image that was just built: its layers below our own package.

    Every layer is read once more.

    Raises:
        Problem: a layer holds what none may hold.
    """
    known = budget.remembered() | budget.known()
    names = layer_names(image, lock.read(image))
    measured = measure(tool, built.id, names, known)
    if measured.broken:
        raise Problem(f"{image.reference} is not recorded: {'; '.join(measured.broken)}")
    return Record(inputs(image), tool.version(), measured.layers[:-1])


def keep(image: Image, tool: builder.Buildah, built: builder.Built) -> None:
    """Record the layers of an image that was just built, where none of these inputs are recorded.

    Raises:
        Problem: others are recorded of the same inputs, by the same builder.
    """
    recorded, today = layers_of.read(image), inputs(image)
    verdict = layers_of.compare(recorded, today, built, tool.version())
    if verdict.differs:
        command = f"nox -s reproduce -- {image.reference}"
        raise Problem(f"not kept: {verdict.sentence} ('{command}' says what differs)")
    if not recorded or recorded.inputs != today:
        layers_of.write(image, record(image, tool, built))


def main(arguments: Sequence[str]) -> int:
    """``nox -s build [-- REF … --builder docker --no-cache --tag NAME --record]``."""
    parser = argparse.ArgumentParser(prog="nox -s build --", description="Build images.")
    parser.add_argument("refs", nargs="*", metavar="REF", help="default: " + catalog.DEFAULT)
    parser.add_argument("--builder", help="buildah (default) or docker")
    parser.add_argument("--no-cache", action="store_true", help="build every layer anew")
    parser.add_argument("--no-check", action="store_true", help="skip size and hygiene rules")
    parser.add_argument("--tag", default="", help="another name for the result")
    parser.add_argument("--show", action="store_true", help="print the Dockerfile and build nothing")
    parser.add_argument("--record", action="store_true", help="keep what the layers are")
    given = parser.parse_args(list(arguments))
    images = catalog.load()
    chosen = [catalog.find(ref, images) for ref in given.refs or [catalog.DEFAULT]]
    if given.show:
        for image in chosen:
            sys.stdout.write(recipe_text(image, lock.read(image)))
        return 0
    tool = builder.detect(given.builder)
    if given.record and (given.tag or not isinstance(tool, builder.Buildah)):
        raise Problem("--record needs buildah and the image's own name: leave out --tag", 2)
    for image in chosen:
        cache, check = not given.no_cache, not given.no_check
        built = build(image, tool, tag=given.tag, cache=cache, check=check)
        if given.record and isinstance(tool, builder.Buildah):
            keep(image, tool, built)
    return 0


if __name__ == "__main__":
    raise SystemExit(host.guarded(main, sys.argv[1:]))

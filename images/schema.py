"""What a catalog file may say: each key with its type and a sentence on what it is for.

msgspec reads files by these types, and makes of them the JSON Schema that editors read. What no
type can say is in images/rules.py.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, structs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rollout.frameworks.training_checkout import COMMIT

Backend = Literal["vllm", "sglang", "tensorrt-llm", "transformers"]
FrameworkName = Literal["verl", "roll", "open-instruct"]
Level = Literal["R1", "R2", "R3", "R4"]
Transport = Literal["shared-memory", "cuda-ipc", "cuda-ipc-flattened", "nccl", "disk"]

BACKENDS: tuple[str, ...] = get_args(Backend)
FRAMEWORKS: tuple[str, ...] = get_args(FrameworkName)  # entrypoints/rollout/frameworks has each
LEVELS: tuple[str, ...] = get_args(Level)  # what two builds agree in: images/proving/reproduce.py
TRANSPORTS: tuple[str, ...] = get_args(Transport)
QUOTED = 80  # characters of a line that an error quotes

Lines = tuple[str, ...]
Reasons = dict[str, str]  # of each of its keys


def says(what: str, **bounds: Any) -> Meta:
    """What a key is for, as docs/new-image.md and editors say it, and what its value has to be."""
    return Meta(description=what, **bounds)


def quoted(value: Any) -> str:
    """A value of a file as an error quotes it: it may be of any length."""
    if isinstance(value, str):
        return repr(value if len(value) <= QUOTED else f"{value[:QUOTED]}…")
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


class Wrong(Exception):
    """What is wrong with a catalog file: a clause that names the key, without the file."""


class Table(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of a catalog file. A key that was ignored is one that somebody believes in force."""


def _normal(table: Table, *names: str) -> None:
    """Give the keys of these tables of distributions their normal names."""
    for name in names:
        found = {canonicalize_name(key): reason for key, reason in getattr(table, name).items()}
        structs.force_setattr(table, name, found)


class Smoke(Table, frozen=True):
    """What the proof of an image has to show."""

    sleep_levels: Annotated[
        tuple[Literal[1, 2], ...],
        says("1 (weights kept in main memory), 2 (dropped), or both; none where no run sleeps"),
    ]
    refit: Annotated[
        tuple[Transport, ...], says("transports of weights: " + ", ".join(TRANSPORTS), min_length=1)
    ]
    fp8: Annotated[bool, says("a second start with weights in 8 bits")] = False
    lora: Annotated[bool, says("adapters: a start of their own, by folder and from memory")] = False
    server: Annotated[bool, says("the engine's own server, over HTTP")] = False
    long: Annotated[bool, says("positions in the thousands, chunked and preempted")] = False
    moe: Annotated[bool, says("a mixture of experts, on an engine of its own")] = False
    pressure: Annotated[
        bool, says("hundreds of requests at once, half of them aborted, weights replaced meanwhile")
    ] = False
    fp8_kv: Annotated[
        Literal["", "kept", "put-back"],
        says("keys and values in 8 bits: a wake keeps their scales, or they have to be put back"),
    ] = ""
    disaggregated: Annotated[
        bool, says("a trainer on a GPU of its own, by NCCL and from disk; an engine on two GPUs")
    ] = False
    training: Annotated[
        bool, says("the framework's own trainer makes steps; needs [framework]")
    ] = False
    tensor_parallel: Annotated[Literal[0, 2], says("GPUs to divide a model among: 2")] = 0
    reuse: Annotated[
        Literal["turns", "prompts"],
        says("what the prefix cache keeps of a request: turns, or prompts alone"),
    ] = "turns"

    @property
    def facts(self) -> dict[str, Any]:
        """As image.json has it, which decides the checks of ``rollout smoke``."""
        return {
            "sleep_levels": list(self.sleep_levels),
            "refit": list(self.refit),
            "fp8": self.fp8,
            "server": self.server,
            **({"long": True} if self.long else {}),
            **({"lora": True} if self.lora else {}),
            **({"moe": True} if self.moe else {}),
            **({"pressure": True} if self.pressure else {}),
            **({"disaggregated": True} if self.disaggregated else {}),
            **({"fp8-kv": self.fp8_kv} if self.fp8_kv else {}),
            **({"training": True} if self.training else {}),
            **({"tensor_parallel": self.tensor_parallel} if self.tensor_parallel else {}),
            **({"reuse": self.reuse} if self.reuse != "turns" else {}),
        }


class Framework(Table, frozen=True):
    """The training framework whose runs start in an image.

    It is resolved on a day of its own, because a release that fits an engine often comes later, and
    with every pin of the engine held. Each table gives a reason for each of its keys.
    """

    name: Annotated[
        FrameworkName, says("a framework that has an adapter: " + ", ".join(FRAMEWORKS))
    ]
    version: Annotated[str, says("the release that is in the image")]
    resolved_as_of: Annotated[datetime.date, says("the day whose index its lock sees")]
    # A commit tells nothing of what somebody changed in a checkout of it; reports name both.
    files: Annotated[
        str, says("of one that is on no index: the digest of its Python files there")
    ] = ""
    # Where the index has no wheel of the framework, the file names what it depends on instead.
    requirements: Annotated[
        Lines, says("what it is resolved from; by default the release itself", min_length=1)
    ] = ()
    # `nox -s lock` asks a resolver whether they do.
    fits: Annotated[Lines, says("other releases whose metadata takes this engine")] = ()
    extra: Annotated[str, says("its extra that bounds the engine")] = ""
    undeclared: Annotated[Reasons, says("what it imports and does not ask for")] = {}
    overrides: Annotated[Reasons, says("what it asks for and this image holds otherwise")] = {}
    left_out: Annotated[Reasons, says("what it asks for and this image does not have")] = {}
    lacks: Annotated[
        Reasons, says("what its defaults use and no index has: users add it, and `info` says so")
    ] = {}
    source_distributions: Annotated[Reasons, says("distributions of its own without a wheel")] = {}

    def __post_init__(self) -> None:
        if not self.requirements:
            structs.force_setattr(self, "requirements", (f"{self.name}=={self.version}",))
        _normal(self, "lacks", "left_out", "source_distributions")

    @property
    def named(self) -> str:
        """What a report of a training calls it: the release, or the commit and its files."""
        return f"{self.version[:COMMIT]}+files-{self.files}" if self.files else self.version

    @property
    def packaged(self) -> bool:
        """Whether the framework itself is in the image; else what its code needs is."""
        own = canonicalize_name(self.name)
        return own in (canonicalize_name(Requirement(line).name) for line in self.requirements)


_SIZE = r"^[0-9]+(\.[0-9]+)? (MB|GB)$"
_SIZES = ["3.6 GB", "450 MB"]
_UNITS = {"MB": 10**6, "GB": 10**9}


def _bytes(size: str) -> int:
    number, unit = size.split()
    return round(float(number) * _UNITS[unit])


class Size(Table, frozen=True):
    """What an image may weigh at most in a registry."""

    compressed_text: Annotated[
        str, says("of all layers, like '3.6 GB'", pattern=_SIZE, examples=_SIZES)
    ] = msgspec.field(name="compressed")
    largest_layer_text: Annotated[
        str, says("of the largest one", pattern=_SIZE, examples=_SIZES)
    ] = msgspec.field(name="largest-layer")

    @property
    def compressed(self) -> int:
        """Of all layers, in bytes."""
        return _bytes(self.compressed_text)

    @property
    def largest_layer(self) -> int:
        """Of the largest layer, in bytes."""
        return _bytes(self.largest_layer_text)


_SHA256 = r"^[0-9a-f]{64}$"
_INTERPRETER = r"^cpython-[0-9]+\.[0-9]+\.[0-9]+\+[0-9]+-x86_64-unknown-linux-gnu-[a-z_]+\.tar\.gz$"


class Interpreter(Table, frozen=True):
    """A Python that Debian does not have: the file of one, built to run anywhere."""

    file: Annotated[
        str,
        says(
            "its name, with version and day of the build",
            pattern=_INTERPRETER,
            examples=["cpython-3.12.1+20260101-x86_64-unknown-linux-gnu-install_only.tar.gz"],
        ),
    ]
    sha256: Annotated[str, says("of that file", pattern=_SHA256, examples=["64 of 0-9 and a-f"])]
    source: Annotated[str, says("the public list that has this sha256")]

    @property
    def version(self) -> str:
        """Like 3.12.1."""
        return self.file.split("-")[1].partition("+")[0]


class Elsewhere(Table, frozen=True, kw_only=True):
    """A wheel that the public index does not have, where it lies, and what is known of it."""

    name: Annotated[str, says("the distribution")]
    index: Annotated[str, says("whose index has the wheel")]
    tags: Annotated[
        str,
        says(
            "the end of the wheel's name",
            pattern=r"^[a-z0-9_.]+-[a-z0-9_.]+-[a-z0-9_.]+$",
            examples=["cp312-cp312-linux_x86_64"],
        ),
    ]
    why: Annotated[str, says("why this wheel")]
    requires: Annotated[
        Lines, says("what it asks for; by default its stub on the public index says that")
    ] = ()
    requires_source: Annotated[str, says("where that is said")] = ""
    sha256: Annotated[
        str,
        says(
            "of the wheel, where it is published",
            pattern=r"^([0-9a-f]{64})?$",
            examples=["64 of 0-9 and a-f"],
        ),
    ] = ""
    source: Annotated[str, says("the public file that has this sha256")] = ""

    def __post_init__(self) -> None:
        structs.force_setattr(self, "name", canonicalize_name(self.name))

    @property
    def stub(self) -> bool:
        """Whether the public index has a source distribution with all of the wheel's metadata."""
        return not self.requires

    def file(self, version: str) -> str:
        """The name of the wheel of a release."""
        return f"{self.name.replace('-', '_')}-{version}-{self.tags}.whl"


class Release(Table, frozen=True, kw_only=True):
    """The image in which an engine's makers publish it: the other thing to build on."""

    image: Annotated[
        str,
        says(
            "its name below a registry",
            pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$",
            examples=["vendor/engine/release"],
        ),
    ]
    digest: Annotated[
        str,
        says(
            "of it, where it is published",
            pattern=r"^(sha256:[0-9a-f]{64})?$",
            examples=["sha256: and 64 of 0-9 and a-f"],
        ),
    ] = ""
    source: Annotated[str, says("the public file that has this digest")] = ""
    torch: Annotated[str, says("the version of the torch in it, which stays as it is")]
    torch_source: Annotated[str, says("where that is said")]
    otherwise: Annotated[
        Reasons, says("distributions that it holds otherwise than what is added asks for")
    ] = {}

    def __post_init__(self) -> None:
        _normal(self, "otherwise")


class File(Table, frozen=True, kw_only=True):
    """A catalog file together with the fragments that it takes."""

    use: Annotated[Lines, says("fragments to take, by name")] = ()
    backend: Annotated[Backend, says("the engine, and the module that drives it")]
    python: Annotated[Literal["3.11", "3.12"], says("major and minor version; Debian 12 has 3.11")]
    interpreter: Annotated[
        Interpreter | None, says("the file of a Python that Debian 12 does not have")
    ] = None
    resolved_as_of: Annotated[datetime.date, says("the day whose index the engine's lock sees")]
    requirements: Annotated[
        Lines, says("what the engine's lock is resolved from, each with a reason")
    ]
    left_out: Annotated[Reasons, says("what the engine asks for and this image does not have")] = {}
    framework: Annotated[Framework | None, says("whose training runs in this image")] = None
    expect: Annotated[
        Reasons, says("versions that the lock has to have, and that the image is held to")
    ]
    env: Annotated[Reasons, says("variables of the image, each with a reason")] = {}
    smoke: Annotated[Smoke, says("what the proof has to show")]
    not_shown: Annotated[
        Reasons, says("a promised check or transport: why nobody can show it")
    ] = {}
    size: Annotated[Size, says("what it may weigh in a registry")]
    reproducible: Annotated[Level, says("the level that two builds reach: R1 to R4")]
    source_distributions: Annotated[
        Reasons, says("distributions without a wheel: the image builds them")
    ] = {}
    debian: Annotated[
        Reasons, says("Debian packages that this image needs beside those of the base")
    ] = {}
    release: Annotated[
        Release | None, says("the engine's own image, to build on in place of the base (`--from`)")
    ] = None
    elsewhere: Annotated[
        tuple[Elsewhere, ...], says("wheels that the public index does not have, one table each")
    ] = ()
    optional_libraries: Annotated[
        Reasons, says("libraries that a file asks for and nothing loads here")
    ] = {}

    def __post_init__(self) -> None:
        _normal(self, "left_out", "source_distributions")


class Key(NamedTuple):
    """A key of a catalog file."""

    type: Any  # of its value
    required: bool
    about: Meta


_KINDS = {bool: "true or false", int: "a number", str: "a string", datetime.date: "a date"}


def kind(type_: Any) -> str:
    """A type as people call it."""
    if get_origin(type_) is tuple:
        return "a list"
    return _KINDS.get(type(get_args(type_)[0]) if get_args(type_) else type_, "a table")


def _part(table: type[Struct], prefix: str = "") -> type[Struct]:
    """The same table with no key required; on the way, each of its keys is put into KEYS."""
    fields = []
    for field in structs.fields(table):
        type_, about = get_args(field.type)
        # TOML has no null: `| None` says that the key may be left out.
        type_ = get_args(type_)[0] if isinstance(type_, UnionType) else type_
        name = prefix + field.encode_name
        KEYS[name] = Key(type_, field.required, about)
        if get_origin(type_) is tuple:
            _listed(get_args(type_)[0], f"{name}.")
        inner = isinstance(type_, type) and issubclass(type_, Struct)
        part = _part(type_, f"{name}.") if inner else type_
        unset = msgspec.field(name=field.encode_name, default=msgspec.UNSET)
        fields.append((field.name, Annotated[part, about], unset))
    says_it = {"__doc__": str(table.__doc__).partition("\n")[0]}
    return msgspec.defstruct(table.__name__, fields, namespace=says_it, forbid_unknown_fields=True)


def _listed(table: Any, prefix: str) -> None:
    """Put the keys of tables that stand in a list into KEYS; each has to be whole."""
    if isinstance(table, type) and issubclass(table, Struct):
        for field in structs.fields(table):
            type_, about = get_args(field.type)
            KEYS[prefix + field.encode_name] = Key(type_, field.required, about)


KEYS: dict[str, Key] = {}  # by dotted name, in the order of the page
Part = _part(File)  # one file of several: each says what the others do not
Read = TypeVar("Read", bound=Struct)


def read(table: Mapping[str, Any], part: type[Read]) -> Read:
    """What a TOML table says, as a ``File`` or a ``Part`` of one.

    Raises:
        Wrong: a key is unknown, missing, or of another type.
    """
    try:
        # With dates among the types that a table may hold, no string is taken for one.
        return msgspec.convert(table, part, builtin_types=(datetime.date,))
    except msgspec.ValidationError as error:
        raise Wrong(_clause(str(error), table)) from None


def _clause(error: str, table: Mapping[str, Any]) -> str:
    """What msgspec says of a table (``… - at `$.smoke.refit[0]```), in our words.

    An unknown key may have any name, so nothing is looked up by what such a sentence holds.
    """
    said, _, place = error.rpartition(" - at `")
    said, place = (said, place) if said else (error, "")  # nothing names the file's own table
    steps = re.findall(r"[\w-]+", place)
    name = ".".join(step for step in steps if not step.isdigit())
    prefix = f"{name}." if name else ""
    if said.startswith("Object missing"):
        return f"key {prefix + said.split('`')[1]!r} is missing; add it"
    if said.startswith("Object contains unknown"):
        unknown = said.partition("`")[2].removesuffix("`")
        known = [key.removeprefix(prefix) for key in KEYS if key.rpartition(".")[0] == name]
        near = difflib.get_close_matches(unknown, known, 1)
        hint = f"did you mean {prefix + near[0]!r}?" if near else "remove it"
        return f"unknown key {quoted(prefix + unknown)}; {hint}"
    value: Any = table
    for step in steps:
        value = value[int(step) if step.isdigit() else step]
    type_, _, about = KEYS[name]
    if place.endswith("[...]`"):  # somewhere in a table of strings
        name = prefix + next(key for key, inner in value.items() if not isinstance(inner, str))
        type_ = str
    inside = get_args(type_)[0] if get_origin(type_) is tuple else type_
    choices = ", ".join(map(str, get_args(inside))) if get_origin(inside) is Literal else ""
    in_list = place.endswith("]`") and inside is not type_
    if choices and (in_list or said.startswith("Invalid enum")):
        what = f"has {quoted(value)}; known are {choices}"
    elif in_list:
        what = f"has {quoted(value)}, not {kind(inside)}"
    elif " of length " in said:
        what = f"is empty; say at least one{choices and ' of '}{choices}"
    elif " matching regex " in said:
        what = f"has {quoted(value)}; say it like {' or '.join(map(repr, about.examples or ()))}"
    else:
        what = f"must be {kind(type_)}"
    return f"key {quoted(name)} {what}"


def published() -> str:
    """The JSON Schema of catalog files and fragments, each of which holds a part of the keys.

    Of draft 7, because Taplo, by which editors read TOML, knows none that is newer.
    """
    schema = msgspec.json.schema(Part)
    root = schema["$defs"].pop(schema.pop("$ref").rpartition("/")[2])
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "GENERATED by 'nox -s docs' from images/schema.py; do not edit.",
    }
    about = {"title": "Catalog file or fragment", "description": "It holds a part of these keys."}
    return json.dumps({**head, **root, **about, **schema}, indent=1, ensure_ascii=False) + "\n"

"""What is in a layer, where two differ, and that every known breaker of a rebuild is found."""

from __future__ import annotations

import hashlib
import io
import py_compile
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import IO, Any

import pytest

from images.building import contents
from images.building.contents import Difference, Entry, Part

TIME = 1686355200
SITE = "opt/rollout/lib/python3.11/site-packages"


@dataclass(frozen=True)
class Item:
    """An entry as a layer's tar has it; what it is not given is as in every good layer."""

    path: str
    content: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = TIME
    xattrs: Mapping[str, str] = field(default_factory=dict)


def entries(stream: IO[bytes]) -> list[Entry]:
    """The entries of a layer, without their bytes."""
    return [entry for entry, _ in contents.read(stream)]


def tarred(*items: Item) -> io.BytesIO:
    """A tar of these entries, in their order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            info = tarfile.TarInfo(item.path)
            info.size, info.type, info.linkname = len(item.content), item.type, item.link
            info.mode, info.uid, info.gid, info.mtime = item.mode, item.uid, item.gid, item.mtime
            info.pax_headers = {f"SCHILY.xattr.{k}": v for k, v in item.xattrs.items()}
            tar.addfile(info, io.BytesIO(item.content))
    stream.seek(0)
    return stream


def layer(*items: Item) -> list[Entry]:
    return entries(tarred(*items))


def only(item: Item) -> Entry:
    (entry,) = layer(item)
    return entry


def folder(path: str) -> Item:
    return Item(path, type=tarfile.DIRTYPE, mode=0o755)


def link(path: str, target: str) -> Item:
    return Item(path, type=tarfile.SYMTYPE, link=target, mode=0o777)


# Reading


def test_a_file_is_read_with_all_that_a_layer_keeps_of_it() -> None:
    content = b"#!/bin/sh\nexec true\n"
    item = Item("usr/bin/x", content, mode=0o4755, uid=1000, gid=5, mtime=7)
    assert only(item) == Entry(
        path="usr/bin/x",
        type="file",
        content=hashlib.sha256(content).hexdigest(),
        mode=0o4755,
        owner="1000:5",
        mtime=7,
        xattrs=(),
        size=len(content),
        head=content[:16],
    )


def test_a_file_larger_than_one_read_is_hashed_whole() -> None:
    content = b"first" + bytes(contents._PIECE) + b"last"
    entry = only(Item("a", content))
    assert entry.content == hashlib.sha256(content).hexdigest()
    assert (entry.size, entry.head) == (len(content), content[:16])


def test_a_mode_is_read_without_the_type_that_some_builders_write_into_it() -> None:
    header = bytearray(tarfile.TarInfo("a").tobuf())
    header[100:108] = b"0100755\0"
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:156] = b"%06o\0 " % sum(header)
    assert [e.mode for e in entries(io.BytesIO(header + bytes(1024)))] == [0o755]


def test_an_empty_file_has_the_digest_of_nothing() -> None:
    entry = only(Item("a"))
    assert (entry.content, entry.size, entry.head) == (hashlib.sha256().hexdigest(), 0, b"")


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        (tarfile.DIRTYPE, "", "folder"),
        (tarfile.SYMTYPE, "../a", "link"),
        (tarfile.LNKTYPE, "usr/a", "hard link"),
        (tarfile.CHRTYPE, "", "device"),
        (tarfile.BLKTYPE, "", "device"),
        (tarfile.FIFOTYPE, "", "pipe"),
    ],
)
def test_what_is_no_file_is_read_as_what_it_is(kind: bytes, target: str, name: str) -> None:
    entry = only(Item("b", type=kind, link=target))
    assert (entry.type, entry.content, entry.size, entry.head) == (name, target, 0, b"")


@pytest.mark.parametrize("path", ["usr/bin", "./usr/bin", "usr/bin/", "./usr/bin/", "/usr/bin"])
def test_a_path_is_the_same_however_a_tar_spells_it(path: str) -> None:
    assert only(folder(path)).path == "usr/bin"


def test_extended_attributes_are_read_and_no_other_header() -> None:
    item = Item("a", b"x", mtime=1.5, xattrs={"user.y": "2", "user.x": "1"})
    entry = only(item)
    assert entry.xattrs == (("SCHILY.xattr.user.x", "1"), ("SCHILY.xattr.user.y", "2"))
    assert entry.mtime == 1.5  # the tar has this one in a header too


def test_the_content_is_kept_of_what_is_asked_for_alone() -> None:
    stream = tarred(Item("a", b"one"), Item("b", b"two"), folder("c"))
    found = contents.read(stream, lambda path: path == "b")
    assert [(entry.path, kept) for entry, kept in found] == [("a", b""), ("b", b"two"), ("c", b"")]


def test_entries_come_in_the_order_of_the_tar_which_is_read_to_its_end() -> None:
    stream = tarred(Item("b", b"x"), Item("a", b"y"))
    assert [entry.path for entry in entries(stream)] == ["b", "a"]
    assert stream.read() == b""


def test_a_layer_is_loaded_with_the_distributions_of_its_folders(tmp_path: Path) -> None:
    record = f"{SITE}/demo-1.0.dist-info/RECORD"
    items = [Item(f"{SITE}/demo/a.py", b"a = 1\n"), Item(record, b"demo/a.py,sha256=x,6\n")]
    (tmp_path / "blob").write_bytes(tarred(*items).getvalue())
    found, owners = contents.load(tmp_path / "blob")
    assert found == layer(*items)
    assert owners == {"site-packages/demo": "demo"}


# Differences


GOOD = (
    folder("usr"),
    Item("usr/a", b"one", xattrs={"user.x": "1"}),
    link("usr/b", "a"),
    Item("usr/c", b"three"),
)


def changed(path: str, **values: Any) -> list[Entry]:
    """The good layer with one entry changed."""
    return layer(*(replace(item, **values) if item.path == path else item for item in GOOD))


def test_equal_layers_have_no_difference() -> None:
    assert contents.differences(layer(*GOOD), layer(*GOOD)) == []
    assert contents.differences([], []) == []


@pytest.mark.parametrize(
    ("path", "values", "kinds", "detail"),
    [
        ("usr/a", {"type": tarfile.FIFOTYPE, "content": b""}, ("type", "content"), "file and pipe"),
        ("usr/a", {"content": b"other"}, ("content",), "3 and 5 bytes"),
        ("usr/a", {"content": b"two"}, ("content",), "3 bytes each"),
        ("usr/b", {"link": "c"}, ("content",), "a and c"),
        ("usr/a", {"mode": 0o600}, ("mode",), "644 and 600"),
        ("usr", {"mode": 0o2775}, ("mode",), "755 and 2775"),
        ("usr/a", {"uid": 1000}, ("owner",), "0:0 and 1000:0"),
        ("usr/a", {"gid": 5}, ("owner",), "0:0 and 0:5"),
        ("usr", {"mtime": 1}, ("mtime",), f"{TIME} and 1"),
        (
            "usr/a",
            {"xattrs": {"user.x": "2"}},
            ("xattr",),
            "SCHILY.xattr.user.x='1' and SCHILY.xattr.user.x='2'",
        ),
        ("usr/a", {"xattrs": {}}, ("xattr",), "SCHILY.xattr.user.x='1' and none"),
        (
            "usr/a",
            {"content": b"two", "mode": 0o600, "uid": 1, "mtime": 1, "xattrs": {}},
            ("content", "mode", "owner", "mtime", "xattr"),
            "3 bytes each",
        ),
    ],
)
def test_a_difference_is_named_with_its_path_and_its_kinds(
    path: str, values: dict[str, Any], kinds: tuple[str, ...], detail: str
) -> None:
    found = contents.differences(layer(*GOOD), changed(path, **values))
    assert found == [Difference(path, kinds, detail)]
    assert set(kinds) <= set(contents.KINDS)
    assert str(found[0]) == f"{path}: {', '.join(kinds)} ({detail})"


def test_what_one_layer_alone_has_is_missing_or_added() -> None:
    more, fewer = layer(*GOOD), layer(*GOOD[:-1])
    assert contents.differences(more, fewer) == [Difference("usr/c", ("missing",))]
    assert contents.differences(fewer, more) == [Difference("usr/c", ("added",))]
    assert str(contents.differences(fewer, more)[0]) == "usr/c: added"


def test_another_order_is_named_once_with_the_first_entry_that_moved() -> None:
    first, second = layer(*GOOD), layer(GOOD[0], *GOOD[2:], GOOD[1])
    detail = "where one has it, the other has usr/b"
    assert contents.differences(first, second) == [Difference("usr/a", ("order",), detail)]


def test_an_entry_more_is_no_other_order() -> None:
    first, second = layer(*GOOD), layer(Item("new"), *GOOD)
    assert contents.differences(first, second) == [Difference("new", ("added",))]


def test_an_order_is_compared_beside_what_is_missing() -> None:
    found = contents.differences(layer(*GOOD), layer(GOOD[0], GOOD[3], GOOD[2]))
    assert [(d.path, d.kinds) for d in found] == [("usr/a", ("missing",)), ("usr/b", ("order",))]


# Summaries


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("bin", "bin"),
        ("etc", "etc"),
        ("etc/ssl/openssl.cnf", "etc"),
        ("usr/bin/x", "usr/bin"),
        ("usr/lib/python3.11/os.py", "usr/lib/python3.11"),
        ("opt/rollout/bin/python", "opt/rollout"),
        (SITE, "opt/rollout"),
        (f"{SITE}/six.py", "site-packages/six.py"),
        (f"{SITE}/torch", "site-packages/torch"),
        (f"{SITE}/torch/lib/libtorch.so", "site-packages/torch"),
        (f"{SITE}/nvidia/__init__.py", "site-packages/nvidia"),
        (f"{SITE}/nvidia/nccl/lib/libnccl.so.2", "site-packages/nvidia/nccl"),
        (f"{SITE}/nvidia_nccl-2.0.dist-info/RECORD", "site-packages/nvidia_nccl-2.0.dist-info"),
    ],
)
def test_an_entry_is_counted_with_its_package_or_folder(path: str, part: str) -> None:
    assert contents.part_of(path) == part


ITEMS = (
    folder("usr/bin"),
    Item("usr/bin/x", b"12345", xattrs={"user.x": "1"}),
    link("usr/bin/y", "x"),
    folder(f"{SITE}/demo"),
    Item(f"{SITE}/demo/a.py", b"123"),
    Item(f"{SITE}/demo/b.py", b"1234"),
)


def summary(items: Sequence[Item]) -> contents.Summary:
    return contents.summary(layer(*items), {"site-packages/demo": "demo"})


def test_a_summary_counts_files_and_bytes_by_folder_and_says_whose_they_are() -> None:
    parts = summary(ITEMS).parts
    assert {name: (part.owner, part.files, part.bytes) for name, part in parts.items()} == {
        "usr/bin": ("-", 1, 5),
        "site-packages/demo": ("demo", 2, 7),
    }


def test_a_part_is_read_as_it_was_written() -> None:
    for part in summary(ITEMS).parts.values():
        assert Part.parse(str(part)) == part


@pytest.mark.parametrize("text", ["", "- 1 2 abc", "- 1 2 abc def more", "- one 2 abc def"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        Part.parse(text)


def test_equal_layers_have_equal_summaries() -> None:
    assert summary(ITEMS) == summary(ITEMS)
    assert contents.explained(summary(ITEMS), summary(ITEMS)) == []


def test_a_time_is_the_same_in_a_header_of_its_own() -> None:
    """A tar may say a whole second in the entry, or as a decimal in a header before it."""
    one, two = layer(Item("a", mtime=TIME)), layer(Item("a", mtime=float(TIME)))
    assert contents.differences(one, two) == []
    assert contents.explained(contents.summary(one, {}), contents.summary(two, {})) == []


def test_a_name_in_no_encoding_has_its_summary() -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    one, two = (contents.summary(layer(Item(n), Item("z")), {}) for n in (name, name + "e"))
    assert contents.explained(one, one) == []
    assert contents.explained(one, two) != []


def with_change(path: str, **values: Any) -> list[Item]:
    return [replace(item, **values) if item.path == path else item for item in ITEMS]


DEMO, WHOLE = "site-packages/demo", "the whole layer"


@pytest.mark.parametrize(
    ("items", "place", "kinds"),
    [
        pytest.param(ITEMS[:3], DEMO, ("missing",), id="missing"),
        pytest.param([*ITEMS, Item("etc/x")], "etc", ("added",), id="added"),
        pytest.param(
            with_change(f"{SITE}/demo/a.py", content=b"124"), DEMO, ("content",), id="content"
        ),
        pytest.param(ITEMS[:-1], DEMO, ("content", "mode"), id="file missing"),
        pytest.param(
            with_change("usr/bin/x", type=tarfile.FIFOTYPE, content=b""),
            "usr/bin",
            ("content",),
            id="type",
        ),
        pytest.param(
            with_change("usr/bin/y", type=tarfile.LNKTYPE), "usr/bin", ("content",), id="link type"
        ),
        pytest.param(with_change("usr/bin/y", link="z"), "usr/bin", ("content",), id="link"),
        pytest.param(with_change("usr/bin/x", mode=0o755), "usr/bin", ("mode",), id="mode"),
        pytest.param(with_change("usr/bin/x", uid=1), WHOLE, ("owner",), id="owner"),
        pytest.param(with_change("usr/bin/x", mtime=1), WHOLE, ("mtime",), id="mtime"),
        pytest.param(with_change("usr/bin/x", xattrs={}), WHOLE, ("xattr",), id="xattr"),
        pytest.param(ITEMS[::-1], WHOLE, ("order",), id="order"),
        pytest.param(
            [replace(item, uid=1, mtime=1, xattrs={}) for item in ITEMS[::-1]],
            WHOLE,
            ("owner", "mtime", "xattr", "order"),
            id="all at once",
        ),
    ],
)
def test_two_summaries_name_the_folder_or_the_whole_layer_and_the_kinds(
    items: Sequence[Item], place: str, kinds: tuple[str, ...]
) -> None:
    found = contents.explained(summary(ITEMS), summary(items))
    assert [(difference.path, difference.kinds) for difference in found] == [(place, kinds)]


def test_a_folder_that_differs_is_named_with_its_files_and_bytes() -> None:
    found = contents.explained(summary(ITEMS), summary(ITEMS[:-1]))
    assert [d.detail for d in found] == ["2 files of 7 bytes, and 1 of 3"]


def test_a_mode_and_a_time_are_both_named() -> None:
    items = with_change("usr/bin/x", mode=0o755, mtime=1)
    found = contents.explained(summary(ITEMS), summary(items))
    assert [(d.path, d.kinds) for d in found] == [("usr/bin", ("mode",)), (WHOLE, ("mtime",))]


# Whose a folder is


def test_a_folder_is_the_distribution_s_that_brings_most_of_it() -> None:
    found = contents.owners(
        {
            f"{SITE}/Small_One-1.0.dist-info/RECORD": b"shared/a.py,sha256=x,10\nsmall.py,,\n",
            f"{SITE}/large-2.0.dist-info/RECORD": (
                b"shared/b.py,sha256=x,11\nlarge-2.0.dist-info/RECORD,,\n../../../bin/large,x,5\n"
            ),
        }
    )
    assert found == {
        "site-packages/shared": "large",
        "site-packages/small.py": "small-one",
        "site-packages/large-2.0.dist-info": "large",
    }


def test_each_of_nvidia_s_folders_has_its_own_distribution() -> None:
    found = contents.owners(
        {
            f"{SITE}/nvidia_nccl_cu12-2.27.dist-info/RECORD": b"nvidia/nccl/lib/x.so,x,9\n",
            f"{SITE}/nvidia_cudnn_cu12-9.1.dist-info/RECORD": b"nvidia/cudnn/lib/y.so,x,9\n",
        }
    )
    assert found == {
        "site-packages/nvidia/nccl": "nvidia-nccl-cu12",
        "site-packages/nvidia/cudnn": "nvidia-cudnn-cu12",
    }


def test_what_a_distribution_carries_of_another_is_not_that_other() -> None:
    """setuptools brings older copies of packages, dist-info and all, that are installed too."""
    found = contents.owners(
        {
            f"{SITE}/packaging-25.0.dist-info/RECORD": b"packaging/a.py,x,5\n",
            f"{SITE}/setuptools/_vendor/packaging-24.2.dist-info/RECORD": b"packaging/a.py,x,9\n",
        }
    )
    assert found == {"site-packages/packaging": "packaging"}


def test_a_record_outside_of_the_environment_says_nothing() -> None:
    path = "usr/lib/python3/dist-packages/demo-1.0.dist-info/RECORD"
    assert contents.owners({path: b"demo/a.py,x,5\n"}) == {}


# Rules


def breakers(entry: Entry) -> set[str]:
    """The rules that an entry breaks."""
    return {name for name, rule in contents.rules(TIME).items() if rule.broken(entry)}


def compiled(folder: Path, mode: PycInvalidationMode) -> bytes:
    """Bytecode as Python itself writes it (PEP 552)."""
    source, target = folder / "a.py", folder / "a.pyc"
    source.write_text("answer = 42\n", encoding="utf-8")
    py_compile.compile(str(source), str(target), doraise=True, invalidation_mode=mode)
    return target.read_bytes()


PYC = f"{SITE}/demo/__pycache__/a.cpython-311.pyc"


@pytest.mark.parametrize(
    "mode", [PycInvalidationMode.TIMESTAMP, PycInvalidationMode.CHECKED_HASH], ids=str
)
def test_bytecode_with_a_time_or_compared_with_its_source_is_found(
    tmp_path: Path, mode: PycInvalidationMode
) -> None:
    assert breakers(only(Item(PYC, compiled(tmp_path, mode)))) == {"bytecode"}


@pytest.mark.parametrize("place", [PYC, "usr/lib/python3.11/__pycache__/os.cpython-311.pyc"])
def test_bytecode_that_no_import_compares_is_left_alone(tmp_path: Path, place: str) -> None:
    content = compiled(tmp_path, PycInvalidationMode.UNCHECKED_HASH)
    assert breakers(only(Item(place, content))) == set()


def test_a_hard_link_to_bytecode_is_judged_by_the_file_it_names() -> None:
    assert breakers(only(Item(PYC, type=tarfile.LNKTYPE, link="other.pyc"))) == set()


@pytest.mark.parametrize(
    "place",
    [
        "usr/share/gdb/__pycache__/a.cpython-311.pyc",
        "usr/lib/python3/dist-packages/__pycache__/a.cpython-311.pyc",
        "var/cache/rollout/__pycache__/a.cpython-311.pyc",
    ],
)
def test_bytecode_outside_of_the_compiled_trees_is_found(tmp_path: Path, place: str) -> None:
    content = compiled(tmp_path, PycInvalidationMode.UNCHECKED_HASH)
    assert "stray bytecode" in breakers(only(Item(place, content)))


@pytest.mark.parametrize("item", [Item("usr/a"), folder("usr"), link("usr/b", "a")])
@pytest.mark.parametrize("mtime", [0, TIME - 1, TIME + 0.5, TIME + 86400])
def test_a_time_of_its_own_is_found_on_every_kind_of_entry(item: Item, mtime: float) -> None:
    assert breakers(only(item)) == set()
    assert breakers(only(replace(item, mtime=mtime))) == {"timestamp"}


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("var/cache/ldconfig/aux-cache", "ldconfig"),
        ("var/log/dpkg.log", "logs"),
        ("var/log/apt/history.log", "logs"),
        ("etc/apt/sources.list", "apt"),
        ("var/lib/apt/lists/lock", "apt"),
        ("var/cache/apt/pkgcache.bin", "apt"),
        ("etc/passwd-", "apt"),
        ("etc/group-", "apt"),
        ("etc/shadow-", "apt"),
        ("etc/gshadow-", "apt"),
        ("etc/.pwd.lock", "apt"),
        ("var/lib/dpkg/status-old", "apt"),
        ("var/lib/dpkg/diversions-old", "apt"),
        ("var/lib/dpkg/lock", "apt"),
        ("var/lib/dpkg/lock-frontend", "apt"),
        ("var/cache/debconf/config.dat-old", "apt"),
        ("etc/machine-id", "machine"),
        ("etc/hostname", "machine"),
        ("etc/resolv.conf", "machine"),
        ("etc/ssh/ssh_host_ed25519_key", "machine"),
        ("var/lib/dbus/machine-id", "machine"),
        (f"{SITE}/demo-1.0.dist-info/INSTALLER", "installer"),
        (f"{SITE}/demo-1.0.dist-info/REQUESTED", "installer"),
        (f"{SITE}/demo-1.0.dist-info/direct_url.json", "installer"),
        (f"{SITE}/demo-1.0.dist-info/uv_cache.json", "installer"),
        (f"{SITE}/demo-1.0.dist-info/uv_build.json", "installer"),
        ("opt/rollout/.lock", "installer"),
        ("tmp/x", "cache"),
        ("var/tmp/deep/x", "cache"),
        ("mnt/context", "cache"),
        ("run/lock/x", "cache"),
        ("root/.cache/x", "cache"),
        ("home/somebody/.cache/uv/x", "cache"),
        ("var/cache/rollout/x", "cache"),
        ("var/cache/rollout/torch/kernels/x", "cache"),
        ("usr/.wh.share", "removed"),
        (".wh.tmp", "removed"),
        (f"{SITE}/demo/.wh..wh..opq", "removed"),
    ],
)
def test_a_breaker_of_a_rebuild_is_found_by_its_rule(path: str, rule: str) -> None:
    assert breakers(only(Item(path, b"something"))) == {rule}


@pytest.mark.parametrize(
    "path",
    [
        "opt/rollout/.lock",
        f"{SITE}/demo-1.0.dist-info/REQUESTED",
        "var/lib/dpkg/lock",
        "var/log/btmp",
        "var/lib/dbus/machine-id",
        "tmp/x",
    ],
)
def test_what_differs_by_being_there_is_found_empty_too(path: str) -> None:
    assert breakers(only(Item(path))) != set()


def test_a_link_is_found_where_a_file_would_be() -> None:
    for path in ("tmp/x", "var/log/x", "etc/apt/x", "opt/rollout/.lock"):
        assert breakers(only(link(path, "y"))) != set()


@pytest.mark.parametrize(
    "item",
    [
        Item("etc/machine-id"),
        Item("etc/hostname"),
        Item("etc/resolv.conf"),
        Item("etc/hosts", b"127.0.0.1 localhost\n"),
        Item("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        Item("etc/ssh/ssh_config", b"Host *\n"),
        Item("var/lib/dpkg/status", b"Package: a\n"),
        Item("var/lib/dpkg/info/a.list", b"/.\n"),
        Item("etc/aptitude", b"x"),
        Item(f"{SITE}/setuptools/_vendor/wheel-0.45.1.dist-info/INSTALLER", b"uv\n"),
        Item(f"{SITE}/setuptools/_vendor/wheel-0.45.1.dist-info/REQUESTED"),
        Item(f"{SITE}/demo-1.0.dist-info/METADATA", b"Name: demo\n"),
        Item(f"{SITE}/demo/INSTALLER", b"x"),
        Item(f"{SITE}/demo/tmp/x", b"x"),
        Item(f"{SITE}/demo/var/log/x", b"x"),
        Item(f"{SITE}/demo/x.whl", b"x"),
        Item(f"{SITE}/filelock/.lock", b"x"),
        folder(f"{SITE}/demo/__pycache__"),
        folder("usr/lib/python3.11/__pycache__"),
        folder("var/log"),
        folder("var/log/apt"),
        folder("var/cache/ldconfig"),
        folder("var/cache/rollout"),
        folder("run/lock"),
        folder("tmp"),
        folder("root/.cache/uv"),
        Item("root/.bashrc", b"x"),
        link("var/run", "/run"),
    ],
    ids=lambda item: item.path,
)
def test_what_only_looks_like_a_breaker_is_left_alone(item: Item) -> None:
    assert breakers(only(item)) == set()


def test_every_rule_has_an_entry_here_that_breaks_it(tmp_path: Path) -> None:
    stamped = compiled(tmp_path, PycInvalidationMode.TIMESTAMP)
    bad = [
        Item(PYC, stamped),
        Item("usr/share/__pycache__/a.pyc", stamped),
        Item("a", mtime=1),
        Item("var/cache/ldconfig/aux-cache", b"x"),
        Item("var/log/dpkg.log", b"x"),
        Item("etc/passwd-", b"x"),
        Item("etc/machine-id", b"x"),
        Item("opt/rollout/.lock"),
        Item("tmp/x"),
        Item(".wh.x"),
    ]
    named = [sentence.split(":")[0] for sentence in contents.broken([layer(*bad)], TIME)]
    assert named == list(contents.rules(TIME))


# Files that are paid for twice


LARGE = b"x" * 1024


def test_a_file_that_two_layers_hold_is_found() -> None:
    for one, two in ((LARGE, LARGE), (b"one", b"two"), (LARGE, b"")):
        found = contents.twice([layer(Item("a", one), Item("b")), layer(Item("a", two))])
        assert found == ["a"]


def test_layers_need_not_be_neighbours() -> None:
    layers = [layer(Item("a", LARGE)), layer(Item("b")), layer(Item("a", LARGE))]
    assert contents.twice(layers) == ["a"]


def test_a_link_that_takes_the_place_of_a_file_is_found() -> None:
    assert contents.twice([layer(Item("a", b"x")), layer(link("a", "b"))]) == ["a"]


@pytest.mark.parametrize(
    "item",
    [Item("a"), Item("a", LARGE[:-1]), link("a", "b"), folder("a")],
    ids=["empty", "under 1 KiB", "link", "folder"],
)
def test_what_costs_nothing_twice_is_no_fault(item: Item) -> None:
    assert contents.twice([layer(item), layer(item)]) == []
    assert contents.broken([layer(item), layer(item)], TIME) == []


def test_a_program_whose_rights_the_last_layer_takes_is_no_fault() -> None:
    su, tame = Item("usr/bin/su", LARGE, mode=0o4755), Item("usr/bin/su", LARGE, mode=0o755)
    assert contents.twice([layer(su), layer(tame)]) == []
    assert contents.twice([layer(tame), layer(tame)]) == ["usr/bin/su"]
    assert contents.twice([layer(su), layer(Item("usr/bin/su", b"y", mode=0o755))]) == [
        "usr/bin/su"
    ]


def test_a_folder_is_no_file_twice() -> None:
    layers = [layer(folder("a")), layer(replace(folder("a"), mode=0o2775))]
    assert contents.twice(layers) == []
    assert contents.twice([layer(folder("a")), layer(Item("a", LARGE))]) == []


# Sentences


def test_a_good_image_breaks_nothing() -> None:
    assert contents.broken([layer(*GOOD), layer(*ITEMS[3:])], TIME) == []


def test_a_broken_rule_is_a_sentence_with_its_first_files() -> None:
    paths = ("a", "b", "c", "d", "e")
    layers = [layer(*(Item(f"tmp/{p}", p.encode()) for p in paths)), layer(Item("tmp/a", b"x"))]
    assert contents.broken(layers, TIME) == [
        "cache: a cache or temporary file: tmp/a, tmp/b, tmp/c and 3 more",
        "twice: in two layers: tmp/a",
    ]


def test_three_files_are_named_in_full() -> None:
    found = contents.broken([layer(*(Item(f"tmp/{p}") for p in "abc"))], TIME)
    assert found == ["cache: a cache or temporary file: tmp/a, tmp/b, tmp/c"]

"""A library that an image lacks is found before an engine misses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout import shared_objects, verify

from .conftest import SITE, found, put, shared_object


def test_a_library_that_is_nowhere_is_named_with_the_file_that_needs_it(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object(("libc.so.6", "libnowhere.so.7")))
    findings = shared_objects.libraries(prefix)
    assert found(findings) == f"{SITE}/demo/_c.so: needs libnowhere.so.7, which is nowhere"
    assert findings.metrics["unresolved"] == 1


def test_an_executable_is_looked_at_too(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/bin/tool", shared_object(("libnowhere.so.7",)), 0o755)
    assert "demo/bin/tool: needs libnowhere.so.7" in found(shared_objects.libraries(prefix))


def test_what_the_system_has_is_resolved(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object(("libc.so.6",)))
    findings = shared_objects.libraries(prefix)
    assert found(findings) == ""
    assert findings.metrics["objects"] == findings.metrics["needed"] == 1


def test_what_the_engine_loads_first_is_counted_not_reported(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object(("libengine.so.1",)))
    put(prefix, f"{SITE}/engine/libengine-123.so", shared_object(soname="libengine.so.1"))
    findings = shared_objects.libraries(prefix)
    assert found(findings) == ""
    assert findings.metrics["by_import_order"] == 1


def test_driver_libraries_are_expected_from_the_host(prefix: Path) -> None:
    needed = ("libcuda.so.1", "libnvidia-ml.so.1", "libnvcuvid.so.1")
    put(prefix, f"{SITE}/demo/_c.so", shared_object(needed))
    findings = shared_objects.libraries(prefix)
    assert found(findings) == ""
    assert findings.metrics["driver"] == 3


@pytest.mark.parametrize("library", ["libcudart.so.12", "libnvidia-made-up.so.1", "libcuda2.so.1"])
def test_what_only_resembles_a_driver_library_is_reported(prefix: Path, library: str) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object((library,)))
    assert f"needs {library}, which is nowhere" in found(shared_objects.libraries(prefix))


def test_an_optional_library_is_counted_not_reported(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object(("libmpi.so.40",)))
    assert "libmpi.so.40" in found(shared_objects.libraries(prefix))
    findings = shared_objects.libraries(prefix, optional=["libmpi.so.40"])
    assert found(findings) == ""
    assert findings.metrics["optional"] == 1


def test_libraries_of_other_machines_are_counted_not_loaded(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/arm.so", shared_object(("libnowhere.so.7",), machine=0x1234))
    put(prefix, f"{SITE}/demo/_c.so", shared_object())
    findings = shared_objects.libraries(prefix)
    assert found(findings) == ""
    assert findings.metrics["foreign"] == 1


@pytest.mark.parametrize("length", [70, 130, 200, 250])
def test_a_cut_off_library_is_named(prefix: Path, length: int) -> None:
    whole = shared_object(("libc.so.6",), soname="lib" + "x" * 100 + ".so")
    put(prefix, f"{SITE}/demo/_c.so", whole[:length])
    assert f"{SITE}/demo/_c.so: a broken ELF file" in found(shared_objects.libraries(prefix))


def test_a_symbol_version_that_the_system_lacks_is_seen_at_the_library_that_asks_for_it() -> None:
    text = (
        "/e/b.so: /lib/libc.so.6: version `GLIBC_2.40' not found (required by /e/a.so)\n"
        "\tlinux-vdso.so.1 (0x00007f4f94aa6000)\n"
        "\tlibc.so.6 => /lib/libc.so.6 (0x00007f4f94a94000)\n"
    )
    complaint = "/lib/libc.so.6: version `GLIBC_2.40' not found"
    assert shared_objects.parse_loader(0, text) == shared_objects.Loaded(
        (), (("/e/a.so", complaint),), ""
    )


def test_what_the_loader_refuses_keeps_its_last_words() -> None:
    text = "/e/b.so: error while loading shared libraries: /e/b.so: file too short\n"
    assert shared_objects.parse_loader(127, text).failure.endswith("file too short")
    assert shared_objects.parse_loader(-7, "").failure.startswith("ended by signal 7")


def test_what_a_library_below_lacks_is_reported_there_once(prefix: Path) -> None:
    put(prefix, f"{SITE}/demo/_c.so", shared_object((str(prefix / "libb.so"),)))
    put(prefix, "libb.so", shared_object(("libnowhere.so.7",)))
    assert (
        found(shared_objects.libraries(prefix))
        == "libb.so: needs libnowhere.so.7, which is nowhere"
    )


def test_an_environment_without_shared_objects_proves_nothing(prefix: Path) -> None:
    check = verify.run(prefix, ["libraries"])[0]
    assert check.status == "unproved"


@pytest.mark.parametrize(
    ("pattern", "library", "account"),
    [
        ("libmpi.so.40", "libmpi.so.40", "optional"),
        ("libmpi.so.40", "libmpi.so.401", "unresolved"),
        ("libavcodec.so.*", "libavcodec.so.62", "optional"),
        ("libavcodec.so.*", "libavcodec.so.", "optional"),
        ("libavcodec.so.*", "libAVcodec.so.62", "unresolved"),
        ("libavcodec.so.*", "xlibavcodec.so.62", "unresolved"),
        ("libavcodec.so.*", "libavcodec-so.62", "unresolved"),
        ("*", "libcuda.so.1", "driver"),
        ("*", "libtorch.so", "by_import_order"),
    ],
)
def test_an_optional_library_may_be_one_of_many_that_a_pattern_names(
    pattern: str, library: str, account: str
) -> None:
    assert shared_objects._account(library, {"libtorch.so"}, [pattern]) == account


def test_a_pattern_names_what_nothing_loads_and_nothing_else(prefix: Path) -> None:
    needed = ("libavcodec.so.58", "libavcodec.so.62", "libavutil.so.60")
    put(prefix, f"{SITE}/demo/_c.so", shared_object(needed))
    findings = shared_objects.libraries(prefix, optional=["libavcodec.so.*"])
    assert found(findings) == f"{SITE}/demo/_c.so: needs libavutil.so.60, which is nowhere"
    assert (findings.metrics["optional"], findings.metrics["unresolved"]) == (2, 1)

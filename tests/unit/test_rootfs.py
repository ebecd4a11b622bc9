"""How the base is made: without a mirror, the same everywhere, and compared with its lock."""

from __future__ import annotations

from pathlib import Path

from images.locking import rootfs

from .test_debian import DEB, GXX


def test_the_tar_is_made_without_any_network_mirror() -> None:
    argv = rootfs.mmdebstrap_argv(Path("/debs"), Path("/out.tar"), ("g++", "libc6"))
    assert argv[-1] == "deb [trusted=yes] copy:/debs ./"
    assert argv[-3] == ""  # a suite name would bring mmdebstrap's default mirror
    assert not any("://" in argument for argument in argv)
    assert "--variant=essential" in argv and "--include=g++,libc6" in argv


def test_the_packages_scripts_see_nothing_of_the_caller() -> None:
    seen = rootfs.build_environment({"LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo", "HOME": "/h"})
    assert seen["TZ"] == "UTC" and seen["LC_ALL"] == "C.UTF-8" and "LANG" not in seen
    assert seen["SOURCE_DATE_EPOCH"] == str(rootfs.EPOCH)


def test_licences_stay_in_the_image() -> None:
    options = list(rootfs._DPKG_OPTIONS)
    exclude = options.index("path-exclude=/usr/share/doc/*")
    assert options.index("path-include=/usr/share/doc/*/copyright") > exclude  # the last one wins


def test_an_image_that_differs_from_the_lock_is_found() -> None:
    def stanza(name: str, version: str, state: str = "installed") -> str:
        return f"Package: {name}\nStatus: install ok {state}\nVersion: {version}\n"

    good = stanza("g++", GXX.version) + "\n" + stanza("libc6", DEB.version)
    assert rootfs.differences([GXX, DEB], good) == []
    assert rootfs.differences([GXX, DEB], good + "\n" + stanza("perl", "5")) == [
        "perl=5 is installed but not locked"
    ]
    assert "libc6=2.36-9+deb12u10 is locked but not installed" in rootfs.differences(
        [GXX, DEB], stanza("g++", GXX.version) + "\n" + stanza("libc6", "2.36-9+deb12u13")
    )
    half = stanza("g++", GXX.version) + "\n" + stanza("libc6", DEB.version, "half-configured")
    assert "libc6 is half installed" in rootfs.differences([GXX, DEB], half)

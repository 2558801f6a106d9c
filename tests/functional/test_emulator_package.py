"""A package whose upgrade replaces the very QEMU that guests run under, by real apt and dpkg."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from tests.functional.aptroot import AptRoot
from tests.functional.cli import Lab, keepers
from tests.functional.conftest import make_cache
from tests.functional.daemon import DaemonLab
from tests.functional.test_handover import (
    SYSTEM,
    assert_no_tick_is_missing,
    assert_nothing_left,
    seqs,
    versions,
)
from tests.requirements import need

_NAME = "hu-emulator"
_PROGRAM = f"bin/{SYSTEM.name}"
_MODULES = f"lib/{sysconfig.get_config_var('MULTIARCH')}/qemu"


def modules(usr: Path) -> dict[str, Path]:
    """Those of the QEMU that is installed there, by their names in a package."""
    return {f"{_MODULES}/{path.name}": path for path in (usr / _MODULES).glob("*.so")}


@dataclass
class Packaged:
    """Guests under the QEMU of a package, whose files lie in ``place``."""

    apt: AptRoot
    place: Path
    base: Path
    lab: Lab
    newer: Build

    @property
    def program(self) -> Path:
        return self.place / _PROGRAM

    def emulators(self) -> set[Path]:
        """The files that the guests' QEMUs were started from."""
        guests = self.lab.run("guests", "--json").data["guests"]
        return {Path(f"/proc/{guest['pid']}/exe").readlink() for guest in guests}

    def build(self, version: str, files: Mapping[str, str | Path]) -> None:
        at = str(self.place)[1:]
        self.apt.build(_NAME, version, {f"{at}/{name}": what for name, what in files.items()})

    def manifest(self, text: str) -> Path:
        path = self.base / "update.toml"
        path.write_text(f'[update]\nname = "qemu"\n{text}')
        return path


@pytest.fixture(scope="module")
def packaged(newer_qemu: Build) -> Iterator[Packaged]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-e-", dir="/var/tmp"))
    base.chmod(0o755)
    (base / "state").mkdir(mode=0o700)
    ram, place = base / "ram", base / "place"
    ram.mkdir()
    place.mkdir()
    apt = AptRoot(base)
    inside = apt.root / str(place)[1:]  # where apt's root has what guests' QEMUs have
    inside.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", ram], check=True)
    subprocess.run(["mount", "--bind", inside, place], check=True)
    try:
        bundle = place / "bin/qemu-bundle/usr"  # instead of the host's directories
        (bundle / _MODULES).parent.mkdir(parents=True)
        (bundle / "share").symlink_to("/usr/share")
        (bundle / "lib/ipxe").symlink_to("/usr/lib/ipxe")
        (bundle / _MODULES).symlink_to(place / _MODULES)
        made = Packaged(apt, place, base, None, newer_qemu)  # type: ignore[arg-type]
        made.build("7", {_PROGRAM: SYSTEM, **modules(Path("/usr"))})
        apt.install(_NAME)
        lab = DaemonLab(base, make_cache(base / "state"), 2, ram, emulator=made.program)
        config = base / "hostupdate.toml"
        config.write_text(
            f'[paths]\nlibvirt-hooks = "{base}/etc/hooks"\n'
            f'libvirt-saves = "{base}/lib/qemu/save"\nbuilds = "{base}/builds"\n'
            "[clock]\ntrust-host = true\n"
        )
        options = ("--connect", lab.daemon.uri, "--config", str(config))
        made.lab = Lab(lab.lab.run.with_options(*options), lab.lab.names)
        yield made
        lab.remove()
    finally:
        subprocess.run(["umount", "--lazy", place, ram], check=True)
        shutil.rmtree(base)


@pytest.fixture
def upgrade(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packaged]:
    for name, value in packaged.apt.environment.items():
        monkeypatch.setenv(name, value)
    yield packaged
    packaged.lab.assert_healthy()
    assert packaged.lab.run("status", "--json").data["interrupted"] is None
    assert_nothing_left(packaged.base)


UPGRADE = f'[packages]\nupgrade = ["{_NAME}"]\n'


def test_guests_come_under_the_qemu_of_the_new_package(
    upgrade: Packaged, newer_qemu: Build
) -> None:
    usr = newer_qemu.directory / "usr"
    upgrade.build("10", {_PROGRAM: usr / "bin" / SYSTEM.name, **modules(usr)})
    before = seqs(upgrade.lab)
    assert versions(upgrade.lab) == {builds.version(SYSTEM)}
    ended = upgrade.lab.apply(upgrade.manifest(UPGRADE))
    assert ended.code == 0, ended.data["reasons"]
    assert ended.data["impact"]["actual"] == "handover"
    assert upgrade.apt.installed() == {_NAME: "10"}
    assert versions(upgrade.lab) == {builds.version(newer_qemu.wrapper)}
    assert upgrade.emulators() == {upgrade.program}
    assert all(guest["residency"]["digest_equal"] for guest in ended.data["guests"])
    assert list((upgrade.base / "builds").iterdir()) == []
    assert_no_tick_is_missing(upgrade.lab, before)


def test_the_replaced_qemu_takes_its_guests_back(upgrade: Packaged, newer_qemu: Build) -> None:
    """The new one loads in the rehearsal and not in earnest. Its package goes, too; the guest that
    was parked runs from what was kept, until an update takes it elsewhere."""
    name = upgrade.lab.names[0]
    real = "bin/real"  # beside what it takes for the host's directories
    script = upgrade.base / "script"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *guest={name},*-incoming*) exit 1 ;; esac\n'
        f'exec {upgrade.place}/{real} "$@"\n'
    )
    script.chmod(0o755)
    usr = newer_qemu.directory / "usr"
    upgrade.build("11", {_PROGRAM: script, real: usr / "bin" / SYSTEM.name, **modules(usr)})
    before = seqs(upgrade.lab)
    ended = upgrade.lab.apply(upgrade.manifest(UPGRADE))
    assert ended.code == 40, ended.data["reasons"]
    assert upgrade.apt.installed() == {_NAME: "10"}
    assert_no_tick_is_missing(upgrade.lab, before)

    (kept,) = (upgrade.base / "builds").iterdir()
    assert any(path.is_relative_to(kept) for path in upgrade.emulators())
    notes = {guest["name"]: " ".join(guest["notes"]) for guest in ended.data["guests"]}
    assert "it is under its old QEMU again" in notes[name]

    ended = upgrade.lab.apply(upgrade.manifest(f'[qemu]\nprogram = "{upgrade.program}"\n'))
    assert ended.code == 0, ended.data["reasons"]
    assert upgrade.emulators() == {upgrade.program}
    assert list((upgrade.base / "builds").iterdir()) == []
    assert_no_tick_is_missing(upgrade.lab, before)


def test_a_run_that_was_killed_leaves_guests_where_they_were(
    upgrade: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was paused under the new QEMU already goes back, before its package does."""
    old = versions(upgrade.lab)
    upgrade.build("12", {_PROGRAM: SYSTEM, **modules(Path("/usr"))})
    before = seqs(upgrade.lab)
    with monkeypatch.context() as fault:
        fault.setenv("HOSTUPDATE_FAULT", "unpark.end=stop")
        manifest = upgrade.manifest(UPGRADE)
        process = upgrade.lab.run.start("apply", str(manifest), "--json", "--yes")
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    for pid in [*keepers(upgrade.lab), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert upgrade.apt.installed() == {_NAME: "12"}
    resumed = upgrade.lab.run("resume", "--json")
    assert resumed.code == 0, resumed.out
    assert upgrade.apt.installed() == {_NAME: "10"}
    assert versions(upgrade.lab) == old
    assert_no_tick_is_missing(upgrade.lab, before)
    ended = upgrade.lab.apply(upgrade.manifest(f'[qemu]\nprogram = "{upgrade.program}"\n'))
    assert ended.code == 0, ended.data["reasons"]
    assert upgrade.emulators() == {upgrade.program}

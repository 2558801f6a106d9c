"""QEMU builds beside each other, made of real packages and the real installed QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hostupdate.errors import PrerequisiteError
from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from tests.requirements import NOBODY, need

#: A QEMU reads its firmware, and of its modules all that hold a device, and ends.
_DEVICES = ("-device", "help")


def system_qemu() -> Path:
    need("qemu")
    return Path(shutil.which("qemu-system-x86_64") or "")


def devices(program: Path) -> set[str]:
    said = subprocess.run(
        [program, *_DEVICES], capture_output=True, text=True, timeout=60, check=True, env={}
    )
    assert not said.stderr
    return {line for line in said.stdout.splitlines() if line.startswith("name ")}


def test_the_installed_qemu_is_kept_whole(tmp_path: Path) -> None:
    system = system_qemu()
    probed = system.resolve().stat().st_ctime_ns  # libvirt's mark of a QEMU that it has probed
    build = builds.keep(system, tmp_path / "old")
    assert builds.version(build.wrapper) == builds.version(system)
    assert devices(build.wrapper) == devices(system)
    assert system.resolve().stat().st_ctime_ns == probed
    inode = build.wrapper.stat().st_ino
    assert builds.keep(system, tmp_path / "old") == build
    assert build.wrapper.stat().st_ino == inode, "made anew although it was whole"


def test_a_kept_qemu_needs_nothing_of_its_package(tmp_path: Path) -> None:
    """Everything that a guest start opens comes from the build, or is not QEMU's."""
    build = builds.keep(system_qemu(), tmp_path / "old")
    argv = ["strace", "-f", "-qq", "-e", "trace=openat,execve", str(build.wrapper)]
    argv += ["-nodefaults", "-display", "none", "-device", "virtio-net-pci", "-device", "VGA"]
    argv += ["-device", "qxl", "-S", "-monitor", "stdio"]
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    said = subprocess.run(
        argv, input="quit\n", capture_output=True, text=True, timeout=120, check=True
    )
    opened = [line for line in said.stderr.splitlines() if "ENOENT" not in line]
    assert any(f"{tmp_path}/old/data" in line and "bios" in line for line in opened)
    assert any(f"{tmp_path}/old/modules" in line and "qxl" in line for line in opened)
    assert not [line for line in opened if '"/usr' in line and "qemu" in line]


def test_other_users_run_it_whatever_our_umask_is() -> None:
    """pytest's own directories are closed to them."""
    need("root", "nobody")
    with TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        before = os.umask(0o077)
        try:
            build = builds.keep(system_qemu(), Path(name) / "old")
        finally:
            os.umask(before)
        argv = [*NOBODY, str(build.wrapper), *_DEVICES]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0 and "virtio-net-pci" in ended.stdout, ended.stderr
        assert builds.closed_to_others(build.wrapper) is None


def test_a_newer_qemu_runs_beside_the_old_one(newer_qemu: Build) -> None:
    system = system_qemu()
    assert builds.version(newer_qemu.wrapper) != builds.version(system)
    assert len(devices(newer_qemu.wrapper)) > 100


def test_a_qemu_brings_its_own_glibc(foreign_qemu: Build) -> None:
    assert len(devices(foreign_qemu.wrapper)) > 100


def test_what_a_qemu_lacks_is_named(foreign_qemu: Build, tmp_path: Path) -> None:
    archives = foreign_qemu.directory.parent / "cache/archives"
    with pytest.raises(PrerequisiteError, match=r"GLIBC_2.* not found") as refused:
        builds.unpack(sorted(archives.glob("qemu-system-*.deb")), tmp_path / "new")
    assert "lib" in str(refused.value) and refused.value.remedy
    assert not (tmp_path / "new").exists()


def test_packages_without_a_qemu_are_refused(foreign_qemu: Build, tmp_path: Path) -> None:
    archives = foreign_qemu.directory.parent / "cache/archives"
    with pytest.raises(PrerequisiteError, match="hold no qemu-system-x86_64"):
        builds.unpack(list(archives.glob("seabios_*.deb")), tmp_path / "new")
    rpm = tmp_path / "qemu-kvm-9.0.rpm"
    rpm.touch()
    with pytest.raises(PrerequisiteError, match=r"qemu-kvm-9.0.rpm: only Debian packages"):
        builds.unpack([rpm], tmp_path / "new")
    broken = tmp_path / "qemu.deb"
    broken.write_text("no archive")
    with pytest.raises(PrerequisiteError, match="dpkg-deb"):
        builds.unpack([broken], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_half_made_build_is_made_anew_and_a_removed_one_is_gone(tmp_path: Path) -> None:
    into = tmp_path / "old"
    (into / "bin").mkdir(parents=True)
    (into / "bin/stray").touch()
    build = builds.keep(system_qemu(), into)
    assert not (into / "bin/stray").exists()
    builds.remove(build)
    assert not into.exists()
    builds.remove(build)


def test_what_is_no_qemu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no such QEMU"):
        builds.keep(tmp_path / "qemu", tmp_path / "old")
    with pytest.raises(PrerequisiteError):
        builds.version(Path("/bin/true"))
    with pytest.raises(PrerequisiteError):
        builds.version(tmp_path / "qemu")


def test_a_directory_closed_to_guests_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    build = closed / "build"
    build.mkdir(parents=True)
    for above in tmp_path.parents:
        if above.stat().st_uid == os.getuid() and "pytest" in above.name:
            above.chmod(0o755)
    tmp_path.chmod(0o755)
    closed.chmod(0o755)
    assert builds.closed_to_others(build) is None
    closed.chmod(0o700)
    assert builds.closed_to_others(build) == closed

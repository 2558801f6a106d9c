"""What a host must have for a run, looked at one by one. Nothing is changed."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from hostupdate.errors import PrerequisiteError
from hostupdate.host.cgroups import find_cgroup2


class Grade(StrEnum):
    """How a check went. MISSING keeps runs from working, POOR makes them worse."""

    OK = "ok"
    POOR = "poor"
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One prerequisite: what was found, and the command or change that mends it."""

    name: str
    grade: Grade
    found: str
    remedy: str = ""


def check_host(cgroup2: str) -> list[Finding]:
    """Everything that does not need libvirt. ``cgroup2`` is the configured mount, or empty."""
    checks: list[Callable[[], Finding]] = [
        _root,
        lambda: _cgroup2(cgroup2),
        lambda: _memory_controller(cgroup2),
        _pidfd,
        _qemu,
        _swap,
        _kvm,
        _shared_memory,
    ]
    return [check() for check in checks]


def check_lab() -> list[Finding]:
    """What `lab up` needs on top: it builds an initramfs and downloads packages."""
    wanted = {
        "cc": "apt-get install -y gcc libc6-dev",
        "apt-get": "lab guests are built from Debian packages: use a Debian host",
        "dpkg-deb": "apt-get install -y dpkg",
    }
    found = [_program(f"lab: {name}", (name,), remedy) for name, remedy in wanted.items()]
    return [*found, _libvirt_user()]


def _libvirt_user() -> Finding:
    """libvirt's QEMU driver does not load without the user that its packager compiled in."""
    for user in ("libvirt-qemu", "qemu"):
        try:
            pwd.getpwnam(user)
        except KeyError:
            continue
        return Finding(name="lab: libvirt's user", grade=Grade.OK, found=user)
    return Finding(
        name="lab: libvirt's user",
        grade=Grade.MISSING,
        found="no user libvirt-qemu",
        remedy="apt-get install -y libvirt-daemon-system",
    )


def _program(name: str, candidates: tuple[str, ...], remedy: str) -> Finding:
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is not None:
            return Finding(name=name, grade=Grade.OK, found=path)
    return Finding(name=name, grade=Grade.MISSING, found="not installed", remedy=remedy)


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding(name="root", grade=Grade.OK, found="uid 0")
    return Finding(
        name="root", grade=Grade.MISSING, found=f"uid {os.geteuid()}", remedy="run it with sudo"
    )


def _cgroup2(configured: str) -> Finding:
    name = "cgroup v2 freezer"
    try:
        mount = find_cgroup2(configured)
    except PrerequisiteError as error:
        return Finding(name=name, grade=Grade.MISSING, found=str(error), remedy=error.remedy)
    if mount is None:
        return Finding(
            name=name,
            grade=Grade.POOR,
            found="no cgroup v2 tree: guests will be stopped by SIGSTOP",
            remedy="mkdir -p /sys/fs/cgroup/unified && "
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        )
    return Finding(name=name, grade=Grade.OK, found=str(mount))


def _memory_controller(configured: str) -> Finding:
    name = "memory.min"
    try:
        mount = find_cgroup2(configured)
        controllers = (mount / "cgroup.controllers").read_text().split() if mount else []
    except (PrerequisiteError, OSError):
        controllers = []
    if "memory" in controllers:
        return Finding(name=name, grade=Grade.OK, found="memory controller on cgroup v2")
    return Finding(
        name=name,
        grade=Grade.POOR,
        found="no memory controller on cgroup v2: shared guest RAM is locked instead",
        remedy="boot with systemd.unified_cgroup_hierarchy=1",
    )


def _pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Finding(
            name="pidfd",
            grade=Grade.MISSING,
            found=f"pidfd_open: {error.strerror}",
            remedy="use Linux 5.3 or newer",
        )
    return Finding(name="pidfd", grade=Grade.OK, found="available")


def _qemu() -> Finding:
    return _program(
        "QEMU",
        ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-system-aarch64"),
        "apt-get install -y qemu-system-x86",
    )


def _swap() -> Finding:
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    if not lines:
        return Finding(name="swap", grade=Grade.OK, found="none: guest RAM cannot be swapped out")
    return Finding(
        name="swap",
        grade=Grade.POOR,
        found=", ".join(line.split()[0] for line in lines) + ": guest RAM may be swapped out",
        remedy="give guests shared memory backing, so that it can be locked; or swapoff",
    )


def _kvm() -> Finding:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding(
            name="KVM", grade=Grade.OK, found="/dev/kvm opens (a lab probes whether it works)"
        )
    return Finding(
        name="KVM",
        grade=Grade.POOR,
        found="/dev/kvm cannot be opened: lab guests run under TCG",
        remedy="enable virtualization, modprobe kvm_intel or kvm_amd",
    )


def _shared_memory() -> Finding:
    status = os.statvfs("/dev/shm")
    free_bytes = status.f_bavail * status.f_frsize
    return Finding(name="/dev/shm", grade=Grade.OK, found=f"{free_bytes >> 20} MiB free")

"""What a test needs of the machine. A missing thing is a skip that says why; where
HOSTUPDATE_TEST_REQUIRE names it (comma-separated), it is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest


def _cgroup2() -> bool:
    return "cgroup2 " in Path("/proc/self/mountinfo").read_text()


#: Runs what follows as somebody who may nothing.
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def _nobody() -> bool:
    argv = [*NOBODY, sys.executable, "-c", "import hostupdate.cli"]
    if not shutil.which(argv[0]):
        return False
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


#: Runs what follows in a container of this machine's files: its usage is in the script.
BOOTED = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    str(Path(__file__).with_name("functional") / "booted"),
)


def _container() -> bool:
    if not all(map(shutil.which, ("unshare", "systemd-nspawn", "dbus-daemon", "systemd-inhibit"))):
        return False
    argv = [*BOOTED, "/mnt", "/mnt", "/mnt", "true"]
    return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 0


def _faults() -> bool:
    from hostupdate._core import lib

    return bool(lib.HU_FAULT_POINTS)


_CHECKS: dict[str, tuple[Callable[[], object], str]] = {
    "root": (lambda: os.geteuid() == 0, "must run as root"),
    "cgroup2": (_cgroup2, "no cgroup v2 tree is mounted"),
    "qemu": (lambda: shutil.which("qemu-system-x86_64"), "qemu-system-x86 is not installed"),
    "libvirt": (
        lambda: shutil.which("libvirtd") and shutil.which("virsh"),
        "libvirtd or virsh is not installed",
    ),
    "container": (
        _container,
        "systemd-container and dbus are not installed, or containers cannot be run here",
    ),
    "lab": (
        lambda: shutil.which("cc") and shutil.which("apt-get"),
        "cc and apt-get are needed to build lab guests",
    ),
    "c": (lambda: shutil.which("make") and shutil.which("gcc"), "make and gcc are needed"),
    "nobody": (_nobody, "another user cannot reach this interpreter and the package"),
    "systemd-analyze": (lambda: shutil.which("systemd-analyze"), "systemd is not installed"),
    "faults": (_faults, "the extension was built without HOSTUPDATE_FAULTS=1"),
    "strace": (lambda: shutil.which("strace"), "strace is not installed"),
    "qemus": (
        lambda: shutil.which("apt-get") and shutil.which("dpkg-deb"),
        "apt-get and dpkg-deb are needed to fetch another QEMU",
    ),
    "valgrind": (lambda: shutil.which("valgrind"), "valgrind is not installed"),
}


def need(*names: str) -> None:
    """Skips the test, or fails it where the thing is required, unless all are there."""
    for name in names:
        check, why = _CHECKS[name]
        if not check():
            lack(name, why)


def lack(name: str, why: str) -> NoReturn:
    """Skips the test for want of ``name``, or fails it where that is required."""
    if name in os.environ.get("HOSTUPDATE_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{name} is required here: {why}")
    pytest.skip(why)

"""Package managers' locks, held by real processes."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.host.package_locks import busy_locks

HOLD = """\
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
lock = struct.pack("hhqqi4x", getattr(fcntl, sys.argv[3]), 0, 0, 0, 0)
fcntl.fcntl(fd, getattr(fcntl, sys.argv[2]), lock)
print("locked", flush=True)
sys.stdin.read()
"""
Hold = Callable[..., int]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Locks a file below tmp_path by a process of its own, whose pid it returns."""
    holders: list[subprocess.Popen[bytes]] = []

    def hold(name: str, command: str = "F_SETLK", kind: str = "F_WRLCK") -> int:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-c", HOLD, str(path), command, kind]
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holders.append(holder)
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        return holder.pid

    yield hold
    for holder in holders:
        holder.communicate(timeout=20)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_host_without_package_managers_is_not_busy(tmp_path: Path) -> None:
    assert busy_locks(tmp_path) == ()


@pytest.mark.parametrize(
    "name",
    [
        "var/lib/dpkg/lock-frontend",
        "var/lib/dpkg/lock",
        "var/lib/apt/lists/lock",
        "var/cache/apt/archives/lock",
        "run/unattended-upgrades.lock",
        "var/lib/rpm/.rpm.lock",
        "usr/lib/sysimage/rpm/.rpm.lock",
        "run/dnf/rpmtransaction.lock",
    ],
)
def test_a_held_lock_is_told_with_its_holder(tmp_path: Path, hold: Hold, name: str) -> None:
    pid = hold(name)

    (reason,) = busy_locks(tmp_path)

    program = Path(f"/proc/{pid}/comm").read_text().strip()
    assert reason == f"/{name} is held by {program} (pid {pid})"


def test_a_lock_file_that_nobody_holds_says_nothing(tmp_path: Path) -> None:
    write(tmp_path / "var/lib/dpkg/lock", "")
    write(tmp_path / "run/zypp.pid", "")

    assert busy_locks(tmp_path) == ()


def test_looking_takes_no_lock_and_breaks_none(tmp_path: Path, hold: Hold) -> None:
    name = "var/lib/dpkg/lock"
    pid = hold(name)
    before = busy_locks(tmp_path)

    assert busy_locks(tmp_path) == before and str(pid) in before[0]
    fd = os.open(tmp_path / name, os.O_RDWR)
    with pytest.raises(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    os.close(fd)


def test_readers_are_no_rivals(tmp_path: Path, hold: Hold) -> None:
    hold("var/lib/rpm/.rpm.lock", kind="F_RDLCK")

    assert busy_locks(tmp_path) == ()


def test_a_holder_that_cannot_be_named_is_still_a_holder(tmp_path: Path, hold: Hold) -> None:
    hold("var/lib/dpkg/lock", command="F_OFD_SETLK")

    assert busy_locks(tmp_path) == ("/var/lib/dpkg/lock is held by a process",)


def test_one_lock_reached_by_two_paths_is_told_once(tmp_path: Path, hold: Hold) -> None:
    hold("usr/lib/sysimage/rpm/.rpm.lock")
    (tmp_path / "var/lib").mkdir(parents=True)
    (tmp_path / "var/lib/rpm").symlink_to("../../usr/lib/sysimage/rpm")

    assert len(busy_locks(tmp_path)) == 1


def test_a_pid_file_counts_while_that_process_lives(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    write(tmp_path / "var/cache/dnf/metadata_lock.pid", str(process.pid))
    try:
        (reason,) = busy_locks(tmp_path)
        assert reason.startswith("/var/cache/dnf/metadata_lock.pid is held by ")
        assert reason.endswith(f"(pid {process.pid})")
    finally:
        process.kill()
        process.wait()

    assert busy_locks(tmp_path) == ()


@pytest.mark.parametrize("text", ["", "no number", "-1", "../1", "\xb2"])
def test_a_pid_file_with_something_else_in_it_names_nobody(tmp_path: Path, text: str) -> None:
    write(tmp_path / "run/zypp.pid", text)

    assert busy_locks(tmp_path) == ()


def test_a_lock_that_cannot_be_looked_at_counts_as_held(tmp_path: Path) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/lock").symlink_to("lock")  # a loop: even root cannot open it

    (reason,) = busy_locks(tmp_path)

    assert reason.startswith("whether /var/lib/dpkg/lock is locked cannot be seen: Too many")

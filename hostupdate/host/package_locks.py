"""Whether a package manager is at work. Looks at its locks; takes none of them."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

#: Locked by fcntl(2) while in use: apt and dpkg (apt-pkg GetLock, dpkg file_lock), the
#: unattended-upgrade program (which lets go of the others between packages), rpm, dnf 5.
_LOCKED = (
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/lock",
    "var/lib/apt/lists/lock",
    "var/cache/apt/archives/lock",
    "run/unattended-upgrades.lock",
    "var/lib/rpm/.rpm.lock",
    "usr/lib/sysimage/rpm/.rpm.lock",
    "run/dnf/rpmtransaction.lock",
)
#: Hold the number of the process that works: dnf 4 (dnf/lock.py), zypper. Each of them waits for
#: that process while any of this number lives, and takes no notice of the file otherwise.
_PID_FILES = (
    "var/lib/dnf/rpmdb_lock.pid",
    "var/cache/dnf/metadata_lock.pid",
    "var/cache/dnf/download_lock.pid",
    "run/zypp.pid",
)
#: struct flock: type, whence, start, length, pid.
_FLOCK = "hhqqi"


def busy_locks(root: Path) -> tuple[str, ...]:
    """One sentence for each package manager lock below ``root`` that another process holds.

    A lock that cannot be looked at counts as held: only root may open most of them. Must not be
    called by a process that holds one itself: closing the file lets go of it (fcntl(2)).
    """
    found: dict[tuple[int, int], str] = {}  # a lock may be reached by two paths
    for name in _LOCKED + _PID_FILES:
        try:
            fd = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            found[-1, len(found)] = f"whether /{name} is locked cannot be seen: {error.strerror}"
            continue
        try:
            pid = _named(fd) if name in _PID_FILES else _locker(fd)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if pid is not None:
            holder = f"{_program(pid)} (pid {pid})" if pid > 0 else "a process"
            found[status.st_dev, status.st_ino] = f"/{name} is held by {holder}"
    return tuple(found.values())


def _locker(fd: int) -> int | None:
    """The process with a write lock on the file; 0 or -1: one that cannot be named (it lives in
    another pid namespace; the lock belongs to an open file, F_OFD_SETLK). None: nobody."""
    wanted = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else int(pid)


def _named(fd: int) -> int | None:
    """The living process whose number is in the file."""
    text = os.read(fd, 32).strip()
    if not text.isdigit() or not Path("/proc", text.decode()).exists():
        return None
    return int(text)


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "a process"

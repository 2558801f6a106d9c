"""Where a guest's RAM files lie, and what the host may do to them."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from hostupdate.eligibility import RamBackend
from hostupdate.remedy import BackingDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of proc_pid_mountinfo(5); ``options`` are those of the mount and of its file
    system together."""

    point: PurePosixPath
    file_system: str
    options: frozenset[str]


def complete(backends: tuple[RamBackend, ...], proc: Path) -> tuple[RamBackend, ...]:
    """Adds what lies behind each backend's path, as the QEMU whose ``/proc/PID`` is given sees it:
    libvirt gives it a mount namespace of its own. OSError where that process is gone."""
    mountinfo = (proc / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return tuple(_complete(backend, mountinfo, proc / "root") for backend in backends)


def _complete(backend: RamBackend, mountinfo: str, root: Path) -> RamBackend:
    if not backend.path.startswith("/"):
        return backend
    mount = mount_of(backend.path, mountinfo)
    try:
        named = stat.S_ISREG((root / backend.path[1:]).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        named = False
    return msgspec.structs.replace(
        backend,
        named=named,
        file_system=mount.file_system if mount else "",
        dax=mount is not None and _is_dax(mount),
        noswap=mount is not None and "noswap" in mount.options,
    )


def _is_dax(mount: Mount) -> bool:
    return not {"dax", "dax=always"}.isdisjoint(mount.options)


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The mount that holds ``path``: the deepest, and of those on one point the last."""
    found: Mount | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 6 or len(tail) < 3:
            continue
        point = PurePosixPath(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[4]))
        if PurePosixPath(path).is_relative_to(point) and (
            found is None or len(point.parts) >= len(found.point.parts)
        ):
            options = frozenset([*fields[5].split(","), *tail[2].split(",")])
            found = Mount(point=point, file_system=tail[0], options=options)
    return found


def backing_directory(path: Path) -> BackingDirectory:
    """What RAM files would lie on in ``path``, which need not exist. OSError."""
    real = path.resolve()
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    mount = mount_of(str(real), mountinfo)
    there = next(each for each in (real, *real.parents) if each.exists())
    limits = os.statvfs(there)
    # tmpfs and hugetlbfs without a limit count no blocks (mm/shmem.c, fs/hugetlbfs/inode.c).
    limited = limits.f_blocks > 0
    return BackingDirectory(
        path=str(path),
        file_system=mount.file_system if mount else "",
        dax=mount is not None and _is_dax(mount),
        noswap=mount is not None and "noswap" in mount.options,
        total_bytes=limits.f_blocks * limits.f_frsize if limited else None,
        free_bytes=limits.f_bavail * limits.f_frsize if limited else None,
        foreign=_foreign(real),
    )


def _foreign(path: Path, tmpfiles: Path = Path("/etc/tmpfiles.d")) -> str:
    """Who but root may decide what is at ``path``; empty: nobody. RAM forgets who made what at the
    next boot, unless tmpfiles.d(5) makes it before anybody else can."""
    made = any(str(path) in each.read_text(errors="replace") for each in tmpfiles.glob("*.conf"))
    for above in reversed(path.parents):
        try:
            status = above.lstat()
        except FileNotFoundError:
            break
        if status.st_uid != 0:
            return f"{above} is not root's"
        if status.st_mode & 0o002 and not made:
            return f"everybody may write to {above}"
    return f"{path} is not root's" if path.exists() and path.lstat().st_uid != 0 else ""


def swap_bytes(swaps: Path = Path("/proc/swaps")) -> int:
    """Size of all swap in use by the kernel; proc_swaps(5) counts in KiB."""
    lines = swaps.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return sum(int(line.split()[2]) * 1024 for line in lines)


def security_drivers(security: Path = Path("/sys/kernel/security")) -> frozenset[str]:
    """Security modules that are active now; empty where securityfs is not mounted."""
    try:
        return frozenset((security / "lsm").read_text().strip().split(","))
    except FileNotFoundError:
        return frozenset()

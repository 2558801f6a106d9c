"""The cgroup v2 tree: where guests live in it, and giving one a cgroup of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from errno import EBUSY
from pathlib import Path

from hostupdate.errors import GuestError, PrerequisiteError

#: Cgroups that we make, all below this one, each named by its guest's uuid.
OURS = "hostupdate"
_DYING_NS = 2_000_000_000


def find_cgroup2(configured: str = "") -> Path | None:
    """Mount point of the cgroup v2 tree, or None where there is none.

    ``configured`` overrides the search; "none" acts as if the host had no cgroup v2.
    """
    if configured == "none":
        return None
    if configured:
        mount = Path(configured)
        if not (mount / "cgroup.procs").exists():
            raise PrerequisiteError(
                f"{configured} is not a cgroup v2 mount", remedy="correct paths.cgroup2"
            )
        return mount
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split()[4].replace("\\040", " "))
    return None


class Cgroups:
    """A cgroup v2 tree. Paths of cgroups are given relative to its mount, with a leading slash."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount

    def directory(self, cgroup: str) -> Path:
        """The directory of a cgroup."""
        return self.mount / cgroup.lstrip("/")

    def of_process(self, pid: int) -> str:
        """The cgroup of the process's whole domain: a threaded child is not what must freeze.

        libvirt puts QEMU's threads into threaded children (emulator, vcpu0, ...) of the guest's
        scope; the scope is the nearest cgroup upwards that is not threaded.
        """
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
            path = next(line[3:].rstrip("\n") for line in lines if line.startswith("0::"))
        while path not in ("", "/") and self._read(path, "cgroup.type") == "threaded":
            path = path.rpartition("/")[0]
        if os.path.basename(path) == "libvirt":
            # The delegated child in which libvirt keeps its threaded ones; the scope is above it.
            path = path.rpartition("/")[0]
        return path or "/"

    def is_shared(self, cgroup: str, pid: int) -> bool:
        """True where freezing the cgroup would stop more than this guest.

        A scope that libvirt made for a guest is the guest's, helpers (swtpm, virtiofsd) included.
        Any other cgroup is the guest's only if nothing else lives in or below it.
        """
        if cgroup == "/":
            return True
        name = os.path.basename(cgroup)
        if name.startswith("machine-qemu") or name.endswith(".libvirt-qemu"):
            return False
        return self.processes(cgroup) != {pid}

    def processes(self, cgroup: str) -> set[int]:
        """Every process in the cgroup and below."""
        found: set[int] = set()
        for directory, _, _ in os.walk(self.directory(cgroup)):
            with suppress(OSError):  # threaded children have no cgroup.procs to read
                found.update(
                    int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()
                )
        return found

    def is_frozen(self, cgroup: str) -> bool:
        """Frozen by anybody, at this level or above."""
        if cgroup == "/":
            return False
        return "frozen 1" in (self._read(cgroup, "cgroup.events") or "")

    def stays_frozen(self, cgroup: str, timeout_ns: int) -> bool:
        """Whether it is still frozen after ``timeout_ns``; looks every millisecond until then."""
        deadline_ns = time.monotonic_ns() + timeout_ns
        while self.is_frozen(cgroup):
            if time.monotonic_ns() >= deadline_ns:
                return True
            time.sleep(0.001)
        return False

    def has_memory(self, cgroup: str) -> bool:
        """The memory controller is on for the cgroup."""
        return (self.directory(cgroup) / "memory.min").exists()

    def own(self, uuid: str) -> str:
        """The cgroup that we would make for a guest."""
        return f"/{OURS}/{uuid}"

    def isolate(self, pid: int, home: str, uuid: str) -> str:
        """Moves a guest's QEMU from ``home`` into a cgroup of its own, whose path is returned.

        Raises GuestError when the kernel refuses; the process is where it was then.
        """
        own = self.own(uuid)
        try:
            self.directory(own).mkdir(parents=True, exist_ok=True)
            self._write(own, "cgroup.procs", str(pid))
        except OSError as error:
            self.remove(own)
            raise GuestError(
                uuid, f"its QEMU cannot be moved from cgroup {home} to {own}: {error}"
            ) from error
        return own

    def restore(self, pid: int | None, own: str, home: str) -> None:
        """Thaws our cgroup, puts the process back home (None: it is gone) and removes ours.

        A home that no longer exists is replaced by the nearest one above that does. Safe to
        repeat. Raises OSError when the process cannot be moved: it runs on, in our cgroup.
        """
        if not self.directory(own).exists():
            return
        self._write(own, "cgroup.freeze", "0")
        if pid is not None:
            while home != "/" and not self.directory(home).exists():
                home = home.rpartition("/")[0] or "/"
            with suppress(ProcessLookupError):
                self._write(home, "cgroup.procs", str(pid))
        self.remove(own)

    def thaw(self, cgroup: str) -> None:
        """Lets the cgroup run; one that is gone needs nothing. OSError where it cannot be told."""
        with suppress(FileNotFoundError):
            self._write(cgroup, "cgroup.freeze", "0")

    def remove(self, own: str) -> None:
        """Removes a cgroup of ours, and our parent one when it was the last.

        A QEMU that was killed stays in it until it has given its memory back: that is waited for.
        """
        deadline_ns = time.monotonic_ns() + _DYING_NS
        while True:
            try:
                self.directory(own).rmdir()
            except OSError as error:
                if error.errno == EBUSY and time.monotonic_ns() < deadline_ns:
                    time.sleep(0.01)
                    continue
            break
        with suppress(OSError):  # another run's are in it
            self.directory(f"/{OURS}").rmdir()

    def memory_min_changes(self, wanted: Iterable[tuple[str, int]]) -> dict[str, tuple[str, str]]:
        """What must change so that each (cgroup, bytes) is protected: cgroup -> (old, new).

        Protection counts only as far as the parents grant it (cgroup-v2.rst, memory.min), so
        every cgroup above gets the sum. No value is ever lowered.
        """
        sums: dict[str, int] = {}
        for cgroup, size_bytes in wanted:
            while cgroup not in ("", "/"):
                sums[cgroup] = sums.get(cgroup, 0) + size_bytes
                cgroup = cgroup.rpartition("/")[0]
        changes = {}
        for cgroup in sorted(sums):
            old = self._read(cgroup, "memory.min")
            if old is not None and old != "max" and int(old) < sums[cgroup]:
                changes[cgroup] = (old, str(sums[cgroup]))
        return changes

    def set_memory_min(self, values: dict[str, str]) -> None:
        """Writes memory.min of each cgroup; one that is gone needs nothing. OSError otherwise."""
        for cgroup, value in values.items():
            with suppress(FileNotFoundError):
                self._write(cgroup, "memory.min", value)

    def memory_current(self, cgroup: str) -> int:
        """Bytes charged to the cgroup now."""
        return int(self._read(cgroup, "memory.current") or 0)

    def _read(self, cgroup: str, name: str) -> str | None:
        try:
            return (self.directory(cgroup) / name).read_text().strip()
        except OSError:
            return None

    def _write(self, cgroup: str, name: str, text: str) -> None:
        fd = os.open(self.directory(cgroup) / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

"""Which QEMU process runs a guest, and what it has open. The only importer of psutil."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from errno import ESRCH
from itertools import pairwise
from pathlib import Path

import psutil

from hostupdate.errors import GuestError

#: Indices in /proc/PID/stat from the state on: fields 12 and 22 of proc(5).
_MAJFLT, _STARTTIME = 9, 19


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuProcess:
    """One QEMU; ``started`` in clock ticks since boot. pid and started name it for this boot."""

    pid: int
    started: int
    program: str


def find_qemus(uuids: Iterable[str]) -> dict[str, QemuProcess]:
    """The QEMU process of each guest that has one, by the ``-uuid`` of its command line.

    libvirt offers no call for a guest's pid, and its pid files lie in different places for each
    driver; the command line is the same for all. Raises GuestError where two processes carry one
    uuid: which of them is the guest cannot be told.
    """
    wanted = set(uuids)
    found: dict[str, QemuProcess] = {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        arguments = process.info["cmdline"] or []
        uuid = next((b for a, b in pairwise(arguments) if a == "-uuid"), "")
        if uuid not in wanted:
            continue
        stat = _stat(process.pid)
        if stat is None:
            continue
        if uuid in found:
            raise GuestError(
                uuid,
                f"processes {found[uuid].pid} and {process.pid} both run it",
                remedy="end the one that should not be there",
            )
        found[uuid] = QemuProcess(
            pid=process.pid, started=int(stat[_STARTTIME]), program=arguments[0]
        )
    return found


def all_qemus() -> dict[int, str]:
    """Every process that runs a guest of libvirt's, with the guest's name: ``-name guest=NAME``
    and more (qemuBuildNameCommandLine)."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        options = dict(pairwise(process.info["cmdline"] or ()))
        if "-uuid" in options:
            named = options.get("-name", "").partition(",")[0]
            found[process.pid] = named.removeprefix("guest=")
    return found


def running_from(directory: Path) -> list[int]:
    """Processes whose program lies below a directory, or did when they began."""
    return [pid for pid in psutil.pids() if Path(program(pid)).is_relative_to(directory)]


def end(pids: Iterable[int]) -> None:
    """Ends processes at once; no error for one that is gone."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def reload_libvirt() -> None:
    """Has libvirt's daemons read their configuration anew, hooks included; no guest is touched
    (libvirtd(8), SIGNALS)."""
    for process in psutil.process_iter(["name", "uids"]):
        ours = process.info["uids"] is not None and process.info["uids"].real == os.geteuid()
        if process.info["name"] in ("libvirtd", "virtqemud") and ours:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGHUP)


def command_line(pid: int) -> list[str]:
    """A process's arguments. GuestError where it is gone."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess as error:
        raise GuestError(str(pid), "its process is gone") from error


def is_same(pid: int, started: int) -> bool:
    """True while the process that had this pid and start time lives and is not a zombie.

    In ticks since boot, which no step of the host's clock moves: an update may well step it.
    """
    stat = _stat(pid)
    return stat is not None and int(stat[_STARTTIME]) == started and stat[0] not in "ZX"


def started(pid: int) -> int:
    """When a living process started, in ticks since boot. ProcessLookupError where it is gone."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(ESRCH, os.strerror(ESRCH))
    return int(stat[_STARTTIME])


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5), field 3); None: no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def dma_writers(pid: int) -> tuple[str, ...]:
    """What could still write into the guest's RAM while its QEMU's threads are frozen.

    Kernel AIO and io_uring requests in flight, vhost workers and assigned devices complete
    outside of QEMU's threads. Empty where none of them is there.
    """
    found = set()
    fds = f"/proc/{pid}/fd"
    for fd in os.listdir(fds):
        try:
            target = os.readlink(f"{fds}/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("/dev/vhost"):
            found.add("vhost")
        elif target.startswith("/dev/vfio"):
            found.add("an assigned device")
        elif target == "anon_inode:[io_uring]":
            found.add("io_uring")
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as arguments:
        if "vhost-user" in arguments.read():
            found.add("a vhost-user process")
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        # A kernel AIO context shows itself only by its ring, which fs/aio.c maps as /[aio].
        if any(line.rstrip().endswith("/[aio]") or "/[aio] (" in line for line in maps):
            found.add("kernel AIO")
    return tuple(sorted(found))


def used_files(pid: int) -> frozenset[str]:
    """Files that a process has mapped or open, under the names that they had: a package manager
    replaces files, and who uses the old one keeps it ("(deleted)", proc_pid_maps(5)).

    GuestError where it is gone or cannot be looked at.
    """
    found = set()
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            found = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if " /" in line}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        found.add(os.readlink(f"/proc/{pid}/exe"))
    except OSError as error:
        raise GuestError(str(pid), f"its process: {error.strerror}") from error
    names = {path.removesuffix(" (deleted)") for path in found if path.startswith("/")}
    return frozenset(name.removesuffix(".dpkg-tmp").removesuffix(".dpkg-new") for name in names)


def major_faults(pid: int) -> int:
    """Major faults of the process's threads so far. ProcessLookupError where it is gone."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(ESRCH, os.strerror(ESRCH))
    return int(stat[_MAJFLT])


def monitor_sockets(pid: int) -> tuple[str, ...]:
    """Paths, as this process reaches them, of the QMP sockets on which the process listens: it may
    live in a mount namespace of its own (libvirt in a container)."""
    try:
        connections = psutil.Process(pid).net_connections(kind="unix")
    except AttributeError:  # psutil before 6.0
        connections = psutil.Process(pid).connections(kind="unix")
    except psutil.NoSuchProcess:
        return ()
    paths = {str(c.laddr) for c in connections if str(c.laddr).endswith("/monitor.sock")}
    reached = []
    for path in sorted(paths):
        through = f"/proc/{pid}/root{path}"
        # A socket's address holds 107 bytes (unix(7)).
        reached.append(through if len(os.fsencode(through)) <= 107 else path)
    return tuple(reached)


def program(pid: int) -> str:
    """Path of the program that a process runs, as it was when it began; empty where it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return ""


def is_replaced(pid: int) -> bool:
    """Whether the file of a process's program has been replaced or removed since it began."""
    try:
        return os.readlink(f"/proc/{pid}/exe").endswith(" (deleted)")
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Stopped by a signal."""
    stat = _stat(pid)
    return stat is not None and stat[0] in "Tt"


def boot_id() -> str:
    """Names this boot of the host (random(4)): pids and start times mean nothing in another."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def continue_process(pid: int, started: int) -> None:
    """SIGCONT, where the process is still the one that started then."""
    if is_same(pid, started):
        os.kill(pid, signal.SIGCONT)

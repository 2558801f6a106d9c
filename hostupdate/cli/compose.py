"""Puts the hands into the engine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hostupdate import __version__
from hostupdate.cli.settings import Settings
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.core import clock
from hostupdate.core.freezer import GuestHandle, GuestSet, open_cgroup, open_process
from hostupdate.core.keeper import Keeper
from hostupdate.engine import Hands
from hostupdate.engine.ports import HandoverPort, KeeperPort, PausedSet, ProgressPort
from hostupdate.errors import CoreError, HostUpdateError, HypervisorError, PrerequisiteError
from hostupdate.guests import Hypervisor
from hostupdate.guests.links import Links
from hostupdate.guests.monitor import resume_by_monitor
from hostupdate.guests.vitals import VitalSigns
from hostupdate.host import processes, threads
from hostupdate.host.cgroups import Cgroups, find_cgroup2
from hostupdate.host.guard import Guard
from hostupdate.host.interrupts import Interrupts
from hostupdate.host.memory import Memory
from hostupdate.host.places import locate
from hostupdate.host.steps import RUN, Steps, program_version
from hostupdate.host.storage import Storage
from hostupdate.journal import RunJournal
from hostupdate.manifest import Manifest
from hostupdate.model import GuestPlace, LocatedGuest
from hostupdate.vitals import Vitals

#: How long the keeper may take to get ready, and for each GiB that it locks: 0.2 s were measured
#: on a busy host.
_KEEPER_NS = 10_000_000_000
_LOCK_NS_PER_GIB = 1_000_000_000


def require_root() -> None:
    """PrerequisiteError for anybody else: guests' processes and cgroups are root's to touch."""
    if os.geteuid() != 0:
        raise PrerequisiteError(
            "hostupdate must be run as root: it reads guests' memory and moves their cgroups",
            remedy="run it with sudo",
        )


@contextmanager
def open_hypervisor(settings: Settings, config: Config) -> Iterator[Hypervisor]:
    """The connection of a verb, closed at its end."""
    hypervisor = Hypervisor(settings.uri, timeout_ns=config.deadlines.libvirt_ns)
    try:
        yield hypervisor
    finally:
        hypervisor.close()


def open_cgroups(config: Config) -> Cgroups | None:
    """The host's cgroup v2 tree, or None."""
    mount = find_cgroup2(config.paths.cgroup2)
    return Cgroups(mount) if mount is not None else None


def located_guests(hypervisor: Hypervisor, cgroups: Cgroups | None) -> list[LocatedGuest]:
    """Every guest and its place."""
    return locate(hypervisor.guests(), cgroups)


def vital_signs(hypervisor: Hypervisor) -> VitalSigns:
    """Looks at guests, and at what they need of this host."""
    return VitalSigns(hypervisor, storage=Storage().probe, threads=threads.stuck)


class HostClock:
    """The host's own clocks."""

    def host_clock(self) -> tuple[int, int]:
        """CLOCK_REALTIME minus CLOCK_MONOTONIC and its uncertainty, ns."""
        reading = clock.bracket(time.CLOCK_MONOTONIC, time.CLOCK_REALTIME)
        return reading.offset_ns, reading.uncertainty_ns

    def host_clock_synchronised(self) -> bool:
        """Whether something keeps the host's clock right; no where the kernel does not say."""
        try:
            return clock.synchronised()
        except CoreError:
            return False


class CCore(HostClock):
    """The C core for one run."""

    def __init__(
        self, run: Path, settings: Settings, config: Config, cgroups: Cgroups | None
    ) -> None:
        self._run = run
        self._cgroups = cgroups
        self._grace_ns = config.deadlines.keeper_grace_ns
        self._handles: list[GuestHandle] = []
        self._recovery = [sys.executable, "-m", "hostupdate", "--state", str(settings.state)]
        if settings.config is not None:  # where hooks lie, and what was kept of QEMU
            self._recovery += ["--config", str(settings.config)]
        self._recovery.append("resume")

    def open_guests(self, guests: Sequence[tuple[str, int, str | None]]) -> PausedSet:
        """Opens each guest (label, pid, cgroup or None) and prepares the calls."""
        for label, pid, cgroup in guests:
            if cgroup is None or self._cgroups is None:
                self._handles.append(open_process(pid, label=label))
            else:
                path = self._cgroups.directory(cgroup)
                self._handles.append(open_cgroup(path, label=label))
        return GuestSet(self._handles)

    def start_keeper(self, guests: PausedSet, ram_fds: Sequence[int]) -> KeeperPort:
        """The keeper outside of every guest's cgroup, with the recovery command prepared."""
        assert isinstance(guests, GuestSet)
        ram_bytes = sum(os.fstat(fd).st_size for fd in ram_fds)
        procs = self._cgroups.mount / "cgroup.procs" if self._cgroups is not None else None
        return Keeper.start(
            guests,
            record=self._run / "keeper.log",
            recovery_log=self._run / "recovery.log",
            recovery_argv=self._recovery,
            ram_fds=ram_fds,
            cgroup_procs=procs,
            grace_ns=self._grace_ns,
            timeout_ns=_KEEPER_NS + ram_bytes * _LOCK_NS_PER_GIB // (1 << 30),
        )

    def close(self) -> None:
        """Closes the guests' files."""
        for handle in self._handles:
            handle.close()
        self._handles.clear()


def versions(hypervisor: Hypervisor, guests: Sequence[LocatedGuest]) -> dict[str, str]:
    """What is installed now, by name. What does not answer is left out."""
    found = {"kernel": os.uname().release, "hostupdate": __version__}
    with suppress(HostUpdateError):
        found["libvirt"] = hypervisor.version()
    pids = [located.place.pid for located in guests if located.place is not None]
    for program in sorted({processes.program(pid) for pid in pids} - {""}):
        found[program] = program_version(program)
    return found


def resume_guest_by_monitor(pid: int, timeout_ns: int) -> None:
    """Resumes the guest of a QEMU process through its own monitor socket."""
    sockets = processes.monitor_sockets(pid)
    if not sockets:
        raise HypervisorError(f"QEMU {pid} has no monitor socket")
    resume_by_monitor(sockets[0], timeout_ns)


@contextmanager
def make_hands(
    *,
    run_id: str,
    settings: Settings,
    config: Config,
    manifest: Manifest,
    directory: Path,
    journal: RunJournal,
    guard: Guard,
    look: Callable[[Sequence[tuple[str, int]]], Mapping[str, Vitals]],
    vitals: Mapping[str, Vitals],
    hypervisor: Hypervisor,
    clocks: Clocks,
    cgroups: Cgroups | None,
    guests: Sequence[LocatedGuest],
    verify_ram: str,
    handover: HandoverPort | None,
    progress: ProgressPort,
) -> Iterator[Hands]:
    """Everything that one run needs, closed at its end."""
    places: dict[str, GuestPlace] = {
        located.guest.uuid: located.place for located in guests if located.place is not None
    }
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        steps = Steps({"DEBIAN_FRONTEND": "noninteractive", **os.environ, RUN: run_id})
        stack.callback(steps.close)
        for number, step in enumerate(manifest.steps, start=1):
            steps.prepare(step, directory / "steps" / f"{number:02}.log")
        yield Hands(
            hypervisor=hypervisor,
            clocks=clocks,
            links=Links(hypervisor),
            cgroups=cgroups,
            core=CCore(directory, settings, config, cgroups),
            ram=Memory(verify_ram),
            steps=steps,
            journal=journal,
            guard=guard,
            handover=handover,
            look=look,
            vitals=vitals,
            progress=progress,
            interrupts=interrupts,
            resume_by_monitor=resume_guest_by_monitor,
            is_alive=processes.is_same,
            versions=lambda: versions(hypervisor, guests),
            inventory=lambda: located_guests(hypervisor, cgroups),
            places=places,
        )
